//! The command line: what can be asked for.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

/// Inspects, merges, unmerges and converts OFT and BOFT adapters on disk.
///
/// Models are safetensors files of any architecture, or folders with one or with shards and their index.
/// Adapters are PEFT's folders, or files of LyCORIS, OneTrainer and sd-scripts, which `formats` lists.
#[derive(Debug, Parser)]
#[command(name = "burn-boft", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// Print the result as JSON
    #[arg(long, global = true)]
    pub json: bool,

    /// Remove what runs that were killed left beside the output
    #[arg(long, global = true)]
    pub clean: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Writes a model with adapters folded into its weights
    Merge(Merge),
    /// Takes merged adapters out of a model again, and says how exact that is
    ///
    /// No file says how adapters were merged, so that they have to be given as for `merge`: in the same order, of which the
    /// last is taken out first, and with the same --strength and --factors.
    ///
    /// How far merging them again would be off is an estimate, for which every row is multiplied by a random vector. --base compares
    /// every number with the model from before the merge.
    Unmerge(Unmerge),
    /// Shows what an adapter is and how far it turns each layer
    Inspect(Inspect),
    /// Compares two adapters, or two models, layer by layer
    ///
    /// Of adapters it prints the angles of the rotation from one to the other, R_Aᵀ·R_B, and how far their scales are apart;
    /// of models, how far the weights of the second are from those of the first.
    Diff(Diff),
    /// Writes an adapter in another form: PEFT's folder, a Burn record, OFT, BOFT, LoRA
    Convert(Convert),
    /// Lists the programs and formats whose adapters are read, and what becomes of each
    Formats,
    /// Prints what a shell needs to complete commands and options
    Completions(Completions),
    /// Prints the manual page of the tool, or of one command
    Man(Man),
}

/// The options of `completions`.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    pub shell: Shell,
}

/// The options of `man`.
#[derive(Debug, Args)]
pub struct Man {
    /// The command, for a page of its own
    pub command: Option<String>,
}

/// The options of `convert`.
#[derive(Debug, Args)]
pub struct Convert {
    /// The adapter: PEFT's folder (BOFT since 0.11, OFT since 0.14), a Burn record (.bpk), or another program's .safetensors file
    pub input: PathBuf,

    /// The form to write
    #[arg(long, value_enum, required_unless_present = "to_lora")]
    pub to: Option<To>,

    /// Write the nearest LoRA of this rank in PEFT's layout, and print what it leaves out
    #[arg(
        long,
        value_name = "RANK",
        value_parser = clap::value_parser!(u32).range(1..=65536),
        requires = "base",
        conflicts_with = "to"
    )]
    pub to_lora: Option<u32>,

    /// The folder or file to write, which must not exist yet
    #[arg(long, value_name = "PATH")]
    pub output: PathBuf,

    /// The model that the adapter is for, needed where the adapter alone does not say enough
    #[arg(long, value_name = "PATH")]
    pub base: Option<PathBuf>,

    /// Write the adapter at another strength, as `merge` takes it
    ///
    /// Its skew, or what a COFT radius leaves of it, is multiplied, and the result has no radius, which would bound it
    /// once more. Trained biases and saved modules are written as they are.
    #[arg(
        long,
        value_name = "NUMBER",
        value_parser = finite,
        allow_negative_numbers = true
    )]
    pub strength: Option<f64>,

    /// Write the first butterfly factors, this many, as `merge` takes them, and zeros for the others
    #[arg(long, value_name = "COUNT")]
    pub factors: Option<usize>,

    /// The adapter_config.json for a record that holds no settings
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Rename the adapter's modules as for `merge`; with --to-lora, only to find them in the model
    #[arg(long = "map", value_name = "RULE")]
    pub maps: Vec<String>,

    /// Of a file of another program, take only the modules whose names start with this, such as lora_unet_; with
    /// --to sd-scripts, start the names in the output so
    #[arg(long, value_name = "START")]
    pub part: Option<String>,

    #[command(flatten)]
    pub reading: ReadArgs,
}

/// The forms that an adapter can be converted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum To {
    /// PEFT's folder in today's layout
    Peft,
    /// PEFT's folder of BOFT, from OFT with the exact Cayley map
    Boft,
    /// PEFT's folder of OFT, from BOFT with one factor and a scale of ones
    Oft,
    /// A Burn record of the injected parameters (.bpk)
    Record,
    /// A file for sd-scripts, networks.oft_v2 or networks.boft; OneTrainer reads the first too. --part says how names start
    SdScripts,
}

/// The options of `inspect`.
#[derive(Debug, Args)]
pub struct Inspect {
    /// The adapter: PEFT's folder, or a file of another program
    pub adapter: PathBuf,

    /// Draw the rotation angle of each layer into an SVG file, which must not exist yet
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,

    #[command(flatten)]
    pub reading: ReadArgs,
}

/// The options of `diff`.
#[derive(Debug, Args)]
pub struct Diff {
    /// An adapter, or a model: what PEFT's folder, a record (.bpk) or a safetensors file holds decides
    pub a: PathBuf,

    /// Another adapter, or another model
    pub b: PathBuf,

    /// The model that both adapters are for, needed where they name its modules differently
    #[arg(long, value_name = "PATH")]
    pub base: Option<PathBuf>,

    /// Rename the modules of both adapters as for `merge`
    #[arg(long = "map", value_name = "RULE")]
    pub maps: Vec<String>,

    /// Of files of other programs, take only the modules whose names start with this, such as lora_unet_
    #[arg(long, value_name = "START")]
    pub part: Option<String>,

    #[command(flatten)]
    pub reading: ReadArgs,
}

