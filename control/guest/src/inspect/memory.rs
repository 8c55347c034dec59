//! The memory of a process that others can map, and who does.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;

use serde::Serialize;
use vmferry_datapath::{PAGE_BYTES, PageIndex, WatchedArea};

use crate::GuestError;
use crate::attach::maps::{self, Mapping};
use crate::attach::{BlockPlace, Inode, Writer, kernel_support, process_name};

/// A shared file below this is a ring or a mailbox, no RAM.
pub(super) const FILE_BYTES_MIN: u64 = 1 << 20;
/// An anonymous mapping of this size may be private RAM; smaller ones are heaps and stacks.
const PRIVATE_BYTES_MIN: u64 = 64 << 20;

/// A file that a process maps so that others can map it too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryFile {
    /// As the kernel prints it; its name may be gone.
    pub path: String,
    /// Bytes of it that are mapped.
    pub bytes: u64,
    /// Bytes a page.
    pub page_bytes: u64,
    /// The RAM block in the VMM's words, where it was asked.
    pub block: Option<String>,
    #[serde(skip)]
    inode: Inode,
}

impl MemoryFile {
    pub(crate) fn inode(&self) -> Inode {
        self.inode
    }
}

/// A process that can write the memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryWriter {
    /// Its name and number.
    pub name: String,
    /// Its number.
    pub pid: i32,
    /// Bytes that it maps.
    pub bytes: u64,
    /// How its writes would be tracked.
    pub tracked: String,
}

/// All of it.
pub(super) struct FoundMemory {
    pub(super) name: String,
    pub(super) files: Vec<MemoryFile>,
    pub(super) private_bytes: u64,
    pub(super) writers: Vec<MemoryWriter>,
    pub(super) notes: Vec<String>,
}

/// Looks at process `pid`.
pub(super) fn look(pid: i32) -> Result<FoundMemory, GuestError> {
    let mappings = maps::of_process(pid).map_err(|error| cannot_look(pid, error))?;
    let pages = page_sizes(pid);
    let mut by_file: BTreeMap<Inode, (MemoryFile, Vec<Range<u64>>)> = BTreeMap::new();
    for mapping in
        mappings.iter().filter(|mapping| mapping.writes(mapping.inode) && mapping.inode.number != 0)
    {
        let file = || MemoryFile {
            path: mapping.path.clone(),
            bytes: 0,
            page_bytes: pages.get(&mapping.start).copied().unwrap_or(4096),
            block: None,
            inode: mapping.inode,
        };
        let (_, ranges) = by_file.entry(mapping.inode).or_insert_with(|| (file(), Vec::new()));
        ranges.push(mapping.offset..mapping.offset + (mapping.end - mapping.start));
    }
    by_file.values_mut().for_each(|(file, ranges)| file.bytes = covered(ranges));
    by_file.retain(|_, (file, _)| file.bytes >= FILE_BYTES_MIN);
    // One behind the other, so that every page of every file has a number of its own.
    let mut first_page = PageIndex(0);
    let mut place = |(inode, (_, ranges)): (&Inode, &(MemoryFile, Vec<Range<u64>>))| {
        let first = ranges.iter().map(|range| range.start).min().unwrap_or(0);
        let last = ranges.iter().map(|range| range.end).max().unwrap_or(0);
        let place = BlockPlace { inode: *inode, offset: first, len: last - first, first_page };
        first_page.0 += place.len / PAGE_BYTES as u64;
        place
    };
    let places: Vec<BlockPlace> = by_file.iter().map(&mut place).collect();
    let (writers, hidden) = writers(pid, &places)?;
    let mut notes = Vec::new();
    if hidden > 0 {
        notes.push(format!(
            "{hidden} processes of other users could not be looked at; run vmferry as root to see whether they write the \
             memory"
        ));
    }
    Ok(FoundMemory {
        name: process_name(pid),
        files: by_file.into_values().map(|(file, _)| file).collect(),
        private_bytes: mappings.iter().filter_map(private).sum(),
        writers,
        notes,
    })
}

