//! The rig boots guests whose own answers prove a move: it starts and ends VMMs, and never touches a guest's memory.
//!
//! ```text
//!   Assets (qemu, kernel, init) ──► QemuGuest (a recipe) ──► RunningGuest ── qmp ────► VMM
//!                                                               ├─ console ── status, verify, rate ──► the guest's init
//!                                                               └─ beats ◄── one byte each ms through port 0xe9
//! ```
//!
//! The heart beat is stamped by the host's clock as it arrives, on both sides of a move; the gap in it is what the
//! guest was really away, whatever a VMM claims. What a machine lacks is said aloud: see [`require!`].

mod answer;
mod assets;
mod commanded_writer;
mod console;
mod cpio;
mod disk;
mod heartbeat;
mod image;
mod initramfs;
pub mod lab;
mod microvm;
mod need;
mod qemu;
mod qmp;
mod second_writer;
mod wire;

pub use answer::{ANSWER_PREFIX, GuestCpus, GuestGap, GuestStatus, NetStatus};
pub use assets::{Assets, GuestFiles, cache_folder};
pub use commanded_writer::CommandedWriter;
pub use console::Console;
pub use cpio::Archive;
pub use disk::{DISK_BLOCK_BYTES, block_word, create_disk};
pub use heartbeat::{Beat, Handover, HeartBeat, guest_gap};
pub use image::Image;
pub use microvm::{MicroVmGuest, RunningMicroVm};
pub use need::{huge_pages, root, skip};
pub use qemu::{Memory, QemuGuest, RigDirectory, RunningGuest};
pub use qmp::Qmp;
pub use second_writer::{SecondWriter, SecondWriting};
pub use wire::{GUEST_ADDRESS, WIRE_ADDRESS, WIRE_MAC, WIRE_PORT, Wire};

/// What went wrong while a guest was set up or asked.
#[derive(Debug, thiserror::Error)]
pub enum RigError {
    /// The machine lacks something.
    #[error("{0}")]
    Missing(String),
    /// The host refused an operation.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The guest or its VMM answered with an error, or ended.
    #[error("{0}")]
    Guest(String),
    /// No answer in time.
    #[error("{what} did not answer within {after_ms} ms")]
    Timeout {
        /// Who was asked.
        what: String,
        /// How long the rig waited.
        after_ms: u128,
    },
}

impl RigError {
    pub(crate) fn host(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Host { what, source }
    }
}
