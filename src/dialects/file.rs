//! [`AdapterFile`]: a file of another program, and its place in a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use burn::tensor::Device;

use super::error::{DialectError, Misplaced};
use super::names::{Found, Modules, Renamed, Style, layout};
use super::oft_v2;
use super::table::Dialect;
use crate::config::{AdapterConfig, Block, BoftConfig, LayerKind, OftConfig};
use crate::rotation::Method;
use crate::value::{Adapter, AdapterLayer, Axis, FitError, KeyMap, LayerMeasure};

/// An adapter in a file of another program, read and not yet placed into a model.
#[derive(Debug, Clone)]
pub struct AdapterFile {
    pub(super) path: PathBuf,
    pub(super) layers: Vec<FileLayer>,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) notes: Vec<String>,
}

/// An [`AdapterFile`] in a model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Placed {
    /// The adapter, with the model's names.
    pub adapter: Adapter,
    /// Which names the model has in another layout than the file, a line each.
    pub notes: Vec<String>,
}

/// One layer of an [`AdapterFile`].
#[derive(Debug, Clone)]
pub struct FileLayer {
    pub(super) dialect: Dialect,
    pub(super) alpha: Option<f64>,
    pub(super) is_bounded: bool,
    pub(super) exceeds_alpha: bool,
    pub(super) stored: usize,
    pub(super) layer: AdapterLayer,
}

impl FileLayer {
    /// The module's name in the file.
    pub fn module(&self) -> &str {
        self.layer.path()
    }

    /// How the layer is stored.
    pub fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// `alpha` as the file has it: the bound of the norm of all blocks together, per output.
    pub fn alpha(&self) -> Option<f64> {
        self.alpha
    }

    /// Whether the stored numbers are beyond that bound. Then they have been scaled back to it.
    pub fn is_bounded(&self) -> bool {
        self.is_bounded
    }

    /// How many numbers the file has for it.
    pub fn stored(&self) -> usize {
        self.stored
    }

    /// The numbers of the layer, whose path is still the module's name in the file.
    ///
    /// Of [`Dialect::OftV2`] and [`Dialect::ScaledOft`] they are those of a linear layer: only a model says which layers are
    /// convolutions, and which share one block.
    pub fn layer(&self) -> &AdapterLayer {
        &self.layer
    }
}

impl AdapterFile {
    /// The file with only those layers whose modules' names start with this, as of one model where the file is for several.
    pub fn with_only(mut self, start: &str) -> Self {
        self.layers
            .retain(|layer| layer.module().starts_with(start));
        self
    }

    /// The layers, by their names in the file.
    pub fn layers(&self) -> &[FileLayer] {
        &self.layers
    }

    /// The dialects of the layers, each once.
    pub fn dialects(&self) -> Vec<Dialect> {
        let dialects: BTreeSet<_> = self.layers.iter().map(FileLayer::dialect).collect();
        dialects.into_iter().collect()
    }

    /// The text that the file carries beside its tensors.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// What is unusual about the file, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The program that wrote the file, with its version where the file tells: sd-scripts and OneTrainer leave notes of
    /// themselves, and others are known by their tensors.
    pub fn program(&self) -> String {
        let text = |key: &str| self.metadata.get(key).map(String::as_str);
        if let Some(revision) = text("ot_revision") {
            let branch =
                text("ot_branch").map_or(String::new(), |branch| format!(", branch {branch}"));
            return format!("OneTrainer, revision {revision}{branch}");
        }
        if let Some(module) = text("ss_network_module") {
            let commit = text("ss_sd_scripts_commit_hash");
            let commit = commit.map_or(String::new(), |commit| format!(", commit {commit}"));
            return format!("sd-scripts with {module}{commit}");
        }
        let programs = self.dialects().into_iter().map(|dialect| match dialect {
            Dialect::LycorisDiagOft | Dialect::LycorisBoft => "LyCORIS",
            Dialect::ScaledOft => "OneTrainer",
            Dialect::OftV2 => "OneTrainer or sd-scripts",
            _ => "sd-scripts",
        });
        let programs: BTreeSet<_> = programs.collect();
        let programs: Vec<_> = programs.into_iter().collect();
        format!("{}, which the file does not name", programs.join(", "))
    }

