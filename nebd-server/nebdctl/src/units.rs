//! Sizes, times and ids as people write and read them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes as an operator writes it: `512`, `64MiB`, `10G`.
///
/// `K`, `M`, `G`, `T` and `KiB` … are powers of 1024; `KB`, `MB`, `GB`, `TB` are powers of 1000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It does not start with a number.
    #[error("a size is a number and a unit, such as 4096, 64MiB or 10G")]
    Number,
    /// The unit is unknown.
    #[error("the unit {0:?} is unknown: use KiB, MiB, GiB, TiB, or KB, MB, GB, TB")]
    Unit(String),
    /// More than a volume can have.
    #[error("the size is too large")]
    Large,
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Size, SizeError> {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        if end == 0 {
            return Err(SizeError::Number);
        }
        let number: u64 = text[..end].parse().map_err(|_| SizeError::Large)?;
        let unit = text[end..].trim_start().to_ascii_lowercase();
        let (base, letter): (u64, &str) = match unit.as_str() {
            "" | "b" => (1, ""),
            other => match other.strip_suffix("ib").or_else(|| other.strip_suffix('b')) {
                Some(letter) if other.ends_with("ib") => (1024, letter),
                Some(letter) => (1000, letter),
                None => (1024, other),
            },
        };
        let power = match letter {
            "" if base == 1 => 0,
            "k" => 1,
            "m" => 2,
            "g" => 3,
            "t" => 4,
            _ => return Err(SizeError::Unit(text[end..].trim().into())),
        };
        number.checked_mul(base.pow(power)).map(Size).ok_or(SizeError::Large)
    }
}

impl fmt::Display for Size {
    /// In the largest binary unit that keeps it exact, else with one decimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let unit = (0..UNITS.len()).rev().find(|unit| self.0 >= 1 << (10 * unit)).unwrap_or(0);
        let scale = 1u64 << (10 * unit);
        if self.0.is_multiple_of(scale) {
            f.pad(&format!("{} {}", self.0 / scale, UNITS[unit]))
        } else {
            f.pad(&format!("{:.1} {}", self.0 as f64 / scale as f64, UNITS[unit]))
        }
    }
}

/// A span of time, told in the unit that suits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Micros(pub u64);

impl fmt::Display for Micros {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = self.0;
        f.pad(&match us {
            0..1_000 => format!("{us} µs"),
            1_000..10_000 => format!("{:.2} ms", us as f64 / 1e3),
            10_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
            1_000_000..60_000_000 => format!("{:.2} s", us as f64 / 1e6),
            60_000_000..3_600_000_000 => format!("{} min", us / 60_000_000),
            3_600_000_000..172_800_000_000 => format!("{:.1} h", us as f64 / 3.6e9),
            _ => format!("{} days", us / 86_400_000_000),
        })
    }
}

/// A span of time as an operator writes it: `500ms`, `60s`, `5min`, `1h`; `none` is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

/// Why a text is no span of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a time is a whole number and its unit, such as 500ms, 60s or 5min, or none; a day at most"
)]
pub struct SpanError;

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Span, SpanError> {
        const DAY: Duration = Duration::from_secs(86_400);
        if matches!(text, "none" | "0") {
            return Ok(Span(Duration::ZERO));
        }
        let end = text.find(|c: char| !c.is_ascii_digit()).ok_or(SpanError)?;
        let number: u64 = text[..end].parse().map_err(|_| SpanError)?;
        let unit_ms = match text[end..].trim_start() {
            "ms" => 1,
            "s" => 1000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            _ => return Err(SpanError),
        };
        let span = Duration::from_millis(number.checked_mul(unit_ms).ok_or(SpanError)?);
        if span <= DAY { Ok(Span(span)) } else { Err(SpanError) }
    }
}

/// A large number with its thousands apart.
pub struct Count(pub u64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        let mut text = String::with_capacity(digits.len() * 4 / 3);
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        f.pad(&text)
    }
}

