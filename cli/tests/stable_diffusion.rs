//! Adapters for Stable Diffusion in one layout of names, merged into models in the other.

use std::fs;
use std::path::Path;

use safetensors::tensor::Dtype;

use crate::files::*;

#[path = "../../tests/fixtures/stable_diffusion/pairs.rs"]
mod fixture;

/// The names of a model in both layouts, first that of diffusers.
fn pairs(model: &str) -> Vec<[String; 2]> {
    fixture::pairs(&fixtures(), model)
}

/// The shape of a module's weight, small and not square. `around` is that of the projections around transformer blocks.
fn shape(name: &str, around: &[usize]) -> Vec<usize> {
    let last = name.rsplit('.').next().unwrap();
    match last {
        "proj_in" | "proj_out" => around.to_vec(),
        _ if last.contains("norm") => vec![8],
        _ if name.contains("transformer_blocks") || name.contains("embedding") => vec![8, 6],
        "time_emb_proj" => vec![8, 6],
        "conv_shortcut" => vec![8, 6, 1, 1],
        _ => vec![8, 6, 3, 3],
    }
}

const CONVOLUTION: [usize; 4] = [8, 6, 1, 1];
const MATRIX: [usize; 2] = [8, 6];

/// A model in both layouts with the same numbers: a folder of diffusers' names, and a single file.
fn models(unet: &str, around: &[usize]) -> [Tensors; 2] {
    let places = ["", "model.diffusion_model."];
    [0, 1].map(|layout| {
        let tensors = pairs(unet).into_iter().enumerate().map(|(index, pair)| {
            let weight = Tensor::random(&shape(&pair[0], around), index as u64);
            (format!("{}{}.weight", places[layout], pair[layout]), weight)
        });
        tensors.collect()
    })
}

/// How a program stores the adapter of a layer of 8 outputs and so many inputs.
type Layer = fn(&str, usize, u64) -> Tensors;

/// LyCORIS's `diag-oft`, with scales.
fn diag_oft(module: &str, _: usize, seed: u64) -> Tensors {
    let tensor = |name: &str, tensor| (format!("{module}.{name}"), tensor);
    [
        tensor("oft_blocks", Tensor::random(&[2, 4, 4], seed)),
        tensor("alpha", Tensor::new(&[], vec![0.0])),
        tensor("rescale", Tensor::random(&[8, 1], seed + 1)),
    ]
    .into()
}

/// OFT of OneTrainer's and of sd-scripts' `networks.oft_v2`.
fn oft_v2(module: &str, inputs: usize, seed: u64) -> Tensors {
    let numbers = Tensor::random(&[inputs / 3, 3], seed);
    [(format!("{module}.oft_R.weight"), numbers)].into()
}

/// sd-scripts' `networks.boft`.
fn boft(module: &str, inputs: usize, seed: u64) -> Tensors {
    [
        (
            format!("{module}.boft_R"),
            Tensor::random(&[1, inputs / 3, 3, 3], seed),
        ),
        (
            format!("{module}.boft_s"),
            Tensor::random(&[8, 1], seed + 1),
        ),
    ]
    .into()
}

/// A file with a layer for every module whose weight is a matrix or a convolution, by its names in one of the layouts.
fn adapter(unet: &str, layout: usize, start: &str, layer: Layer) -> Tensors {
    let modules = pairs(unet).into_iter().enumerate();
    let layers = modules.filter_map(|(index, pair)| {
        let shape = shape(&pair[0], &CONVOLUTION);
        let inputs = shape[1..].iter().product();
        let name = match start.ends_with('_') {
            true => pair[layout].replace('.', "_"),
            false => pair[layout].clone(),
        };
        (shape.len() > 1).then(|| layer(&format!("{start}{name}"), inputs, 2 * index as u64))
    });
    layers.flatten().collect()
}

/// Writes the files and merges them.
fn merged(folder: &Path, base: &Tensors, adapter: &Tensors) -> Run {
    write(&folder.join("base.safetensors"), base);
    write(&folder.join("adapter.safetensors"), adapter);
    let arguments = merge_command(
        "base.safetensors",
        "adapter.safetensors",
        "merged.safetensors",
    );
    run(folder, &arguments)
}

/// The merged model, and what was said.
fn merge_into(folder: &Path, base: &Tensors, adapter: &Tensors) -> (Tensors, String) {
    let done = merged(folder, base, adapter);
    assert_eq!(done.code, 0, "{}", done.stderr);
    let merged = read(&folder.join("merged.safetensors"));
    fs::remove_file(folder.join("merged.safetensors")).unwrap();
    (merged, done.stderr)
}

