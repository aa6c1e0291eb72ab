//! What a run is to do: flags and a file of settings become one checked set, which is saved beside the run.

mod options;

use std::path::{Path, PathBuf};

pub use options::{Augment, MethodName, Options};

use crate::device::{DeviceName, Precision};
use crate::error::Error;
use crate::method::Method;
use crate::training::Recipe;

/// A checked set of settings, in which everything is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub model: Option<String>,
    pub data: Option<PathBuf>,
    pub adapter: Option<PathBuf>,
    pub image_size: Option<usize>,
    pub augment: Augment,
    pub skip_corrupt: bool,
    pub workers: usize,
    pub warm_start: bool,
    pub probe: bool,
    pub checkpoint_every: usize,
    pub device: DeviceName,
    pub dtype: Precision,
    pub gradient_checkpointing: bool,
    pub method: Method,
    pub recipe: Recipe,
}

/// What the defaults of a run depend on.
#[derive(Clone, Debug)]
pub struct Subject {
    /// The width of the model's tokens.
    pub width: usize,
    /// Whether the images are photographs, and not the digits.
    pub photographs: bool,
    /// The method of the adapter that the run starts from.
    pub adapter: Option<Method>,
}

impl Options {
    /// Chooses what was left open.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn resolve(&self, subject: &Subject) -> Result<Settings, Error> {
        self.check()?;
        let method = self.method(subject.adapter.as_ref())?;
        let rate = self
            .learning_rate
            .unwrap_or_else(|| method.learning_rate(subject.width));
        let of_head = match method {
            // It trains nothing but the head.
            Method::Linear => rate,
            _ => Method::Linear.learning_rate(subject.width),
        };
        let augment = match subject.photographs {
            true => Augment::Standard,
            false => Augment::None,
        };
        Ok(Settings {
            model: self.model.clone(),
            data: self.data.clone(),
            adapter: self.adapter.clone(),
            image_size: self.image_size,
            augment: self.augment.unwrap_or(augment),
            skip_corrupt: self.skip_corrupt.unwrap_or(false),
            workers: self.workers.unwrap_or_else(processors),
            warm_start: self.warm_start.unwrap_or(false),
            probe: !self.no_probe.unwrap_or(false),
            checkpoint_every: self.checkpoint_every.unwrap_or(100),
            device: self.device.unwrap_or_default(),
            dtype: self.dtype.unwrap_or_default(),
            gradient_checkpointing: self.gradient_checkpointing.unwrap_or(false),
            recipe: Recipe {
                epochs: self.epochs.unwrap_or(20),
                batch_size: self.batch(),
                accumulate: self.accumulate.unwrap_or(1),
                max_steps: self.max_steps,
                learning_rate: rate,
                head_learning_rate: self.head_learning_rate.unwrap_or(of_head),
                warm_up: self.warm_up.unwrap_or(0.1),
                weight_decay: self.weight_decay.unwrap_or(0.02),
                clip_norm: self.clip_norm.unwrap_or(1.0),
                label_smoothing: self.label_smoothing.unwrap_or(0.0),
                patience: self.patience,
                seed: self.seed.unwrap_or(0),
            },
            method,
        })
    }
}

