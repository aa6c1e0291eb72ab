//! Adapters of other programs: `merge`, `inspect`, `convert` and `formats` on files of LyCORIS, OneTrainer and sd-scripts.

use std::fs;
use std::path::{Path, PathBuf};

use burn_boft::dialects::Dialect;
use serde_json::json;

use crate::files::*;

/// One folder of `tests/fixtures/lycoris/cases` or `tests/fixtures/formulas/cases`.
struct Foreign {
    name: String,
    folder: PathBuf,
    base: Tensors,
    merged: Tensors,
}

impl Foreign {
    fn open(name: &str) -> Self {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        let folder = fixtures.join(name);
        Self {
            name: name.to_string(),
            base: read(&folder.join("base.safetensors")),
            merged: read(&folder.join("merged.safetensors")),
            folder,
        }
    }

    fn all() -> Vec<Self> {
        let cases = ["lycoris/cases", "formulas/cases"]
            .into_iter()
            .flat_map(|cases| {
                let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
                let names = names(&fixtures.join(cases)).into_iter();
                names.map(move |name| Self::open(&format!("{cases}/{name}")))
            });
        cases.collect()
    }

    fn path(&self, file: &str) -> String {
        self.folder.join(file).to_str().unwrap().to_string()
    }

    fn adapter(&self) -> String {
        self.path("adapter.safetensors")
    }

    /// The arguments that merge the adapter into the base.
    fn merge(&self, output: &str) -> Vec<String> {
        let (base, adapter) = (self.path("base.safetensors"), self.adapter());
        let arguments = merge_command(&base, &adapter, output);
        arguments.map(str::to_string).to_vec()
    }
}