    /// How the file writes names of modules, each way once, in words.
    pub fn key_styles(&self) -> Vec<String> {
        let modules = self.layers.iter().map(FileLayer::module);
        let styles: BTreeSet<_> = modules.clone().map(Style::of_module).collect();
        let layouts: BTreeSet<_> = modules.filter_map(layout).collect();
        let layouts = layouts
            .into_iter()
            .map(|layout| format!("a UNet in {}", layout.name()));
        styles
            .into_iter()
            .map(Style::in_words)
            .chain(layouts)
            .collect()
    }

    /// Measures every rotation, as [`Adapter::measure`] does, under its name in the file.
    pub fn measure(&self, device: &Device) -> Vec<LayerMeasure> {
        self.unplaced().measure(device)
    }

    /// The adapter without a model, with the names of the file.
    ///
    /// It is for measuring, and for comparing files of one dialect with each other. What [`FileLayer::layer`] says of
    /// convolutions and shared blocks holds here too.
    pub fn unplaced(&self) -> Adapter {
        let layers = self.layers.iter().map(|layer| layer.layer.clone());
        let adapter = Adapter::from_parts(self.config(false), layers.collect(), Vec::new());
        adapter.expect("the layers of one program fit its settings")
    }

    /// The adapter for a model, with the model's names.
    ///
    /// It is that of [`AdapterFile::place`], without the notes.
    ///
    /// # Errors
    ///
    /// As [`AdapterFile::place`].
    pub fn adapter(
        &self,
        modules: &BTreeMap<String, Vec<usize>>,
        names: &KeyMap,
    ) -> Result<Adapter, DialectError> {
        Ok(self.place(modules, names)?.adapter)
    }

    /// Places the adapter into a model.
    ///
    /// `modules` has every module of the model that has a weight, with the weight's shape in PyTorch's orientation. A PyTorch
    /// `MultiheadAttention` counts as the three modules `q_proj`, `k_proj` and `v_proj` beside its `out_proj`, each with a third
    /// of the rows of `in_proj_weight`. Names are translated by `names` first. Then they are compared with what programs would
    /// call the modules of this model, in both layouts of a Stable Diffusion UNet, and every layer has to find exactly one.
    ///
    /// # Errors
    ///
    /// - [`DialectError::KeyMap`]: a pattern of `names` has no answer.
    /// - [`DialectError::Misplaced`]: every layer that finds no module, several, one that another layer has, one that it does not
    ///   fit, or one that it may rotate in two ways.
    pub fn place(
        &self,
        modules: &BTreeMap<String, Vec<usize>>,
        names: &KeyMap,
    ) -> Result<Placed, DialectError> {
        let known = Modules::new(modules);
        let (mut placed, mut misplaced) = (Vec::new(), Vec::new());
        let (mut taken, mut renamed) = (BTreeMap::new(), BTreeMap::<_, Vec<_>>::new());
        for file in &self.layers {
            let module = file.module().to_string();
            let path = match known.find(&names.model_path(&module)?) {
                Found::One(path) => path.to_string(),
                Found::Renamed(path, how) => {
                    renamed.entry(how).or_default().push((file.module(), path));
                    path.to_string()
                }
                Found::Several(found) => {
                    misplaced.push(Misplaced::Several { module, found });
                    continue;
                }
                Found::None {
                    translated,
                    nearest,
                } => {
                    misplaced.push(Misplaced::Nowhere {
                        module,
                        translated,
                        nearest,
                    });
                    continue;
                }
            };
            if let Some(first) = taken.insert(path.clone(), module.clone()) {
                let second = module;
                misplaced.push(Misplaced::Taken {
                    path,
                    first,
                    second,
                });
                continue;
            }
            if self.may_be_a_convolution(file) && known.is_projection_of_sd2(&path) {
                misplaced.push(Misplaced::EitherWay { module, path });
                continue;
            }
            placed.push((file, modules[&path].clone(), path));
        }
        let shares = shares_blocks(&placed);
        let (mut layers, mut widths) = (Vec::new(), Vec::new());
        for (file, shape, path) in placed {
            match file.placed(&path, &shape, shares) {
                Ok(layer) => {
                    widths.push((layer.block_size(), shape[1..].iter().product()));
                    layers.push(layer);
                }
                Err(reason) => misplaced.push(Misplaced::Fit {
                    module: file.module().to_string(),
                    path,
                    shape,
                    reason,
                }),
            }
        }
        let path = || self.path.clone();
        if !misplaced.is_empty() {
            let path = path();
            return Err(DialectError::Misplaced { path, misplaced });
        }
        let targets: Vec<_> = layers
            .iter()
            .map(|layer| layer.path().to_string())
            .collect();
        let mut config = self.config(shares);
        config.selection_mut().target_modules = Some(targets.into());
        fit_block_size(&mut config, &widths);
        let adapter = Adapter::from_parts(config, layers, Vec::new()).map_err(|mismatch| {
            let path = path();
            DialectError::Mismatch { path, mismatch }
        })?;
        let notes = renamed.into_iter().map(|(how, names)| note(how, &names));
        Ok(Placed {
            adapter,
            notes: notes.collect(),
        })
    }

