//! Rust sources, read for what they import.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// A word, a sign or a literal of a source. `::` is one token.
struct Token {
    text: String,
    line: usize,
}

/// Adds the tokens of code, without comments, documentation and items that only tests see.
fn tokenize(code: TokenStream, found: &mut Vec<Token>) {
    let mut trees = code.into_iter().peekable();
    while let Some(tree) = trees.next() {
        let line = tree.span().start().line;
        let mut add = |text: String| found.push(Token { text, line });
        match tree {
            TokenTree::Punct(sign) if sign.as_char() == '#' => {
                trees.next_if(|next| next.to_string() == "!");
                let attribute = trees.next().map(|group| group.to_string());
                let attribute = attribute.unwrap_or_default().replace(' ', "");
                if attribute == "[cfg(test)]" || attribute.starts_with("[cfg(all(test,") {
                    let is_end = |tree: &TokenTree| match tree {
                        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
                        tree => tree.to_string() == ";",
                    };
                    trees.by_ref().find(is_end);
                }
            }
            TokenTree::Punct(sign) if sign.as_char() == ':' => {
                match trees.next_if(|next| next.to_string() == ":") {
                    Some(_) => add("::".into()),
                    None => add(":".into()),
                }
            }
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::None => ("", ""),
                };
                add(open.into());
                tokenize(group.stream(), found);
                let line = group.span_close().start().line;
                found.push(Token {
                    text: close.into(),
                    line,
                });
            }
            tree => add(tree.to_string()),
        }
    }
}

/// A path as it is written in a source, such as `crate::rotation::Method`.
struct Mention {
    segments: Vec<String>,
    /// What a `use` calls it.
    name: String,
    line: usize,
}

/// Reads the paths that start at a token, more than one where a `use` has braces, and returns the token after them.
fn read_paths(
    tokens: &[Token],
    start: usize,
    prefix: &[String],
    found: &mut Vec<Mention>,
) -> usize {
    let text = |at: usize| tokens.get(at).map_or("", |token| token.text.as_str());
    let mut segments = prefix.to_vec();
    let mut at = start;
    if text(at) == "{" {
        at += 1;
        while text(at) != "}" && at < tokens.len() {
            at = match text(at) {
                "," => at + 1,
                _ => read_paths(tokens, at, &segments, found),
            };
        }
        return at + 1;
    }
    if text(at) != "self" || prefix.is_empty() {
        segments.push(text(at).to_string());
    }
    at += 1;
    let is_segment =
        |text: &str| text.starts_with(|c: char| c.is_alphabetic() || "_{*".contains(c));
    if text(at) == "::" && is_segment(text(at + 1)) {
        return read_paths(tokens, at + 1, &segments, found);
    }
    let mut name = segments.last().cloned().unwrap_or_default();
    if text(at) == "as" {
        name = text(at + 1).to_string();
        at += 2;
    }
    let line = tokens[start].line;
    found.push(Mention {
        segments,
        name,
        line,
    });
    at
}

/// A source file and what it says about others.
pub struct File {
    pub path: String,
    /// Its place in the tree of modules, such as `["model", "walk"]`.
    module: Vec<String>,
    tokens: Vec<Token>,
    /// The modules that it declares.
    children: BTreeSet<String>,
    imports: Vec<Mention>,
    /// Its `pub use` lines, of any visibility.
    reexports: Vec<Mention>,
    /// The paths outside of `use`.
    paths: Vec<Mention>,
    /// The words outside of `use` and `mod`.
    words: BTreeSet<String>,
}

impl File {
    fn new(path: &str, source: &str) -> Self {
        let code = source
            .parse()
            .unwrap_or_else(|error| panic!("{path} is no Rust: {error}"));
        let mut file = Self {
            path: path.to_string(),
            module: module_of(path),
            tokens: Vec::new(),
            children: BTreeSet::new(),
            imports: Vec::new(),
            reexports: Vec::new(),
            paths: Vec::new(),
            words: BTreeSet::new(),
        };
        tokenize(code, &mut file.tokens);
        file.read();
        file
    }

    fn read(&mut self) {
        let tokens = &self.tokens;
        let text = |at: usize| tokens.get(at).map_or("", |token| token.text.as_str());
        let mut at = 0;
        while at < tokens.len() {
            let before = at.checked_sub(1).map_or("", text);
            at = match text(at) {
                // Not the `use<'a>` of a captured lifetime.
                "use" if text(at + 1) != "<" => {
                    let is_public = before == "pub" || before == ")";
                    let found = if is_public {
                        &mut self.reexports
                    } else {
                        &mut self.imports
                    };
                    read_paths(tokens, at + 1, &[], found)
                }
                "mod" if text(at + 2) == ";" => {
                    self.children.insert(text(at + 1).to_string());
                    at + 3
                }
                word => {
                    self.words.insert(word.to_string());
                    if text(at + 1) == "::" && before != "::" {
                        read_paths(tokens, at, &[], &mut self.paths);
                    }
                    at + 1
                }
            };
        }
    }

    /// The file or folder of `src/` that it is or lies in; `lib` for the root.
    pub fn room(&self) -> &str {
        self.module.first().map_or("lib", String::as_str)
    }

