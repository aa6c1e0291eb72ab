//! The two layouts of Stable Diffusion's names, with the pairs that diffusers makes of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use burn_boft::KeyMap;
use burn_boft::dialects::{AdapterFile, DialectError, Misplaced};
use burn_boft::value::AdapterLayer;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

const UNETS: [&str; 4] = ["sd15", "sd21", "sdxl", "sdxl-refiner"];

#[path = "../fixtures/stable_diffusion/pairs.rs"]
mod fixture;

/// The names of a model in both layouts, first that of diffusers.
fn pairs(model: &str) -> Vec<[String; 2]> {
    fixture::pairs(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"),
        model,
    )
}

/// A file of LyCORIS with a layer for each of these modules, which rotates four outputs by an angle of its own.
fn file(modules: &BTreeSet<String>) -> AdapterFile {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let bytes = |numbers: &[f32]| numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    let numbers: Vec<Vec<u8>> = (1..=modules.len())
        .map(|angle| bytes(&[0.0, angle as f32 / 8192.0, 0.0, 0.0, 0.0, 0.3, 0.05, 0.0]))
        .collect();
    let zero = bytes(&[0.0]);
    let tensors = modules.iter().zip(&numbers).flat_map(|(module, numbers)| {
        let blocks = TensorView::new(Dtype::F32, vec![2, 2, 2], numbers).unwrap();
        let alpha = TensorView::new(Dtype::F32, vec![], &zero).unwrap();
        [
            (format!("{module}.oft_blocks"), blocks),
            (format!("{module}.alpha"), alpha),
        ]
    });
    fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    AdapterFile::read(path).unwrap()
}

/// A model with these modules.
fn model<'a>(start: &str, names: impl Iterator<Item = &'a String>) -> BTreeMap<String, Vec<usize>> {
    let module = |name: &String| (format!("{start}{name}"), vec![4, 6]);
    names.map(module).collect()
}

/// How a file writes a name.
fn written(start: &str, name: &str) -> String {
    match start.ends_with('_') {
        true => format!("{start}{}", name.replace('.', "_")),
        false => format!("{start}{name}"),
    }
}

/// Places a file into a model: the path of every module of the file, told by its angle, and the notes.
fn place(
    file: &AdapterFile,
    model: &BTreeMap<String, Vec<usize>>,
) -> (BTreeMap<String, String>, Vec<String>) {
    let placed = file.place(model, &KeyMap::new()).unwrap();
    let angle = |layer: &AdapterLayer| layer.skew().iter::<f32>().next().unwrap().to_bits();
    let layers = placed.adapter.layers().iter();
    let paths: BTreeMap<_, _> = layers.map(|layer| (angle(layer), layer.path())).collect();
    assert_eq!(paths.len(), file.layers().len());
    let found = file.layers().iter().map(|layer| {
        let path = paths[&angle(layer.layer())];
        (layer.module().to_string(), path.to_string())
    });
    (found.collect(), placed.notes)
}

/// The names that find nothing, and what the file would call them in the other layout.
fn lost(
    file: &AdapterFile,
    model: &BTreeMap<String, Vec<usize>>,
) -> BTreeMap<String, Option<String>> {
    let Err(DialectError::Misplaced { misplaced, .. }) = file.place(model, &KeyMap::new()) else {
        panic!("everything was found");
    };
    let lost = misplaced.into_iter().map(|misplaced| match misplaced {
        Misplaced::Nowhere {
            module, translated, ..
        } => (module, translated),
        other => panic!("{other}"),
    });
    lost.collect()
}

#[test]
fn every_module_of_a_unet_is_found_under_its_name_in_the_other_layout() {
    for (unet, modules) in UNETS.into_iter().zip([391, 391, 1050, 742]) {
        let pairs = pairs(unet);
        assert_eq!(pairs.len(), modules, "{unet}");
        for (own, other) in [(0, 1), (1, 0)] {
            for (start, place_of_part) in [
                ("lora_unet_", "model.diffusion_model."),
                ("lycoris_", ""),
                ("unet.", "model.diffusion_model."),
                ("diffusion_model.", "unet."),
            ] {
                let model = model(place_of_part, pairs.iter().map(|pair| &pair[own]));
                let expected: BTreeMap<_, _> = pairs
                    .iter()
                    .map(|pair| {
                        (
                            written(start, &pair[other]),
                            format!("{place_of_part}{}", pair[own]),
                        )
                    })
                    .collect();
                let (found, notes) = place(&file(&expected.keys().cloned().collect()), &model);
                assert_eq!(found, expected, "{unet}");
                let first = expected.first_key_value().unwrap();
                let [from, to] = match own {
                    0 => [
                        "the original layout (input_blocks)",
                        "diffusers' layout (down_blocks)",
                    ],
                    _ => [
                        "diffusers' layout (down_blocks)",
                        "the original layout (input_blocks)",
                    ],
                };
                let note = format!(
                    "{modules} names are translated from {from} of a UNet to {to}, which the model has; `{}` is `{}`",
                    first.0, first.1
                );
                assert_eq!(notes, [note]);
            }
        }
    }
}

