//! The command line: what was asked for.

use std::path::PathBuf;

use burn_boft::Transformers;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::device::DeviceName;
use crate::evidence::Preset;
use crate::settings::{MethodName, Options};

/// Fine-tunes DINOv2 on your own pictures with BOFT, OFT, LoRA, a linear probe or full fine-tuning.
///
/// Without a command it trains with BOFT: a small model that comes with this program, and has seen the handwritten digits
/// 0 to 4, learns the digits 5 to 9.
#[derive(Debug, Parser)]
#[command(name = "dinov2", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,

    /// What `train` takes.
    #[command(flatten)]
    pub train: Train,
}

impl Cli {
    /// The command, which is to train if none is named.
    pub fn chosen(self) -> Command {
        self.command
            .unwrap_or_else(|| Command::Train(Box::new(self.train)))
    }
}

/// What the program does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Trains on your images, and saves what was trained
    Train(Box<Train>),
    /// Measures accuracy, F1 and the confusion of classes on labelled images
    Eval(Eval),
    /// Classifies images
    Predict(Predict),
    /// Writes a model or an adapter for `transformers` and PEFT
    Export(Export),
    /// Writes a page about a run: curves, mistakes, rotations
    Report(Report),
    /// Compares methods under one protocol
    Compare(Compare),
    /// Trains the small model that comes with this program
    Pretrain(Pretrain),
    /// Prints completions for a shell
    Completions {
        /// The shell.
        shell: Shell,
    },
}

/// Trains on your images, and saves what was trained.
#[derive(Args, Debug, Default)]
pub struct Train {
    /// Settings in a TOML file, with the names of the flags below; flags take precedence
    #[arg(long, value_name = "FILE")]
    pub settings: Option<PathBuf>,

    /// Folder for the run, which must not exist yet [default: dinov2-output, or with a number if that exists]
    #[arg(long, value_name = "FOLDER")]
    pub output: Option<PathBuf>,

    /// Replaces a run that is in --output already
    #[arg(long, requires = "output")]
    pub overwrite: bool,

    /// Goes on with a run that was interrupted, with its own settings
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["settings", "output", "overwrite"])]
    pub resume: Option<PathBuf>,

    /// Shows lines on a terminal too, in place of Burn's dashboard
    #[arg(long)]
    pub plain: bool,

    #[command(flatten)]
    pub options: Options,
}

/// A trained model: a run, or a pretrained model with or without an adapter.
#[derive(Args, Clone, Debug, Default)]
pub struct Model {
    /// Run of `train`, whose model, adapter and images are used
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["model", "adapter"])]
    pub run: Option<PathBuf>,

    /// Pretrained model: a Hugging Face folder or a name such as facebook/dinov2-small
    #[arg(long, value_name = "FOLDER|NAME")]
    pub model: Option<String>,

    /// Adapter for it, as this program or PEFT saved it
    #[arg(long, value_name = "FOLDER")]
    pub adapter: Option<PathBuf>,

    /// Pixels along each side of the images that the model reads [default: as it was trained]
    #[arg(long, value_name = "PIXELS")]
    pub image_size: Option<usize>,

    /// Images that pass through the model at a time
    #[arg(long, value_name = "IMAGES", default_value_t = 32)]
    pub batch_size: usize,

    /// Threads that decode images [default: one per processor]
    #[arg(long, value_name = "COUNT")]
    pub workers: Option<usize>,

    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceName,
}

/// Measures accuracy, F1 and the confusion of classes on labelled images.
#[derive(Args, Debug)]
pub struct Eval {
    #[command(flatten)]
    pub model: Model,

    /// Labelled images: a folder per class, or train/, val/ and test/ with a folder per class in each
    /// [default: those of the run]
    #[arg(long, value_name = "FOLDER")]
    pub data: Option<PathBuf>,

    /// Part of the images [default: test; all of a --data that has no parts]
    #[arg(long, value_enum)]
    pub part: Option<Part>,

    /// Seed of the split, where the folder has no parts [default: that of the run, or 0]
    #[arg(long)]
    pub seed: Option<u64>,

    /// Goes on without images that cannot be read
    #[arg(long)]
    pub skip_corrupt: bool,

    /// Prints JSON
    #[arg(long)]
    pub json: bool,
}

/// The parts of a data set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Part {
    Train,
    Val,
    #[default]
    Test,
    All,
}

/// Classifies images.
#[derive(Args, Debug)]
pub struct Predict {
    #[command(flatten)]
    pub model: Model,