/// The options of `unmerge`.
#[derive(Debug, Args)]
pub struct Unmerge {
    /// The merged model: a safetensors file, or a folder with one or with shards
    #[arg(long, value_name = "PATH")]
    pub merged: PathBuf,

    #[command(flatten)]
    pub adapters: AdapterArgs,

    /// The file or folder to write, which must not exist yet
    #[arg(long, value_name = "PATH")]
    pub output: PathBuf,

    /// The model from before the merge, to print how far the restored weights are from it
    #[arg(long, value_name = "PATH")]
    pub base: Option<PathBuf>,

    /// Leave trained biases and saved modules as the merge wrote them: no file holds what they replaced
    #[arg(long)]
    pub keep_saved: bool,
}

/// The options of `merge`.
#[derive(Debug, Args)]
pub struct Merge {
    /// The model: a safetensors file, or a folder with one or with shards
    #[arg(long, value_name = "PATH")]
    pub base: PathBuf,

    #[command(flatten)]
    pub adapters: AdapterArgs,

    /// The file or folder to write, which must not exist yet
    #[arg(long, value_name = "PATH", required_unless_present = "dry_run")]
    pub output: Option<PathBuf>,

    /// Print what would change, and write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Print what rounding the merged weights to 8 and to 4 bits would lose, beside the base and the nearest LoRA
    ///
    /// Every weight that is rotated is rounded to the nearest of 255 numbers (8 bits) and of 15 (4 bits), evenly spaced
    /// around zero and with one scale for each output, and in 4 bits once more with a scale for every 128 inputs of an
    /// output. Calibration, as in GPTQ or AWQ, is not taken into account. A loss is ‖rounded − exact‖ / ‖exact‖, of
    /// weights as the model's precision holds them.
    ///
    /// The LoRA has the largest rank with no more numbers than the adapters have for the weight, and at least 1. Its
    /// change is the nearest of that rank to the one that the merge makes, and as large.
    ///
    /// What is written is not quantized.
    #[arg(long)]
    pub quantize_check: bool,
}

/// Adapters, how much of them is taken, and how their names become those of a model.
#[derive(Debug, Args)]
pub struct AdapterArgs {
    /// The adapter: PEFT's folder, or a file of another program. Can be repeated
    ///
    /// Several are merged in the order in which they are given, as one after the other through files would be, except
    /// that the weights are rounded once, at the end. --strength, --factors and --part hold for all of them, or are
    /// given once for each in their order; --map holds for all of them. Two adapters may rotate one layer, but not
    /// replace the same bias or saved module.
    #[arg(long = "adapter", value_name = "PATH", required = true)]
    pub adapters: Vec<PathBuf>,

    /// How far to rotate: 1 is the adapter as it is, 0 no rotation, -1 the opposite one
    ///
    /// The skew-symmetric matrix Q of each block, or what a bound such as COFT's or `alpha` leaves of it, is multiplied
    /// by this number before it is mapped to a block. With the exact Cayley map the rotation stays orthogonal. A
    /// Neumann polynomial is less orthogonal the larger its matrix is, and a line says by how much. A negative number
    /// transposes every block: with the exact map, -1 undoes an adapter of one factor, but not one of several, which
    /// would have to be multiplied in the opposite order too. `unmerge` undoes them all.
    ///
    /// A scale s becomes s to the power of this number. Trained biases and saved modules are taken whole.
    #[arg(
        long = "strength",
        value_name = "NUMBER",
        value_parser = finite,
        allow_negative_numbers = true
    )]
    pub strengths: Vec<f64>,

    /// Keep the first butterfly factors, this many, and take the identity for the others
    ///
    /// The first factor is the one that activations meet first. In PEFT, which rotates the inputs of a layer, that is
    /// the last of `boft_R`, which joins the most distant channels. In LyCORIS, which rotates the outputs, it is the
    /// first of `oft_blocks`. An OFT adapter has one factor. Scales, biases and saved modules are taken whole.
    #[arg(long = "factors", value_name = "COUNT")]
    pub factors: Vec<usize>,

    /// Rename the adapter's modules to the model's: <regex>=<replacement> with $1 for groups, split at the last `=`
    ///
    /// Can be repeated; rules apply in order. A model type such as `vit` or `dinov2` in their place has the rules for
    /// names of transformers 5, which the type in the model's config.json chooses otherwise; `none` turns them off.
    #[arg(long = "map", value_name = "RULE")]
    pub maps: Vec<String>,

    /// Of a file of another program, take only the modules whose names start with this, such as lora_unet_
    ///
    /// Where it is given once for each adapter, "" takes all modules, also of an adapter of PEFT's.
    #[arg(long = "part", value_name = "START")]
    pub parts: Vec<String>,

    #[command(flatten)]
    pub reading: ReadArgs,
}

/// How an adapter in PEFT's folder is read.
#[derive(Debug, Clone, Copy, Args)]
pub struct ReadArgs {
    /// Leave out tensors in PEFT's folder that belong to no adapter and to nothing that it saves, with a warning for each
    ///
    /// PEFT 0.20 and older also trained weights of the model, and wrote them into the file, where the name of a module
    /// contains the letters `oft_`, or `boft_` for an adapter of BOFT. Without this option such a file is refused. To keep
    /// the weights of a module, name it in modules_to_save of adapter_config.json instead. A tensor that is missing is an
    /// error in any case.
    #[arg(long)]
    pub allow_unexpected: bool,
}

/// Reads a number that is neither NaN nor infinite.
fn finite(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_string())?;
    match number.is_finite() {
        true => Ok(number),
        false => Err("not a finite number".into()),
    }
}
