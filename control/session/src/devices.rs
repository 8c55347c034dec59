//! Devices passed through to the guest, as far as a decision needs them: what must be equal on both hosts, what each
//! would add to the blackout, and what it did add.
//!
//! Their state travels in streams 1, 2, … of the lanes, in the order of their names; stream 0 is the VMM's own. That
//! needs protocol version 2: a source with such devices offers nothing older. What must never happen: a device on one
//! side only, or of another model, found out when its state is loaded.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use vmferry_datapath::ByteLen;
use vmferry_datapath::limits::DEVICE_STREAMS_MAX;

use crate::message::GuestFacts;

/// The fact that names all devices with a stream, in order, with blanks between them; absent on a peer of version 1.
const NAMES_FACT: &str = "devices";

/// A device whose state travels in a stream of its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceIdentity {
    /// Its name, the same on both hosts; no white space.
    pub name: String,
    /// What must be the same for its state to load.
    pub model: String,
}

/// The facts that state a guest's devices; the empty list is a fact too.
pub fn device_facts(devices: &[DeviceIdentity]) -> BTreeMap<String, String> {
    let mut sorted: Vec<&DeviceIdentity> = devices.iter().collect();
    sorted.sort();
    let names: Vec<&str> = sorted.iter().map(|device| device.name.as_str()).collect();
    let models = sorted.iter().map(|device| (model_fact(&device.name), device.model.clone()));
    models.chain([(NAMES_FACT.to_owned(), names.join(" "))]).collect()
}

/// The devices with a stream that a guest's facts name: stream 1 is the first one's.
pub fn device_names(guest: &GuestFacts) -> Vec<&str> {
    guest.facts.get(NAMES_FACT).map_or_else(Vec::new, |names| names.split_whitespace().collect())
}

fn model_fact(name: &str) -> String {
    format!("device {name}")
}

/// Why the two guests' devices do not fit each other, in a sentence with the fix.
pub(crate) fn misfit(source: &GuestFacts, target: &GuestFacts) -> Option<String> {
    let (ours, theirs) = (device_names(source), device_names(target));
    let model =
        |guest: &GuestFacts, name: &str| guest.facts.get(&model_fact(name)).cloned().unwrap_or_default();
    if ours.len() > DEVICE_STREAMS_MAX {
        return Some(format!(
            "the source guest has {} passed-through devices and {DEVICE_STREAMS_MAX} can move at once; unplug some",
            ours.len()
        ));
    }
    if let Some(name) = ours.iter().find(|name| !theirs.contains(name)) {
        return Some(format!(
            "device `{name}` (`{}`) is passed through to the source guest and not to the target guest; give the target \
             guest one of the same name and model",
            model(source, name)
        ));
    }
    if let Some(name) = theirs.iter().find(|name| !ours.contains(name)) {
        return Some(format!(
            "device `{name}` (`{}`) is passed through to the target guest and not to the source guest; start the target \
             guest without it",
            model(target, name)
        ));
    }
    let differs = |name: &&&str| model(source, name) != model(target, name);
    ours.iter().find(differs).map(|name| {
        let (ours, theirs) = (model(source, name), model(target, name));
        format!(
            "device `{name}` is a `{ours}` at the source and a `{theirs}` at the target; give the target guest a `{ours}`"
        )
    })
}

/// What one device would add to the blackout, as the driver sees it after a round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceReport {
    /// Its name.
    pub name: String,
    /// Whether rounds can make its state smaller: it pre-copies.
    pub pre_copies: bool,
    /// State that a stop now would have to move: expected.
    pub expected: ByteLen,
    /// The same, at most.
    pub at_most: ByteLen,
    /// What it has mapped for DMA and nobody can tell: travels in the blackout. Counted among the pinned pages too.
    pub pinned: ByteLen,
    /// Whether its state has a stream, which is moved and loaded beside the VMM's own.
    pub has_stream: bool,
}

/// What one device's state took in the blackout, as the driver measured it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceDrain {
    /// Its name.
    pub name: String,
    /// Bytes that left before the pause.
    pub pre_copied: ByteLen,
    /// Bytes that left after it.
    pub in_blackout: ByteLen,
}

/// How long the devices' states took to load, as the target measured it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "DeviceTimesWire", into = "DeviceTimesWire")]
pub struct DeviceTimes {
    after_us: u64,
    load_us: [u32; DEVICE_STREAMS_MAX],
    count: usize,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceTimesWire {
    after_us: u64,
    load_us: Vec<u32>,
}

impl DeviceTimes {
    /// `after_us`: from the moment when the VMM had its own state until the last device had its; `load_us`: each
    /// device's, from the last byte of its state until it had loaded it, in the order of the streams.
    pub fn new(after_us: u64, load_us: &[u32]) -> Self {
        let mut times = Self { after_us, count: load_us.len().min(DEVICE_STREAMS_MAX), ..Self::default() };
        times.load_us.iter_mut().zip(load_us).for_each(|(place, us)| *place = *us);
        times
    }

