//! What a fake device is like, in words for a command line: `eth1:8MiB:1MiB:pinned=2MiB`.

use std::fmt;
use std::str::FromStr;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

use crate::PAGE_BYTES;

/// More state than that is no device that a test needs.
const STATE_BYTES_MAX: u64 = 1 << 30;
/// Nor more memory mapped for DMA.
const PINNED_BYTES_MAX: u64 = 1 << 34;

/// A fake device, as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DevicePlan {
    /// The operator's name for it.
    pub name: String,
    /// Its state; whole blocks of a page.
    pub state_bytes: u64,
    /// State that changes in a second while it runs.
    pub dirty_bytes_per_s: u64,
    /// Guest memory, at the end of the workload's, that it writes behind everybody's back; whole pages.
    pub pinned_bytes: u64,
    /// It gives nothing before it stands still.
    pub stop_copy: bool,
    /// It refuses whatever state comes.
    pub refuses: bool,
}

/// A device that cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is no device ({why}); write NAME:BYTES[:DIRTY_BYTES_A_SECOND][:pinned=BYTES][:stop-copy][:refuse], such as \
     eth1:8MiB:1MiB:pinned=2MiB"
)]
pub struct DevicePlanError {
    text: String,
    why: &'static str,
}

impl DevicePlan {
    /// What must be the same on both hosts.
    #[must_use]
    pub fn model(&self) -> String {
        format!("fake:{}:pinned={}", self.state_bytes, self.pinned_bytes)
    }

    /// Pages that it writes behind everybody's back.
    #[must_use]
    pub fn pinned_pages(&self) -> u64 {
        self.pinned_bytes / PAGE_BYTES as u64
    }

    fn word(&mut self, word: &str) -> Result<(), &'static str> {
        match word.split_once('=') {
            Some(("pinned", bytes)) => {
                self.pinned_bytes = pages_of(bytes, PINNED_BYTES_MAX).ok_or("pinned=BYTES is 0 to 16GiB")?;
            }
            None if word == "stop-copy" => self.stop_copy = true,
            None if word == "refuse" => self.refuses = true,
            None => self.dirty_bytes_per_s = size(word).ok_or("its dirty rate is no size")?,
            Some(_) => return Err("it has a word that is not known"),
        }
        Ok(())
    }
}

impl FromStr for DevicePlan {
    type Err = DevicePlanError;

    fn from_str(text: &str) -> Result<Self, DevicePlanError> {
        let wrong = |why| DevicePlanError { text: text.to_owned(), why };
        let mut words = text.split(':');
        let name = words.next().unwrap_or_default();
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 32 || !name.chars().all(plain) {
            return Err(wrong("its name is 1 to 32 letters, digits, '-', '_' or '.'"));
        }
        let state =
            words.next().and_then(|bytes| pages_of(bytes, STATE_BYTES_MAX)).filter(|bytes| *bytes > 0);
        let mut plan = Self {
            name: name.to_owned(),
            state_bytes: state.ok_or_else(|| wrong("its state has 1 byte to 1GiB"))?,
            dirty_bytes_per_s: 0,
            pinned_bytes: 0,
            stop_copy: false,
            refuses: false,
        };
        words.try_for_each(|word| plan.word(word)).map_err(wrong)?;
        Ok(plan)
    }
}

impl fmt::Display for DevicePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.name, self.state_bytes, self.dirty_bytes_per_s)?;
        write!(f, ":pinned={}", self.pinned_bytes)?;
        f.write_str(if self.stop_copy { ":stop-copy" } else { "" })?;
        f.write_str(if self.refuses { ":refuse" } else { "" })
    }
}

fn size(text: &str) -> Option<u64> {
    let text = text.strip_suffix("/s").unwrap_or(text);
    text.parse::<ByteSize>().ok().map(|size| size.as_u64())
}

/// A size up to `max`, rounded up to whole pages.
fn pages_of(text: &str, max: u64) -> Option<u64> {
    size(text).filter(|bytes| *bytes <= max).map(|bytes| bytes.next_multiple_of(PAGE_BYTES as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_reads_back_what_it_prints() {
        for text in ["eth1:8MiB", "a.b_c-d:1:10MiB/s", "x:4KiB:0:pinned=1MiB:stop-copy:refuse"] {
            let plan: DevicePlan = text.parse().unwrap();
            assert_eq!(plan.to_string().parse(), Ok(plan));
        }
        let plan: DevicePlan = "eth1:1:pinned=1".parse().unwrap();
        assert_eq!((plan.state_bytes, plan.pinned_pages(), plan.dirty_bytes_per_s), (4096, 1, 0));
    }

    #[test]
    fn what_is_no_device_is_told_how_one_is_written() {
        for text in
            ["", "eth1", ":1MiB", "a b:1MiB", "eth1:0", "eth1:2GiB", "eth1:x", "eth1:1:y", "eth1:1:p=2"]
        {
            let sentence = text.parse::<DevicePlan>().unwrap_err().to_string();
            assert!(sentence.contains("NAME:BYTES"), "{sentence}");
        }
    }
}