/// How many threads this machine runs at once.
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl Settings {
    /// Reads the settings that a run has saved.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or holds something else.
    pub fn read(path: &Path) -> Result<Self, Error> {
        // Everything is chosen in such a file, so no default depends on a subject.
        Options::read(path)?.resolve(&Subject {
            width: 0,
            photographs: false,
            adapter: None,
        })
    }

    /// The flags that ask for exactly these settings.
    pub fn to_options(&self) -> Options {
        let Recipe {
            epochs,
            batch_size,
            accumulate,
            max_steps,
            learning_rate,
            head_learning_rate,
            warm_up,
            weight_decay,
            clip_norm,
            label_smoothing,
            patience,
            seed,
        } = self.recipe;
        Options {
            model: self.model.clone(),
            data: self.data.clone(),
            adapter: self.adapter.clone(),
            image_size: self.image_size,
            augment: Some(self.augment),
            skip_corrupt: Some(self.skip_corrupt),
            workers: Some(self.workers),
            epochs: Some(epochs),
            batch_size: Some(batch_size),
            accumulate: Some(accumulate),
            max_steps,
            learning_rate: Some(learning_rate),
            head_learning_rate: Some(head_learning_rate),
            warm_up: Some(warm_up),
            weight_decay: Some(weight_decay),
            clip_norm: Some(clip_norm),
            label_smoothing: Some(label_smoothing),
            patience,
            warm_start: Some(self.warm_start),
            no_probe: Some(!self.probe),
            // The rate was found.
            find_rate: None,
            seed: Some(seed),
            checkpoint_every: Some(self.checkpoint_every),
            device: Some(self.device),
            dtype: Some(self.dtype),
            gradient_checkpointing: Some(self.gradient_checkpointing),
            ..Options::of(&self.method)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::cli::{Cli, Command};

    const DIGITS: Subject = Subject {
        width: 64,
        photographs: false,
        adapter: None,
    };

    fn options(flags: &str) -> Options {
        let flags = ["dinov2"].into_iter().chain(flags.split_whitespace());
        match Cli::try_parse_from(flags).unwrap().chosen() {
            Command::Train(train) => train.options,
            other => panic!("{other:?}"),
        }
    }

    fn settings(flags: &str) -> Settings {
        options(flags).resolve(&DIGITS).unwrap()
    }

    #[test]
    fn the_help_states_the_defaults_of_the_code() {
        let mut command = Cli::command();
        let train = command.find_subcommand_mut("train").unwrap();
        let help = train.render_long_help().to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        let Settings { method, recipe, .. } = settings("");
        let Method::Boft {
            block_size,
            factors,
            dropout,
        } = method
        else {
            panic!("{method:?}");
        };
        let Method::Oft {
            block_size: of_oft, ..
        } = settings("--method oft").method
        else {
            panic!("no OFT");
        };
        let Method::Lora { rank } = settings("--method lora").method else {
            panic!("no LoRA");
        };
        let Recipe {
            epochs,
            batch_size,
            warm_up,
            weight_decay,
            clip_norm,
            label_smoothing,
            seed,
            ..
        } = recipe;
        let every = settings("").checkpoint_every;
        for stated in [
            "all methods [default: boft]".to_string(),
            format!("rotated block [default: {block_size} for boft, {of_oft} for oft]"),
            format!("factors of boft [default: {factors}]"),
            format!("leaves unrotated [default: {dropout}]"),
            format!("Rank of lora [default: {rank},"),
            format!("training images [default: {epochs}]"),
            format!("optimizer step [default: {batch_size}]"),
            format!("to its peak [default: {warm_up}]"),
            format!("norms have none [default: {weight_decay}]"),
            format!("no limit [default: {clip_norm}]"),
            format!("over all classes [default: {label_smoothing}]"),
            format!("and of dropout [default: {seed}]"),
            format!("0 for none [default: {every}]"),
        ] {
            assert!(help.contains(&stated), "{stated}: {help}");
        }
    }

    #[test]
    fn settings_survive_the_way_through_their_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("settings.toml");
        for flags in [
            "",
            "--method oft --neumann 5 --block-size 16 --patience 3",
            "--method lora --rank 8 --max-steps 7 --learning-rate 0.000123456789",
            "--method full --dtype f32 --gradient-checkpointing --warm-start --no-probe",
            "--method linear --model some/model --data some/photos --image-size 56 --skip-corrupt",
        ] {
            let settings = settings(flags);
            let table = settings.to_options().to_table().unwrap();
            std::fs::write(&path, table.to_string()).unwrap();
            assert_eq!(Settings::read(&path).unwrap(), settings, "{table}");
        }
    }

    #[test]
    fn the_head_learns_at_the_same_rate_whatever_the_method() {
        let rate = |flags| settings(flags).recipe.head_learning_rate;
        assert_eq!(rate("--method full"), rate("--method boft"));
        assert_eq!(rate("--method boft --learning-rate 1e-5"), rate(""));
        assert_eq!(rate("--method linear --learning-rate 1e-5"), 1e-5);
        assert_eq!(rate("--head-learning-rate 0.5"), 0.5);
    }

    #[test]
    fn an_adapter_brings_its_method_and_its_sizes() {
        let subject = Subject {
            adapter: Some(Method::oft(16)),
            ..DIGITS
        };
        let resolved = |flags| options(flags).resolve(&subject);
        assert_eq!(resolved("").unwrap().method, Method::oft(16));
        assert_eq!(resolved("--method oft").unwrap().method, Method::oft(16));
        let refused = |flags| resolved(flags).unwrap_err().to_string();
        assert!(refused("--method boft").contains("holds OFT b=16, so BOFT"));
        assert!(refused("--block-size 8").contains("OFT b=8 has no place"));
        assert!(resolved("--block-size 16").is_ok());
    }

    #[test]
    fn a_switch_can_be_turned_off_again() {
        assert_eq!(options("--skip-corrupt").skip_corrupt, Some(true));
        assert_eq!(options("--skip-corrupt=false").skip_corrupt, Some(false));
        assert_eq!(options("").skip_corrupt, None);
    }
}