fn texts(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// The largest difference between two models, relative to the largest number of each tensor.
fn deviation(found: &Tensors, expected: &Tensors) -> f64 {
    assert!(found.keys().eq(expected.keys()));
    let pairs = found.values().zip(expected.values());
    let each = pairs.map(|(found, expected)| {
        assert_eq!(found.shape, expected.shape);
        let scale = expected.numbers.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let pairs = found.numbers.iter().zip(&expected.numbers);
        pairs.fold(0.0f64, |m, (x, y)| m.max((x - y).abs())) / scale
    });
    each.fold(0.0, f64::max)
}

/// What merging may differ by from the programs, which compute in f32 too. 4.0e-7 was measured, in `boft-bounded`.
const DEVIATION: f64 = 1e-6;

#[test]
fn merging_makes_what_the_program_makes_that_wrote_the_file() {
    let cases = Foreign::all();
    assert!(cases.len() >= 38, "the fixtures are there");
    let mut largest = (0.0, String::new());
    for case in cases {
        let folder = tempfile::tempdir().unwrap();
        succeed(folder.path(), &texts(&case.merge("merged.safetensors")));
        let merged = read(&folder.path().join("merged.safetensors"));
        let deviation = deviation(&merged, &case.merged);
        assert!(deviation < DEVIATION, "{}: {deviation:e}", case.name);
        assert_ne!(merged, case.base, "{}", case.name);
        if deviation > largest.0 {
            largest = (deviation, case.name);
        }
    }
    println!("largest deviation: {:.1e} in {}", largest.0, largest.1);
}

#[test]
fn unmerging_restores_what_was_there_before() {
    for name in [
        "lycoris/cases/boft-bounded-rescaled",
        "lycoris/cases/diag-oft-rescaled",
        "formulas/cases/oft-v2-b4",
    ] {
        let case = Foreign::open(name);
        let folder = tempfile::tempdir().unwrap();
        let (merged, adapter) = (case.path("merged.safetensors"), case.adapter());
        let arguments = [
            "unmerge",
            "--merged",
            &merged,
            "--adapter",
            &adapter,
            "--output",
            "base.safetensors",
        ];
        succeed(folder.path(), &arguments);
        let base = read(&folder.path().join("base.safetensors"));
        let deviation = deviation(&base, &case.base);
        assert!(deviation < 1e-5, "{name}: {deviation:e}");
    }
}

#[test]
fn rows_that_are_rotated_together_stay_together_in_a_wide_model() {
    // A weight of more numbers than are computed with at a time, and spans of 8 of its rows.
    let folder = tempfile::tempdir().unwrap();
    let (rows, columns) = (24, 200_000);
    let weight = Tensor::random(&[rows, columns], 1);
    let narrow = |weight: &Tensor| {
        let first = weight
            .numbers
            .chunks(columns)
            .flat_map(|row| row[..7].to_vec());
        Tensor::new(&[rows, 7], first.collect())
    };
    let blocks = Tensor::random(&[2, 6, 4, 4], 2);
    let adapter = [
        ("w.oft_blocks", blocks),
        ("w.alpha", Tensor::new(&[], vec![0.0])),
    ];
    write(
        &folder.path().join("adapter.safetensors"),
        &adapter
            .map(|(key, tensor)| (key.to_string(), tensor))
            .into(),
    );
    let mut merged = Vec::new();
    for (name, weight) in [("wide", weight.clone()), ("narrow", narrow(&weight))] {
        let base = format!("{name}.safetensors");
        write(
            &folder.path().join(&base),
            &[("w.weight".to_string(), weight)].into(),
        );
        let output = format!("{name}-merged.safetensors");
        succeed(
            folder.path(),
            &merge_command(&base, "adapter.safetensors", &output),
        );
        merged.push(read(&folder.path().join(&output))["w.weight"].clone());
    }
    let first = [("w".to_string(), narrow(&merged[0]))].into();
    assert!(deviation(&first, &[("w".to_string(), merged[1].clone())].into()) < 1e-6);
}

#[test]
fn what_rotates_inputs_becomes_a_folder_of_peft_that_merges_to_the_same() {
    let exact = ["oft-v2", "scaled-oft", "sd-scripts-boft"];
    let mut converted = 0;
    for case in Foreign::all() {
        let name = case.name.rsplit('/').next().unwrap();
        if !exact.iter().any(|start| name.starts_with(start)) {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let (base, adapter) = (case.path("base.safetensors"), case.adapter());
        let arguments = convert_for(&base, &adapter, "peft", "peft");
        let text = succeed(folder.path(), &arguments);
        let error = "their rotations and scales differ from those of the input by 0.0e0\n";
        assert!(text.ends_with(error), "{name}: {text}");
        succeed(
            folder.path(),
            &merge_command(&base, "peft", "merged.safetensors"),
        );
        let merged = read(&folder.path().join("merged.safetensors"));
        assert!(deviation(&merged, &case.merged) < DEVIATION, "{name}");
        converted += 1;
    }
    assert_eq!(converted, 13);
}

#[test]
fn what_rotates_outputs_is_refused_by_every_form_but_a_lora() {
    let case = Foreign::open("lycoris/cases/boft-rescaled");
    let folder = tempfile::tempdir().unwrap();
    let (base, adapter) = (case.path("base.safetensors"), case.adapter());
    for to in ["peft", "boft", "oft", "record", "sd-scripts"] {
        let arguments = convert_for(&base, &adapter, to, "out");
        let run = run(folder.path(), &arguments);
        assert_eq!(run.code, 2, "{to}");
        assert!(
            run.stderr.ends_with(
                "error: `down_blocks.0.attn.to_out.0` rotates its outputs, and every form but a LoRA rotates inputs: no \
                 rotation of the inputs does the same; merge it, or convert it with --to-lora\n"
            ),
            "{to}: {}",
            run.stderr
        );
    }
    let arguments = [
        "convert",
        &adapter,
        "--to-lora",
        "16",
        "--base",
        &base,
        "--output",
        "lora",
    ];
    let text = succeed(folder.path(), &arguments);
    assert!(text.contains("down_blocks.0.attn.to_q: "), "{text}");
    assert!(names(folder.path()) == ["lora"]);
}

#[test]
fn an_adapter_of_peft_becomes_a_file_that_merges_to_the_same() {
    for name in [
        "cases/oft-conv-neumann-b9",
        "cases/oft-linear-neumann-5",
        "cases/oft-linear-share-neumann",
        "cases/boft-conv-m2-b6",
        "cases/boft-linear-m3-b4",
        "cases/oft-linear-exact-b4",
    ] {
        let case = Case::open(name);
        let folder = case.folder();
        let arguments = convert_for(
            "base.safetensors",
            case.adapter(),
            "sd-scripts",
            "a.safetensors",
        );
        let text = succeed(folder.path(), &arguments);
        assert!(
            text.ends_with("differ from those of the input by 0.0e0\n"),
            "{name}: {text}"
        );
        let arguments = merge_command("base.safetensors", "a.safetensors", "merged.safetensors");
        succeed(folder.path(), &arguments);
        let merged = read(&folder.path().join("merged.safetensors"));
        assert_models(&merged, &case.merged, TOLERANCE, name);
        let keys = read(&folder.path().join("a.safetensors"));
        assert!(
            keys.keys().all(|key| key.starts_with("lora_unet_")),
            "{name}"
        );
    }
    // What the program would compute otherwise.
    let case = Case::open("cases/oft-linear-coft-on");
    let folder = case.folder();
    let arguments = convert_for(
        "base.safetensors",
        case.adapter(),
        "sd-scripts",
        "a.safetensors",
    );
    let line = refused(folder.path(), &arguments);
    assert!(line.contains("COFT radius"), "{line}");
}

#[test]
fn names_that_no_module_has_are_refused_before_a_file_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": false, "target_modules": ["q"]
    });
    let key = "base_model.model.a.q.oft_R.weight".to_string();
    let rotation = [(key, Tensor::random(&[2, 6], 1))].into();
    write_adapter(&folder.path().join("adapter"), &config, &rotation);
    let base = [("a.q.weight".to_string(), Tensor::random(&[6, 8], 2))].into();
    write(&folder.path().join("base.safetensors"), &base);
    let convert = convert_for("base.safetensors", "adapter", "sd-scripts", "a.safetensors");
    for (start, module) in [
        ("foo_", "foo_a_q"),
        ("lora_unet", "lora_uneta_q"),
        ("", "a_q"),
    ] {
        assert_eq!(
            refused(folder.path(), &[&convert[..], &["--part", start]].concat()),
            format!(
                "a.safetensors: with --part {start:?} a layer would be called `{module}`, which is not how a file names any \
                 module of the model; start names as sd-scripts does, with lora_unet_ or lora_te_"
            )
        );
        assert_eq!(names(folder.path()), ["adapter", "base.safetensors"]);
    }
    succeed(
        folder.path(),
        &[&convert[..], &["--part", "lora_te_"]].concat(),
    );
    let keys = read(&folder.path().join("a.safetensors"));
    assert!(keys.keys().all(|key| key.starts_with("lora_te_a_q.")));
}

