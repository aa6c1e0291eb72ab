//! Published models: the local cache of Hugging Face, else a download.

use std::env;
use std::io;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo};
use indicatif::ProgressBar;

use super::adapter::PREPROCESSOR;
use super::checkpoint::CONFIG;
use super::error::{WeightsError, one_line, unwritable};
use super::files::{Files, NAMES, index_of, shards};

const ENDPOINT: &str = "https://huggingface.co";

/// How often a download that breaks off is taken up again.
const RETRIES: usize = 3;

/// A server of models, and the folder where downloads are kept.
pub(super) struct Hub {
    cache: Cache,
    endpoint: String,
}

impl Hub {
    /// The cache that Python's `huggingface_hub` uses too, and the server it asks: `HF_HUB_CACHE` or `HF_HOME`, and
    /// `HF_ENDPOINT`.
    pub(super) fn from_env() -> Self {
        Self {
            cache: match env::var_os("HF_HUB_CACHE") {
                Some(path) => Cache::new(PathBuf::from(path)),
                None => Cache::from_env(),
            },
            endpoint: env::var("HF_ENDPOINT").unwrap_or_else(|_| ENDPOINT.to_string()),
        }
    }

    /// The folder of a model, downloaded where it is not in the cache or not complete.
    pub(super) fn folder(&self, name: &str) -> Result<PathBuf, WeightsError> {
        let cached = self.cache.model(name.to_string());
        match complete(&cached) {
            Some(folder) => Ok(folder),
            None => self.download(name, &cached),
        }
    }

