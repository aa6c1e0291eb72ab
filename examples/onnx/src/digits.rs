//! The UCI handwritten digits (E. Alpaydin and C. Kaynak, doi 10.24432/C50P49, CC BY 4.0).

use burn::tensor::{Device, Int, Tensor, TensorData};

/// Pixels along each side of a digit.
const SIZE: usize = 8;
/// `[64 pixels, digit]` for each image; the file belongs to the DINOv2 example, which says where it comes from.
static DIGITS: &[u8] = include_bytes!("../../dinov2/data/digits.bin");

/// Images of digits, and the digits that they show.
#[derive(Clone, Debug)]
pub struct Digits {
    /// A `[count, 1, 8, 8]` tensor of numbers from −1, the background, to 1.
    pub images: Tensor<4>,
    /// A `[count]` tensor.
    pub labels: Tensor<1, Int>,
}

impl Digits {
    /// What the models were trained on: four images of five.
    pub fn training(device: &Device) -> Self {
        Self::select(|index| index % 5 != 4, device)
    }

    /// Every fifth image, which no model has seen.
    pub fn test(device: &Device) -> Self {
        Self::select(|index| index % 5 == 4, device)
    }

    fn select(keep: impl Fn(usize) -> bool, device: &Device) -> Self {
        let records = DIGITS.chunks_exact(SIZE * SIZE + 1).enumerate();
        let records = records.filter(|(index, _)| keep(*index));
        let (mut pixels, mut labels) = (Vec::new(), Vec::new());
        for (_, record) in records {
            let (image, digit) = record.split_at(SIZE * SIZE);
            pixels.extend(image.iter().map(|&value| f32::from(value) / 8.0 - 1.0));
            labels.push(i64::from(digit[0]));
        }
        let count = labels.len();
        Self {
            images: Tensor::from_data(TensorData::new(pixels, [count, 1, SIZE, SIZE]), device),
            labels: Tensor::from_data(TensorData::new(labels, [count]), device),
        }
    }

    /// The same digits, turned by a quarter counterclockwise.
    pub fn turned(self) -> Self {
        Self {
            images: self.images.swap_dims(2, 3).flip([2]),
            ..self
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.labels.dims()[0]
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first of them, `count` at most.
    pub fn first(&self, count: usize) -> Self {
        self.slice(0, count)
    }

    /// All of them in their order, `size` at a time.
    pub fn batches(&self, size: usize) -> impl Iterator<Item = Self> {
        (0..self.len())
            .step_by(size)
            .map(move |start| self.slice(start, size))
    }

    fn slice(&self, start: usize, count: usize) -> Self {
        let range = start..self.len().min(start + count);
        Self {
            images: self.images.clone().slice(range.clone()),
            labels: self.labels.clone().slice(range),
        }
    }
}
