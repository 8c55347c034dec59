//! Who maps the guest's memory for writing.

use std::fs;

use vmferry_datapath::{PAGE_BYTES, PageCount, PageIndex, PageSet, WatchedArea};

use super::{BlockPlace, maps};

/// A process and the pieces of its address space through which it can write guest RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Writer {
    /// Its process id.
    pub(crate) process: i32,
    /// Which pieces.
    pub(crate) areas: Vec<WatchedArea>,
}

impl Writer {
    /// Looks at one process; nothing when it writes none of the blocks (or is gone).
    pub(crate) fn look(process: i32, blocks: &[BlockPlace]) -> std::io::Result<Option<Writer>> {
        let mappings = maps::shared_writable(process)?;
        let areas: Vec<WatchedArea> = mappings
            .iter()
            .flat_map(|mapping| blocks.iter().filter_map(|block| overlap(mapping, block)))
            .collect();
        Ok((!areas.is_empty()).then_some(Writer { process, areas }))
    }

    /// All of them on this host, and how many processes could not be looked at.
    pub(crate) fn look_everywhere(blocks: &[BlockPlace]) -> std::io::Result<(Vec<Writer>, usize)> {
        let (mut writers, mut hidden) = (Vec::new(), 0);
        for process in maps::all_processes()? {
            match Writer::look(process, blocks) {
                Ok(found) => writers.extend(found),
                Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => hidden += 1,
                Err(_) => {}
            }
        }
        Ok((writers, hidden))
    }

    /// What of `now` this one does not have.
    pub(crate) fn lacks(&self, now: &Writer) -> Vec<WatchedArea> {
        now.areas.iter().copied().filter(|area| !self.areas.iter().any(|known| covers(known, area))).collect()
    }

    /// For people.
    pub(crate) fn name(&self) -> String {
        process_name(self.process)
    }

    /// The ranges to write-protect.
    pub(crate) fn ranges(&self) -> Vec<(u64, u64)> {
        self.areas.iter().map(|area| (area.address, area.len)).collect()
    }
}

/// "qemu-system-x86 (pid 4711)".
pub(crate) fn process_name(process: i32) -> String {
    let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    let name = if name.trim().is_empty() { "process" } else { name.trim() };
    format!("{name} (pid {process})")
}

/// The pages of the areas.
pub(crate) fn add_pages(areas: &[WatchedArea], into: &mut PageSet) {
    for area in areas {
        into.insert_range(area.first_page, PageCount(area.len.div_ceil(PAGE_BYTES as u64)));
    }
}

/// The kernel splits and joins mappings as it likes; the place and the pages are what counts.
fn covers(known: &WatchedArea, area: &WatchedArea) -> bool {
    let Some(inside) = area.address.checked_sub(known.address) else { return false };
    inside + area.len <= known.len && known.first_page.0 + inside / PAGE_BYTES as u64 == area.first_page.0
}

/// The part of a mapping that shows a block.
fn overlap(mapping: &maps::Mapping, block: &BlockPlace) -> Option<WatchedArea> {
    if !mapping.writes(block.inode) {
        return None;
    }
    let start = mapping.offset.max(block.offset);
    let end = (mapping.offset + (mapping.end - mapping.start)).min(block.offset + block.len);
    (start < end).then(|| WatchedArea {
        address: mapping.start + (start - mapping.offset),
        len: end - start,
        first_page: PageIndex(block.first_page.0 + (start - block.offset) / PAGE_BYTES as u64),
    })
}

#[cfg(test)]
mod tests {
    use super::super::Inode;
    use super::*;

    const FILE: Inode = Inode { device: (0, 26), number: 7 };

    fn mapping(start: u64, len: u64, offset: u64) -> maps::Mapping {
        let path = String::new();
        maps::Mapping { start, end: start + len, writable: true, shared: true, offset, inode: FILE, path }
    }

    fn block(offset: u64, len: u64, first_page: u64) -> BlockPlace {
        BlockPlace { inode: FILE, offset, len, first_page: PageIndex(first_page) }
    }

    #[test]
    fn only_the_part_that_shows_the_block_counts() {
        let whole = overlap(&mapping(0x10_0000, 0x8000, 0), &block(0x2000, 0x4000, 64));
        assert_eq!(whole, Some(WatchedArea { address: 0x10_2000, len: 0x4000, first_page: PageIndex(64) }));
        let tail = overlap(&mapping(0x10_0000, 0x8000, 0x4000), &block(0, 0x6000, 0));
        assert_eq!(tail, Some(WatchedArea { address: 0x10_0000, len: 0x2000, first_page: PageIndex(4) }));
        assert_eq!(overlap(&mapping(0x10_0000, 0x1000, 0x9000), &block(0, 0x6000, 0)), None);
        let read_only = maps::Mapping { writable: false, ..mapping(0x10_0000, 0x8000, 0) };
        assert_eq!(overlap(&read_only, &block(0, 0x4000, 0)), None);
    }

    #[test]
    fn a_split_mapping_is_no_news_but_another_place_is() {
        let area = |address, len, page| WatchedArea { address, len, first_page: PageIndex(page) };
        let known = Writer { process: 1, areas: vec![area(0x10_0000, 0x8000, 0)] };
        let split =
            Writer { process: 1, areas: vec![area(0x10_0000, 0x3000, 0), area(0x10_3000, 0x5000, 3)] };
        assert_eq!(known.lacks(&split), []);
        let moved = Writer { process: 1, areas: vec![area(0x20_0000, 0x1000, 0)] };
        assert_eq!(known.lacks(&moved), moved.areas);
        let shifted = Writer { process: 1, areas: vec![area(0x10_0000, 0x1000, 5)] };
        assert_eq!(known.lacks(&shifted), shifted.areas);
    }
}