/// A device cannot be read again, and need not be.
#[cfg(unix)]
#[test]
fn a_file_for_sd_scripts_can_be_written_to_a_device() {
    let case = Case::open("cases/boft-linear-m3-b4");
    let convert = convert_for(
        "base.safetensors",
        case.adapter(),
        "sd-scripts",
        "/dev/null",
    );
    let text = succeed(case.folder().path(), &convert);
    assert!(
        text.ends_with("differ from those of the input by 0.0e0\n"),
        "{text}"
    );
}

#[test]
fn inspect_names_the_dialect_the_program_the_names_and_the_bound() {
    let case = Foreign::open("lycoris/cases/diag-oft-bounded-rescaled");
    let folder = tempfile::tempdir().unwrap();
    let text = succeed(folder.path(), &["inspect", &case.adapter()]);
    let expected = "\
dialect       lycoris-diag-oft
program       LyCORIS, which the file does not name
rotates       outputs
names         lycoris_… with `_` for dots
alpha         0.02
layers        4
";
    assert!(text.starts_with(expected), "{text}");
    assert!(
        text.contains("\nunusual       alpha bounds 3 of 4 layers"),
        "{text}"
    );

    for (name, program) in [
        (
            "formulas/cases/oft-v2-b8",
            "OneTrainer, revision 23df3832, branch master",
        ),
        (
            "formulas/cases/oft-v2-b4",
            "sd-scripts with networks.oft_v2",
        ),
        (
            "formulas/cases/scaled-oft-b4",
            "OneTrainer, which the file does not name",
        ),
        (
            "formulas/cases/oft-v2-shared",
            "OneTrainer or sd-scripts, which the file does not name",
        ),
    ] {
        let case = Foreign::open(name);
        let text = succeed(folder.path(), &["inspect", &case.adapter(), "--json"]);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["program"], program, "{name}");
        assert_eq!(json["rotates"], "input", "{name}");
        let stored: usize = read(Path::new(&case.adapter()))
            .values()
            .map(|tensor| tensor.numbers.len())
            .sum();
        assert_eq!(json["stored"], stored, "{name}");
    }
    let case = Foreign::open("formulas/cases/oft-v2-b4");
    let text = succeed(folder.path(), &["inspect", &case.adapter()]);
    assert!(
        text.contains("unusual       it was trained with COFT"),
        "{text}"
    );
}

