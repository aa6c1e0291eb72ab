//! What one finished training yielded: one line of a results file.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::plan::{Run, Stage};

/// What one finished training yielded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// [`Protocol::identity`](super::Protocol::identity) of the protocol that it belongs to.
    pub protocol: String,
    /// What was trained.
    #[serde(flatten)]
    pub run: Run,
    /// The epoch that was kept because its validation loss was the lowest, from 1; none if no epoch was completed.
    pub epoch: Option<usize>,
    /// How the kept epoch does on the validation images.
    pub validation: Validation,
    /// The state of the rotations; none for methods without any.
    pub rotation: Option<Rotation>,
    /// How long the training took, in seconds.
    pub seconds: f64,
    /// What only a final run measures. A search never looks at test images.
    pub measured: Option<Measured>,
}

/// How a model does on the validation images.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Mean cross-entropy; not a number if the training diverged.
    #[serde(with = "or_null")]
    pub loss: f64,
    /// Share of correct answers.
    pub accuracy: f64,
}

/// The state of a model's rotations.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rotation {
    /// The largest `max|RᵀR − I|` of all layers.
    #[serde(with = "or_null")]
    pub defect: f64,
    /// The largest angle by which a rotation turns a direction, in radians.
    #[serde(with = "or_null")]
    pub angle: f64,
}

/// What only a final run measures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    pub test: Test,
    /// None if there is no second data set.
    pub forgetting: Option<Forgetting>,
    pub cost: Cost,
}

/// The accuracy of nearest neighbours by the features of the backbone, on data that the model was not trained on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forgetting {
    /// By the features of the pretrained model.
    pub before: f64,
    /// By the features of the trained model.
    pub after: f64,
}

/// What a method costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Numbers that training changes.
    pub trainable: usize,
    /// Size of the file that holds what was trained.
    pub adapter_bytes: u64,
    /// Median time of an optimizer step.
    pub step_ms: f64,
    /// Peak memory of the model and its training; none where it cannot be measured.
    pub peak_bytes: Option<u64>,
}

/// Which test images were classified correctly, always in the same order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Packed", into = "Packed")]
pub struct Test {
    pub correct: Vec<bool>,
}

impl Test {
    /// The share of correct answers; zero without images.
    pub fn accuracy(&self) -> f64 {
        let correct = self.correct.iter().filter(|correct| **correct).count();
        correct as f64 / self.correct.len().max(1) as f64
    }
}

impl Outcome {
    /// Says why the outcome contradicts itself.
    pub(super) fn contradiction(&self) -> Option<&'static str> {
        match (self.run.stage, &self.measured) {
            (Stage::Search, Some(_)) => Some("a search must not look at test images"),
            (Stage::Final, None) => Some("a final run has test results"),
            (Stage::Final, Some(measured)) if measured.test.correct.is_empty() => {
                Some("a final run needs test images")
            }
            _ => None,
        }
    }
}

/// [`Test`] in a file. The first image is the lowest bit of the first byte.
#[derive(Serialize, Deserialize)]
struct Packed {
    accuracy: f64,
    images: usize,
    correct: String,
}

impl From<Test> for Packed {
    fn from(test: Test) -> Self {
        let bytes = test.correct.chunks(8).map(|bits| {
            let bits = bits.iter().enumerate();
            bits.fold(0, |byte, (place, &bit)| byte | u8::from(bit) << place)
        });
        Self {
            accuracy: test.accuracy(),
            images: test.correct.len(),
            correct: STANDARD.encode(bytes.collect::<Vec<u8>>()),
        }
    }
}

impl TryFrom<Packed> for Test {
    type Error = String;

    fn try_from(packed: Packed) -> Result<Self, String> {
        let bytes = STANDARD
            .decode(&packed.correct)
            .map_err(|error| format!("the marks of the test images are not base64: {error}"))?;
        if bytes.len() != packed.images.div_ceil(8) {
            return Err(format!(
                "the marks of the test images have {} bytes, which {} images do not fill",
                bytes.len(),
                packed.images
            ));
        }
        let correct = (0..packed.images).map(|image| bytes[image / 8] >> (image % 8) & 1 == 1);
        let test = Self {
            correct: correct.collect(),
        };
        if (test.accuracy() - packed.accuracy).abs() > 1e-9 {
            return Err(format!(
                "the test accuracy {} contradicts the marks of the images, {}",
                packed.accuracy,
                test.accuracy()
            ));
        }
        Ok(test)
    }
}

/// JSON has no infinities and nothing that is not a number; they become `null`, which is read as not a number.
mod or_null {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        value.is_finite().then_some(*value).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_survive_the_way_through_json() {
        for images in [1, 7, 8, 9, 500] {
            let test = Test {
                correct: (0..images).map(|image| image % 3 == 0).collect(),
            };
            let json = serde_json::to_string(&test).unwrap();
            assert_eq!(serde_json::from_str::<Test>(&json).unwrap(), test);
        }
    }

    #[test]
    fn the_first_image_is_the_lowest_bit() {
        let mut correct = vec![false; 9];
        (correct[0], correct[8]) = (true, true);
        let packed = Packed::from(Test { correct });
        assert_eq!(STANDARD.decode(packed.correct).unwrap(), [1, 1]);
        assert_eq!(packed.accuracy, 2.0 / 9.0);
    }

    #[test]
    fn marks_that_contradict_their_count_or_accuracy_are_refused() {
        let refused = |json: &str| serde_json::from_str::<Test>(json).unwrap_err().to_string();
        let cases = [
            (r#"{"accuracy":1.0,"images":9,"correct":"/w=="}"#, "1 bytes"),
            (r#"{"accuracy":0.5,"images":8,"correct":"/w=="}"#, "0.5"),
            (r#"{"accuracy":1.0,"images":8,"correct":"?"}"#, "base64"),
        ];
        for (json, named) in cases {
            assert!(refused(json).contains(named), "{}", refused(json));
        }
    }

    #[test]
    fn a_loss_that_is_not_a_number_is_written_as_null() {
        let validation = Validation {
            loss: f64::INFINITY,
            accuracy: 0.1,
        };
        let json = serde_json::to_string(&validation).unwrap();
        assert_eq!(json, r#"{"loss":null,"accuracy":0.1}"#);
        let read: Validation = serde_json::from_str(&json).unwrap();
        assert!(read.loss.is_nan());
    }
}
