//! Decoded images: eight bits per value, grey or RGB.

/// An image in memory, rows from the top, the channels of a pixel side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pixels {
    pub width: usize,
    pub height: usize,
    /// 1 for grey, 3 for RGB.
    pub channels: usize,
    /// `[height, width, channels]` values.
    pub data: Vec<u8>,
}

impl Pixels {
    /// The image with as many channels as asked for. Grey is ITU-R 601 luma, rounded as Pillow rounds it.
    pub(super) fn with_channels(self, channels: usize) -> Self {
        let data = match (self.channels, channels) {
            (3, 1) => self.data.as_chunks().0.iter().map(luma).collect(),
            (1, 3) => self.data.iter().flat_map(|&grey| [grey; 3]).collect(),
            _ => return self,
        };
        Self {
            channels,
            data,
            ..self
        }
    }
}

fn luma(&[red, green, blue]: &[u8; 3]) -> u8 {
    let sum = u32::from(red) * 19_595 + u32::from(green) * 38_470 + u32::from(blue) * 7_471;
    ((sum + 0x8000) >> 16) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grey_is_luma_and_grey_in_three_channels_is_itself() {
        let colours = Pixels {
            width: 4,
            height: 1,
            channels: 3,
            data: vec![255, 0, 0, 0, 255, 0, 0, 0, 255, 77, 77, 77],
        };
        let grey = colours.with_channels(1);
        assert_eq!(grey.data, [76, 150, 29, 77]);

        let wide = grey.clone().with_channels(3);
        assert_eq!(wide.data[..6], [76, 76, 76, 150, 150, 150]);
        assert_eq!(wide.with_channels(1), grey);
    }
}
