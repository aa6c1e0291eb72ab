//! [`Dialect`]: what is read, and by which tensors it is known.

use crate::value::Axis;

/// A way to store an orthogonal adapter that is read.
///
/// # References
///
/// `docs/dialects.md` in the repository says which program, version and file each formula was read in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Dialect {
    /// OFT in PEFT's folder.
    PeftOft,
    /// BOFT in PEFT's folder.
    PeftBoft,
    /// LyCORIS's `diag-oft`.
    LycorisDiagOft,
    /// LyCORIS's `boft`.
    LycorisBoft,
    /// sd-scripts' `networks.oft`.
    SdScriptsOft,
    /// sd-scripts' `networks.boft`.
    SdScriptsBoft,
    /// OneTrainer's OFT and sd-scripts' `networks.oft_v2`, which are stored and computed alike.
    OftV2,
    /// OneTrainer's scaled OFT.
    ScaledOft,
}

/// Whether PEFT's format can say the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ToPeft {
    /// It is PEFT's format.
    Same,
    /// It computes the same numbers from what is stored otherwise.
    Exact,
    /// PEFT rotates inputs only.
    Refused,
}

impl ToPeft {
    /// How the table says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Same => "it is PEFT's",
            Self::Exact => "exact",
            Self::Refused => "refused: PEFT rotates inputs",
        }
    }
}

/// What is known of one dialect.
struct Row {
    name: &'static str,
    /// The programs that write it, with the newest version or commit that was read.
    programs: &'static str,
    /// The tensor that every layer has.
    rotation: &'static str,
    /// The axes of that tensor.
    rank: usize,
    /// Its shape, in words.
    shape: &'static str,
    /// The other tensors of a layer.
    others: &'static [&'static str],
    /// How names of modules start, where that tells two dialects apart.
    start: Option<&'static str>,
    axis: Axis,
    /// What the program makes of its numbers.
    merges: &'static str,
    to_peft: ToPeft,
}

/// How sd-scripts' `networks.oft` starts the names of modules. LyCORIS stores the same tensors, and reads no such name.
pub(super) const OFT_UNET: &str = "oft_unet_";

impl Dialect {
    /// All dialects, in the order of the table.
    pub const ALL: [Self; 8] = [
        Self::PeftOft,
        Self::PeftBoft,
        Self::LycorisDiagOft,
        Self::LycorisBoft,
        Self::SdScriptsOft,
        Self::SdScriptsBoft,
        Self::OftV2,
        Self::ScaledOft,
    ];

    fn row(self) -> Row {
        match self {
            Self::PeftOft => Row {
                name: "peft-oft",
                programs: "PEFT 0.14 to 0.21",
                rotation: "oft_R.weight",
                rank: 2,
                shape: "[n, b(b−1)/2]",
                others: &[],
                start: None,
                axis: Axis::Input,
                merges: "W·Rᵀ, exact or Neumann as adapter_config.json says",
                to_peft: ToPeft::Same,
            },
            Self::PeftBoft => Row {
                name: "peft-boft",
                programs: "PEFT 0.11 to 0.21",
                rotation: "boft_R",
                rank: 4,
                shape: "[m, n, b, b]",
                others: &["boft_s"],
                start: None,
                axis: Axis::Input,
                merges: "diag(s)·W·Rᵀ",
                to_peft: ToPeft::Same,
            },
            Self::LycorisDiagOft => Row {
                name: "lycoris-diag-oft",
                programs: "LyCORIS 4.1.3",
                rotation: "oft_blocks",
                rank: 3,
                shape: "[n, b, b]",
                others: &["alpha", "rescale"],
                start: None,
                axis: Axis::Output,
                merges: "diag(s)·R·W, alpha bounds the norm of all blocks together",
                to_peft: ToPeft::Refused,
            },
            Self::LycorisBoft => Row {
                name: "lycoris-boft",
                programs: "LyCORIS 4.1.3",
                rotation: "oft_blocks",
                rank: 4,
                shape: "[m, n, b, b]",
                others: &["alpha", "rescale"],
                start: None,
                axis: Axis::Output,
                merges: "diag(s)·R·W with the opposite sign, alpha as for diag-oft",
                to_peft: ToPeft::Refused,
            },
            Self::SdScriptsOft => Row {
                name: "sd-scripts-oft",
                programs: "sd-scripts 48d368fa `networks.oft`",
                rotation: "oft_blocks",
                rank: 3,
                shape: "[n, b, b]",
                others: &["alpha"],
                start: Some(OFT_UNET),
                axis: Axis::Output,
                merges: "R·W, alpha always bounds the norm, also where it is zero",
                to_peft: ToPeft::Refused,
            },
            Self::SdScriptsBoft => Row {
                name: "sd-scripts-boft",
                programs: "sd-scripts 070e3cd2 `networks.boft`",
                rotation: "boft_R",
                rank: 4,
                shape: "[m, n, b, b]",
                others: &["boft_s"],
                start: None,
                axis: Axis::Input,
                merges: "diag(s)·W·Rᵀ, as PEFT",
                to_peft: ToPeft::Exact,
            },
            Self::OftV2 => Row {
                name: "oft-v2",
                programs: "OneTrainer 23df3832, sd-scripts 091ece99 `networks.oft_v2`",
                rotation: "oft_R.weight",
                rank: 2,
                shape: "[n, b(b−1)/2]",
                others: &[],
                start: None,
                axis: Axis::Input,
                merges: "W·Rᵀ of a linear layer, W·R of a convolution; Neumann, 5 terms",
                to_peft: ToPeft::Exact,
            },
            Self::ScaledOft => Row {
                name: "scaled-oft",
                programs: "OneTrainer 23df3832 (`oft_scaled`)",
                rotation: "oft_R.weight",
                rank: 2,
                shape: "[n, b(b−1)/2]",
                others: &["oft_R.scaled_oft"],
                start: None,
                axis: Axis::Input,
                merges: "as oft-v2, of numbers divided by 2√(b−1)",
                to_peft: ToPeft::Exact,
            },
        }
    }

