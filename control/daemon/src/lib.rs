//! The shell: turns words on a command line into moves, and does what the session decides with the lanes and the guests.
//!
//! ```text
//!   cli ─► send ────┐                      ┌──── receive ◄─ cli
//!          pilot    │ channel (TLS)  door  │    pilot
//!          hands    └───── lanes ──────────┘    concierge, spool
//!          guardian
//! ```
//!
//! It decides nothing about a move (that is `vmferry-session`) and moves no page itself (that is `vmferry-datapath`).

pub mod blame;
pub mod channel;
pub mod cli;
pub mod demo;
pub mod doctor;
pub mod door;
pub mod endpoint;
pub mod fabric;
pub mod failure;
pub mod guardian;
pub mod hold;
pub mod inspect;
pub mod interrupt;
pub mod keys;
pub mod lanes;
pub mod pilot;
pub mod progress;
pub mod quantity;
pub mod receive;
pub mod report;
pub mod send;
