//! Is this file an image? Its first bytes answer, not its name.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use image::{ImageDecoder, ImageFormat};

use super::decode;
use super::jpeg;

/// The names of image files, also of formats that are not read here: whoever has a `.heic` in a class means an image.
const EXTENSIONS: [&str; 24] = [
    "arw", "avif", "bmp", "cr2", "dng", "gif", "heic", "heif", "jfif", "jp2", "jpe", "jpeg", "jpg",
    "jxl", "nef", "orf", "pbm", "pgm", "png", "ppm", "psd", "tif", "tiff", "webp",
];

/// The bytes that tell the formats apart.
const MAGIC: u64 = 32;

/// What a file is, by its header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Header {
    Image,
    /// It is meant as an image, by its name or its first bytes, but is none that can be read.
    Unreadable(String),
    /// It is something else, such as a text file.
    Other,
}

/// Whether a file is meant as an image: by its name, or else by its first bytes.
pub(super) fn is_meant_as_image(path: &Path) -> bool {
    named_as_image(path) || matches!(read(path), Header::Image | Header::Unreadable(_))
}

fn named_as_image(path: &Path) -> bool {
    path.extension()
        .and_then(|extension| extension.to_str())
        .is_some_and(|extension| {
            let extension = extension.to_ascii_lowercase();
            EXTENSIONS.contains(&extension.as_str())
        })
}

/// Reads the header of a file.
pub(super) fn read(path: &Path) -> Header {
    let named = named_as_image(path);
    let failed = |reason: String| match named {
        true => Header::Unreadable(reason),
        false => Header::Other,
    };
    let format = match format(path) {
        Ok(format) => format,
        Err(error) => return failed(error.to_string()),
    };
    let Some(format) = format.filter(|&format| decode::supported(format)) else {
        return failed("not an image of a format that is read here".into());
    };
    match decode::guarded(|| size(path, format)) {
        Ok(()) => Header::Image,
        // Two letters make a BMP; a text may begin with them.
        Err(reason) if format == ImageFormat::Bmp => failed(reason),
        Err(reason) => Header::Unreadable(reason),
    }
}

fn format(path: &Path) -> std::io::Result<Option<ImageFormat>> {
    let mut start = Vec::new();
    File::open(path)?.take(MAGIC).read_to_end(&mut start)?;
    Ok(image::guess_format(&start).ok())
}

fn size(path: &Path, format: ImageFormat) -> Result<(), String> {
    let file = File::open(path).map_err(|error| error.to_string())?;
    let reader = BufReader::new(file);
    let (width, height) = match format {
        // The image crate would read the whole file.
        ImageFormat::Jpeg => jpeg::size(reader)?,
        _ => {
            let (width, height) = decode::open(reader, format)?.dimensions();
            (width as usize, height as usize)
        }
    };
    match width * height {
        0 => Err("it has no pixels".into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, content: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        (folder, path)
    }

    #[test]
    fn a_text_is_no_image_even_if_it_begins_like_a_bitmap() {
        for content in ["BMW is a brand of cars.", "", "plain"] {
            let (_folder, path) = file("notes.txt", content.as_bytes());
            assert_eq!(read(&path), Header::Other);
            assert!(!is_meant_as_image(&path));
        }
    }

    #[test]
    fn a_name_of_an_image_without_one_inside_is_unreadable() {
        for (name, content) in [
            ("a.JPG", &b""[..]),
            ("a.png", b"text"),
            ("a.heic", b"\0\0\0\x18ftypheic"),
            ("a.bmp", b"BMW is a brand of cars."),
        ] {
            let (_folder, path) = file(name, content);
            assert!(matches!(read(&path), Header::Unreadable(_)), "{name}");
        }
    }

    #[test]
    fn a_damaged_header_is_unreadable_whatever_the_name_is() {
        for (content, reason) in [
            (&b"\x89PNG\r\n\x1a\nnothing"[..], ""),
            (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "no image in the JPEG file"),
        ] {
            let (_folder, path) = file("a.dat", content);
            let Header::Unreadable(found) = read(&path) else {
                panic!("{content:?} is taken for an image");
            };
            assert!(found.contains(reason), "{found}");
        }
    }
}