/// Why the files are not merged: the last line, behind the notes on the adapter. Nothing is left behind.
fn refusal(folder: &Path, base: &Tensors, adapter: &Tensors) -> String {
    let refused = merged(folder, base, adapter);
    assert_eq!(refused.code, 2, "{}", refused.stderr);
    assert_eq!(names(folder), ["adapter.safetensors", "base.safetensors"]);
    let line = refused.stderr.lines().last().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_string()
}

#[test]
fn an_adapter_in_either_layout_merges_to_the_same_numbers_into_either() {
    let folder = tempfile::tempdir().unwrap();
    for (unet, start, layer) in [
        ("sd15", "lora_unet_", diag_oft as Layer),
        ("sd21", "lora_unet_", boft),
        ("sdxl", "lora_unet_", oft_v2),
        ("sdxl", "unet.", diag_oft),
    ] {
        let pairs = pairs(unet);
        let models = models(unet, &CONVOLUTION);
        for names in [0, 1] {
            let adapter = adapter(unet, names, start, layer);
            let [diffusers, original] = [0, 1].map(|layout| {
                let (merged, said) = merge_into(folder.path(), &models[layout], &adapter);
                let is_translated = said.contains(" names are translated from ");
                assert_eq!(is_translated, layout != names, "{said}");
                merged
            });
            let mut changed = 0;
            for pair in &pairs {
                let keys = [
                    format!("{}.weight", pair[0]),
                    format!("model.diffusion_model.{}.weight", pair[1]),
                ];
                assert_eq!(diffusers[&keys[0]], original[&keys[1]], "{keys:?}");
                changed += usize::from(diffusers[&keys[0]] != models[0][&keys[0]]);
            }
            assert_eq!(changed, shape_count(unet), "{unet}");
        }
    }
}

/// How many modules of a UNet have more than a vector.
fn shape_count(unet: &str) -> usize {
    let pairs = pairs(unet);
    let shapes = pairs.iter().map(|pair| shape(&pair[0], &CONVOLUTION));
    shapes.filter(|shape| shape.len() > 1).count()
}

#[test]
fn a_convolution_with_a_kernel_of_one_merges_to_the_numbers_of_a_matrix() {
    let folder = tempfile::tempdir().unwrap();
    let module = "lora_unet_down_blocks_1_attentions_0_proj_in";
    let key = "model.diffusion_model.input_blocks.4.1.proj_in.weight";
    for layer in [diag_oft as Layer, boft] {
        let adapter = layer(module, 6, 5);
        let [convolution, matrix] = [&CONVOLUTION[..], &MATRIX].map(|around| {
            let [_, original] = models("sd15", around);
            let (merged, _) = merge_into(folder.path(), &original, &adapter);
            assert_ne!(merged[key].numbers, original[key].numbers);
            assert_eq!(merged[key].shape, around);
            merged[key].numbers.clone()
        });
        assert_eq!(convolution, matrix);
    }
}

/// sd-scripts has convolutions where checkpoints of Stable Diffusion 2 have matrices, and turns them the other way.
#[test]
fn a_projection_of_sd_2_that_may_have_been_trained_as_a_convolution_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let module = "lora_unet_mid_block_attentions_0_proj_out";
    let adapter = oft_v2(module, 6, 5);
    for (model, path) in models("sd21", &MATRIX).iter().zip([
        "mid_block.attentions.0.proj_out",
        "model.diffusion_model.middle_block.1.proj_out",
    ]) {
        assert_eq!(
            refusal(folder.path(), model, &adapter),
            format!(
                "adapter.safetensors: sd-scripts trains `{module}` of Stable Diffusion 2 as a convolution where it loads a \
                 checkpoint and as a linear layer where it loads a folder of diffusers, and turns the two opposite ways; \
                 nothing says which was trained, so `{path}` cannot be merged here; merge it with sd-scripts"
            )
        );
    }
    // SDXL has linear layers in every program, and a convolution was trained as one.
    for (unet, around) in [("sdxl", &MATRIX[..]), ("sd21", &CONVOLUTION)] {
        for model in models(unet, around) {
            merge_into(folder.path(), &model, &oft_v2(module, 6, 5));
        }
    }
}

#[test]
fn a_name_whose_translation_is_no_module_is_refused_with_both_names() {
    let folder = tempfile::tempdir().unwrap();
    let module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q";
    let adapter = diag_oft(module, 6, 5);
    let [_, original] = models("sd15", &CONVOLUTION);
    let line = refusal(folder.path(), &original, &adapter);
    let expected = format!(
        "adapter.safetensors: the model has no module that a file would call `{module}`, or \
         `lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q` in the layout of its UNet; the nearest are "
    );
    assert!(line.starts_with(&expected), "{line}");
}

