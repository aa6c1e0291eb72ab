//! What an interrupt leaves behind: nothing with the exit code 130, or everything with the exit code 0.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::files::*;

const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
/// Small files beside the weights of a model.
const OTHERS: usize = 200;

/// A folder with an adapter and models, where the tool runs.
struct Place {
    folder: tempfile::TempDir,
    /// The names in it before a command runs.
    inputs: Vec<String>,
}

/// A command that writes, with the names of its output in a reference run and in the runs that are interrupted.
struct Writer {
    command: Vec<String>,
    output: &'static str,
    reference: String,
}

impl Place {
    fn new() -> Self {
        let case = Case::open("cases/boft-mlp-bias-none");
        let folder = case.folder();
        let path = folder.path();
        let config = read_json(&case.adapter.join("adapter_config.json"));
        let tensors = read(&case.adapter.join("adapter_model.safetensors"));
        write_adapter(&path.join("adapter"), &config, &tensors);

        // As many shards as tensors, and hundreds of small files.
        let shards: Vec<Tensors> = case
            .base
            .iter()
            .map(|(key, tensor)| [(key.clone(), tensor.clone())].into())
            .collect();
        write_shards(&path.join("model"), &shards);
        fs::create_dir(path.join("model/tokenizer")).unwrap();
        for file in 0..OTHERS {
            fs::write(path.join(format!("model/tokenizer/{file}.txt")), "a b").unwrap();
        }

        let layers = 4;
        let oft = json!({
            "peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": false, "target_modules": ["fc"]
        });
        let rotations = (0..layers).map(|layer| {
            let key = format!("base_model.model.{layer}.fc.oft_R.weight");
            (key, Tensor::random(&[6, 6], layer))
        });
        write_adapter(&path.join("oft"), &oft, &rotations.collect());
        let base = (0..layers).map(|layer| {
            (
                format!("{layer}.fc.weight"),
                Tensor::random(&[8, 24], layer),
            )
        });
        write(&path.join("linear.safetensors"), &base.collect());
        let boft = "convert oft --to boft --base linear.safetensors --output boft";
        succeed(path, &boft.split(' ').collect::<Vec<_>>());

        let inputs = names(path);
        Self { folder, inputs }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Every command that writes. The reference of each is written here, without an interrupt.
    fn writers(&self) -> Vec<Writer> {
        let writers = [
            ("merge --base model --adapter adapter --output", "out"),
            (
                "merge --base base.safetensors --adapter adapter --output",
                "out.safetensors",
            ),
            ("unmerge --merged model --adapter adapter --output", "out"),
            (
                "unmerge --merged base.safetensors --adapter adapter --output",
                "out.safetensors",
            ),
            ("convert adapter --to peft --output", "out"),
            (
                "convert oft --to boft --base linear.safetensors --output",
                "out",
            ),
            ("convert boft --to oft --output", "out"),
            ("convert adapter --to record --output", "out.bpk"),
            (
                "convert adapter --to-lora 2 --base base.safetensors --output",
                "out",
            ),
            ("inspect adapter --plot", "out.svg"),
        ];
        let writers = writers
            .into_iter()
            .enumerate()
            .map(|(index, (line, output))| {
                let command: Vec<String> = line.split(' ').map(str::to_string).collect();
                let folder = format!("reference-{index}");
                fs::create_dir(self.path().join(&folder)).unwrap();
                let reference = format!("{folder}/{output}");
                let mut arguments: Vec<&str> = command.iter().map(String::as_str).collect();
                arguments.push(&reference);
                succeed(self.path(), &arguments);
                Writer {
                    command,
                    output,
                    reference,
                }
            });
        writers.collect()
    }

    /// Starts a command that writes.
    fn start(&self, writer: &Writer) -> Child {
        Command::new(env!("CARGO_BIN_EXE_burn-boft"))
            .args(&writer.command)
            .arg(writer.output)
            .current_dir(self.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// The temporary folder or file of a command that writes, once it is there.
    fn temporary(&self) -> Option<PathBuf> {
        let entries = fs::read_dir(self.path()).unwrap();
        entries
            .map(|entry| entry.unwrap())
            .find(|entry| {
                entry
                    .file_name()
                    .to_string_lossy()
                    .starts_with(".burn-boft-")
            })
            .map(|entry| entry.path())
    }

    /// Waits for the end of a command that was interrupted; whether its output is there. Whatever is there is
    /// complete, and nothing else is.
    fn check(&self, writer: &Writer, mut child: Child, what: &str) -> bool {
        let what = format!("{:?}, interrupted {what}", writer.command);
        let code = child.wait().unwrap().code();
        let output = self.path().join(writer.output);
        let is_there = output.exists();
        // None: the signal came before the tool could handle it.
        let expected = if is_there {
            &[Some(0)][..]
        } else {
            &[Some(130), None]
        };
        assert!(
            expected.contains(&code),
            "{what}: {code:?}, output there: {is_there}"
        );
        if is_there {
            let reference = self.path().join(&writer.reference);
            assert!(
                contents(&output) == contents(&reference),
                "{what}: the output is incomplete"
            );
            match output.is_dir() {
                true => fs::remove_dir_all(&output).unwrap(),
                false => fs::remove_file(&output).unwrap(),
            }
        }
        let mut left = names(self.path());
        left.retain(|name| !name.starts_with("reference-"));
        assert_eq!(left, self.inputs, "{what}");
        is_there
    }
}

/// Sends a signal; a program that has ended takes none.
fn send(child: &Child, signal: Signal) {
    _ = kill(Pid::from_raw(child.id().try_into().unwrap()), signal);
}

/// The bytes of a file, or of all files in a folder by their paths in it.
fn contents(path: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    fn walk(path: &Path, top: &Path, found: &mut Vec<(PathBuf, Vec<u8>)>) {
        if !path.is_dir() {
            let name = path.strip_prefix(top).unwrap().to_path_buf();
            return found.push((name, fs::read(path).unwrap()));
        }
        for name in names(path) {
            walk(&path.join(name), top, found);
        }
    }
    let mut found = Vec::new();
    walk(path, path, &mut found);
    found
}

/// How many files a folder has, those of its folders included; none where it went away.
fn count(folder: &Path) -> Option<usize> {
    let mut files = 0;
    for entry in fs::read_dir(folder).ok()? {
        let path = entry.ok()?.path();
        files += if path.is_dir() { count(&path)? } else { 1 };
    }
    Some(files)
}

#[test]
fn a_folder_that_is_interrupted_while_its_last_files_are_written_is_complete_or_not_there() {
    let place = Place::new();
    for writer in place
        .writers()
        .iter()
        .filter(|writer| writer.command.contains(&"model".into()))
    {
        let files = count(&place.path().join(&writer.reference)).unwrap();
        let mut complete = 0;
        for round in 0..24 {
            // From the last file on, then further and further before it.
            let (signal, awaited) = (SIGNALS[round % 3], files - (round / 3) * 5);
            let child = place.start(writer);
            let start = Instant::now();
            // The files appear, or the folder has its name already.
            while !place.path().join(writer.output).exists()
                && place
                    .temporary()
                    .is_none_or(|folder| count(&folder) < Some(awaited))
            {
                assert!(
                    start.elapsed() < Duration::from_secs(60),
                    "no file appeared"
                );
                std::thread::yield_now();
            }
            for _ in 0..5 {
                send(&child, signal);
            }
            let what = format!("by {signal} at file {awaited} of {files}");
            complete += usize::from(place.check(writer, child, &what));
        }
        assert!(
            complete < 24,
            "{:?}: every interrupt came too late",
            writer.command
        );
    }
}

#[test]
fn a_command_that_is_interrupted_at_any_time_leaves_its_whole_output_or_nothing() {
    let place = Place::new();
    for writer in place.writers() {
        let child = place.start(&writer);
        let start = Instant::now();
        assert!(place.check(&writer, child, "not at all"));
        let takes = start.elapsed();
        for round in 0..16 {
            let signal = SIGNALS[round % 3];
            let child = place.start(&writer);
            let start = Instant::now();
            // At even distances over the time that the command takes, and once its temporary output is there.
            let at = takes * u32::try_from(round).unwrap() / 12;
            while start.elapsed() < at && !(round % 2 == 1 && place.temporary().is_some()) {
                std::thread::yield_now();
            }
            send(&child, signal);
            place.check(&writer, child, &format!("by {signal} after {at:?}"));
        }
    }
}

#[test]
fn an_interrupt_after_the_output_has_its_name_changes_nothing() {
    let place = Place::new();
    for writer in place.writers() {
        for signal in SIGNALS {
            let child = place.start(&writer);
            while !place.path().join(writer.output).exists() {
                std::thread::yield_now();
            }
            send(&child, signal);
            let what = format!("by {signal} after the output has its name");
            assert!(place.check(&writer, child, &what));
        }
    }
}

/// The output stays, since it is complete, and the exit code says that the rest is not.
#[test]
fn a_comparison_with_the_base_ends_at_an_interrupt() {
    let place = Place::new();
    let base = [("0.fc.weight".to_string(), Tensor::random(&[100_000, 24], 5))];
    write(&place.path().join("base.safetensors"), &base.into());
    let rotation = [(
        "base_model.model.0.fc.oft_R.weight".to_string(),
        Tensor::random(&[6, 6], 3),
    )];
    let config = read_json(&place.path().join("oft/adapter_config.json"));
    write_adapter(&place.path().join("one"), &config, &rotation.into());
    let output = place.path().join("out.safetensors");
    // A comparison may be over before the signal comes, but hardly ever.
    let was_interrupted = (0..20).any(|_| {
        let command = "unmerge --merged base.safetensors --adapter one --base base.safetensors --output out.safetensors";
        let child = Command::new(env!("CARGO_BIN_EXE_burn-boft"))
            .args(command.split(' '))
            .current_dir(place.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while !output.exists() {
            std::thread::yield_now();
        }
        send(&child, Signal::SIGINT);
        let ended = child.wait_with_output().unwrap();
        assert_eq!(read(&output).len(), 1);
        fs::remove_file(&output).unwrap();
        let text = String::from_utf8(ended.stderr).unwrap();
        match ended.status.code() {
            Some(130) => {
                assert_eq!(
                    text,
                    "error: interrupted: out.safetensors is complete, and was not compared with base.safetensors\n"
                );
                true
            }
            code => {
                assert_eq!((code, text.as_str()), (Some(0), ""));
                false
            }
        }
    });
    assert!(was_interrupted);
}

#[test]
fn a_large_file_that_is_interrupted_leaves_nothing_behind() {
    let place = Place::new();
    let model = place.path().join("model");
    // Zeros that take no room on the disk, and a while to copy.
    const BYTES: u64 = 8 << 30;
    let (key, shard) = ("large", "model-large.safetensors");
    let header = json!({key: {"dtype": "U8", "shape": [BYTES], "data_offsets": [0, BYTES]}});
    let header = header.to_string();
    let start = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    fs::write(model.join(shard), &start).unwrap();
    let file = fs::File::options().write(true).open(model.join(shard));
    file.unwrap().set_len(start.len() as u64 + BYTES).unwrap();
    let path = model.join("model.safetensors.index.json");
    let mut index = read_json(&path);
    index["weight_map"][key] = json!(shard);
    write_json(&path, &index);

    let command = "merge --base model --adapter adapter --output";
    let writer = Writer {
        command: command.split(' ').map(str::to_string).collect(),
        output: "out",
        reference: String::new(),
    };
    for signal in SIGNALS {
        let child = place.start(&writer);
        while !place
            .temporary()
            .is_some_and(|folder| folder.join(shard).exists())
        {
            std::thread::yield_now();
        }
        send(&child, signal);
        assert!(!place.check(&writer, child, &format!("by {signal}")));
    }
}
