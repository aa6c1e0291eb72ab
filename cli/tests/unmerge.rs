//! `unmerge`.

use std::path::Path;

use safetensors::tensor::Dtype;
use serde_json::json;

use crate::files::*;

/// The number after `off by about`.
fn reported(printed: &str) -> f64 {
    let (_, number) = printed.split_once("would be off by about ").unwrap();
    number.split(' ').next().unwrap().parse().unwrap()
}

/// The norm of the difference, relative to the norm of what is expected.
fn relative(found: &Tensor, expected: &Tensor) -> f64 {
    let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>().sqrt();
    let pairs = found.numbers.iter().zip(&expected.numbers);
    norm(&mut pairs.map(|(a, b)| a - b)) / norm(&mut expected.numbers.iter().copied())
}

#[test]
fn what_was_merged_comes_out_again() {
    let mut restored = 0;
    for case in Case::all() {
        let folder = case.folder();
        let run_on = |command: &str, option: &str, input: &str, output: &str| {
            let mut arguments = vec![
                command,
                option,
                input,
                "--adapter",
                case.adapter(),
                "--output",
                output,
            ];
            arguments.extend((command == "unmerge").then_some("--keep-saved"));
            run(folder.path(), &arguments)
        };
        assert_eq!(
            run_on("merge", "--base", "base.safetensors", "merged.safetensors").code,
            0
        );
        let run = run_on(
            "unmerge",
            "--merged",
            "merged.safetensors",
            "restored.safetensors",
        );
        assert_eq!(run.code, 0, "{}: {}", case.name, run.stderr);
        let found = read(&folder.path().join("restored.safetensors"));
        for (key, expected) in case
            .base
            .iter()
            .filter(|(_, tensor)| tensor.shape.len() > 1)
        {
            // Of saved modules nothing is restored.
            if !key.starts_with("classifier") && !key.starts_with("head") {
                let difference = difference(&found[key], expected);
                assert!(
                    difference < 1e-5,
                    "{}: {key} is off by {difference:e}",
                    case.name
                );
                restored += usize::from(case.merged[key] != *expected);
            }
        }
        let off = reported(&run.stdout);
        assert!(off < 1e-5, "{}: {}", case.name, run.stdout);
    }
    assert!(
        restored > 80,
        "{restored} weights were changed and restored"
    );
}

const PREFIX: &str = "base_model.model.layer";
const SHAPE: [usize; 2] = [192, 96];

/// A folder with a layer and adapters for it: of its inputs, with a scale and without, and of its outputs.
fn layer(dtype: Dtype, scales: &[(usize, f64)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    // An adapter is as precise as the layer at least.
    let precise = |tensor: Tensor| match dtype {
        Dtype::F64 => tensor.cast(dtype),
        _ => tensor,
    };
    let weight = Tensor::random(&SHAPE, 1).cast(dtype);
    write(&path("base"), &[("layer.weight".into(), weight)].into());
    let [d_output, d_input] = SHAPE;
    let mut scale = Tensor::random(&[d_output, 1], 2);
    for number in &mut scale.numbers {
        *number = f64::from((*number + 1.0) as f32);
    }
    for (row, number) in scales {
        scale.numbers[*row] = *number;
    }
    let tensors = [
        (
            format!("{PREFIX}.boft_R"),
            precise(Tensor::random(&[2, d_input / 4, 4, 4], 3)),
        ),
        (format!("{PREFIX}.boft_s"), precise(scale)),
    ];
    let config = json!({
        "peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": ["layer"]
    });
    write_adapter(&path("scaled"), &config, &tensors.into());
    let mut skew = Tensor::random(&[d_input / 8, 28], 4);
    // The polynomial needs small numbers.
    for number in &mut skew.numbers {
        *number = f64::from((0.2 * *number) as f32);
    }
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 8, "target_modules": ["layer"], "peft_version": "0.21.2"
    });
    let key = format!("{PREFIX}.oft_R.weight");
    write_adapter(&path("neumann"), &config, &[(key, precise(skew))].into());
    let tensors = [
        (
            "layer.oft_blocks",
            Tensor::random(&[d_output / 12, 12, 12], 5),
        ),
        ("layer.alpha", Tensor::new(&[], vec![0.0])),
    ];
    let tensors = tensors.map(|(key, tensor)| (key.to_string(), precise(tensor)));
    write(&path("outputs.safetensors"), &tensors.into());
    folder
}

