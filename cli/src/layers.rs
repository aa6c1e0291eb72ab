//! The layers of a model by their names: their order, and what kind each is.

use std::cmp::Ordering;
use std::collections::BTreeMap;

/// Compares two paths so that layer 2 comes before layer 10.
pub fn compare(a: &str, b: &str) -> Ordering {
    // A number sorts by its value, and before a name.
    fn parts(path: &str) -> impl Iterator<Item = (Option<u64>, &str)> {
        path.split('.').map(|part| match part.parse() {
            Ok(number) => (Some(number), part),
            Err(_) => (None, part),
        })
    }
    parts(a).cmp(parts(b))
}

/// What a layer is: its path with `*` in place of numbers.
pub fn pattern(path: &str) -> String {
    let parts: Vec<_> = path
        .split('.')
        .map(|part| match is_number(part) {
            true => "*",
            false => part,
        })
        .collect();
    parts.join(".")
}

/// What a layer is, in short: the path behind its last number, or the whole path if there is nothing behind one.
pub fn kind(path: &str) -> &str {
    let mut kind = path;
    let mut rest = path;
    while let Some((part, after)) = rest.split_once('.') {
        if is_number(part) {
            kind = after;
        }
        rest = after;
    }
    match is_number(kind) {
        true => path,
        false => kind,
    }
}

/// Names in one line. Many of them are shortened to patterns with `*` for numbers, each with how many it stands for.
pub fn short_list(names: &[String]) -> String {
    const NAMES: usize = 8;
    if names.len() <= NAMES {
        return names.join(", ");
    }
    let mut patterns = BTreeMap::new();
    for name in names {
        *patterns.entry(pattern(name)).or_insert(0) += 1;
    }
    let shown = patterns.iter().take(NAMES);
    let shown: Vec<_> = shown
        .map(|(pattern, count)| format!("{pattern} ({count})"))
        .collect();
    let more = patterns.len() - shown.len();
    let rest = match more {
        0 => String::new(),
        more => format!(" and {more} more, which --json lists"),
    };
    format!("{} names: {}{rest}", names.len(), shown.join(", "))
}

fn is_number(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_2_comes_before_layer_10() {
        let mut paths = ["h.10.fc", "h.2.b", "h.2.a", "h.1", "10", "9", "a", "h"];
        paths.sort_by(|a, b| compare(a, b));
        assert_eq!(
            paths,
            ["a", "h", "h.1", "h.2.a", "h.2.b", "h.10.fc", "9", "10"]
        );
    }

    #[test]
    fn layers_of_one_kind_differ_only_in_their_numbers() {
        for (path, of, short) in [
            (
                "encoder.layer.10.mlp.fc1",
                "encoder.layer.*.mlp.fc1",
                "mlp.fc1",
            ),
            ("stages.0.blocks.3.fc", "stages.*.blocks.*.fc", "fc"),
            ("classifier", "classifier", "classifier"),
            ("head.0", "head.*", "head.0"),
            ("0.fc", "*.fc", "fc"),
            ("", "", ""),
        ] {
            assert_eq!((pattern(path).as_str(), kind(path)), (of, short));
        }
    }

    #[test]
    fn many_targets_are_shortened_to_patterns() {
        let names = |count: usize, of: fn(usize) -> String| (0..count).map(of).collect::<Vec<_>>();
        assert_eq!(
            short_list(&names(2, |i| format!("layer.{i}.fc"))),
            "layer.0.fc, layer.1.fc"
        );
        assert_eq!(
            short_list(&names(72, |i| format!("layer.{}.fc{}", i / 2, 1 + i % 2))),
            "72 names: layer.*.fc1 (36), layer.*.fc2 (36)"
        );
        let all = short_list(&names(20, |i| format!("module{i:02}")));
        assert!(
            all.ends_with("module07 (1) and 12 more, which --json lists"),
            "{all}"
        );
    }
}
