//! What negotiation compares: the machine, its processors and its devices, as QEMU itself names them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::blocks::FoundRam;
use super::failover::FoundStandby;
use super::qmp::Qmp;
use crate::{Description, GuestError};

/// Describes the guest behind `qmp`.
///
/// `standbys` are the virtio NICs of failover pairs, those included that are plugged for the move; `away` are devices
/// that are not there during it. Neither is compared by its place on the PCI buses.
pub(crate) fn describe(
    qmp: &mut Qmp,
    socket: &Path,
    found: &FoundRam,
    standbys: &[FoundStandby],
    away: &[String],
) -> Result<Description, GuestError> {
    let machine = text(&qmp.execute("qom-get", json!({ "path": "/machine", "property": "type" }))?);
    let cpus = qmp.execute("query-cpus-fast", Value::Null)?;
    let cpus = cpus.as_array().cloned().unwrap_or_default();
    let first = cpus.first().map(|cpu| text(&cpu["qom-path"])).unwrap_or_default();
    let mut facts = BTreeMap::from([
        ("machine".to_owned(), machine.trim_end_matches("-machine").to_owned()),
        ("cpus".to_owned(), cpus.len().to_string()),
        ("architecture".to_owned(), text(&qmp.execute("query-target", Value::Null)?["arch"])),
        ("accelerator".to_owned(), accelerator(qmp)?),
    ]);
    // A property that this QEMU does not have is a fact that is not compared, never an error.
    if let Ok(kind) = qmp.execute("qom-get", json!({ "path": first, "property": "type" })) {
        facts.insert("cpu model".to_owned(), text(&kind));
    }
    if let Ok(words) = qmp.execute("qom-get", json!({ "path": first, "property": "feature-words" })) {
        facts.insert("cpu features".to_owned(), feature_words(&words));
    }
    if let Ok(buses) = qmp.execute("query-pci", Value::Null) {
        let paired = standbys.iter().map(|standby| &standby.id).chain(away);
        facts.insert(
            "pci devices".to_owned(),
            devices(&buses, &paired.map(String::as_str).collect::<Vec<_>>()),
        );
    }
    facts.insert("failover standbys".to_owned(), standby_words(standbys));
    let mut notes = vec![version(&qmp.execute("query-version", Value::Null)?)];
    if !found.in_stream.is_empty() {
        notes.push(format!("in the device state: {}", found.in_stream.join(", ")));
    }
    let given = qmp.execute("query-name", Value::Null)?;
    let name = given["name"].as_str().map_or_else(|| socket.display().to_string(), str::to_owned);
    Ok(Description { kind: "qemu".to_owned(), name, facts, layout: found.layout.clone(), notes })
}

/// Block nodes whose reads go into guest memory behind the page tables' back.
pub(crate) fn direct_io_nodes(qmp: &mut Qmp) -> Result<Vec<String>, GuestError> {
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true }))?;
    let direct = nodes.as_array().into_iter().flatten().filter(|node| node["cache"]["direct"] == true);
    Ok(direct.map(|node| text(&node["node-name"])).collect())
}

/// The threads that run the guest's processors.
pub(crate) fn processor_threads(qmp: &mut Qmp) -> Result<Vec<i32>, GuestError> {
    let cpus = qmp.execute("query-cpus-fast", Value::Null)?;
    let threads = cpus.as_array().into_iter().flatten().filter_map(|cpu| cpu["thread-id"].as_i64());
    Ok(threads.filter_map(|thread| i32::try_from(thread).ok()).collect())
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn accelerator(qmp: &mut Qmp) -> Result<String, GuestError> {
    let kvm = qmp.execute("query-kvm", Value::Null)?;
    Ok(if kvm["enabled"] == true { "kvm" } else { "tcg" }.to_owned())
}

fn version(answer: &Value) -> String {
    let number = |part: &str| answer["qemu"][part].as_u64().unwrap_or(0);
    format!("QEMU {}.{}.{}", number("major"), number("minor"), number("micro"))
}

/// The processor's feature registers as hexadecimal words, in QEMU's order.
fn feature_words(words: &Value) -> String {
    let word = |word: &Value| {
        let leaf = word["cpuid-input-eax"].as_u64().unwrap_or(0);
        let part = word["cpuid-input-ecx"].as_u64().unwrap_or(0);
        let register = word["cpuid-register"].as_str().unwrap_or_default();
        let bits = word["features"].as_u64().unwrap_or(0);
        format!("{leaf:x}.{part:x}.{}={bits:x}", register.to_lowercase())
    };
    words.as_array().into_iter().flatten().map(word).collect::<Vec<_>>().join(" ")
}

/// Slot, vendor and device of everything on the buses. Bus numbers and addresses are the guest's own business, a
/// target that never ran has none.
fn devices(buses: &Value, paired: &[&str]) -> String {
    let mut found = Vec::new();
    for bus in buses.as_array().into_iter().flatten() {
        add_devices(&bus["devices"], "", paired, &mut found);
    }
    found.join(" ")
}

fn add_devices(devices: &Value, above: &str, paired: &[&str], found: &mut Vec<String>) {
    let compared = |device: &&Value| device["qdev_id"].as_str().is_none_or(|id| !paired.contains(&id));
    for device in devices.as_array().into_iter().flatten().filter(compared) {
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let place = format!("{above}{:02x}.{:x}", number(&device["slot"]), number(&device["function"]));
        found.push(format!(
            "{place}={:04x}:{:04x}",
            number(&device["id"]["vendor"]),
            number(&device["id"]["device"])
        ));
        add_devices(&device["pci_bridge"]["devices"], &format!("{place}/"), paired, found);
    }
}

/// Standbys by id, MAC and bus.
fn standby_words(standbys: &[FoundStandby]) -> String {
    let word =
        |standby: &FoundStandby| format!("{}={}@{}", standby.id, standby.mac.to_lowercase(), standby.bus);
    let mut words: Vec<String> = standbys.iter().map(word).collect();
    words.sort();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_by_place_and_kind_also_behind_bridges() {
        let gone = json!({ "qdev_id": "pri0", "slot": 1, "function": 0, "id": { "vendor": 1, "device": 2 } });
        let behind =
            json!({ "qdev_id": "", "slot": 0, "function": 0, "id": { "vendor": 0x1af4, "device": 0x1042 } });
        let bridge = json!({ "slot": 28, "function": 1, "id": { "vendor": 0x1b36, "device": 12 },
            "pci_bridge": { "bus": { "number": 9 }, "devices": [behind, gone] } });
        let buses = json!([{ "bus": 0, "devices": [bridge] }]);
        assert_eq!(devices(&buses, &[]), "1c.1=1b36:000c 1c.1/00.0=1af4:1042 1c.1/01.0=0001:0002");
        assert_eq!(devices(&buses, &["pri0"]), "1c.1=1b36:000c 1c.1/00.0=1af4:1042");
    }

    #[test]
    fn feature_words_are_compact() {
        let words = json!([{ "cpuid-input-eax": 1, "cpuid-register": "EDX", "features": 255 }]);
        assert_eq!(feature_words(&words), "1.0.edx=ff");
    }
}
