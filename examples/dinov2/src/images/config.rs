//! `preprocessor_config.json`, read and written as transformers reads and writes it.

use serde_json::{Map, Value, json};
use thiserror::Error;

use super::processor::{Normalize, Processor, Resize};
use super::resample::Filter;

/// The class of transformers whose defaults and steps these are, as every version names it.
const CLASSES: [&str; 4] = [
    "BitImageProcessor",
    "BitImageProcessorFast",
    "BitImageProcessorPil",
    "BitFeatureExtractor",
];

/// The steps that are known, by the key that turns them on.
const STEPS: [&str; 5] = [
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
];

/// What `BitImageProcessor` does where the file leaves a key out.
const MEAN: [f64; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const STD: [f64; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];
const SIZE: usize = 224;
const BICUBIC: u64 = 3;
const RESCALE: f64 = 1.0 / 255.0;

/// A `preprocessor_config.json` that is not followed.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum ProcessorError {
    /// The file holds no JSON object.
    #[error("preprocessor_config.json holds no JSON object")]
    NotAnObject,

    /// A step, a size or a class that is not done here.
    #[error(
        "preprocessor_config.json asks for {key} = {value}, which is not supported; {supported}"
    )]
    Unsupported {
        key: String,
        value: String,
        supported: &'static str,
    },

    /// A value of the wrong kind.
    #[error("preprocessor_config.json has {key} = {value}, expected {expected}")]
    Invalid {
        key: String,
        value: String,
        expected: &'static str,
    },
}

fn invalid(key: &str, value: &Value, expected: &'static str) -> ProcessorError {
    ProcessorError::Invalid {
        key: key.into(),
        value: value.to_string(),
        expected,
    }
}

fn unsupported(key: &str, value: &Value, supported: &'static str) -> ProcessorError {
    ProcessorError::Unsupported {
        key: key.into(),
        value: value.to_string(),
        supported,
    }
}

impl Processor {
    /// Reads what a checkpoint's `preprocessor_config.json` says. Keys that it leaves out have the defaults of
    /// `BitImageProcessor`; sizes may be numbers, as old files have them.
    ///
    /// # Errors
    ///
    /// - The file asks for another processor, for a step that is not done here (by its name, such as `do_pad`), or for
    ///   results of different sizes.
    /// - A value has the wrong kind, or a size or a standard deviation is zero.
    pub fn from_json(config: &Value) -> Result<Self, ProcessorError> {
        let config = Config(config.as_object().ok_or(ProcessorError::NotAnObject)?);
        config.check_class()?;
        config.check_steps()?;
        config.flag("do_convert_rgb")?;
        let processor = Self {
            resize: config
                .flag("do_resize")?
                .then(|| config.resize())
                .transpose()?,
            filter: config.filter()?,
            crop: config
                .flag("do_center_crop")?
                .then(|| config.crop())
                .transpose()?,
            rescale: config
                .flag("do_rescale")?
                .then(|| config.number("rescale_factor", RESCALE))
                .transpose()?,
            normalize: config
                .flag("do_normalize")?
                .then(|| config.normalize())
                .transpose()?,
        };
        match (processor.crop, processor.resize) {
            (Some(_), _) | (None, Some(Resize::Exact { .. })) => Ok(processor),
            (None, _) => Err(unsupported(
                "do_center_crop",
                &json!(false),
                "without a crop, size needs a height and a width, so that all images have one size",
            )),
        }
    }

    /// What `AutoImageProcessor.from_pretrained` of transformers 4 and 5 reads from `preprocessor_config.json`.
    pub fn to_json(&self) -> Value {
        let mut config = json!({
            "image_processor_type": CLASSES[0],
            "do_convert_rgb": self.channels() == 3,
            "do_resize": self.resize.is_some(),
            "resample": self.filter.number(),
            "do_center_crop": self.crop.is_some(),
            "do_rescale": self.rescale.is_some(),
            "do_normalize": self.normalize.is_some(),
        });
        match self.resize {
            Some(Resize::ShortestEdge(edge)) => config["size"] = json!({ "shortest_edge": edge }),
            Some(Resize::Exact { height, width }) => {
                config["size"] = json!({ "height": height, "width": width });
            }
            None => {}
        }
        if let Some([height, width]) = self.crop {
            config["crop_size"] = json!({ "height": height, "width": width });
        }
        if let Some(factor) = self.rescale {
            config["rescale_factor"] = json!(factor);
        }
        if let Some(Normalize { mean, std }) = &self.normalize {
            config["image_mean"] = json!(mean);
            config["image_std"] = json!(std);
        }
        config
    }
}

/// The file, of which null is the same as a key that is left out.
struct Config<'a>(&'a Map<String, Value>);

