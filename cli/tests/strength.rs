//! `--strength` and `--factors`: how much of an adapter is merged, taken out or written.

use std::slice::from_ref;

use serde_json::json;

use crate::dense::{Matrix, factor, packed_skews, rotation, skews};
use crate::files::*;

/// Inputs and outputs of the layer `fc`, and the sizes of its BOFT adapters.
const D_INPUT: usize = 32;
const D_OUTPUT: usize = 11;
const B: usize = 4;

/// A folder with `base.safetensors`, of one layer, and adapters for it.
struct Layer {
    folder: tempfile::TempDir,
    weight: Tensor,
}

impl Layer {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let weight = Tensor::random(&[D_OUTPUT, D_INPUT], 1);
        let base = [("fc.weight".to_string(), weight.clone())].into();
        write(&folder.path().join("base.safetensors"), &base);
        Self { folder, weight }
    }

    /// Writes a BOFT adapter of `m` factors; its squares, and its scale of numbers around one.
    fn boft(&self, name: &str, m: usize, seed: u64) -> (Tensor, Tensor) {
        let squares = Tensor::random(&[m, D_INPUT / B, B, B], seed);
        let mut scale = Tensor::random(&[D_OUTPUT, 1], seed + 100);
        scale.numbers.iter_mut().for_each(|s| *s += 1.0);
        let scale = scale.cast(safetensors::tensor::Dtype::F32);
        let config = json!({
            "peft_type": "BOFT", "boft_block_size": B, "boft_n_butterfly_factor": m, "target_modules": ["fc"]
        });
        let tensors = [("boft_R", squares.clone()), ("boft_s", scale.clone())];
        let tensors = tensors.map(|(key, tensor)| (format!("base_model.model.fc.{key}"), tensor));
        write_adapter(&self.folder.path().join(name), &config, &tensors.into());
        (squares, scale)
    }

    /// Writes an OFT adapter with these settings; its packed numbers.
    fn oft(&self, name: &str, settings: serde_json::Value, b: usize) -> Tensor {
        let packed = Tensor::random(&[D_INPUT / b, b * (b - 1) / 2], 7);
        let mut config = json!({
            "peft_type": "OFT", "oft_block_size": b, "target_modules": ["fc"], "peft_version": "0.21.2"
        });
        let settings = settings.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(settings);
        let key = "base_model.model.fc.oft_R.weight".to_string();
        let tensors = [(key, packed.clone())].into();
        write_adapter(&self.folder.path().join(name), &config, &tensors);
        packed
    }

    fn run(&self, command: &str) -> Run {
        run(self.folder.path(), &command.split(' ').collect::<Vec<_>>())
    }

    /// The weight that a command writes to `out`, which it is given.
    fn written(&self, command: &str) -> Tensor {
        let path = self.folder.path().join("out");
        let run = self.run(&format!("{command} --output out"));
        assert_eq!(run.code, 0, "{command}: {}", run.stderr);
        let tensors = read(&path);
        std::fs::remove_file(path).unwrap();
        tensors["fc.weight"].clone()
    }

    fn merged(&self, options: &str) -> Tensor {
        self.written(&format!("merge --base base.safetensors {options}"))
    }

    fn refused(&self, command: &str) -> String {
        refused(self.folder.path(), &command.split(' ').collect::<Vec<_>>())
    }
}

/// `diag(s^strength)·W·Rᵀ`.
fn expected(weight: &Tensor, rotation: &Matrix, scale: &Tensor, strength: f64) -> Tensor {
    let powers: Vec<_> = scale.numbers.iter().map(|s| s.powf(strength)).collect();
    let rotated = Matrix::of(weight).times(&rotation.transposed());
    rotated.with_rows_scaled(&powers).tensor()
}

fn assert_near(found: &Tensor, expected: &Tensor, what: &str) {
    let difference = difference(found, expected);
    assert!(difference < 2e-6, "{what}: {difference:e}");
}

#[test]
fn every_q_is_multiplied_and_every_scale_raised() {
    let layer = Layer::new();
    for m in 1..=3 {
        let (squares, scale) = layer.boft(&format!("m{m}"), m, m as u64);
        let q = skews(&squares);
        let mut last = layer.weight.clone();
        for strength in [-1.3, -1.0, 0.0, 0.4, 0.7, 1.0, 2.5] {
            let merged = layer.merged(&format!("--adapter m{m} --strength {strength}"));
            let rotation = rotation(&q, strength);
            let expected = expected(&layer.weight, &rotation, &scale, strength);
            assert_near(
                &merged,
                &expected,
                &format!("{m} factors, strength {strength}"),
            );
            assert!(
                difference(&merged, &last) > 0.01,
                "{strength} is another strength"
            );
            last = merged;
        }
    }
}

