//! What Burn does that this repository works around, one test for each workaround.
//!
//! A test here fails when Burn changes. Its message then names the code that exists only because of the old behaviour, and
//! `docs/upstream.md` has a row about it.

#[path = "../common/mod.rs"]
mod common;

mod loading;
mod modules;
mod operations;
mod reparameterizations;
mod table;
mod training;

use std::fmt::Debug;

use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Device, Tensor};
use common::{noise, tensor};
use table::workarounds;

/// Checks what Burn does now. If it does something else, the message says which workaround can go.
///
/// The pin is the name of the test, under which `docs/upstream.md` has the workaround.
#[track_caller]
fn pin<T: Debug + PartialEq>(name: &str, found: T, pinned: T) {
    assert!(
        found == pinned,
        "Burn has changed: `{name}` does not hold any more (found {found:?}, pinned {pinned:?}). Remove the workaround, \
         {}, then the row of docs/upstream.md and this test.",
        workarounds(name).join(" and ")
    );
}

/// `W·diag(factor)`: a reparameterization that is not one of this crate.
#[derive(Module, Debug)]
struct Scaling {
    factor: Param<Tensor<1>>,
}

impl Reparameterization for Scaling {
    const NAME: &'static str = "scaling";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let mut shape = [1; D];
        shape[D - 1] = self.factor.val().dims()[0];
        base * self.factor.val().reshape(shape)
    }
}

/// Attaches a [`Scaling`] with these factors to every matrix.
struct Scale(Vec<f64>);

impl Reparameterizer for Scale {
    type Reparam = Scaling;

    fn reparameterize<const D: usize>(
        &mut self,
        _path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Scaling>) {
        let factor = (D == 2).then(|| {
            let device = param.lazy_device();
            let factor = tensor(&self.0, [self.0.len()], DType::F32, &device);
            Scaling {
                factor: Param::from_tensor(factor),
            }
        });
        (param, factor)
    }
}

/// `[INPUTS, OUTPUTS]` is the shape of every weight here.
const INPUTS: usize = 6;
const OUTPUTS: usize = 3;

/// A weight of noise.
fn weight(device: &Device) -> Param<Tensor<2>> {
    let values = noise(INPUTS * OUTPUTS, 21, 1.0);
    Param::from_tensor(tensor(&values, [INPUTS, OUTPUTS], DType::F32, device))
}
