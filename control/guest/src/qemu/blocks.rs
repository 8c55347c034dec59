//! QEMU's RAM blocks: which of them are files that the lanes carry, and which travel in QEMU's own stream.
//!
//! QEMU's capability `x-ignore-shared` leaves exactly the blocks out of its stream that are named files and shared
//! (`memory-backend-file,share=on`; seen in 10.0.2: a shared memfd is *not* left out, its whole RAM would travel
//! inside the blackout). So exactly those are ours, guest RAM of any other kind is refused with the option that
//! makes it one, and small private blocks (firmware, video) are left to QEMU.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;

use rustix::fs::fstatfs;
use serde_json::{Value, json};
use vmferry_datapath::{ByteLen, RamBlock, RamFile, RamLayout};

use super::qmp::Qmp;
use crate::GuestError;
use crate::attach::maps::{self, Mapping};
use crate::attach::{BlockPlace, Inode};

const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// A line of `info ramblock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockLine {
    /// QEMU's name for it.
    pub(crate) name: String,
    /// Its length now, in bytes.
    pub(crate) used: u64,
    /// Where it lies in QEMU's address space.
    pub(crate) address: u64,
}

/// Guest RAM as found: its layout, its files, and where to watch it.
pub(crate) struct FoundRam {
    /// The flat page space.
    pub(crate) layout: RamLayout,
    /// A file for each block.
    pub(crate) files: Vec<RamFile>,
    /// Where each block is in its file and in the page space.
    pub(crate) places: Vec<BlockPlace>,
    /// The process that runs the guest.
    pub(crate) vmm: i32,
    /// Blocks that QEMU itself carries, for people.
    pub(crate) in_stream: Vec<String>,
}

/// What `query-memdev` and QOM say about one memory backend.
#[derive(Debug)]
struct Backend {
    id: String,
    bytes: u64,
    kind: String,
    shared: bool,
}

/// Finds the guest's RAM; `writable` as a target needs it.
pub(crate) fn find(qmp: &mut Qmp, writable: bool) -> Result<FoundRam, GuestError> {
    let backends = backends(qmp)?;
    if backends.is_empty() {
        return Err(private("ram", 0));
    }
    backends.iter().try_for_each(check)?;
    let lines = parse_ram_blocks(&qmp.human("info ramblock")?);
    let (mut ours, others): (Vec<BlockLine>, Vec<BlockLine>) =
        lines.into_iter().partition(|line| backends.iter().any(|backend| is_of(&line.name, &backend.id)));
    if ours.is_empty() {
        return Err(GuestError::misbehaved(
            "QEMU lists memory backends but no RAM block of theirs in `info ramblock`; please report its version",
        ));
    }
    // QEMU sorts blocks by size and age; both sides must agree, so the name decides.
    ours.sort_by(|a, b| a.name.cmp(&b.name));
    let vmm = vmm_process(qmp, &ours)?;
    let mappings = maps::of_process(vmm).map_err(cannot_look(vmm))?;
    let pieces =
        ours.iter().map(|line| open_block(vmm, &mappings, line, writable)).collect::<Result<Vec<_>, _>>()?;
    let blocks = ours
        .iter()
        .zip(&pieces)
        .map(|(line, piece)| RamBlock {
            name: line.name.clone(),
            len: ByteLen(line.used),
            page_bytes: piece.page_bytes,
        })
        .collect();
    let layout = RamLayout::new(blocks)?;
    let place = |(number, piece): (usize, &OpenBlock)| BlockPlace {
        inode: piece.inode,
        offset: piece.file.offset,
        len: ours[number].used,
        first_page: layout.first_page(number),
    };
    let places = pieces.iter().enumerate().map(place).collect();
    let in_stream = others.iter().map(|line| format!("{} ({} KiB)", line.name, line.used >> 10)).collect();
    Ok(FoundRam {
        layout,
        files: pieces.into_iter().map(|piece| piece.file).collect(),
        places,
        vmm,
        in_stream,
    })
}