#[test]
fn formats_lists_every_dialect_of_the_library() {
    let folder = tempfile::tempdir().unwrap();
    let text = succeed(folder.path(), &["formats"]);
    for dialect in Dialect::ALL {
        let entry = format!("{}\n  written by  {}\n", dialect.name(), dialect.programs());
        assert!(text.contains(&entry), "{text}");
    }
    let help = succeed(folder.path(), &["help", "formats"]);
    assert!(help.contains(text.trim_end()), "{help}");
}

#[test]
fn one_of_the_two_files_of_peft_stands_for_its_folder() {
    let case = Case::open("cases/boft-linear-m3-b4");
    let folder = case.folder();
    let adapter = case.adapter.join("adapter_model.safetensors");
    let arguments = merge_command(
        "base.safetensors",
        adapter.to_str().unwrap(),
        "merged.safetensors",
    );
    succeed(folder.path(), &arguments);
    let merged = read(&folder.path().join("merged.safetensors"));
    assert_models(&merged, &case.merged, TOLERANCE, &case.name);
    // Without its settings, two programs would read it differently.
    fs::copy(&adapter, folder.path().join("alone.safetensors")).unwrap();
    let line = refused(folder.path(), &["inspect", "alone.safetensors"]);
    assert_eq!(
        line,
        "alone.safetensors: `base_model.model.layer.boft_R` is PEFT's, whose map its adapter_config.json says, or sd-scripts \
         reads the same keys with a map of its own; pass PEFT's folder with both files"
    );
}

#[test]
fn layers_without_a_place_are_all_refused_with_their_names() {
    let case = Foreign::open("lycoris/cases/boft-kohya");
    let folder = tempfile::tempdir().unwrap();
    let mut base = case.base.clone();
    let weight = base.remove("down_blocks.0.proj.weight").unwrap();
    write(&folder.path().join("base.safetensors"), &base);
    let adapter = case.adapter();
    let arguments = merge_command("base.safetensors", &adapter, "merged.safetensors");
    let fails = |expected: &str| {
        let run = run(folder.path(), &arguments);
        assert_eq!(run.code, 2);
        assert!(run.stderr.contains(expected), "{}", run.stderr);
        assert!(names(folder.path()) == ["base.safetensors"]);
    };
    fails("the model has no module that a file would call `lora_unet_down_blocks_0_proj`");
    base.insert("down_blocks_0.proj.weight".into(), weight.clone());
    base.insert("down_blocks.0_proj.weight".into(), weight.clone());
    write(&folder.path().join("base.safetensors"), &base);
    fails(
        "a file would call `down_blocks.0_proj`, `down_blocks_0.proj` of the model `lora_unet_down_blocks_0_proj`; rename it \
         to one of them",
    );
    base.remove("down_blocks.0_proj.weight");
    base.insert(
        "down_blocks_0.proj.weight".into(),
        Tensor::random(&[20, 8, 1, 1], 1),
    );
    write(&folder.path().join("base.safetensors"), &base);
    fails(
        "the adapter of `lora_unet_down_blocks_0_proj`: it rotates 16 outputs, the layer has 20; `down_blocks_0.proj.weight` is \
         [20, 8, 1, 1]",
    );
}

