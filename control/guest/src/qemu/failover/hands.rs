//! Carries the steps of a failover out through QMP.
//!
//! Asking a guest for a device is asking: it answers when its driver has let go, or never. So the wait looks at three
//! things, QEMU's events, whether the device is still there, and the clock, and asks again before it gives up. A request
//! cannot be taken back; a guest that answers after we gave up is why undoing looks first and plugs only what is gone.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::{pairs, parked};
use crate::GuestError;
use crate::clock::{Deadline, Since};
use crate::failover::{CancelFlag, DeviceOptions, FailoverOptions, Hands, OnUnplugTimeout, Step};
use crate::qemu::qmp::{Qmp, QmpFailure};

/// Between two looks at a guest that is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long a standby is waited for that should send and does not: the guest has nothing to say, then.
const TRAFFIC_PATIENCE: Duration = Duration::from_secs(1);
/// A driver takes a new device, or lets a standby go, within this time.
const DRIVER_PATIENCE: Duration = Duration::from_secs(10);
/// A slot that has just lost its device refuses a new one for a moment; and QEMU frees what the old one held (its
/// bootindex, its netdev, its id) a moment after it has said that it is gone.
const PLUG_PATIENCE: Duration = Duration::from_secs(5);
/// QEMU's words for that.
const STILL_HELD: [&str; 5] =
    ["in process of", "in the process of", "has already been used", "in use", "Duplicate device ID"];
/// A guest is asked this many times within `unplug_timeout`.
const ASKS: u32 = 4;

/// Hands on a QEMU's monitor.
pub(super) struct QmpHands<'a> {
    pub(super) qmp: &'a mut Qmp,
    pub(super) options: &'a FailoverOptions,
    /// What an operator should know.
    pub(super) notes: Vec<String>,
}

impl Hands for QmpHands<'_> {
    fn perform(&mut self, step: &Step) -> Result<(), GuestError> {
        match step {
            Step::Remember(steps) => parked::write(self.qmp, steps),
            Step::PlugStandby(standby) => plug(self.qmp, standby),
            Step::AwaitStandby(id) => self.await_standby(id),
            Step::AwaitTraffic(id) => self.await_traffic(id),
            Step::Unplug(primary) => self.unplug(primary),
        }
    }

    fn undo(&mut self, step: &Step) -> Result<(), GuestError> {
        match step {
            Step::Remember(_) => parked::erase(self.qmp),
            Step::PlugStandby(standby) => {
                if !pairs::is_plugged(self.qmp, standby.id())? {
                    return Ok(());
                }
                self.ask_until_gone(standby.id(), &undoing()).map(|_| ())
            }
            Step::AwaitStandby(_) | Step::AwaitTraffic(_) => Ok(()),
            Step::Unplug(primary) => self.plug_again(primary),
        }
    }
}