    fn download(&self, name: &str, cached: &CacheRepo) -> Result<PathBuf, WeightsError> {
        let failed = |error| self.failure(name, error);
        let mut builder = ApiBuilder::from_cache(self.cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_progress(false)
            .with_retries(RETRIES);
        if let Ok(token) = env::var("HF_TOKEN") {
            builder = builder.with_token(Some(token));
        }
        let api = builder.build().map_err(failed)?;
        let model = api.model(name.to_string());
        let files = model.info().map_err(failed)?.siblings;
        let files: Vec<String> = files.into_iter().map(|file| file.rfilename).collect();
        let unpublished = |needed| WeightsError::Unpublished {
            name: name.to_string(),
            endpoint: self.endpoint.clone(),
            needed,
        };
        let has = |file: &str| files.iter().any(|other| other == file);
        if !has(CONFIG) {
            return Err(unpublished(CONFIG));
        }
        let candidates = NAMES
            .iter()
            .flat_map(|(file, _)| [file.to_string(), index_of(file)]);
        let weights = candidates.into_iter().find(|file| has(file));
        let weights = weights.ok_or_else(|| unpublished("weights"))?;

        let config = model.get(CONFIG).map_err(failed)?;
        if has(PREPROCESSOR) {
            model.get(PREPROCESSOR).map_err(failed)?;
        }
        let path = fetch(&model, cached, &weights).map_err(failed)?;
        if weights.ends_with(".json") {
            for shard in shards(&path)? {
                fetch(&model, cached, &shard).map_err(failed)?;
            }
        }
        Ok(config.parent().unwrap_or(Path::new("")).to_path_buf())
    }

    fn failure(&self, name: &str, error: ApiError) -> WeightsError {
        let text = one_line(&error.to_string());
        let reason = text.trim_start_matches("request error: ").to_string();
        let (name, endpoint) = (name.to_string(), self.endpoint.clone());
        let cache = self.cache.path().clone();
        match error {
            ApiError::IoError(source) => unwritable(&cache)(source),
            ApiError::LockAcquisition(path) => {
                let reason = "another program is downloading it";
                unwritable(&path)(io::Error::other(reason))
            }
            // The client's words for an answer other than success; everything else is no answer at all.
            ApiError::RequestError(_) if !reason.contains("http status") => WeightsError::Offline {
                name,
                cache,
                endpoint,
                reason,
            },
            _ => WeightsError::Refused {
                name,
                endpoint,
                reason,
            },
        }
    }
}

/// The folder of a model whose files are all in the cache.
fn complete(cached: &CacheRepo) -> Option<PathBuf> {
    let config = cached.get(CONFIG)?;
    let folder = config.parent()?;
    Files::find(folder).ok()?;
    Some(folder.to_path_buf())
}

/// A large file, with a progress bar where it is downloaded.
fn fetch(model: &ApiRepo, cached: &CacheRepo, file: &str) -> Result<PathBuf, ApiError> {
    match cached.get(file) {
        Some(path) => Ok(path),
        None => model.download_with_progress(file, ProgressBar::new(0)),
    }
}

/// Whether this can be the name of a published model: an owner and a name, of letters, digits, `-`, `_` and `.`.
pub(super) fn is_name(text: &str) -> bool {
    let is_part = |part: &str| {
        let allowed = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
        part.starts_with(|letter: char| letter.is_ascii_alphanumeric()) && part.chars().all(allowed)
    };
    text.split_once('/')
        .is_some_and(|(owner, name)| is_part(owner) && is_part(name))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use serde_json::json;

    use super::*;

    const NAME: &str = "facebook/dinov2-small";

    /// Nobody listens at this port.
    fn unreachable(cache: &Path) -> Hub {
        Hub {
            cache: Cache::new(cache.to_path_buf()),
            endpoint: "http://127.0.0.1:9".to_string(),
        }
    }

    /// A cache as `huggingface_hub` lays it out, with these empty files.
    fn cache(files: &[&str]) -> tempfile::TempDir {
        let cache = tempfile::tempdir().unwrap();
        let model = cache.path().join("models--facebook--dinov2-small");
        let snapshot = model.join("snapshots/0123abc");
        fs::create_dir_all(model.join("refs")).unwrap();
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(model.join("refs/main"), "0123abc").unwrap();
        for file in files {
            fs::write(snapshot.join(file), "").unwrap();
        }
        cache
    }

    #[test]
    fn a_model_in_the_cache_needs_no_network() {
        let cache = cache(&[CONFIG, "pytorch_model.bin"]);
        let folder = unreachable(cache.path()).folder(NAME).unwrap();
        assert!(folder.ends_with("models--facebook--dinov2-small/snapshots/0123abc"));
    }

    #[test]
    fn without_a_network_one_line_says_where_was_looked() {
        for files in [[].as_slice(), &[CONFIG], &["model.safetensors"]] {
            let cache = cache(files);
            let error = unreachable(cache.path()).folder(NAME).unwrap_err();
            let text = error.to_string();

            assert!(matches!(error, WeightsError::Offline { .. }), "{text}");
            assert!(!text.contains('\n'), "{text}");
            for part in [
                NAME,
                "127.0.0.1:9",
                cache.path().to_str().unwrap(),
                "give a folder",
            ] {
                assert!(text.contains(part), "{text}");
            }
        }
    }

    /// Answers as the server does, for one model with these files.
    fn serve(files: Vec<(&'static str, &'static str)>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &files).unwrap();
            }
        });
        endpoint
    }

    fn answer(mut stream: TcpStream, files: &[(&str, &str)]) -> io::Result<()> {
        let mut request = Vec::new();
        for line in BufReader::new(stream.try_clone()?).lines() {
            match line? {
                line if line.is_empty() => break,
                line => request.push(line),
            }
        }
        let path = request[0].split(' ').nth(1).unwrap();
        let is_range = |line: &&String| line.to_lowercase().starts_with("range: ");
        let range = request.iter().find(is_range).map_or("", String::as_str);
        let file = path.strip_prefix(&format!("/{NAME}/resolve/main/"));
        let content = file.and_then(|file| files.iter().find(|(name, _)| *name == file));
        let (status, body) = match content {
            Some((_, content)) if range.ends_with("-0") => ("206 Partial Content", &content[..1]),
            Some((_, content)) => ("200 OK", *content),
            None if path == format!("/api/models/{NAME}/revision/main") => ("200 OK", ""),
            None => ("404 Not Found", "no such thing"),
        };
        let siblings: Vec<_> = files
            .iter()
            .map(|(name, _)| json!({"rfilename": name}))
            .collect();
        let listing = json!({"sha": "0123abc", "siblings": siblings}).to_string();
        let body = if status == "200 OK" && content.is_none() {
            &listing
        } else {
            body
        };
        let total = content.map_or(body.len(), |(_, content)| content.len());
        let tag = file.unwrap_or_default();
        write!(
            stream,
            "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\ncontent-range: bytes 0-0/{total}\r\n\
             etag: \"{tag}\"\r\nx-repo-commit: 0123abc\r\n\r\n{body}",
            body.len(),
        )
    }

    #[test]
    fn a_model_is_downloaded_once_with_all_its_shards() {
        let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
        let cache = tempfile::tempdir().unwrap();
        let hub = Hub {
            endpoint: serve(vec![
                ("README.md", "unused"),
                (CONFIG, "{}"),
                (PREPROCESSOR, "[]"),
                ("pytorch_model.bin", "less preferred"),
                ("model.safetensors.index.json", index),
                ("model-1.safetensors", "one"),
                ("model-2.safetensors", "two"),
            ]),
            ..unreachable(cache.path())
        };
        let folder = hub.folder(NAME).unwrap();

        let mut names: Vec<_> = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        let expected = [
            CONFIG,
            "model-1.safetensors",
            "model-2.safetensors",
            "model.safetensors.index.json",
            PREPROCESSOR,
        ];
        assert_eq!(names, expected);
        assert_eq!(
            fs::read_to_string(folder.join("model-2.safetensors")).unwrap(),
            "two"
        );
        // From now on without the server.
        assert_eq!(unreachable(cache.path()).folder(NAME).unwrap(), folder);
    }

    #[test]
    fn a_model_that_is_not_published_is_told_from_a_network_that_fails() {
        let cache = tempfile::tempdir().unwrap();
        let hub = |files| Hub {
            endpoint: serve(files),
            ..unreachable(cache.path())
        };
        let error = hub(Vec::new())
            .folder("facebook/dinov3")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("does not give it out (http status: 404)"),
            "{error}"
        );
        let error = hub(vec![(CONFIG, "{}"), ("flax_model.msgpack", "x")])
            .folder(NAME)
            .unwrap_err();
        assert!(error.to_string().ends_with("has no weights"), "{error}");
        let error = hub(vec![("README.md", "x")]).folder(NAME).unwrap_err();
        assert!(error.to_string().ends_with("has no config.json"), "{error}");
    }

    #[test]
    fn a_path_is_no_name_of_a_model() {
        assert!(is_name("facebook/dinov2-with-registers-small"));
        for text in [
            "dinov2", "./model", "../model", "/model", "a/b/c", "a/", "~/model", "a b/c", "",
        ] {
            assert!(!is_name(text), "{text}");
        }
    }
}
