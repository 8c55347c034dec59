//! Any running, unmodified QEMU, spoken to over its QMP socket.

mod blocks;
mod qmp;
mod source;
mod target;

pub use source::{QemuSource, rescue};
pub use target::QemuTarget;
