//! Where a result may be written, and what happens when it cannot be.

use std::fs;

use crate::files::*;

#[test]
fn an_output_that_exists_or_lies_inside_an_input_is_refused() {
    let place = MergeFolder::new();
    let model = place.path().join("model");
    fs::create_dir(&model).unwrap();
    write(&model.join("model.safetensors"), &place.base);
    let merge = |base: &str, output: &str| {
        let before = [names(place.path()), names(&model)];
        let line = refused(place.path(), &merge_command(base, "adapter", output));
        assert_eq!([names(place.path()), names(&model)], before);
        line
    };
    assert_eq!(
        merge("base.safetensors", "base.safetensors"),
        "base.safetensors exists already; name a file that does not exist yet"
    );
    assert_eq!(
        merge("model", "model"),
        "model exists already; name a folder that does not exist yet"
    );
    let inside = fs::canonicalize(&model).unwrap();
    assert_eq!(
        merge("model", "model/merged"),
        format!(
            "model/merged is inside {}, which is one of the inputs",
            inside.display()
        )
    );
    let adapter = fs::canonicalize(place.path().join("adapter")).unwrap();
    assert_eq!(
        merge("model", "adapter/merged"),
        format!(
            "adapter/merged is inside {}, which is one of the inputs",
            adapter.display()
        )
    );
    assert_eq!(
        merge("model", "out.safetensors"),
        "out.safetensors is the name of a file, and model is a folder; name a folder"
    );
    assert_eq!(
        merge("base.safetensors", "none/out.safetensors"),
        "none/out.safetensors cannot be written into none, which is not a folder"
    );
    assert_eq!(
        merge("base.safetensors", "base.safetensors/out"),
        "base.safetensors/out cannot be written into base.safetensors, which is not a folder"
    );
    let folder = "is the name of a folder; name a file";
    assert_eq!(merge("base.safetensors", "out/"), format!("out/ {folder}"));
    let there = "/dev/null exists already; name a folder that does not exist yet";
    assert_eq!(merge("model", "/dev/null"), there);
    let other = |arguments: &[&str]| refused(place.path(), arguments);
    let convert = |to: &str, output: &str| other(&convert_command("adapter", to, output));
    assert_eq!(convert("peft", "/dev/null"), there);
    assert_eq!(convert("record", "out/"), format!("out/ {folder}"));
    assert_eq!(
        other(&["inspect", "adapter", "--plot", "out/"]),
        format!("out/ {folder}")
    );
}

/// The number and the words of the error are those of Linux.
#[cfg(target_os = "linux")]
#[test]
fn a_file_that_cannot_be_copied_is_reported_before_the_weights_are_written() {
    let place = MergeFolder::new();
    let model = place.path().join("model");
    fs::create_dir(&model).unwrap();
    // Writing these weights would be refused, too.
    let mut base = place.base.clone();
    base.get_mut("fc1.weight").unwrap().numbers[0] = f64::NAN;
    write(&model.join("model.safetensors"), &base);
    std::os::unix::fs::symlink("vocabulary.txt", model.join("vocabulary.txt")).unwrap();
    assert_eq!(
        place.refused_with(&["--base", "model", "--output", "out"]),
        "model/vocabulary.txt cannot be read: Too many levels of symbolic links (os error 40)"
    );
}