#[test]
fn a_strength_of_one_and_all_factors_change_no_bit() {
    for (name, factors) in [
        ("cases/boft-linear-m3-b4", 3),
        ("cases/boft-mlp-bias-only-saved", 1),
        ("cases/oft-linear-coft-on", 1),
        ("cases/oft-linear-neumann-5", 1),
        ("cases/oft-linear-share-neumann", 1),
    ] {
        let case = Case::open(name);
        let folder = case.folder();
        let merge = |output: &str, options: &str| {
            let mut arguments = merge_command("base.safetensors", case.adapter(), output).to_vec();
            arguments.extend(options.split_whitespace());
            succeed(folder.path(), &arguments);
            std::fs::read(folder.path().join(output)).unwrap()
        };
        let plain = merge("plain", "");
        assert_eq!(merge("one", "--strength 1"), plain, "{name}");
        let all = merge("all", &format!("--factors {factors} --strength=1.0"));
        assert_eq!(all, plain, "{name}");
        let none = merge("none", "--strength 0");
        assert_ne!(none, plain, "{name}");
        // The layers that are rotated are as they were.
        let none = read(&folder.path().join("none"));
        for (key, tensor) in case
            .base
            .iter()
            .filter(|(key, tensor)| tensor.shape.len() > 1 && !key.starts_with("classifier"))
        {
            assert_eq!(&none[key], tensor, "{name}: {key}");
        }
    }
}

#[test]
fn minus_one_undoes_one_factor_and_not_several() {
    let layer = Layer::new();
    for m in [1, 2] {
        layer.boft("adapter", m, 5);
        let merged = layer.merged("--adapter adapter");
        let tensors = [("fc.weight".to_string(), merged.clone())].into();
        write(&layer.folder.path().join("merged.safetensors"), &tensors);
        assert!(difference(&merged, &layer.weight) > 0.1);
        let back = layer.written("merge --base merged.safetensors --adapter adapter --strength -1");
        let off = difference(&back, &layer.weight);
        match m {
            1 => assert!(off < 2e-6, "{off:e}"),
            _ => assert!(off > 0.01, "{off:e}"),
        }
        let unmerged = layer.written("unmerge --merged merged.safetensors --adapter adapter");
        assert_near(&unmerged, &layer.weight, "unmerge");
    }
}

#[test]
fn a_polynomial_is_that_of_the_multiplied_q_and_a_line_says_how_orthogonal_it_is() {
    let layer = Layer::new();
    let packed = layer.oft("adapter", json!({}), 8);
    for strength in [-0.8, 0.3, 0.9] {
        let options = format!("--adapter adapter --strength {strength}");
        let q = packed_skews(&packed, 8);
        let blocks: Vec<_> = q.iter().map(|q| q.scaled(strength).neumann()).collect();
        let rotation = factor(0, &blocks);
        let ones = Tensor::new(&[D_OUTPUT], vec![1.0; D_OUTPUT]);
        let expected = expected(&layer.weight, &rotation, &ones, 1.0);
        assert_near(&layer.merged(&options), &expected, &options);
        let product = rotation.transposed().times(&rotation);
        let defect = product.plus(-1.0, &Matrix::identity(D_INPUT));
        let places = (0..D_INPUT).flat_map(|i| (0..D_INPUT).map(move |j| (i, j)));
        let defect = places
            .map(|(i, j)| defect.at(i, j).abs())
            .fold(0.0, f64::max);
        let run = layer.run(&format!(
            "merge --base base.safetensors {options} --dry-run"
        ));
        let line = format!(
            "note: adapter has polynomials for rotations, which at a strength of {strength} are off from orthogonal by \
             {defect:.1e}\n"
        );
        assert_eq!(run.stderr, line);
    }
}

