//! The order of names in which `layer.2` comes before `layer.10`.

use std::cmp::Ordering;

/// Compares two names, runs of digits by the numbers they stand for.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (a, b);
    loop {
        let (first, second) = (part(left), part(right));
        if first.is_empty() || second.is_empty() {
            // Names that differ in leading zeros alone are still two names.
            return first.len().cmp(&second.len()).then_with(|| a.cmp(b));
        }
        let order = match (is_number(first), is_number(second)) {
            (true, true) => {
                let [one, other] = [first, second].map(|digits| digits.trim_start_matches('0'));
                one.len().cmp(&other.len()).then_with(|| one.cmp(other))
            }
            _ => first.cmp(second),
        };
        if order != Ordering::Equal {
            return order;
        }
        (left, right) = (&left[first.len()..], &right[second.len()..]);
    }
}

/// The digits or the other characters that a name starts with.
fn part(name: &str) -> &str {
    let is_digit = is_number(name);
    let end = name.find(|c: char| c.is_ascii_digit() != is_digit);
    &name[..end.unwrap_or(name.len())]
}

fn is_number(part: &str) -> bool {
    part.starts_with(|c: char| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_count_by_their_value() {
        let mut names = [
            "layer.10.fc1",
            "layer.2.fc2",
            "layer.2.fc1",
            "layer.02.fc1",
            "layer",
            "7",
            "b.1",
            "layer.99999999999999999999999",
        ];
        names.sort_by(|a, b| compare(a, b));
        assert_eq!(
            names,
            [
                "7",
                "b.1",
                "layer",
                "layer.02.fc1",
                "layer.2.fc1",
                "layer.2.fc2",
                "layer.10.fc1",
                "layer.99999999999999999999999",
            ]
        );
        assert_eq!(compare("é.3", "é.3"), Ordering::Equal);
    }
}