#[test]
fn a_part_of_a_file_for_several_models_is_merged_into_one_of_them() {
    let case = Foreign::open("lycoris/cases/boft-kohya");
    let folder = tempfile::tempdir().unwrap();
    let mut adapter = read(Path::new(&case.adapter()));
    for tensor in ["oft_blocks", "alpha", "rescale"] {
        let key = |start: &str| format!("{start}_down_blocks_0_proj.{tensor}");
        let numbers = adapter[&key("lora_unet")].clone();
        adapter.insert(key("lora_te1"), numbers);
    }
    write(&folder.path().join("both.safetensors"), &adapter);
    let base = case.path("base.safetensors");
    let mut arguments = merge_command(&base, "both.safetensors", "merged.safetensors").to_vec();
    let taken = run(folder.path(), &arguments);
    assert_eq!(taken.code, 2);
    assert!(
        taken.stderr.ends_with(
            "error: both.safetensors: `lora_te1_down_blocks_0_proj` and `lora_unet_down_blocks_0_proj` are both for \
             `down_blocks.0.proj` of the model\n"
        ),
        "{}",
        taken.stderr
    );
    arguments.extend(["--part", "lora_unet_"]);
    let done = run(folder.path(), &arguments);
    assert!(
        done.stderr.ends_with("note: 1 of 5 layers are left out\n"),
        "{}",
        done.stderr
    );
    let merged = read(&folder.path().join("merged.safetensors"));
    assert!(deviation(&merged, &case.merged) < DEVIATION);
    let last = arguments.len() - 1;
    arguments[last] = "lora_te2_";
    let none = run(folder.path(), &arguments);
    assert!(
        none.stderr.ends_with(
            "error: --part lora_te2_: no module of the file has a name that starts so\n"
        ),
        "{}",
        none.stderr
    );
}

#[test]
fn a_map_renames_modules_before_they_are_looked_for() {
    let case = Foreign::open("lycoris/cases/boft-kohya");
    let folder = tempfile::tempdir().unwrap();
    let rename = |key: &str| key.replace("down_blocks", "backbone.stages");
    let base = case
        .base
        .iter()
        .map(|(key, tensor)| (rename(key), tensor.clone()));
    write(&folder.path().join("base.safetensors"), &base.collect());
    let adapter = case.adapter();
    let mut arguments = merge_command("base.safetensors", &adapter, "merged.safetensors").to_vec();
    arguments.extend(["--map", "unet_down_blocks=unet_backbone_stages"]);
    succeed(folder.path(), &arguments);
    let merged = read(&folder.path().join("merged.safetensors"));
    let expected = case
        .merged
        .iter()
        .map(|(key, tensor)| (rename(key), tensor.clone()));
    assert!(deviation(&merged, &expected.collect()) < DEVIATION);
}

