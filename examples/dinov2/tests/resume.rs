//! A run that is killed goes on as if it had never stopped.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::{command, complaint, dinov2, pictures, printed, text, tiny_model};

/// The arguments of a run on the pictures of a folder, without `--output`.
fn train<'a>(model: &'a str, data: &'a str, output: &'a str) -> Vec<&'a str> {
    let settings = "train --plain --image-size 16 --epochs 12 --batch-size 16 --learning-rate 2e-2 \
                    --checkpoint-every 2 --seed 7 --workers 2 --factors 3 --augment none";
    let mut arguments: Vec<&str> = settings.split_whitespace().collect();
    arguments.extend(["--model", model, "--data", data, "--output", output]);
    arguments
}

/// Starts the program without showing what it prints.
fn start(arguments: &[&str]) -> Child {
    let mut command = command(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().expect("the program starts")
}

/// Waits until a run has written a checkpoint of this step or a later one.
fn wait_for_step(run: &Path, step: usize, process: &mut Child) {
    let start = Instant::now();
    loop {
        let entries = fs::read_dir(run.join("checkpoints"));
        let names = entries.into_iter().flatten().flatten();
        let steps = names.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let number = name.strip_prefix("scheduler-")?.strip_suffix(".bpk")?;
            number.parse::<usize>().ok()
        });
        if steps.max().is_some_and(|newest| newest >= step) {
            return;
        }
        let ended = process.try_wait().expect("the process can be asked");
        assert!(ended.is_none(), "the run ended before step {step}");
        assert!(start.elapsed() < Duration::from_secs(120), "no step {step}");
        sleep(Duration::from_millis(2));
    }
}

/// What a run leaves, without the times in it.
fn results(run: &Path) -> Vec<Vec<u8>> {
    let file = |name| {
        let bytes = fs::read(run.join(name));
        bytes.unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    let journal = String::from_utf8(file("journal.jsonl")).unwrap();
    let entries: Vec<serde_json::Value> = journal
        .lines()
        .map(|line| {
            let mut entry: serde_json::Value = serde_json::from_str(line).unwrap();
            entry.as_object_mut().unwrap().remove("images_per_second");
            entry
        })
        .collect();
    vec![
        file("adapter/adapter_model.safetensors"),
        file("predictions.jsonl"),
        serde_json::to_vec(&entries).unwrap(),
    ]
}

#[test]
fn a_run_that_was_killed_twice_ends_with_the_bits_of_an_undisturbed_one() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("pictures");
    pictures(&data, 60);
    let model = tiny_model(folder.path());
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));

    let output = printed(&train(text(&model), text(&data), text(&whole)));
    let accuracy = output
        .lines()
        .find_map(|line| line.strip_prefix("accuracy after:"))
        .and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    assert!(accuracy.is_some_and(|accuracy| accuracy > 95.0), "{output}");

    // Within the first epoch, and within a later one.
    let mut process = start(&train(text(&model), text(&data), text(&killed)));
    wait_for_step(&killed, 4, &mut process);
    process.kill().unwrap();
    process.wait().unwrap();
    let mut process = start(&["train", "--plain", "--resume", text(&killed)]);
    wait_for_step(&killed, 31, &mut process);
    process.kill().unwrap();
    process.wait().unwrap();
    printed(&["train", "--plain", "--resume", text(&killed)]);
    assert!(results(&whole) == results(&killed), "the files differ");

    let again = printed(&["train", "--plain", "--resume", text(&killed)]);
    assert!(again.contains("is done already"), "{again}");
}

#[cfg(unix)]
#[test]
fn an_interrupt_stops_after_the_step_and_says_how_to_go_on() {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("pictures");
    pictures(&data, 20);
    let model = tiny_model(folder.path());
    let run = folder.path().join("run");
    let mut arguments = train(text(&model), text(&data), text(&run));
    arguments.extend(["--epochs", "400"]);
    arguments.retain(|argument| *argument != "12");
    let position = arguments
        .iter()
        .position(|argument| *argument == "--epochs");
    arguments.remove(position.unwrap());

    let mut command = command(&arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = command.spawn().unwrap();
    wait_for_step(&run, 4, &mut process);
    kill(Pid::from_raw(process.id() as i32), Signal::SIGINT).unwrap();
    let output = process.wait_with_output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stdout}");
    assert!(
        stdout.contains("go on with: dinov2 train --resume"),
        "{stdout}"
    );

    let settings = fs::read_to_string(run.join("settings.toml")).unwrap();
    let shorter = settings.replace("epochs = 400", "epochs = 1");
    fs::write(run.join("settings.toml"), shorter).unwrap();
    assert!(dinov2(&["train", "--resume", text(&run)]).status.success());
}

#[test]
fn a_run_is_not_overwritten_and_not_continued_with_other_images() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("pictures");
    pictures(&data, 8);
    let model = tiny_model(folder.path());
    let run = folder.path().join("run");
    let mut arguments = train(text(&model), text(&data), text(&run));
    arguments.extend(["--max-steps", "1"]);
    printed(&arguments);
    let before = results(&run);
    let line = complaint(&arguments);
    assert!(
        line.contains("--overwrite") && line.contains("--resume"),
        "{line}"
    );
    assert!(before == results(&run));
    arguments.push("--overwrite");
    printed(&arguments);

    fs::remove_file(run.join("results.json")).unwrap();
    fs::remove_file(data.join("along/003.png")).unwrap();
    let line = complaint(&["train", "--resume", text(&run)]);
    assert!(line.contains("images have changed"), "{line}");
    let line = complaint(&["train", "--resume", text(&run), "--epochs", "3"]);
    assert!(line.contains("settings of the run"), "{line}");
    let line = complaint(&["train", "--resume", text(&data)]);
    assert!(line.contains("is not the folder of a run"), "{line}");
}