/// The radius bounds `Q` as it does without a strength, and not the multiplied one.
#[test]
fn what_a_coft_radius_leaves_of_q_is_multiplied() {
    let layer = Layer::new();
    let radius = 0.8;
    let settings = json!({"coft": true, "eps": radius, "use_cayley_neumann": false});
    let packed = layer.oft("adapter", settings, B);
    let q = packed_skews(&packed, B);
    let bound = radius / (q.len() as f64).sqrt();
    let bounded: Vec<_> = q
        .iter()
        .map(|q| q.scaled((bound / q.norm()).min(1.0)))
        .collect();
    assert!(
        q.iter().zip(&bounded).all(|(q, bounded)| q != bounded),
        "the radius acts"
    );
    let ones = Tensor::new(&[D_OUTPUT], vec![1.0; D_OUTPUT]);
    for strength in [-2.0, 0.5, 3.0] {
        let expected = expected(
            &layer.weight,
            &rotation(from_ref(&bounded), strength),
            &ones,
            1.0,
        );
        let options = format!("--adapter adapter --strength {strength}");
        assert_near(&layer.merged(&options), &expected, &options);
        // The same of an adapter that is written at this strength.
        let name = format!("written{strength}");
        let convert = format!("convert adapter --to peft --strength {strength} --output {name}");
        assert_eq!(layer.run(&convert).code, 0);
        let written = layer.merged(&format!("--adapter {name}"));
        assert_near(&written, &expected, &convert);
        let config = read_json(&layer.folder.path().join(&name).join("adapter_config.json"));
        assert_eq!(config["coft"], false, "{config}");
    }
}

/// LyCORIS bounds the norm of all blocks together, and rotates the outputs: `diag(s)·R·W`.
#[test]
fn what_alpha_leaves_of_q_is_multiplied_where_outputs_are_rotated() {
    let folder = tempfile::tempdir().unwrap();
    let (weight, blocks) = (Tensor::random(&[12, 7], 1), Tensor::random(&[3, 4, 4], 2));
    let mut scale = Tensor::random(&[12, 1], 3);
    scale
        .numbers
        .iter_mut()
        .for_each(|s| *s = f64::from((*s + 1.0) as f32));
    let alpha = 0.125;
    let tensors = [
        ("lycoris_fc.oft_blocks", blocks.clone()),
        ("lycoris_fc.alpha", Tensor::new(&[], vec![alpha])),
        ("lycoris_fc.rescale", scale.clone()),
    ];
    let tensors = tensors.map(|(key, tensor)| (key.to_string(), tensor));
    write(&folder.path().join("adapter.safetensors"), &tensors.into());
    let base = [("fc.weight".to_string(), weight.clone())].into();
    write(&folder.path().join("base.safetensors"), &base);
    // `A − Aᵀ`, without the half that PEFT has.
    let squares = Tensor::new(&[1, 3, 4, 4], blocks.numbers);
    let q: Vec<_> = skews(&squares)[0].iter().map(|q| q.scaled(2.0)).collect();
    let norm = q.iter().map(|q| q.norm().powi(2)).sum::<f64>().sqrt();
    let bound = alpha * 12.0;
    assert!(norm > bound, "the bound acts");
    let q: Vec<_> = q.iter().map(|q| q.scaled(bound / (norm + 1e-8))).collect();
    for strength in [-1.5, 0.6, 2.0] {
        let (output, text) = (format!("out{strength}"), strength.to_string());
        let mut arguments =
            merge_command("base.safetensors", "adapter.safetensors", &output).to_vec();
        arguments.extend(["--strength", &text]);
        succeed(folder.path(), &arguments);
        let powers: Vec<_> = scale.numbers.iter().map(|s| s.powf(strength)).collect();
        let rotated = rotation(from_ref(&q), strength).times(&Matrix::of(&weight));
        let expected = rotated.with_rows_scaled(&powers).tensor();
        let merged = &read(&folder.path().join(&output))["fc.weight"];
        assert_near(merged, &expected, &text);
        let unmerge = format!(
            "unmerge --merged {output} --adapter adapter.safetensors --strength {text} --output back{text}"
        );
        succeed(folder.path(), &unmerge.split(' ').collect::<Vec<_>>());
        let back = &read(&folder.path().join(format!("back{text}")))["fc.weight"];
        assert_near(back, &weight, "unmerge");
    }
}

#[test]
fn unmerging_needs_the_strength_and_the_factors_of_the_merge() {
    let layer = Layer::new();
    layer.boft("adapter", 3, 9);
    for options in [
        "--strength 0.6",
        "--factors 2",
        "--factors 1 --strength -1.7",
    ] {
        let merged = layer.merged(&format!("--adapter adapter {options}"));
        let tensors = [("fc.weight".to_string(), merged)].into();
        write(&layer.folder.path().join("merged.safetensors"), &tensors);
        let unmerge = "unmerge --merged merged.safetensors --adapter adapter";
        let restored = layer.written(&format!("{unmerge} {options}"));
        assert_near(&restored, &layer.weight, options);
        let wrong = layer.written(unmerge);
        assert!(difference(&wrong, &layer.weight) > 0.01, "{options}");
    }
}

