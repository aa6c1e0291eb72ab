//! The program of the example, as its README shows it.

use std::process::Command;

#[test]
fn the_program_adapts_saves_and_merges() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_burn-boft-onnx-example"))
        .env("TMPDIR", folder.path())
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}\n{complaints}");

    let accuracies = |name: &str| -> Vec<f64> {
        let line = printed.lines().find_map(|line| line.strip_prefix(name));
        let line = line.unwrap_or_else(|| panic!("no line says `{name}`:\n{printed}"));
        let words = line.split_whitespace();
        words
            .filter_map(|word| word.strip_suffix('%')?.parse().ok())
            .collect()
    };
    let (imported, adapted) = (accuracies("as imported "), accuracies("adapted  "));
    assert!(imported[0] > 90.0 && imported[1] < 30.0, "{printed}");
    assert!(adapted[1] > 85.0, "{printed}");
    assert_eq!(accuracies("adapted, adapter taken off "), imported);
    for difference in ["reloaded model differs by ", "merged model differs by "] {
        assert!(printed.contains(difference), "{printed}");
    }
}
