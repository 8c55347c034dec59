//! The micro-VM's dirty log as the mover holds it: a connection of its own, whose end ends the tracking.

use vmferry_datapath::{ChunkIndex, DirtyLog, PageSet, RamLayout, TrackError};

use super::{MicroVmControl, TrackingWord};
use crate::GuestError;

const WORD_BYTES: usize = 8;

pub(super) struct MicroVmLog {
    control: MicroVmControl,
    layout: RamLayout,
    tracking: TrackingWord,
}

impl MicroVmLog {
    /// Starts the tracking.
    pub(super) fn start(
        name: &str,
        layout: &RamLayout,
        tracking: TrackingWord,
    ) -> Result<MicroVmLog, GuestError> {
        let mut control = MicroVmControl::connect(name)?;
        control.attach()?;
        Ok(MicroVmLog { control, layout: layout.clone(), tracking })
    }
}

impl MicroVmLog {
    /// What devices may write and this log cannot tell.
    pub(super) fn pinned(&mut self) -> Result<PageSet, GuestError> {
        let bytes = self.control.pinned(self.len())?;
        let mut set = PageSet::new(&self.layout);
        self.add(&bytes, &mut set).map_err(|error| GuestError::misbehaved(error.to_string()))?;
        Ok(set)
    }

    fn len(&self) -> u64 {
        self.layout.chunk_count() * WORD_BYTES as u64
    }

    fn add(&self, bytes: &[u8], into: &mut PageSet) -> Result<(), TrackError> {
        if bytes.len() as u64 != self.len() {
            return Err(TrackError::VmmLost("it sent a log of another size".to_owned()));
        }
        for (word, chunk) in bytes.chunks_exact(WORD_BYTES).zip(0_u64..) {
            let chunk = ChunkIndex(chunk);
            let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
            into.set_word(chunk, into.word(chunk) | word & self.layout.valid_pages(chunk));
        }
        Ok(())
    }
}

impl DirtyLog for MicroVmLog {
    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        let harvest = self.control.harvest(self.len());
        let bytes = harvest.map_err(|error| TrackError::VmmLost(error.to_string()))?;
        self.add(&bytes, into)
    }

    fn name(&self) -> &'static str {
        self.tracking.name()
    }
}
