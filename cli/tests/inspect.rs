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
            [
                "boft_R",
                "boft_s",
                "oft_R.weight",
                "oft_embedding_R.weight",
                "oft_r",
                "oft_s",
            ]
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

/// A square matrix, row by row.
type Square = Vec<Vec<f64>>;

fn square(b: usize, at: impl Fn(usize, usize) -> f64) -> Square {
    let row = |i| (0..b).map(|j| at(i, j)).collect();
    (0..b).map(row).collect()
}

fn product(left: &Square, right: &Square) -> Square {
    let b = left.len();
    square(b, |i, j| (0..b).map(|k| left[i][k] * right[k][j]).sum())
}

fn transposed(matrix: &Square) -> Square {
    square(matrix.len(), |i, j| matrix[j][i])
}

fn trace(matrix: &Square) -> f64 {
    (0..matrix.len()).map(|i| matrix[i][i]).sum()
}

/// `‖Q‖₂` and the projector onto its plane, by squaring `QᵀQ` over and over.
fn norm_and_plane(skew: &Square) -> (f64, Square) {
    let mut power = product(&transposed(skew), skew);
    let (mut logarithm, mut weight) = (0.0, 1.0);
    for _ in 0..50 {
        let size = trace(&power);
        power.iter_mut().flatten().for_each(|x| *x /= size);
        logarithm += weight * size.ln();
        weight /= 2.0;
        power = product(&power, &power);
    }
    let size = trace(&power);
    power.iter_mut().flatten().for_each(|x| *x /= size);
    ((logarithm / 2.0).exp(), power)
}

/// `(I + Q)(I − Q)⁻¹`, by Gauss and Jordan: `I − Q` needs no pivots.
fn cayley(skew: &Square) -> Square {
    let b = skew.len();
    let one = |i, j| f64::from(i == j);
    let mut rest = square(b, |i, j| one(i, j) - skew[i][j]);
    let mut inverse = square(b, one);
    for k in 0..b {
        let pivot = rest[k][k];
        for matrix in [&mut rest, &mut inverse] {
            matrix[k].iter_mut().for_each(|x| *x /= pivot);
        }
        for i in (0..b).filter(|i| *i != k) {
            let factor = rest[i][k];
            for matrix in [&mut rest, &mut inverse] {
                let row = matrix[k].clone();
                matrix[i]
                    .iter_mut()
                    .zip(row)
                    .for_each(|(x, y)| *x -= factor * y);
            }
        }
    }
    product(&square(b, |i, j| one(i, j) + skew[i][j]), &inverse)
}

/// `I + 2Q + … + 2Qᵏ⁻² + Qᵏ⁻¹`, PEFT's polynomial of k terms.
fn neumann(skew: &Square, terms: usize) -> Square {
    let b = skew.len();
    let mut power = square(b, |i, j| f64::from(i == j));
    let mut sum = power.clone();
    for exponent in 1..terms {
        power = product(&power, skew);
        let factor = if exponent + 1 < terms { 2.0 } else { 1.0 };
        sum = square(b, |i, j| sum[i][j] + factor * power[i][j]);
    }
    sum
}

/// The blocks `Q` of a layer, as PEFT makes them of its tensors.
fn skews(file: &Tensors, path: &str, coft: Option<f64>) -> Vec<Square> {
    let tensor = |name: &str| file.get(&format!("base_model.model.{path}.{name}"));
    if let Some(Tensor { shape, numbers, .. }) = tensor("boft_R") {
        let b = shape[3];
        let blocks = numbers.chunks(b * b);
        let skew = |block: &[f64]| square(b, |i, j| (block[i * b + j] - block[j * b + i]) / 2.0);
        return blocks.map(skew).collect();
    }
    let Tensor { shape, numbers, .. } = tensor("oft_R.weight").unwrap();
    let b = (1..).find(|b| b * (b - 1) / 2 == shape[1]).unwrap();
    let blocks = numbers.chunks(shape[1]).map(|packed| {
        // Row by row above the diagonal.
        let at = |i: usize, j: usize| packed[i * (2 * b - i - 1) / 2 + j - i - 1];
        let skew = square(b, |i, j| match i.cmp(&j) {
            std::cmp::Ordering::Less => at(i, j),
            std::cmp::Ordering::Equal => 0.0,
            std::cmp::Ordering::Greater => -at(j, i),
        });
        let size = skew.iter().flatten().map(|x| x * x).sum::<f64>().sqrt();
        let most = coft.map_or(size, |radius| radius / (shape[0] as f64).sqrt());
        square(b, |i, j| skew[i][j] * (most / size).min(1.0))
    });
    blocks.collect()
}

