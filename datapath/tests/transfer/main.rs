//! Whole transfers: a sender, a receiver, and whatever stands between them.
#![expect(clippy::disallowed_methods, reason = "tests that wait need a deadline")]

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod moves;
#[cfg(test)]
mod parsers;
#[cfg(test)]
mod states;
#[cfg(test)]
mod trouble;
#[cfg(test)]
mod urgent;
#[cfg(test)]
mod world;
