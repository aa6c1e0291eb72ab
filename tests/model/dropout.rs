//! Multiplicative dropout.

use burn::module::Module;
use burn::tensor::{DType, Device};
use burn_boft::{BoftConfig, BoftLinear, Init, inject};

use crate::common::models::{Layer, linear};
use crate::common::{devices, host};

/// For each of many draws, how many blocks of each factor are the identity.
fn draws(model: &BoftLinear, count: usize) -> Vec<Vec<usize>> {
    let adapter = model.adapter().unwrap();
    let plan = adapter.butterfly();
    let (n, b) = (plan.block_num(), plan.block_size());
    (0..count)
        .map(|_| {
            let blocks = host(adapter.training_blocks().values());
            let is_identity = |block: &[f64]| {
                let mut cells = block.iter().enumerate();
                cells.all(|(i, &value)| value == f64::from(i / b == i % b))
            };
            let factors = blocks.chunks(n * b * b);
            let identities = |factor: &[f64]| {
                factor
                    .chunks(b * b)
                    .filter(|block| is_identity(block))
                    .count()
            };
            factors.map(identities).collect()
        })
        .collect()
}

#[test]
fn dropout_replaces_a_share_of_the_blocks_of_one_factor() {
    let config = |dropout| {
        let config = BoftConfig::new().with_n_butterfly_factor(3);
        config
            .with_dropout(dropout)
            .with_target_modules(".*")
            .with_init(Init::Random { seed: 5 })
    };
    for (backend, device) in devices() {
        let device = device.autodiff();
        let base = BoftLinear::from(linear([48, 10], 3, DType::F32, &device));
        // floor(p·12) of twelve blocks.
        for (dropout, share) in [(0.26, 3), (0.5, 6), (0.99, 11)] {
            let model = inject(base.clone(), config(dropout)).unwrap();
            let draws = draws(&model, 120);
            let mut hits = [0; 3];
            for draw in &draws {
                let hit = draw.iter().position(|&count| count > 0).unwrap();
                hits[hit] += 1;
                let mut expected = [0; 3];
                expected[hit] = share;
                assert_eq!(draw, &expected, "{backend}, {dropout}");
            }
            // 40 each, with a deviation of 5.
            assert!(
                hits.iter().all(|hits| (10..=75).contains(hits)),
                "{backend}: {hits:?}"
            );
            let still = self::draws(&model.valid(), 5);
            assert!(still.iter().flatten().all(|&count| count == 0), "{backend}");
            let again = self::draws(&model.valid().train(), 5);
            assert!(again.iter().all(|draw| draw.iter().sum::<usize>() == share));
        }
        // More blocks than are ranked at a time, and a rank beyond those that bf16 counts to.
        let wide = BoftLinear::from(linear([2400, 3], 3, DType::F32, &device));
        let dropped = draws(&inject(wide, config(0.6)).unwrap(), 2);
        let counts = dropped.iter().map(|draw| draw.iter().sum::<usize>());
        assert!(counts.into_iter().all(|count| count == 360), "{backend}");
        let model = inject(base.clone(), config(1.0 / 12.5)).unwrap();
        let draws = draws(&model, 20);
        assert!(draws.iter().flatten().all(|&count| count == 0), "{backend}");
    }
}

#[test]
fn dropout_replaces_every_block_equally_often() {
    let device = Device::flex().autodiff();
    let config = BoftConfig::new()
        .with_n_butterfly_factor(2)
        .with_dropout(0.5);
    let config = config
        .with_target_modules(".*")
        .with_init(Init::Random { seed: 5 });
    let model = inject(linear([16, 10], 3, DType::F32, &device), config).unwrap();
    let adapter = Layer::adapter(&model).unwrap();
    let mut hits = [0; 8];
    for _ in 0..400 {
        let blocks = host(adapter.training_blocks().values());
        for (hit, block) in hits.iter_mut().zip(blocks.chunks(16)) {
            *hit += usize::from(block[0] == 1.0 && block[1] == 0.0);
        }
    }
    assert_eq!(hits.iter().sum::<usize>(), 2 * 400);
    // 100 each, with a deviation of 9.
    assert!(
        hits.iter().all(|hits| (50..=150).contains(hits)),
        "{hits:?}"
    );
}