/// In PEFT the activations meet the last factor first: `x·F_2·F_1·F_0`.
#[test]
fn the_factors_that_activations_meet_first_are_kept() {
    let layer = Layer::new();
    let (squares, scale) = layer.boft("adapter", 3, 11);
    let q = skews(&squares);
    let zero = |factor: &Vec<Matrix>| factor.iter().map(|q| q.scaled(0.0)).collect::<Vec<_>>();
    for kept in 0..=3 {
        let factors = q.iter().enumerate();
        let some: Vec<_> = factors
            .map(|(index, factor)| {
                if index < 3 - kept {
                    zero(factor)
                } else {
                    factor.clone()
                }
            })
            .collect();
        let expected = expected(&layer.weight, &rotation(&some, 1.0), &scale, 1.0);
        let options = format!("--adapter adapter --factors {kept}");
        assert_near(&layer.merged(&options), &expected, &options);
        let convert = format!("convert adapter --to peft --factors {kept} --output kept{kept}");
        assert_eq!(layer.run(&convert).code, 0);
        assert_near(
            &layer.merged(&format!("--adapter kept{kept}")),
            &expected,
            &convert,
        );
    }
    assert_eq!(
        layer.refused("merge --base base.safetensors --adapter adapter --factors 4 --dry-run"),
        "adapter: `fc` has 3 factors, of which 4 cannot be kept; keep at most 3"
    );
    layer.oft("oft", json!({"use_cayley_neumann": false}), B);
    assert_eq!(
        layer.refused("unmerge --merged base.safetensors --adapter oft --factors 2 --output out"),
        "oft: `fc` has 1 factor, of which 2 cannot be kept; keep at most 1"
    );
    let run = layer.run(
        "merge --base base.safetensors --adapter adapter --factors 2 --strength 0.5 --dry-run",
    );
    let row = "rotate block size 4, 2 of 3 factors, scale, strength 0.5\n";
    assert!(run.stdout.contains(row), "{}", run.stdout);
}

/// In LyCORIS the outputs are rotated by `F_1·F_0`, and meet the first factor first. With blocks of two channels both programs number
/// the channels alike.
#[test]
fn the_first_factor_of_outputs_is_the_one_that_is_stored_first() {
    let folder = tempfile::tempdir().unwrap();
    let (weight, squares) = (Tensor::random(&[8, 5], 1), Tensor::random(&[2, 4, 2, 2], 2));
    let tensors = [
        ("lycoris_fc.oft_blocks", squares.clone()),
        ("lycoris_fc.alpha", Tensor::new(&[], vec![0.0])),
    ];
    let tensors = tensors.map(|(key, tensor)| (key.to_string(), tensor));
    write(&folder.path().join("adapter.safetensors"), &tensors.into());
    let base = [("fc.weight".to_string(), weight.clone())].into();
    write(&folder.path().join("base.safetensors"), &base);
    let mut arguments = merge_command("base.safetensors", "adapter.safetensors", "out").to_vec();
    arguments.extend(["--factors", "1"]);
    succeed(folder.path(), &arguments);
    let first = &skews(&squares)[0];
    // `r = (I + q)(I − q)⁻¹` with `q = A − Aᵀ`: the block of −2·½(A − Aᵀ).
    let expected = rotation(from_ref(first), -2.0).times(&Matrix::of(&weight));
    let merged = &read(&folder.path().join("out"))["fc.weight"];
    assert_near(merged, &expected.tensor(), "one factor");
}

#[test]
fn biases_and_saved_modules_are_taken_whole_and_a_line_says_so() {
    let case = Case::open("cases/boft-mlp-bias-only-saved");
    let folder = case.folder();
    let mut arguments = merge_command("base.safetensors", case.adapter(), "out").to_vec();
    arguments.extend(["--strength", "0.5"]);
    let run = run(folder.path(), &arguments);
    assert_eq!(
        run.stderr,
        format!(
            "note: 4 tensors of biases and saved modules in {} are taken whole: --strength and --factors are for rotations and \
             scales\n",
            case.adapter()
        )
    );
    let merged = read(&folder.path().join("out"));
    for key in [
        "fc1.bias",
        "fc2.bias",
        "classifier.weight",
        "classifier.bias",
    ] {
        assert_eq!(merged[key], case.merged[key], "{key}");
    }
    for key in ["fc1.weight", "fc2.weight"] {
        assert!(difference(&merged[key], &case.merged[key]) > 1e-3, "{key}");
        assert!(difference(&merged[key], &case.base[key]) > 1e-3, "{key}");
    }
}

