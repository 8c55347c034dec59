//! The word that is left in the VMM: what a failover did, for whoever comes after a sudden death.
//!
//! QEMU keeps texts for its users as `secret` objects; ours holds the steps that are to be undone. It lives exactly as
//! long as the VMM, and no file can be out of step with it. What must never happen: a guest whose primary was
//! unplugged by a sender that died, and nobody who knows what to plug.

use serde_json::{Value, json};

use crate::GuestError;
use crate::failover::Step;
use crate::qemu::qmp::{Qmp, QmpFailure};

/// The object's id.
const NAME: &str = "vmferry-failover";

/// Leaves the word, in the place of an older one.
pub(crate) fn write(qmp: &mut Qmp, steps: &[Step]) -> Result<(), GuestError> {
    erase(qmp)?;
    let data = serde_json::to_string(steps).map_err(|error| GuestError::Bug(error.to_string()))?;
    qmp.execute("object-add", json!({ "qom-type": "secret", "id": NAME, "data": data }))?;
    Ok(())
}

/// The word that was left; none where no failover was begun.
pub(crate) fn read(qmp: &mut Qmp) -> Result<Vec<Step>, GuestError> {
    let path = format!("/objects/{NAME}");
    match qmp.execute("qom-get", json!({ "path": path, "property": "data" })) {
        Ok(Value::String(text)) => serde_json::from_str(&text).map_err(|error| {
            GuestError::misbehaved(format!(
                "the object {NAME} in QEMU holds no word of this vmferry ({error}): look which devices the guest lacks, plug \
                 them (device_add) and remove it (object-del)"
            ))
        }),
        Ok(_) | Err(QmpFailure::Refused(_)) => Ok(Vec::new()),
        Err(lost @ QmpFailure::Lost(_)) => Err(lost.into()),
    }
}

/// Takes the word away, if there is one.
pub(crate) fn erase(qmp: &mut Qmp) -> Result<(), GuestError> {
    match qmp.execute("object-del", json!({ "id": NAME })) {
        Ok(_) | Err(QmpFailure::Refused(_)) => Ok(()),
        Err(lost @ QmpFailure::Lost(_)) => Err(lost.into()),
    }
}
