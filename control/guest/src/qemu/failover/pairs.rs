//! Which of a guest's devices are standbys and primaries, by QEMU's own properties.

use serde_json::{Value, json};

use crate::GuestError;
use crate::failover::{DeviceOptions, Primary, Standby};
use crate::qemu::qmp::{Qmp, QmpFailure};

/// Where QEMU keeps devices that have an id.
const HOME: &str = "/machine/peripheral";
/// What of a plugged device is needed to plug it again. A device is its driver, its place and these.
const KEPT: [&str; 9] = [
    "host",
    "sysfsdev",
    "vf-token",
    "netdev",
    "mac",
    "failover_pair_id",
    "romfile",
    "bootindex",
    "multifunction",
];

/// A virtio NIC with `failover=on`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FoundStandby {
    /// Its id.
    pub(crate) id: String,
    /// Its MAC, as QEMU prints it.
    pub(crate) mac: String,
    /// The bus that it sits on.
    pub(crate) bus: String,
}

/// The failover pairs of a guest, as they are now.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pairs {
    standbys: Vec<FoundStandby>,
    primaries: Vec<DeviceOptions>,
}

impl Pairs {
    /// Looks at every device that has an id.
    pub(crate) fn find(qmp: &mut Qmp) -> Result<Pairs, GuestError> {
        let mut pairs = Pairs::default();
        for (id, driver) in devices(qmp)? {
            if driver.starts_with("virtio-net-pci") && text(qmp, &id, "failover")?.as_deref() == Some("true")
            {
                let mac = text(qmp, &id, "mac")?.unwrap_or_default();
                pairs.standbys.push(FoundStandby { mac, bus: bus(qmp, &id)?.unwrap_or_default(), id });
            } else if text(qmp, &id, "failover_pair_id")?.is_some_and(|pair| !pair.is_empty()) {
                pairs.primaries.push(capture(qmp, &id, &driver)?);
            }
        }
        Ok(pairs)
    }

    /// The standbys.
    pub(crate) fn standbys(&self) -> &[FoundStandby] {
        &self.standbys
    }

    /// The standbys that the guest will have when these primaries have left.
    pub(crate) fn standbys_with(&self, leaving: &[Primary]) -> Vec<FoundStandby> {
        let plugged = leaving.iter().filter_map(|primary| primary.standby.to_plug.as_ref());
        let text = |options: &DeviceOptions, key: &str| options.get(key).unwrap_or_default().to_owned();
        let new = plugged.map(|options| FoundStandby {
            id: text(options, "id"),
            mac: text(options, "mac"),
            bus: text(options, "bus"),
        });
        self.standbys.iter().cloned().chain(new).collect()
    }

    /// The primaries that are plugged.
    pub(crate) fn primaries(&self) -> &[DeviceOptions] {
        &self.primaries
    }

    /// The id of the primary that is plugged beside a standby.
    pub(crate) fn primary_of(&self, standby: &str) -> Option<&str> {
        let beside = |primary: &&DeviceOptions| primary.get("failover_pair_id") == Some(standby);
        self.primaries.iter().find(beside).map(DeviceOptions::id)
    }

    /// Every primary with its standby; one whose standby does not exist is refused by its name.
    pub(crate) fn plugged(&self) -> Result<Vec<Primary>, GuestError> {
        let pair = |options: &DeviceOptions| {
            let standby = options.get("failover_pair_id").unwrap_or_default();
            if !self.standbys.iter().any(|found| found.id == standby) {
                return Err(GuestError::mistake(format!(
                    "device `{}` names `{standby}` as its standby, and no virtio-net-pci with failover=on has that id: add \
                     `-device virtio-net-pci,id={standby},failover=on,mac=…,netdev=…`",
                    options.id()
                )));
            }
            let standby = Standby { id: standby.to_owned(), to_plug: None };
            Ok(Primary { options: options.clone(), standby })
        };
        self.primaries.iter().map(pair).collect()
    }
}

/// A device without a pair that is plugged now, to be unplugged for a standby of the operator's.
pub(crate) fn unpaired(qmp: &mut Qmp, id: &str) -> Result<DeviceOptions, GuestError> {
    let Some((_, driver)) = devices(qmp)?.into_iter().find(|(known, _)| known == id) else {
        return Err(GuestError::mistake(format!(
            "--failover-standby is for a device `{id}`, and this guest has no device of that id; the ids are those of \
             QEMU's -device options"
        )));
    };
    capture(qmp, id, &driver)
}

/// Whether a device of this id is plugged.
pub(crate) fn is_plugged(qmp: &mut Qmp, id: &str) -> Result<bool, GuestError> {
    Ok(devices(qmp)?.iter().any(|(known, _)| known == id))
}

/// Id and driver of every device that has an id.
fn devices(qmp: &mut Qmp) -> Result<Vec<(String, String)>, GuestError> {
    let children = qmp.execute("qom-list", json!({ "path": HOME }))?;
    let device = |child: &Value| {
        let driver = child["type"].as_str()?.strip_prefix("child<")?.strip_suffix('>')?;
        Some((child["name"].as_str()?.to_owned(), driver.to_owned()))
    };
    Ok(children.as_array().into_iter().flatten().filter_map(device).collect())
}

fn capture(qmp: &mut Qmp, id: &str, driver: &str) -> Result<DeviceOptions, GuestError> {
    let mut options = DeviceOptions::new(driver, id);
    if let Some(bus) = bus(qmp, id)? {
        options = options.with("bus", &bus);
    }
    // QEMU answers with slot and function in one number, and takes it as text.
    if let Some(place) = text(qmp, id, "addr")?.and_then(|place| place.parse::<u8>().ok()) {
        options = options.with("addr", &format!("{:02x}.{:x}", place >> 3, place & 7));
    }
    for key in KEPT {
        match text(qmp, id, key)? {
            Some(value) if is_meant(key, &value) => options = options.with(key, &value),
            Some(_) | None => {}
        }
    }
    Ok(options)
}

/// Values that only say that nothing was said.
fn is_meant(key: &str, value: &str) -> bool {
    match key {
        "bootindex" => value != "-1",
        "multifunction" => value == "true",
        "host" => value != "ffff:ff:ff.f",
        // A driver's own ROM file comes with the driver; a path was chosen.
        "romfile" => value.contains('/'),
        _ => !value.is_empty(),
    }
}

fn bus(qmp: &mut Qmp, id: &str) -> Result<Option<String>, GuestError> {
    let path = text(qmp, id, "parent_bus")?;
    Ok(path.and_then(|path| path.rsplit('/').next().map(str::to_owned)))
}

/// A property as text; one that this device lacks is none.
fn text(qmp: &mut Qmp, id: &str, property: &str) -> Result<Option<String>, GuestError> {
    match qmp.execute("qom-get", json!({ "path": format!("{HOME}/{id}"), "property": property })) {
        Ok(Value::String(word)) => Ok(Some(word)),
        Ok(Value::Null) => Ok(None),
        Ok(other) => Ok(Some(other.to_string())),
        Err(QmpFailure::Refused(_)) => Ok(None),
        Err(lost @ QmpFailure::Lost(_)) => Err(lost.into()),
    }
}
