//! How good predictions are: accuracy, scores per class and the confusion matrix, as text and as JSON.

use comfy_table::{Cell, CellAlignment, Table, TableComponent, presets};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Up to this many classes, the confusion matrix is printed whole. Beyond it, only the most confused pairs are.
const WHOLE_MATRIX: usize = 20;
/// How many confused pairs are printed then.
const PAIRS: usize = 20;

/// Predictions or counts that cannot be scored.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ScoresError {
    /// As many predictions as true classes are needed.
    #[error(
        "{truth} true classes and {predictions} predictions cannot be compared; give one prediction per image"
    )]
    Lengths { truth: usize, predictions: usize },

    /// A number that is not that of a class.
    #[error("image {image} has class {class}, and there are {classes} classes, counted from 0")]
    UnknownClass {
        image: usize,
        class: usize,
        classes: usize,
    },

    /// A confusion matrix that is not square, or not for these classes.
    #[error(
        "the confusion matrix has {rows} rows, the shortest with {shortest} and the longest with {longest} entries; {classes} classes need a square of that size"
    )]
    Matrix {
        classes: usize,
        rows: usize,
        shortest: usize,
        longest: usize,
    },
}

/// Scores of the predictions for a set of images.
///
/// It serializes to the JSON object that `eval --json` prints. Shares are between 0 and 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// How many images were classified.
    pub images: usize,
    /// The share of images whose prediction is right. Absent without images.
    pub accuracy: Option<f64>,
    /// The mean F1 of the classes that have one. Absent if none has.
    pub macro_f1: Option<f64>,
    /// One entry per class, in the order of the classes.
    pub classes: Vec<ClassScore>,
    /// How many images of class `[truth]` were taken for class `[prediction]`.
    pub confusion: Vec<Vec<usize>>,
}

/// The scores of one class.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassScore {
    /// The name of the class.
    pub name: String,
    /// How many images belong to it.
    pub images: usize,
    /// How many images were taken for it.
    pub predicted: usize,
    /// The share of the images taken for this class that belong to it. Absent if none was.
    pub precision: Option<f64>,
    /// The share of the images of this class that were recognised, also called its accuracy. Absent if it has none.
    pub recall: Option<f64>,
    /// The harmonic mean of precision and recall, 0 if nothing was recognised. Absent if the class has no images and
    /// none was taken for it.
    pub f1: Option<f64>,
}

/// Two classes that are confused.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    /// The class that the images belong to.
    pub truth: usize,
    /// The class that they were taken for.
    pub prediction: usize,
    /// How many images.
    pub images: usize,
    /// Their share of the images of the true class.
    pub share: f64,
}

impl Scores {
    /// Scores predictions, one for each image, given as numbers of classes.
    ///
    /// # Errors
    ///
    /// The lists differ in length, or a number is not that of a class.
    pub fn of(
        classes: &[String],
        truth: &[usize],
        predictions: &[usize],
    ) -> Result<Self, ScoresError> {
        Self::new(
            classes,
            confusion_matrix(classes.len(), truth, predictions)?,
        )
    }

    /// Scores a confusion matrix: how many images of class `[truth]` were taken for class `[prediction]`.
    ///
    /// # Errors
    ///
    /// The matrix is not square, or not as large as there are classes.
    pub fn new(classes: &[String], confusion: Vec<Vec<usize>>) -> Result<Self, ScoresError> {
        let count = classes.len();
        if confusion.len() != count || confusion.iter().any(|row| row.len() != count) {
            let lengths = || confusion.iter().map(Vec::len);
            return Err(ScoresError::Matrix {
                classes: count,
                rows: confusion.len(),
                shortest: lengths().min().unwrap_or(0),
                longest: lengths().max().unwrap_or(0),
            });
        }
        let images = confusion.iter().flatten().sum();
        let right = (0..count).map(|class| confusion[class][class]).sum();
        let classes: Vec<_> = classes
            .iter()
            .enumerate()
            .map(|(class, name)| ClassScore::new(name, class, &confusion))
            .collect();
        let f1: Vec<f64> = classes.iter().filter_map(|class| class.f1).collect();
        Ok(Self {
            images,
            accuracy: share(right, images),
            macro_f1: (!f1.is_empty()).then(|| f1.iter().sum::<f64>() / f1.len() as f64),
            classes,
            confusion,
        })
    }

    /// The pairs of classes that are confused, the largest share of a class first.
    pub fn most_confused(&self) -> Vec<Pair> {
        let mut pairs = Vec::new();
        for (truth, row) in self.confusion.iter().enumerate() {
            for (prediction, &images) in row.iter().enumerate() {
                if truth != prediction && images > 0 {
                    pairs.push(Pair {
                        truth,
                        prediction,
                        images,
                        share: images as f64 / self.classes[truth].images as f64,
                    });
                }
            }
        }
        pairs.sort_by(|a, b| {
            b.share
                .total_cmp(&a.share)
                .then(b.images.cmp(&a.images))
                .then((a.truth, a.prediction).cmp(&(b.truth, b.prediction)))
        });
        pairs
    }