impl<'a> Config<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn check_class(&self) -> Result<(), ProcessorError> {
        for key in ["image_processor_type", "feature_extractor_type"] {
            match self.get(key) {
                Some(class) if !class.as_str().is_some_and(|class| CLASSES.contains(&class)) => {
                    return Err(unsupported(key, class, "it must be BitImageProcessor"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Refuses steps that change the pixels in a way that is not known here.
    fn check_steps(&self) -> Result<(), ProcessorError> {
        let unknown = self.0.iter().find(|(key, value)| {
            key.starts_with("do_") && !STEPS.contains(&key.as_str()) && **value == json!(true)
        });
        if let Some((key, value)) = unknown {
            return Err(unsupported(
                key,
                value,
                "the steps are resize, center crop, rescale and normalize",
            ));
        }
        match self.get("data_format") {
            Some(format) if format != "channels_first" => Err(unsupported(
                "data_format",
                format,
                "it must be channels_first",
            )),
            _ => Ok(()),
        }
    }

    fn flag(&self, key: &str) -> Result<bool, ProcessorError> {
        let Some(value) = self.get(key) else {
            return Ok(true);
        };
        value
            .as_bool()
            .ok_or_else(|| invalid(key, value, "true or false"))
    }

    fn number(&self, key: &str, default: f64) -> Result<f64, ProcessorError> {
        let Some(value) = self.get(key) else {
            return Ok(default);
        };
        value
            .as_f64()
            .ok_or_else(|| invalid(key, value, "a number"))
    }

    fn filter(&self) -> Result<Filter, ProcessorError> {
        let number = self.get("resample").cloned().unwrap_or(json!(BICUBIC));
        let filter = number.as_u64().and_then(Filter::from_number);
        filter.ok_or_else(|| {
            unsupported(
                "resample",
                &number,
                "the filters are 1 (lanczos), 2 (bilinear), 3 (bicubic), 4 (box) and 5 (hamming)",
            )
        })
    }

    fn resize(&self) -> Result<Resize, ProcessorError> {
        let Some(size) = self.get("size") else {
            return Ok(Resize::ShortestEdge(SIZE));
        };
        if size.is_number() {
            return Ok(Resize::ShortestEdge(length("size", size)?));
        }
        match self.sides("size", size)? {
            [Some(edge), None, None] => Ok(Resize::ShortestEdge(edge)),
            [None, Some(height), Some(width)] => Ok(Resize::Exact { height, width }),
            _ => Err(invalid(
                "size",
                size,
                "either shortest_edge, or height and width",
            )),
        }
    }

    fn crop(&self) -> Result<[usize; 2], ProcessorError> {
        let Some(size) = self.get("crop_size") else {
            return Ok([SIZE, SIZE]);
        };
        if size.is_number() {
            let side = length("crop_size", size)?;
            return Ok([side, side]);
        }
        match self.sides("crop_size", size)? {
            [None, Some(height), Some(width)] => Ok([height, width]),
            _ => Err(invalid("crop_size", size, "height and width")),
        }
    }

    /// `shortest_edge`, `height` and `width` of a size.
    fn sides(&self, key: &str, size: &Value) -> Result<[Option<usize>; 3], ProcessorError> {
        const NAMES: [&str; 3] = ["shortest_edge", "height", "width"];
        let sides = size
            .as_object()
            .ok_or_else(|| invalid(key, size, "an object or a number"))?;
        let mut found = [None; 3];
        for (name, value) in sides.iter().filter(|(_, value)| !value.is_null()) {
            let place = NAMES.iter().position(|known| known == name);
            let place = place.ok_or_else(|| {
                unsupported(
                    &format!("{key}.{name}"),
                    value,
                    "a size has shortest_edge, or height and width",
                )
            })?;
            found[place] = Some(length(&format!("{key}.{name}"), value)?);
        }
        Ok(found)
    }

    fn normalize(&self) -> Result<Normalize, ProcessorError> {
        let mean = self.channels("image_mean", &MEAN)?;
        let std = self.channels("image_std", &STD)?;
        if mean.len() != std.len() {
            let value = self.get("image_std").cloned().unwrap_or_default();
            return Err(invalid(
                "image_std",
                &value,
                "as many numbers as image_mean",
            ));
        }
        if std.contains(&0.0) {
            let value = self.get("image_std").cloned().unwrap_or_default();
            return Err(invalid("image_std", &value, "no zeros"));
        }
        Ok(Normalize { mean, std })
    }

    /// One number per channel; a single number holds for all three.
    fn channels(&self, key: &str, default: &[f64]) -> Result<Vec<f64>, ProcessorError> {
        let Some(value) = self.get(key) else {
            return Ok(default.to_vec());
        };
        if let Some(number) = value.as_f64() {
            return Ok(vec![number; 3]);
        }
        let numbers: Option<Vec<f64>> = value
            .as_array()
            .and_then(|values| values.iter().map(Value::as_f64).collect());
        numbers
            .filter(|numbers| matches!(numbers.len(), 1 | 3))
            .ok_or_else(|| invalid(key, value, "a number, or one per channel"))
    }
}

fn length(key: &str, value: &Value) -> Result<usize, ProcessorError> {
    value
        .as_u64()
        .filter(|length| (1..=65_536).contains(length))
        .map(|length| length as usize)
        .ok_or_else(|| invalid(key, value, "a number of pixels from 1 to 65536"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file of `facebook/dinov2-small`.
    fn published() -> Value {
        json!({
            "crop_size": { "height": 224, "width": 224 },
            "do_center_crop": true,
            "do_convert_rgb": true,
            "do_normalize": true,
            "do_rescale": true,
            "do_resize": true,
            "image_mean": [0.485, 0.456, 0.406],
            "image_processor_type": "BitImageProcessor",
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
            "rescale_factor": 0.003_921_568_627_450_98,
            "size": { "shortest_edge": 256 }
        })
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = published();
        config[key] = value;
        config
    }

    #[test]
    fn the_published_file_is_read_and_written_back() {
        let processor = Processor::from_json(&published()).unwrap();
        assert_eq!(processor, Processor::dinov2());
        assert_eq!(processor.to_json(), published());
    }

    #[test]
    fn an_empty_file_means_the_defaults_of_the_class() {
        let processor = Processor::from_json(&json!({ "size": null })).unwrap();
        assert_eq!(processor.resize, Some(Resize::ShortestEdge(224)));
        assert_eq!(processor.crop, Some([224, 224]));
        assert_eq!(processor.normalize.unwrap().mean[0], 0.481_454_66);
    }

    #[test]
    fn sizes_may_be_numbers_or_fixed() {
        let old = Processor::from_json(&with("size", json!(300))).unwrap();
        assert_eq!(old.resize, Some(Resize::ShortestEdge(300)));
        let old = Processor::from_json(&with("crop_size", json!(100))).unwrap();
        assert_eq!([old.height(), old.width()], [100, 100]);

        let mut fixed = with("size", json!({ "height": 30, "width": 40 }));
        fixed["do_center_crop"] = json!(false);
        let fixed = Processor::from_json(&fixed).unwrap();
        assert_eq!([fixed.height(), fixed.width()], [30, 40]);
        assert_eq!(Processor::from_json(&fixed.to_json()), Ok(fixed));
    }

    #[test]
    fn every_processor_reads_what_it_writes() {
        let mut bare = published();
        for step in ["do_resize", "do_rescale", "do_normalize"] {
            bare[step] = json!(false);
        }
        for processor in [
            Processor::digits(),
            Processor::dinov2().with_image_size(56),
            Processor::from_json(&bare).unwrap(),
        ] {
            assert_eq!(Processor::from_json(&processor.to_json()), Ok(processor));
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let no_crop = with("do_center_crop", json!(false));
        for (config, name) in [
            (with("do_pad", json!(true)), "do_pad = true"),
            (with("resample", json!(0)), "resample = 0"),
            (
                with("size", json!({ "longest_edge": 9 })),
                "size.longest_edge = 9",
            ),
            (
                with("image_processor_type", json!("CLIPImageProcessor")),
                "image_processor_type = \"CLIPImageProcessor\"",
            ),
            (with("data_format", json!("channels_last")), "data_format"),
            (no_crop, "do_center_crop = false"),
        ] {
            let error = Processor::from_json(&config).unwrap_err();
            assert!(matches!(error, ProcessorError::Unsupported { .. }));
            assert!(error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn values_of_the_wrong_kind_are_refused_by_name() {
        for (config, name) in [
            (with("do_resize", json!("yes")), "do_resize = \"yes\""),
            (with("size", json!({ "height": 5 })), "size = "),
            (
                with("size", json!({ "shortest_edge": 0 })),
                "size.shortest_edge = 0",
            ),
            (
                with("crop_size", json!({ "shortest_edge": 9 })),
                "crop_size = ",
            ),
            (
                with("image_mean", json!([0.5, 0.5])),
                "image_mean = [0.5,0.5]",
            ),
            (with("image_mean", json!([0.5])), "image_std = "),
            (
                with("image_std", json!([0.5, 0.0, 1.0])),
                "image_std = [0.5,0.0,1.0]",
            ),
            (with("rescale_factor", json!("1/255")), "rescale_factor"),
        ] {
            let error = Processor::from_json(&config).unwrap_err();
            assert!(matches!(error, ProcessorError::Invalid { .. }));
            assert!(error.to_string().contains(name), "{error}");
        }
        assert_eq!(
            Processor::from_json(&json!([])),
            Err(ProcessorError::NotAnObject)
        );
    }
}
