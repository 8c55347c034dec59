//! What an operator decides about failover.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::DeviceOptions;

/// Whether primaries are unplugged for a move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailoverMode {
    /// Every primary of a `net_failover` pair.
    #[default]
    Auto,
    /// None: a guest that has one is refused.
    Off,
}

/// What happens when the guest keeps a primary longer than `unplug_timeout`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnUnplugTimeout {
    /// The move ends, and what was done is undone.
    #[default]
    Abort,
    /// It is asked again and again until the move is cancelled, as QEMU does in `wait-unplug`.
    Wait,
}

/// Set by whoever cancels a move; looked at while a guest is waited for.
#[derive(Clone, Debug, Default)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// From now on nothing waits any more.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was set.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// The choices for a source.
#[derive(Clone, Debug)]
pub struct FailoverOptions {
    /// Whether primaries are unplugged.
    pub mode: FailoverMode,
    /// How long a guest may take to give a primary up, in all.
    pub unplug_timeout: Duration,
    /// What happens then.
    pub on_unplug_timeout: OnUnplugTimeout,
    /// Standbys to plug for devices that have none: the option `for` names the device.
    pub standbys: Vec<DeviceOptions>,
    /// Ends every wait.
    pub cancel: CancelFlag,
}

impl FailoverOptions {
    /// A guest that is alive gives a device up within a second or two; a loaded one may need several.
    pub const UNPLUG_TIMEOUT: Duration = Duration::from_secs(20);
}

impl Default for FailoverOptions {
    fn default() -> FailoverOptions {
        FailoverOptions {
            mode: FailoverMode::Auto,
            unplug_timeout: FailoverOptions::UNPLUG_TIMEOUT,
            on_unplug_timeout: OnUnplugTimeout::Abort,
            standbys: Vec::new(),
            cancel: CancelFlag::default(),
        }
    }
}
