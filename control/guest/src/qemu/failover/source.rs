//! The source's half: primaries leave before the first round, and come back when the move fails.

use super::hands::{QmpHands, frames_sent};
use super::pairs::{self, Pairs};
use super::parked;
use crate::GuestError;
use crate::failover::{DeviceOptions, FailoverMode, FailoverOptions, Ledger, Plan, Primary, Standby};
use crate::qemu::qmp::Qmp;

/// The failover of one source guest.
#[derive(Debug)]
pub(crate) struct SourceFailover {
    options: FailoverOptions,
    ledger: Ledger,
    standbys: Vec<String>,
}

impl SourceFailover {
    pub(crate) fn new(options: FailoverOptions) -> SourceFailover {
        SourceFailover { options, ledger: Ledger::default(), standbys: Vec::new() }
    }

    /// The devices that will be away during the move. A guest that may not have its primaries unplugged is refused.
    pub(crate) fn will_leave(&self, qmp: &mut Qmp, pairs: &Pairs) -> Result<Vec<Primary>, GuestError> {
        let mut primaries = pairs.plugged()?;
        if let (FailoverMode::Off, Some(first)) = (self.options.mode, primaries.first()) {
            return Err(GuestError::mistake(format!(
                "device `{}` is the primary of a failover pair, which QEMU cannot migrate: allow --failover auto, or \
                 unplug it first (device_del)",
                first.options.id()
            )));
        }
        for standby in &self.options.standbys {
            primaries.push(beside(qmp, standby)?);
        }
        Ok(primaries)
    }

    /// Makes the guest movable: its primaries are unplugged, its standbys carry its traffic.
    pub(crate) fn begin(&mut self, qmp: &mut Qmp) -> Result<Vec<String>, GuestError> {
        let pairs = Pairs::find(qmp)?;
        let primaries = self.will_leave(qmp, &pairs)?;
        self.standbys = primaries.iter().map(|primary| primary.standby.id.clone()).collect();
        if self.ledger.is_empty() {
            // What a sender that died had unplugged is ours to bring back.
            self.ledger = Ledger::adopt(parked::read(qmp)?);
        }
        let plan = Plan::of(&primaries, &self.ledger);
        let mut hands = QmpHands { qmp, options: &self.options, notes: Vec::new() };
        self.ledger.carry_out(&plan, &mut hands)?;
        Ok(hands.notes)
    }

    /// What the standbys carried, told when the guest stands still.
    pub(crate) fn traffic(&self, qmp: &mut Qmp) -> Result<Vec<String>, GuestError> {
        let mut told = Vec::new();
        for standby in &self.standbys {
            if let Some(frames) = frames_sent(qmp, standby)? {
                told.push(format!(
                    "failover: the guest sent {frames} frames over `{standby}` until it was paused"
                ));
            }
        }
        Ok(told)
    }

    /// Undoes everything that was done, as far as possible; what was done, and what failed.
    pub(crate) fn undo(&mut self, qmp: &mut Qmp) -> (Vec<String>, Vec<GuestError>) {
        if self.ledger.is_empty() {
            return (Vec::new(), Vec::new());
        }
        // Bringing a device back is not what a cancelled move is cut short by.
        let options = FailoverOptions::default();
        let mut hands = QmpHands { qmp, options: &options, notes: Vec::new() };
        let failed = self.ledger.undo_all(&mut hands);
        (hands.notes, failed)
    }

    /// The guest is gone: its devices here go with the VMM.
    pub(crate) fn close(&mut self) {
        self.ledger.close();
    }
}

/// Gives a guest back what a sender that died had unplugged.
pub(crate) fn bring_back(qmp: &mut Qmp) -> Result<(), GuestError> {
    let steps = parked::read(qmp)?;
    if steps.is_empty() {
        return Ok(());
    }
    let options = FailoverOptions::default();
    let mut hands = QmpHands { qmp, options: &options, notes: Vec::new() };
    Ledger::adopt(steps).undo_all(&mut hands).into_iter().next().map_or(Ok(()), Err)
}

/// A device without a pair, and the standby that the operator wants beside it.
fn beside(qmp: &mut Qmp, standby: &DeviceOptions) -> Result<Primary, GuestError> {
    let id = standby.get("for").ok_or_else(|| {
        GuestError::mistake(format!(
            "--failover-standby `{standby}` does not say for which device: add for=ID, the id of the device that it stands \
             in for"
        ))
    })?;
    let primary = pairs::unpaired(qmp, id)?;
    let mac = standby.get("mac").or(primary.get("mac")).ok_or_else(|| {
        GuestError::mistake(format!(
            "QEMU does not know the MAC of `{id}`: add mac=… to --failover-standby, the one that the guest sees on it"
        ))
    })?;
    let to_plug = standby.clone().without("for").with("failover", "on").with("mac", mac);
    Ok(Primary { options: primary, standby: Standby { id: standby.id().to_owned(), to_plug: Some(to_plug) } })
}
