//! Outcomes for tests.

use super::{
    Cost, Forgetting, Measured, Outcome, Preset, Protocol, Rotation, Run, Setting, Stage, Test,
    Validation,
};

/// A search that ended with a validation loss.
pub fn search(run: Run, loss: f64) -> Outcome {
    Outcome {
        protocol: String::new(),
        run,
        epoch: Some(3),
        validation: Validation {
            loss,
            accuracy: 0.8,
        },
        rotation: None,
        seconds: 10.0,
        measured: None,
    }
}

/// A final run with the marks of its test images.
pub fn tested(run: Run, correct: &[bool]) -> Outcome {
    let measured = Measured {
        test: Test {
            correct: correct.to_vec(),
        },
        forgetting: Some(Forgetting {
            before: 0.9,
            after: 0.8,
        }),
        cost: Cost {
            trainable: 12_165,
            adapter_bytes: 104_100,
            step_ms: 33.9,
            peak_bytes: Some(300 << 20),
        },
    };
    Outcome {
        measured: Some(measured),
        ..search(run, 0.5)
    }
}

/// A finished comparison in which method `i` of the protocol answers test image `k` correctly with seed `s` if
/// `right(i, s, k)` holds.
pub fn finished(
    protocol: &Protocol,
    images: usize,
    right: impl Fn(usize, u64, usize) -> bool,
) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    while let Some(run) = protocol.next(&outcomes) {
        let place = protocol.entries.iter().position(|e| e.method == run.method);
        let method = place.expect("the plan only has methods of the protocol");
        let seed = run.seed;
        let loss = (run.learning_rate.log10() + 2.5).abs();
        let mut outcome = match run.stage {
            Stage::Search => search(run, loss),
            Stage::Final => {
                let correct: Vec<bool> = (0..images).map(|k| right(method, seed, k)).collect();
                tested(run, &correct)
            }
        };
        if protocol.entries[method].method.to_string().contains("OFT") {
            outcome.rotation = Some(Rotation {
                defect: 2.4e-7 * (1.0 + method as f64),
                angle: 0.35,
            });
        }
        outcome.protocol = protocol.identity();
        outcomes.push(outcome);
    }
    outcomes
}

/// The first method is right about half of the images, and every other one about nine of ten, which depend on the seed.
pub fn right(method: usize, seed: u64, image: usize) -> bool {
    match method {
        0 => image.is_multiple_of(2),
        _ => !(image + 3 * seed as usize + method).is_multiple_of(10),
    }
}

/// The quick preset on one task, with five seeds.
pub fn quick() -> Protocol {
    let mut protocol = Preset::Quick.protocol(Setting::example(&["textiles"]));
    protocol.seeds = (0..5).collect();
    protocol
}
