//! Precisions, scales, and numbers that cannot be written.

use safetensors::tensor::Dtype;
use serde_json::json;

use crate::files::*;

#[test]
fn a_base_of_half_precision_keeps_it_and_is_rounded_once() {
    for name in [
        "cases/boft-conv-m2-b6",
        "cases/boft-mlp-bias-only-saved",
        "cases/oft-linear-neumann-5",
    ] {
        for dtype in [Dtype::F16, Dtype::BF16] {
            let mut case = Case::open(name);
            let merge = |base: &Tensors| {
                let folder = tempfile::tempdir().unwrap();
                write(&folder.path().join("base.safetensors"), base);
                succeed(
                    folder.path(),
                    &merge_command("base.safetensors", case.adapter(), "out"),
                );
                read(&folder.path().join("out"))
            };
            let rounded = |base: &Tensors| -> Tensors {
                let tensors = base.iter();
                tensors
                    .map(|(key, tensor)| match tensor.dtype {
                        Dtype::F32 => (key.clone(), tensor.cast(dtype)),
                        _ => (key.clone(), tensor.clone()),
                    })
                    .collect()
            };
            let half = rounded(&case.base);
            let merged = merge(&half);
            let wide = half.iter().map(|(key, tensor)| match tensor.dtype {
                Dtype::I64 => (key.clone(), tensor.clone()),
                _ => (key.clone(), tensor.cast(Dtype::F32)),
            });
            let expected = rounded(&merge(&wide.collect()));
            assert_eq!(merged, expected, "{name} {dtype}");
            case.base = half;
            assert!(merged != case.base);
        }
    }
}

/// Blocks of one channel do not rotate, but PEFT scales with them: `W' = diag(s)·W`.
#[test]
fn a_scale_applies_where_blocks_of_one_channel_do_not_rotate() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (weight, scale) = (Tensor::random(&[4, 6], 1), Tensor::random(&[4, 1], 2));
    let base: Tensors = [("fc.weight".to_string(), weight.clone())].into();
    write(&path("base.safetensors"), &base);
    let config = json!({"peft_type": "BOFT", "boft_block_size": 1, "target_modules": ["fc"]});
    let tensors = [
        (
            "base_model.model.fc.boft_R",
            Tensor::random(&[1, 6, 1, 1], 3),
        ),
        ("base_model.model.fc.boft_s", scale.clone()),
    ];
    let tensors = tensors.map(|(key, tensor)| (key.to_string(), tensor));
    write_adapter(&path("adapter"), &config, &tensors.into());
    let on = |command: &str, option: &str, input: &str, output: &str| {
        let arguments = [
            command,
            option,
            input,
            "--adapter",
            "adapter",
            "--output",
            output,
        ];
        let printed = succeed(folder.path(), &arguments);
        (printed, read(&path(output)))
    };
    let (printed, merged) = on("merge", "--base", "base.safetensors", "merged.safetensors");
    assert_eq!(printed, "merged.safetensors: 1 layer rotated\n");
    let numbers = weight.numbers.iter().zip(0..);
    let expected = numbers.map(|(x, at)| f64::from((*x as f32) * scale.numbers[at / 6] as f32));
    let expected = Tensor::new(&[4, 6], expected.collect());
    assert_eq!(merged["fc.weight"], expected);
    assert!(difference(&expected, &weight) > 0.5);

    let (_, restored) = on(
        "unmerge",
        "--merged",
        "merged.safetensors",
        "restored.safetensors",
    );
    assert!(difference(&restored["fc.weight"], &weight) < 1e-6);

    let record = convert_command("adapter", "record", "a.bpk");
    let refused = run(folder.path(), &record);
    assert_eq!(refused.code, 2);
    let line = "error: `fc` has blocks of one channel, which do not rotate, and a scale, which Burn's adapters do not have alone; merge it\n";
    assert!(refused.stderr.ends_with(line), "{}", refused.stderr);
}

#[test]
fn a_count_of_another_precision_is_refused() {
    let case = Case::open("cases/boft-mlp-saved-batch-norm");
    let folder = case.folder();
    let mut base = case.base.clone();
    let key = "norm.num_batches_tracked";
    base.get_mut(key).unwrap().dtype = Dtype::I32;
    write(&folder.path().join("base.safetensors"), &base);
    let merge = [
        "merge",
        "--base",
        "base.safetensors",
        "--adapter",
        case.adapter(),
    ];
    for last in [&["--dry-run"][..], &["--output", "out"]] {
        assert_eq!(
            refused(folder.path(), &[&merge, last].concat()),
            format!("base.safetensors: `{key}` is [] i32, and the adapter's `{key}` is [] i64")
        );
    }
}

#[test]
fn merging_refuses_to_write_nan_or_infinity() {
    let place = MergeFolder::new();
    let line = "would not be finite: it or the adapter holds NaN, infinity or numbers beyond its precision";
    for number in [f64::NAN, f64::INFINITY] {
        let mut base = place.base.clone();
        base.get_mut("fc2.weight").unwrap().numbers[3] = number;
        place.write_base(&base);
        assert_eq!(
            place.refused(),
            format!("base.safetensors: `fc2.weight` {line}")
        );
    }
    let mut base = place.base.clone();
    let weight = base.get_mut("fc1.weight").unwrap();
    weight.numbers.fill(65504.0);
    *weight = weight.cast(Dtype::F16);
    place.write_base(&base);
    assert_eq!(
        place.refused(),
        format!("base.safetensors: `fc1.weight` {line}")
    );

    place.write_base(&place.base);
    let mut tensors = place.tensors.clone();
    tensors
        .get_mut("base_model.model.fc1.boft_s")
        .unwrap()
        .numbers[3] = f64::NAN;
    place.write_adapter(&place.config, &tensors);
    let run = run(
        place.path(),
        &merge_command("base.safetensors", "adapter", "out"),
    );
    assert_eq!(run.code, 2);
    assert_eq!(
        run.stderr,
        format!(
            "warning: the adapter of `fc1` holds NaN or infinity\nerror: base.safetensors: `fc1.weight` {line}\n"
        )
    );
    assert_eq!(names(place.path()), ["adapter", "base.safetensors"]);
}
