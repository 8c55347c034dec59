//! A cable of the lab, cut: every packet that these ends of it send is lost, without a word to either end.
//!
//! The packets are sent to a station that is not there. No queue loses them: putting one in makes the kernel refuse packets
//! for a moment, from which rxe's queue pair for the connection manager never recovers, and one that is always there
//! lets packets overtake each other, which costs a queue pair its retries.

use std::process::Command;

/// Nobody's.
const NOWHERE: &str = "02:00:00:00:00:ff";

/// Ends of cables that lose what they send, until this is dropped.
pub struct Cut(Vec<Neighbour>);

struct Neighbour {
    device: &'static str,
    address: String,
    station: String,
}

impl Cut {
    /// Cuts these ends: `ve0` and `ve1` of the cable inside a host, `lan0` of the network between the hosts.
    ///
    /// # Panics
    /// When `ip` refuses, or when nothing went over an end yet: a test without a cut proves nothing.
    #[must_use]
    pub fn now(ends: &[&'static str]) -> Cut {
        let cut = Cut(ends.iter().map(|end| Neighbour::at(end)).collect());
        cut.0.iter().for_each(|neighbour| neighbour.lives_at(NOWHERE, "permanent"));
        cut
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.0.iter().for_each(|neighbour| neighbour.lives_at(&neighbour.station, "reachable"));
    }
}

impl Neighbour {
    /// Who is at the other end, as the kernel knows it.
    fn at(device: &'static str) -> Neighbour {
        let address = match device {
            "ve0" => "10.77.0.2".to_owned(),
            "ve1" => "10.77.0.1".to_owned(),
            _ => std::env::var("VMFERRY_LAB_PEER").unwrap_or_else(|_| panic!("this is no lab host")),
        };
        let shown = ip(&["neigh", "show", "to", &address, "dev", device]);
        let station = shown.split_whitespace().skip_while(|word| *word != "lladdr").nth(1).map(str::to_owned);
        let station = station.unwrap_or_else(|| panic!("{device} knows no station of {address}: {shown:?}"));
        Neighbour { device, address, station }
    }

    fn lives_at(&self, station: &str, state: &str) {
        ip(&["neigh", "replace", &self.address, "lladdr", station, "dev", self.device, "nud", state]);
    }
}

fn ip(words: &[&str]) -> String {
    let ran =
        Command::new("/sbin/ip").args(words).output().unwrap_or_else(|e| panic!("no ip in this lab: {e}"));
    assert!(ran.status.success(), "ip {words:?}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8_lossy(&ran.stdout).into_owned()
}