    /// From the moment when the VMM had its own state until the last device had its, microseconds.
    pub const fn after_us(&self) -> u64 {
        self.after_us
    }

    /// Each device's load, microseconds.
    pub fn load_us(&self) -> &[u32] {
        self.load_us.get(..self.count).unwrap_or_default()
    }

    /// Whether there are no devices: then it is not on the wire, as in version 1.
    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

impl TryFrom<DeviceTimesWire> for DeviceTimes {
    type Error = String;

    fn try_from(wire: DeviceTimesWire) -> Result<Self, String> {
        if wire.load_us.len() > DEVICE_STREAMS_MAX {
            return Err(format!("times of {} devices, {DEVICE_STREAMS_MAX} can be", wire.load_us.len()));
        }
        Ok(Self::new(wire.after_us, &wire.load_us))
    }
}

impl From<DeviceTimes> for DeviceTimesWire {
    fn from(times: DeviceTimes) -> Self {
        Self { after_us: times.after_us, load_us: times.load_us().to_vec() }
    }
}

#[cfg(test)]
mod tests {
    use vmferry_datapath::{RamBlock, RamLayout};

    use super::*;

    fn guest(devices: &[(&str, &str)]) -> GuestFacts {
        let block = RamBlock { name: "m0".into(), len: ByteLen(1 << 20), page_bytes: 4096 };
        let identity =
            |(name, model): &(&str, &str)| DeviceIdentity { name: (*name).into(), model: (*model).into() };
        let devices: Vec<_> = devices.iter().map(identity).collect();
        let layout = RamLayout::new(vec![block]).unwrap();
        GuestFacts { kind: "kvm".into(), name: "a".into(), facts: device_facts(&devices), layout }
    }

    #[test]
    fn devices_are_numbered_by_name_whatever_order_the_adapter_has() {
        assert_eq!(device_names(&guest(&[("b", "x"), ("a", "y")])), ["a", "b"]);
        assert_eq!(device_names(&guest(&[])), [""; 0]);
    }

    #[test]
    fn devices_that_differ_are_refused_by_name_and_model() {
        let source = guest(&[("eth1", "mtty-2"), ("gpu0", "nv")]);
        assert_eq!(misfit(&source, &source), None);
        for (target, sentence) in [
            (
                guest(&[("eth1", "mtty-2")]),
                "device `gpu0` (`nv`) is passed through to the source guest and not",
            ),
            (guest(&[]), "device `eth1` (`mtty-2`) is passed through to the source guest and not"),
            (
                guest(&[("eth1", "mtty-2"), ("gpu0", "nv"), ("x", "y")]),
                "device `x` (`y`) is passed through to the target guest and not",
            ),
            (
                guest(&[("eth1", "mtty-1"), ("gpu0", "nv")]),
                "device `eth1` is a `mtty-2` at the source and a `mtty-1` at the target",
            ),
        ] {
            let why = misfit(&source, &target).unwrap();
            assert!(why.starts_with(sentence), "{why}");
        }
    }

    #[test]
    fn a_peer_of_version_1_has_no_devices() {
        let mut old = guest(&[]);
        old.facts.clear();
        assert_eq!(misfit(&old, &guest(&[])), None);
        assert_eq!(misfit(&guest(&[]), &old), None);
        assert!(misfit(&old, &guest(&[("eth1", "x")])).is_some_and(|why| why.contains("`eth1`")));
    }

    #[test]
    fn more_devices_than_streams_are_refused() {
        let names: Vec<String> = (0..=DEVICE_STREAMS_MAX).map(|n| format!("d{n}")).collect();
        let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "x")).collect();
        assert!(misfit(&guest(&many), &guest(&many)).is_some_and(|why| why.contains("unplug some")));
    }

    #[test]
    fn a_peers_times_are_capped() {
        let few: DeviceTimes = serde_json::from_str(r#"{"after_us":7,"load_us":[1,2]}"#).unwrap();
        assert_eq!((few.after_us(), few.load_us()), (7, &[1, 2][..]));
        let many = format!(r#"{{"after_us":7,"load_us":{:?}}}"#, [1; DEVICE_STREAMS_MAX + 1]);
        assert!(serde_json::from_str::<DeviceTimes>(&many).is_err());
    }
}
