//! Whole transfers: a sender, a receiver, and whatever stands between them.

mod hostile;
mod moves;
mod trouble;
mod world;