#[test]
fn a_checkpoint_with_a_unet_in_each_layout_is_refused_with_both_modules() {
    let folder = tempfile::tempdir().unwrap();
    let [diffusers, mut both] = models("sdxl", &MATRIX);
    both.extend(
        diffusers
            .into_iter()
            .map(|(key, tensor)| (format!("unet.{key}"), tensor)),
    );
    let module = "lora_unet_down_blocks_1_attentions_0_proj_in";
    let adapter = oft_v2(module, 6, 5);
    assert_eq!(
        refusal(folder.path(), &both, &adapter),
        format!(
            "adapter.safetensors: a file would call `model.diffusion_model.input_blocks.4.1.proj_in`, \
             `unet.down_blocks.1.attentions.0.proj_in` of the model `{module}`; rename it to one of them with --map"
        )
    );
}

/// Where SDXL keeps OpenCLIP's text encoder.
const OPEN_CLIP: &str = "conditioner.embedders.1.model.";

/// A text encoder with the names of transformers, and as OpenCLIP stores it.
fn text_encoders() -> [Tensors; 2] {
    let mut models = [Tensors::new(), Tensors::new()];
    for (index, [diffusers, original]) in pairs("open-clip").into_iter().enumerate() {
        let shape: &[usize] = match diffusers.rsplit('.').next().unwrap() {
            "fc1" => &[8, 6],
            "fc2" => &[8, 15],
            name if name.contains("norm") => &[8],
            _ => &[8, 6],
        };
        let weight = Tensor::random(shape, index as u64);
        let key = match original.split_once('#') {
            // Put together below.
            Some(_) => None,
            None => Some(format!("{OPEN_CLIP}{original}.weight")),
        };
        // Its length says how the weight is stored, whose name is one of GPT-2's.
        if original.contains("mlp.c_") {
            let bias = Tensor::random(&[8], 100 + index as u64);
            models[0].insert(format!("text_encoder_2.{diffusers}.bias"), bias.clone());
            models[1].insert(format!("{OPEN_CLIP}{original}.bias"), bias);
        }
        models[1].extend(key.map(|key| (key, weight.clone())));
        models[0].insert(format!("text_encoder_2.{diffusers}.weight"), weight);
    }
    for layer in 0..3 {
        let attention = format!("text_encoder_2.text_model.encoder.layers.{layer}.self_attn");
        let parts =
            ["q", "k", "v"].map(|name| &models[0][&format!("{attention}.{name}_proj.weight")]);
        let numbers = parts.iter().flat_map(|part| part.numbers.clone()).collect();
        let key = format!("{OPEN_CLIP}transformer.resblocks.{layer}.attn.in_proj_weight");
        let weight = Tensor::new(&[24, 6], numbers);
        models[1].insert(key, weight);
    }
    models
}

/// The layers of the text encoder that programs train.
fn text_layers() -> Vec<String> {
    let names = pairs("open-clip")
        .into_iter()
        .map(|[diffusers, _]| diffusers);
    let trained = |name: &String| name.contains("_proj") || name.contains(".mlp.");
    names.filter(trained).collect()
}

/// What is in the model of transformers where OpenCLIP's has one of its numbers.
fn of_transformers(model: &Tensors) -> Tensors {
    let mut found = Tensors::new();
    for [diffusers, original] in pairs("open-clip") {
        let weight = match original.split_once('#') {
            None => model[&format!("{OPEN_CLIP}{original}.weight")].clone(),
            Some((key, part)) => {
                let part: usize = part.strip_suffix("/3").unwrap().parse().unwrap();
                let whole = &model[&format!("{OPEN_CLIP}{key}")];
                let count = whole.numbers.len() / 3;
                let numbers = whole.numbers[part * count..(part + 1) * count].to_vec();
                Tensor::new(&[8, 6], numbers)
            }
        };
        found.insert(format!("text_encoder_2.{diffusers}.weight"), weight);
    }
    found
}

#[test]
fn the_thirds_of_a_fused_projection_are_merged_like_the_projections() {
    let folder = tempfile::tempdir().unwrap();
    let models = text_encoders();
    for layer in [diag_oft as Layer, oft_v2, boft] {
        let layers = text_layers().into_iter().enumerate().map(|(index, name)| {
            let inputs = models[0][&format!("text_encoder_2.{name}.weight")].shape[1];
            let name = format!("lora_te2_{}", name.replace('.', "_"));
            layer(&name, inputs, 2 * index as u64)
        });
        let mut adapter: Tensors = layers.flatten().collect();
        assert_eq!(text_layers().len(), 3 * 6);
        let [expected, merged] =
            [0, 1].map(|layout| merge_into(folder.path(), &models[layout], &adapter));
        assert!(!expected.1.contains("translated"), "{}", expected.1);
        let said = "note: 18 names are translated from transformers' text encoder to OpenCLIP's, which the model has; ";
        assert!(merged.1.contains(said), "{}", merged.1);
        let weights = |model: &Tensors| {
            let weights = model.iter().filter(|(key, _)| key.ends_with(".weight"));
            weights
                .map(|(key, tensor)| (key.clone(), tensor.clone()))
                .collect::<Tensors>()
        };
        assert_eq!(of_transformers(&merged.0), weights(&expected.0));
        let count = |model: &Tensors| {
            model
                .iter()
                .filter(|(key, tensor)| models[0][*key] != **tensor)
                .count()
        };
        assert_eq!(count(&of_transformers(&merged.0)), 18);

        // One of the three alone changes its own rows.
        adapter.retain(|key, _| key.contains("layers_1_self_attn_k_proj"));
        let (merged, _) = merge_into(folder.path(), &models[1], &adapter);
        let merged = of_transformers(&merged);
        assert_eq!(count(&merged), 1);
        let key = "text_encoder_2.text_model.encoder.layers.1.self_attn.k_proj.weight";
        assert_eq!(merged[key], expected.0[key]);
    }
}

