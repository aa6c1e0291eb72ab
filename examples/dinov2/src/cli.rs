//! The command line: what was asked for, checked before any work.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::backbone::{Backbone, Size};
use crate::device::DeviceName;
use crate::error::Error;
use crate::method::Method;
use crate::train::Recipe;

/// Pixels along each side of a DINOv2 patch.
const PATCH: usize = 14;
/// Rank of the LoRA that BOFT is compared with: about as many parameters.
const LORA_RANK: usize = 2;

/// Adapts a DINOv2 image classifier with BOFT, and shows what that costs and brings.
///
/// Without options it adapts the backbone that comes with this example, which has seen the handwritten
/// digits 0 to 4, to the digits 5 to 9. With --images and --backbone it adapts a DINOv2 checkpoint to
/// your own images.
#[derive(Debug, Parser)]
#[command(name = "dinov2", version)]
pub struct Cli {
    /// Folder of images to learn: one subfolder per class, PNG or JPEG files in it. All files are read at
    /// the start and kept in memory [default: the handwritten digits 5 to 9]
    #[arg(long, value_name = "FOLDER")]
    images: Option<PathBuf>,

    /// DINOv2 checkpoint for --images, such as the model.safetensors of facebook/dinov2-small
    #[arg(long, value_name = "FILE")]
    backbone: Option<PathBuf>,

    /// Size of the checkpoint's model [default: small]
    #[arg(long, value_enum)]
    size: Option<Size>,

    /// The checkpoint's model has register tokens
    #[arg(long)]
    registers: bool,

    /// Pixels along each side of the images that the model reads, a multiple of 14 [default: 224]
    #[arg(long, value_name = "PIXELS")]
    image_size: Option<usize>,

    /// How to adapt the model; the head is trained by all of them [default: boft]
    #[arg(long, value_enum)]
    method: Option<MethodName>,

    /// Channels per rotated block [default: 4 for boft, 8 for oft]
    #[arg(long, value_name = "CHANNELS")]
    block_size: Option<usize>,

    /// Butterfly factors of boft [default: 2]
    #[arg(long)]
    factors: Option<usize>,

    /// Share of one factor's blocks that a training step of boft leaves unrotated [default: 0.1]
    #[arg(long, value_name = "SHARE")]
    dropout: Option<f64>,

    /// First learning rate; it falls to zero along a cosine [default: by method; --compare picks one]
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,

    /// Passes over the training images
    #[arg(long, default_value_t = 20)]
    epochs: usize,

    /// Images per optimizer step
    #[arg(long, value_name = "IMAGES", default_value_t = 32)]
    batch_size: usize,

    /// Train at most this many optimizer steps: whole epochs where they fit, else one short epoch
    #[arg(long, value_name = "STEPS")]
    max_steps: Option<usize>,

    /// Seed of the split, of the new head and of the order of the images
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Folder for the trained record [default: dinov2-output in the current folder]
    #[arg(long, value_name = "FOLDER")]
    output: Option<PathBuf>,

    /// Where to compute; Cargo features of this example add devices
    #[arg(long, value_enum, default_value_t)]
    device: DeviceName,

    /// Compare linear probe, LoRA, OFT, BOFT and full fine-tuning on the digits, in one table
    #[arg(long)]
    compare: bool,

    /// Repetitions of --compare, with seeds from --seed upwards [default: 3]
    #[arg(long, value_name = "COUNT")]
    seeds: Option<u64>,

    /// Train the backbone that comes with this example, write it to a file, and end
    #[arg(long, value_name = "FILE")]
    pretrain: Option<PathBuf>,
}

/// The methods by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MethodName {
    Boft,
    Oft,
    Lora,
    Linear,
    Full,
}

/// A checked request.
#[derive(Clone, Debug)]
pub struct Settings {
    pub job: Job,
    pub recipe: Recipe,
    pub device: DeviceName,
}

/// What to do.
#[derive(Clone, Debug)]
pub enum Job {
    /// Adapt a model and save what was trained.
    Adapt(Adapt),
    /// Compare all methods on the digits.
    Compare { methods: Vec<Method>, seeds: u64 },
    /// Train the backbone that comes with the example.
    Pretrain { output: PathBuf },
}

