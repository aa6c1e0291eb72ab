//! Pictures on the page: the worst mistakes, and patch features.

use std::io::Cursor;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::codecs::jpeg::JpegEncoder;
use image::imageops::{FilterType, resize};
use image::{ImageFormat, ImageResult, RgbImage};
use maud::{Markup, html};

use super::classes::bar;
use super::{Mistake, Report, ReportError};
use crate::scores::printable;

/// The longest side of a thumbnail in pixels, twice as large as it is shown, for fine screens.
const THUMBNAIL: u32 = 320;
const QUALITY: u8 = 82;
/// Smaller images are kept exactly, and enlarged without smoothing.
const SMALL: u32 = 64;
/// How many classes are listed below a thumbnail.
const TOP: usize = 3;

/// The worst mistakes, if there are any.
///
/// # Errors
///
/// An image cannot be encoded.
pub fn mistakes(report: &Report) -> Result<Option<Markup>, ReportError> {
    if report.mistakes.is_empty() {
        return Ok(None);
    }
    let cards = report
        .mistakes
        .iter()
        .map(mistake)
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Some(html! {
        section id="mistakes" {
            h2 { "The worst mistakes" }
            p { "Test images that were taken for another class with the highest probability, and what the model thinks of them." }
            ul.cards { @for card in cards { li { (card) } } }
        }
    }))
}

fn mistake(mistake: &Mistake) -> Result<Markup, ReportError> {
    let path = printable(&mistake.path.display().to_string());
    let name = mistake
        .path
        .file_name()
        .map_or(path.clone(), |name| printable(&name.to_string_lossy()));
    let truth = printable(&mistake.truth);
    let alt = match mistake.top.first() {
        Some((label, _)) => format!("{name}: {truth}, taken for {}", printable(label)),
        None => format!("{name}: {truth}"),
    };
    Ok(html! {
        (picture(&mistake.thumbnail, &alt)?)
        dl {
            div { dt { "truth" } dd { bdi { (truth) } } }
            @for (label, probability) in mistake.top.iter().take(TOP) {
                div class=[(*label == mistake.truth).then_some("is-truth")] {
                    dt { bdi { (printable(label)) } }
                    dd { (bar(Some(*probability))) }
                }
            }
        }
        p.file title=(path) { bdi { (name) } }
    })
}

/// Patch features before and after, if there are any.
///
/// # Errors
///
/// An image cannot be encoded.
pub fn patches(report: &Report) -> Result<Option<Markup>, ReportError> {
    if report.patches.is_empty() {
        return Ok(None);
    }
    let mut rows = Vec::new();
    for (index, patches) in report.patches.iter().enumerate() {
        let number = index + 1;
        rows.push([
            (
                "image",
                picture(&patches.image, &format!("Image {number}"))?,
            ),
            (
                "before",
                picture(
                    &patches.before,
                    &format!("Patch features of image {number} before training"),
                )?,
            ),
            (
                "after",
                picture(
                    &patches.after,
                    &format!("Patch features of image {number} after training"),
                )?,
            ),
        ]);
    }
    Ok(Some(html! {
        section id="patches" {
            h2 { "Patch features" }
            p {
                "What the model sees in each patch: the first three principal components of its patch features as red, \
                 green and blue. The components and the scale of the colours are those of the features before training \
                 (of each image, from the 2 % to the 98 % quantile of each component) and are used for both pictures, so \
                 that the two can be compared colour by colour."
            }
            ul.patches {
                @for row in rows {
                    li {
                        @for (name, picture) in row {
                            figure { (picture) figcaption { (name) } }
                        }
                    }
                }
            }
        }
    }))
}

fn picture(image: &RgbImage, alt: &str) -> Result<Markup, ReportError> {
    let (width, height) = image.dimensions();
    let uri = data_uri(image).map_err(|source| ReportError::Image {
        what: alt.to_string(),
        source,
    })?;
    let pixelated = (width.max(height) <= SMALL).then_some("pixels");
    Ok(html! { img class=[pixelated] src=(uri) alt=(alt) width=(width) height=(height); })
}

/// An image inside an address: PNG for small ones, else JPEG of limited size.
fn data_uri(image: &RgbImage) -> ImageResult<String> {
    let (width, height) = image.dimensions();
    let longest = width.max(height);
    let mut bytes = Vec::new();
    let kind = if longest <= SMALL {
        image.write_to(&mut Cursor::new(&mut bytes), ImageFormat::Png)?;
        "png"
    } else {
        let shrunk =
            |side: u32| (u64::from(side) * u64::from(THUMBNAIL) / u64::from(longest)).max(1);
        let encoder = JpegEncoder::new_with_quality(&mut bytes, QUALITY);
        match longest > THUMBNAIL {
            true => {
                let size = (shrunk(width) as u32, shrunk(height) as u32);
                resize(image, size.0, size.1, FilterType::Triangle).write_with_encoder(encoder)?;
            }
            false => image.write_with_encoder(encoder)?,
        }
        "jpeg"
    };
    Ok(format!(
        "data:image/{kind};base64,{}",
        STANDARD.encode(bytes)
    ))
}

#[cfg(test)]
mod tests {
    use image::Rgb;

    use super::*;

    fn decoded(uri: &str) -> RgbImage {
        let (_, base64) = uri.split_once("base64,").unwrap();
        let bytes = STANDARD.decode(base64).unwrap();
        image::load_from_memory(&bytes).unwrap().into_rgb8()
    }

    #[test]
    fn small_images_are_exact_and_large_ones_are_shrunk() {
        let small = RgbImage::from_fn(16, 9, |x, y| Rgb([x as u8 * 13, y as u8 * 20, 7]));
        let uri = data_uri(&small).unwrap();
        assert!(uri.starts_with("data:image/png;base64,"));
        assert_eq!(decoded(&uri), small);

        let large = RgbImage::from_pixel(3000, 500, Rgb([10, 200, 90]));
        let uri = data_uri(&large).unwrap();
        assert!(uri.starts_with("data:image/jpeg;base64,"));
        let found = decoded(&uri);
        assert_eq!(found.dimensions(), (320, 53));
        let off = found.get_pixel(100, 20).0[1].abs_diff(200);
        assert!(off < 6, "{off}");
        assert_eq!(
            decoded(&data_uri(&RgbImage::new(5000, 1)).unwrap()).height(),
            1
        );
    }

    #[test]
    fn an_image_without_pixels_is_an_error_that_names_it() {
        let mistake = Mistake {
            path: "folder/empty.png".into(),
            thumbnail: RgbImage::new(0, 0),
            truth: "cat".into(),
            top: vec![],
        };
        let report = Report {
            mistakes: vec![mistake],
            ..Report::default()
        };
        let error = mistakes(&report).unwrap_err().to_string();
        assert!(
            error.starts_with("empty.png: cat cannot be put on the page: "),
            "{error}"
        );
    }
}