#[test]
fn the_figures_are_those_of_a_dense_reference() {
    for (name, terms) in [
        ("boft-stack-layers", None),
        ("boft-linear-m3-b8", None),
        ("boft-conv-m2-b6", None),
        ("oft-stack-layers", None),
        ("oft-linear-exact-b5", None),
        ("oft-linear-neumann-5", Some(5)),
        ("oft-linear-neumann-6", Some(6)),
        ("oft-linear-coft-outside", None),
    ] {
        let case = Case::open(&format!("cases/{name}"));
        let config = read_json(&case.adapter.join("adapter_config.json"));
        let exact = config["use_cayley_neumann"] != true;
        assert_eq!(exact, terms.is_none(), "{name}");
        let coft = config["coft"].as_bool().unwrap_or(false);
        let coft = coft.then(|| config["eps"].as_f64().unwrap());
        let file = read(&case.adapter.join("adapter_model.safetensors"));
        let json = succeed(&case.adapter, &["inspect", ".", "--json"]);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        for layer in json["layers"].as_array().unwrap() {
            let path = layer["path"].as_str().unwrap();
            let (mut norm, mut angle, mut defect) = (0.0f64, 0.0f64, 0.0f64);
            for skew in skews(&file, path, coft) {
                let (size, plane) = norm_and_plane(&skew);
                let turn = terms.map_or_else(|| cayley(&skew), |terms| neumann(&skew, terms));
                let gram = product(&transposed(&turn), &turn);
                // How the turn moves the plane: `cos θ`, and the length that a polynomial leaves.
                let length = trace(&product(&plane, &gram)).sqrt();
                let cosine = trace(&product(&plane, &turn)) / length;
                norm = norm.max(size);
                angle = angle.max(cosine.acos());
                for (i, row) in gram.iter().enumerate() {
                    for (j, x) in row.iter().enumerate() {
                        defect = defect.max((x - f64::from(i == j)).abs());
                    }
                }
            }
            let found = |name: &str| layer[name].as_f64().unwrap();
            for (name_of, expected, tolerance) in [
                ("skew_norm", norm, 1e-6),
                ("largest_angle", angle, 1e-6),
                ("orthogonality_defect", defect, 2e-6),
            ] {
                let off = (found(name_of) - expected).abs();
                let bound = tolerance * expected.max(1.0);
                assert!(
                    off < bound,
                    "{name} {path} {name_of}: {} {expected}",
                    found(name_of)
                );
            }
            assert!(exact || defect > 1e-3, "{name} {path}: {defect}");
            let scale = file.get(&format!("base_model.model.{path}.boft_s"));
            let Some(Tensor { numbers, .. }) = scale else {
                assert!(layer["scale_range"].is_null(), "{name} {path}");
                continue;
            };
            let ends: [fn(f64, f64) -> f64; 2] = [f64::min, f64::max];
            for (found, end) in layer["scale_range"].as_array().unwrap().iter().zip(ends) {
                let expected = numbers.iter().copied().reduce(end).unwrap();
                let off = (found.as_f64().unwrap() - expected).abs();
                assert!(off < 1e-12, "{name} {path}: {found} {expected}");
            }
        }
    }
}

/// The rectangles of a picture that are neither its background nor a key of its legend, which is 12 pixels wide.
fn bar_lines(svg: &str) -> impl Iterator<Item = &str> {
    svg.lines().filter(|line| {
        let is_key = line.contains("width=\"12\" height=\"12\"");
        line.starts_with("<rect") && !line.contains("#FFFFFF") && !is_key
    })
}