/// Every form that an adapter is written in merges to what the strength alone makes.
#[test]
fn an_adapter_is_written_at_a_strength_in_every_form() {
    let layer = Layer::new();
    layer.boft("adapter", 1, 3);
    layer.oft("oft", json!({"use_cayley_neumann": false}), B);
    for (adapter, to) in [
        ("adapter", "peft"),
        ("oft", "boft"),
        ("adapter", "record"),
        ("adapter", "sd-scripts"),
    ] {
        let expected = layer.merged(&format!("--adapter {adapter} --strength -0.7"));
        let output = match to {
            "record" => "a.bpk".to_string(),
            "sd-scripts" => "a.safetensors".to_string(),
            _ => format!("{adapter}-{to}"),
        };
        let convert = format!(
            "convert {adapter} --to {to} --base base.safetensors --strength -0.7 --output {output}"
        );
        let run = layer.run(&convert);
        assert_eq!(run.code, 0, "{convert}: {}", run.stderr);
        let output = match to {
            "record" => {
                let back = "convert a.bpk --to peft --base base.safetensors --output back";
                assert_eq!(layer.run(back).code, 0);
                "back".to_string()
            }
            _ => output,
        };
        let merged = layer.merged(&format!("--adapter {output}"));
        assert_near(&merged, &expected, &convert);
    }
    // The LoRA of full rank is the change itself.
    let lora = format!(
        "convert adapter --to-lora {D_OUTPUT} --base base.safetensors --strength 0.5 --output lora"
    );
    assert_eq!(layer.run(&lora).code, 0);
    let lora = read(&layer.folder.path().join("lora/adapter_model.safetensors"));
    let part = |name: &str| Matrix::of(&lora[&format!("base_model.model.fc.{name}.weight")]);
    let change = part("lora_B").times(&part("lora_A"));
    let merged = Matrix::of(&layer.merged("--adapter adapter --strength 0.5"));
    let found = Matrix::of(&layer.weight).plus(1.0, &change).tensor();
    assert_near(&found, &merged.tensor(), "LoRA");
}

#[test]
fn strengths_that_mean_nothing_are_refused() {
    let layer = Layer::new();
    layer.boft("adapter", 2, 5);
    let merge = "merge --base base.safetensors --adapter adapter --dry-run";
    for (number, why) in [
        ("nan", "not a finite number"),
        ("inf", "not a finite number"),
        ("1e999", "not a finite number"),
        ("half", "not a number"),
    ] {
        assert_eq!(
            layer.refused(&format!("{merge} --strength {number}")),
            format!("invalid value '{number}' for '--strength <NUMBER>': {why}")
        );
    }
    let line = layer.refused(&format!("{merge} --factors -1"));
    assert!(line.contains("'-1'"), "{line}");
    assert_eq!(
        layer.refused(&format!("{merge} --strength 1 --strength 0.5")),
        "--strength is given 2 times and --adapter once; give it once for all adapters, or once for each in their order"
    );
    assert_eq!(
        layer.refused(&format!("{merge} --strength 1e300")),
        "adapter: `fc` would have numbers beyond f32 at a strength of 1e300; use a smaller one"
            .replace("1e300", &1e300f64.to_string())
    );

    let (squares, mut scale) = layer.boft("other", 1, 6);
    let config = json!({"peft_type": "BOFT", "boft_block_size": B, "target_modules": ["fc"]});
    let mut write_scale = |number: f64| {
        scale.numbers[3] = number;
        let tensors = [("boft_R", squares.clone()), ("boft_s", scale.clone())];
        let tensors = tensors.map(|(key, tensor)| (format!("base_model.model.fc.{key}"), tensor));
        write_adapter(&layer.folder.path().join("other"), &config, &tensors.into());
    };
    let merge = "merge --base base.safetensors --adapter other --dry-run";
    write_scale(-0.5);
    assert_eq!(
        layer.refused(&format!("{merge} --strength 0.5")),
        "other: `fc` scales output 3 by -0.5, of which there is no power 0.5; use a whole strength"
    );
    assert_eq!(layer.run(&format!("{merge} --strength 2")).code, 0);
    write_scale(0.0);
    assert_eq!(
        layer.refused(&format!("{merge} --strength -2")),
        "other: `fc` scales output 3 by 0, of which there is no power -2; use a positive strength"
    );
    assert_eq!(layer.run(&format!("{merge} --strength 0.5")).code, 0);
}
