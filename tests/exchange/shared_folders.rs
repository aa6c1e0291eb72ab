//! One folder, many writers: a reader gets one adapter or another, never the settings of one with the numbers of another.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::{env, fs, thread};

use burn::tensor::TensorData;
use burn_boft::value::AdapterLayer;
use burn_boft::{Adapter, AdapterConfig, Cayley, LayerKind, OftConfig};

/// The folder that a child process writes into, and which adapters it writes how often.
const FOLDER: &str = "BURN_BOFT_WRITER_FOLDER";
const ADAPTERS: &str = "BURN_BOFT_WRITER_ADAPTERS";
const SAVES: &str = "BURN_BOFT_WRITER_SAVES";

/// An adapter whose settings and numbers both say which one it is, and whose shapes do not.
fn adapter(number: usize) -> Adapter {
    let config = OftConfig::new()
        .with_block_size(4)
        .with_cayley(Cayley::Neumann { terms: number + 2 })
        .with_target_modules(["hidden"]);
    let skew = TensorData::new(vec![number as f32; 6 * 64], [1, 64, 6]);
    let layer = AdapterLayer::new("hidden", Some(LayerKind::Linear), skew, None).unwrap();
    Adapter::from_parts(config, vec![layer], Vec::new()).unwrap()
}

/// Which adapter this is, by its settings and by its numbers.
fn numbers(adapter: &Adapter) -> (usize, usize) {
    let AdapterConfig::Oft(config) = adapter.config() else {
        panic!("{:?}", adapter.config());
    };
    let Cayley::Neumann { terms } = config.cayley else {
        panic!("{config:?}");
    };
    let skew = adapter.layers()[0].skew().try_to_vec::<f32>().unwrap();
    let number = skew[0];
    assert!(skew.iter().all(|other| *other == number), "a torn tensor");
    (terms - 2, number as usize)
}

/// Loads, and checks that settings and numbers belong together.
fn load(folder: &Path) -> usize {
    let (loaded, _) = Adapter::load(folder).unwrap();
    let (by_settings, by_numbers) = numbers(&loaded);
    assert_eq!(by_settings, by_numbers, "a mixture of two adapters");
    by_settings
}

/// A process that saves these adapters in turn.
fn writer(folder: &Path, adapters: &str, saves: usize) -> Child {
    Command::new(env::current_exe().unwrap())
        .args([
            "--exact",
            "shared_folders::writes_adapters_when_told_to",
            "--nocapture",
        ])
        .env(FOLDER, folder)
        .env(ADAPTERS, adapters)
        .env(SAVES, saves.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The process that [`writer`] starts. By itself it does nothing.
#[test]
fn writes_adapters_when_told_to() {
    let Ok(folder) = env::var(FOLDER) else {
        return;
    };
    let numbers = env::var(ADAPTERS).unwrap();
    let adapters: Vec<_> = numbers
        .split(',')
        .map(|number| adapter(number.parse().unwrap()))
        .collect();
    let saves = env::var(SAVES).unwrap().parse().unwrap();
    for adapter in adapters.iter().cycle().take(saves) {
        adapter.save(&folder).unwrap();
        println!("saved");
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Runs these writers while threads read, and returns how often each adapter was loaded.
fn read_while(folder: &Path, writers: Vec<Child>) -> [usize; 8] {
    const READERS: usize = 3;
    let done = AtomicBool::new(false);
    let mut loads = [0; 8];
    thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS)
            .map(|_| {
                scope.spawn(|| {
                    let mut loads = [0; 8];
                    while !done.load(Ordering::Relaxed) {
                        loads[load(folder)] += 1;
                    }
                    loads
                })
            })
            .collect();
        let succeeded = writers
            .into_iter()
            .map(|writer| writer.wait_with_output().unwrap().status.success());
        let succeeded: Vec<_> = succeeded.collect();
        done.store(true, Ordering::Relaxed);
        assert!(
            succeeded.iter().all(|succeeded| *succeeded),
            "a save failed"
        );
        for reader in readers {
            let found = reader.join().expect("a reader found one adapter each time");
            loads
                .iter_mut()
                .zip(found)
                .for_each(|(all, own)| *all += own);
        }
    });
    loads
}

#[test]
fn readers_never_find_a_mixture_while_one_process_alternates_two_adapters() {
    let folder = tempfile::tempdir().unwrap();
    adapter(0).save(folder.path()).unwrap();
    let loads = read_while(folder.path(), vec![writer(folder.path(), "0,1", 500)]);
    assert!(loads[0] > 0 && loads[1] > 0, "{loads:?}");
    assert_eq!(
        names(folder.path()),
        ["adapter_config.json", "adapter_model.safetensors"]
    );
}

#[test]
fn readers_never_find_a_mixture_while_three_processes_save_different_adapters() {
    let folder = tempfile::tempdir().unwrap();
    adapter(0).save(folder.path()).unwrap();
    let writers = ["1", "2", "3,4"].map(|numbers| writer(folder.path(), numbers, 150));
    let loads = read_while(folder.path(), writers.into());
    assert!(loads[1..5].iter().all(|loads| *loads > 0), "{loads:?}");
    assert_eq!(
        names(folder.path()),
        ["adapter_config.json", "adapter_model.safetensors"]
    );
}

#[test]
fn threads_of_one_process_take_turns_at_saving() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    thread::scope(|scope| {
        for number in 0..4 {
            scope.spawn(move || {
                let adapter = adapter(number);
                for _ in 0..50 {
                    adapter.save(path).unwrap();
                    load(path);
                }
            });
        }
    });
    load(path);
    assert_eq!(
        names(path),
        ["adapter_config.json", "adapter_model.safetensors"]
    );
}

#[test]
fn writers_that_are_killed_leave_one_adapter_and_nothing_that_stops_the_next_save() {
    let folder = tempfile::tempdir().unwrap();
    adapter(0).save(folder.path()).unwrap();
    for round in 0..12 {
        let mut writers = ["1,2", "3,4"].map(|numbers| writer(folder.path(), numbers, usize::MAX));
        // Killed after some saves, in the midst of another.
        for writer in &mut writers {
            let output = BufReader::new(writer.stdout.as_mut().unwrap());
            let saves = output.lines().map(Result::unwrap);
            let saves = saves.filter(|line| line.contains("saved"));
            assert_eq!(saves.take(2 + round).count(), 2 + round);
        }
        for writer in &mut writers {
            writer.kill().unwrap();
            load(folder.path());
            writer.wait().unwrap();
        }
        load(folder.path());
    }
    adapter(5).save(folder.path()).unwrap();
    assert_eq!(load(folder.path()), 5);
    assert_eq!(
        names(folder.path()),
        ["adapter_config.json", "adapter_model.safetensors"]
    );
}
