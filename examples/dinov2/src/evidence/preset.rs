//! Protocols that are ready to run.

use std::collections::BTreeMap;

use burn_boft::Cayley;

use super::protocol::{Conditions, Design, Entry, Protocol};
use crate::method::Method;

/// Block size of the rotations in the sweep of Cayley maps, which is the one that the authors of the polynomial advise.
const SWEEP_BLOCK: usize = 32;

/// A protocol that is ready to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    /// The protocol of the BOFT paper for VTAB-1K, with learning rates chosen by validation instead of test data
    #[value(name = "vtab-1k")]
    Vtab1k,
    /// The handwritten digits that come with the program
    Digits,
    /// A first impression of your own images within minutes
    Quick,
    /// OFT through the exact Cayley map against Neumann polynomials of 3, 5 and 6 terms, over learning rates
    Cayley,
}

/// What a preset cannot know.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// As in [`Conditions::model`].
    pub model: String,
    pub device: String,
    pub dtype: String,
    /// Pixels along each side of the images that the model reads.
    pub image_size: usize,
    /// As in [`Conditions::tasks`].
    pub tasks: BTreeMap<String, String>,
    /// As in [`Conditions::forgetting`].
    pub forgetting: Option<String>,
}

impl Preset {
    /// The rules of the comparison.
    ///
    /// All methods of a preset have equally many learning rates, so that none has more tries than another.
    ///
    /// # References
    ///
    /// Liu et al., *Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization*, appendix A.2 and tables 4 and
    /// 8: 30 epochs, batches of 64, AdamW with weight decay 0.02, cosine schedule, 10 % warm-up, multiplicative dropout
    /// 0.1, every linear layer adapted, and learning rates from 2e-4 to 5e-3. The paper picks the learning rate by the
    /// accuracy on test images after the last epoch; here validation images pick learning rate and epoch.
    pub fn protocol(self, setting: Setting) -> Protocol {
        let mut conditions = setting.conditions();
        let (name, entries, seeds) = match self {
            Self::Vtab1k => ("vtab-1k", vtab_entries(), 5),
            Self::Digits => ("digits", digits_entries(), 3),
            Self::Quick => ("quick", quick_entries(), 2),
            Self::Cayley => ("cayley", cayley_entries(), 3),
        };
        match self {
            Self::Vtab1k | Self::Cayley => {
                (conditions.train_images, conditions.validation_images) = (Some(800), Some(200));
                (conditions.epochs, conditions.batch_size) = (30, 64);
                // As in VTAB: images are resized and not changed otherwise.
                conditions.augment = false;
            }
            // Small models on tiny images learn nothing but noise from random crops, and a digit has no mirror image.
            Self::Digits => conditions.augment = false,
            Self::Quick => {
                (conditions.train_images, conditions.validation_images) = (Some(200), Some(100));
                conditions.epochs = 5;
            }
        }
        Protocol {
            name: name.to_string(),
            conditions,
            design: match self {
                Self::Cayley => Design::Sweep,
                _ => Design::Choose,
            },
            entries,
            search_seeds: match self {
                Self::Cayley => Vec::new(),
                _ => vec![0],
            },
            seeds: (0..seeds).collect(),
        }
    }
}

impl Setting {
    /// The conditions that all presets start from: the recipe of the paper at a small batch.
    fn conditions(self) -> Conditions {
        Conditions {
            model: self.model,
            device: self.device,
            dtype: self.dtype,
            image_size: self.image_size,
            tasks: self.tasks,
            forgetting: self.forgetting,
            train_images: None,
            validation_images: None,
            epochs: 20,
            batch_size: 32,
            max_steps: None,
            weight_decay: 0.02,
            warm_up: 0.1,
            head_rate: None,
            label_smoothing: 0.0,
            augment: true,
            clip_norm: None,
        }
    }

    #[cfg(test)]
    pub(super) fn example(tasks: &[&str]) -> Self {
        let tasks = tasks.iter().map(|task| (task.to_string(), "1".to_string()));
        Self {
            model: "small".to_string(),
            device: "flex".to_string(),
            dtype: "f32".to_string(),
            image_size: 56,
            tasks: tasks.collect(),
            forgetting: Some("digits".to_string()),
        }
    }
}

