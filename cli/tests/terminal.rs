//! What people type and read: options, and lines on a terminal.

use std::fs;

use serde_json::json;

use crate::files::*;

#[test]
fn wrong_options_are_refused_in_one_line() {
    let place = MergeFolder::new();
    let line = |arguments: &[&str]| refused(place.path(), arguments);
    assert_eq!(
        line(&[
            "merge",
            "--base",
            "base.safetensors",
            "--adapter",
            "adapter"
        ]),
        "the following required arguments were not provided: --output <PATH>"
    );
    assert_eq!(
        place.refused_with(&["--map", "fc"]),
        "--map fc: a rule is `dinov2` or <regex>=<replacement>"
    );
    assert!(
        place
            .refused_with(&["--map", "(=x"])
            .starts_with("--map (=x: ")
    );
    assert_eq!(
        line(&["convert", "adapter", "--output", "out"]),
        "the following required arguments were not provided: --to <TO>"
    );
    assert_eq!(
        line(&[
            "convert",
            "adapter",
            "--to-lora",
            "0",
            "--base",
            "base.safetensors",
            "--output",
            "out"
        ]),
        "invalid value '0' for '--to-lora <RANK>': 0 is not in 1..=65536"
    );
    assert_eq!(line(&["fold"]), "unrecognized subcommand 'fold'");
    assert_eq!(
        line(&[]),
        "name a command: merge, unmerge, inspect or convert; burn-boft --help says what they do"
    );
}

/// A file cannot make the terminal obey it.
#[test]
fn control_characters_in_names_are_not_printed() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"peft_type": "OFT", "oft_block_size": 4, "target_modules": "all-linear"});
    let module = "f\u{1b}[2J\r\nc";
    let write_layer = |module: &str, name: &str| {
        let key = format!("base_model.model.{module}.oft_R.weight");
        let tensors = [(key, Tensor::random(&[2, 6], 1))];
        write_adapter(&folder.path().join(name), &config, &tensors.into());
    };
    write_layer(module, "adapter");
    write_layer("g\u{1b}[2J", "other");
    let base = [(format!("{module}.weight"), Tensor::random(&[3, 8], 2))];
    write(&folder.path().join("base.safetensors"), &base.into());
    let base = ["--base", "base.safetensors"];
    for (arguments, code) in [
        (&["inspect", "adapter", "--plot", "angles.svg"][..], 0),
        (
            &[&["merge", "--dry-run", "--adapter", "adapter"], &base[..]].concat(),
            0,
        ),
        (
            &[&["merge", "--dry-run", "--adapter", "other"], &base[..]].concat(),
            2,
        ),
        (
            &[
                &["convert", "adapter", "--to-lora", "1", "--output", "lora"],
                &base[..],
            ]
            .concat(),
            0,
        ),
    ] {
        let run = run(folder.path(), arguments);
        assert_eq!(run.code, code, "{}", run.stderr);
        let text = run.stdout + &run.stderr;
        assert!(text.contains("\u{fffd}[2J"), "{text:?}");
        assert!(
            !text.contains(|c: char| c.is_control() && c != '\n'),
            "{text:?}"
        );
    }
    let svg = fs::read_to_string(folder.path().join("angles.svg")).unwrap();
    assert!(svg.contains("f\u{fffd}[2J\u{fffd}\u{fffd}c"), "{svg:?}");
}

/// What cannot be printed is a failure, and a reader who has seen enough is none.
#[cfg(target_os = "linux")]
#[test]
fn a_full_standard_output_is_a_failure_and_a_closed_one_is_not() {
    use std::process::{Command, Stdio};
    let place = MergeFolder::new();
    let run_into = |output: Stdio, arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_burn-boft"));
        command.args(arguments).current_dir(place.path());
        let child = command.stdout(output).stderr(Stdio::piped()).spawn();
        let output = child.unwrap().wait_with_output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let fit = ["--base", "base.safetensors", "--adapter", "adapter"];
    for arguments in [
        &["inspect", "adapter"][..],
        &["inspect", "adapter", "--json"],
        &[&["merge"], &fit[..], &["--dry-run"]].concat(),
        &[&["merge"], &fit[..], &["--output", "merged"]].concat(),
        &[
            "unmerge",
            "--merged",
            "merged",
            "--adapter",
            "adapter",
            "--output",
            "restored",
        ],
        &convert_command("adapter", "peft", "peft"),
        &[
            "convert",
            "adapter",
            "--to-lora",
            "2",
            "--base",
            "base.safetensors",
            "--output",
            "lora",
        ],
        &["--version"],
        &["--help"],
    ] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let line =
            "error: standard output cannot be written: No space left on device (os error 28)\n";
        assert_eq!(
            run_into(full.into(), arguments),
            (Some(1), line.into()),
            "{arguments:?}"
        );
    }
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let inspect = ["inspect", "adapter"];
    assert_eq!(run_into(writer.into(), &inspect), (Some(0), String::new()));
}