#[test]
fn broken_files_of_other_programs_are_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let square = || Tensor::random(&[2, 3, 3], 1);
    let one = |value: f64| Tensor::new(&[], vec![value]);
    let inspect = |tensors: &[(&str, Tensor)]| {
        let tensors = tensors
            .iter()
            .map(|(key, tensor)| (key.to_string(), tensor.clone()));
        write(&path, &tensors.collect());
        refused(folder.path(), &["inspect", "a.safetensors"])
    };
    for (tensors, expected) in [
        (
            vec![("x.weight", square())],
            "a.safetensors holds no OFT or BOFT adapter that is known; its tensors are `x.weight`; `burn-boft formats` lists \
             what is read",
        ),
        (
            vec![("x.lora_up.weight", square()), ("x.alpha", one(1.0))],
            "a.safetensors: `x.lora_up.weight` is of LoRA, and only OFT and BOFT are read; merge it with the program that \
             wrote it",
        ),
        (
            vec![("x.hada_w1_a", square())],
            "a.safetensors: `x.hada_w1_a` is of LoHa, and only OFT and BOFT are read; merge it with the program that wrote it",
        ),
        (
            vec![("x.oft_blocks.0", square())],
            "a.safetensors: `x.oft_blocks.0` is of sd-scripts' networks.oft_flux, whose own merge fails, and only OFT and BOFT \
             are read; merge it with the program that wrote it",
        ),
        (
            vec![("x.oft_blocks", square())],
            "a.safetensors: missing: `x.alpha`",
        ),
        (
            vec![("x.oft_blocks", square()), ("x.alpha", one(-1.0))],
            "a.safetensors: wrong: `x.alpha` is []: one number of zero or more expected",
        ),
        (
            vec![
                ("x.oft_blocks", Tensor::random(&[2, 3, 4], 1)),
                ("x.alpha", one(0.0)),
            ],
            "a.safetensors: wrong: `x.oft_blocks` is [2, 3, 4]: square blocks expected",
        ),
        (
            vec![
                ("x.oft_blocks", square()),
                ("x.alpha", one(0.0)),
                ("x.rescale", Tensor::random(&[5, 1], 1)),
            ],
            "a.safetensors: wrong: the adapter of `x` has numbers [5] f32: the blocks rotate 6 outputs",
        ),
        (
            vec![
                ("x.oft_blocks", Tensor::random(&[2, 6, 3, 3], 1)),
                ("x.alpha", one(0.0)),
            ],
            "a.safetensors: wrong: `x.oft_blocks` is [2, 6, 3, 3]: 2 factors of block size 3 and 6 blocks do not fit",
        ),
        (
            vec![
                ("x.oft_blocks", Tensor::random(&[1, 2, 3, 3], 1)),
                ("x.alpha", one(0.0)),
            ],
            "a.safetensors: wrong: `x.oft_blocks` is [1, 2, 3, 3]: blocks of an even size expected, which LyCORIS makes",
        ),
        (
            vec![("x.oft_blocks", square()), ("x.alpha", one(0.25))],
            "a.safetensors: alpha 0.25 of `x` bounds the norm at alpha times the outputs, as in LyCORIS, or at alpha itself, as \
             in ComfyUI, which writes such names; set alpha to zero for no bound, or give modules LyCORIS's names, lycoris_… \
             with `_` for dots",
        ),
        (
            vec![("x.oft_R.weight", Tensor::random(&[2, 5], 1))],
            "a.safetensors: wrong: `x.oft_R.weight` is [2, 5]: no block has 5 numbers, b(b−1)/2",
        ),
        (
            vec![
                ("x.oft_R.weight", Tensor::random(&[2, 6], 1)),
                ("x.oft_R.scaled_oft", one(0.0)),
            ],
            "a.safetensors: wrong: `x.oft_R.scaled_oft` is []: one mark, which is set, expected",
        ),
        (
            vec![("x.boft_R", Tensor::random(&[1, 2, 3, 3], 1))],
            "a.safetensors: missing: `x.boft_s`",
        ),
        (
            vec![
                ("x.oft_R.weight", Tensor::random(&[2, 6], 1)),
                ("x.alpha", one(0.0)),
            ],
            "a.safetensors: unexpected: `x.alpha`: it is no part of a layer of OFT or BOFT",
        ),
        (
            vec![
                ("x.oft_R.weight", Tensor::random(&[2, 6], 1)),
                ("y.boft_R", Tensor::random(&[1, 2, 3, 3], 1)),
                ("y.boft_s", Tensor::random(&[4, 1], 1)),
            ],
            "a.safetensors: `x` is oft-v2, or `y` is sd-scripts-boft, and no program computes both; merge them one after the \
             other, from a file for each",
        ),
        (
            vec![
                ("oft_unet_x.oft_blocks", square()),
                ("oft_unet_x.alpha", one(0.5)),
                ("oft_unet_y.oft_blocks", square()),
                ("oft_unet_y.alpha", one(0.25)),
            ],
            "a.safetensors: alpha 0.5 of `oft_unet_x` holds for all layers, or alpha 0.25 of `oft_unet_y` holds for all layers; \
             networks.oft takes the first that it meets; write one alpha into all of them",
        ),
    ] {
        assert_eq!(inspect(&tensors), expected);
    }
    fs::write(&path, "not tensors").unwrap();
    let line = refused(folder.path(), &["inspect", "a.safetensors"]);
    assert!(
        line.starts_with("a.safetensors is not a safetensors file: "),
        "{line}"
    );
}
