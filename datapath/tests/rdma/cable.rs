//! The cable between the lab's two soft cards.

use std::process::Command;

/// Both ends: the device, and who is at the other one.
const ENDS: [(&str, &str, &str); 2] = [("ve0", "10.77.0.2", "ve1"), ("ve1", "10.77.0.1", "ve0")];
/// Nobody's.
const NOWHERE: &str = "02:00:00:00:00:ff";

/// Loses every packet in both directions, without a word to either end, until it is dropped: they are sent to a station
/// that is not there. A queue that lost them would upset rxe, by being put in and by being there.
pub(crate) struct Cut;

impl Cut {
    pub(crate) fn now() -> Cut {
        for (device, address, _) in ENDS {
            lives_at(device, address, NOWHERE, "permanent");
        }
        Cut
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        for (device, address, other) in ENDS {
            let station =
                std::fs::read_to_string(format!("/sys/class/net/{other}/address")).expect("a lab's cable");
            lives_at(device, address, station.trim(), "reachable");
        }
    }
}

fn lives_at(device: &str, address: &str, station: &str, state: &str) {
    let words = ["neigh", "replace", address, "lladdr", station, "dev", device, "nud", state];
    let done = Command::new("/sbin/ip").args(words).status().expect("no ip in this lab");
    assert!(done.success(), "ip refused: {words:?}");
}
