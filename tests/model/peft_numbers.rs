//! Small rotations compared with numbers that PEFT printed.

use burn::tensor::DType;
use burn_boft::ops::{Blocks, Direction, Side};
use burn_boft::{Cayley, inject, project};

use super::oracle::{neumann_016, oft};
use crate::common::models::{linear, numbers, set};
use crate::common::{assert_close, devices, host, tensor};

#[test]
fn boft_rotates_to_the_golden_values_of_peft() {
    // PEFT's parameter is the whole square with t above the diagonal, and Q = ½(A − Aᵀ).
    let skew: Vec<f64> = (0..3)
        .flat_map(|i| (0..4).map(move |k| 0.1 * f64::from(4 * i + k + 1) / 2.0))
        .collect();
    let input: Vec<f64> = (1..=8).map(f64::from).collect();
    let golden = [
        [
            1.1945137, 1.8902743, 3.7326733, 3.3267327, 6.5403423, 4.2689487, 9.5384615, 4.6923077,
        ],
        [
            2.6688662, 3.6234104, 2.5766458, 1.7632205, 10.8033243, 7.0004790, 2.8096389, 0.6224206,
        ],
        [
            8.3786977, 9.1407322, 5.2944336, 3.1763959, 3.1156817, 0.7284711, -1.0662335,
            -0.8654047,
        ],
    ];
    for (backend, device) in devices() {
        for (dtype, tolerance) in [(DType::F64, 1e-7), (DType::F32, 1e-6)] {
            for (m, golden) in (1..).zip(&golden) {
                let skew = tensor(&skew[..4 * m], [m, 4, 1], dtype, &device);
                let input = tensor(&input, [1, 8], dtype, &device);
                let output = Blocks::cayley(skew, 2).rotate(input, Side::Right, Direction::Forward);
                assert_close(
                    &format!("{m} factors, {backend}"),
                    &host(output),
                    golden,
                    tolerance,
                );
            }
        }
    }
}

#[test]
fn oft_rotates_to_the_golden_values_of_peft() {
    let new = |terms| Cayley::Neumann { terms };
    let golden = [
        (Cayley::Exact, [2.2631579, 2.8421053, 0.8947368]),
        (new(2), [-0.6, 0.4, 4.6]),
        (new(3), [-0.648, -0.128, 3.688]),
        (new(4), [-0.648, -0.128, 3.688]),
        (new(5), [-0.5248, 0.0288, 3.632]),
        (new(6), [-0.52928, 0.05792, 3.70368]),
        (Cayley::Neumann016 { terms: 5 }, [-0.5136, 0.0736, 3.688]),
    ];
    for (backend, device) in devices() {
        for (dtype, tolerance) in [(DType::F64, 1e-7), (DType::F32, 1e-6)] {
            for (cayley, golden) in &golden {
                let skew = tensor(&[0.1, 0.2, 0.3], [1, 1, 3], dtype, &device);
                let blocks = match *cayley {
                    Cayley::Exact => Blocks::cayley(skew, 3),
                    Cayley::Neumann { terms } => Blocks::neumann(skew, 3, terms),
                    Cayley::Neumann016 { terms } => Blocks::polynomial(skew, 3, neumann_016(terms)),
                    other => panic!("no golden values for {other}"),
                };
                let input = tensor(&[1.0, 2.0, 3.0], [1, 3], dtype, &device);
                let output = blocks.rotate(input, Side::Right, Direction::Forward);
                assert_close(
                    &format!("{cayley:?}, {backend}"),
                    &host(output),
                    golden,
                    tolerance,
                );
            }
        }
    }
}

#[test]
fn coft_projects_to_the_golden_values_of_peft() {
    for (backend, device) in devices() {
        let config = oft().with_block_size(3).with_coft_radius(0.1);
        let model = inject(linear([6, 5], 3, DType::F32, &device), config).unwrap();
        let model = set(model, "weight.boft.skew", |_| [0.1, 0.2, 0.3].repeat(2));
        let skew = &numbers(&project(model))["weight.boft.skew"];
        let golden = [0.0133631, 0.0267261, 0.0400892].repeat(2);
        assert_close(backend, skew, &golden, 1e-7);
    }
}
