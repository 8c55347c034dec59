//! `vmferry inspect`: a guest as it is, for a person. Nothing is touched.

use vmferry_guest::DmaTracking;
use vmferry_guest::inspect::{HostDevice, InspectedDevice, Inspection};

use crate::report::human;

/// A few lines for a person.
#[must_use]
pub fn to_table(seen: &Inspection) -> String {
    let status = seen.status.as_ref().map_or_else(String::new, |status| format!(", {status}"));
    let mut lines = vec![format!("guest       {}{status}", seen.name)];
    lines.extend(seen.memory.iter().map(|file| {
        let block = file.block.as_ref().map_or_else(String::new, |block| format!("block `{block}`: "));
        let pages = human(file.page_bytes);
        format!("memory      {block}{} in {}, pages of {pages}, shared", human(file.bytes), file.path)
    }));
    if seen.private_bytes > 0 {
        let bytes = human(seen.private_bytes);
        lines.push(format!("memory      {bytes} private: no other process can map it"));
    }
    lines.extend(seen.trackers.iter().map(|tracker| match &tracker.unavailable {
        None => format!("tracker     {}", tracker.name),
        Some(why) => format!("tracker     {}: not here, {why}", tracker.name),
    }));
    lines.extend(seen.writers.iter().map(|writer| {
        format!("writer      {}, {}: tracked {}", writer.name, human(writer.bytes), writer.tracked)
    }));
    lines.extend(seen.devices.iter().map(device));
    lines.extend(seen.host_devices.iter().map(host_device));
    lines.extend(seen.direct_io_nodes.iter().map(|node| {
        format!("disk        {node}: O_DIRECT, what it read lately is compared again in the blackout")
    }));
    lines.extend(seen.notes.iter().map(|note| format!("note        {note}")));
    lines.extend(seen.blockers.iter().map(|blocker| format!("blocker     {blocker}")));
    if seen.blockers.is_empty() {
        lines.push("blocker     none was found".to_owned());
    }
    lines.join("\n")
}

fn device(device: &InspectedDevice) -> String {
    let facts = &device.facts;
    let verdict = if device.migratable { "can move" } else { "cannot move" };
    let writes = match facts.dma {
        DmaTracking::DeviceLog => "its own log tells what it writes".to_owned(),
        DmaTracking::IommuLog => "the IOMMU's log tells what it writes".to_owned(),
        DmaTracking::None if facts.pinned.0 == 0 => "it writes no guest memory".to_owned(),
        DmaTracking::None => {
            format!("nobody tells what it writes: {} travel in the blackout", human(facts.pinned.0))
        }
    };
    format!("device      {} ({}): {verdict}, {}; {writes}", facts.name, facts.what, device.how)
}

fn host_device(device: &HostDevice) -> String {
    let devices =
        if device.devices.is_empty() { String::new() } else { format!(": {}", device.devices.join(", ")) };
    format!("holds       {} {}{devices}", device.kind, device.link)
}
