//! The page of a run: its sections, its safety against hostile names, and its form. How it looks is not tested here.

use std::path::PathBuf;

use dinov2::report::patches::pictures;
use dinov2::report::{EpochEntry, LayerPoint, Mistake, PatchPicture, Report, StepEntry};
use image::{Rgb, RgbImage};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const SECTIONS: [&str; 7] = [
    "training",
    "classes",
    "confusion",
    "mistakes",
    "rotations",
    "patches",
    "settings",
];

/// Elements that are never closed.
const VOID: [&str; 2] = ["meta", "img"];

/// A made-up run over 12 layers with 6 adapted maps each.
pub fn sample(classes: usize) -> Report {
    let mut rng = StdRng::seed_from_u64(7);
    let names: Vec<_> = match classes {
        3 => ["nominal", "local defect", "global defect"]
            .map(str::to_string)
            .into(),
        _ => (0..classes)
            .map(|class| format!("species {class:02}"))
            .collect(),
    };
    let epochs: Vec<_> = (1..=30)
        .map(|epoch| sample_epoch(epoch, &mut rng))
        .collect();
    Report {
        title: "BOFT on textiles, seed 0".into(),
        settings: [
            ("method", "boft, block size 8, 2 factors"),
            ("learning rate", "3e-4"),
            ("images", "/data/textiles"),
        ]
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .into(),
        notes: vec!["The run was interrupted after epoch 30 of 40.".into()],
        steps: (0..900).map(|step| sample_step(step, &mut rng)).collect(),
        best_epoch: Some(26),
        epochs,
        confusion: sample_confusion(classes, &mut rng),
        mistakes: (0..8).map(|index| sample_mistake(index, &names)).collect(),
        layers: sample_layers(&mut rng),
        patches: (0..3).map(sample_patches).collect(),
        classes: names,
    }
}

fn sample_epoch(epoch: usize, rng: &mut StdRng) -> EpochEntry {
    let progress = 1.0 - (-(epoch as f64) / 7.0).exp();
    let mut noise = |size: f64| size * rng.random_range(-1.0..1.0);
    EpochEntry {
        epoch,
        step: 45 * epoch,
        train_loss: 1.2 - 1.1 * progress + noise(0.01),
        train_accuracy: 0.5 + 0.49 * progress + noise(0.004),
        valid_loss: 1.2 - 0.9 * progress + noise(0.03),
        valid_accuracy: 0.5 + 0.42 * progress + noise(0.01),
        defect: Some(3e-7 * (1.0 + progress)),
        angle: Some(0.4 * progress),
    }
}

fn sample_step(step: usize, rng: &mut StdRng) -> StepEntry {
    let x = step as f64 / 900.0;
    StepEntry {
        step,
        epoch: step / 30 + 1,
        loss: 0.1 + 1.1 * (-4.0 * x).exp() * rng.random_range(0.7..1.3),
        learning_rate: 3e-4 * (x / 0.1).min(1.0) * (0.5 + 0.5 * (3.0 * x).cos()),
        images_per_second: 41.0 + rng.random_range(-2.0..2.0),
    }
}

fn sample_confusion(classes: usize, rng: &mut StdRng) -> Vec<Vec<usize>> {
    let mut confusion = vec![vec![0; classes]; classes];
    for (truth, row) in confusion.iter_mut().enumerate() {
        for _ in 0..50 {
            let is_right = rng.random_range(0.0..1.0) < 0.95 - 0.4 * truth as f64 / classes as f64;
            let other = (truth + rng.random_range(1..3)) % classes;
            row[if is_right { truth } else { other }] += 1;
        }
    }
    confusion
}

fn sample_mistake(index: u32, names: &[String]) -> Mistake {
    let truth = index as usize % names.len();
    let other = (truth + 1) % names.len();
    Mistake {
        path: PathBuf::from(format!(
            "/data/textiles/test/{}/DSC_{index:05}.jpg",
            names[truth]
        )),
        thumbnail: RgbImage::from_fn(224, 160 + 12 * index, |x, y| {
            Rgb([
                (x / 2) as u8,
                (120 + 60 * ((x / 9 + y / 7) % 2)) as u8,
                (y * 255 / 260) as u8,
            ])
        }),
        truth: names[truth].clone(),
        top: vec![
            (names[other].clone(), 0.93 - 0.03 * f64::from(index)),
            (names[truth].clone(), 0.04),
        ],
    }
}

