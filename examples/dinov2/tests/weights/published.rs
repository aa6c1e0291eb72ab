//! Published models by name.

use std::fs;
use std::path::Path;

use dinov2::weights::Checkpoint;

use crate::common::*;

/// Opens the model that `DINOV2_OPEN` names, in a process whose environment a test has set.
#[test]
#[ignore = "called by other tests"]
fn opens_what_the_environment_names() {
    let name = std::env::var("DINOV2_OPEN").expect("a test calls this");
    match Checkpoint::open(&name) {
        Ok(checkpoint) => println!("opened {} of {:?}", checkpoint.name(), checkpoint.labels()),
        Err(error) => println!("error: {error}"),
    }
}

/// What opening a published model prints, with this folder of Hugging Face and without a network.
fn opened_offline(home: &Path) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "published::opens_what_the_environment_names",
            "--ignored",
            "--nocapture",
        ])
        .env("DINOV2_OPEN", "facebook/dinov2-small")
        .env("HF_HOME", home)
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .env_remove("HF_HUB_CACHE")
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_name_without_a_network_is_one_clear_line() {
    let home = tempfile::tempdir().unwrap();
    let output = opened_offline(home.path());
    let line = output
        .lines()
        .find_map(|line| line.split_once("error: "))
        .unwrap()
        .1;
    let cache = home.path().join("hub");
    let start = format!(
        "facebook/dinov2-small is no folder and not complete in the cache ({}), and http://127.0.0.1:9 cannot be reached: ",
        cache.display()
    );
    assert!(line.starts_with(&start), "{output}");
    assert!(
        line.ends_with("; give a folder, or try again online"),
        "{output}"
    );
}

#[test]
fn a_name_in_the_cache_needs_no_network() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("hub/models--facebook--dinov2-small");
    let (refs, snapshot) = (model.join("refs"), model.join("snapshots/0123abc"));
    fs::create_dir_all(&refs).unwrap();
    fs::write(refs.join("main"), "0123abc").unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture("mlp").join(file), snapshot.join(file)).unwrap();
    }
    let output = opened_offline(home.path());
    assert!(
        output.contains(&format!(
            "opened facebook/dinov2-small of {:?}",
            Some(LABELS)
        )),
        "{output}"
    );
}
