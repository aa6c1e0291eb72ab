//! The command line: what can be asked for.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::error::Error;
use crate::merge;

/// OFT and BOFT adapters on disk: looks into them, merges them into safetensors models, takes them out again,
/// converts them.
///
/// Models are safetensors files of any architecture, or folders with one or with shards and their index.
/// Adapters are PEFT's folders.
#[derive(Debug, Parser)]
#[command(name = "burn-boft", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Writes a model with an adapter folded into its weights
    Merge(Merge),
}

/// The options of `merge`.
#[derive(Debug, Args)]
pub struct Merge {
    /// The model: a safetensors file, or a folder with one or with shards
    #[arg(long, value_name = "PATH")]
    pub base: PathBuf,

    #[command(flatten)]
    pub adapter: AdapterArgs,

    /// The file or folder to write, which must not be there yet
    #[arg(long, value_name = "PATH", required_unless_present = "dry_run")]
    pub output: Option<PathBuf>,

    /// Print what would change, and write nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// An adapter, and how its names become those of a model.
#[derive(Debug, Args)]
pub struct AdapterArgs {
    /// The adapter: PEFT's folder
    #[arg(long, value_name = "FOLDER")]
    pub adapter: PathBuf,

    /// Rename the adapter's modules to the model's: <regex>=<replacement> with $1 for groups, split at the
    /// last `=`, or `dinov2` for the names of transformers 4 and 5. Can be repeated; rules apply in order
    #[arg(long = "map", value_name = "RULE")]
    pub maps: Vec<String>,
}

impl Cli {
    /// Does what was asked for.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the input or the output.
    pub fn run(self) -> Result<(), Error> {
        match self.command {
            Command::Merge(options) => merge::run(&options),
        }
    }
}
