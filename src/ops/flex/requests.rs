//! A batch whose requests use different adapters: each takes its numbers from where they are.
//!
//! The rotations of a batch are read once and are never copied side by side, as the portable version does. With one row
//! for each request that reading is most of the work.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::butterfly::{Task, written};
use super::real::Real;
use super::tile::{PASSING_ROWS, dispatch};
use crate::ops::butterfly::Side;

/// Multiplications that are not worth another thread.
const SINGLE_WORK: usize = 1 << 18;

/// `x·R` with the rotation that the request of each row takes; rows of a request that takes none are copied.
///
/// # Shapes
///
/// - input: `[rows, d]`, contiguous, equally many rows for each request; so is the result
/// - rotations: `[d/s, s, s]` each, contiguous
/// - choices: for each request the index of its rotation
///
/// # Numerics
///
/// A row gets the same bits as from [`rotate`](super::butterfly::rotate) with the rotation of its request.
///
/// # Panics
///
/// - If the rows cannot be divided among the requests, or a rotation is for another number of channels.
pub(super) fn rotate<E: Real>(
    input: &[E],
    rotations: &[&[E]],
    choices: &[Option<usize>],
    s: usize,
    [rows, columns]: [usize; 2],
) -> Vec<E> {
    assert!(
        rows.is_multiple_of(choices.len()) && input.len() == rows * columns,
        "{rows} rows of {columns} numbers for {} requests",
        choices.len()
    );
    assert!(
        rotations
            .iter()
            .all(|rotation| rotation.len() == columns * s),
        "rotations of {columns} channels"
    );
    let rotate = |(output, matrix, choice): (&mut [MaybeUninit<E>], &[E], Option<usize>)| {
        let Some(choice) = choice else {
            output.write_copy_of_slice(matrix);
            return;
        };
        let task = Task {
            output,
            matrix,
            stride: columns,
            rotation: rotations[choice],
            s,
            columns,
            scale: None,
            side: Side::Right,
        };
        dispatch::<E, _>(s, task);
    };
    let each = rows / choices.len();
    let (request, passing) = (each * columns, PASSING_ROWS * columns);
    let write = |output: &mut [MaybeUninit<E>]| {
        // A batch without rows has no chunks.
        let requests = output.chunks_mut(request.max(1));
        let requests = requests.zip(input.chunks(request.max(1))).zip(choices);
        let tasks = requests.flat_map(|((output, input), &choice)| {
            let parts = output.chunks_mut(passing).zip(input.chunks(passing));
            parts.map(move |(output, input)| (output, input, choice))
        });
        if rows * columns * s <= SINGLE_WORK {
            return tasks.for_each(rotate);
        }
        let work = each.min(PASSING_ROWS) * columns * s;
        let tasks: Vec<_> = tasks.collect();
        tasks
            .into_par_iter()
            .with_min_len(SINGLE_WORK / work)
            .for_each(rotate);
    };
    // SAFETY: the rows of all requests are all rows, and a task rotates every number of its own.
    unsafe { written(rows * columns, write) }
}

/// `z ⊙ s + bias` with the scale and the bias that the request of each row takes, in place.
///
/// # Shapes
///
/// - output: `[rows, columns]`, contiguous, equally many rows for each request
/// - scales, biases: `[columns]` each, and for each request the index of the one that it takes
///
/// # Numerics
///
/// One multiplication and one addition, each rounded.
///
/// # Panics
///
/// - If the output has another shape, or a scale or bias another length.
pub(super) fn scale<E: Real>(
    output: &mut [E],
    (scales, scaled): (&[&[E]], &[Option<usize>]),
    (biases, biased): (&[&[E]], &[Option<usize>]),
    [rows, columns]: [usize; 2],
) {
    assert_eq!(output.len(), rows * columns, "a [{rows}, {columns}] output");
    let vectors = scales.iter().chain(biases);
    assert!(
        vectors.into_iter().all(|vector| vector.len() == columns),
        "scales and biases of {columns} channels"
    );
    let each = (rows / scaled.len()).max(1);
    let (ones, zeros) = (vec![E::rounded(1.0); columns], vec![E::default(); columns]);
    output
        .par_chunks_mut(columns)
        .enumerate()
        .with_min_len(PASSING_ROWS)
        .for_each(|(row, output)| {
            let scale = scaled[row / each].map_or(&ones[..], |index| scales[index]);
            let bias = biased[row / each].map_or(&zeros[..], |index| biases[index]);
            for (value, (&scale, &bias)) in output.iter_mut().zip(scale.iter().zip(bias)) {
                *value = *value * scale + bias;
            }
        });
}
