//! The program from outside: exit codes, one clear line per mistake, and what a run leaves behind.

mod common;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use common::{command, complaint, dinov2, pictures, printed, text, tiny_model};
use safetensors::SafeTensors;

#[test]
fn an_error_names_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_model(folder.path());
    let line = complaint(&["--data", "/no/such/folder", "--model", text(&model)]);
    assert!(line.contains("/no/such/folder"), "{line}");

    let data = folder.path().join("pictures");
    pictures(&data, 3);
    let line = complaint(&["--data", text(&data), "--model", "/no/such/model"]);
    assert!(line.contains("/no/such/model"), "{line}");
    let line = complaint(&["eval", "--run", "/no/such/run"]);
    assert!(line.contains("/no/such/run"), "{line}");
    let line = complaint(&["predict", "--images", text(&data)]);
    assert!(line.contains("--model"), "{line}");
}

#[test]
fn an_output_that_cannot_be_written_is_refused_before_training() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, b"").unwrap();
    let line = complaint(&["--output", text(&file.join("folder"))]);
    assert!(line.contains(text(&file)), "{line}");
    let line = complaint(&["--output", text(folder.path())]);
    assert!(line.contains("not empty"), "{line}");
    let line = complaint(&["pretrain", text(&folder.path().join("none").join("out"))]);
    assert!(line.contains("none"), "{line}");
}

#[test]
fn an_error_names_the_option_that_is_impossible() {
    let cases: [(&[&str], &str); 18] = [
        (&["--dropout", "1"], "--dropout"),
        (&["--epochs", "0"], "--epochs"),
        (&["--epochs", "many"], "--epochs"),
        (&["--batch-size", "0"], "--batch-size"),
        (&["--accumulate", "64"], "--accumulate"),
        (&["--max-steps", "0"], "--max-steps"),
        (&["--learning-rate", "2"], "--learning-rate"),
        (&["--learning-rate", "nan"], "--learning-rate"),
        (&["--factors", "0"], "--factors"),
        (&["--method", "oft", "--factors", "2"], "--factors"),
        (&["--method", "full", "--dtype", "bf16"], "--dtype"),
        (&["--method", "sgd"], "--method"),
        (&["--device", "abacus"], "--device"),
        (&["--data", "."], "--model"),
        (&["--image-size", "224"], "--image-size"),
        (&["--augment", "standard"], "--augment"),
        (&["--no-such-option"], "--no-such-option"),
        (&["compare", "--rates", "1e-3"], "learning rates"),
    ];
    for (arguments, named) in cases {
        let line = complaint(arguments);
        assert!(line.contains(named), "{arguments:?}: {line}");
    }
}

#[test]
fn a_file_of_settings_is_read_and_flags_take_precedence() {
    let folder = tempfile::tempdir().unwrap();
    let settings = folder.path().join("settings.toml");
    fs::write(
        &settings,
        "method = \"oft\"\nblock-size = 16\nmax-steps = 1\n",
    )
    .unwrap();
    let run = folder.path().join("run");
    let arguments = [
        "train",
        "--settings",
        text(&settings),
        "--block-size",
        "32",
        "--no-probe",
        "--output",
        text(&run),
    ];
    let output = printed(&arguments);
    assert!(output.contains("OFT b=32"), "{output}");
    let saved = fs::read_to_string(run.join("settings.toml")).unwrap();
    assert!(
        saved.contains("max-steps = 1") && saved.contains("block-size = 32"),
        "{saved}"
    );

    fs::write(&settings, "blocksize = 16\n").unwrap();
    let line = complaint(&["train", "--settings", text(&settings)]);
    assert!(
        line.contains("blocksize") && line.contains("settings.toml"),
        "{line}"
    );
}

#[test]
fn a_block_size_that_does_not_fit_is_explained_before_training() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let line = complaint(&["--block-size", "6", "--output", text(&run)]);
    assert!(
        line.contains("block size 6") && line.contains("query"),
        "{line}"
    );
    assert!(!run.exists());
}

#[test]
fn a_run_prints_the_block_sizes_that_oft_adjusts() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let settings = "--method oft --block-size 6 --max-steps 1 --no-probe --output";
    let mut arguments: Vec<&str> = settings.split_whitespace().collect();
    arguments.push(text(&run));
    let output = printed(&arguments);
    let note = "block size 6 does not divide every layer; there OFT takes";
    assert!(output.contains(note), "{output}");
}