/// An adapter of OFT for two maps in each of twelve layers, with long names.
fn deep_adapter(folder: &std::path::Path) -> Vec<String> {
    let mut tensors = Tensors::new();
    let mut names = Vec::new();
    for layer in 0..12 {
        for map in ["attention.attention.query", "mlp.fc1"] {
            let path = format!("dinov2.encoder.layer.{layer}.{map}");
            let key = format!("base_model.model.{path}.oft_R.weight");
            tensors.insert(key, Tensor::random(&[2, 6], 1 + layer));
            names.push(path);
        }
    }
    let config = serde_json::json!({
        "peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": false, "target_modules": names
    });
    write_adapter(&folder.join("deep"), &config, &tensors);
    names
}

#[test]
fn layers_are_in_the_order_of_their_numbers_and_many_targets_are_shortened() {
    let folder = tempfile::tempdir().unwrap();
    let mut names = deep_adapter(folder.path());
    let printed = succeed(folder.path(), &["inspect", "deep"]);
    assert!(
        printed.contains(
            "targets       24 names: dinov2.encoder.layer.*.attention.attention.query (12), \
             dinov2.encoder.layer.*.mlp.fc1 (12)\n"
        ),
        "{printed}"
    );
    let (_, table) = printed.split_once("\n\n").unwrap();
    let rows: Vec<_> = table
        .lines()
        .skip(1)
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    assert_eq!(rows, names);
    // JSON has them all.
    let json = succeed(folder.path(), &["inspect", "deep", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let mut targets: Vec<_> = json["targets"].as_str().unwrap().split(", ").collect();
    targets.sort();
    names.sort();
    assert_eq!(targets, names);
}

#[test]
fn a_picture_has_whole_labels_in_order_and_a_colour_for_each_kind_of_layer() {
    let folder = tempfile::tempdir().unwrap();
    let names = deep_adapter(folder.path());
    succeed(folder.path(), &["inspect", "deep", "--plot", "deep.svg"]);
    let svg = fs::read_to_string(folder.path().join("deep.svg")).unwrap();
    let field = |line: &str, name: &str| {
        let (_, rest) = line.split_once(&format!(" {name}=\"")).unwrap();
        rest.split('"').next().unwrap().to_string()
    };

    // A text is on the line after its tag.
    let lines: Vec<_> = svg.lines().collect();
    let mut labels: Vec<_> = lines
        .windows(2)
        .filter(|pair| names.iter().any(|name| name == pair[1]))
        .map(|pair| {
            (
                field(pair[0], "y").parse::<i32>().unwrap(),
                pair[0],
                pair[1],
            )
        })
        .collect();
    labels.sort();
    let shown: Vec<_> = labels.iter().map(|(.., name)| *name).collect();
    assert_eq!(shown, names);
    for (_, tag, name) in labels {
        assert_eq!(field(tag, "text-anchor"), "end");
        let size: f64 = field(tag, "font-size").parse().unwrap();
        // Letters of sans-serif fonts are half as wide as high on average; these have a tenth more.
        let width = 0.55 * size * name.len() as f64;
        let left = field(tag, "x").parse::<f64>().unwrap() - width;
        assert!(left >= 0.0, "{name} begins at {left}");
    }

    let colours: std::collections::BTreeSet<_> =
        bar_lines(&svg).map(|bar| field(bar, "fill")).collect();
    assert_eq!(colours.len(), 2, "{svg}");
    for (kind, count) in [("attention.attention.query", 1), ("mlp.fc1", 1)] {
        let keys = lines.iter().filter(|line| **line == kind);
        assert_eq!(keys.count(), count, "{kind} is in the legend");
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
    let field = |bar: &str, name: &str| -> f64 {
        let (_, rest) = bar.split_once(&format!(" {name}=\"")).unwrap();
        rest.split('"').next().unwrap().parse().unwrap()
    };
    let mut bars: Vec<_> = bar_lines(&svg)
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
    let bar = bar_lines(&svg).next().unwrap();
    assert!(field(bar, "height") > 10.0, "{bar}");
    assert_eq!(
        refused(
            folder.path(),
            &["inspect", case.adapter(), "--plot", "angles.svg"]
        ),
        "angles.svg exists already; name a file that does not exist yet"
    );
}
