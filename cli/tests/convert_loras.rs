//! `convert --to-lora`: the nearest LoRA.

use std::collections::BTreeMap;

use serde_json::json;

use crate::files::*;

/// `base + B·A` of every layer of a LoRA.
fn with_lora(base: &Tensors, lora: &Tensors, rank: usize) -> Tensors {
    let mut result = base.clone();
    for (key, a) in lora {
        let Some(path) = key
            .strip_prefix("base_model.model.")
            .and_then(|key| key.strip_suffix(".lora_A.weight"))
        else {
            continue;
        };
        let b = &lora[&key.replace("lora_A", "lora_B")];
        let weight = result.get_mut(&format!("{path}.weight")).unwrap();
        let (o, d) = (weight.shape[0], weight.numbers.len() / weight.shape[0]);
        assert_eq!(a.shape[0], rank);
        assert_eq!(a.shape[1..], weight.shape[1..]);
        assert_eq!(b.shape[..2], [o, rank]);
        assert_eq!(b.shape.len(), weight.shape.len());
        for i in 0..o {
            for j in 0..d {
                let product: f64 = (0..rank)
                    .map(|k| b.numbers[i * rank + k] * a.numbers[k * d + j])
                    .sum();
                weight.numbers[i * d + j] += product;
            }
        }
    }
    result
}

#[test]
fn a_lora_of_full_rank_equals_the_adapter_and_a_lower_rank_reports_what_it_omits() {
    for name in [
        "boft-conv-m2-b6",
        "oft-stack-layers",
        "oft-linear-neumann-5",
        "boft-linear-m3-b8",
    ] {
        let case = Case::open(&format!("cases/{name}"));
        let folder = case.folder();
        let convert = |rank: usize| {
            let (rank, output) = (rank.to_string(), format!("lora-{rank}"));
            let printed = succeed(
                folder.path(),
                &[
                    "convert",
                    case.adapter(),
                    "--to-lora",
                    &rank,
                    "--base",
                    "base.safetensors",
                    "--output",
                    &output,
                ],
            );
            let config = read_json(&folder.path().join(&output).join("adapter_config.json"));
            assert_eq!(
                (&config["peft_type"], &config["r"], &config["lora_alpha"]),
                (
                    &json!("LORA"),
                    &json!(rank.parse::<u32>().unwrap()),
                    &config["r"]
                )
            );
            (
                printed,
                read(
                    &folder
                        .path()
                        .join(&output)
                        .join("adapter_model.safetensors"),
                ),
            )
        };
        let (_, full) = convert(80);
        assert_models(&with_lora(&case.base, &full, 80), &case.merged, 1e-5, name);

        let (printed, low) = convert(2);
        let found = with_lora(&case.base, &low, 2);
        let left_out: BTreeMap<_, f64> = printed
            .lines()
            .filter_map(|line| {
                let (path, rest) = line.split_once(": ")?;
                Some((path, rest.split_once(" of the change")?.0.parse().ok()?))
            })
            .collect();
        assert!(!left_out.is_empty());
        for (path, left_out) in left_out {
            let key = format!("{path}.weight");
            let norm = |a: &Tensors, b: &Tensors| {
                let pairs = a[&key].numbers.iter().zip(&b[&key].numbers);
                pairs.map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
            };
            let expected = norm(&found, &case.merged) / norm(&case.base, &case.merged);
            assert!(
                expected > 0.01 && (left_out / expected - 1.0).abs() < 0.01,
                "{name} {path}: {left_out} {expected}"
            );
        }
    }
}

/// PEFT's LoRA of an embedding has tensors of its own, `lora_embedding_A` and `lora_embedding_B`.
#[test]
fn an_embedding_does_not_become_a_lora() {
    let case = Case::open("cases/oft-text-neumann-head");
    let folder = case.folder();
    let line = refused(
        folder.path(),
        &[
            "convert",
            case.adapter(),
            "--to-lora",
            "4",
            "--base",
            "base.safetensors",
            "--output",
            "lora",
        ],
    );
    assert_eq!(
        line,
        "`embedding` is an embedding, whose LoRA PEFT stores and computes in another way; merge the adapter instead"
    );
    assert_eq!(names(folder.path()), ["base.safetensors"]);
}

/// The LoRA keeps the names of the adapter, and its changes are those of the layers that the rules find.
#[test]
fn map_rules_find_the_layers_of_a_lora_in_the_model() {
    let fixtures = fixtures().join("dinov2");
    let folder = tempfile::tempdir().unwrap();
    let (base, expected) = (
        read(&fixtures.join("base.safetensors")),
        read(&fixtures.join("merged.safetensors")),
    );
    write(&folder.path().join("base.safetensors"), &base);
    let adapter = fixtures.join("transformers-5");
    let convert = [
        "convert",
        adapter.to_str().unwrap(),
        "--to-lora",
        "12",
        "--base",
        "base.safetensors",
        "--output",
        "lora",
        "--map",
        "dinov2",
    ];
    succeed(folder.path(), &convert);
    let lora = read(&folder.path().join("lora/adapter_model.safetensors"));
    let path = |key: &str| {
        let module = key.strip_suffix(".lora_A.weight")?;
        Some(module.strip_prefix("base_model.model.")?.to_string())
    };
    let mut paths: Vec<_> = lora.keys().filter_map(|key| path(key)).collect();
    let file = read(&adapter.join("adapter_model.safetensors"));
    let adapted = file.keys().filter_map(|key| {
        let module = key.strip_suffix(".boft_R")?;
        Some(module.strip_prefix("base_model.model.")?.to_string())
    });
    assert_eq!(paths, adapted.collect::<Vec<_>>());
    paths.retain(|path| path.contains(".mlp."));

    // The two halves of the layer that the file has in one.
    for (half, part) in ["gate_proj", "up_proj"].iter().enumerate() {
        let path = paths.iter().find(|path| path.ends_with(part)).unwrap();
        let whole = path.replace(part, "weights_in.weight");
        let rows = |tensors: &Tensors| {
            let whole = &tensors[&whole];
            let [o, d] = [whole.shape[0] / 2, whole.shape[1]];
            let numbers = whole.numbers[half * o * d..(half + 1) * o * d].to_vec();
            Tensor::new(&[o, d], numbers)
        };
        let layer = [(format!("{path}.weight"), rows(&base))].into();
        let mut own = lora.clone();
        own.retain(|key, _| key.contains(path.as_str()));
        let found = &with_lora(&layer, &own, 12)[&format!("{path}.weight")];
        assert!(difference(found, &rows(&expected)) < 1e-5, "{path}");
        assert!(difference(&rows(&base), &rows(&expected)) > 0.01, "{path}");
    }
}

#[test]
fn saved_modules_and_biases_are_written_beside_a_lora() {
    let case = Case::open("cases/boft-mlp-bias-only-saved");
    let folder = case.folder();
    succeed(
        folder.path(),
        &[
            "convert",
            case.adapter(),
            "--to-lora",
            "4",
            "--base",
            "base.safetensors",
            "--output",
            "lora",
        ],
    );
    let (lora, own) = (
        read(&folder.path().join("lora/adapter_model.safetensors")),
        read(&case.adapter.join("adapter_model.safetensors")),
    );
    for (key, tensor) in own.iter().filter(|(key, _)| !key.contains("boft_")) {
        assert_eq!(lora[key], *tensor, "{key}");
    }
    let config = read_json(&folder.path().join("lora/adapter_config.json"));
    assert_eq!(
        (&config["bias"], &config["modules_to_save"]),
        (&json!("lora_only"), &json!(["classifier"]))
    );
}