#[test]
fn every_method_leaves_a_run_that_can_be_evaluated_and_exported() {
    for method in ["boft", "oft", "lora", "linear", "full"] {
        let folder = tempfile::tempdir().unwrap();
        let run = folder.path().join("run");
        let output = printed(&[
            "--method",
            method,
            "--epochs",
            "1",
            "--no-probe",
            "--output",
            text(&run),
        ]);
        let accuracy = number_after(&output, "accuracy after:");
        let scores = printed(&["eval", "--run", text(&run), "--json"]);
        let scores: serde_json::Value = serde_json::from_str(&scores).unwrap();
        let evaluated = 100.0 * scores["accuracy"].as_f64().unwrap();
        assert!(
            (accuracy - evaluated).abs() < 0.051,
            "{method}: {accuracy} {evaluated}"
        );
        let exported = folder.path().join("exported");
        printed(&["export", "--run", text(&run), "--output", text(&exported)]);
        assert!(exported.join("model.safetensors").is_file(), "{method}");
        printed(&["report", text(&run)]);
        assert!(run.join("report.html").is_file(), "{method}");
    }
}

/// The first number after these words.
fn number_after(text: &str, words: &str) -> f64 {
    let rest = text
        .split(words)
        .nth(1)
        .unwrap_or_else(|| panic!("no {words} in {text}"));
    let number = rest.split_whitespace().next().expect("a number follows");
    number
        .parse()
        .unwrap_or_else(|_| panic!("{number} is no number"))
}

#[test]
fn predictions_are_lines_of_json_and_a_corrupt_file_is_one_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("pictures");
    pictures(&data, 8);
    let model = tiny_model(folder.path());
    let run = folder.path().join("run");
    let settings = "train --image-size 16 --max-steps 2 --no-probe";
    let mut arguments: Vec<&str> = settings.split_whitespace().collect();
    arguments.extend(["--model", text(&model), "--data", text(&data)]);
    arguments.extend(["--output", text(&run)]);
    printed(&arguments);

    let asked = folder.path().join("asked");
    fs::create_dir(&asked).unwrap();
    fs::copy(data.join("across/000.png"), asked.join("a.png")).unwrap();
    fs::write(asked.join("b.png"), b"\x89PNG\r\n\x1a\nand then nothing").unwrap();
    fs::copy(data.join("along/000.png"), asked.join("c.png")).unwrap();
    let asked = text(&asked);
    let output = dinov2(&["predict", "--run", text(&run), "--images", asked, "--json"]);
    assert_eq!(output.status.code(), Some(2));
    let stdout = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<serde_json::Value> = stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let images: Vec<&str> = lines
        .iter()
        .map(|line| line["image"].as_str().unwrap())
        .collect();
    assert_eq!(images.len(), 3, "{stdout}");
    assert!(
        images[1].ends_with("b.png") && lines[1]["error"].is_string(),
        "{stdout}"
    );
    for line in [&lines[0], &lines[2]] {
        let logits = line["logits"].as_array().unwrap();
        let top = line["top"].as_array().unwrap();
        assert_eq!((logits.len(), top.len()), (3, 3));
        let shares = top
            .iter()
            .map(|class| class["probability"].as_f64().unwrap());
        assert!((shares.sum::<f64>() - 1.0).abs() < 1e-6);
    }
    let image = format!("{asked}/a.png");
    let table = printed(&["predict", "--run", text(&run), "--images", &image]);
    assert!(table.contains("across") && table.contains('%'), "{table}");
}

#[test]
fn pictures_get_the_logits_that_transformers_gives_them() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let file = fs::read(fixtures.join("images/answers.safetensors")).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
    let expected = SafeTensors::deserialize(&file).unwrap();

    let model = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(fixtures.join("mlp").join(name), model.path().join(name)).unwrap();
    }
    let preprocessor = &metadata.metadata().as_ref().unwrap()["config"];
    fs::write(model.path().join("preprocessor_config.json"), preprocessor).unwrap();

    for (name, tensor) in expected.tensors() {
        let image = fixtures.join("images/pictures").join(&name);
        let line = printed(&[
            "predict",
            "--json",
            "--model",
            text(model.path()),
            "--images",
            text(&image),
        ]);
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        let found = line["logits"].as_array().unwrap();
        let expected: Vec<f32> = tensor
            .data()
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        assert_eq!(found.len(), expected.len());
        let largest = expected.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            let difference = (found.as_f64().unwrap() as f32 - expected).abs();
            // Measured: up to 2e-6.
            assert!(
                difference < 1e-4 * largest,
                "{name}: {difference} of {largest}"
            );
        }
    }
    assert_eq!(expected.len(), 7);
}