fn sample_layers(rng: &mut StdRng) -> Vec<LayerPoint> {
    let maps = [
        "attention.attention.key",
        "attention.attention.query",
        "attention.attention.value",
        "attention.output.dense",
        "mlp.fc1",
        "mlp.fc2",
    ];
    let mut layers = Vec::new();
    for layer in 0..12 {
        for (index, map) in maps.iter().enumerate() {
            let energy = if *map == "mlp.fc1" {
                1.7e6
            } else {
                1.04e5 + 900.0 * f64::from(layer)
            };
            layers.push(LayerPoint {
                path: format!("dinov2.encoder.layer.{layer}.{map}"),
                angle: 0.05
                    + 0.02 * f64::from(layer)
                    + 0.03 * index as f64
                    + rng.random_range(0.0..0.03),
                defect: rng.random_range(2e-7..9e-7),
                energy_before: energy,
                energy_after: energy * (1.0 + rng.random_range(-2e-7..2e-7)),
            });
        }
    }
    // The order of an adapter's file, in which layer 10 comes before layer 2.
    layers.sort_by(|a, b| a.path.cmp(&b.path));
    layers
}

fn sample_patches(index: u32) -> PatchPicture {
    let (grid, width) = ([16, 16], 24);
    let features = |turn: f32| -> Vec<f32> {
        let of = |patch: usize, column: usize| {
            let (x, y) = (
                (patch % 16) as f32 / 16.0 - 0.5,
                (patch / 16) as f32 / 16.0 - 0.5,
            );
            let inside = f32::from(x * x + y * y < 0.1);
            let wave = (7.0 * x + turn).sin() * (5.0 * y + index as f32).cos();
            [3.0 * inside, wave, x + turn * y][column % 3] * (1.0 + column as f32 / 24.0)
        };
        (0..256)
            .flat_map(|patch| (0..width).map(move |column| of(patch, column)))
            .collect()
    };
    let [before, after] = pictures(&features(0.0), &features(0.4), width, grid).unwrap();
    PatchPicture {
        image: RgbImage::from_fn(224, 224, |x, y| {
            let inside = (x as i32 - 112).pow(2) + (y as i32 - 112).pow(2) < 5000;
            Rgb([
                if inside { 200 } else { 60 },
                (x / 2 + 60) as u8,
                (y / 2 + 40) as u8,
            ])
        }),
        before,
        after,
    }
}

/// The section of the page with this id.
fn section<'a>(page: &'a str, id: &str) -> &'a str {
    let start = page.find(&format!("<section id=\"{id}\">"));
    let rest = &page[start.unwrap_or_else(|| panic!("no section {id}"))..];
    &rest[..rest.find("</section>").unwrap()]
}

/// The tags of a page, each with what is between the angle brackets. Panics unless elements nest and are closed.
fn tags(page: &str) -> Vec<&str> {
    let body = page
        .strip_prefix("<!DOCTYPE html>")
        .expect("a page begins with its type");
    // Rules may hold `>`, and no other text does without being escaped.
    let (before, rest) = body.split_once("<style>").unwrap();
    let (style, after) = rest.split_once("</style>").unwrap();
    assert!(!style.contains('<'));
    let mut all = Vec::new();
    for text in [before, after] {
        let mut pieces = text.split('<');
        assert_eq!(pieces.next().map(str::trim), Some(""));
        for piece in pieces {
            let (tag, text) = piece.split_once('>').expect("a tag ends");
            assert!(!text.contains('>'), "{text}");
            all.push(tag);
        }
    }
    let mut open = Vec::new();
    for tag in &all {
        let name = tag
            .trim_start_matches('/')
            .split([' ', '/'])
            .next()
            .unwrap();
        match (tag.starts_with('/'), tag.ends_with('/')) {
            (true, _) => assert_eq!(open.pop(), Some(name), "<{tag}>"),
            (_, true) => {}
            _ if VOID.contains(&name) => {}
            _ => open.push(name),
        }
        assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
    }
    assert!(open.is_empty(), "{open:?} stay open");
    all
}

