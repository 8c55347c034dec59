//! A crew as one stream: whether its owner stopped it, a count, then a length and the registers of each writer.

use vmferry_workload::Registers;

/// More writers than any workload has.
const WRITERS_MAX: usize = 16;
/// Registers are ten words and at most five bytes a page; see `Registers::save`.
const FIXED_BYTES_MAX: u64 = 8 + WRITERS_MAX as u64 * (4 + 80);
const BYTES_A_PAGE_MAX: u64 = 5;

/// The most bytes that the state of a workload of `pages` pages can have.
pub(crate) fn state_bytes_max(pages: u64) -> u64 {
    FIXED_BYTES_MAX + pages.saturating_mul(BYTES_A_PAGE_MAX)
}

/// The state of all writers; `stopped` by their owner, they stay so wherever they come in.
pub(crate) fn join(registers: &[Registers], stopped: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_len(&mut bytes, usize::from(stopped));
    push_len(&mut bytes, registers.len());
    for one in registers {
        let saved = one.save();
        push_len(&mut bytes, saved.len());
        bytes.extend_from_slice(&saved);
    }
    bytes
}

fn push_len(bytes: &mut Vec<u8>, len: usize) {
    bytes.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
}

/// Reads what `join` wrote, for a memory of `pages` pages: the registers, and whether the owner stopped them.
pub(crate) fn split(mut bytes: &[u8], pages: u64) -> Result<(Vec<Registers>, bool), String> {
    let stopped = match take_len(&mut bytes)? {
        0 => false,
        1 => true,
        other => return Err(format!("the state begins with {other} where 0 or 1 can be: it is damaged")),
    };
    let count = take_len(&mut bytes)?;
    if !(1..=WRITERS_MAX).contains(&count) {
        return Err(format!("the state speaks of {count} writers, 1 to {WRITERS_MAX} can be: it is damaged"));
    }
    let (mut all, mut left) = (Vec::with_capacity(count), pages);
    for _ in 0..count {
        let len = take_len(&mut bytes)?;
        let (one, rest) = bytes.split_at_checked(len).ok_or_else(short)?;
        bytes = rest;
        let registers = Registers::load(one, left).map_err(|error| error.to_string())?;
        left -= registers.plan.pages;
        all.push(registers);
    }
    if bytes.is_empty() {
        Ok((all, stopped))
    } else {
        Err("the state is longer than it says: it is damaged".to_owned())
    }
}

fn take_len(bytes: &mut &[u8]) -> Result<usize, String> {
    let (len, rest) = bytes.split_first_chunk::<4>().ok_or_else(short)?;
    *bytes = rest;
    usize::try_from(u32::from_le_bytes(*len)).map_err(|_| short())
}

fn short() -> String {
    "the state ends early: it is damaged".to_owned()
}

#[cfg(test)]
mod tests {
    use vmferry_workload::Plan;

    use super::*;

    fn two() -> Vec<Registers> {
        let plan: Plan = "pages=100".parse().unwrap();
        plan.shared_among(2).unwrap().into_iter().map(Registers::new).collect()
    }

    #[test]
    fn state_survives_the_trip_and_fits_its_bound() {
        for stopped in [false, true] {
            let bytes = join(&two(), stopped);
            assert!(bytes.len() as u64 <= state_bytes_max(100));
            assert_eq!(split(&bytes, 100), Ok((two(), stopped)));
        }
    }

    #[test]
    fn every_cut_and_every_surplus_is_refused() {
        let bytes = join(&two(), false);
        for len in 0..bytes.len() {
            assert!(split(&bytes[..len], 100).is_err(), "cut at {len}");
        }
        assert!(split(&[bytes.clone(), vec![0]].concat(), 100).is_err());
        assert!(split(&bytes, 99).unwrap_err().contains("49"), "two writers of 50 pages in 99");
    }
}
