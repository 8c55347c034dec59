//! QEMU's migration settings, borrowed for one move and given back afterwards.
//!
//! The bandwidth that we set is also our mark in the VMM: it tells whoever comes after a `kill -9` that a vmferry was
//! here, and whether the guest ran or was paused by its owner. What must never happen: a rescue that starts a guest
//! which its owner had paused.

use std::time::Duration;

use serde_json::{Value, json};

use super::qmp::{Qmp, QmpFailure};
use crate::GuestError;

/// Leaves named shared files out of QEMU's stream.
const IGNORE_SHARED: &str = "x-ignore-shared";
/// `MIGRATION` events, so that nobody has to poll.
const EVENTS: &str = "events";
/// 1 TiB/s: no brake; and our mark on a guest that was running.
const MARK_RUNNING: u64 = 1 << 40;
/// The same, on a guest that its owner had paused.
const MARK_PAUSED: u64 = MARK_RUNNING + 1;
/// QEMU's own default.
const DEFAULT_BANDWIDTH: u64 = 128 << 20;
/// QEMU saves or loads a device state within this time, or hangs.
pub(crate) const STATE_TIMEOUT: Duration = Duration::from_secs(30);

/// Who is in charge of a QEMU's migration settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// No vmferry.
    Free,
    /// A vmferry, on a guest that was running.
    WasRunning,
    /// A vmferry, on a guest that its owner had paused.
    WasPaused,
}

/// The settings as they were.
#[derive(Debug)]
pub(crate) struct Borrowed {
    capabilities: Value,
    parameters: Value,
}

/// Sets what a move needs, and remembers what was there.
pub(crate) fn borrow(qmp: &mut Qmp, mark: Mark) -> Result<Borrowed, GuestError> {
    let before = qmp.execute("query-migrate-capabilities", Value::Null)?;
    let listed = before.as_array().cloned().unwrap_or_default();
    if !listed.iter().any(|entry| entry["capability"] == IGNORE_SHARED) {
        return Err(GuestError::mistake(
            "this QEMU has no capability x-ignore-shared, so it would carry all RAM itself; start the guest with QEMU \
             8.1 or newer",
        ));
    }
    let wanted = |name: &str| name == IGNORE_SHARED || name == EVENTS;
    let differs = |entry: &&Value| {
        entry["state"].as_bool() != Some(wanted(entry["capability"].as_str().unwrap_or_default()))
    };
    let mut changed: Vec<Value> = listed.iter().filter(differs).cloned().collect();
    if read_mark(qmp)? != Mark::Free {
        // A vmferry died here: what it found is lost, and QEMU's defaults are all off.
        changed = [IGNORE_SHARED, EVENTS].map(|name| json!({ "capability": name, "state": false })).to_vec();
    }
    let parameters = qmp.execute("query-migrate-parameters", Value::Null)?;
    let bandwidth = match parameters["max-bandwidth"].as_u64() {
        Some(MARK_RUNNING | MARK_PAUSED) | None => DEFAULT_BANDWIDTH,
        Some(bandwidth) => bandwidth,
    };
    let mut back = json!({ "max-bandwidth": bandwidth });
    let marked = if mark == Mark::WasPaused { MARK_PAUSED } else { MARK_RUNNING };
    let mut now = json!({ "max-bandwidth": marked });
    if parameters["tls-creds"].as_str().is_some_and(|creds| !creds.is_empty()) {
        back["tls-creds"] = parameters["tls-creds"].clone();
        now["tls-creds"] = json!("");
    }
    let set: Vec<Value> = listed
        .iter()
        .filter(differs)
        .map(|entry| {
            let state = !entry["state"].as_bool().unwrap_or(false);
            json!({ "capability": entry["capability"], "state": state })
        })
        .collect();
    if !set.is_empty() {
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": set }))?;
    }
    qmp.execute("migrate-set-parameters", now)?;
    Ok(Borrowed { capabilities: Value::Array(changed), parameters: back })
}