/// One model to adapt.
#[derive(Clone, Debug)]
pub struct Adapt {
    /// A folder of images; the digits if there is none.
    pub images: Option<PathBuf>,
    pub backbone: Backbone,
    pub method: Method,
    pub learning_rate: f64,
    pub output: PathBuf,
}

impl Cli {
    /// Checks every option against its range and against the others.
    ///
    /// # Errors
    ///
    /// The first option that is out of range or has no place in this job.
    pub fn settings(self) -> Result<Settings, Error> {
        self.check_ranges()?;
        let job = if let Some(output) = &self.pretrain {
            self.check_pretrain()?;
            Job::Pretrain {
                output: output.clone(),
            }
        } else if self.compare {
            self.check_compare()?;
            Job::Compare {
                methods: MethodName::ALL.map(|name| self.method(name)).to_vec(),
                seeds: self.seeds.unwrap_or(3),
            }
        } else {
            Job::Adapt(self.adapt()?)
        };
        Ok(Settings {
            job,
            recipe: Recipe {
                epochs: self.epochs,
                batch_size: self.batch_size,
                max_steps: self.max_steps,
                seed: self.seed,
            },
            device: self.device,
        })
    }

    fn check_ranges(&self) -> Result<(), Error> {
        let rate = self.learning_rate.unwrap_or(1.0);
        let dropout = self.dropout.unwrap_or(0.0);
        let size = self.image_size.unwrap_or(PATCH);
        let checks = [
            (self.epochs > 0, "--epochs must be 1 or more"),
            (self.batch_size > 0, "--batch-size must be 1 or more"),
            (self.max_steps != Some(0), "--max-steps must be 1 or more"),
            (self.seeds != Some(0), "--seeds must be 1 or more"),
            (
                rate > 0.0 && rate <= 1.0,
                "--learning-rate must be above 0 and at most 1",
            ),
            (
                (0.0..1.0).contains(&dropout),
                "--dropout must be at least 0 and below 1",
            ),
            (
                self.block_size.is_none_or(|size| size >= 2),
                "--block-size must be 2 or more",
            ),
            (self.factors != Some(0), "--factors must be 1 or more"),
            (
                size > 0 && size.is_multiple_of(PATCH),
                "--image-size must be a multiple of 14",
            ),
        ];
        match checks.iter().find(|(holds, _)| !holds) {
            Some((_, complaint)) => Err(Error::Settings((*complaint).to_string())),
            None => Ok(()),
        }
    }

    fn check_pretrain(&self) -> Result<(), Error> {
        self.refuse(
            "--pretrain trains the backbone of this example and takes no",
            |cli| {
                vec![
                    ("--compare", cli.compare),
                    ("--seeds", cli.seeds.is_some()),
                    ("--block-size", cli.block_size.is_some()),
                    ("--factors", cli.factors.is_some()),
                    ("--dropout", cli.dropout.is_some()),
                ]
            },
        )?;
        self.refuse_adapt("--pretrain trains the backbone of this example and takes no")
    }

    fn check_compare(&self) -> Result<(), Error> {
        self.refuse_adapt("--compare runs every method on the digits and takes no")
    }

    /// Refuses the options that only adapting one model reads.
    fn refuse_adapt(&self, why: &str) -> Result<(), Error> {
        self.refuse(why, |cli| {
            vec![
                ("--images", cli.images.is_some()),
                ("--backbone", cli.backbone.is_some()),
                ("--size", cli.size.is_some()),
                ("--registers", cli.registers),
                ("--image-size", cli.image_size.is_some()),
                ("--method", cli.method.is_some()),
                ("--learning-rate", cli.learning_rate.is_some()),
                ("--output", cli.output.is_some()),
            ]
        })
    }

