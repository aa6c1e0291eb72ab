//! The axes of a chart: which range they show, and where they have labels.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

use super::short;

/// How many labels an axis should have.
const LABELS: f64 = 6.0;
/// How many letters fit below a chart.
const LETTERS: usize = 44;

/// One axis. Places on it are numbers of its own: the values, or their logarithms.
#[derive(Clone, Debug)]
pub struct Axis {
    /// Shown below an x axis. Empty for axes that the title of the chart explains.
    pub title: &'static str,
    low: f64,
    high: f64,
    is_logarithmic: bool,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From the smallest to the largest value, rounded outwards to labels.
    pub fn linear(values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = range(values).unwrap_or((0.0, 1.0));
        let step = step((high - low) / LABELS);
        let (first, last) = ((low / step).floor(), (high / step).ceil());
        Self {
            title: "",
            low: first * step,
            high: last * step,
            is_logarithmic: false,
            ticks: ticks(first, last, step),
        }
    }

    /// From the smallest to the largest value, with labels at whole numbers.
    pub fn whole(title: &'static str, values: impl IntoIterator<Item = f64>) -> Self {
        let (low, high) = range(values).unwrap_or((0.0, 1.0));
        let step = step((high - low) / LABELS).max(1.0);
        let margin = 0.02 * (high - low);
        Self {
            title,
            low: low - margin,
            high: high + margin,
            is_logarithmic: false,
            ticks: ticks((low / step).ceil(), (high / step).floor(), step),
        }
    }

    /// Around the positive values, with some room for markers: whole powers of ten, or where these are few, also two and
    /// five times as much.
    pub fn logarithmic(values: impl IntoIterator<Item = f64>) -> Self {
        const ROOM: f64 = 0.07;
        let logarithms = values
            .into_iter()
            .filter(|value| *value > 0.0)
            .map(f64::log10);
        let (low, high) = range(logarithms).unwrap_or((0.0, 1.0));
        let (low, high) = (low - ROOM, high + ROOM);
        let step = ((high - low) / LABELS).ceil().max(1.0);
        let powers = (low / step).floor() as i64..=(high / step).ceil() as i64;
        let factors = if high - low < 2.0 {
            &[1, 2, 5][..]
        } else {
            &[1]
        };
        let mut ticks = Vec::new();
        for power in powers.map(|count| count * step as i64) {
            ticks.extend(factors.iter().map(|factor| tick(*factor, power)));
        }
        // From the last before the values to the first behind them.
        let before = ticks.iter().take_while(|(place, _)| *place <= low).count();
        ticks.drain(..before.saturating_sub(1));
        let through = ticks.iter().take_while(|(place, _)| *place < high).count();
        ticks.truncate(through + 1);
        let place = |tick: Option<&(f64, String)>, other| tick.map_or(other, |(place, _)| *place);
        Self {
            title: "",
            low: place(ticks.first(), low),
            high: place(ticks.last(), high),
            is_logarithmic: true,
            ticks,
        }
    }

    /// One place per name, at 0, 1, 2 and so on. Where not all names fit, some are left out.
    pub fn named(title: &'static str, names: &[String]) -> Self {
        let longest = names.iter().map(|name| name.chars().count()).max();
        let fit = LETTERS / (longest.unwrap_or(0) + 1);
        let step = names.len().div_ceil(fit.max(1)).max(1);
        let ticks = names.iter().enumerate().step_by(step);
        Self {
            title,
            low: -0.5,
            high: names.len() as f64 - 0.5,
            is_logarithmic: false,
            ticks: ticks
                .map(|(place, name)| (place as f64, name.clone()))
                .collect(),
        }
    }

    /// The place of a value, unless the axis cannot show it.
    pub fn place(&self, value: f64) -> Option<f64> {
        let place = if self.is_logarithmic {
            value.log10()
        } else {
            value
        };
        place.is_finite().then_some(place)
    }

    /// The first and the last place.
    pub fn ends(&self) -> (f64, f64) {
        (self.low, self.high)
    }

    /// How many letters the longest label has.
    pub fn longest_label(&self) -> usize {
        let lengths = self.ticks.iter().map(|(_, label)| label.chars().count());
        lengths.max().unwrap_or(0)
    }
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, place: &f64, (first, last): (i32, i32)) -> i32 {
        let share = (place - self.low) / (self.high - self.low);
        first + (share * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.iter().map(|(place, _)| *place).collect()
    }

    fn range(&self) -> Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, place: &f64) -> String {
        let tick = self.ticks.iter().find(|(other, _)| other == place);
        tick.map_or(String::new(), |(_, label)| label.clone())
    }
}

