//! What a process has mapped, read from `/proc/PID/maps`.

use std::fs;
use std::io;

use super::{Inode, query};

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Its first address.
    pub(crate) start: u64,
    /// The address behind its last byte.
    pub(crate) end: u64,
    /// The process may write through it.
    pub(crate) writable: bool,
    /// Writes reach the file (`MAP_SHARED`).
    pub(crate) shared: bool,
    /// The file's byte at `start`.
    pub(crate) offset: u64,
    /// The file; number 0 for anonymous memory.
    pub(crate) inode: Inode,
    /// Its path, as the kernel prints it.
    pub(crate) path: String,
}

impl Mapping {
    /// The process can change the file through it, now or after an `mprotect`.
    ///
    /// A shared mapping that is read-only now is no writer: a later `mprotect` shows as a new writer.
    pub(crate) fn writes(&self, inode: Inode) -> bool {
        self.shared && self.writable && self.inode == inode
    }
}

/// All mappings of a process.
pub(crate) fn of_process(pid: i32) -> io::Result<Vec<Mapping>> {
    let bytes = fs::read(format!("/proc/{pid}/maps"))?;
    Ok(String::from_utf8_lossy(&bytes).lines().filter_map(parse).collect())
}

/// The mappings of a process through which it can write files; their paths are left out.
pub(crate) fn shared_writable(pid: i32) -> io::Result<Vec<Mapping>> {
    let maps = fs::File::open(format!("/proc/{pid}/maps"))?;
    if let Some(found) = query::shared_writable(&maps) {
        return Ok(found);
    }
    let mut mappings = of_process(pid)?;
    mappings.retain(|mapping| mapping.shared && mapping.writable && mapping.inode.number != 0);
    Ok(mappings)
}

/// The processes of this host.
pub(crate) fn all_processes() -> io::Result<Vec<i32>> {
    let entries = fs::read_dir("/proc")?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

/// `7f0000000000-7f0040000000 rw-s 00000000 00:1a 42      /dev/shm/a (deleted)`
fn parse(line: &str) -> Option<Mapping> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    let permissions = words.next()?;
    let offset = words.next()?;
    let (major, minor) = words.next()?.split_once(':')?;
    let number = words.next()?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    Some(Mapping {
        start: hex(start)?,
        end: hex(end)?,
        writable: permissions.as_bytes().get(1) == Some(&b'w'),
        shared: permissions.as_bytes().get(3) == Some(&b's'),
        offset: hex(offset)?,
        inode: Inode {
            device: (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
            number: number.parse().ok()?,
        },
        path: words.next().unwrap_or_default().trim_start().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_shared_memory_is_read() {
        let line =
            "7f0000000000-7f0040000000 rw-s 00200000 00:1a 42                      /dev/shm/a b (deleted)";
        let mapping = parse(line).unwrap();
        let inode = Inode { device: (0, 0x1a), number: 42 };
        assert_eq!(
            (mapping.start, mapping.end, mapping.offset),
            (0x7f00_0000_0000, 0x7f00_4000_0000, 0x20_0000)
        );
        assert_eq!(mapping.path, "/dev/shm/a b (deleted)");
        assert!(mapping.writes(inode));
        assert!(!parse(&line.replace("rw-s", "r--s")).unwrap().writes(inode));
        assert!(!parse(&line.replace("rw-s", "rw-p")).unwrap().writes(inode));
    }

    #[test]
    fn both_ways_to_find_shared_mappings_agree() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let file =
            fs::File::options().read(true).write(true).create_new(true).open(folder.path().join("ram"));
        let file = file.unwrap();
        file.set_len(1 << 20).unwrap();
        let block = vmferry_datapath::RamBlock {
            name: "ram".into(),
            len: vmferry_datapath::ByteLen(1 << 20),
            page_bytes: 4096,
        };
        let layout = vmferry_datapath::RamLayout::new(vec![block]).unwrap();
        let file = vmferry_datapath::RamFile { file, offset: 0 };
        let access = vmferry_datapath::Access::ReadWrite;
        let _ram = vmferry_datapath::GuestRam::map(layout, vec![file], access).unwrap();
        let me = i32::try_from(std::process::id()).unwrap();
        let mut text = of_process(me).unwrap();
        text.retain(|mapping| mapping.shared && mapping.writable && mapping.inode.number != 0);
        text.iter_mut().for_each(|mapping| mapping.path.clear());
        assert!(!text.is_empty());
        assert_eq!(shared_writable(me).unwrap(), text);
    }

    #[test]
    fn anonymous_memory_and_nonsense_are_told_apart() {
        assert_eq!(parse("7ffe0000-7ffe1000 rw-p 00000000 00:00 0 ").unwrap().path, "");
        assert_eq!(parse("not a mapping"), None);
    }

    #[test]
    fn this_process_is_among_all_and_has_mappings() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(all_processes().unwrap().contains(&me));
        assert!(of_process(me).unwrap().iter().any(|mapping| mapping.path == "[stack]" || mapping.writable));
    }
}
