//! A fake device's state between its workload and the lanes: one connection a device, so that they move in parallel.

use std::io::{self, Write};

use vmferry_datapath::limits::STATE_PIECE_BYTES;
use vmferry_datapath::{ByteLen, PageCount, PageIndex, PageSet};
use vmferry_workload::DevicePlan;

use super::client::WorkloadControl;
use super::wire::{Identity, Reply, Request};
use crate::GuestError;
use crate::device::{DeviceFacts, DeviceMigration, DeviceStream, DmaTracking, StateEstimate, StateRead};

/// What a workload's devices are.
pub(crate) fn facts(identity: &Identity) -> Vec<DeviceFacts> {
    let fact = |plan: &DevicePlan| DeviceFacts {
        name: plan.name.clone(),
        model: plan.model(),
        what: "a fake device of the workload".to_owned(),
        migration: if plan.stop_copy {
            DeviceMigration::StopCopy { p2p: false }
        } else {
            DeviceMigration::PreCopy { p2p: false }
        },
        dma: DmaTracking::None,
        pinned: ByteLen(plan.pinned_bytes),
    };
    identity.devices.iter().map(fact).collect()
}

/// The end of the memory, which they write unseen.
pub(crate) fn add_pinned(identity: &Identity, pages: &mut PageSet) {
    let count = identity.devices.iter().map(DevicePlan::pinned_pages).sum::<u64>().min(identity.pages);
    pages.insert_range(PageIndex(identity.pages - count), PageCount(count));
}

/// The state of one device on its way out.
pub(crate) struct FakeDeviceStream {
    control: WorkloadControl,
    name: String,
}

impl FakeDeviceStream {
    pub(crate) fn open(workload: &str, name: &str) -> Result<Self, GuestError> {
        let mut control = WorkloadControl::connect(workload)?;
        control.caller().order(&Request::DeviceOpen { name: name.to_owned() })?;
        Ok(Self { control, name: name.to_owned() })
    }
}

impl DeviceStream for FakeDeviceStream {
    fn name(&self) -> &str {
        &self.name
    }

    fn remaining(&mut self) -> Result<StateEstimate, GuestError> {
        let reply = self.control.caller().ask(&Request::DeviceRemaining { name: self.name.clone() })?;
        let Reply::Remaining { expected, at_most } = reply else {
            return Err(self.control.caller().unexpected(&reply));
        };
        Ok(StateEstimate { expected: ByteLen(expected), at_most: ByteLen(at_most) })
    }

    fn read(&mut self, into: &mut [u8]) -> Result<StateRead, GuestError> {
        let max = into.len().min(STATE_PIECE_BYTES) as u64;
        let reply = self.control.caller().ask(&Request::DeviceRead { name: self.name.clone(), max })?;
        match reply {
            Reply::Idle => Ok(StateRead::Idle),
            Reply::Ended => Ok(StateRead::End),
            Reply::Bytes { len } => {
                let bytes = self.control.caller().bytes(len, max)?;
                into[..bytes.len()].copy_from_slice(&bytes);
                Ok(StateRead::Bytes(bytes.len()))
            }
            Reply::Done
            | Reply::Identity(_)
            | Reply::Remaining { .. }
            | Reply::Status(_)
            | Reply::Verified(_)
            | Reply::Refused(_) => Err(self.control.caller().unexpected(&reply)),
        }
    }
}

/// The state of one device on its way in.
pub(crate) struct FakeDeviceSink {
    control: WorkloadControl,
    name: String,
}

impl FakeDeviceSink {
    pub(crate) fn open(workload: &str, name: &str) -> Result<Self, GuestError> {
        Ok(Self { control: WorkloadControl::connect(workload)?, name: name.to_owned() })
    }
}

impl Write for FakeDeviceSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(STATE_PIECE_BYTES)];
        let order = Request::DeviceWrite { name: self.name.clone(), len: piece.len() as u64 };
        self.control.caller().order_with(&order, piece).map_err(io::Error::other)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.control
            .caller()
            .order(&Request::DeviceFinish { name: self.name.clone() })
            .map_err(io::Error::other)
    }
}