fn backends(qmp: &mut Qmp) -> Result<Vec<Backend>, GuestError> {
    let listed = qmp.execute("query-memdev", Value::Null)?;
    let kinds = qmp.execute("qom-list", json!({ "path": "/objects" }))?;
    let kind_of = |id: &str| {
        let entry = kinds.as_array().into_iter().flatten().find(|entry| entry["name"] == id);
        let kind = entry.and_then(|entry| entry["type"].as_str()).unwrap_or_default();
        kind.trim_start_matches("child<").trim_end_matches('>').to_owned()
    };
    let backend = |entry: &Value| {
        let id = entry["id"].as_str().unwrap_or_default().to_owned();
        Backend {
            bytes: entry["size"].as_u64().unwrap_or(0),
            kind: kind_of(&id),
            shared: entry["share"].as_bool().unwrap_or(false),
            id,
        }
    };
    Ok(listed.as_array().into_iter().flatten().map(backend).collect())
}

fn check(backend: &Backend) -> Result<(), GuestError> {
    if backend.kind == "memory-backend-memfd" {
        return Err(GuestError::mistake(format!(
            "guest RAM `{}` is a memfd, which QEMU would carry in its own stream during the blackout (its \
             x-ignore-shared leaves only named files out); start QEMU 8.1 or newer with `{}`, in libvirt {}",
            backend.id,
            option_for(&backend.id, backend.bytes),
            LIBVIRT_WORDS
        )));
    }
    if backend.kind != "memory-backend-file" || !backend.shared {
        return Err(private(&backend.id, backend.bytes));
    }
    Ok(())
}

const LIBVIRT_WORDS: &str = "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking> with \
                             memory_backing_dir = \"/dev/shm\" in qemu.conf";

fn option_for(id: &str, bytes: u64) -> String {
    let size = if bytes == 0 { "SIZE".to_owned() } else { format!("{}M", bytes >> 20) };
    let id = if id.contains('.') { "ram0" } else { id };
    format!(
        "-object memory-backend-file,id={id},size={size},mem-path=/dev/shm/GUEST-{id},share=on -machine memory-backend={id}"
    )
}

fn private(id: &str, bytes: u64) -> GuestError {
    GuestError::mistake(format!(
        "guest RAM `{id}` is private to QEMU, so no other process can read it; start QEMU with `{}`, in libvirt \
         {LIBVIRT_WORDS}",
        option_for(id, bytes),
    ))
}

/// A block is named after its backend, or by the backend's whole path (machine types 4.0 and up may do that).
fn is_of(block: &str, backend: &str) -> bool {
    block.strip_prefix("/objects/").unwrap_or(block) == backend
}

/// Reads `info ramblock`:
///
/// ```text
///   Block Name    PSize              Offset               Used              Total                HVA  RO
///         ram0    4 KiB  0x0000000000000000 0x0000000040000000 0x0000000040000000 0x00007f6c3fe00000  rw
/// ```
fn parse_ram_blocks(text: &str) -> Vec<BlockLine> {
    let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let first = words.iter().position(|word| number(word).is_some())?;
        // In front of the numbers: the name (it may hold spaces) and the page size, itself of two words.
        let name = words.get(..first.checked_sub(2)?)?.join(" ");
        let (used, address) = (number(words.get(first + 1)?)?, number(words.get(first + 3)?)?);
        Some(BlockLine { name, used, address })
    };
    text.lines().filter_map(line).collect()
}

/// The process that has every block mapped where QEMU says it is: the socket's peer, or, where a manager opened the
/// socket for QEMU, whoever fits.
fn vmm_process(qmp: &Qmp, blocks: &[BlockLine]) -> Result<i32, GuestError> {
    let peer = qmp.peer();
    if peer > 0 && has_blocks(peer, blocks) {
        return Ok(peer);
    }
    let fitting = maps::all_processes().unwrap_or_default().into_iter().find(|pid| has_blocks(*pid, blocks));
    fitting.ok_or_else(|| {
        let looked = maps::of_process(peer).err();
        GuestError::HostRefused {
            what: format!(
                "QEMU's process is not visible from here (the socket's peer is {peer}); run vmferry as root and in \
                 QEMU's PID namespace, outside of its container"
            ),
            source: looked.unwrap_or_else(|| std::io::ErrorKind::NotFound.into()),
        }
    })
}

fn has_blocks(pid: i32, blocks: &[BlockLine]) -> bool {
    let Ok(mappings) = maps::of_process(pid) else { return false };
    blocks.iter().all(|block| {
        mappings.iter().any(|mapping| {
            mapping.shared
                && mapping.inode.number != 0
                && (mapping.start..mapping.end).contains(&block.address)
        })
    })
}

struct OpenBlock {
    file: RamFile,
    inode: Inode,
    page_bytes: u32,
}

