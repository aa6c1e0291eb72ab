//! The layers of a model by their names: their order, and what kind each is.

use std::cmp::Ordering;

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
}