    /// Its name in the table.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The programs that write it, with the version or commit whose formulas are computed.
    pub fn programs(self) -> &'static str {
        self.row().programs
    }

    /// The tensors of a layer, with the shape of the first.
    pub fn tensors(self) -> String {
        let Row {
            rotation,
            shape,
            others,
            start,
            ..
        } = self.row();
        let others: Vec<_> = others.iter().map(|name| format!(", {name}")).collect();
        let start = start.map_or(String::new(), |start| format!(", names start {start}"));
        format!("{rotation} {shape}{}{start}", others.concat())
    }

    /// The axis of a weight that it rotates.
    pub fn axis(self) -> Axis {
        self.row().axis
    }

    /// What merging makes of a weight `W` in PyTorch's orientation.
    pub fn merges(self) -> &'static str {
        self.row().merges
    }

    /// Whether PEFT's format can say the same.
    pub fn to_peft(self) -> ToPeft {
        self.row().to_peft
    }

    /// The tensor that every layer has, and its axes.
    pub(super) fn rotation(self) -> (&'static str, usize) {
        let row = self.row();
        (row.rotation, row.rank)
    }

    /// Whether a layer may have a tensor of this name.
    pub(super) fn has(self, tensor: &str) -> bool {
        let row = self.row();
        row.rotation == tensor || row.others.contains(&tensor)
    }

    /// The dialect of a layer with these tensors, by their names and the axes of its rotation. None where the layer has no
    /// rotation that is known.
    pub(super) fn of_layer<'a>(
        module: &str,
        rank: impl Fn(&str) -> Option<usize>,
        mut tensors: impl Iterator<Item = &'a str>,
    ) -> Option<Self> {
        let is_scaled = tensors.any(|name| name == SCALED);
        let files = Self::ALL.into_iter().filter(|dialect| !dialect.is_folder());
        let fits = |dialect: &Self| {
            let row = dialect.row();
            let starts = row.start.map_or(!module.starts_with(OFT_UNET), |start| {
                module.starts_with(start)
            });
            starts && (*dialect == Self::ScaledOft) == is_scaled && rank(row.rotation).is_some()
        };
        let named: Vec<_> = files.filter(fits).collect();
        let exact = named.iter().find(|dialect| {
            let (rotation, axes) = dialect.rotation();
            rank(rotation) == Some(axes)
        });
        exact.or(named.first()).copied()
    }

    /// Whether it is a folder of PEFT's, which has settings beside the tensors.
    pub fn is_folder(self) -> bool {
        matches!(self, Self::PeftOft | Self::PeftBoft)
    }

    /// Whether a file may have layers of both, which one program then computes.
    pub(super) fn goes_with(self, other: Self) -> bool {
        let group = |dialect| match dialect {
            Self::LycorisBoft => Self::LycorisDiagOft,
            Self::ScaledOft => Self::OftV2,
            other => other,
        };
        group(self) == group(other)
    }
}

/// The tensor that marks OneTrainer's scaled OFT.
pub(super) const SCALED: &str = "oft_R.scaled_oft";

/// Tensors of a layer that other methods have, and what they are called. They are parts of names between dots, or starts
/// of them.
pub(super) const OTHER_METHODS: [(&str, &str); 18] = [
    ("lora_up", "LoRA"),
    ("lora_down", "LoRA"),
    ("lora_mid", "LoCon"),
    ("lora_A", "LoRA"),
    ("lora_B", "LoRA"),
    ("lora_magnitude_vector", "DoRA"),
    ("dora_scale", "DoRA"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("diff", "a full difference of weights"),
    ("diff_b", "a full difference of biases"),
    ("w_norm", "trained norms"),
    ("b_norm", "trained norms"),
    ("on_input", "IA3"),
    ("a1", "GLoRA"),
    ("lambda_layer", "T-LoRA"),
    ("oft_diag", "an OFT that no released LyCORIS writes"),
    ("oft_r", "OFT of PEFT 0.15 or older, which needs its folder"),
];
