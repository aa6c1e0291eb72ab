//! Saves that are interrupted or refused leave the adapter that was there.

use std::collections::BTreeSet;
use std::fs;

use burn_boft::peft::SaveOptions;
use burn_boft::{Adapter, AdapterConfig, BoftLinear, Cayley, Init, KeyMap, OftConfig, inject};

use super::support::*;

const SAVES_INTO: &str = "BURN_BOFT_SAVES_INTO";

/// Two adapters that differ in settings and numbers, and not in shapes.
fn two_adapters() -> [Adapter; 2] {
    [Cayley::Neumann { terms: 4 }, Cayley::Neumann { terms: 6 }].map(|cayley| {
        let Cayley::Neumann { terms } = cayley else {
            unreachable!()
        };
        let config = OftConfig::new()
            .with_block_size(4)
            .with_cayley(cayley)
            .with_init(Init::Random { seed: terms as u64 })
            .with_target_modules(["hidden"]);
        let model = inject(base::<BoftLinear>(), &config).unwrap();
        Adapter::extract_as(&model, &config).unwrap()
    })
}

/// The process that [`a_killed_save_leaves_one_adapter`] kills. By itself it does nothing.
#[test]
fn saves_until_it_is_killed() {
    let Ok(folder) = std::env::var(SAVES_INTO) else {
        return;
    };
    let adapters = two_adapters();
    loop {
        adapters
            .iter()
            .for_each(|adapter| adapter.save(&folder).unwrap());
    }
}

#[test]
fn a_killed_save_leaves_one_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let adapters = two_adapters();
    adapters[0].save(folder.path()).unwrap();
    let mut seen = BTreeSet::new();
    for round in 0..20 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crashes::saves_until_it_is_killed"])
            .env(SAVES_INTO, folder.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(60 + 7 * round));
        // Readers find one adapter while it is being replaced, too.
        for _ in 0..20 {
            let (loaded, _) = Adapter::load(folder.path()).unwrap();
            assert!(adapters.iter().any(|adapter| is_same(&loaded, adapter)));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let (loaded, _) = Adapter::load(folder.path()).unwrap();
        let which = adapters
            .iter()
            .position(|adapter| is_same(&loaded, adapter));
        seen.insert(which.expect("settings of one adapter and numbers of the other"));
    }
    assert_eq!(seen.len(), 2, "no save was ever finished");
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