    /// Whether the program may have trained a layer as a convolution that models have as a linear layer, and would have turned
    /// it the other way then: sd-scripts makes convolutions of the projections of Stable Diffusion 2 where it loads a checkpoint,
    /// and linear layers where it loads a folder of diffusers (`library/model_util.py`, commit 48d368fa).
    fn may_be_a_convolution(&self, file: &FileLayer) -> bool {
        file.dialect == Dialect::OftV2 && !self.metadata.contains_key("ot_revision")
    }

    /// The settings without targets: OFT with the polynomial, or BOFT, whose map is exact.
    fn config(&self, block_share: bool) -> AdapterConfig {
        let is_polynomial = |layer: &FileLayer| is_oft_v2(layer.dialect);
        let is_scaled = |layer: &FileLayer| layer.dialect == Dialect::ScaledOft;
        match self.layers.iter().any(is_polynomial) {
            true => OftConfig::new()
                .with_cayley(oft_v2::MAP)
                .with_block_share(block_share)
                .with_scaled_skew(self.layers.iter().all(is_scaled))
                .into(),
            false => BoftConfig::new().into(),
        }
    }
}

impl FileLayer {
    /// The layer for a module of a model with a weight of this shape.
    ///
    /// # Errors
    ///
    /// [`FitError`]: it does not fit the weight.
    fn placed(&self, path: &str, shape: &[usize], shares: bool) -> Result<AdapterLayer, FitError> {
        let mut layer = self.layer.clone();
        layer.path = path.to_string();
        layer.block_share = shares;
        let kind = layer.check_fit(shape)?;
        layer.kind = Some(kind);
        if layer.axis == Axis::Input {
            layer.d_output = Some(shape[0]);
        }
        if is_oft_v2(self.dialect) && kind == LayerKind::Conv2d {
            layer.skew = oft_v2::reversed(&layer.skew);
        }
        Ok(layer)
    }
}

/// What is said of the names that were found in another layout. There is at least one.
fn note(how: Renamed, names: &[(&str, &str)]) -> String {
    let (module, path) = names[0];
    let count = match names.len() {
        1 => "one name is".to_string(),
        count => format!("{count} names are"),
    };
    format!("{count} {}; `{module}` is `{path}`", how.in_words())
}

fn is_oft_v2(dialect: Dialect) -> bool {
    matches!(dialect, Dialect::OftV2 | Dialect::ScaledOft)
}

/// Whether one stored block of each layer serves all its channels: no layer has more than one, and one of them is wider than
/// its block. The programs of [`Dialect::OftV2`] share blocks in all layers or in none.
fn shares_blocks(placed: &[(&FileLayer, Vec<usize>, String)]) -> bool {
    let mut wider = false;
    for (file, shape, _) in placed {
        if !is_oft_v2(file.dialect) || file.layer.skew().shape()[1] != 1 {
            return false;
        }
        let d_input: usize = shape.iter().skip(1).product();
        wider |= d_input > file.layer.block_size();
    }
    wider
}

/// Lets the settings say a block size of which PEFT makes the blocks that every layer has, if there is one: OneTrainer and
/// PEFT adjust the size that was asked for to each layer in the same way. The layers are given as block size and inputs.
fn fit_block_size(config: &mut AdapterConfig, layers: &[(usize, usize)]) {
    let sizes: BTreeSet<_> = layers.iter().map(|(b, _)| *b).collect();
    for size in sizes {
        let mut asked = config.clone();
        asked.set_block(Block::Size(size));
        let method = Method::unchecked(&asked);
        if layers
            .iter()
            .all(|(b, d)| method.block_size(*d) == Some(*b))
        {
            *config = asked;
            return;
        }
    }
}
