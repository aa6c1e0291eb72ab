//! Nearest neighbours: how well classes can be told apart by the features of a backbone, without any training.

use gemm::{Parallelism, gemm};
use rayon::prelude::*;

/// How many queries are compared with all known rows at once, which bounds the memory.
const QUERIES: usize = 512;

/// Feature vectors and the classes of the images they came from.
#[derive(Clone, Debug)]
pub struct Features {
    /// `[images, width]`, row by row.
    pub values: Vec<f32>,
    pub width: usize,
    pub labels: Vec<usize>,
}

impl Features {
    /// The same rows at unit length.
    fn directions(&self) -> Vec<f32> {
        let mut values = self.values.clone();
        for row in values.chunks_exact_mut(self.width) {
            let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            let norm = norm.max(f32::MIN_POSITIVE);
            row.iter_mut().for_each(|v| *v /= norm);
        }
        values
    }
}

/// The share of queries whose class wins the vote of their `k` nearest neighbours by cosine. If classes have equally many
/// votes, the one with the nearest neighbour wins; of equally near neighbours, the first ones of `known` vote.
///
/// # Panics
///
/// The features have different widths, or not one label for each row.
pub fn accuracy(known: &Features, queries: &Features, k: usize) -> f64 {
    let width = known.width;
    assert_eq!(width, queries.width, "the features come from one model");
    for features in [known, queries] {
        let expected = features.labels.len() * width;
        assert_eq!(features.values.len(), expected, "one label for each row");
    }
    let rows = known.directions();
    let chunks = queries.values.chunks(QUERIES * width);
    let labels = queries.labels.chunks(QUERIES);
    let correct: usize = chunks
        .zip(labels)
        .map(|(values, labels)| {
            let cosines = cosines(values, &rows, width);
            let votes = cosines.par_chunks(known.labels.len().max(1));
            votes
                .zip(labels)
                .filter(|(cosines, label)| vote(cosines, &known.labels, k) == Some(**label))
                .count()
        })
        .sum();
    correct as f64 / queries.labels.len() as f64
}

/// A `[queries, rows]` table of products. Queries keep their length, since it does not change which rows are near.
fn cosines(queries: &[f32], rows: &[f32], width: usize) -> Vec<f32> {
    let (m, n) = (queries.len() / width, rows.len() / width);
    let mut products = vec![0.0; m * n];
    let [down, across] = [width as isize, 1];
    // SAFETY: the three slices hold `[m, width]`, `[n, width]` and `[m, n]` numbers, row by row, and the one that is
    // written is not one of those that are read.
    unsafe {
        gemm(
            m,
            n,
            width,
            products.as_mut_ptr(),
            1,
            n as isize,
            false,
            queries.as_ptr(),
            across,
            down,
            rows.as_ptr(),
            down,
            across,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
    }
    products
}

/// The class that most of the `k` nearest rows have.
fn vote(cosines: &[f32], labels: &[usize], k: usize) -> Option<usize> {
    let nearer = |a: &usize, b: &usize| cosines[*b].total_cmp(&cosines[*a]).then(a.cmp(b));
    let mut near: Vec<usize> = (0..cosines.len()).collect();
    if k < near.len() {
        near.select_nth_unstable_by(k, nearer);
        near.truncate(k);
    }
    near.sort_unstable_by(nearer);

    let votes = |label: usize| near.iter().filter(|&&row| labels[row] == label).count();
    let most = near.iter().map(|&row| votes(labels[row])).max()?;
    let mut classes = near.iter().map(|&row| labels[row]);
    classes.find(|&label| votes(label) == most)
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    fn features(rows: &[[f32; 2]], labels: &[usize]) -> Features {
        Features {
            values: rows.concat(),
            width: 2,
            labels: labels.to_vec(),
        }
    }

    #[test]
    fn neighbours_vote_by_angle_and_not_by_length() {
        let known = features(
            &[[9.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.2, 8.0]],
            &[0, 0, 1, 1],
        );
        let queries = features(&[[0.1, 0.01], [0.3, 3.0], [5.0, 0.0]], &[0, 1, 1]);
        assert_eq!(accuracy(&known, &queries, 2), 2.0 / 3.0);
    }

    #[test]
    fn the_nearest_breaks_a_tie() {
        let known = features(&[[1.0, 0.0], [0.0, 1.0]], &[0, 1]);
        let queries = features(&[[1.0, 0.9], [0.9, 1.0]], &[0, 1]);
        assert_eq!(accuracy(&known, &queries, 2), 1.0);
    }

    #[test]
    fn the_first_of_equally_near_rows_vote() {
        let known = features(&[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], &[2, 1, 0]);
        let queries = features(&[[1.0, 0.0]], &[2]);
        assert_eq!(accuracy(&known, &queries, 1), 1.0);
        // There are fewer rows than votes.
        assert_eq!(accuracy(&known, &queries, 20), 1.0);
    }

    /// Random features around a centre for each class.
    fn scattered(images: usize, width: usize, seed: u64) -> Features {
        let mut rng = StdRng::seed_from_u64(seed);
        let labels: Vec<usize> = (0..images).map(|image| image % 10).collect();
        let values = labels.iter().flat_map(|&label| {
            let centre = (0..width).map(|place| f32::from(u8::from(place % 10 == label)));
            let noise = centre.map(|centre| 0.8 * centre + rng.random_range(-1.0..1.0));
            noise.collect::<Vec<f32>>()
        });
        Features {
            values: values.collect(),
            width,
            labels: labels.clone(),
        }
    }

    #[test]
    fn the_matrix_product_finds_the_neighbours_that_loops_find() {
        // More queries than are compared at once.
        let (known, queries) = (scattered(300, 30, 1), scattered(600, 30, 2));
        let cosine = |a: &[f32], b: &[f32]| {
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                let pairs = a.iter().zip(b);
                pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
        };
        let nearest = queries.values.chunks(30).map(|query| {
            let rows = known.values.chunks(30).map(|row| cosine(query, row));
            let best = rows.enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
            known.labels[best.unwrap().0]
        });
        let pairs = nearest.zip(&queries.labels);
        let correct = pairs.filter(|(found, label)| found == *label).count();
        let expected = correct as f64 / 600.0;
        assert!((0.3..0.95).contains(&expected), "{expected}");
        assert_eq!(accuracy(&known, &queries, 1), expected);
    }
}