    /// Images, and folders of images
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    pub images: Vec<PathBuf>,

    /// Classes to name for each image
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    pub top: usize,

    /// Prints a line of JSON per image
    #[arg(long)]
    pub json: bool,
}

/// Writes a model or an adapter for `transformers` and PEFT.
#[derive(Args, Debug)]
pub struct Export {
    #[command(flatten)]
    pub model: Model,

    /// Folder to write, which must not exist yet
    #[arg(long, value_name = "FOLDER")]
    pub output: PathBuf,

    /// What to write
    #[arg(long, value_enum, default_value_t)]
    pub what: What,

    /// Names of modules in an adapter: PEFT loads it into a model in memory, whose names transformers 5 changed
    #[arg(long, value_enum, value_name = "GENERATION", default_value_t)]
    pub names: Names,
}

/// The generations of `transformers`, which name the modules of DINOv2 differently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Names {
    /// transformers 4.
    #[value(name = "4")]
    V4,
    /// transformers 5.
    #[default]
    #[value(name = "5")]
    V5,
}

impl From<Names> for Transformers {
    fn from(names: Names) -> Self {
        match names {
            Names::V4 => Self::V4,
            Names::V5 => Self::V5,
        }
    }
}

/// What is exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// The whole model with plain weights, its configuration and its preprocessing.
    #[default]
    Merged,
    /// The adapter alone, in PEFT's layout.
    Adapter,
}

/// Writes a page about a run: curves, mistakes, rotations.
#[derive(Args, Debug)]
pub struct Report {
    /// Folder of the run
    #[arg(value_name = "RUN")]
    pub run: PathBuf,

    /// Page to write [default: report.html in the run]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Images of the worst mistakes to show
    #[arg(long, value_name = "COUNT", default_value_t = 24)]
    pub mistakes: usize,

    /// Images whose patch features are shown
    #[arg(long, value_name = "COUNT", default_value_t = 4)]
    pub patches: usize,
}

/// Compares methods under one protocol.
#[derive(Args, Debug)]
pub struct Compare {
    /// Protocol: methods, rates to choose from, epochs, batch
    #[arg(long, value_enum, default_value = "digits")]
    pub preset: Preset,

    /// Pretrained model [default: the small one that comes with this program]
    #[arg(long, value_name = "FOLDER|NAME")]
    pub model: Option<String>,

    /// Images to learn; each folder is a task of its own [default: the handwritten digits 5 to 9]
    #[arg(long, value_name = "FOLDER", num_args = 1..)]
    pub data: Vec<PathBuf>,

    /// Labelled images that no method is trained on; what the features still say about them shows what was forgotten
    /// [default: the handwritten digits]
    #[arg(long, value_name = "FOLDER")]
    pub remember: Option<PathBuf>,

    /// Pixels along each side of the images that the model reads
    #[arg(long, value_name = "PIXELS")]
    pub image_size: Option<usize>,

    /// Methods to compare [default: all]
    #[arg(long, value_enum, value_name = "METHOD", value_delimiter = ',')]
    pub methods: Vec<MethodName>,

    /// Learning rates to choose from [default: by method, of the preset]
    #[arg(long, value_name = "RATE", value_delimiter = ',')]
    pub rates: Vec<f64>,

    /// Repetitions with different seeds [default: of the preset]
    #[arg(long, value_name = "COUNT")]
    pub seeds: Option<u64>,

    /// Passes over the training images [default: of the preset]
    #[arg(long, value_name = "COUNT")]
    pub epochs: Option<usize>,

    /// Ends every training after so many optimizer steps
    #[arg(long, value_name = "STEPS")]
    pub max_steps: Option<usize>,

    /// Folder for the results; a comparison that was interrupted goes on if it exists
    #[arg(long, value_name = "FOLDER", default_value = "dinov2-comparison")]
    pub output: PathBuf,

    /// Threads that decode images [default: one per processor]
    #[arg(long, value_name = "COUNT")]
    pub workers: Option<usize>,

    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceName,
}

/// Trains the small model that comes with this program.
#[derive(Args, Debug)]
pub struct Pretrain {
    /// File to write
    #[arg(value_name = "FILE")]
    pub output: PathBuf,

    /// Passes over the training images
    #[arg(long, value_name = "COUNT", default_value_t = 20)]
    pub epochs: usize,

    /// Seed of the weights and of the order of images
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Where to compute
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceName,
}
