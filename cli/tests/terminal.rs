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
        "--map fc: a rule is <regex>=<replacement>, `none`, or one of the model types dinov2, dinov2_with_registers, \
         audio-spectrogram-transformer, beit, deit, ijepa, vit, vit_mae, vit_msn, vivit, swin, dinov3_vit, minimax, mixtral, \
         phimoe, aria, aya_vision, gemma3, got_ocr2, internvl, llava, llava_next, llava_next_video, llava_onevision, \
         mistral3, paligemma, vipllava, qwen2_5_vl, qwen2_vl, gpt_neox"
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
        "name a command: merge, unmerge, inspect, diff or convert; burn-boft --help says what they do"
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
        &["diff", "adapter", "adapter"],
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

#[test]
fn every_command_prints_its_result_as_json() {
    let case = Case::open("cases/boft-mlp-bias-only-saved");
    let folder = case.folder();
    let json = |arguments: &str| -> serde_json::Value {
        let arguments = arguments.replace("ADAPTER", case.adapter());
        let printed = succeed(folder.path(), &arguments.split(' ').collect::<Vec<_>>());
        serde_json::from_str(&printed).unwrap()
    };
    let merge = "--json merge --base base.safetensors --adapter ADAPTER";
    let planned = json(&format!("{merge} --dry-run"));
    let merged = json(&format!("{merge} --output merged.safetensors"));
    assert_eq!(planned["output"], json!(null));
    assert_eq!(merged["output"], "merged.safetensors");
    assert_eq!(planned["changes"], merged["changes"]);
    assert_eq!([&merged["rotated"], &merged["replaced"]], [2, 4]);
    assert_eq!(
        merged["changes"][3],
        json!({
            "tensor": "fc1.weight", "change": "rotate", "adapter": case.adapter(), "rows": [0, 20], "block_size": 4,
            "factors": 1, "scale": true
        })
    );
    let unmerged = json(
        "unmerge --merged merged.safetensors --adapter ADAPTER --keep-saved --output restored.safetensors --json",
    );
    assert_eq!(unmerged["restored"], 2);
    assert_eq!(unmerged["base"], json!(null));
    let converted = json("convert ADAPTER --to peft --output again --json");
    assert_eq!([&converted["layers"], &converted["saved_tensors"]], [2, 4]);
    let lora = json("convert ADAPTER --to-lora 2 --base base.safetensors --output lora --json");
    assert_eq!(lora["layers"][1]["path"], "fc2");
    assert!(lora["layers"][1]["left_out_of_change"].as_f64() > Some(0.0));
    assert_eq!(json("inspect ADAPTER --json")["layers"][0]["path"], "fc1");
    let diff = json("diff ADAPTER ADAPTER --json");
    assert_eq!(
        [&diff["kind"], &diff["layers"][1]["path"]],
        ["adapters", "fc2"]
    );
    let diff = json("diff base.safetensors merged.safetensors --json");
    assert_eq!(
        [&diff["kind"], &diff["differ"]],
        [&json!("models"), &json!(6)]
    );
}

#[test]
fn the_command_line_describes_itself_to_shells_and_to_the_manual() {
    let folder = tempfile::tempdir().unwrap();
    let printed = |arguments: &[&str]| succeed(folder.path(), arguments);
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = printed(&["completions", shell]);
        assert!(script.contains("keep-saved"), "{shell}: {script}");
    }
    let page = printed(&["man"]);
    assert!(page.contains(".TH burn-boft 1"), "{page}");
    let page = printed(&["man", "unmerge"]);
    assert!(page.contains(".TH burn-boft-unmerge 1"), "{page}");
    assert!(
        page.contains("keep\\-saved") && page.contains("json"),
        "{page}"
    );
    for arguments in [
        ["completions", "bash", "--json"],
        ["man", "merge", "--json"],
    ] {
        assert_eq!(
            refused(folder.path(), &arguments),
            "completions and pages of the manual are not JSON; leave out --json"
        );
    }
    assert_eq!(
        refused(folder.path(), &["man", "fold"]),
        "there is no command `fold`; there are merge, unmerge, inspect, diff, convert, formats, completions, man, help"
    );
}