impl Borrowed {
    /// What a vmferry that died has left behind, put back to QEMU's defaults.
    pub(crate) fn of_the_dead() -> Borrowed {
        let off = |name: &str| json!({ "capability": name, "state": false });
        Borrowed {
            capabilities: json!([off(IGNORE_SHARED), off(EVENTS)]),
            parameters: json!({ "max-bandwidth": DEFAULT_BANDWIDTH }),
        }
    }

    /// Puts everything back.
    pub(crate) fn give_back(self, qmp: &mut Qmp) -> Result<(), GuestError> {
        qmp.execute("migrate-set-parameters", self.parameters)?;
        qmp.execute("migrate-set-capabilities", json!({ "capabilities": self.capabilities }))?;
        Ok(())
    }
}

/// Whether a vmferry is, or was, in charge here.
pub(crate) fn read_mark(qmp: &mut Qmp) -> Result<Mark, GuestError> {
    let parameters = qmp.execute("query-migrate-parameters", Value::Null)?;
    Ok(match parameters["max-bandwidth"].as_u64() {
        Some(MARK_RUNNING) => Mark::WasRunning,
        Some(MARK_PAUSED) => Mark::WasPaused,
        _ => Mark::Free,
    })
}

/// QEMU's word for where its migration stands; "none" before the first.
pub(crate) fn status(qmp: &mut Qmp) -> Result<String, GuestError> {
    let answer = qmp.execute("query-migrate", Value::Null)?;
    Ok(answer["status"].as_str().unwrap_or("none").to_owned())
}

/// A migration with this status is over, or never began.
pub(crate) fn is_idle(status: &str) -> bool {
    matches!(status, "none" | "completed" | "failed" | "cancelled")
}

/// QEMU's reasons why it will not migrate, as it says them.
pub(crate) fn blockers(qmp: &mut Qmp) -> Result<Vec<String>, GuestError> {
    let answer = qmp.execute("query-migrate", Value::Null)?;
    let reasons = answer["blocked-reasons"].as_array().into_iter().flatten().filter_map(Value::as_str);
    Ok(reasons.map(str::to_owned).collect())
}

/// Devices that QEMU itself refuses to migrate, with its reasons.
pub(crate) fn refuse_blockers(qmp: &mut Qmp) -> Result<(), GuestError> {
    let reasons = blockers(qmp)?;
    if reasons.is_empty() {
        return Ok(());
    }
    Err(GuestError::mistake(format!(
        "QEMU says that this guest cannot be migrated: {}; remove what it names (device_del) and try again",
        reasons.join("; ")
    )))
}

/// Waits until QEMU has ended its migration well.
pub(crate) fn wait_completed(qmp: &mut Qmp, what: &str) -> Result<(), GuestError> {
    let status = qmp.wait_event("MIGRATION", STATE_TIMEOUT, |data| {
        data["status"]
            .as_str()
            .filter(|status| matches!(*status, "completed" | "failed" | "cancelled"))
            .map(str::to_owned)
    })?;
    if status == "completed" {
        return Ok(());
    }
    Err(why_failed(qmp, what))
}

/// QEMU's reason for a failed migration.
pub(crate) fn why_failed(qmp: &mut Qmp, what: &str) -> GuestError {
    let answer = qmp.execute("query-migrate", Value::Null).unwrap_or_default();
    let reason = answer["error-desc"].as_str().unwrap_or("it gives no reason; look at its log");
    GuestError::misbehaved(format!("QEMU failed to {what}: {reason}"))
}

/// Ends a migration that runs, and waits for its end.
pub(crate) fn cancel(qmp: &mut Qmp) -> Result<(), GuestError> {
    if is_idle(&status(qmp)?) {
        return Ok(());
    }
    match qmp.execute("migrate_cancel", Value::Null) {
        Ok(_) | Err(QmpFailure::Refused(_)) => {}
        Err(lost @ QmpFailure::Lost(_)) => return Err(lost.into()),
    }
    let deadline = crate::clock::Deadline::after(STATE_TIMEOUT);
    while !is_idle(&status(qmp)?) {
        if deadline.left().is_none() {
            return Err(GuestError::misbehaved(
                "QEMU does not end its migration; run migrate_cancel by hand",
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