#[test]
fn a_name_in_the_layout_of_the_model_is_no_translation() {
    let pairs = pairs("sdxl");
    for own in [0, 1] {
        let model = model("unet.", pairs.iter().map(|pair| &pair[own]));
        let names = pairs.iter().map(|pair| written("lora_unet_", &pair[own]));
        let (_, notes) = place(&file(&names.collect()), &model);
        assert!(notes.is_empty(), "{notes:?}");
    }
}

#[test]
fn no_name_of_another_unet_is_found() {
    let all: BTreeSet<_> = UNETS.into_iter().flat_map(pairs).flatten().collect();
    for unet in UNETS {
        let pairs = pairs(unet);
        for own in [0, 1] {
            let known: BTreeSet<_> = pairs.iter().flatten().collect();
            let mut strange: BTreeSet<_> = all
                .iter()
                .filter(|name| !known.contains(name))
                .cloned()
                .collect();
            // Names that are longer or shorter than one of the model.
            strange.extend(known.iter().map(|name| format!("{name}.x")));
            strange.extend(
                known
                    .iter()
                    .filter_map(|name| Some(name.rsplit_once('.')?.0.to_string())),
            );
            let strange: BTreeSet<_> = strange
                .iter()
                .filter(|name| !known.contains(name))
                .collect();
            let names: BTreeSet<_> = strange.iter().map(|name| written("unet.", name)).collect();
            let model = model("unet.", pairs.iter().map(|pair| &pair[own]));
            let lost = lost(&file(&names), &model);
            assert_eq!(lost.into_keys().collect::<BTreeSet<_>>(), names, "{unet}");
        }
    }
}

#[test]
fn a_name_of_a_module_that_is_not_there_is_refused_with_its_translation() {
    let pairs = pairs("sd15");
    for (own, other) in [(0, 1), (1, 0)] {
        let missing = pairs
            .iter()
            .find(|pair| pair[0].ends_with("blocks.0.attn2.to_v"))
            .unwrap();
        let there = pairs.iter().filter(|pair| *pair != missing);
        let model = model("unet.", there.map(|pair| &pair[own]));
        for start in ["oft_unet_", "lora_unet_", "diffusion_model."] {
            let name = written(start, &missing[other]);
            let lost = lost(&file(&[name.clone()].into()), &model);
            assert_eq!(lost, [(name, Some(written(start, &missing[own])))].into());
        }
    }
}

#[test]
fn a_unet_of_which_modules_are_missing_is_not_translated() {
    let pairs = pairs("sd15");
    let name = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q".to_string();
    let file = file(&[name.clone()].into());
    let whole = model("", pairs.iter().map(|pair| &pair[1]));
    let found = "output_blocks.3.1.transformer_blocks.0.attn1.to_q".to_string();
    assert_eq!(place(&file, &whole).0, [(name.clone(), found)].into());
    for missing in [
        "input_blocks.6.0.op",
        "output_blocks.2.1.conv",
        "input_blocks.5.0.in_layers.2",
        "output_blocks.11.0.in_layers.2",
    ] {
        let mut model = whole.clone();
        assert!(model.remove(missing).is_some(), "{missing}");
        assert_eq!(
            lost(&file, &model),
            [(name.clone(), None)].into(),
            "{missing}"
        );
    }
    // A change of resolution without a resnet before it, in a model that is nothing else.
    let nothing = ["output_blocks.0.1.conv", "input_blocks.1.0.op"]
        .map(|name| (name.to_string(), vec![4, 6]));
    assert_eq!(lost(&file, &nothing.into()), [(name.clone(), None)].into());
    // A UNet with something of another kind in its blocks.
    let mut model = whole;
    model.insert("input_blocks.1.0.time_stack.in_layers.2".into(), vec![4, 6]);
    assert_eq!(lost(&file, &model), [(name, None)].into());
}

