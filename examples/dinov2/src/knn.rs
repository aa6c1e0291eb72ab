//! Nearest neighbours: how well classes can be told apart by the features of a backbone, without any training.

/// Feature vectors and the classes of the images they came from.
#[derive(Clone, Debug)]
pub struct Features {
    /// `[images, width]`, row by row.
    pub values: Vec<f32>,
    pub width: usize,
    pub labels: Vec<usize>,
}

impl Features {
    /// Unit-length rows.
    fn directions(&self) -> Vec<Vec<f32>> {
        self.values
            .chunks_exact(self.width)
            .map(|row| {
                let norm = row
                    .iter()
                    .map(|v| v * v)
                    .sum::<f32>()
                    .sqrt()
                    .max(f32::MIN_POSITIVE);
                row.iter().map(|v| v / norm).collect()
            })
            .collect()
    }
}

/// The share of queries whose class wins the vote of their `k` nearest neighbours by cosine. If classes have equally many
/// votes, the one with the nearest neighbour wins.
pub fn accuracy(known: &Features, queries: &Features, k: usize) -> f64 {
    let rows = known.directions();
    let classes = known
        .labels
        .iter()
        .map(|label| label + 1)
        .max()
        .unwrap_or(0);
    let correct = queries
        .directions()
        .iter()
        .zip(&queries.labels)
        .filter(|(query, label)| vote(query, &rows, &known.labels, classes, k) == Some(**label))
        .count();
    correct as f64 / queries.labels.len() as f64
}

fn vote(
    query: &[f32],
    rows: &[Vec<f32>],
    labels: &[usize],
    classes: usize,
    k: usize,
) -> Option<usize> {
    let mut near: Vec<(f32, usize)> = rows
        .iter()
        .zip(labels)
        .map(|(row, &label)| (row.iter().zip(query).map(|(a, b)| a * b).sum(), label))
        .collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    near.truncate(k);

    let mut votes = vec![0; classes];
    near.iter().for_each(|&(_, label)| votes[label] += 1);
    let most = votes.iter().copied().max()?;
    near.iter()
        .map(|&(_, label)| label)
        .find(|&label| votes[label] == most)
}

#[cfg(test)]
mod tests {
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
}
