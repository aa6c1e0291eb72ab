//! What the tests of the program share: its processes, pictures that are made up, and a tiny pretrained model.

#![allow(dead_code)] // Every test program uses a part of this.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use image::{Rgb, RgbImage};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

/// The program, to be started with these arguments.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dinov2"));
    command.args(arguments);
    command
}

/// Runs the program to its end.
pub fn dinov2(arguments: &[&str]) -> Output {
    command(arguments).output().expect("the program starts")
}

/// What a run that must succeed prints.
pub fn printed(arguments: &[&str]) -> String {
    let output = dinov2(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).expect("the output is text")
}

/// The only line on stderr of a run that must fail as a mistake of its input.
pub fn complaint(arguments: &[&str]) -> String {
    let output = dinov2(arguments);
    let stderr = String::from_utf8(output.stderr).expect("messages are text");
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{arguments:?}: {stderr}");
    assert!(!stderr.contains("os error"), "{arguments:?}: {stderr}");
    stderr
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are text")
}

/// The classes of [`pictures`].
pub const CLASSES: [&str; 3] = ["across", "along", "dotted"];

/// Writes `count` pictures of each class into a folder: stripes across, stripes along and dots, in random colours, places
/// and sizes.
pub fn pictures(folder: &Path, count: usize) {
    let mut rng = StdRng::seed_from_u64(5);
    for class in CLASSES {
        fs::create_dir_all(folder.join(class)).unwrap();
        for index in 0..count {
            picture(class, &mut rng)
                .save(folder.join(class).join(format!("{index:03}.png")))
                .unwrap();
        }
    }
}

fn picture(class: &str, rng: &mut impl Rng) -> RgbImage {
    let colour = |rng: &mut dyn FnMut() -> u8| Rgb([rng(), rng(), rng()]);
    let dark = colour(&mut || rng.random_range(0..90));
    let bright = colour(&mut || rng.random_range(165..=255));
    let (width, height) = (rng.random_range(24..40), rng.random_range(24..40));
    let (shift, period) = (rng.random_range(0..8), rng.random_range(7..10));
    RgbImage::from_fn(width, height, |x, y| {
        let on = |along: u32| (along + shift) % period < period / 2;
        let drawn = match class {
            "across" => on(y),
            "along" => on(x),
            _ => on(x) && on(y),
        };
        if drawn { bright } else { dark }
    })
}

/// Writes a tiny pretrained model in the layout of Hugging Face.
pub fn tiny_model(folder: &Path) -> PathBuf {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mlp");
    let model = folder.join("tiny");
    fs::create_dir_all(&model).unwrap();
    fs::copy(
        fixture.join("model.safetensors"),
        model.join("model.safetensors"),
    )
    .unwrap();
    let config = serde_json::json!({
        "architectures": ["Dinov2ForImageClassification"],
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        "id2label": {"0": "a", "1": "b", "2": "c", "3": "d", "4": "e"},
    });
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    model
}
