//! [`AdapterCheckpointer`]: checkpoints of a training run that leave out the base.
//!
//! This is the only file of the library that knows the format of Burn's records.
//!
//! A checkpoint is one of Burn's records with fewer tensors, so Burn loads it with partial loading allowed, and any
//! tool that reads records reads it.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::store::{ModuleRecord, RecordError};
use burn::train::checkpoint::{Checkpointer, CheckpointerError};
use burn_pack::{Reader, Writer};

use super::walk::walk;

/// The entry of a checkpoint's metadata that says which base it belongs to.
const BASE: &str = "base";

/// A checkpointer for Burn's training that saves what training changes, and not the base model.
///
/// Pass it to [`SupervisedTraining::with_custom_checkpointers`](burn::train::SupervisedTraining::with_custom_checkpointers).
/// A checkpoint holds the adapters, the trained biases and modules, and whatever else has changed since the checkpointer
/// was made, such as running statistics. Together with the checkpoints of the optimizer and the scheduler, a run
/// resumes bit for bit. The random numbers of dropout and shuffling belong to Burn and are not part of a checkpoint.
///
/// A save reads the whole model, as Burn's own checkpointer does, but writes only these parts.
///
/// # Examples
///
/// ```no_run
/// use burn::train::checkpoint::FileCheckpointer;
/// use burn_boft::AdapterCheckpointer;
/// # use burn::train::{LearnerModel, SupervisedTraining};
///
/// # fn resume<M: LearnerModel>(training: SupervisedTraining<M>, model: &M)
/// # -> Result<SupervisedTraining<M>, Box<dyn std::error::Error>> {
/// let training = training.with_custom_checkpointers(
///     AdapterCheckpointer::new("run/checkpoint", model)?,
///     FileCheckpointer::new("run/checkpoint", "optim"),
///     FileCheckpointer::new("run/checkpoint", "scheduler"),
/// );
/// # Ok(training)
/// # }
/// ```
pub struct AdapterCheckpointer {
    folder: PathBuf,
    /// The paths of parameters that are always saved.
    trained: HashSet<String>,
    /// The fingerprints that all others had at the start.
    base: HashMap<String, u64>,
    /// The fingerprint of the whole base.
    identity: String,
}

impl AdapterCheckpointer {
    /// Makes a checkpointer for a run that starts from this adapted model. It saves files `adapter-<epoch>.bpk` in a
    /// folder, which is created.
    ///
    /// To resume a run, make it from the same base, adapted with the same configuration: the numbers of adapters and of
    /// everything else that is trained may differ, those of the base may not.
    ///
    /// # Errors
    ///
    /// - [`CheckpointerError::IOError`] if the folder cannot be created.
    /// - [`CheckpointerError::Record`] if the model cannot be turned into a record.
    pub fn new<M: Module>(folder: impl AsRef<Path>, model: &M) -> Result<Self, CheckpointerError> {
        let folder = folder.as_ref().to_path_buf();
        fs::create_dir_all(&folder).map_err(CheckpointerError::IOError)?;
        let trained = kept_paths(model);
        let mut base = HashMap::new();
        for tensor in tensors(model.clone().into_record())? {
            if !trained.contains(&tensor.name) {
                base.insert(tensor.name.clone(), fingerprint(&tensor)?);
            }
        }
        let mut parts: Vec<_> = base.iter().collect();
        parts.sort();
        let identity = parts.into_iter().fold(SEED, |hash, (name, part)| {
            mix(hash_bytes(hash, name.as_bytes()), *part)
        });
        Ok(Self {
            folder,
            trained,
            base,
            identity: format!("{identity:016x}"),
        })
    }

    fn path(&self, epoch: usize) -> PathBuf {
        self.folder.join(format!("adapter-{epoch}.bpk"))
    }
}