    /// The accuracy and the macro F1 as one line.
    pub fn line(&self) -> String {
        let images = match self.images {
            1 => "1 image".to_string(),
            count => format!("{count} images"),
        };
        format!(
            "accuracy {} of {images}, macro F1 {}",
            percent(self.accuracy),
            percent(self.macro_f1),
        )
    }

    /// The scores per class as a table.
    pub fn class_table(&self) -> String {
        let mut table = table();
        let numbers = ["images", "precision", "recall", "F1"].map(number);
        table.set_header([Cell::new("class")].into_iter().chain(numbers));
        for class in &self.classes {
            let shares = [class.precision, class.recall, class.f1].map(percent);
            let cells = [Cell::new(printable(&class.name)), number(class.images)];
            table.add_row(cells.into_iter().chain(shares.map(number)));
        }
        table.trim_fmt()
    }

    /// The confusion matrix as a table, one row per true class. If there are more than 20 classes, the table has the 20
    /// most confused pairs instead.
    pub fn confusion_table(&self) -> String {
        match self.classes.len() > WHOLE_MATRIX {
            true => self.pair_table(),
            false => self.matrix_table(),
        }
    }

    fn matrix_table(&self) -> String {
        let mut table = table();
        let names = self.classes.iter().map(|class| printable(&class.name));
        let corner = Cell::new("truth \\ prediction");
        table.set_header([corner].into_iter().chain(names.clone().map(number)));
        for (name, row) in names.zip(&self.confusion) {
            table.add_row([Cell::new(name)].into_iter().chain(row.iter().map(number)));
        }
        table.trim_fmt()
    }

    fn pair_table(&self) -> String {
        let mut table = table();
        table.set_header([
            Cell::new("truth"),
            Cell::new("taken for"),
            number("images"),
            number("share of truth"),
        ]);
        for pair in self.most_confused().iter().take(PAIRS) {
            table.add_row([
                Cell::new(printable(&self.classes[pair.truth].name)),
                Cell::new(printable(&self.classes[pair.prediction].name)),
                number(pair.images),
                number(percent(Some(pair.share))),
            ]);
        }
        table.trim_fmt()
    }
}

impl ClassScore {
    fn new(name: &str, class: usize, confusion: &[Vec<usize>]) -> Self {
        let right = confusion[class][class];
        let images = confusion[class].iter().sum();
        let predicted = confusion.iter().map(|row| row[class]).sum();
        Self {
            name: name.to_string(),
            images,
            predicted,
            precision: share(right, predicted),
            recall: share(right, images),
            f1: share(2 * right, images + predicted),
        }
    }
}

/// How many images of class `[truth]` were taken for class `[prediction]`.
///
/// # Errors
///
/// The lists differ in length, or a number is not that of a class.
pub fn confusion_matrix(
    classes: usize,
    truth: &[usize],
    predictions: &[usize],
) -> Result<Vec<Vec<usize>>, ScoresError> {
    if truth.len() != predictions.len() {
        return Err(ScoresError::Lengths {
            truth: truth.len(),
            predictions: predictions.len(),
        });
    }
    let mut confusion = vec![vec![0; classes]; classes];
    for (image, (&truth, &prediction)) in truth.iter().zip(predictions).enumerate() {
        let class = truth.max(prediction);
        if class >= classes {
            return Err(ScoresError::UnknownClass {
                image,
                class,
                classes,
            });
        }
        confusion[truth][prediction] += 1;
    }
    Ok(confusion)
}

fn share(part: usize, whole: usize) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// `93.5 %`, or a dash if there is nothing to say.
pub fn percent(share: Option<f64>) -> String {
    share.map_or_else(
        || "–".to_string(),
        |share| format!("{:.1} %", 100.0 * share),
    )
}

/// A name without the control characters that a terminal or a browser would obey.
pub fn printable(name: &str) -> String {
    name.replace(char::is_control, "\u{fffd}")
}

fn table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_style(TableComponent::HeaderLines, '─');
    table
}