/// Bytes in at least one of the ranges: a VMM may map its memory twice.
fn covered(ranges: &mut [Range<u64>]) -> u64 {
    ranges.sort_by_key(|range| range.start);
    let mut end = 0;
    let mut bytes = 0;
    for range in ranges {
        bytes += range.end.saturating_sub(end.max(range.start));
        end = end.max(range.end);
    }
    bytes
}

fn private(mapping: &Mapping) -> Option<u64> {
    let bytes = mapping.end - mapping.start;
    let anonymous = mapping.inode.number == 0 && mapping.path.is_empty() && mapping.writable;
    (anonymous && bytes >= PRIVATE_BYTES_MIN).then_some(bytes)
}

fn writers(vmm: i32, places: &[BlockPlace]) -> Result<(Vec<MemoryWriter>, usize), GuestError> {
    if places.is_empty() {
        return Ok((Vec::new(), 0));
    }
    let (found, hidden) = Writer::look_everywhere(places)
        .map_err(GuestError::refused("cannot read /proc; mount it, without hidepid"))?;
    let range = |area: &WatchedArea| {
        let start = area.first_page.0 * PAGE_BYTES as u64;
        start..start + area.len
    };
    let writer = |writer: &Writer| MemoryWriter {
        name: process_name(writer.process),
        pid: writer.process,
        bytes: covered(&mut writer.areas.iter().map(range).collect::<Vec<_>>()),
        tracked: tracked(writer.process),
    };
    let mut writers: Vec<MemoryWriter> = found.iter().map(writer).collect();
    writers.sort_by_key(|writer| (writer.pid != vmm, writer.pid));
    Ok((writers, hidden))
}

/// How a process would be tracked. Only what can be seen from outside is looked at; an attach may still be refused.
fn tracked(pid: i32) -> String {
    let tracer = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let tracer = tracer.lines().find_map(|line| line.strip_prefix("TracerPid:")).map(str::trim);
    if let Some(tracer) = tracer.filter(|tracer| *tracer != "0") {
        return format!(
            "not: process {tracer} traces it; end that debugger, else its pages travel in the blackout"
        );
    }
    // The kernel asks for this the same permission as an attach does, and opening it touches nothing.
    if fs::File::open(format!("/proc/{pid}/mem")).is_err() {
        return "not: no permission to attach to it; run vmferry as root, else its pages travel in the blackout".into();
    }
    match kernel_support() {
        Ok(_) => "by PAGEMAP_SCAN, after an injection of under a millisecond".into(),
        Err(_) => "by soft-dirty bits".into(),
    }
}

/// Bytes a page of each mapping, by its first address; empty where the kernel does not say.
fn page_sizes(pid: i32) -> BTreeMap<u64, u64> {
    let text = fs::read(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let (mut sizes, mut start) = (BTreeMap::new(), None);
    for line in text.lines() {
        let address = line.split_once('-').and_then(|(start, _)| u64::from_str_radix(start, 16).ok());
        start = address.or(start);
        let kib = line.strip_prefix("KernelPageSize:").and_then(|rest| rest.trim().strip_suffix("kB"));
        if let (Some(start), Some(kib)) = (start, kib.and_then(|kib| kib.trim().parse::<u64>().ok())) {
            sizes.insert(start, kib << 10);
        }
    }
    sizes
}

/// Why a process cannot be looked at.
pub(super) fn cannot_look(pid: i32, error: std::io::Error) -> GuestError {
    if matches!(error.kind(), ErrorKind::NotFound) || error.raw_os_error() == Some(libc::ESRCH) {
        return GuestError::mistake(format!(
            "no process {pid} runs here: name the VMM's process id, such as 'pgrep -f qemu-system' prints it"
        ));
    }
    GuestError::refused(format!("process {pid} cannot be looked at; run vmferry as root or as its user"))(
        error,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mapped_twice_counts_once() {
        assert_eq!(covered(&mut [0..8, 0..8]), 8);
        assert_eq!(covered(&mut [16..24, 4..8, 0..6]), 16);
        assert_eq!(covered(&mut [0..10, 2..4]), 10);
        assert_eq!(covered(&mut []), 0);
    }
}