impl Checkpointer<ModuleRecord> for AdapterCheckpointer {
    /// Writes what is trained, and what differs from the base by its fingerprint. A tensor that the base did not have
    /// is written too.
    ///
    /// # Errors
    ///
    /// [`CheckpointerError::Record`]: the record cannot be read, or the file cannot be written. An older file of this
    /// epoch then stays.
    fn save(&self, epoch: usize, record: ModuleRecord) -> Result<(), CheckpointerError> {
        let mut kept = Vec::new();
        for tensor in tensors(record)? {
            let unchanged = match self.base.get(&tensor.name) {
                Some(base) => *base == fingerprint(&tensor)?,
                None => false,
            };
            if self.trained.contains(&tensor.name) || !unchanged {
                kept.push(tensor);
            }
        }
        // Burn's writer replaces a file when it is complete.
        Writer::new(kept)
            .with_metadata(BASE, &self.identity)
            .write_to_file(self.path(epoch))
            .map_err(pack_error)
    }

    /// Deletes the file of an epoch. One that does not exist is no error.
    fn delete(&self, epoch: usize) -> Result<(), CheckpointerError> {
        match fs::remove_file(self.path(epoch)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(CheckpointerError::IOError(error))
            }
            _ => Ok(()),
        }
    }

    /// Reads the file of an epoch as a record for a partial load, which leaves the base as it is.
    ///
    /// # Errors
    ///
    /// - [`CheckpointerError::Record`]: the file is not there or is malformed.
    /// - [`CheckpointerError::Unknown`]: it was saved with another base.
    fn restore(&self, epoch: usize) -> Result<ModuleRecord, CheckpointerError> {
        let path = self.path(epoch);
        let reader = Reader::from_file(&path).map_err(pack_error)?;
        if reader.metadata().get(BASE) != Some(&self.identity) {
            return Err(CheckpointerError::Unknown(format!(
                "{} was saved with another base model; load the base that the run started from",
                path.display()
            )));
        }
        let record = ModuleRecord::load(&path).map_err(CheckpointerError::Record)?;
        Ok(record.allow_partial(true))
    }
}

/// The tensors of a record.
///
/// They are read from the record's bytes, which is the form that files have.
fn tensors(record: ModuleRecord) -> Result<Vec<burn_pack::Tensor>, CheckpointerError> {
    let bytes = record.into_bytes().map_err(CheckpointerError::Record)?;
    let reader = Reader::from_bytes(bytes).map_err(pack_error)?;
    reader.into_tensors().map_err(pack_error)
}

/// An error of the format, as Burn's checkpointers return it.
fn pack_error(error: burn_pack::Error) -> CheckpointerError {
    CheckpointerError::Record(RecordError::from(error))
}

/// The offset basis of FNV-1a with 64 bits.
const SEED: u64 = 0xcbf2_9ce4_8422_2325;

/// A hash of a tensor, which tells a changed base from an unchanged one. It is not meant to resist an attacker.
fn fingerprint(tensor: &burn_pack::Tensor) -> Result<u64, CheckpointerError> {
    let kind = format!("{:?} {:?}", tensor.dtype, tensor.shape);
    let bytes = tensor.to_bytes().map_err(pack_error)?;
    Ok(hash_bytes(hash_bytes(SEED, kind.as_bytes()), &bytes))
}

/// FNV-1a on words of eight bytes, so that hashing a base takes no longer than reading it.
fn hash_bytes(hash: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let hash = words
        .iter()
        .fold(hash, |hash, word| mix(hash, u64::from_le_bytes(*word)));
    rest.iter()
        .fold(hash, |hash, byte| mix(hash, u64::from(*byte)))
}

/// One step of the hash: FNV-1a's, with a rotation.
fn mix(hash: u64, word: u64) -> u64 {
    // A product only carries bits upwards. The rotation brings high bits down again.
    (hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(23)
}

/// The paths of the adapters and of everything else that is trained.
fn kept_paths<M: Module>(model: &M) -> HashSet<String> {
    let mut paths = HashSet::new();
    for parameter in walk(model).parameters {
        if parameter.stored.is_trainable() {
            paths.insert(parameter.path().to_string());
        }
        let parts = parameter
            .attached
            .into_iter()
            .flat_map(|attached| attached.parts);
        paths.extend(parts.map(|(path, _)| path));
    }
    paths
}
