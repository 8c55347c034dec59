//! A lane's transport.
pub mod memory;
pub mod tcp;

/// One lane's two-way transport.
pub trait Link: Send {}