/// A cell whose content stands to the right.
fn number(content: impl ToString) -> Cell {
    Cell::new(content).set_alignment(CellAlignment::Right)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    /// Three classes, of which the last is never recognised and the second never missed.
    fn scores() -> Scores {
        let classes = names(&["cat", "dog", "eel"]);
        Scores::of(
            &classes,
            &[0, 0, 0, 0, 1, 1, 2, 2],
            &[0, 0, 0, 1, 1, 1, 1, 0],
        )
        .unwrap()
    }

    #[test]
    fn scores_are_those_that_scikit_learn_defines() {
        let scores = scores();
        assert_eq!(scores.images, 8);
        assert_eq!(scores.accuracy, Some(5.0 / 8.0));
        assert_eq!(
            scores.confusion,
            [vec![3, 1, 0], vec![0, 2, 0], vec![1, 1, 0]]
        );
        let [cat, dog, eel] = &scores.classes[..] else {
            panic!("three classes")
        };
        assert_eq!((cat.precision, cat.recall), (Some(0.75), Some(0.75)));
        assert_eq!((dog.precision, dog.recall), (Some(0.5), Some(1.0)));
        assert_eq!((eel.precision, eel.recall), (None, Some(0.0)));
        assert_eq!(eel.f1, Some(0.0));
        let expected = (0.75 + 2.0 * 0.5 / 1.5 + 0.0) / 3.0;
        assert!((scores.macro_f1.unwrap() - expected).abs() < 1e-12);
    }

    #[test]
    fn a_class_that_no_image_and_no_prediction_has_does_not_count() {
        let classes = names(&["cat", "dog", "unused"]);
        let scores = Scores::of(&classes, &[0, 1], &[0, 1]).unwrap();
        assert_eq!(scores.macro_f1, Some(1.0));
        assert_eq!(scores.classes[2].f1, None);

        let none = Scores::of(&classes, &[], &[]).unwrap();
        assert_eq!((none.accuracy, none.macro_f1), (None, None));
        assert_eq!(none.line(), "accuracy – of 0 images, macro F1 –");
    }

    #[test]
    fn the_most_confused_pairs_come_first() {
        let pairs = scores().most_confused();
        let order: Vec<_> = pairs.iter().map(|p| (p.truth, p.prediction)).collect();
        assert_eq!(order, [(2, 0), (2, 1), (0, 1)]);
        assert_eq!((pairs[0].images, pairs[0].share), (1, 0.5));
    }

    #[test]
    fn wrong_input_is_refused_with_the_number_at_fault() {
        let classes = names(&["cat", "dog"]);
        let line = |error: ScoresError| error.to_string();
        assert_eq!(
            line(Scores::of(&classes, &[0, 1], &[0]).unwrap_err()),
            "2 true classes and 1 predictions cannot be compared; give one prediction per image"
        );
        assert_eq!(
            line(Scores::of(&classes, &[0, 1], &[0, 2]).unwrap_err()),
            "image 1 has class 2, and there are 2 classes, counted from 0"
        );
        for matrix in [vec![vec![1, 0]], vec![vec![1, 0], vec![1]]] {
            let error = Scores::new(&classes, matrix).unwrap_err();
            assert!(line(error).contains("2 classes need a square"));
        }
    }

    /// A line with single spaces.
    fn words(line: &str) -> String {
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn tables_are_aligned_and_without_control_characters() {
        let mut scores = scores();
        scores.classes[1].name = "d\u{1b}[31mog\n".into();
        let table = scores.class_table();
        let widths: BTreeSet<usize> = table.lines().map(|line| line.chars().count()).collect();
        assert!(widths.len() <= 2, "{table}");
        let rows: Vec<String> = table.lines().map(words).collect();
        for row in ["cat 4 75.0 % 75.0 % 75.0 %", "eel 2 – 0.0 % 0.0 %"] {
            assert!(rows.iter().any(|found| found == row), "{table}");
        }
        assert!(table.contains("d\u{fffd}[31mog\u{fffd}"), "{table}");
        let lines = scores.confusion_table();
        assert!(
            lines.lines().map(words).any(|row| row.starts_with("cat 3")),
            "{lines}"
        );
    }

    #[test]
    fn many_classes_are_printed_as_confused_pairs() {
        let classes: Vec<_> = (0..30).map(|class| format!("class {class}")).collect();
        let truth: Vec<_> = (0..300).map(|image| image % 30).collect();
        // Each class k is confused with the next in ⌊k / 3⌋ of its ten images.
        let taken: Vec<_> = (0..300)
            .map(|image| {
                let (class, round) = (image % 30, image / 30);
                (class + usize::from(round < class / 3)) % 30
            })
            .collect();
        let scores = Scores::of(&classes, &truth, &taken).unwrap();
        let table = scores.confusion_table();
        let rows: Vec<_> = table.lines().filter(|line| line.contains(" %")).collect();
        assert_eq!(rows.len(), PAIRS);
        assert!(
            rows[0].contains("class 27") && rows[0].contains("90.0 %"),
            "{table}"
        );
    }

    #[test]
    fn json_has_null_where_nothing_can_be_said() {
        let scores = scores();
        let json = serde_json::to_value(&scores).unwrap();
        assert_eq!(json["classes"][2]["precision"], serde_json::Value::Null);
        assert_eq!(json["classes"][1]["recall"], 1.0);
        assert_eq!(serde_json::from_value::<Scores>(json).unwrap(), scores);
    }
}