fn entries<const N: usize>(methods: [(Method, [f64; N]); 5]) -> Vec<Entry> {
    let entry = |(method, rates): (Method, [f64; N])| Entry {
        method,
        rates: rates.to_vec(),
    };
    methods.map(entry).to_vec()
}

fn boft(block_size: usize) -> Method {
    Method::Boft {
        block_size,
        factors: 2,
        dropout: 0.1,
    }
}

/// The sizes that the paper compares.
fn vtab_entries() -> Vec<Entry> {
    entries([
        (Method::Linear, [1e-3, 3e-3, 1e-2, 3e-2]),
        (Method::Lora { rank: 4 }, [3e-4, 1e-3, 3e-3, 1e-2]),
        (Method::oft(16), [3e-4, 1e-3, 3e-3, 1e-2]),
        (boft(8), [3e-4, 1e-3, 3e-3, 1e-2]),
        (Method::Full, [1e-5, 3e-5, 1e-4, 3e-4]),
    ])
}

/// Sizes with about equally many parameters on the embedded model, which is 64 wide.
fn digits_entries() -> Vec<Entry> {
    entries([
        (Method::Linear, [1e-2, 3e-2, 1e-1]),
        (Method::Lora { rank: 2 }, [3e-3, 1e-2, 3e-2]),
        (Method::oft(8), [3e-3, 1e-2, 3e-2]),
        (boft(4), [3e-3, 1e-2, 3e-2]),
        (Method::Full, [3e-4, 1e-3, 3e-3]),
    ])
}

fn quick_entries() -> Vec<Entry> {
    entries([
        (Method::Linear, [3e-3, 1e-2, 3e-2]),
        (Method::Lora { rank: 4 }, [3e-4, 1e-3, 3e-3]),
        (Method::oft(16), [3e-4, 1e-3, 3e-3]),
        (boft(8), [3e-4, 1e-3, 3e-3]),
        (Method::Full, [1e-5, 3e-5, 1e-4]),
    ])
}

/// The exact map comes first: the polynomials are compared with it. For the same numbers, it is the transpose of what they
/// approximate. That makes no difference here, because `Q` starts at zero and neither AdamW nor weight decay prefers a sign.
/// Three terms give the same polynomial as four.
fn cayley_entries() -> Vec<Entry> {
    let polynomials = [3, 5, 6].map(|terms| Cayley::Neumann { terms });
    let maps = [Cayley::Exact].into_iter().chain(polynomials);
    maps.map(|cayley| Entry {
        method: Method::Oft {
            block_size: SWEEP_BLOCK,
            cayley,
        },
        rates: vec![3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::ValueEnum;

    use super::*;

    #[test]
    fn every_preset_can_be_run_and_gives_all_methods_equally_many_tries() {
        for preset in Preset::value_variants() {
            let protocol = preset.protocol(Setting::example(&["textiles"]));
            protocol.check().unwrap();
            let tries = protocol.entries.iter().map(|entry| entry.rates.len());
            assert_eq!(tries.collect::<BTreeSet<_>>().len(), 1, "{preset:?}");
            let value = preset.to_possible_value().unwrap();
            assert_eq!(value.get_name(), protocol.name);
        }
    }

    #[test]
    fn vtab_1k_is_the_protocol_of_the_paper() {
        let protocol = Preset::Vtab1k.protocol(Setting::example(&["textiles"]));
        let conditions = &protocol.conditions;
        assert_eq!(conditions.train_images, Some(800));
        assert_eq!(conditions.validation_images, Some(200));
        assert_eq!((conditions.epochs, conditions.batch_size), (30, 64));
        assert_eq!((conditions.weight_decay, conditions.warm_up), (0.02, 0.1));
        assert_eq!(protocol.seeds.len(), 5);
        let labels: Vec<String> = protocol
            .entries
            .iter()
            .map(|entry| entry.method.to_string())
            .collect();
        assert_eq!(
            labels,
            [
                "linear probe",
                "LoRA r=4",
                "OFT b=16",
                "BOFT b=8 m=2",
                "full"
            ]
        );
    }
}