fn open_block(
    vmm: i32,
    mappings: &[Mapping],
    line: &BlockLine,
    writable: bool,
) -> Result<OpenBlock, GuestError> {
    let mapping = mappings
        .iter()
        .find(|mapping| (mapping.start..mapping.end).contains(&line.address))
        .ok_or_else(|| GuestError::misbehaved(format!("RAM block `{}` is not mapped in QEMU", line.name)))?;
    let file = open_inode(vmm, mapping, writable).ok_or_else(|| GuestError::HostRefused {
        what: format!(
            "the file {} behind RAM block `{}` cannot be opened through /proc/{vmm}; run vmferry as root, or as the \
             user of the VMM",
            mapping.path, line.name
        ),
        source: std::io::ErrorKind::PermissionDenied.into(),
    })?;
    let statistics =
        fstatfs(&file).map_err(GuestError::refused(format!("cannot look at {}", mapping.path)))?;
    let page_bytes = match u64::try_from(statistics.f_type).unwrap_or(0) {
        TMPFS_MAGIC => 4096,
        HUGETLBFS_MAGIC => u32::try_from(statistics.f_bsize).unwrap_or(0),
        _ => {
            return Err(GuestError::mistake(format!(
                "RAM block `{}` lies in {}, on a file system whose pages cannot be tracked; put it on shared memory \
                 (mem-path=/dev/shm/…) or on hugetlbfs (mem-path=/dev/hugepages/…)",
                line.name, mapping.path
            )));
        }
    };
    let offset = mapping.offset + (line.address - mapping.start);
    Ok(OpenBlock { file: RamFile { file, offset }, inode: mapping.inode, page_bytes })
}

/// Opens the mapped file itself, also when its name is gone: by the mapping, or by a descriptor that QEMU holds.
fn open_inode(vmm: i32, mapping: &Mapping, writable: bool) -> Option<File> {
    let open = |path: &std::path::Path| {
        let file = OpenOptions::new().read(true).write(writable).open(path).ok()?;
        let metadata = file.metadata().ok()?;
        let device = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
        (Inode { device, number: metadata.ino() } == mapping.inode).then_some(file)
    };
    let by_mapping = format!("/proc/{vmm}/map_files/{:x}-{:x}", mapping.start, mapping.end);
    open(by_mapping.as_ref()).or_else(|| {
        let descriptors = std::fs::read_dir(format!("/proc/{vmm}/fd")).ok()?;
        let same_name = |path: &std::path::Path| {
            std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy() == mapping.path.as_str())
        };
        descriptors
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| same_name(path))
            .find_map(|path| open(&path))
    })
}

fn cannot_look(vmm: i32) -> impl FnOnce(std::io::Error) -> GuestError {
    GuestError::refused(format!(
        "cannot read /proc/{vmm}/maps; run vmferry as root or as the user of the VMM"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEEN: &str = "              Block Name    PSize              Offset               Used              Total                HVA  RO\n\
              \x20                  ram0    4 KiB  0x0000000000000000 0x0000000040000000 0x0000000040000000 0x00007f6c3fe00000  rw\n\
              \x20               pc.bios    4 KiB  0x0000000040000000 0x0000000000040000 0x0000000000040000 0x00007f6c3fa00000  ro\n\
              \x20  /rom@etc/acpi/tables    4 KiB  0x0000000040080000 0x0000000000020000 0x0000000000200000 0x00007f6c3f800000  ro\n";

    #[test]
    fn the_monitors_table_is_read() {
        let lines = parse_ram_blocks(SEEN);
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[0], BlockLine { name: "ram0".into(), used: 1 << 30, address: 0x7f6c_3fe0_0000 });
        assert_eq!(lines[2].name, "/rom@etc/acpi/tables");
    }

    #[test]
    fn a_block_belongs_to_its_backend_by_either_name() {
        assert!(is_of("ram0", "ram0") && is_of("/objects/ram0", "ram0"));
        assert!(!is_of("ram01", "ram0") && !is_of("pc.bios", "ram0"));
    }

    #[test]
    fn private_memory_is_refused_with_the_option_to_add() {
        let backend =
            Backend { id: "ram0".into(), bytes: 1 << 30, kind: "memory-backend-ram".into(), shared: false };
        let sentence = check(&backend).unwrap_err().to_string();
        assert!(sentence.contains("memory-backend-file,id=ram0,size=1024M"), "{sentence}");
        assert!(sentence.contains("share=on -machine memory-backend=ram0"), "{sentence}");
        assert!(sentence.contains("<memoryBacking>"), "{sentence}");
    }
}