    fn refuse(
        &self,
        why: &str,
        given: impl Fn(&Self) -> Vec<(&'static str, bool)>,
    ) -> Result<(), Error> {
        match given(self).iter().find(|(_, given)| *given) {
            Some((option, _)) => Err(Error::Settings(format!("{why} {option}"))),
            None => Ok(()),
        }
    }

    fn adapt(&self) -> Result<Adapt, Error> {
        self.refuse("only --compare takes", |cli| {
            vec![("--seeds", cli.seeds.is_some())]
        })?;
        let name = self.method.unwrap_or(MethodName::Boft);
        if name != MethodName::Boft {
            self.refuse("only --method boft takes", |cli| {
                vec![
                    ("--factors", cli.factors.is_some()),
                    ("--dropout", cli.dropout.is_some()),
                ]
            })?;
        }
        if !matches!(name, MethodName::Boft | MethodName::Oft) {
            self.refuse("only --method boft and oft take", |cli| {
                vec![("--block-size", cli.block_size.is_some())]
            })?;
        }
        let method = self.method(name);
        Ok(Adapt {
            images: self.images.clone(),
            backbone: self.backbone()?,
            learning_rate: self.learning_rate.unwrap_or(method.learning_rate()),
            method,
            output: self
                .output
                .clone()
                .unwrap_or_else(|| PathBuf::from("dinov2-output")),
        })
    }

    fn backbone(&self) -> Result<Backbone, Error> {
        let Some(path) = &self.backbone else {
            self.refuse(
                "the backbone of this example reads the digits alone; add --backbone to use",
                |cli| {
                    vec![
                        ("--images", cli.images.is_some()),
                        ("--size", cli.size.is_some()),
                        ("--registers", cli.registers),
                        ("--image-size", cli.image_size.is_some()),
                    ]
                },
            )?;
            return Ok(Backbone::Embedded);
        };
        if self.images.is_none() {
            let text =
                "--backbone needs --images: the digits are too small for a DINOv2 checkpoint";
            return Err(Error::Settings(text.to_string()));
        }
        Ok(Backbone::File {
            path: path.clone(),
            size: self.size.unwrap_or_default(),
            registers: self.registers,
            image_size: self.image_size.unwrap_or(224),
        })
    }

    fn method(&self, name: MethodName) -> Method {
        match name {
            MethodName::Linear => Method::Linear,
            MethodName::Lora => Method::Lora { rank: LORA_RANK },
            MethodName::Oft => Method::Oft {
                block_size: self.block_size.unwrap_or(8),
            },
            MethodName::Boft => Method::Boft {
                block_size: self.block_size.unwrap_or(4),
                factors: self.factors.unwrap_or(2),
                dropout: self.dropout.unwrap_or(0.1),
            },
            MethodName::Full => Method::Full,
        }
    }
}

impl MethodName {
    const ALL: [Self; 5] = [Self::Linear, Self::Lora, Self::Oft, Self::Boft, Self::Full];
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn settings(options: &[&str]) -> Result<Settings, String> {
        let cli = Cli::try_parse_from([&["dinov2"], options].concat());
        cli.map_err(|error| error.to_string())?
            .settings()
            .map_err(|error| error.line())
    }

    #[test]
    fn the_help_states_the_defaults_of_the_code() {
        let help = Cli::command().render_long_help().to_string();
        let adapt = |options: &[&str]| match settings(options).unwrap().job {
            Job::Adapt(adapt) => adapt,
            job => panic!("{job:?}"),
        };
        let boft = Method::Boft {
            block_size: 4,
            factors: 2,
            dropout: 0.1,
        };
        assert_eq!(adapt(&[]).method, boft);
        assert_eq!(
            adapt(&["--method", "oft"]).method,
            Method::Oft { block_size: 8 }
        );
        assert_eq!(adapt(&[]).output, PathBuf::from("dinov2-output"));
        for stated in [
            "adapt the model; the head is trained by all of them [default: boft]",
            "Channels per rotated block [default: 4 for boft, 8 for oft]",
            "Butterfly factors of boft [default: 2]",
            "leaves unrotated [default: 0.1]",
            "[default: dinov2-output in the current folder]",
        ] {
            assert!(help.contains(stated), "{stated}: {help}");
        }
    }

    #[test]
    fn an_option_without_effect_is_refused_by_name() {
        let cases = [
            (vec!["--seeds", "2"], "--seeds"),
            (vec!["--method", "oft", "--factors", "2"], "--factors"),
            (
                vec!["--method", "lora", "--block-size", "2"],
                "--block-size",
            ),
            (vec!["--images", "x"], "--images"),
            (vec!["--backbone", "x"], "--images"),
            (vec!["--registers"], "--registers"),
            (vec!["--compare", "--method", "boft"], "--method"),
            (vec!["--pretrain", "x", "--factors", "2"], "--factors"),
            (vec!["--pretrain", "x", "--compare"], "--compare"),
        ];
        for (options, named) in cases {
            let complaint = settings(&options).unwrap_err();
            assert!(complaint.contains(named), "{options:?}: {complaint}");
        }
    }
}
