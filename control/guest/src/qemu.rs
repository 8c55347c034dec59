//! Any running, unmodified QEMU, spoken to over its QMP socket.

mod source;
mod target;

pub use source::{QemuSource, rescue};
pub use target::QemuTarget;
