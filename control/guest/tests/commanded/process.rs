//! Another process whose writes a test commands, and its memory's place.

use std::os::unix::fs::MetadataExt;

use vmferry_datapath::dirty::contract::Scribe;
use vmferry_datapath::{ByteLen, PageIndex, RamBlock, RamLayout};
use vmferry_guest::GuestError;
use vmferry_guest::attach::{BlockPlace, Inode, Tracked};
use vmferry_rig::CommandedWriter;

const BYTES: u64 = 16 << 20;
const PAGES: u64 = BYTES / 4096;

/// The process, and the file that it writes.
pub(crate) struct Process {
    writer: CommandedWriter,
    layout: RamLayout,
    place: BlockPlace,
    _folder: tempfile::TempDir,
}

impl Process {
    pub(crate) fn start() -> Process {
        let folder = tempfile::tempdir_in("/dev/shm").expect("shared memory");
        let path = folder.path().join("ram");
        let file = std::fs::File::create(&path).expect("a file there");
        file.set_len(BYTES).expect("room for it");
        let block = RamBlock { name: "ram".into(), len: ByteLen(BYTES), page_bytes: 4096 };
        let layout = RamLayout::new(vec![block]).expect("one block is a layout");
        let metadata = file.metadata().expect("an open file");
        let device = (rustix::fs::major(metadata.dev()), rustix::fs::minor(metadata.dev()));
        let inode = Inode { device, number: metadata.ino() };
        let place = BlockPlace { inode, offset: 0, len: BYTES, first_page: PageIndex(0) };
        let writer = CommandedWriter::start(&path).expect("the rig's programs are built");
        Process { writer, layout, place, _folder: folder }
    }

    pub(crate) fn track(
        &self,
        by: fn(i32, &RamLayout, &[BlockPlace]) -> Result<Tracked, GuestError>,
    ) -> Result<Tracked, GuestError> {
        by(i32::try_from(self.writer.pid()).expect("a process id"), &self.layout, &[self.place])
    }
}

impl Scribe for Process {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn span(&self) -> (PageIndex, PageIndex) {
        (PageIndex(0), PageIndex(PAGES))
    }

    fn write(&mut self, pages: &[PageIndex]) -> Result<(), String> {
        self.writer.write(pages.iter().map(|page| page.0)).map_err(|error| error.to_string())
    }
}