#[test]
fn everything_that_is_wrong_with_a_folder_is_listed_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("pictures");
    pictures(&data, 8);
    fs::write(
        data.join("along/002.png"),
        b"\x89PNG\r\n\x1a\nand then nothing",
    )
    .unwrap();
    fs::write(data.join("dotted/notes.txt"), b"not a picture").unwrap();
    fs::create_dir(data.join("empty")).unwrap();
    let model = tiny_model(folder.path());
    let run = folder.path().join("run");
    let mut arguments = vec![
        "train",
        "--image-size",
        "16",
        "--max-steps",
        "1",
        "--no-probe",
    ];
    arguments.extend(["--model", text(&model), "--data", text(&data)]);
    arguments.extend(["--output", text(&run)]);
    let output = dinov2(&arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(
        stderr.contains("002.png") && stderr.contains("empty"),
        "{stderr}"
    );
    assert!(!run.exists());

    fs::remove_dir(data.join("empty")).unwrap();
    arguments.push("--skip-corrupt");
    let output = dinov2(&arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success() && stderr.contains("002.png"),
        "{stderr}"
    );
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(
        stdout.contains("3 classes: across, along, dotted"),
        "{stdout}"
    );
}

#[test]
fn an_adapter_is_trained_further_and_evaluated_on_a_folder_of_classes() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("pictures");
    pictures(&data, 20);
    let model = tiny_model(folder.path());
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let train = |more: &[&str], output| {
        let mut arguments = vec![
            "train",
            "--plain",
            "--image-size",
            "16",
            "--augment",
            "none",
        ];
        arguments.extend(["--model", text(&model), "--data", text(&data)]);
        arguments.extend(["--epochs", "3", "--no-probe", "--output", text(output)]);
        arguments.extend(more);
        printed(&arguments)
    };
    train(&["--method", "oft", "--block-size", "4"], &first);
    let adapter = first.join("adapter");
    let output = train(&["--adapter", text(&adapter)], &second);
    assert!(output.contains("OFT b=4: best epoch"), "{output}");
    let loss = |run: &std::path::Path| {
        let results = fs::read_to_string(run.join("results.json")).unwrap();
        let results: serde_json::Value = serde_json::from_str(&results).unwrap();
        results["valid_loss"].as_f64().unwrap()
    };
    assert!(loss(&second) < loss(&first));

    // The adapter says which model it belongs to.
    let adapter = second.join("adapter");
    let mut arguments = vec!["eval", "--adapter", text(&adapter)];
    arguments.extend(["--data", text(&data), "--json"]);
    let scores: serde_json::Value = serde_json::from_str(&printed(&arguments)).unwrap();
    assert_eq!(scores["images"], 60);

    // A class that the model does not know.
    fs::rename(data.join("along"), data.join("aslant")).unwrap();
    let line = complaint(&arguments);
    assert!(line.contains("aslant") && line.contains("dotted"), "{line}");
    fs::create_dir(folder.path().join("none")).unwrap();
    let none = folder.path().join("none");
    let line = complaint(&["predict", "--run", text(&second), "--images", text(&none)]);
    assert!(line.contains("without an image"), "{line}");
}

#[test]
fn an_adapter_keeps_the_order_of_its_classes_and_loses_its_head_to_other_classes() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("pictures");
    pictures(&data, 20);
    let model = tiny_model(folder.path());
    let first = folder.path().join("first");
    let settings = "train --plain --image-size 16 --augment none --epochs 6 --batch-size 8 --no-probe \
                    --learning-rate 2e-2 --method oft --block-size 4";
    let mut arguments: Vec<&str> = settings.split_whitespace().collect();
    arguments.extend(["--model", text(&model), "--data", text(&data)]);
    arguments.extend(["--output", text(&first)]);
    printed(&arguments);
    let adapter = first.join("adapter");
    let classes = fs::read_to_string(adapter.join("classes.json")).unwrap();
    assert!(classes.find("across") < classes.find("dotted"), "{classes}");

    // The same pictures under names that sort in another order: the head must follow the names and not the places.
    let sorted = [
        ("across", "dotted"),
        ("along", "along"),
        ("dotted", "across"),
    ];
    let swapped = folder.path().join("swapped");
    for (from, to) in sorted {
        fs::create_dir_all(swapped.join(from)).unwrap();
        for file in fs::read_dir(data.join(to)).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), swapped.join(from).join(file.file_name())).unwrap();
        }
    }
    let names = serde_json::json!(["dotted", "along", "across"]).to_string();
    fs::write(adapter.join("classes.json"), names).unwrap();
    let start = |data: &std::path::Path, name: &str| {
        let run = folder.path().join(name);
        let settings = "train --plain --image-size 16 --augment none --epochs 1 --no-probe \
                        --learning-rate 1e-6 --head-learning-rate 1e-6";
        let mut arguments: Vec<&str> = settings.split_whitespace().collect();
        arguments.extend(["--model", text(&model), "--adapter", text(&adapter)]);
        arguments.extend(["--data", text(data), "--output", text(&run)]);
        printed(&arguments)
    };
    let output = start(&swapped, "second");
    assert!(
        output.contains("the head is that of the adapter"),
        "{output}"
    );
    assert!(number_after(&output, "accuracy after:") > 90.0, "{output}");

    fs::rename(swapped.join("along"), swapped.join("aslant")).unwrap();
    let output = start(&swapped, "third");
    let note = "the head starts afresh: that of the adapter tells apart dotted, along, across";
    assert!(output.contains(note), "{output}");
    assert!(number_after(&output, "accuracy after:") < 90.0, "{output}");
}

