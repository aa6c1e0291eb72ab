//! `inspect`.

use std::fs;

use crate::files::*;

#[test]
fn a_table_says_what_an_adapter_is() {
    let case = Case::open("cases/boft-stack-layers");
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(
        succeed(folder.path(), &["inspect", case.adapter()]),
        "\
method        BOFT
targets       fc1, fc2
base model    -
PEFT          0.21.2
layers        4
parameters    280 stored, 112 effective
saved beside  0 tensors

layer                 kind    block  blocks  factors     stored  effective      ‖Q‖₂     defect  angle/rad  scale
encoder.layers.0.fc1  linear      2       6        2         64         28    0.3689    1.79e-7     0.7069  0.7916 to 1.4126
encoder.layers.0.fc2  linear      2       8        2         76         28    0.4837    1.79e-7     0.9011  0.5592 to 1.2307
encoder.layers.2.fc1  linear      2       6        2         64         28    0.5961    1.19e-7     1.0751  0.6803 to 1.3174
encoder.layers.2.fc2  linear      2       8        2         76         28    0.6476    1.19e-7     1.1494  0.7663 to 1.5061
"
    );
}

#[test]
fn json_holds_the_same_with_all_digits() {
    for case in Case::all() {
        let folder = tempfile::tempdir().unwrap();
        let json: serde_json::Value = serde_json::from_str(&succeed(
            folder.path(),
            &["inspect", case.adapter(), "--json"],
        ))
        .unwrap();
        let layers = json["layers"].as_array().unwrap();
        assert!(!layers.is_empty(), "{}", case.name);
        let stored: u64 = layers
            .iter()
            .map(|layer| layer["stored"].as_u64().unwrap())
            .sum();
        assert_eq!(json["stored"], stored, "{}", case.name);
        // What the file holds for its layers, permutations left out.
        let file = read(&case.adapter.join("adapter_model.safetensors"));
        let is_adapter = |key: &str| {
            ["boft_R", "boft_s", "oft_R.weight", "oft_r", "oft_s"]
                .iter()
                .any(|end| key.ends_with(end))
        };
        let numbers: usize = file
            .iter()
            .filter(|(key, _)| is_adapter(key))
            .map(|(_, tensor)| tensor.numbers.len())
            .sum();
        assert_eq!(stored, numbers as u64, "{}", case.name);
        let exact = !json["method"].as_str().unwrap().contains("Neumann");
        for layer in layers {
            let [norm, defect, angle] = ["skew_norm", "orthogonality_defect", "largest_angle"]
                .map(|name| layer[name].as_f64().unwrap());
            if exact {
                assert!(defect < 1e-6, "{}: {defect}", case.name);
                assert!((angle - 2.0 * norm.atan()).abs() < 1e-12, "{}", case.name);
            }
            assert_eq!(norm > 0.0, layer["block_size"] != 1, "{}", case.name);
        }
    }
}

#[test]
fn a_picture_has_a_bar_for_each_layer_as_long_as_its_angle() {
    let case = Case::open("cases/boft-stack-layers");
    let folder = tempfile::tempdir().unwrap();
    succeed(
        folder.path(),
        &["inspect", case.adapter(), "--plot", "angles.svg"],
    );
    let svg = fs::read_to_string(folder.path().join("angles.svg")).unwrap();
    for layer in [
        "encoder.layers.0.fc1",
        "encoder.layers.0.fc2",
        "encoder.layers.2.fc1",
        "encoder.layers.2.fc2",
    ] {
        assert_eq!(svg.matches(layer).count(), 1, "{layer}");
    }
    let bars = svg
        .lines()
        .filter(|line| line.starts_with("<rect") && line.contains("#0000FF"));
    let field = |bar: &str, name: &str| -> f64 {
        let (_, rest) = bar.split_once(&format!(" {name}=\"")).unwrap();
        rest.split('"').next().unwrap().parse().unwrap()
    };
    let mut bars: Vec<_> = bars
        .map(|bar| (field(bar, "y"), field(bar, "width")))
        .collect();
    bars.sort_by(|a, b| a.0.total_cmp(&b.0));
    // From top to bottom, in pixels.
    let angles = [0.7069, 0.9011, 1.0751, 1.1494];
    assert_eq!(bars.len(), angles.len(), "{svg}");
    let pixels = bars[3].1 / angles[3];
    for ((_, width), angle) in bars.iter().zip(angles) {
        assert!((width - pixels * angle).abs() <= 1.5, "{bars:?}");
    }
    // A single layer has its name, too.
    let one = Case::open("cases/boft-linear-m1-b4");
    succeed(
        folder.path(),
        &["inspect", one.adapter(), "--plot", "one.svg"],
    );
    let svg = fs::read_to_string(folder.path().join("one.svg")).unwrap();
    assert_eq!(svg.matches("\nlayer\n").count(), 1, "{svg}");
    let bar = svg.lines().find(|line| line.contains("#0000FF")).unwrap();
    assert!(field(bar, "height") > 10.0, "{bar}");
    assert_eq!(
        refused(
            folder.path(),
            &["inspect", case.adapter(), "--plot", "angles.svg"]
        ),
        "angles.svg is there already; name a file that is not there yet"
    );
}
