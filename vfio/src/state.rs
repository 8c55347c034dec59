//! The states of VFIO's migration version 2, and the one table of its arcs.
//!
//! ```text
//!   RUNNING ◄──► RUNNING_P2P ◄──► STOP ◄──► STOP_COPY          source: down, reading on the right
//!      ▲              ▲             ▲            ▲
//!      ▼              ▼             ▼            │
//!   PRE_COPY ◄─► PRE_COPY_P2P ──────┼────────────┘             ERROR: from everywhere, and only a reset leads out
//!                                RESUMING                      target: written, then back through STOP
//! ```
//!
//! A driver knows the single arcs; the kernel composes all others from them (`vfio_mig_get_next_state`), and leaves
//! out the states that a device lacks. This file is that table, so that what a request goes through, and where it may
//! have stopped, is known before it is made, and an illegal one is never made. What must never happen: a state assumed after a failed request. It may
//! be the old one, any on the way, or ERROR: the device is asked.

use std::fmt;

/// Where a device is; the numbers are the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum MigState {
    /// Lost: nothing but a reset leads out.
    Error = 0,
    /// It does nothing and its state stands still.
    Stop = 1,
    /// It works.
    Running = 2,
    /// Stopped, and its state is being read.
    StopCopy = 3,
    /// Stopped, and its state is being written.
    Resuming = 4,
    /// It works, but starts no DMA to its peers.
    RunningP2p = 5,
    /// It works, and its state is being read.
    PreCopy = 6,
    /// It works without DMA to its peers, and its state is being read.
    PreCopyP2p = 7,
}

use MigState::{Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};

impl MigState {
    /// All states, in the kernel's order.
    pub const ALL: [MigState; 8] =
        [Error, Stop, Running, StopCopy, Resuming, RunningP2p, PreCopy, PreCopyP2p];

    /// The state of a kernel's number.
    #[must_use]
    pub fn from_kernel(number: u32) -> Option<MigState> {
        MigState::ALL.into_iter().find(|state| state.to_kernel() == number)
    }

    /// The kernel's number.
    #[must_use]
    pub const fn to_kernel(self) -> u32 {
        self as u32
    }

    /// The kernel's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Error => "ERROR",
            Stop => "STOP",
            Running => "RUNNING",
            StopCopy => "STOP_COPY",
            Resuming => "RESUMING",
            RunningP2p => "RUNNING_P2P",
            PreCopy => "PRE_COPY",
            PreCopyP2p => "PRE_COPY_P2P",
        }
    }

    /// Whether a data file belongs to it.
    #[must_use]
    pub const fn has_data(self) -> bool {
        matches!(self, StopCopy | Resuming | PreCopy | PreCopyP2p)
    }

    /// Whether the device may change its own state or memory.
    #[must_use]
    pub const fn works(self) -> bool {
        matches!(self, Running | RunningP2p | PreCopy | PreCopyP2p)
    }
}

impl fmt::Display for MigState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a migratable device can do beyond stop and copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features {
    /// It can be kept from DMA to its peers before it stops.
    pub p2p: bool,
    /// Its state can be read while it works.
    pub pre_copy: bool,
}

impl Features {
    /// Whether a device with these features knows `state`.
    #[must_use]
    pub const fn know(self, state: MigState) -> bool {
        match state {
            Error | Stop | Running | StopCopy | Resuming => true,
            RunningP2p => self.p2p,
            PreCopy => self.pre_copy,
            PreCopyP2p => self.p2p && self.pre_copy,
        }
    }

    /// The states that a request goes through, the last one being `to`; empty when the device is there already.
    /// `None`: the arc is illegal.
    #[must_use]
    pub fn path(self, from: MigState, to: MigState) -> Option<Vec<MigState>> {
        if !self.know(from) || !self.know(to) || from == Error || to == Error {
            return None;
        }
        let (mut at, mut path) = (from, Vec::new());
        while at != to {
            at = self.next(at, to)?;
            path.push(at);
        }
        Some(path)
    }

    /// Where a device may be after a request from `from` to `to` failed, the likeliest first.
    #[must_use]
    pub fn may_be_left(self, from: MigState, to: MigState) -> Vec<MigState> {
        let path = self.path(from, to).unwrap_or_default();
        let on_the_way = path.iter().copied().take(path.len().saturating_sub(1));
        std::iter::once(from).chain(on_the_way).chain((from != Error).then_some(Error)).collect()
    }

    /// Whether a request brings a new data file: pre-copy's file stays through the stop.
    #[must_use]
    pub fn brings_file(self, from: MigState, to: MigState) -> bool {
        let path = self.path(from, to).unwrap_or_default();
        let before_last = path.iter().rev().nth(1).copied().unwrap_or(from);
        !path.is_empty() && to.has_data() && !matches!(before_last, PreCopy | PreCopyP2p)
    }

    /// The next single arc: the table's, less the states that this device lacks.
    fn next(self, from: MigState, to: MigState) -> Option<MigState> {
        let mut next = toward(from, to);
        while !self.know(next) {
            next = toward(next, to);
        }
        (next != Error).then_some(next)
    }
}

