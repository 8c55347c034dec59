//! Devices that are passed through to a guest, and their state on its way.
//!
//! ```text
//!   source: pre-copy while the guest runs │ pause │ the rest             target
//!     DeviceStream ── Bytes, Idle, Bytes ─┼───────┼─ Bytes … End ─► sink.write … sink.flush (loaded, or refused)
//! ```
//!
//! Every device with a state of its own has one stream; all of them flow beside the memory, and load in parallel.
//! What must never happen: a device that nobody can move, or whose writes nobody can tell, passed over in silence.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use vmferry_datapath::ByteLen;

use crate::GuestError;

/// What is passed through to a guest: shown by `vmferry inspect`, compared in negotiation, counted in the prediction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceFacts {
    /// The operator's name for it, the same on both hosts: `eth1`, `mtty0`. Unique within a guest.
    pub name: String,
    /// What must be the same on both hosts for its state to load: driver and model, no address.
    pub model: String,
    /// Driver, model and address, for people; not compared.
    pub what: String,
    /// Whether and how its state moves.
    pub migration: DeviceMigration,
    /// How it is known which pages it writes.
    pub dma: DmaTracking,
    /// What it has mapped for DMA and nobody can tell: these bytes travel after the pause, whatever they hold. The
    /// pages themselves are in the adapter's `pinned()`.
    pub pinned: ByteLen,
}

/// Whether and how a device's state moves.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceMigration {
    /// All of its state leaves after the pause. It has a stream.
    StopCopy {
        /// It can be kept from DMA to its peers before it stops.
        p2p: bool,
    },
    /// State leaves while the guest runs, and the rest after the pause. It has a stream.
    PreCopy {
        /// It can be kept from DMA to its peers before it stops.
        p2p: bool,
    },
    /// The VMM carries it inside its own state, stream 0. It has no stream of its own.
    InVmmState,
    /// It cannot move; the reason is a sentence that says what to do.
    NotMigratable(String),
}

/// How it is known which guest pages a device writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DmaTracking {
    /// The device keeps a log (VFIO's DMA logging).
    DeviceLog,
    /// The IOMMU's driver keeps one (type1 dirty tracking, iommufd).
    IommuLog,
    /// Nobody knows: what it has mapped is pinned.
    None,
}

/// What a stop right now would still have to move of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StateEstimate {
    /// What is expected: VFIO's `MIG_DATA_SIZE`, or `initial_bytes + dirty_bytes` where that is more.
    pub expected: ByteLen,
    /// What it can be at most, as far as the device can tell; never below `expected`.
    pub at_most: ByteLen,
}

/// What one read of a device's state gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StateRead {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Pre-copy has nothing right now (VFIO's ENOMSG); never after the pause.
    Idle,
    /// The state is complete; only after the pause.
    End,
}

/// One device's state as it leaves the source.
///
/// It is read by a thread of its own. A read returns within a second, so that whoever waits for the thread to stop is
/// not kept; one that has no byte by then says [`StateRead::Idle`]. After the pause it gives the rest and then
/// [`StateRead::End`]. A source that is resumed instead has no use for its streams: they are dropped first.
pub trait DeviceStream: Send {
    /// The device's [`DeviceFacts::name`].
    fn name(&self) -> &str;
    /// What a stop right now would still have to move.
    fn remaining(&mut self) -> Result<StateEstimate, GuestError>;
    /// The next bytes.
    fn read(&mut self, into: &mut [u8]) -> Result<StateRead, GuestError>;
}

impl DeviceFacts {
    /// Whether its state has a stream of its own.
    #[must_use]
    pub fn has_stream(&self) -> bool {
        match self.migration {
            DeviceMigration::StopCopy { .. } | DeviceMigration::PreCopy { .. } => true,
            DeviceMigration::InVmmState | DeviceMigration::NotMigratable(_) => false,
        }
    }

    /// Refuses the first device that cannot move, by its name.
    pub fn refuse_unmovable(devices: &[DeviceFacts]) -> Result<(), GuestError> {
        let why = |device: &DeviceFacts| match &device.migration {
            DeviceMigration::NotMigratable(why) => {
                Some(format!("device `{}` ({}) cannot be moved: {why}", device.name, device.what))
            }
            DeviceMigration::StopCopy { .. }
            | DeviceMigration::PreCopy { .. }
            | DeviceMigration::InVmmState => None,
        };
        devices.iter().find_map(why).map_or(Ok(()), |sentence| Err(GuestError::UserMistake(sentence)))
    }

    /// The facts that negotiation compares, for [`crate::Description::facts`]: the names of all devices that have a
    /// stream, and each one's model. A guest without any states the empty list, so that a device on one side only is
    /// seen.
    #[must_use]
    pub fn compared(devices: &[DeviceFacts]) -> BTreeMap<String, String> {
        let mut moved: Vec<&DeviceFacts> = devices.iter().filter(|device| device.has_stream()).collect();
        moved.sort_by(|one, other| one.name.cmp(&other.name));
        let names: Vec<&str> = moved.iter().map(|device| device.name.as_str()).collect();
        let models = moved.iter().map(|device| (format!("device {}", device.name), device.model.clone()));
        models.chain([("devices".to_owned(), names.join(" "))]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, migration: DeviceMigration) -> DeviceFacts {
        DeviceFacts {
            name: name.into(),
            model: "mtty-2".into(),
            what: "mtty-2 at 0".into(),
            migration,
            dma: DmaTracking::None,
            pinned: ByteLen(0),
        }
    }

    #[test]
    fn negotiation_compares_names_in_one_order_and_models() {
        let two = ["b", "a"].map(|name| device(name, DeviceMigration::PreCopy { p2p: true }));
        let facts = DeviceFacts::compared(&[
            two[0].clone(),
            two[1].clone(),
            device("c", DeviceMigration::InVmmState),
        ]);
        assert_eq!(facts["devices"], "a b");
        assert_eq!((facts["device a"].as_str(), facts.len()), ("mtty-2", 3));
        assert_eq!(DeviceFacts::compared(&[])["devices"], "");
    }

    #[test]
    fn a_device_that_cannot_move_is_refused_by_name_and_reason() {
        let vf = device("eth1", DeviceMigration::NotMigratable("unplug it first".into()));
        let sentence = DeviceFacts::refuse_unmovable(&[vf]).unwrap_err().to_string();
        assert!(sentence.contains("`eth1`") && sentence.contains("unplug it first"), "{sentence}");
    }
}