/// What `unmerge` of these adapters reports, and how far what it restores is from the merged layer when it is merged again and
/// not rounded to half precision.
fn off(folder: &Path, merged: &str, adapters: &[&str]) -> [f64; 2] {
    let path = |name: &str| folder.join(name);
    let run = |command: &str| succeed(folder, &texts(&arguments(command, adapters)));
    let printed = run(&format!("unmerge --merged {merged} --output restored"));
    let s = if adapters.len() == 1 { "" } else { "s" };
    let line = format!("restored: {} layer{s} restored; ", adapters.len());
    assert!(printed.starts_with(&line), "{printed}");
    let mut restored = read(&path("restored"));
    for tensor in restored.values_mut() {
        if matches!(tensor.dtype, Dtype::BF16 | Dtype::F16) {
            *tensor = tensor.cast(Dtype::F32);
        }
    }
    write(&path("wide"), &restored);
    run("merge --base wide --output again");
    let [again, merged] = ["again", merged].map(|name| read(&path(name))["layer.weight"].clone());
    for output in ["restored", "wide", "again"] {
        std::fs::remove_file(path(output)).unwrap();
    }
    [reported(&printed), relative(&again, &merged)]
}

#[test]
fn the_error_that_is_reported_is_about_the_one_that_merging_again_makes() {
    for dtype in [Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16] {
        let folder = layer(dtype, &[]);
        for adapters in [
            &["scaled"][..],
            &["neumann"],
            &["outputs.safetensors"],
            &["outputs.safetensors", "neumann", "scaled"],
            &["scaled", "outputs.safetensors", "neumann"],
        ] {
            let merge = arguments("merge --base base --output merged", adapters);
            succeed(folder.path(), &texts(&merge));
            let [reported, expected] = off(folder.path(), "merged", adapters);
            // In the precision of the computation, its own errors count, too.
            let tolerance = match dtype {
                Dtype::BF16 | Dtype::F16 => 1.25,
                _ => 3.0,
            };
            let ratio = reported / expected;
            assert!(
                (1.0 / tolerance..tolerance).contains(&ratio),
                "{dtype} {adapters:?}: {reported:e} for {expected:e}"
            );
            std::fs::remove_file(folder.path().join("merged")).unwrap();
        }
    }
}

/// Of the restored row, subnormal numbers of f16 hold a bit at most.
#[test]
fn a_row_that_is_lost_is_reported() {
    let folder = layer(Dtype::F16, &[(77, 1e7)]);
    let [reported, expected] = off(folder.path(), "base", &["scaled"]);
    assert!(expected > 0.01, "{expected:e}");
    assert!(
        (0.1..10.0).contains(&(reported / expected)),
        "{reported:e} for {expected:e}"
    );
}

#[test]
fn the_distance_to_the_model_from_before_the_merge_is_measured_where_it_is_given() {
    let mut case = Case::open("cases/boft-linear-m3-b4");
    for tensor in case.base.values_mut() {
        *tensor = tensor.cast(Dtype::BF16);
    }
    let folder = case.folder();
    succeed(
        folder.path(),
        &merge_command("base.safetensors", case.adapter(), "merged.safetensors"),
    );
    let unmerge = |base: &str, output: &str| {
        let command = format!(
            "unmerge --merged merged.safetensors --adapter {} --base {base} --output {output}",
            case.adapter()
        );
        run(folder.path(), &command.split(' ').collect::<Vec<_>>())
    };
    let printed = unmerge("base.safetensors", "restored.safetensors").stdout;
    let restored = &read(&folder.path().join("restored.safetensors"))["layer.weight"];
    let pairs = || {
        restored
            .numbers
            .iter()
            .zip(&case.base["layer.weight"].numbers)
    };
    let expected = pairs().map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(expected > 0.0, "rounding to bf16 leaves an error");
    let (_, found) = printed
        .split_once("they are off from base.safetensors by at most ")
        .unwrap();
    let found: f64 = found.split(',').next().unwrap().parse().unwrap();
    assert!(
        (found / expected - 1.0).abs() < 0.06,
        "{printed} {expected}"
    );

    let mut other = case.base.clone();
    other.insert("layer.weight".into(), Tensor::random(&[3, 4], 1));
    write(&folder.path().join("other.safetensors"), &other);
    let refused = unmerge("other.safetensors", "none.safetensors");
    assert_eq!(refused.code, 2);
    let line = "error: other.safetensors: `layer.weight` is [3, 4], and ";
    assert!(refused.stderr.starts_with(line), "{}", refused.stderr);
    assert!(!folder.path().join("none.safetensors").exists());
}