#[test]
fn a_fused_projection_is_restored_and_has_no_other_form() {
    let folder = tempfile::tempdir().unwrap();
    let [_, model] = text_encoders();
    let module = "lora_te2_text_model_encoder_layers_0_self_attn_v_proj";
    let adapter = boft(module, 6, 5);
    let (merged, _) = merge_into(folder.path(), &model, &adapter);
    write(&folder.path().join("merged.safetensors"), &merged);
    let arguments = [
        "unmerge",
        "--merged",
        "merged.safetensors",
        "--adapter",
        "adapter.safetensors",
        "--output",
        "restored.safetensors",
    ];
    succeed(folder.path(), &arguments);
    let key = format!("{OPEN_CLIP}transformer.resblocks.0.attn.in_proj_weight");
    let restored = read(&folder.path().join("restored.safetensors"));
    assert_ne!(merged[&key], model[&key]);
    assert!(difference(&restored[&key], &model[&key]) < TOLERANCE);
    for arguments in [
        convert_for("base.safetensors", "adapter.safetensors", "peft", "out").to_vec(),
        [
            "convert",
            "adapter.safetensors",
            "--to-lora",
            "2",
            "--base",
            "base.safetensors",
            "--output",
            "out",
        ]
        .to_vec(),
    ] {
        let run = run(folder.path(), &arguments);
        assert_eq!(run.code, 2);
        let line = format!(
            "error: `{OPEN_CLIP}transformer.resblocks.0.attn.v_proj` is a third of the rows of `{key}`, which only \
             a merged model can say; merge it, or convert it for the same model in diffusers' layout\n"
        );
        assert!(run.stderr.ends_with(&line), "{}", run.stderr);
    }
}

#[test]
fn a_fused_projection_that_has_no_thirds_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let [_, mut model] = text_encoders();
    let module = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj";
    let key = format!("{OPEN_CLIP}transformer.resblocks.0.attn.in_proj_weight");
    let adapter = diag_oft(module, 6, 5);
    for (shape, expected) in [
        (
            &[25, 6][..],
            format!("the model has no module that a file would call `{module}`"),
        ),
        (
            &[24, 6, 1],
            format!("the model has no module that a file would call `{module}`"),
        ),
        (
            &[30, 6],
            format!("the adapter of `{module}`: it rotates 8 outputs, the layer has 10"),
        ),
    ] {
        model.insert(key.clone(), Tensor::random(shape, 1));
        let line = refusal(folder.path(), &model, &adapter);
        assert!(line.contains(&expected), "{line}");
    }
    // An attention of which no precision is turned.
    model.insert(key, Tensor::new(&[24, 6], vec![1.0; 144]).cast(Dtype::I64));
    let line = refusal(folder.path(), &model, &adapter);
    assert!(
        line.contains("rotates weights in f64, f32, f16 and bf16 only"),
        "{line}"
    );
}

#[test]
fn inspect_and_merge_say_which_layout_the_names_have() {
    let folder = tempfile::tempdir().unwrap();
    let module = "lora_unet_down_blocks_0_resnets_0_conv1";
    let [_, original] = models("sd15", &CONVOLUTION);
    let (_, said) = merge_into(folder.path(), &original, &boft(module, 54, 5));
    let note = format!(
        "note: one name is translated from diffusers' layout (down_blocks) of a UNet to the original layout (input_blocks), \
         which the model has; `{module}` is `model.diffusion_model.input_blocks.1.0.in_layers.2`\n"
    );
    assert!(said.contains(&note), "{said}");
    let text = succeed(folder.path(), &["inspect", "adapter.safetensors"]);
    let line =
        "names         lora_unet_… with `_` for dots, a UNet in diffusers' layout (down_blocks)\n";
    assert!(text.contains(line), "{text}");
}
