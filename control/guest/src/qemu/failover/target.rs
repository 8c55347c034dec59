//! The target's half: when the guest runs here, this host's own primary is plugged beside its standby.
//!
//! By then the move is over and nothing may fail it: a primary that cannot be plugged leaves a guest that runs over its
//! standby, and a sentence that says so.

use std::time::Duration;

use serde_json::Value;

use super::hands::{frames_sent, plug};
use super::pairs::{Pairs, is_plugged};
use crate::GuestError;
use crate::clock::Deadline;
use crate::failover::DeviceOptions;
use crate::qemu::qmp::Qmp;

/// A guest takes a new device within this time, or has no driver for it.
const TAKE_PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The primaries of this host.
#[derive(Debug)]
pub(crate) struct TargetFailover {
    primaries: Vec<DeviceOptions>,
}

impl TargetFailover {
    /// Refuses a primary that no standby of this VMM waits for.
    pub(crate) fn new(primaries: &[DeviceOptions], pairs: &Pairs) -> Result<TargetFailover, GuestError> {
        let standbys: Vec<&str> = pairs.standbys().iter().map(|standby| standby.id.as_str()).collect();
        let paired = primaries.iter().map(|primary| paired(primary, &standbys)).collect::<Result<_, _>>()?;
        Ok(TargetFailover { primaries: paired })
    }

    /// Plugs what is to be plugged; what an operator should know.
    pub(crate) fn finish(&self, qmp: &mut Qmp, guest_runs: bool) -> Vec<String> {
        let mut due = self.primaries.clone();
        // Primaries of this VMM's own command line: QEMU plugged them when it loaded the standby's state.
        let own = Pairs::find(qmp).map(|pairs| pairs.primaries().to_vec()).unwrap_or_default();
        due.extend(own.into_iter().filter(|own| self.primaries.iter().all(|given| given.id() != own.id())));
        let mut notes: Vec<String> =
            due.iter().map(|primary| plug_primary(qmp, primary, guest_runs)).collect();
        notes.extend(lonely(qmp).unwrap_or_else(|error| vec![error.to_string()]));
        notes
    }
}

fn paired(primary: &DeviceOptions, standbys: &[&str]) -> Result<DeviceOptions, GuestError> {
    match (primary.get("failover_pair_id"), standbys) {
        (Some(pair), _) if standbys.contains(&pair) => Ok(primary.clone()),
        (None, [only]) => Ok(primary.clone().with("failover_pair_id", only)),
        (Some(pair), _) => Err(GuestError::mistake(format!(
            "--failover-primary {primary}: no virtio-net-pci with failover=on has the id `{pair}` here; those are: {}",
            standbys.join(", ")
        ))),
        (None, _) => Err(GuestError::mistake(format!(
            "--failover-primary {primary}: add failover_pair_id=ID of its standby; the virtio-net-pci with failover=on \
             here are: {}",
            if standbys.is_empty() { "none".to_owned() } else { standbys.join(", ") }
        ))),
    }
}

/// Plugs one primary and waits until the guest has taken it.
fn plug_primary(qmp: &mut Qmp, primary: &DeviceOptions, guest_runs: bool) -> String {
    let (id, standby) = (primary.id(), primary.get("failover_pair_id").unwrap_or_default());
    let plugged = match is_plugged(qmp, id) {
        Ok(true) => Ok(()),
        Ok(false) => plug(qmp, primary),
        Err(error) => Err(error),
    };
    if let Err(error) = plugged {
        let note = format!(
            "WARNING: the guest runs over its standby `{standby}` only: `{id}` could not be plugged ({error}); mend it and \
             plug it by hand: device_add {primary}"
        );
        tracing::warn!("{note}");
        return note;
    }
    if !guest_runs {
        return format!(
            "failover: `{id}` ({}) is plugged; the guest is paused and takes it when it runs",
            primary.driver()
        );
    }
    match taken(qmp, id) {
        Ok(true) => {
            let carried = frames_sent(qmp, standby).ok().flatten();
            let carried =
                carried.map_or_else(String::new, |n| format!("; it had sent {n} frames over `{standby}`"));
            format!("failover: the guest took `{id}` ({}) back into use{carried}", primary.driver())
        }
        Ok(false) => {
            let note = format!(
                "WARNING: `{id}` ({}) is plugged, and the guest has not taken it after {} s: it runs over `{standby}`; look \
                 whether it has the driver",
                primary.driver(),
                TAKE_PATIENCE.as_secs()
            );
            tracing::warn!("{note}");
            note
        }
        Err(error) => {
            format!("failover: `{id}` is plugged, and QEMU does not say whether the guest took it: {error}")
        }
    }
}

/// Whether the guest's driver has switched the device on, within a while.
fn taken(qmp: &mut Qmp, id: &str) -> Result<bool, GuestError> {
    let within = Deadline::after(TAKE_PATIENCE);
    loop {
        let buses = qmp.execute("query-pci", Value::Null)?;
        if buses.as_array().into_iter().flatten().any(|bus| is_on(&bus["devices"], id)) {
            return Ok(true);
        }
        if within.left().is_none() {
            return Ok(false);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// A device whose regions have addresses was given them by the guest.
fn is_on(devices: &Value, id: &str) -> bool {
    let mapped = |region: &Value| region["address"].as_i64().is_some_and(|address| address > 0);
    devices.as_array().into_iter().flatten().any(|device| {
        let here = device["qdev_id"] == id && device["regions"].as_array().into_iter().flatten().any(mapped);
        here || is_on(&device["pci_bridge"]["devices"], id)
    })
}

/// Standbys that stay alone.
fn lonely(qmp: &mut Qmp) -> Result<Vec<String>, GuestError> {
    let pairs = Pairs::find(qmp)?;
    let alone = pairs.standbys().iter().filter(|standby| pairs.primary_of(&standby.id).is_none());
    let note = |id: &str| {
        format!(
            "the guest's standby `{id}` has no primary on this host: give --failover-primary to receive, or plug one now \
             (device_add …,failover_pair_id={id})"
        )
    };
    Ok(alone.map(|standby| note(&standby.id)).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn primary(text: &str) -> DeviceOptions {
        text.parse().unwrap()
    }

    #[test]
    fn a_primary_finds_its_only_standby() {
        let given = paired(&primary("vfio-pci,id=vf0,host=0000:01:10.0"), &["net0"]).unwrap();
        assert_eq!(given.get("failover_pair_id"), Some("net0"));
    }

    #[test]
    fn a_primary_without_its_standby_is_refused_with_the_choice() {
        for (text, standbys) in [
            ("vfio-pci,id=vf0", &["a", "b"][..]),
            ("vfio-pci,id=vf0", &[]),
            ("vfio-pci,id=vf0,failover_pair_id=c", &["a", "b"]),
        ] {
            let sentence = paired(&primary(text), standbys).unwrap_err().to_string();
            assert!(
                sentence.contains("failover=on") && sentence.contains(&standbys.join(", ")),
                "{sentence}"
            );
        }
    }

    #[test]
    fn a_device_is_on_when_a_region_has_an_address() {
        let device = |address: i64| {
            json!([{ "qdev_id": "", "pci_bridge": { "devices": [
                { "qdev_id": "vf0", "regions": [{ "address": address }] }
            ] } }])
        };
        assert!(is_on(&device(0xfe00_0000), "vf0"));
        assert!(!is_on(&device(-1), "vf0") && !is_on(&device(0xfe00_0000), "vf1"));
    }
}
