//! Embeddings, which OFT adapts and BOFT does not.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig};
use burn::tensor::Tensor;
use burn_boft::{Adapter, OftConfig, inject, merge};

use crate::check::{
    Beside, Verdict, adapted, boft, device, flat, neumann, oft, perturbed, refused_by, relative,
};
use crate::common::host;
use crate::common::models::numbers;
use crate::table::Check;

pub const CHECKS: &[Check] = &[
    ("Embedding by OFT", an_embedding_by_oft),
    ("Embedding by BOFT", || {
        refused_by(EmbeddingConfig::new(11, 16).init(&device()), &[boft()])
    }),
];

fn embedding() -> Embedding {
    EmbeddingConfig::new(11, 16).init(&device())
}

fn found(layer: &Embedding) -> Tensor<3> {
    layer.forward(Tensor::from_data([[3, 9, 0], [7, 7, 10]], &device()))
}

fn an_embedding_by_oft() -> Verdict {
    let shared = OftConfig::new()
        .with_block_size(4)
        .with_block_share(true)
        .with_target_modules(".*");
    adapted(embedding(), &[oft(), neumann(), shared.into()], |layer| {
        vec![flat(found(layer))]
    })
}

/// Rotating what was looked up in the base is the same as looking it up in the rotated table, and needs less work.
#[test]
fn the_rows_of_an_embedding_can_be_rotated_after_the_lookup() {
    for config in [oft(), neumann()] {
        let layer = perturbed(inject(embedding(), config).unwrap());
        let adapter = layer.weight.reparameterization::<burn_boft::BoftAdapter>();
        let base = Embedding {
            weight: burn::module::Param::from_tensor(layer.weight.base()),
        };
        let rotated = adapter.unwrap().rotate(found(&base));
        let (rotated, expected) = (host(rotated), host(found(&layer)));
        assert!(relative(&rotated, &expected) <= 1e-6);
        assert!(relative(&host(found(&base)), &expected) > 0.1);
    }
}

#[test]
fn an_embedding_is_saved_and_loaded_beside_a_linear_layer() {
    let base = Beside::new(embedding());
    let model = perturbed(inject(base.clone(), oft()).unwrap());
    let adapter = Adapter::extract(&model).unwrap();
    let again = Adapter::extract_as(&model, oft()).unwrap();
    assert_eq!(again.layers(), adapter.layers());
    let folder = tempfile::tempdir().unwrap();
    adapter.save(folder.path()).unwrap();
    let (loaded, report) = Adapter::load(folder.path()).unwrap();
    let keys = ["layer.oft_embedding_R.weight", "linear.oft_R.weight"];
    assert_eq!(
        report.applied,
        keys.map(|key| format!("base_model.model.{key}"))
    );
    let attached = loaded.attach(base.clone()).unwrap();
    assert_eq!(numbers(&attached), numbers(&model));
    assert_eq!(host(found(&attached.layer)), host(found(&model.layer)));
    let merged = [attached, model].map(|model| numbers(&merge(model.valid()).unwrap()));
    assert_eq!(merged[0], merged[1]);

    // The tensor of a linear layer does not rotate an embedding the other way round.
    let swapped = loaded.layers().iter().map(|layer| {
        let path = match layer.path() {
            "layer" => "linear",
            _ => "layer",
        };
        let skew = layer.skew().clone();
        burn_boft::value::AdapterLayer::new(path, layer.kind(), skew, None).unwrap()
    });
    let swapped = Adapter::from_parts(oft(), swapped.collect(), Vec::new()).unwrap();
    assert_eq!(
        swapped.attach(base).unwrap_err().to_string(),
        "wrong: the adapter of `layer` is for a linear layer or a convolution, the model has an embedding\n\
         wrong: the adapter of `linear` is for an embedding, the model has a linear layer"
    );
}
