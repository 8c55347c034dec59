//! The device state between its arrival and its load.
//!
//! A VMM reads guest memory while it loads its state, so nothing may be loaded before every lane has delivered its
//! last page; until then the state waits here. A typical one is 300 KB and stays in memory; a large one (a
//! framebuffer) goes to a file, so that this process does not grow with it.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::thread::JoinHandle;

use tempfile::SpooledTempFile;
use vmferry_datapath::StateStream;

/// Kept in memory up to here.
const SPOOL_MEMORY_BYTES: usize = 2 << 20;
/// A state larger than this is no state: the peer would fill the disk.
const STATE_BYTES_MAX: u64 = 4 << 30;

/// Collects lane 0's state bytes on a thread of its own.
pub(super) struct Spool {
    collector: Option<JoinHandle<io::Result<(SpooledTempFile, u64)>>>,
}

impl Spool {
    /// Starts to collect.
    pub(super) fn start(stream: StateStream) -> io::Result<Self> {
        let collector = std::thread::Builder::new().name("state".into()).spawn(move || collect(stream))?;
        Ok(Self { collector: Some(collector) })
    }

    /// The whole state, from its first byte; waits for its end, or for the end of its lane.
    pub(super) fn finish(mut self) -> io::Result<(SpooledTempFile, u64)> {
        let collector =
            self.collector.take().ok_or_else(|| io::Error::other("the state was taken already"))?;
        collector.join().unwrap_or_else(|_| Err(io::Error::other("the state collector panicked")))
    }
}

fn collect(mut stream: StateStream) -> io::Result<(SpooledTempFile, u64)> {
    let mut spool = tempfile::spooled_tempfile(SPOOL_MEMORY_BYTES);
    let len = io::copy(&mut (&mut stream).take(STATE_BYTES_MAX + 1), &mut spool)?;
    if len > STATE_BYTES_MAX {
        return Err(io::Error::other(format!("the device state is larger than {STATE_BYTES_MAX} bytes")));
    }
    spool.flush()?;
    spool.seek(SeekFrom::Start(0))?;
    Ok((spool, len))
}
