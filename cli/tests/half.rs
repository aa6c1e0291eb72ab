//! Adapters of LyCORIS on models in half precision, which LyCORIS's forward pass and its merge round in different ways.

use std::path::{Path, PathBuf};

use burn::tensor::{bf16, f16};
use safetensors::tensor::Dtype;

use crate::files::*;

/// One folder of `tests/fixtures/lycoris/half`.
struct Half {
    name: String,
    folder: PathBuf,
    dtype: Dtype,
}

impl Half {
    fn all() -> Vec<Self> {
        let cases = fixtures().join("lycoris/half");
        let names = names(&cases).into_iter();
        let cases: Vec<_> = names
            .map(|name| {
                let folder = cases.join(&name);
                let base = read(&folder.join("base.safetensors"));
                let dtype = base.values().next().unwrap().dtype;
                Self {
                    name,
                    folder,
                    dtype,
                }
            })
            .collect();
        assert_eq!(cases.len(), 6);
        cases
    }

    fn tensors(&self, file: &str) -> Tensors {
        read(&self.folder.join(file))
    }

    /// What the tool makes of the base with this adapter.
    fn merged(&self, adapter: &Path) -> Tensors {
        let folder = tempfile::tempdir().unwrap();
        let base = self.folder.join("base.safetensors");
        let (base, adapter) = (base.to_str().unwrap(), adapter.to_str().unwrap());
        succeed(folder.path(), &merge_command(base, adapter, "merged"));
        read(&folder.path().join("merged"))
    }

    /// The number in the precision of the model.
    fn rounded(&self, x: f64) -> f64 {
        match self.dtype {
            Dtype::BF16 => bf16::from_f64(x).to_f64(),
            _ => f16::from_f64(x).to_f64(),
        }
    }

    /// The distance from one number of the precision to the next, at this one.
    fn step(&self, x: f64) -> f64 {
        let digits = if self.dtype == Dtype::BF16 { 7 } else { 10 };
        2f64.powi(x.abs().max(1e-4).log2().floor() as i32 - digits)
    }

    /// Asserts that two models are the same but for few numbers, and that those are neighbours: both are computed in f32, whose
    /// rounding decides where a number lies between two of the precision. Rows with slack may differ by so much of the base's
    /// numbers.
    fn assert_same(&self, found: &Tensors, expected: &Tensors, slack: impl Fn(&str) -> Vec<f64>) {
        assert!(found.keys().eq(expected.keys()));
        let base = self.tensors("base.safetensors");
        let (mut unlike, mut all) = (0, 0);
        for (key, expected) in expected {
            let (found, base) = (&found[key], &base[key]);
            assert_eq!((found.dtype, &found.shape), (self.dtype, &expected.shape));
            let slack = slack(key);
            let columns = found.numbers.len() / found.shape[0];
            let pairs = found.numbers.iter().zip(&expected.numbers);
            for (at, (found, expected)) in pairs.enumerate() {
                let apart = (found - expected).abs();
                let slack =
                    slack.get(at / columns).copied().unwrap_or(0.0) * base.numbers[at].abs();
                let neighbour = self.step(found.abs().max(expected.abs()));
                assert!(
                    apart <= neighbour + slack,
                    "{} {key}: {found} {expected}",
                    self.name
                );
                unlike += usize::from(apart > 0.0 && slack == 0.0);
                all += 1;
            }
        }
        println!("{}: {unlike} of {all} differ", self.name);
        assert!(unlike * 100 <= all, "{}: {unlike} of {all}", self.name);
    }

    /// What `diag-oft` of LyCORIS loses in each row of a weight when it rounds `s − 1`, from which it computes `s·W`.
    fn lost_of_scale(&self, adapter: &Tensors, key: &str) -> Vec<f64> {
        let module = key.trim_end_matches(".weight").replace('.', "_");
        let tensor = |name: &str| adapter.get(&format!("lycoris_{module}.{name}"));
        match (tensor("rescale"), tensor("oft_blocks")) {
            (Some(scale), Some(blocks)) if blocks.shape.len() == 3 => {
                let less = scale.numbers.iter().map(|s| s - 1.0);
                less.map(|x| (self.rounded(x) - x).abs()).collect()
            }
            _ => Vec::new(),
        }
    }

