//! The bare io_uring loop that a lane is held against: the same bytes from the same memory over loopback, and nothing
//! else: no records, no credits, no zero pages.
#![expect(unsafe_code, reason = "io_uring takes raw addresses, and the caller vouches for them")]

use std::net::TcpStream;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use io_uring::{IoUring, opcode, types};

use crate::memory::Memory;

const MSG_WAITALL: i32 = 0x100;

/// Sends all of `memory`, `piece` bytes at a time.
pub(crate) fn send_all(stream: &TcpStream, memory: &Memory, piece: usize) -> Result<()> {
    walk(memory, piece, |ring, address, len| {
        let entry = opcode::Send::new(types::Fd(stream.as_raw_fd()), address, len).flags(MSG_WAITALL).build();
        // SAFETY: the memory outlives the operation, which `one` waits for.
        unsafe { ring.submission().push(&entry) }.context("the ring is full")
    })
}

/// Receives all of `memory`, up to `piece` bytes at a time.
pub(crate) fn receive_all(stream: &TcpStream, memory: &Memory, piece: usize) -> Result<()> {
    walk(memory, piece, |ring, address, len| {
        let address = address.cast_mut();
        let entry = opcode::Recv::new(types::Fd(stream.as_raw_fd()), address, len).build();
        // SAFETY: the memory is mapped writable and outlives the operation, which `one` waits for.
        unsafe { ring.submission().push(&entry) }.context("the ring is full")
    })
}

fn walk(
    memory: &Memory,
    piece: usize,
    mut push: impl FnMut(&mut IoUring, *const u8, u32) -> Result<()>,
) -> Result<()> {
    let mut ring = IoUring::new(8).context("io_uring is refused here")?;
    let mut done = 0;
    while done < memory.len() {
        let len = piece.min(memory.len() - done);
        push(&mut ring, memory.at(done), u32::try_from(len)?)?;
        done += one(&mut ring)?;
    }
    Ok(())
}

fn one(ring: &mut IoUring) -> Result<usize> {
    ring.submit_and_wait(1)?;
    let completion = ring.completion().next().context("the ring woke without a completion")?;
    match usize::try_from(completion.result()) {
        Ok(0) => bail!("the other side closed the connection"),
        Ok(count) => Ok(count),
        Err(_) => Err(std::io::Error::from_raw_os_error(-completion.result()).into()),
    }
}
