//! Saves that are interrupted or refused leave the adapter that was there.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use burn_boft::peft::SaveOptions;
use burn_boft::{Adapter, AdapterConfig, BoftLinear, Cayley, Init, KeyMap, OftConfig, inject};

use super::support::*;

/// Set in the process that [`a_save_that_is_killed_leaves_the_old_or_the_new_adapter`] kills.
const SAVES_INTO: &str = "BURN_BOFT_SAVES_INTO";
const SAVING: &str = "saving";
const SAVED: &str = "saved";
const ROUNDS: usize = 20;

/// Two adapters that have the same shapes but different settings and numbers.
fn two_adapters() -> [Adapter; 2] {
    [4, 6].map(|terms| {
        let config = OftConfig::new()
            .with_block_size(4)
            .with_cayley(Cayley::Neumann { terms })
            .with_init(Init::Random { seed: terms as u64 })
            .with_target_modules(["hidden"]);
        let model = inject(base::<BoftLinear>(), &config).unwrap();
        Adapter::extract_as(&model, &config).unwrap()
    })
}

/// Saves the two adapters in turn, and says on stderr when a save begins and when it is done.
fn save_until_killed(folder: &Path) -> ! {
    let adapters = two_adapters();
    loop {
        for adapter in &adapters {
            eprintln!("{SAVING}");
            adapter.save(folder).unwrap();
            eprintln!("{SAVED}");
        }
    }
}

/// Starts the test below in a process of its own, which saves until it is killed; returns the lines that it prints.
fn saving_process(folder: &Path) -> (Child, Lines<BufReader<ChildStderr>>) {
    let name = "crashes::a_save_that_is_killed_leaves_the_old_or_the_new_adapter";
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(SAVES_INTO, folder)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines();
    (child, lines)
}

#[test]
fn a_save_that_is_killed_leaves_the_old_or_the_new_adapter() {
    if let Some(folder) = std::env::var_os(SAVES_INTO) {
        save_until_killed(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let adapters = two_adapters();
    adapters[0].save(folder.path()).unwrap();
    let which = || {
        let (loaded, _) = Adapter::load(folder.path()).unwrap();
        let which = adapters
            .iter()
            .position(|adapter| is_same(&loaded, adapter));
        which.expect("settings of one adapter and numbers of the other")
    };
    let (mut left, mut interrupted) = (BTreeSet::new(), 0);
    for round in 0..ROUNDS {
        let (mut child, mut lines) = saving_process(folder.path());
        // The number of finished saves grows by one each round, so that the old adapter is each of the two in turn.
        let begun = lines
            .by_ref()
            .map(Result::unwrap)
            .filter(|line| line == SAVING)
            .nth(1 + round);
        assert!(begun.is_some(), "the saving process stopped by itself");
        // Every other round kills at once; the rounds between also read while the files are being replaced.
        for _ in 0..round % 2 * round {
            which();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let last = lines.map(Result::unwrap).last();
        interrupted += usize::from(last.is_none_or(|line| line == SAVING));
        left.insert(which());
    }
    assert!(interrupted > 0, "every save was finished before its kill");
    assert_eq!(left.len(), 2, "no save was ever finished");
}

fn is_same(loaded: &Adapter, saved: &Adapter) -> bool {
    let cayley = |adapter: &Adapter| match adapter.config() {
        AdapterConfig::Oft(config) => config.cayley,
        other => panic!("{other:?}"),
    };
    cayley(loaded) == cayley(saved) && loaded.layers()[0].skew() == saved.layers()[0].skew()
}

#[test]
fn a_refused_save_leaves_the_adapter_as_it_was() {
    let folder = saved(&Adapter::extract_as(&adapted::<BoftLinear>(boft()), boft()).unwrap());
    let before = [CONFIG, TENSORS].map(|file| fs::read(folder.path().join(file)).unwrap());
    let model = adapted::<BoftLinear>(boft());
    let names = KeyMap::new().with_to_file("^hidden$", "up").unwrap();
    let right = Adapter::extract_as(&model, boft()).unwrap();
    let options = SaveOptions::new().with_key_map(names);
    assert!(right.save_with(folder.path(), &options).is_err());
    let after = [CONFIG, TENSORS].map(|file| fs::read(folder.path().join(file)).unwrap());
    assert_eq!(before, after);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}