impl QmpHands<'_> {
    fn await_standby(&mut self, id: &str) -> Result<(), GuestError> {
        let within = Deadline::after(DRIVER_PATIENCE);
        while !is_driven(self.qmp, id)? {
            self.look(within, || {
                GuestError::Unresponsive(format!(
                    "the guest has no driver on its standby `{id}` after {} s, so nothing would carry its traffic: load \
                     virtio_net and net_failover in the guest, or move it with --failover off after unplugging by hand",
                    DRIVER_PATIENCE.as_secs()
                ))
            })?;
        }
        Ok(())
    }

    /// The first frame that the standby sends says that the guest's traffic has moved.
    fn await_traffic(&mut self, id: &str) -> Result<(), GuestError> {
        let Some(before) = frames_sent(self.qmp, id)? else { return Ok(()) };
        let within = Deadline::after(TRAFFIC_PATIENCE.min(self.options.unplug_timeout));
        while frames_sent(self.qmp, id)? == Some(before) {
            if within.left().is_none() {
                self.notes.push(format!("the guest sent nothing over its standby `{id}` yet: it seems idle"));
                return Ok(());
            }
            self.pause()?;
        }
        Ok(())
    }

    fn unplug(&mut self, primary: &DeviceOptions) -> Result<(), GuestError> {
        let id = primary.id();
        tracing::info!("wait-unplug: asking the guest to give up `{id}` ({})", primary.driver());
        let (took, asked) = self.ask_until_gone(id, self.options)?;
        self.notes.push(format!(
            "failover: the guest gave up `{id}` ({}) after {} ms ({})",
            primary.driver(),
            took.as_millis(),
            times(asked)
        ));
        Ok(())
    }

    /// Asks for a device until it is gone; how long that took, and how often the guest was asked.
    fn ask_until_gone(
        &mut self,
        id: &str,
        patience: &FailoverOptions,
    ) -> Result<(Duration, u32), GuestError> {
        let (began, whole) = (Since::now(), patience.unplug_timeout);
        let (mut asked, mut refused) = (0, false);
        self.qmp.forget_events();
        loop {
            if asked >= ASKS && patience.on_unplug_timeout == OnUnplugTimeout::Abort {
                return Err(kept(id, whole, asked, refused));
            }
            ask(self.qmp, id)?;
            asked += 1;
            let turn = Deadline::after(whole / ASKS);
            if self.is_gone_within(id, turn, &patience.cancel, &mut refused)? {
                return Ok((began.elapsed(), asked));
            }
        }
    }

    fn is_gone_within(
        &mut self,
        id: &str,
        turn: Deadline,
        cancel: &CancelFlag,
        refused: &mut bool,
    ) -> Result<bool, GuestError> {
        while turn.left().is_some() {
            *refused |= self.guest_refuses(id)?;
            if !pairs::is_plugged(self.qmp, id)? {
                return Ok(true);
            }
            if cancel.is_cancelled() {
                return Err(GuestError::Cancelled);
            }
        }
        Ok(false)
    }

    /// Takes the events of one look; whether the guest said that it keeps the device.
    fn guest_refuses(&mut self, id: &str) -> Result<bool, GuestError> {
        let within = Deadline::after(LOOK_EVERY);
        let mut refused = false;
        while let Some(left) = within.left() {
            let Some(event) = self.qmp.next_event(left)? else { break };
            let mine = event["data"]["device"] == id;
            match event["event"].as_str() {
                Some("DEVICE_DELETED") if mine => break,
                Some("DEVICE_UNPLUG_GUEST_ERROR") if mine => refused = true,
                Some(_) | None => {}
            }
        }
        Ok(refused)
    }

    fn plug_again(&mut self, primary: &DeviceOptions) -> Result<(), GuestError> {
        if pairs::is_plugged(self.qmp, primary.id())? {
            return Ok(());
        }
        plug(self.qmp, primary).map_err(|error| {
            GuestError::misbehaved(format!(
                "the guest runs on over its standby, because its device could not be plugged again: {error}; plug it by \
                 hand: device_add {primary}"
            ))
        })?;
        self.notes.push(format!("failover: `{}` was plugged again", primary.id()));
        Ok(())
    }

    fn look(&mut self, within: Deadline, late: impl Fn() -> GuestError) -> Result<(), GuestError> {
        if within.left().is_none() {
            return Err(late());
        }
        self.pause()
    }

    fn pause(&self) -> Result<(), GuestError> {
        if self.options.cancel.is_cancelled() {
            return Err(GuestError::Cancelled);
        }
        std::thread::sleep(LOOK_EVERY);
        Ok(())
    }
}

