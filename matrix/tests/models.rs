//! Every model with both methods, and the table of the README against what they say.

use burn_boft_matrix::{Method, Row, entries};

fn run(name: &str, method: Method) -> Row {
    let entry = entries().into_iter().find(|entry| entry.name == name);
    let entry = entry.unwrap_or_else(|| panic!("no entry is called {name}"));
    match (entry.run)(method) {
        Ok(row) => row,
        Err(failure) => panic!("{name} with {method:?}: {failure}"),
    }
}

/// Checks a model with both methods, and that the README says what it is and that it passes.
fn passes_as_the_readme_says(name: &str) {
    for method in [Method::Boft, Method::Oft] {
        let facts = run(name, method).facts();
        let line = include_str!("../README.md")
            .lines()
            .find(|line| line.starts_with(&facts));
        let line = line.unwrap_or_else(|| panic!("the README's table lacks {facts}"));
        assert!(line.ends_with("| passes |"), "{line}");
    }
}

macro_rules! models {
    ($($(#[$attribute:meta])* $test:ident: $name:literal,)+) => {
        $($(#[$attribute])* #[test] fn $test() { passes_as_the_readme_says($name); })+

        #[test]
        fn every_entry_has_a_test() {
            let names = [$($(#[$attribute])* $name,)+];
            let entries: Vec<_> = entries().iter().map(|entry| entry.name).collect();
            assert_eq!(entries, names);
        }
    };
}

models! {
    swin_v2: "SwinV2",
    resnet: "ResNet",
    resnet_with_bottlenecks: "ResNet, bottlenecks",
    whisper: "Whisper",
    qwen3: "Qwen3",
    qwen3_asr: "Qwen3-ASR",
    nanochat: "nanochat GPT",
    parakeet_tdt: "Parakeet TDT",
    nemotron_sortformer: "Nemotron Sortformer",
    silero_vad: "Silero VAD",
    #[cfg(feature = "llama")]
    llama_3: "Llama 3",
}
