//! [`Adapter::extract`]: an adapter out of a model.

use std::collections::{HashMap, HashSet};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};
use serde_json::Map;

use super::Adapter;
use super::layer::{AdapterLayer, SavedTensor};
use crate::adapter::AdapterSettings;
use crate::config::AdapterConfig;
use crate::error::ExtractError;
use crate::model::inject::trained_parameters;
use crate::model::walk::{Parameter, Path, Survey};
use crate::tensors::{from_values, is_float, values, widened};

impl Adapter {
    /// Reads the adapter out of a model that [`inject`](crate::inject()) or [`Adapter::attach`] adapted.
    ///
    /// `config` is the configuration that it was adapted with. The numbers are copied to the host; the base
    /// weights are neither needed nor read.
    ///
    /// # Errors
    ///
    /// [`ExtractError`]: a model without adapters, one that was adapted with other settings, and parameters
    /// that are trained and would be left behind.
    pub fn extract<M: Module>(
        model: &M,
        config: impl Into<AdapterConfig>,
    ) -> Result<Self, ExtractError> {
        let config = config.into();
        let mut survey = Survey::default();
        model.visit(&mut survey);
        let mut extractor = Extractor::default();
        model.visit(&mut extractor);
        if extractor.layers.is_empty() {
            return Err(ExtractError::NotAdapted);
        }
        let layers = extractor
            .layers
            .into_iter()
            .map(|found| found.layer(&config))
            .collect::<Result<Vec<_>, _>>()?;
        let adapted: HashSet<_> = layers.iter().map(|layer| layer.path.as_str()).collect();
        let trained: Vec<_> = trained_parameters(config.selection(), &survey, &adapted).collect();
        check_left_behind(&survey, &trained)?;
        let tensors = read_tensors(model, &trained)?;
        let mut adapter = Self {
            config,
            layers,
            tensors,
            about: Map::new(),
            promised: None,
        };
        adapter.sort();
        Ok(adapter)
    }
}

/// What is trained travels with the adapter, or is asked about.
fn check_left_behind(survey: &Survey, trained: &[&Parameter]) -> Result<(), ExtractError> {
    let kept: HashSet<_> = trained.iter().map(|parameter| &parameter.path).collect();
    let paths: Vec<_> = survey
        .parameters
        .iter()
        .filter(|parameter| parameter.is_trainable && !kept.contains(&parameter.path))
        .map(|parameter| parameter.path.clone())
        .collect();
    match paths.is_empty() {
        true => Ok(()),
        false => Err(ExtractError::LeftBehind { paths }),
    }
}

/// The numbers of these parameters, with PyTorch's names and orientation.
fn read_tensors<M: Module>(
    model: &M,
    trained: &[&Parameter],
) -> Result<Vec<SavedTensor>, ExtractError> {
    let mut reader = Reader {
        path: Path::default(),
        wanted: trained.iter().map(|p| (p.path.as_str(), *p)).collect(),
        tensors: Vec::new(),
        refused: None,
    };
    model.visit(&mut reader);
    match reader.refused {
        Some(error) => Err(error),
        None => Ok(reader.tensors),
    }
}

/// An adapted layer of a model.
struct Found {
    path: String,
    settings: AdapterSettings,
    skew: Option<TensorData>,
    scale: Option<TensorData>,
}

impl Found {
    fn layer(self, config: &AdapterConfig) -> Result<AdapterLayer, ExtractError> {
        let plan = self.settings.butterfly();
        let expected = AdapterSettings::new(self.settings.kind(), plan, config).numerics();
        let refuse = |found: String, expected: String| ExtractError::Settings {
            path: self.path.clone(),
            found,
            expected,
        };
        let (found, oft) = (
            self.settings.numerics(),
            matches!(config, AdapterConfig::Oft(_)),
        );
        if found.0 != expected.0 {
            return Err(refuse(
                format!("{:?}", found.0),
                format!("{:?}", expected.0),
            ));
        }
        if found.1 != expected.1 {
            let radius = |radius: Option<f64>| match radius {
                Some(radius) => format!("COFT radius {radius}"),
                None => "no COFT radius".to_string(),
            };
            return Err(refuse(radius(found.1), radius(expected.1)));
        }
        if oft && (plan.n_butterfly_factor > 1 || self.scale.is_some()) {
            return Err(refuse("BOFT".into(), "OFT".into()));
        }
        let missing = || ExtractError::NotAdapted;
        let skew = self.skew.ok_or_else(missing)?;
        let dtype = widened(skew.dtype());
        let [m, stored, packed] = plan.skew_shape();
        let mut numbers = values(&skew);
        // PEFT's BOFT has no shared blocks.
        let share = plan.block_share && oft;
        let stored = if plan.block_share && !oft {
            numbers = numbers.repeat(plan.block_num());
            plan.block_num()
        } else {
            stored
        };
        Ok(AdapterLayer {
            path: self.path,
            kind: Some(self.settings.kind()),
            block_size: plan.block_size,
            block_share: share,
            d_output: Some(plan.d_output),
            skew: from_values(numbers, vec![m, stored, packed], dtype),
            scale: self
                .scale
                .map(|scale| from_values(values(&scale), vec![plan.d_output], dtype)),
        })
    }
}

/// Collects the adapters of a model.
#[derive(Default)]
struct Extractor {
    path: Path,
    layers: Vec<Found>,
}

impl ModuleVisitor for Extractor {
    fn enter_module(&mut self, name: &str, container: &str) {
        if let Some(settings) = AdapterSettings::from_level(name, container)
            && let Some(path) = self.path.adapted_layer()
        {
            self.layers.push(Found {
                path,
                settings,
                skew: None,
                scale: None,
            });
        }
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(layer) = self.layers.last_mut()
            && self.path.adapted_layer().as_ref() == Some(&layer.path)
        {
            match self.path.last().0 {
                "skew" => layer.skew = Some(param.base().into_data()),
                "scale" => layer.scale = Some(param.base().into_data()),
                _ => {}
            }
        }
    }
}

/// Collects chosen parameters of a model.
struct Reader<'a> {
    path: Path,
    wanted: HashMap<&'a str, &'a Parameter>,
    tensors: Vec<SavedTensor>,
    refused: Option<ExtractError>,
}

impl ModuleVisitor for Reader<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(parameter) = self.wanted.get(self.path.full().as_str()) else {
            return;
        };
        let tensor = param.base();
        let dtype = tensor.dtype();
        if !is_float(dtype) {
            self.refused.get_or_insert(ExtractError::DType {
                path: parameter.path.clone(),
                dtype,
            });
            return;
        }
        let tensor = match parameter.is_transposed() && D == 2 {
            true => tensor.swap_dims(0, 1),
            false => tensor,
        };
        let mut keep = |name: &str, data| {
            self.tensors.push(SavedTensor {
                module: parameter.owner.clone(),
                name: name.to_string(),
                data,
            });
        };
        keep(parameter.torch_name(), tensor.into_data());
        if parameter.counts_batches() {
            // PyTorch's buffer beside the mean; its norms do not load without it.
            keep(
                "num_batches_tracked",
                TensorData::new(vec![0i64], Vec::<usize>::new()),
            );
        }
    }
}
