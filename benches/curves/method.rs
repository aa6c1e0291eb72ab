//! The methods: what is packed, and what is trained on top of it.

use std::fmt::{self, Display, Formatter};

use burn::module::{Lora, Module, ParamGroup, QLora, Quantizer};
use burn::tensor::Device;
use burn::tensor::quantization::{Calibration, QuantScheme, QuantValue, ScaleDtype};
use burn_boft::{BoftConfig, OftConfig, inject};
use dinov2::method::{HEAD, KaimingUniform, PROJECTIONS};
use dinov2::model::Dinov2ForImageClassification;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// With this rank LoRA has as many numbers as [`Method::Boft`] has: 9216. [`Method::Oft`] has 8064; its next size is 17,280.
const RANK: usize = 2;
/// QLoRA's paper has one scale for 64 numbers, too.
const NUMBERS_PER_SCALE: u8 = 64;

/// The precision of the packed weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    Eight,
    Four,
}

/// How the packed model is trained. The head is trained with every method, in f32, at the same rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Nothing but the head.
    Head,
    /// BOFT with blocks of 4 and 2 factors.
    Boft,
    /// OFT with blocks of 8.
    Oft,
    /// Burn's own QLoRA, as `apply_qlora` starts it.
    Lora,
    /// Burn's own QLoRA, its first factors drawn as PEFT draws them.
    LoraAsInPeft,
}

impl Bits {
    pub const ALL: [Self; 2] = [Self::Eight, Self::Four];

    fn scheme(self, device: &Device) -> QuantScheme {
        let value = match self {
            Self::Eight => QuantValue::Q8S,
            Self::Four => QuantValue::Q4S,
        };
        let scheme = device.settings().quantization.scheme.with_value(value);
        scheme.per_block([NUMBERS_PER_SCALE], ScaleDtype::F32)
    }
}

impl Method {
    pub const ALL: [Self; 5] = [
        Self::Head,
        Self::Boft,
        Self::Oft,
        Self::Lora,
        Self::LoraAsInPeft,
    ];

    /// The learning rates to train with. The head has a rate of its own.
    pub fn rates(self, rates: &[f64]) -> &[f64] {
        match self {
            Self::Head => &[0.0],
            _ => rates,
        }
    }

    /// The model with packed weights and the adapter of this method.
    pub fn prepare(
        self,
        model: Dinov2ForImageClassification,
        bits: Bits,
    ) -> Result<Dinov2ForImageClassification, String> {
        let mut quantizer = Quantizer::new(Calibration::MinMax, bits.scheme(&model.device()));
        let head = ParamGroup::from_predicate(HEAD);
        match self {
            Self::Head => {
                let packed = model.quantize_weights_group(&mut quantizer, weights());
                Ok(packed.freeze().unfreeze_group(head))
            }
            Self::Boft => {
                let packed = model.quantize_weights_group(&mut quantizer, weights());
                let config = BoftConfig::new()
                    .with_block_size(4)
                    .with_n_butterfly_factor(2)
                    .with_target_modules(PROJECTIONS)
                    .with_modules_to_save([HEAD]);
                inject(packed, config).map_err(|error| error.to_string())
            }
            Self::Oft => {
                let packed = model.quantize_weights_group(&mut quantizer, weights());
                let config = OftConfig::new()
                    .with_block_size(8)
                    .with_target_modules(PROJECTIONS)
                    .with_modules_to_save([HEAD]);
                inject(packed, config).map_err(|error| error.to_string())
            }
            Self::Lora | Self::LoraAsInPeft => {
                quantizer.set_param_group(weights());
                let lora = Lora::new(RANK, 2.0 * RANK as f64).set_param_group(weights());
                let adapted = model.apply_qlora(QLora::new(lora, quantizer));
                let adapted = match self {
                    Self::LoraAsInPeft => adapted.map(&mut KaimingUniform::default()),
                    _ => adapted,
                };
                Ok(adapted.unfreeze_group(head))
            }
        }
    }
}

/// The weights of the layers that are packed and adapted.
fn weights() -> ParamGroup {
    let paths = PROJECTIONS.map(|target| format!("{target}.weight"));
    ParamGroup::from_any_predicates(paths.to_vec())
}

impl Display for Bits {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eight => "8 bits",
            Self::Four => "4 bits",
        })
    }
}

impl Display for Method {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Head => f.write_str("head alone"),
            Self::Boft => f.write_str("QBOFT b=4 m=2"),
            Self::Oft => f.write_str("QOFT b=8"),
            Self::Lora => write!(f, "QLoRA r={RANK}"),
            Self::LoraAsInPeft => write!(f, "QLoRA r={RANK}, started as in PEFT"),
        }
    }
}

/// The value with this name.
fn named<'de, T: Display + Copy, D: Deserializer<'de>>(
    all: &[T],
    deserializer: D,
) -> Result<T, D::Error> {
    let name = String::deserialize(deserializer)?;
    let found = all.iter().find(|value| value.to_string() == name);
    found
        .copied()
        .ok_or_else(|| D::Error::custom(format!("`{name}` is not known here")))
}

impl<'de> Deserialize<'de> for Bits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        named(&Self::ALL, deserializer)
    }
}

impl<'de> Deserialize<'de> for Method {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        named(&Self::ALL, deserializer)
    }
}

impl Serialize for Bits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Method {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