/// A result that cannot be written is no fault of the input: the exit code is 1.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let place = MergeFolder::new();
    let full = merge_command("base.safetensors", "adapter", "/dev/full");
    let run = self::run(place.path(), &full);
    assert_eq!(
        (run.code, run.stderr.as_str()),
        (
            1,
            "error: /dev/full cannot be written: No space left on device (os error 28)\n"
        )
    );

    // No file can be made here, by anyone.
    let merge = [
        "merge",
        "--base",
        "base.safetensors",
        "--adapter",
        "adapter",
    ];
    let run = self::run(
        place.path(),
        &[&merge[..], &["--output", "/proc/out"]].concat(),
    );
    assert_eq!(
        (run.code, run.stderr.as_str()),
        (1, "error: /proc/out cannot be written: entity not found\n")
    );

    let model = place.path().join("model");
    fs::create_dir(&model).unwrap();
    write(&model.join("model.safetensors"), &place.base);
    fs::write(model.join("config.json"), "{}").unwrap();
    let oft = Case::open("cases/oft-linear-exact-b4");
    write(&place.path().join("linear.safetensors"), &oft.base);
    let kept = names(place.path());
    let fit = "--base base.safetensors";
    for (command, file) in [
        (
            format!("merge {fit} --adapter adapter --output out.safetensors"),
            "out.safetensors",
        ),
        (
            "merge --base model --adapter adapter --output out".into(),
            "out/model.safetensors",
        ),
        (
            "unmerge --merged model --adapter adapter --output out".into(),
            "out/model.safetensors",
        ),
        (
            "convert adapter --to peft --output out".into(),
            "out/adapter_model.safetensors",
        ),
        (
            "convert adapter --to record --output out.bpk".into(),
            "out.bpk",
        ),
        (
            format!("convert adapter --to-lora 2 {fit} --output out"),
            "out/adapter_model.safetensors",
        ),
        (
            format!(
                "convert {} --to boft --base linear.safetensors --output out",
                oft.adapter()
            ),
            "out/adapter_model.safetensors",
        ),
        ("inspect adapter --plot out.svg".into(), "out.svg"),
    ] {
        // A limit on the size of files stands for the disk: the signal that goes with it is ignored.
        let script = format!("trap '' XFSZ; ulimit -f 0; exec \"$0\" {command}");
        let run = std::process::Command::new("bash")
            .args(["-c", &script, env!("CARGO_BIN_EXE_burn-boft")])
            .current_dir(place.path())
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8(run.stderr).unwrap(),
            format!("error: {file} cannot be written: File too large (os error 27)\n"),
            "{command}"
        );
        assert_eq!(run.status.code(), Some(1), "{command}");
        assert_eq!(names(place.path()), kept, "{command}");
    }
}

#[cfg(unix)]
#[test]
fn what_a_killed_run_left_is_named_and_removed_on_demand() {
    let place = MergeFolder::new();
    let path = place.path();
    fs::create_dir(path.join(".burn-boft-dead")).unwrap();
    fs::write(path.join(".burn-boft-dead/model.safetensors"), "half").unwrap();
    fs::write(path.join(".burn-boft-file"), "half").unwrap();
    // Another run is at work on this one.
    fs::write(path.join(".burn-boft-live"), "half").unwrap();
    let live = fs::File::open(path.join(".burn-boft-live")).unwrap();
    live.lock().unwrap();
    let merge = |output: &str, more: &[&str]| {
        let arguments = merge_command("base.safetensors", "adapter", output);
        let run = run(path, &[&arguments[..], more].concat());
        assert_eq!(run.code, 0, "{}", run.stderr);
        run.stderr
    };
    assert_eq!(
        merge("a.safetensors", &[]),
        "note: ./.burn-boft-dead was left by a run that was killed; --clean removes it\n\
         note: ./.burn-boft-file was left by a run that was killed; --clean removes it\n"
    );
    assert_eq!(
        merge("b.safetensors", &["--clean"]),
        "note: removed ./.burn-boft-dead, which a run that was killed had left\n\
         note: removed ./.burn-boft-file, which a run that was killed had left\n"
    );
    assert_eq!(merge("c.safetensors", &[]), "");
    assert_eq!(
        names(path),
        [
            ".burn-boft-live",
            "a.safetensors",
            "adapter",
            "b.safetensors",
            "base.safetensors",
            "c.safetensors"
        ]
    );
}

/// 1.8e19 bytes are more than any disk has, and a number that the tool must not make smaller.
#[test]
fn a_total_that_is_too_large_to_correct_stays_as_it_is() {
    let case = Case::open("cases/boft-mlp-bias-all-saved");
    let folder = tempfile::tempdir().unwrap();
    let index = "model.safetensors.index.json";
    write_sharded(&case, &folder.path().join("base"));
    // A head of other sizes changes the total.
    let base = folder.path().join("base");
    let mut second = read(&base.join("model-00001-of-00002.safetensors"));
    second.insert("classifier.weight".into(), Tensor::random(&[2, 16], 1));
    second.insert("classifier.bias".into(), Tensor::random(&[2], 2));
    write(&base.join("model-00001-of-00002.safetensors"), &second);
    for (total, expected) in [
        (serde_json::json!(u64::MAX), serde_json::json!(u64::MAX)),
        (serde_json::json!(1e25), serde_json::json!(1e25)),
        (serde_json::json!(-3), serde_json::json!(-3)),
        (
            serde_json::json!(1.8e19),
            serde_json::json!(18_000_000_000_000_000_204u64),
        ),
    ] {
        let mut json = read_json(&base.join(index));
        json["metadata"]["total_size"] = total.clone();
        write_json(&base.join(index), &json);
        succeed(
            folder.path(),
            &merge_command("base", case.adapter(), "merged"),
        );
        let found = read_json(&folder.path().join("merged").join(index));
        assert_eq!(found["metadata"]["total_size"], expected, "{total}");
        fs::remove_dir_all(folder.path().join("merged")).unwrap();
    }
}
