//! Weights that are stored as `[d_input, d_output]`, as in GPT-2: refused, and never rotated along the wrong axis.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::files::*;

const PROJECTION: &str = "h.0.attn.c_proj";
const FUSED: &str = "h.0.attn.c_attn";

/// Writes an adapter of BOFT for a layer of 24 inputs and 24 outputs.
fn write_square_adapter(folder: &Path, layer: &str) {
    let config = json!({
        "peft_type": "BOFT", "boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": [layer],
        "fan_in_fan_out": false
    });
    let key = |tensor: &str| format!("base_model.model.{layer}.{tensor}");
    let tensors = [
        (key("boft_R"), Tensor::random(&[2, 6, 4, 4], 1)),
        (key("boft_s"), Tensor::random(&[24, 1], 2)),
    ];
    write_adapter(&folder.join("adapter"), &config, &tensors.into());
}

/// A square layer, with a bias that does not tell its two sides apart, and what stands beside it.
fn model(others: &[(&str, &[usize])]) -> Tensors {
    let square = [
        (format!("{PROJECTION}.weight"), Tensor::random(&[24, 24], 3)),
        (format!("{PROJECTION}.bias"), Tensor::random(&[24], 4)),
    ];
    let others = others
        .iter()
        .map(|(key, shape)| (key.to_string(), Tensor::random(shape, 5)));
    square.into_iter().chain(others).collect()
}

const INPUTS_FIRST: &str = "is stored as [d_input, d_output], as transformers' Conv1D stores it, and neither PEFT's OFT and BOFT \
                            nor burn-boft rotates that; train the adapter on a model with nn.Linear in its place";

#[test]
fn a_square_layer_of_gpt2_is_refused_where_the_configuration_names_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_square_adapter(path, PROJECTION);
    fs::create_dir(path.join("model")).unwrap();
    write(&path.join("model/model.safetensors"), &model(&[]));
    let refused = |config: serde_json::Value| {
        write_json(&path.join("model/config.json"), &config);
        refused(path, &merge_command("model", "adapter", "out"))
    };
    let expected = format!(
        "model/model.safetensors: `{PROJECTION}.weight`, which the adapter rotates, {INPUTS_FIRST}"
    );
    assert_eq!(refused(json!({"model_type": "gpt2"})), expected);
    let inside = json!({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}});
    assert_eq!(refused(inside), expected);
    assert_eq!(names(path), ["adapter", "model"]);

    // The same names are linear layers elsewhere.
    write_json(
        &path.join("model/config.json"),
        &json!({"model_type": "gpt_bigcode"}),
    );
    succeed(path, &merge_command("model", "adapter", "out"));
    assert_same_as_linear(path, &read(&path.join("out/model.safetensors")));
}

/// Asserts that the square layer was merged as a linear layer of another name is.
fn assert_same_as_linear(path: &Path, found: &Tensors) {
    let base = model(&[])
        .into_iter()
        .map(|(key, tensor)| (key.replace(PROJECTION, "fc"), tensor));
    write(&path.join("linear.safetensors"), &base.collect());
    let folder = tempfile::tempdir_in(path).unwrap();
    write_square_adapter(folder.path(), "fc");
    fs::rename(
        path.join("linear.safetensors"),
        folder.path().join("base.safetensors"),
    )
    .unwrap();
    let expected = merged(folder.path(), "adapter");
    assert_eq!(
        found[&format!("{PROJECTION}.weight")],
        expected["fc.weight"]
    );
    assert_ne!(
        expected["fc.weight"],
        model(&[])[&format!("{PROJECTION}.weight")]
    );
}

#[test]
fn without_a_configuration_the_other_layers_tell_how_a_square_one_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_square_adapter(path, PROJECTION);
    let (weight, bias) = (format!("{FUSED}.weight"), format!("{FUSED}.bias"));
    let merge = merge_command("base.safetensors", "adapter", "out.safetensors");
    let refused = |others: &[(&str, &[usize])]| {
        write(&path.join("base.safetensors"), &model(others));
        refused(path, &merge)
    };
    let of = format!("base.safetensors: `{PROJECTION}.weight`, which the adapter rotates,");
    let conv1d = format!("{of} {INPUTS_FIRST}");
    assert_eq!(refused(&[(&weight, &[24, 72]), (&bias, &[72])]), conv1d);
    assert_eq!(refused(&[(&weight, &[24, 72])]), conv1d);
    assert_eq!(
        refused(&[]),
        format!(
            "{of} has a name of GPT-2's, whose weights are stored the other way round, and neither its shape nor a config.json \
             says which it is; put the config.json of the model beside it"
        )
    );
    // As in nanoGPT.
    write(
        &path.join("base.safetensors"),
        &model(&[(&weight, &[72, 24]), (&bias, &[72])]),
    );
    succeed(path, &merge);
    assert_same_as_linear(path, &read(&path.join("out.safetensors")));
}

#[test]
fn a_bias_as_long_as_the_second_axis_tells_that_the_first_has_the_inputs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let base = [
        ("fc.weight".to_string(), Tensor::random(&[8, 24], 1)),
        ("fc.bias".to_string(), Tensor::random(&[24], 2)),
    ];
    write(&path.join("base.safetensors"), &base.into());
    // One block for all fits either axis.
    let config = json!({
        "peft_type": "OFT", "oft_block_size": 4, "block_share": true, "use_cayley_neumann": false, "target_modules": ["fc"]
    });
    let rotation = [(
        "base_model.model.fc.oft_R.weight".to_string(),
        Tensor::random(&[1, 6], 3),
    )];
    write_adapter(&path.join("adapter"), &config, &rotation.into());
    let line = format!("`fc.weight`, which the adapter rotates, {INPUTS_FIRST}");
    for command in [
        "merge --base base.safetensors",
        "unmerge --merged base.safetensors",
    ] {
        let command = format!("{command} --adapter adapter --output out.safetensors");
        assert_eq!(
            refused(path, &command.split(' ').collect::<Vec<_>>()),
            format!("base.safetensors: {line}")
        );
    }
    assert_eq!(
        refused(
            path,
            &convert_for("base.safetensors", "adapter", "boft", "out")
        ),
        format!("base.safetensors: `fc.weight` {INPUTS_FIRST}")
    );
}

#[test]
fn an_adapter_that_says_its_weights_are_transposed_is_refused() {
    let mut place = MergeFolder::new();
    place.config["fan_in_fan_out"] = json!(true);
    place.write_adapter(&place.config, &place.tensors);
    let line = "adapter/adapter_config.json: `fan_in_fan_out` is true, which is for weights stored as [d_input, d_output], \
                such as those of GPT-2's Conv1D, and neither PEFT's OFT and BOFT nor this program adapts those; set it to \
                false if the layers are nn.Linear";
    assert_eq!(place.refused(), line);
    assert_eq!(refused(place.path(), &["inspect", "adapter"]), line);
}
