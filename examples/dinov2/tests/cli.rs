//! The program from outside: exit codes, one clear line per mistake, and what a run leaves behind.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use image::RgbImage;

fn dinov2(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dinov2"))
        .args(arguments)
        .output()
        .expect("the program starts")
}

/// The only line on stderr of a run that must fail as a mistake of its input.
fn complaint(arguments: &[&str]) -> String {
    let output = dinov2(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{arguments:?}: {stderr}");
    stderr
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A folder of two classes with three images each.
fn image_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for class in ["cat", "dog"] {
        fs::create_dir(folder.path().join(class)).unwrap();
        for index in 0..3 {
            let file = folder.path().join(class).join(format!("{index}.png"));
            RgbImage::new(5, 4).save(file).unwrap();
        }
    }
    folder
}

#[test]
fn an_error_names_the_path_that_is_wrong() {
    let line = complaint(&["--images", "/no/such/folder", "--backbone", "/no/such/file"]);
    assert!(line.contains("/no/such/"), "{line}");
}

#[test]
fn an_error_names_the_checkpoint_that_is_missing() {
    let images = image_folder();
    let line = complaint(&[
        "--images",
        text(images.path()),
        "--backbone",
        "/no/such/model.safetensors",
    ]);
    assert!(line.contains("/no/such/model.safetensors"), "{line}");
}

#[test]
fn an_output_that_cannot_be_written_is_refused_before_training() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, b"").unwrap();
    let line = complaint(&["--output", text(&file.join("folder"))]);
    assert!(line.contains(text(&file)), "{line}");
    let line = complaint(&["--pretrain", text(&folder.path().join("none").join("out"))]);
    assert!(line.contains("none"), "{line}");
}

#[test]
fn an_error_names_the_file_that_is_not_a_checkpoint() {
    let images = image_folder();
    let backbone = images.path().join(".model.safetensors");
    fs::write(&backbone, b"not a checkpoint").unwrap();
    let line = complaint(&[
        "--images",
        text(images.path()),
        "--backbone",
        text(&backbone),
    ]);
    assert!(line.contains(".model.safetensors"), "{line}");
}

#[test]
fn a_corrupt_image_is_refused_before_anything_else_is_done() {
    let images = image_folder();
    let bad = images.path().join("dog").join("2.png");
    fs::write(&bad, b"\x89PNG\r\n\x1a\nand then nothing").unwrap();
    let line = complaint(&[
        "--images",
        text(images.path()),
        "--backbone",
        "/no/such/file",
    ]);
    assert!(line.contains(text(&bad)), "{line}");
}

#[test]
fn an_error_names_the_folder_without_classes() {
    let folder = tempfile::tempdir().unwrap();
    let line = complaint(&[
        "--images",
        text(folder.path()),
        "--backbone",
        "/no/such/file",
    ]);
    assert!(line.contains(text(folder.path())), "{line}");
}

#[test]
fn an_error_names_the_option_that_is_impossible() {
    let cases: [(&[&str], &str); 14] = [
        (&["--dropout", "1"], "--dropout"),
        (&["--epochs", "0"], "--epochs"),
        (&["--epochs", "many"], "--epochs"),
        (&["--batch-size", "0"], "--batch-size"),
        (&["--max-steps", "0"], "--max-steps"),
        (&["--learning-rate", "2"], "--learning-rate"),
        (&["--learning-rate", "nan"], "--learning-rate"),
        (&["--factors", "0"], "--factors"),
        (&["--method", "sgd"], "--method"),
        (&["--device", "abacus"], "--device"),
        (&["--images", "."], "--images"),
        (
            &["--backbone", "x", "--images", ".", "--image-size", "225"],
            "--image-size",
        ),
        (&["--compare", "--seeds", "0"], "--seeds"),
        (&["--no-such-option"], "--no-such-option"),
    ];
    for (arguments, named) in cases {
        let line = complaint(arguments);
        assert!(line.contains(named), "{arguments:?}: {line}");
    }
}

#[test]
fn a_block_size_that_does_not_fit_is_explained_before_training() {
    let folder = tempfile::tempdir().unwrap();
    let output = dinov2(&["--block-size", "6", "--output", text(folder.path())]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(
        stderr.contains("block size 6") && stderr.contains("query"),
        "{stderr}"
    );
    assert!(!String::from_utf8(output.stdout).unwrap().contains("epoch"));
}

#[test]
fn a_run_prints_the_block_sizes_that_oft_adjusts() {
    let folder = tempfile::tempdir().unwrap();
    let run = dinov2(&[
        "--method",
        "oft",
        "--block-size",
        "6",
        "--max-steps",
        "1",
        "--output",
        text(folder.path()),
    ]);
    let stdout = String::from_utf8(run.stdout).unwrap();
    assert!(
        stdout.contains("block size 6 does not divide every layer; there OFT takes"),
        "{stdout}"
    );
}

#[test]
fn a_short_run_of_each_adapter_saves_its_file() {
    for method in ["boft", "oft", "lora", "linear", "full"] {
        let folder = tempfile::tempdir().unwrap();
        let run = dinov2(&[
            "--method",
            method,
            "--max-steps",
            "2",
            "--output",
            text(folder.path()),
        ]);
        let stdout = String::from_utf8(run.stdout).unwrap();
        let stderr = String::from_utf8(run.stderr).unwrap();
        assert!(run.status.success(), "{method}: {stderr}");
        assert!(stdout.contains("accuracy after"), "{method}: {stdout}");
        let files: &[_] = match method {
            "boft" | "oft" => &["adapter_config.json", "adapter_model.safetensors"],
            _ => &["adapter.bpk"],
        };
        for file in files {
            assert!(folder.path().join(file).is_file(), "{method}: {stdout}");
        }
        if !matches!(method, "linear" | "full") {
            assert!(stdout.contains("merged model: all"), "{method}: {stdout}");
        }
    }
}

#[test]
fn help_lists_every_option() {
    let output = dinov2(&["--help"]);
    assert!(output.status.success());
    let help = String::from_utf8(output.stdout).unwrap();
    let options = [
        "--images",
        "--backbone",
        "--size",
        "--registers",
        "--image-size",
        "--method",
        "--block-size",
        "--factors",
        "--dropout",
        "--learning-rate",
        "--epochs",
        "--batch-size",
        "--max-steps",
        "--seed",
        "--output",
        "--device",
        "--compare",
        "--seeds",
        "--pretrain",
    ];
    for option in options {
        assert!(help.contains(option), "{option} is missing from\n{help}");
    }
}