/// The smallest and the largest finite number, which differ.
fn range(values: impl IntoIterator<Item = f64>) -> Option<(f64, f64)> {
    let mut finite = values.into_iter().filter(|value| value.is_finite());
    let first = finite.next()?;
    let (low, high) = finite.fold((first, first), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    // A difference that rounding explains would be blown up to fill the chart.
    let least = 1e-9 * low.abs().max(high.abs());
    Some(match high - low > least {
        true => (low, high),
        false if low == 0.0 => (0.0, 1.0),
        false => {
            let margin = 0.5 * low.abs();
            (low - margin, high + margin)
        }
    })
}

/// The smallest of 1, 2 and 5 times a power of ten that is not below `least`.
fn step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    steps
        .into_iter()
        .find(|step| *step >= least)
        .unwrap_or(least)
}

fn ticks(first: f64, last: f64, step: f64) -> Vec<(f64, String)> {
    let places = (first as i64..=last as i64).map(|count| count as f64 * step);
    places.map(|place| (place, short(place))).collect()
}

/// The place and the label of `factor · 10^power`, `5·10⁻³` for example.
fn tick(factor: i64, power: i64) -> (f64, String) {
    let power_text = power.to_string();
    let raised = power_text.chars().map(|digit| match digit {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        other => char::from_u32('⁰' as u32 + (other as u32 - '0' as u32)).unwrap_or(other),
    });
    let raised: String = raised.collect();
    let label = match factor {
        1 => format!("10{raised}"),
        _ => format!("{factor}·10{raised}"),
    };
    (power as f64 + (factor as f64).log10(), label)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn labels_are_round_numbers_around_the_values() {
        assert_eq!(
            labels(&Axis::linear([0.13, f64::NAN, 0.94])),
            ["0", "0.2", "0.4", "0.6", "0.8", "1"]
        );
        assert_eq!(
            labels(&Axis::linear([0.0, 1e-3])),
            ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]
        );
        assert_eq!(labels(&Axis::whole("epoch", [1.0, 2.0])), ["1", "2"]);
        assert_eq!(
            labels(&Axis::whole("epoch", [1.0, 30.0])),
            ["5", "10", "15", "20", "25", "30"]
        );
    }

    #[test]
    fn powers_of_ten_enclose_the_values_and_zero_has_no_place() {
        let axis = Axis::logarithmic([3e-7, 0.0, 2e-5]);
        let steps = [
            "2·10⁻⁷",
            "5·10⁻⁷",
            "10⁻⁶",
            "2·10⁻⁶",
            "5·10⁻⁶",
            "10⁻⁵",
            "2·10⁻⁵",
            "5·10⁻⁵",
        ];
        assert_eq!(labels(&axis), steps);
        let near = Axis::logarithmic([2e-7, 8e-7]);
        assert_eq!(labels(&near), ["10⁻⁷", "2·10⁻⁷", "5·10⁻⁷", "10⁻⁶"]);
        let wider = Axis::logarithmic([2.5e-7, 9.9e-7]);
        assert_eq!(labels(&wider), ["2·10⁻⁷", "5·10⁻⁷", "10⁻⁶", "2·10⁻⁶"]);
        // A marker on the edge would be cut.
        assert!(Axis::logarithmic([1e-7, 8e-7]).low < -7.0);
        assert_eq!(axis.place(0.0), None);
        assert!((axis.place(1e-5).unwrap() + 5.0).abs() < 1e-12);
        assert!(Axis::logarithmic([1e-40, 1e20]).ticks.len() < 9);
    }

    #[test]
    fn an_axis_of_equal_or_no_values_still_has_a_length() {
        for values in [&[][..], &[0.0], &[5.0, 5.0], &[f64::NAN], &[-2.0]] {
            for axis in [
                Axis::linear(values.iter().copied()),
                Axis::whole("step", values.iter().copied()),
                Axis::logarithmic(values.iter().copied()),
            ] {
                assert!(axis.low < axis.high, "{values:?}");
                assert!(axis.low.is_finite() && axis.high.is_finite());
                assert!((1..12).contains(&axis.ticks.len()), "{values:?}");
            }
        }
    }

    #[test]
    fn names_that_do_not_fit_are_left_out() {
        let names: Vec<_> = (0..40).map(|layer| layer.to_string()).collect();
        let axis = Axis::named("layer", &names);
        assert_eq!(labels(&axis)[..3], ["0", "3", "6"]);
        assert_eq!(Axis::named("layer", &names[..12]).ticks.len(), 12);
    }
}
