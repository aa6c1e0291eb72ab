//! Models whose head and input embedding are one tensor, and adapters that change one of the two.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::files::*;

const ROWS: usize = 7;
const WIDTH: usize = 8;
const MERGE: [&str; 7] = merge_command("model", "adapter", "out");

/// A model's folder, and an adapter that rotates one of its layers and saves modules.
struct Model {
    folder: tempfile::TempDir,
    layer: &'static str,
    tensors: Tensors,
}

impl Model {
    /// A model with these tensors beside a layer to rotate, and this `config.json`.
    fn new(config: Option<&str>, layer: &'static str, tensors: &[(&str, Tensor)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut all = Tensors::new();
        all.insert(format!("{layer}.weight"), Tensor::random(&[6, WIDTH], 1));
        all.extend(
            tensors
                .iter()
                .map(|(key, tensor)| (key.to_string(), tensor.clone())),
        );
        let mut first = all.clone();
        let last = first.split_off(all.keys().last().unwrap());
        let path = folder.path().join("model");
        write_shards(&path, &[first, last]);
        if let Some(config) = config {
            fs::write(path.join("config.json"), config).unwrap();
        }
        Self {
            folder,
            layer,
            tensors: all,
        }
    }

    /// A Llama whose head is its embedding.
    fn llama(config: &str) -> Self {
        let embedding = ("model.embed_tokens.weight", embedding(2));
        Self::new(
            Some(config),
            "model.layers.0.self_attn.q_proj",
            &[embedding],
        )
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Writes an adapter that saves these tensors.
    fn save(&self, saved: &[(&str, Tensor)]) -> &Self {
        let modules = saved.iter().map(|(key, _)| key.rsplit_once('.').unwrap().0);
        let modules: Vec<_> = modules
            .map(|module| module.rsplit('.').next().unwrap())
            .collect();
        let layer = self.layer.rsplit('.').next().unwrap();
        let config = json!({
            "peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": false, "target_modules": [layer],
            "modules_to_save": modules
        });
        let key = |key: &str| format!("base_model.model.{key}");
        let mut tensors: Tensors = [(
            key(&format!("{}.oft_R.weight", self.layer)),
            Tensor::random(&[2, 6], 3),
        )]
        .into();
        tensors.extend(
            saved
                .iter()
                .map(|(name, tensor)| (key(name), tensor.clone())),
        );
        write_adapter(&self.path().join("adapter"), &config, &tensors);
        self
    }

    /// Merges; the tensors of the merged model, and its `config.json`.
    fn merge(&self) -> (Tensors, String) {
        let out = self.path().join("out");
        _ = fs::remove_dir_all(&out);
        succeed(self.path(), &MERGE);
        let index = read_json(&out.join("model.safetensors.index.json"));
        let mut found = Tensors::new();
        for (key, shard) in index["weight_map"].as_object().unwrap() {
            let shard = read(&out.join(shard.as_str().unwrap()));
            found.insert(key.clone(), shard[key].clone());
        }
        let bytes: usize = found.values().map(|tensor| 4 * tensor.numbers.len()).sum();
        assert_eq!(index["metadata"]["total_size"], json!(bytes));
        let config = fs::read_to_string(out.join("config.json")).unwrap();
        (found, config)
    }

    /// The line that merging is refused with.
    fn refused(&self) -> String {
        let line = refused(self.path(), &MERGE);
        assert_eq!(names(self.path()), ["adapter", "model"]);
        line
    }
}

fn embedding(seed: u64) -> Tensor {
    Tensor::random(&[ROWS, WIDTH], seed)
}

/// The text of a configuration, with numbers that would not come back from a parser as they are written.
fn text(config: &str) -> String {
    format!("{{\n  {config},\n  \"eps\": 1e-05,\n  \"theta\": 10000.00\n}}\n")
}

const TIED: &str = r#""model_type": "llama", "tie_word_embeddings": true"#;
const UNTIED: &str = r#""model_type": "llama", "tie_word_embeddings": false"#;

#[test]
fn a_head_that_shares_the_embedding_keeps_its_numbers_when_the_embedding_is_trained() {
    let model = Model::llama(&text(TIED));
    model.save(&[("model.embed_tokens.weight", embedding(4))]);
    let (merged, config) = model.merge();
    assert_eq!(merged["model.embed_tokens.weight"], embedding(4));
    assert_eq!(merged["lm_head.weight"], embedding(2));
    assert_eq!(config, text(UNTIED));
    let note = "note: the model's head shares the tensor of its embedding, and the adapter changes one of the two; the \
                merged model has a tensor for each, and its config.json says \"tie_word_embeddings\": false\n";
    let dry = run(model.path(), &[&MERGE[..5], &["--dry-run"]].concat());
    assert_eq!(dry.stderr, note);
    let row = "lm_head.weight                          [7, 8] f32  model-00002-of-00002.safetensors  add as a copy of \
               model.embed_tokens.weight\n";
    assert!(dry.stdout.contains(row), "{}", dry.stdout);
}

#[test]
fn a_trained_head_does_not_change_the_embedding_it_shared() {
    let model = Model::llama(&text(TIED));
    model.save(&[("lm_head.weight", embedding(4))]);
    let (merged, config) = model.merge();
    assert_eq!(merged["model.embed_tokens.weight"], embedding(2));
    assert_eq!(merged["lm_head.weight"], embedding(4));
    assert_eq!(config, text(UNTIED));

    // A file may hold the tensor twice.
    let twice = [
        ("model.embed_tokens.weight", embedding(2)),
        ("lm_head.weight", embedding(2)),
    ];
    let model = Model::new(Some(&text(TIED)), "model.q_proj", &twice);
    model.save(&[("lm_head.weight", embedding(4))]);
    let (merged, config) = model.merge();
    assert_eq!(merged["model.embed_tokens.weight"], embedding(2));
    assert_eq!(merged["lm_head.weight"], embedding(4));
    assert_eq!(config, text(UNTIED));
}

#[test]
fn a_head_and_an_embedding_that_are_both_trained_are_both_written() {
    let model = Model::llama(&text(TIED));
    model.save(&[
        ("lm_head.weight", embedding(4)),
        ("model.embed_tokens.weight", embedding(5)),
    ]);
    let (merged, config) = model.merge();
    assert_eq!(merged["model.embed_tokens.weight"], embedding(5));
    assert_eq!(merged["lm_head.weight"], embedding(4));
    assert_eq!(config, text(UNTIED));
}

/// PEFT's forward pass rotates what the embedding gives, and the head has the numbers of the base. Its merge rotates the one tensor
/// of both, which is another model.
#[test]
fn a_head_that_shares_the_embedding_keeps_its_numbers_when_the_embedding_is_rotated() {
    let model = Model::llama(&text(TIED));
    model.save(&[]);
    let config = read_json(&model.path().join("adapter/adapter_config.json"));
    let key = "base_model.model.model.embed_tokens.oft_embedding_R.weight".to_string();
    let adapter = [(key, Tensor::random(&[2, 6], 5))];
    write_adapter(&model.path().join("adapter"), &config, &adapter.into());
    let (merged, config) = model.merge();
    assert_ne!(merged["model.embed_tokens.weight"], embedding(2));
    assert_eq!(merged["lm_head.weight"], embedding(2));
    assert_eq!(config, text(UNTIED));

    let unmerge = "unmerge --merged out --adapter adapter --output back";
    succeed(model.path(), &unmerge.split(' ').collect::<Vec<_>>());
    let back = model.path().join("back");
    let shard = names(&back).into_iter().find(|name| {
        name.ends_with(".safetensors")
            && read(&back.join(name)).contains_key("model.embed_tokens.weight")
    });
    let found = read(&back.join(shard.unwrap()));
    assert!(difference(&found["model.embed_tokens.weight"], &embedding(2)) < TOLERANCE);
}

#[test]
fn the_model_type_says_what_the_configuration_does_not() {
    let gpt2 = [("transformer.wte.weight", embedding(2))];
    let model = Model::new(Some(r#"{"model_type": "gpt2"}"#), "transformer.proj", &gpt2);
    model.save(&[("transformer.wte.weight", embedding(4))]);
    let (merged, config) = model.merge();
    assert_eq!(merged["lm_head.weight"], embedding(2));
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(
        config,
        json!({"model_type": "gpt2", "tie_word_embeddings": false})
    );

    let untied = r#"{"model_type": "llama"}"#;
    let model = Model::llama(untied);
    model.save(&[("model.embed_tokens.weight", embedding(4))]);
    let (merged, config) = model.merge();
    assert!(merged.keys().eq(model.tensors.keys()));
    assert_eq!(config, untied);
}

#[test]
fn berts_head_gets_its_weight_and_its_bias_and_a_classifier_needs_neither() {
    let word = "bert.embeddings.word_embeddings.weight";
    let bias = Tensor::random(&[ROWS], 6);
    let tensors = [(word, embedding(2)), ("cls.predictions.bias", bias.clone())];
    let masked = r#"{"architectures": ["BertForMaskedLM"], "model_type": "bert"}"#;
    let model = Model::new(Some(masked), "bert.encoder.query", &tensors);
    model.save(&[(word, embedding(4))]);
    let (merged, _) = model.merge();
    assert_eq!(merged[word], embedding(4));
    assert_eq!(merged["cls.predictions.decoder.weight"], embedding(2));
    assert_eq!(merged["cls.predictions.decoder.bias"], bias);

    let classifier =
        r#"{"architectures": ["BertForSequenceClassification"], "model_type": "bert"}"#;
    let model = Model::new(Some(classifier), "bert.encoder.query", &tensors[..1]);
    model.save(&[(word, embedding(4))]);
    let (merged, config) = model.merge();
    assert!(merged.keys().eq(model.tensors.keys()));
    assert_eq!(config, classifier);
}

#[test]
fn a_head_that_cannot_be_given_its_own_tensor_is_refused() {
    let tied = "ties the head to the embedding, which cannot be undone here";
    let own = "save the model with a head of its own first";
    let saved = "the adapter changes `model.embed_tokens.weight`, and model/config.json";
    let llama = |config: &str| {
        let model = Model::llama(config);
        model.save(&[("model.embed_tokens.weight", embedding(4))]);
        model.refused()
    };
    assert_eq!(
        llama(r#"{"model_type": "new", "tie_word_embeddings": true}"#),
        format!(
            "model: {saved} {tied}: burn-boft does not know how models of its type share it; {own}"
        )
    );
    assert_eq!(
        llama(r#"{"model_type": "llava", "text_config": {"tie_word_embeddings": true}}"#),
        format!(
            "model: {saved} {tied}: burn-boft does not know how models of its type share it; {own}"
        )
    );
    assert_eq!(
        llama(r#"{"model_type": "gpt2"}"#),
        format!(
            "model: {saved} {tied}: transformers calls the two `transformer.wte.weight` and `lm_head.weight`, and \
             `model.embed_tokens.weight` is neither; {own}"
        )
    );

    let other = [
        ("model.embed_tokens.weight", embedding(2)),
        ("lm_head.weight", embedding(3)),
    ];
    let model = Model::new(Some(&text(TIED)), "model.q_proj", &other);
    model.save(&[("model.embed_tokens.weight", embedding(4))]);
    assert_eq!(
        model.refused(),
        format!(
            "model: {saved} {tied}: the file has a `lm_head.weight` with other numbers than `model.embed_tokens.weight`; {own}"
        )
    );

    let model = Model::llama(&text(TIED));
    model.save(&[(
        "model.embed_tokens.weight",
        Tensor::random(&[ROWS + 1, WIDTH], 4),
    )]);
    assert_eq!(
        model.refused(),
        format!("model: {saved} {tied}: the embedding gets another number of rows; {own}")
    );

    // The head rotated.
    let model = Model {
        layer: "lm_head",
        ..Model::llama(&text(TIED))
    };
    model.save(&[]);
    assert_eq!(
        model.refused(),
        format!(
            "model: `lm_head.weight` is the embedding, and a rotation of the head would rotate both; {own}"
        )
    );
}

#[test]
fn an_embedding_that_encoder_and_decoder_share_is_refused() {
    for config in [
        r#"{"model_type": "t5"}"#,
        r#"{"model_type": "t5", "tie_word_embeddings": false}"#,
    ] {
        let model = Model::new(
            Some(config),
            "encoder.q",
            &[("shared.weight", embedding(2))],
        );
        model.save(&[("shared.weight", embedding(4))]);
        assert_eq!(
            model.refused(),
            "model: the adapter changes `shared.weight`, and the encoder and the decoder share it, and PEFT trains \
             a copy that neither of them uses; train the adapter without it"
        );
    }
    let t5 = Some(r#"{"model_type": "t5", "is_encoder_decoder": true}"#);
    let model = Model::new(t5, "encoder.q", &[("shared.weight", embedding(2))]);
    model.save(&[("lm_head.weight", embedding(4))]);
    assert_eq!(
        model.refused(),
        "model: the adapter changes `lm_head.weight`, and model/config.json does not say whether embedding and head are \
         one tensor; if they are two, add `\"tie_word_embeddings\": false`"
    );
}

#[test]
fn a_model_that_does_not_say_whether_it_shares_its_head_is_refused_unless_its_file_shows() {
    let embed = ("model.embed_tokens.weight", embedding(2));
    let saved = "the adapter changes `model.embed_tokens.weight`, and";
    let merge = |head: Option<Tensor>| {
        let head = head.map(|head| ("lm_head.weight", head));
        let tensors: Vec<_> = [embed.clone()].into_iter().chain(head).collect();
        let model = Model::new(None, "model.q_proj", &tensors);
        model.save(&[("model.embed_tokens.weight", embedding(4))]);
        model
    };
    let nothing = "nothing says whether embedding and head are one tensor; if they are two, write model/config.json with \
                   `\"tie_word_embeddings\": false`";
    assert_eq!(merge(None).refused(), format!("model: {saved} {nothing}"));
    assert_eq!(
        merge(Some(embedding(2))).refused(),
        format!("model: {saved} {nothing}")
    );
    let own = merge(Some(embedding(3)));
    succeed(own.path(), &MERGE);

    // A file alone: its folder says, and only the folder can be corrected.
    let model = Model::llama(&text(TIED));
    model.save(&[("model.embed_tokens.weight", embedding(4))]);
    let file = model.path().join("model/model.safetensors");
    write(&file, &model.tensors);
    let merge = "merge --base model/model.safetensors --adapter adapter --output out.safetensors";
    let merge: Vec<_> = merge.split(' ').collect();
    assert_eq!(
        refused(model.path(), &merge),
        format!(
            "model/model.safetensors: {saved} model/config.json ties the head to the embedding, which a merged file alone \
             cannot correct; name the model's folder instead of the file"
        )
    );
    fs::write(model.path().join("model/config.json"), text(UNTIED)).unwrap();
    succeed(model.path(), &merge);
}

/// Python writes `Infinity` into JSON, which has no such number.
#[test]
fn a_configuration_that_is_no_json_is_not_taken_for_a_missing_one() {
    let config = r#"{"model_type": "llama", "tie_word_embeddings": true, "beta": Infinity}"#;
    let model = Model::llama(config);
    model.save(&[("model.embed_tokens.weight", embedding(4))]);
    assert_eq!(
        model.refused(),
        "model: the adapter changes `model.embed_tokens.weight`, and model/config.json, which says whether embedding and \
         head are one tensor, is no JSON: expected value at line 1 column 62; mend it"
    );
}

/// CTRL calls its embedding `w`. What has a row for each token is taken for the embedding, whatever its name.
#[test]
fn a_rotated_embedding_of_any_name_may_be_the_one_that_the_head_shares() {
    let config = r#"{"model_type": "ctrl", "architectures": ["CTRLLMHeadModel"], "vocab_size": 7, "tie_word_embeddings": true}"#;
    let tensors = [
        ("transformer.w.weight", embedding(2)),
        ("transformer.pos.weight", Tensor::random(&[11, WIDTH], 5)),
    ];
    let model = Model::new(Some(config), "transformer.h.0.q", &tensors);
    let rotate = |name: &str| {
        let config = json!({
            "peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": false, "target_modules": [name]
        });
        let key = format!("base_model.model.transformer.{name}.oft_embedding_R.weight");
        let tensors = [(key, Tensor::random(&[2, 6], 3))].into();
        write_adapter(&model.path().join("adapter"), &config, &tensors);
    };
    rotate("w");
    let line = model.refused();
    let start = "model: the adapter changes `transformer.w.weight`, and model/config.json ties the head to the embedding";
    assert!(line.starts_with(start), "{line}");
    rotate("pos");
    let (merged, _) = model.merge();
    assert_eq!(
        merged["transformer.w.weight"],
        model.tensors["transformer.w.weight"]
    );
    assert_ne!(
        merged["transformer.pos.weight"],
        model.tensors["transformer.pos.weight"]
    );
}
