//! A QEMU as it is, asked and not touched.

use std::path::Path;

use serde_json::Value;

use super::blocks::{self, FoundRam};
use super::devices::passed_through_reaching;
use super::qmp::Qmp;
use super::{facts, migration};
use crate::GuestError;
use crate::inspect::{InspectedDevice, Inspection, by_process};

/// Everything that QMP and `/proc` say.
pub(crate) fn inspect(socket: &Path) -> Result<Inspection, GuestError> {
    let mut qmp = Qmp::connect(socket)?;
    let ram = blocks::find(&mut qmp, false);
    let vmm = ram.as_ref().map_or_else(|_| qmp.peer(), |found| found.vmm);
    let mut seen = by_process(vmm)?;
    // Why the RAM cannot be used is said better by those who would use it.
    seen.blockers.clear();
    let reach = match ram {
        Ok(found) => name_blocks(&mut seen, &found),
        Err(why) => {
            seen.blockers.push(why.to_string());
            vmferry_datapath::ByteLen(0)
        }
    };
    let status = qmp.execute("query-status", Value::Null)?;
    seen.status = status["status"].as_str().map(str::to_owned);
    let name = qmp.execute("query-name", Value::Null)?;
    if let Some(name) = name["name"].as_str() {
        seen.name = format!("{name}, {}", seen.name);
    }
    seen.blockers.extend(migration::blockers(&mut qmp)?.iter().map(|reason| {
        format!(
            "QEMU: {reason}; remove what it names (device_del), or see the failover options of 'vmferry send'"
        )
    }));
    let devices = passed_through_reaching(&mut qmp, reach, &[])?;
    seen.devices = devices.into_iter().map(InspectedDevice::from).collect();
    seen.direct_io_nodes = facts::direct_io_nodes(&mut qmp)?;
    Ok(seen)
}

/// Puts the blocks' names to the files; how much RAM a device can reach.
fn name_blocks(seen: &mut Inspection, found: &FoundRam) -> vmferry_datapath::ByteLen {
    for (block, place) in found.layout.blocks().iter().zip(&found.places) {
        let of_block =
            |file: &&mut crate::inspect::MemoryFile| file.inode() == place.inode && file.block.is_none();
        if let Some(file) = seen.memory.iter_mut().find(of_block) {
            file.block = Some(block.name.clone());
        }
    }
    if !found.in_stream.is_empty() {
        seen.notes.push(format!("in QEMU's own stream: {}", found.in_stream.join(", ")));
    }
    found.layout.total_bytes()
}
