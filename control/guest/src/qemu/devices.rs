//! What is passed through to a QEMU guest.
//!
//! QEMU moves such a device itself, inside its own stream, or says in its list of blockers that it cannot. What it
//! does not tell us is which pages the device writes, so every page that it could write counts as pinned.

use serde_json::{Value, json};
use vmferry_datapath::{ByteLen, RamLayout};

use super::qmp::{Qmp, QmpFailure};
use crate::GuestError;
use crate::device::{DeviceFacts, DeviceMigration, DmaTracking};

/// Where QEMU keeps the devices that were given to it, with and without an id.
const HOMES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// The devices of the host that the guest has, without those that are `away` during the move. Each can reach all of
/// the guest's memory.
pub(crate) fn passed_through(
    qmp: &mut Qmp,
    layout: &RamLayout,
    away: &[String],
) -> Result<Vec<DeviceFacts>, GuestError> {
    passed_through_reaching(qmp, layout.total_bytes(), away)
}

/// The same, for a guest with so much memory.
pub(super) fn passed_through_reaching(
    qmp: &mut Qmp,
    reach: ByteLen,
    away: &[String],
) -> Result<Vec<DeviceFacts>, GuestError> {
    let mut found = Vec::new();
    for home in HOMES {
        let children = qmp.execute("qom-list", json!({ "path": home }))?;
        for child in children.as_array().into_iter().flatten() {
            let kind = child["type"].as_str().unwrap_or_default();
            let Some(driver) = kind.strip_prefix("child<vfio-").and_then(|rest| rest.strip_suffix('>'))
            else {
                continue;
            };
            let name = child["name"].as_str().unwrap_or_default();
            if away.iter().any(|id| id == name) {
                continue;
            }
            found.push(facts(qmp, &format!("{home}/{name}"), name, &format!("vfio-{driver}"), reach)?);
        }
    }
    Ok(found)
}

fn facts(
    qmp: &mut Qmp,
    path: &str,
    name: &str,
    driver: &str,
    reach: ByteLen,
) -> Result<DeviceFacts, GuestError> {
    let place = ["sysfsdev", "host"].into_iter().find_map(|property| text(qmp, path, property).transpose());
    let place = place.transpose()?.unwrap_or_else(|| "an unknown place".to_owned());
    let switched_off = text(qmp, path, "enable-migration")?.is_some_and(|word| word == "off");
    let migration = if switched_off {
        DeviceMigration::NotMigratable(
            "its migration is switched off (enable-migration=off); unplug it first (device_del)".to_owned(),
        )
    } else {
        DeviceMigration::InVmmState
    };

    Ok(DeviceFacts {
        name: name.to_owned(),
        model: driver.to_owned(),
        what: format!("{driver} at {place}"),
        migration,
        dma: DmaTracking::None,
        pinned: reach,
    })
}

/// A property in QEMU's words; one that this QEMU lacks, or that is empty, is none.
fn text(qmp: &mut Qmp, path: &str, property: &str) -> Result<Option<String>, GuestError> {
    match qmp.execute("qom-get", json!({ "path": path, "property": property })) {
        Ok(Value::String(word)) if !word.is_empty() => Ok(Some(word)),
        Ok(_) | Err(QmpFailure::Refused(_)) => Ok(None),
        Err(lost @ QmpFailure::Lost(_)) => Err(lost.into()),
    }
}