/// The kernel's table for a device that knows every state: the next state on the way to another.
const fn toward(from: MigState, to: MigState) -> MigState {
    match (from, to) {
        (Error, _) | (_, Error) | (StopCopy, PreCopy | PreCopyP2p) => Error,
        (Stop, Stop | StopCopy | Resuming) | (StopCopy, StopCopy) | (Resuming, Resuming) => to,
        (Stop, Running | RunningP2p | PreCopy | PreCopyP2p) => RunningP2p,
        (Running, Running | PreCopy) => to,
        (Running, Stop | StopCopy | Resuming | RunningP2p | PreCopyP2p) => RunningP2p,
        (RunningP2p, RunningP2p | Running | Stop | PreCopyP2p) => to,
        (RunningP2p, PreCopy) => Running,
        (RunningP2p, StopCopy | Resuming) => Stop,
        (PreCopy, PreCopy | PreCopyP2p | Running) => to,
        (PreCopy, StopCopy) => PreCopyP2p,
        (PreCopy, Stop | Resuming | RunningP2p) => Running,
        (PreCopyP2p, PreCopyP2p | PreCopy | StopCopy | RunningP2p) => to,
        (PreCopyP2p, Stop | Running | Resuming) => RunningP2p,
        (StopCopy, Stop | Running | Resuming | RunningP2p) => Stop,
        (Resuming, Stop | Running | StopCopy | RunningP2p | PreCopy | PreCopyP2p) => Stop,
    }
}

/// The whole table for people: every state, every arc, what it goes through and what a failure may leave.
#[must_use]
pub fn print_table(features: Features) -> String {
    use fmt::Write as _;
    let yes_no = |yes| if yes { "yes" } else { "no" };
    let mut text = format!("P2P: {}, PRE_COPY: {}\n", yes_no(features.p2p), yes_no(features.pre_copy));
    for from in MigState::ALL {
        for to in MigState::ALL {
            let words = match features.path(from, to) {
                _ if !features.know(from) || !features.know(to) => "unknown to this device".to_owned(),
                None if from == Error => "illegal: reset".to_owned(),
                None => "illegal".to_owned(),
                Some(path) if path.is_empty() => "already there".to_owned(),
                Some(path) => {
                    format!("{}; failed: {}", join(&path, " → "), join(&features.may_be_left(from, to), ", "))
                }
            };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{from:<13}» {to:<13}{words}");
        }
        let _ = writeln!(text, "{from:<13}» {:<13}RUNNING", "(reset)");
    }
    text
}

fn join(states: &[MigState], between: &str) -> String {
    states.iter().map(|state| state.name()).collect::<Vec<_>>().join(between)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_arcs_are_those_that_drivers_must_know() {
        let all = Features { p2p: true, pre_copy: true };
        let single = |from, to| all.path(from, to).is_some_and(|path| path.len() == 1);
        let arcs: Vec<_> = MigState::ALL
            .into_iter()
            .flat_map(|from| MigState::ALL.map(|to| (from, to)))
            .filter(|(from, to)| single(*from, *to))
            .collect();
        assert_eq!(
            arcs,
            [
                (Stop, StopCopy),
                (Stop, Resuming),
                (Stop, RunningP2p),
                (Running, RunningP2p),
                (Running, PreCopy),
                (StopCopy, Stop),
                (Resuming, Stop),
                (RunningP2p, Stop),
                (RunningP2p, Running),
                (RunningP2p, PreCopyP2p),
                (PreCopy, Running),
                (PreCopy, PreCopyP2p),
                (PreCopyP2p, StopCopy),
                (PreCopyP2p, RunningP2p),
                (PreCopyP2p, PreCopy),
            ]
        );
    }

    #[test]
    fn arcs_compose_as_the_kernel_says() {
        let all = Features { p2p: true, pre_copy: true };
        let path = |from, to| all.path(from, to).unwrap();
        assert_eq!(path(PreCopy, Resuming), [Running, RunningP2p, Stop, Resuming]);
        assert_eq!(path(Resuming, PreCopy), [Stop, RunningP2p, Running, PreCopy]);
        assert_eq!(path(PreCopy, StopCopy), [PreCopyP2p, StopCopy]);
        assert_eq!(all.path(StopCopy, PreCopy), None);
        let plain = Features::default();
        assert_eq!(plain.path(Running, StopCopy).unwrap(), [Stop, StopCopy]);
        assert_eq!(plain.path(Running, PreCopy), None);
    }

    #[test]
    fn numbers_are_the_bindings() {
        use vfio_bindings::bindings::vfio as kernel;
        let bindings = [
            kernel::vfio_device_mig_state_VFIO_DEVICE_STATE_ERROR,
            kernel::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP,
            kernel::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING,
            kernel::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY,
            kernel::vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING,
            kernel::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING_P2P,
            kernel::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY,
            kernel::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY_P2P,
        ];
        assert_eq!(MigState::ALL.map(MigState::to_kernel), bindings);
        assert_eq!(MigState::from_kernel(8), None);
    }
}