/// `UID:GID`, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Why a text is no owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an owner is UID:GID in numbers, such as 64055:64055")]
pub struct OwnerError;

impl FromStr for Owner {
    type Err = OwnerError;

    fn from_str(text: &str) -> Result<Owner, OwnerError> {
        let (uid, gid) = text.split_once(':').ok_or(OwnerError)?;
        Ok(Owner {
            uid: uid.parse().map_err(|_| OwnerError)?,
            gid: gid.parse().map_err(|_| OwnerError)?,
        })
    }
}

/// Permission bits as octal digits: who may attach a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode(pub u32);

/// Why a text is no mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a mode is octal, 0000 to 0666, such as 0600 or 0660 (r: attach to read, w: to write)")]
pub struct ModeError;

impl FromStr for Mode {
    type Err = ModeError;

    fn from_str(text: &str) -> Result<Mode, ModeError> {
        match u32::from_str_radix(text, 8) {
            Ok(bits) if bits & !0o666 == 0 => Ok(Mode(bits)),
            _ => Err(ModeError),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:04o}", self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512B", 512),
            ("4k", 4096),
            ("64MiB", 64 << 20),
            ("64 MiB", 64 << 20),
            ("10G", 10 << 30),
            ("2T", 2 << 40),
            ("1kB", 1000),
            ("3gb", 3_000_000_000),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        assert_eq!("MiB".parse::<Size>(), Err(SizeError::Number));
        assert_eq!("-1".parse::<Size>(), Err(SizeError::Number));
        assert_eq!("1.5G".parse::<Size>(), Err(SizeError::Unit(".5G".into())));
        assert_eq!("1ib".parse::<Size>(), Err(SizeError::Unit("ib".into())));
        assert_eq!("1x".parse::<Size>(), Err(SizeError::Unit("x".into())));
        assert_eq!("99999999T".parse::<Size>(), Err(SizeError::Large));
        assert_eq!("99999999999999999999".parse::<Size>(), Err(SizeError::Large));
    }

    #[test]
    fn sizes_times_and_counts_are_told() {
        assert_eq!(Size(0).to_string(), "0 B");
        assert_eq!(Size(64 << 20).to_string(), "64 MiB");
        assert_eq!(Size(1536).to_string(), "1.5 KiB");
        assert_eq!(Micros(17).to_string(), "17 µs");
        assert_eq!(Micros(12_345).to_string(), "12.3 ms");
        assert_eq!(Micros(7_200_000_000).to_string(), "2.0 h");
        assert_eq!(Count(0).to_string(), "0");
        assert_eq!(Count(1_234_567).to_string(), "1,234,567");
    }

    #[test]
    fn spans_of_time_are_read() {
        for (text, ms) in [
            ("none", 0),
            ("0", 0),
            ("0s", 0),
            ("500ms", 500),
            ("60s", 60_000),
            ("5 min", 300_000),
            ("2m", 120_000),
            ("24h", 86_400_000),
        ] {
            assert_eq!(text.parse(), Ok(Span(Duration::from_millis(ms))), "{text}");
        }
        for text in ["", "60", "s", "-1s", "1.5s", "1d", "25h", "99999999999999999999s"] {
            assert_eq!(text.parse::<Span>(), Err(SpanError), "{text}");
        }
    }

    #[test]
    fn owners_and_modes_are_read() {
        assert_eq!("1:2".parse(), Ok(Owner { uid: 1, gid: 2 }));
        assert_eq!("root:root".parse::<Owner>(), Err(OwnerError));
        assert_eq!("0640".parse(), Ok(Mode(0o640)));
        assert_eq!("777".parse::<Mode>(), Err(ModeError));
        assert_eq!("9".parse::<Mode>(), Err(ModeError));
        assert_eq!(Mode(0o60).to_string(), "0060");
    }
}