/// Levels of one resnet, as in BK-SDM: their blocks are counted otherwise than those of levels of two.
#[test]
fn blocks_are_counted_from_the_modules_of_the_model() {
    let mut names = Vec::new();
    for (block, resnets) in [("down_blocks", 1), ("up_blocks", 2)] {
        for level in 0..3 {
            for resnet in 0..resnets {
                names.push(format!("{block}.{level}.resnets.{resnet}.conv1"));
                names.push(format!("{block}.{level}.attentions.{resnet}.proj_in"));
            }
        }
    }
    names.extend([0, 1].map(|level| format!("down_blocks.{level}.downsamplers.0.conv")));
    names.extend([0, 1].map(|level| format!("up_blocks.{level}.upsamplers.0.conv")));
    let model = model("", names.iter());
    for (name, path) in [
        (
            "input_blocks.3.1.proj_in",
            "down_blocks.1.attentions.0.proj_in",
        ),
        (
            "input_blocks.5.0.in_layers.2",
            "down_blocks.2.resnets.0.conv1",
        ),
        ("output_blocks.1.2.conv", "up_blocks.0.upsamplers.0.conv"),
        (
            "output_blocks.5.1.proj_in",
            "up_blocks.2.attentions.1.proj_in",
        ),
    ] {
        let name = written("lora_unet_", name);
        let (found, _) = place(&file(&[name.clone()].into()), &model);
        assert_eq!(found, [(name, path.to_string())].into());
    }
}

#[test]
fn two_unets_in_both_layouts_are_refused_together() {
    let pairs = pairs("sd21");
    let mut both = model("unet.", pairs.iter().map(|pair| &pair[0]));
    both.extend(model(
        "model.diffusion_model.",
        pairs.iter().map(|pair| &pair[1]),
    ));
    for name in &pairs[40] {
        let file = file(&[written("lora_unet_", name)].into());
        let error = file.place(&both, &KeyMap::new()).unwrap_err();
        let DialectError::Misplaced { misplaced, .. } = error else {
            panic!("{error}");
        };
        let [Misplaced::Several { found, .. }] = &misplaced[..] else {
            panic!("{misplaced:?}");
        };
        let [diffusers, original] = &pairs[40];
        assert_eq!(
            found,
            &[
                format!("model.diffusion_model.{original}"),
                format!("unet.{diffusers}")
            ]
        );
    }
}

#[test]
fn the_text_encoders_of_open_clip_are_found_under_the_names_of_transformers() {
    let pairs = pairs("open-clip");
    let own = |name: &String| match name.split_once("in_proj_weight#") {
        Some((attention, "0/3")) => format!("{attention}q_proj"),
        Some((attention, "1/3")) => format!("{attention}k_proj"),
        Some((attention, "2/3")) => format!("{attention}v_proj"),
        Some(other) => panic!("{other:?}"),
        None => name.clone(),
    };
    let names: Vec<_> = pairs.iter().map(|pair| own(&pair[1])).collect();
    for (start, place_of_part) in [
        ("lora_te2_", "conditioner.embedders.1.model."),
        ("text_encoder_2.", "conditioner.embedders.0.model."),
        ("lora_te_", "cond_stage_model.model."),
        (
            "text_encoders.clip_h.transformer.",
            "cond_stage_model.model.",
        ),
        ("clip_g.", ""),
    ] {
        let model = model(place_of_part, names.iter());
        let in_blocks = pairs
            .iter()
            .zip(&names)
            .filter(|(pair, _)| pair[0].contains(".layers."));
        let expected: BTreeMap<_, _> = in_blocks
            .map(|(pair, name)| (written(start, &pair[0]), format!("{place_of_part}{name}")))
            .collect();
        assert_eq!(expected.len(), 3 * 8);
        let (found, notes) = place(&file(&expected.keys().cloned().collect()), &model);
        assert_eq!(found, expected, "{start}");
        let said = "24 names are translated from transformers' text encoder to OpenCLIP's, which the model has; ";
        assert!(notes[0].starts_with(said), "{notes:?}");
    }
}

#[test]
fn a_file_says_which_layout_it_has() {
    let layouts =
        |names: &[&str]| file(&names.iter().map(|name| name.to_string()).collect()).key_styles();
    let start = "lora_unet_… with `_` for dots";
    let diffusers = "a UNet in diffusers' layout (down_blocks)";
    let original = "a UNet in the original layout (input_blocks)";
    assert_eq!(
        layouts(&["lora_unet_mid_block_attentions_0_proj_in"]),
        [start, diffusers]
    );
    assert_eq!(
        layouts(&["lora_unet_input_blocks_4_1_proj_in"]),
        [start, original]
    );
    assert_eq!(
        layouts(&["lora_unet_middle_block_1_proj_in"]),
        [start, original]
    );
    assert_eq!(
        layouts(&["unet.up_blocks.1.upsamplers.0.conv"]),
        ["unet.… dotted", diffusers]
    );
    assert_eq!(layouts(&["lora_unet_single_blocks_0_linear1"]), [start]);
    assert_eq!(
        layouts(&["lora_te_down_blocks_0_resnets_0_conv1"]),
        ["lora_te_… with `_` for dots"]
    );
}