    /// The lines that bear a mark of a fact.
    pub fn lines_with(&self, mark: &str) -> Vec<usize> {
        if let Some(part) = mark.strip_prefix('"') {
            let strings = self.tokens.iter().filter(|token| token.text.contains('"'));
            let strings = strings.filter(|token| token.text.contains(part));
            return strings.map(|token| token.line).collect();
        }
        let mut wanted = Vec::new();
        tokenize(mark.parse().unwrap(), &mut wanted);
        let equal = |window: &&[Token]| window.iter().zip(&wanted).all(|(a, b)| a.text == b.text);
        let windows = self.tokens.windows(wanted.len());
        windows.filter(equal).map(|window| window[0].line).collect()
    }
}

/// `src/model/walk.rs` is the module `model::walk`, `src/model/mod.rs` is `model`, and the root's path is empty.
fn module_of(path: &str) -> Vec<String> {
    let inner = path.rsplit_once("src/").map_or(path, |(_, inner)| inner);
    let parts = inner.trim_end_matches(".rs").split('/');
    let mut module: Vec<_> = parts.map(str::to_string).collect();
    if ["mod", "lib", "main"].contains(&module.last().unwrap().as_str()) {
        module.pop();
    }
    module
}

/// An import of one file by another, with the line and the path that say so.
pub struct Arrow<'a> {
    pub from: &'a File,
    pub to: &'a File,
    pub line: usize,
    pub path: String,
}

/// The sources of one crate.
pub struct Sources {
    pub files: BTreeMap<Vec<String>, File>,
}

impl Sources {
    pub fn new<'a>(sources: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let files = sources
            .into_iter()
            .map(|(path, source)| File::new(path, source));
        Self {
            files: files.map(|file| (file.module.clone(), file)).collect(),
        }
    }

    /// The sources of the crate in a folder of the repository.
    pub fn read(folder: &str) -> Self {
        fn visit(root: &Path, folder: &str, found: &mut Vec<(String, String)>) {
            for entry in fs::read_dir(root.join(folder)).unwrap() {
                let entry = entry.unwrap();
                let path = format!("{folder}/{}", entry.file_name().to_str().unwrap());
                if entry.path().is_dir() {
                    visit(root, &path, found);
                } else if path.ends_with(".rs") {
                    found.push((path, fs::read_to_string(entry.path()).unwrap()));
                }
            }
        }
        let mut found = Vec::new();
        visit(Path::new(env!("CARGO_MANIFEST_DIR")), folder, &mut found);
        Self::new(
            found
                .iter()
                .map(|(path, source)| (path.as_str(), source.as_str())),
        )
    }

    /// A path from the crate's root on. None where it leads to another crate.
    fn from_root(file: &File, segments: &[String]) -> Option<Vec<String>> {
        let (first, rest) = segments.split_first()?;
        let mut path = match first.as_str() {
            "crate" => Vec::new(),
            "self" | "super" => file.module.clone(),
            child if file.children.contains(child) => [&file.module[..], &segments[..1]].concat(),
            _ => return None,
        };
        let ups = segments
            .iter()
            .take_while(|segment| *segment == "super")
            .count();
        path.truncate(path.len() - ups);
        path.extend_from_slice(&rest[ups.saturating_sub(1)..]);
        Some(path)
    }

    /// The file in which the item of a path is written: through the lines that only hand it on.
    fn home(&self, path: &[String]) -> Option<&File> {
        let depth = (0..=path.len())
            .rev()
            .find(|depth| self.files.contains_key(&path[..*depth]))?;
        let file = &self.files[&path[..depth]];
        let handed_on = path.get(depth).and_then(|item| {
            let reexport = file
                .reexports
                .iter()
                .find(|reexport| reexport.name == *item)?;
            self.home(&Self::from_root(file, &reexport.segments)?)
        });
        Some(handed_on.unwrap_or(file))
    }

    /// Every file that a file imports. A `pub use` counts where the file itself uses the name.
    pub fn arrows(&self) -> Vec<Arrow<'_>> {
        let mut arrows = BTreeMap::new();
        for file in self.files.values() {
            let used = file
                .reexports
                .iter()
                .filter(|reexport| file.words.contains(&reexport.name));
            let imports: Vec<_> = file.imports.iter().chain(used).collect();
            for mention in imports.iter().copied().chain(&file.paths) {
                // A path that starts with an imported name goes on from there.
                let import = imports
                    .iter()
                    .find(|import| import.name == mention.segments[0]);
                let path = Self::from_root(file, &mention.segments).or_else(|| {
                    let mut path = Self::from_root(file, &import?.segments)?;
                    path.extend_from_slice(&mention.segments[1..]);
                    Some(path)
                });
                let Some(to) = path.and_then(|path| self.home(&path)) else {
                    continue;
                };
                if to.path != file.path {
                    arrows.entry((&file.path, &to.path)).or_insert_with(|| {
                        let path = mention.segments.join("::");
                        Arrow {
                            from: file,
                            to,
                            line: mention.line,
                            path,
                        }
                    });
                }
            }
        }
        arrows.into_values().collect()
    }
}