/// A folder of shards comes out with the numbers of the one file, and with everything else it holds.
#[test]
fn shards_are_restored_as_the_one_file_is() {
    let case = Case::open("cases/boft-mlp-bias-only-saved");
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let middle = case.merged.keys().nth(3).unwrap().clone();
    let mut first = case.merged.clone();
    let second = first.split_off(&middle);
    write_shards(&path("merged"), &[first, second]);
    std::fs::write(path("merged").join("config.json"), "{}").unwrap();
    write(&path("merged.safetensors"), &case.merged);
    let unmerge = |merged: &str, output: &str| {
        let arguments = [
            "unmerge",
            "--merged",
            merged,
            "--adapter",
            case.adapter(),
            "--keep-saved",
            "--output",
            output,
        ];
        succeed(folder.path(), &arguments)
    };
    let sharded = unmerge("merged", "restored");
    let single = unmerge("merged.safetensors", "restored.safetensors");
    assert_eq!(reported(&sharded), reported(&single));
    let shards = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ];
    let index = "model.safetensors.index.json";
    assert_eq!(
        names(&path("restored")),
        ["config.json", shards[0], shards[1], index]
    );
    assert_eq!(
        read_json(&path("restored").join(index)),
        read_json(&path("merged").join(index))
    );
    let parts = shards.map(|shard| read(&path("restored").join(shard)));
    let found: Tensors = parts.into_iter().flatten().collect();
    assert_eq!(found, read(&path("restored.safetensors")));
    for key in ["fc1.weight", "fc2.weight"] {
        assert!(difference(&found[key], &case.base[key]) < 1e-5, "{key}");
        assert!(
            difference(&case.merged[key], &case.base[key]) > 0.01,
            "{key}"
        );
    }
}

#[test]
fn what_cannot_be_undone_is_refused() {
    let case = Case::open("cases/boft-mlp-bias-only-saved");
    let folder = case.folder();
    let unmerge = |adapter: &str| {
        refused(
            folder.path(),
            &[
                "unmerge",
                "--merged",
                "base.safetensors",
                "--adapter",
                adapter,
                "--output",
                "out",
            ],
        )
    };
    assert_eq!(
        unmerge(case.adapter()),
        "the merge replaced `classifier.bias` and everything else that the adapter saves (4 tensors), and no file holds \
         what was there before; pass --keep-saved to leave them as they are"
    );

    let prefix = "base_model.model.fc1";
    let config = json!({"peft_type": "BOFT", "target_modules": ["fc1"]});
    for lost in [0.0, -9e-31, 2e30] {
        let mut scale = Tensor::random(&[20, 1], 3);
        scale.numbers[7] = lost;
        let tensors = [
            (format!("{prefix}.boft_R"), Tensor::random(&[1, 6, 4, 4], 4)),
            (format!("{prefix}.boft_s"), scale),
        ];
        let adapter = format!("scaled-by-{lost:e}");
        write_adapter(&folder.path().join(&adapter), &config, &tensors.into());
        assert_eq!(
            unmerge(&adapter),
            format!(
                "base.safetensors: `fc1.weight` was scaled by {lost:.1e} in row 7, which cannot be undone"
            )
        );
    }

    // At ‖Q‖ = 1 the polynomial of five terms, (1 + Q²)² + 2Q(1 + Q²), is zero.
    let one = Tensor::new(&[12, 1], vec![1.0; 12]);
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 2, "target_modules": ["fc1"], "peft_version": "0.21.2"
    });
    let key = format!("{prefix}.oft_R.weight");
    write_adapter(&folder.path().join("flat"), &config, &[(key, one)].into());
    assert_eq!(
        unmerge("flat"),
        "base.safetensors: `fc1.weight` cannot be restored: block 0 of the Neumann polynomial has no inverse"
    );
    let kept = [
        "base.safetensors",
        "flat",
        "scaled-by--9e-31",
        "scaled-by-0e0",
        "scaled-by-2e30",
    ];
    assert_eq!(names(folder.path()), kept);
}
