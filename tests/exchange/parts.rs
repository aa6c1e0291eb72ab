//! Adapters made of tensors that the user computed.

use burn::tensor::TensorData;
use burn_boft::value::{AdapterLayer, SavedTensor};
use burn_boft::{Adapter, AdapterConfig, BoftLinear};

use super::support::*;
use crate::common::models::distance;

#[test]
fn an_adapter_rebuilt_from_its_parts_saves_the_same_files() {
    for config in [AdapterConfig::from(boft()), oft().into()] {
        let adapter = Adapter::extract_as(&adapted::<BoftLinear>(config.clone()), config).unwrap();
        let adapter = adapter.with_base_model("some/model");
        let layers = adapter.layers().iter().rev().map(|layer| {
            let (skew, scale) = (layer.skew().clone(), layer.scale().cloned());
            AdapterLayer::new(layer.path(), layer.kind(), skew, scale).unwrap()
        });
        let tensors = adapter
            .tensors()
            .iter()
            .map(|tensor| SavedTensor::new(tensor.module(), tensor.name(), tensor.data().clone()));
        let parts = Adapter::from_parts(
            adapter.config().clone(),
            layers.collect(),
            tensors.collect(),
        );
        let parts = parts.unwrap().with_about(&adapter.settings());
        assert_eq!(parts.settings(), adapter.settings());
        let (own, again) = (saved(&adapter), saved(&parts));
        assert_eq!(stored(own.path()), stored(again.path()));
        let outputs = [&adapter, &parts]
            .map(|adapter| outputs(&adapter.attach(base::<BoftLinear>()).unwrap()));
        let [one, other] = outputs;
        assert_eq!(distance(one, other), 0.0);
    }
}

#[test]
fn parts_of_wrong_shapes_are_refused() {
    let data =
        |shape: &[usize]| TensorData::new(vec![0.5f32; shape.iter().product()], shape.to_vec());
    let layer = |skew: TensorData, scale: Option<TensorData>| {
        AdapterLayer::new("hidden", None, skew, scale)
    };
    let refused = |skew: TensorData, scale| layer(skew, scale).unwrap_err().to_string();
    let of = "wrong: the adapter of `hidden` has numbers";
    for (shape, why) in [
        (
            &[6, 6][..],
            "factors, blocks and packed numbers are three axes",
        ),
        (&[1, 6, 5], "no block has 5 numbers, b(b−1)/2"),
        (
            &[2, 3, 6],
            "2 factors of block size 4 and 3 blocks do not fit",
        ),
        (
            &[0, 3, 6],
            "0 factors of block size 4 and 3 blocks do not fit",
        ),
    ] {
        let expected = format!("{of} {shape:?} f32: {why}");
        assert_eq!(refused(data(shape), None), expected);
    }
    assert_eq!(
        refused(data(&[1, 6, 6]), Some(data(&[16, 1]))),
        format!("{of} [16, 1] f32: a scale has one axis")
    );
    assert_eq!(
        refused(TensorData::new(vec![1i64; 6], [1, 1, 6]), None),
        format!("{of} [1, 1, 6] i64: an adapter computes with floats")
    );
    let scaled = layer(data(&[1, 6, 6]), Some(data(&[16]))).unwrap();
    let bias = SavedTensor::new("hidden", "bias", data(&[15]));
    let flag = SavedTensor::new("head", "flag", TensorData::new(vec![true], [1]));
    let error = Adapter::from_parts(oft(), vec![scaled.clone()], vec![bias, flag]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "wrong: the adapter of `hidden` has a scale, several factors or blocks that are not shared, and the settings say \
         OFT without\n\
         wrong: `head.flag` is bool, which no file keeps\n\
         wrong: the bias of `hidden` is [15], where its adapter has 16 outputs"
    );
    let adapter = Adapter::from_parts(boft(), vec![scaled], Vec::new()).unwrap();
    assert_eq!(
        adapter.settings()["boft_n_butterfly_factor"],
        1,
        "as the numbers say"
    );
}