#[test]
fn a_run_that_does_worse_than_its_probe_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let settings = "train --max-steps 8 --learning-rate 1 --output";
    let mut arguments: Vec<&str> = settings.split_whitespace().collect();
    arguments.push(text(&run));
    let output = dinov2(&arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    let advice = [
        "the linear probe does better",
        "--find-rate",
        "--warm-start",
    ];
    assert!(advice.iter().all(|part| stderr.contains(part)), "{stderr}");
}

#[test]
fn the_settings_of_a_run_are_settings_for_another() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let settings = "train --method lora --rank 3 --epochs 2 --find-rate --no-probe --output";
    let mut arguments: Vec<&str> = settings.split_whitespace().collect();
    arguments.push(text(&first));
    let output = printed(&arguments);
    assert!(output.contains("is taken"), "{output}");
    let saved = first.join("settings.toml");
    let mut arguments = vec!["train", "--settings", text(&saved), "--seed", "3"];
    arguments.extend(["--output", text(&second)]);
    printed(&arguments);
    let read = |run: &std::path::Path| fs::read_to_string(run.join("settings.toml")).unwrap();
    assert_eq!(read(&first).replace("seed = 0", "seed = 3"), read(&second));
}

#[test]
fn a_run_that_was_begun_with_relative_paths_is_found_from_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    pictures(&folder.path().join("pictures"), 8);
    let model = tiny_model(folder.path());
    let model = text(model.file_name().unwrap().as_ref());
    let settings = "train --image-size 16 --max-steps 2 --no-probe --data pictures --output run";
    let mut arguments: Vec<&str> = settings.split_whitespace().collect();
    arguments.extend(["--model", model]);
    let begun = command(&arguments)
        .current_dir(folder.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&begun.stderr);
    assert!(begun.status.success(), "{stderr}");
    let run = folder.path().join("run");
    let scores = printed(&["eval", "--run", text(&run)]);
    assert!(scores.contains("accuracy"), "{scores}");
}

#[test]
fn a_comparison_goes_on_where_it_was_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("comparison");
    let settings = "compare --preset digits --methods linear,boft --seeds 1 --max-steps 2 --output";
    let mut arguments: Vec<&str> = settings.split_whitespace().collect();
    arguments.push(text(&output));
    let first = printed(&arguments);
    assert!(first.contains("BOFT b=4 m=2"), "{first}");

    // As if it had been killed within its last line.
    let ledger = output.join("results.jsonl");
    let whole = fs::read_to_string(&ledger).unwrap();
    fs::write(&ledger, &whole[..whole.len() - 20]).unwrap();
    let again = printed(&arguments);
    let repeated = again.lines().filter(|line| line.contains(" of 8: "));
    assert_eq!(repeated.count(), 1, "{again}");
    assert!(output.join("RESULTS.md").is_file());
}

#[test]
fn completions_end_quietly_when_nobody_reads_on() {
    let mut program = command(&["completions", "bash"]);
    program.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut run = program.spawn().unwrap();
    drop(run.stdout.take());
    let output = run.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.is_empty(), "{stderr}");
}

#[test]
fn help_names_every_command_and_every_option_of_training() {
    let help = printed(&["--help"]);
    for command in [
        "train",
        "eval",
        "predict",
        "export",
        "report",
        "compare",
        "completions",
    ] {
        assert!(help.contains(command), "{command} is missing from\n{help}");
    }
    let help = printed(&["train", "--help"]);
    let options = "--model --data --adapter --image-size --augment --skip-corrupt --workers --method --block-size \
                   --factors --dropout --rank --epochs --batch-size --accumulate --max-steps --learning-rate \
                   --head-learning-rate --warm-up --weight-decay --clip-norm --label-smoothing --patience \
                   --warm-start --no-probe --find-rate --seed --checkpoint-every --device --dtype \
                   --gradient-checkpointing --settings --output --overwrite --resume --plain";
    for option in options.split_whitespace() {
        assert!(help.contains(option), "{option} is missing from\n{help}");
    }
    assert!(printed(&["completions", "bash"]).contains("_dinov2"));
}