/// Plugs a device; a slot that is not ready yet is asked again for a while.
pub(super) fn plug(qmp: &mut Qmp, device: &DeviceOptions) -> Result<(), GuestError> {
    let within = Deadline::after(PLUG_PATIENCE);
    let kinds = option_kinds(qmp, device.driver())?;
    let arguments = device.arguments(|key| kinds.get(key).cloned());
    loop {
        let refused = match qmp.execute("device_add", arguments.clone()) {
            Ok(_) => return Ok(()),
            Err(lost @ QmpFailure::Lost(_)) => return Err(lost.into()),
            Err(QmpFailure::Refused(words)) => words,
        };
        let busy = STILL_HELD.iter().any(|words| refused.contains(words));
        if !busy || within.left().is_none() {
            return Err(GuestError::misbehaved(refused));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The types of a driver's options, in QEMU's words; none for a driver that QEMU does not know.
fn option_kinds(qmp: &mut Qmp, driver: &str) -> Result<HashMap<String, String>, GuestError> {
    let answer = match qmp.execute("device-list-properties", json!({ "typename": driver })) {
        Ok(answer) => answer,
        Err(QmpFailure::Refused(_)) => return Ok(HashMap::new()),
        Err(lost @ QmpFailure::Lost(_)) => return Err(lost.into()),
    };
    let kind =
        |option: &Value| Some((option["name"].as_str()?.to_owned(), option["type"].as_str()?.to_owned()));
    Ok(answer.as_array().into_iter().flatten().filter_map(kind).collect())
}

/// Asks the guest for a device. That it was asked already, or that the device is gone, is no error.
fn ask(qmp: &mut Qmp, id: &str) -> Result<(), GuestError> {
    match qmp.execute("device_del", json!({ "id": id })) {
        Ok(_) => Ok(()),
        Err(QmpFailure::Refused(words)) if words.contains("in the process of unplug") => Ok(()),
        Err(QmpFailure::Refused(words)) if words.contains("not found") => Ok(()),
        Err(other) => Err(other.into()),
    }
}

/// Whether the guest's driver drives a virtio device.
fn is_driven(qmp: &mut Qmp, id: &str) -> Result<bool, GuestError> {
    let status = qmp.execute("x-query-virtio-status", json!({ "path": backend(id) }))?;
    let words = status["status"]["statuses"].as_array();
    Ok(words.into_iter().flatten().filter_map(Value::as_str).any(|word| word.contains("DRIVER_OK")))
}

/// Frames that a virtio NIC has sent, as far as QEMU counts them (modulo 65536 a queue); none with vhost, which keeps
/// its counters in the kernel.
pub(super) fn frames_sent(qmp: &mut Qmp, id: &str) -> Result<Option<u64>, GuestError> {
    let status = match qmp.execute("x-query-virtio-status", json!({ "path": backend(id) })) {
        Ok(status) => status,
        Err(QmpFailure::Refused(_)) => return Ok(None),
        Err(lost @ QmpFailure::Lost(_)) => return Err(lost.into()),
    };
    if status["vhost-started"] == true || status["started"] != true {
        return Ok(None);
    }
    // Queues come in pairs, receive and send, and a control queue is the last.
    let queues = status["num-vqs"].as_u64().unwrap_or(0) & !1;
    let mut sent = 0;
    for queue in (1..queues).step_by(2) {
        let arguments = json!({ "path": backend(id), "queue": queue });
        match qmp.execute("x-query-virtio-queue-status", arguments) {
            Ok(answer) => sent += answer["used-idx"].as_u64().unwrap_or(0),
            Err(QmpFailure::Refused(_)) => {}
            Err(lost @ QmpFailure::Lost(_)) => return Err(lost.into()),
        }
    }
    Ok(Some(sent))
}

fn backend(id: &str) -> String {
    format!("/machine/peripheral/{id}/virtio-backend")
}

/// What is undone is undone whether the move was cancelled or not, and not waited for without end.
fn undoing() -> FailoverOptions {
    FailoverOptions { unplug_timeout: DRIVER_PATIENCE, ..FailoverOptions::default() }
}

fn kept(id: &str, whole: Duration, asked: u32, refused: bool) -> GuestError {
    let how = if refused { "refused to give up" } else { "did not give up" };
    GuestError::Unresponsive(format!(
        "the guest {how} `{id}` within {:.1} s ({}), so it was not moved: its kernel may lack a driver for hot-unplug \
         (pciehp, acpiphp), or something in it holds the device; mend that, give it more time (--unplug-timeout), wait as \
         long as it takes (--on-unplug-timeout wait), or unplug `{id}` by hand (device_del). It was asked and cannot be \
         unasked: should it give `{id}` up later, plug it again (device_add)",
        whole.as_secs_f64(),
        times(asked)
    ))
}

fn times(asked: u32) -> String {
    if asked == 1 { "asked once".into() } else { format!("asked {asked} times") }
}