#[test]
fn a_page_has_every_section_and_its_elements_nest() {
    for classes in [3, 40] {
        let page = sample(classes).html().unwrap();
        for id in SECTIONS {
            section(&page, id);
        }
        let tags = tags(&page);
        let count = |name: &str| {
            tags.iter()
                .filter(|tag| tag.split(' ').next() == Some(name))
                .count()
        };
        assert!(count("svg") > 8, "the charts are inside the page");
        assert_eq!(count("img"), 8 + 9);
        assert_eq!(count("script"), 0);
        assert!(page.contains("<title>BOFT on textiles, seed 0</title>"));
        assert!(page.contains("The run was interrupted after epoch 30 of 40."));
    }
}

#[test]
fn a_page_needs_nothing_but_itself() {
    let page = sample(3).html().unwrap();
    let without = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for outside in [
        "http:", "https:", "url(", "@import", "<link", "<script", "<iframe", "<object", "file:",
        "//",
    ] {
        // Base64 has `//`, too.
        let found = without.match_indices(outside).find(|(place, _)| {
            let before = &without[..*place];
            before.rfind("base64,") < before.rfind('<').max(before.rfind('>'))
        });
        assert_eq!(
            found.map(|(place, _)| &without[place.saturating_sub(40)..place + 20]),
            None
        );
    }
    for tag in tags(&page) {
        for attribute in [" src=\"", " href=\"", " xlink:href=\""] {
            if let Some((_, value)) = tag.split_once(attribute) {
                assert!(value.starts_with("data:image/"), "<{tag}>");
            }
        }
        assert!(!tag.contains(" on"), "<{tag}>");
    }
    assert!(page.contains("default-src 'none'"));
}

#[test]
fn whatever_a_name_holds_stays_text() {
    let hostile = "<script>alert(1)</script>\" onload='x' <img src=x>&\u{1b}[31m\u{202e}";
    let mut report = sample(3);
    report.title = hostile.into();
    report.notes = vec![hostile.into()];
    report.settings = vec![(hostile.into(), hostile.into())];
    report.classes = vec![hostile.into(), "b".into(), hostile.into()];
    for mistake in &mut report.mistakes {
        mistake.path = PathBuf::from(format!("/data/{}", hostile.replace('/', "")));
        mistake.truth = hostile.into();
        mistake.top = vec![(hostile.into(), f64::NAN), (hostile.into(), 7.0)];
    }
    for (index, layer) in report.layers.iter_mut().enumerate() {
        layer.path = format!("layer.{index}.{hostile}");
    }
    let page = report.html().unwrap();
    let plain = sample(3).html().unwrap();
    let names = |page: &str| {
        let mut names: Vec<_> = tags(page)
            .iter()
            .map(|tag| tag.split(' ').next().unwrap().to_string())
            .collect();
        names.sort();
        names.dedup();
        names
    };
    assert_eq!(names(&page), names(&plain));
    assert!(!page.contains("<script") && !page.contains('\u{1b}'));
    assert!(
        section(&page, "classes").contains("&lt;script&gt;alert(1)&lt;/script&gt;&quot; onload")
    );
    // Nothing closes an attribute early.
    for tag in tags(&page) {
        assert!(!tag.contains("\" onload"), "<{tag}>");
    }
}

#[test]
fn many_classes_are_shown_as_confused_pairs() {
    let (few, many) = (sample(30).html().unwrap(), sample(31).html().unwrap());
    assert!(section(&few, "confusion").contains("<table class=\"matrix\">"));
    assert_eq!(
        section(&few, "confusion")
            .matches("<td class=\"right h")
            .count(),
        30
    );
    let pairs = section(&many, "confusion");
    assert!(!pairs.contains("class=\"matrix\""));
    assert_eq!(pairs.matches("<tr>").count(), 1 + 30);
    // The matrix has text for readers who do not see colours.
    assert!(section(&few, "confusion").contains("<caption>"));
    assert_eq!(
        section(&few, "confusion")
            .matches("<th scope=\"row\"")
            .count(),
        30
    );
}

