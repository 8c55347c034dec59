//! Any running, unmodified QEMU, spoken to over its QMP socket.

mod blocks;
mod facts;
mod migration;
mod qmp;
mod source;
mod stream;
mod target;

pub use source::{QemuSource, rescue};
pub use target::QemuTarget;
