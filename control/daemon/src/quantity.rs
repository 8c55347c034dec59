//! What an operator types for a rate or a set of CPUs.

use std::str::FromStr;

use vmferry_datapath::limits::LANES_MAX;

/// A rate in bytes a second. A plain number is MiB/s, as virsh reads it; `10Gbit`, `800Mbit`, `2GiB`, `500MB` are said in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bandwidth {
    /// Bytes a second, never zero.
    pub bytes_per_s: u64,
}

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || {
            format!(
                "{text:?} is not a rate: write 10Gbit, 500MB, 2GiB (a second), or a plain number of MiB/s"
            )
        };
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let unit = unit.trim().trim_end_matches("/s").to_ascii_lowercase();
        let bytes = match unit.as_str() {
            "" | "mib" | "m" => f64::from(1 << 20),
            "kbit" => 1e3 / 8.0,
            "mbit" => 1e6 / 8.0,
            "gbit" => 1e9 / 8.0,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "kib" | "k" => 1024.0,
            "gib" | "g" => f64::from(1 << 30),
            _ => return Err(wrong()),
        };
        let bytes_per_s = number * bytes;
        if !(1.0..1e15).contains(&bytes_per_s) {
            return Err(wrong());
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "checked to lie in 1..1e15"
        )]
        let bytes_per_s = bytes_per_s as u64;
        Ok(Self { bytes_per_s })
    }
}

/// A set of CPUs: `0-3,8`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

/// More CPUs than this in a list is a typing error.
const CPUS_MAX: usize = 4096;

impl FromStr for CpuList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || format!("{text:?} is not a CPU list: write 0-3,8");
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let first: usize = first.trim().parse().map_err(|_| wrong())?;
            let last: usize = last.trim().parse().map_err(|_| wrong())?;
            if last < first || last >= CPUS_MAX {
                return Err(wrong());
            }
            cpus.extend(first..=last);
        }
        cpus.sort_unstable();
        cpus.dedup();
        Ok(Self(cpus))
    }
}

/// How many lanes: a number, or chosen from the CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneCount {
    /// One for two CPUs that the lanes may use, at most 8.
    Auto,
    /// As the operator says.
    Exactly(u16),
}

impl FromStr for LaneCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        match text.parse() {
            Ok(lanes) if lanes > 0 && usize::from(lanes) <= LANES_MAX => Ok(Self::Exactly(lanes)),
            _ => Err(format!("{text:?} is not a number of lanes: write auto, or 1 to {LANES_MAX}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_in_every_spelling() {
        for (text, bytes) in [
            ("10Gbit", 1_250_000_000),
            ("8Mbit/s", 1_000_000),
            ("500MB", 500_000_000),
            ("1GiB", 1 << 30),
            ("32", 32 << 20),
            ("1.5GB", 1_500_000_000),
        ] {
            assert_eq!(text.parse::<Bandwidth>().unwrap().bytes_per_s, bytes, "{text}");
        }
        for text in ["", "fast", "0", "-1", "1e99GB", "10 parsecs"] {
            assert!(text.parse::<Bandwidth>().unwrap_err().contains("10Gbit"), "{text}");
        }
    }

    #[test]
    fn cpu_lists() {
        assert_eq!("0-2,5,1".parse::<CpuList>().unwrap().0, [0, 1, 2, 5]);
        for text in ["", "a", "3-1", "0-99999999"] {
            assert!(text.parse::<CpuList>().is_err(), "{text}");
        }
    }

    #[test]
    fn lane_counts() {
        assert_eq!("auto".parse::<LaneCount>().unwrap(), LaneCount::Auto);
        assert_eq!("4".parse::<LaneCount>().unwrap(), LaneCount::Exactly(4));
        assert!("0".parse::<LaneCount>().is_err());
        assert!("17".parse::<LaneCount>().is_err());
    }
}