#[test]
fn sections_without_data_are_left_out() {
    let empty = Report::default().html().unwrap();
    tags(&empty);
    assert!(!empty.contains("<section") && empty.contains("<h1><bdi>Report</bdi></h1>"));

    let full = sample(3);
    let only = |change: fn(Report, &mut Report)| {
        let mut report = Report::default();
        change(full.clone(), &mut report);
        let page = report.html().unwrap();
        tags(&page);
        let found = SECTIONS
            .iter()
            .filter(|id| page.contains(&format!("<section id=\"{id}\">")));
        found.copied().collect::<Vec<_>>()
    };
    assert_eq!(only(|full, report| report.steps = full.steps), ["training"]);
    assert_eq!(
        only(|full, report| report.epochs = full.epochs),
        ["training"]
    );
    assert_eq!(
        only(|full, report| report.mistakes = full.mistakes),
        ["mistakes"]
    );
    assert_eq!(
        only(|full, report| report.layers = full.layers),
        ["rotations"]
    );
    assert_eq!(
        only(|full, report| report.patches = full.patches),
        ["patches"]
    );
    assert_eq!(
        only(|full, report| report.settings = full.settings),
        ["settings"]
    );
    assert_eq!(only(|full, report| report.classes = full.classes), [""; 0]);
    // Test images of which none was confused.
    let mut right = Report {
        classes: full.classes.clone(),
        ..Report::default()
    };
    right.confusion = vec![vec![5, 0, 0], vec![0, 5, 0], vec![0, 0, 5]];
    let page = right.html().unwrap();
    assert!(section(&page, "classes").contains("100.0 %"));
}

#[test]
fn a_run_of_a_few_steps_or_of_numbers_that_are_not_finite_has_a_page() {
    let full = sample(3);
    for epochs in [1, 2] {
        let mut report = full.clone();
        report.epochs.truncate(epochs);
        report.steps.truncate(1);
        report.best_epoch = Some(1);
        tags(&report.html().unwrap());
    }
    let mut report = full.clone();
    for epoch in &mut report.epochs {
        (epoch.train_loss, epoch.valid_loss) = (f64::NAN, f64::INFINITY);
        (epoch.defect, epoch.angle) = (Some(f64::NAN), None);
    }
    for step in &mut report.steps {
        step.loss = f64::NAN;
    }
    for layer in &mut report.layers {
        (layer.angle, layer.defect, layer.energy_after) = (f64::NAN, f64::NAN, f64::NAN);
    }
    let page = report.html().unwrap();
    for tag in tags(&page) {
        let is_shape = ["rect", "circle", "polyline", "polygon", "line", "path"]
            .iter()
            .any(|name| tag.starts_with(name));
        assert!(
            !is_shape || !(tag.contains("NaN") || tag.contains("inf")),
            "<{tag}>"
        );
    }
}

#[test]
fn a_confusion_matrix_for_other_classes_is_refused() {
    let mut report = sample(3);
    report.classes.pop();
    assert_eq!(
        report.html().unwrap_err().to_string(),
        "the scores cannot be reported: the confusion matrix has 3 rows, the shortest with 3 and the longest with 3 \
         entries; 2 classes need a square of that size"
    );
}

#[test]
fn a_page_replaces_an_older_one_whole_and_a_missing_folder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.html");
    std::fs::write(&path, "old").unwrap();
    let report = sample(3);
    report.write(&path).unwrap();
    assert_eq!(
        std::fs::read_to_string(&path).unwrap(),
        report.html().unwrap()
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    let error = report
        .write(&folder.path().join("none/report.html"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("none/report.html") && error.lines().count() == 1,
        "{error}"
    );
}