    /// The adapter with its numbers as `merge_to` of LyCORIS rounds them: to the precision of the model first, and once more after
    /// `A − Aᵀ` and after each step of the bound.
    fn adapter_rounded(&self) -> Tensors {
        let mut adapter = self.tensors("adapter.safetensors");
        let round = |x: f64| self.rounded(x);
        let keys: Vec<_> = adapter.keys().cloned().collect();
        for key in keys.iter().filter(|key| !key.ends_with(".alpha")) {
            let numbers = &mut adapter.get_mut(key).unwrap().numbers;
            numbers.iter_mut().for_each(|x| *x = round(*x));
        }
        for key in keys.iter().filter(|key| key.ends_with(".oft_blocks")) {
            let alpha = key.replace("oft_blocks", "alpha");
            let blocks = &adapter[key];
            let [.., n, b, _] = blocks.shape[..] else {
                panic!("{:?}", blocks.shape)
            };
            let transposed = |at: usize| at / (b * b) * b * b + at % b * b + at / b % b;
            let numbers = 0..blocks.numbers.len();
            let difference = |at: usize| blocks.numbers[at] - blocks.numbers[transposed(at)];
            let mut q: Vec<_> = numbers.map(|at| round(difference(at))).collect();
            let bound = adapter[&alpha].numbers[0] * (n * b) as f64;
            let norm = round(q.iter().map(|x| x * x).sum::<f64>().sqrt());
            if bound > 0.0 && norm > bound {
                q.iter_mut()
                    .for_each(|x| *x = round(round(*x * bound) / norm));
            }
            // A block of Q alone above the diagonal has the difference Q, and no bound is left.
            let above = |at: usize| at / b % b < at % b;
            let numbers = q.iter().enumerate();
            let numbers = numbers.map(|(at, q)| if above(at) { *q } else { 0.0 });
            let blocks = Tensor::new(&blocks.shape, numbers.collect());
            adapter.insert(key.clone(), blocks);
            adapter.get_mut(&alpha).unwrap().numbers[0] = 0.0;
        }
        adapter
    }
}

#[test]
fn a_merge_rounds_once_as_the_forward_pass_of_lycoris_does() {
    for case in Half::all() {
        let merged = case.merged(&case.folder.join("adapter.safetensors"));
        assert_ne!(merged, case.tensors("base.safetensors"), "{}", case.name);
        let expected = case.tensors("forward.safetensors");
        case.assert_same(&merged, &expected, |_| Vec::new());
    }
}

/// The merge of LyCORIS rounds the numbers of the adapter too. That is the whole difference.
#[test]
fn a_merge_of_lycoris_is_the_same_of_an_adapter_that_was_rounded_first() {
    for case in Half::all() {
        let folder = tempfile::tempdir().unwrap();
        let adapter = folder.path().join("adapter.safetensors");
        let rounded = case.adapter_rounded();
        write(&adapter, &rounded);
        let theirs = case.tensors("merged.safetensors");
        case.assert_same(&case.merged(&adapter), &theirs, |key| {
            case.lost_of_scale(&rounded, key)
        });

        let ours = case.merged(&case.folder.join("adapter.safetensors"));
        let apart = ours
            .iter()
            .map(|(key, ours)| difference(ours, &theirs[key]));
        let apart = apart.fold(0.0, f64::max);
        println!("{}: {apart:.1e} of the largest number", case.name);
        let (least, most) = match case.dtype {
            Dtype::BF16 => (2e-3, 8e-3),
            _ => (2e-4, 1e-3),
        };
        assert!((least..most).contains(&apart), "{}: {apart:e}", case.name);
    }
}
