//! The fake devices of a workload process, and where they write its memory.
//!
//! ```text
//!   memory:  │ the writers' pages (plan) │ … │ pinned by the last device │ … by the first │
//!                 through mappings: tracked        through the memfd: no tracker sees it
//! ```
//!
//! They are fakes for the simulated world: they stand where passed-through devices would. What must never happen: a
//! device that changes while the workload says that it is paused.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vmferry_workload::{DevicePlan, DeviceRead, FakeDevice, PAGE_BYTES};

use super::crew::now;
use super::wire::{DeviceStatus, Reply};
use crate::GuestError;

/// All fake devices of one workload.
#[derive(Debug)]
pub(crate) struct Devices {
    memory: File,
    all: Vec<Placed>,
}

#[derive(Debug)]
struct Placed {
    device: FakeDevice,
    /// The first page that it pins.
    first_page: u64,
}

impl Devices {
    /// Devices that stand still; what they pin lies at the end of the memory.
    pub(crate) fn new(memory: &File, pages: u64, plans: &[DevicePlan]) -> Result<Self, GuestError> {
        let memory =
            memory.try_clone().map_err(GuestError::refused("the workload's memory cannot be shared"))?;
        let mut end = pages;
        let mut place = |plan: &DevicePlan| {
            end = end.saturating_sub(plan.pinned_pages());
            Placed { device: FakeDevice::new(plan.clone()), first_page: end }
        };
        let all = plans.iter().map(&mut place).collect();
        Ok(Self { memory, all })
    }

    pub(crate) fn plans(&self) -> Vec<DevicePlan> {
        self.all.iter().map(|placed| placed.device.plan().clone()).collect()
    }

    pub(crate) fn run(&mut self) {
        self.all.iter_mut().for_each(|placed| placed.device.run(now()));
    }

    pub(crate) fn halt(&mut self) -> std::io::Result<()> {
        let memory = &self.memory;
        self.all.iter_mut().try_for_each(|placed| {
            let mut dma = dma(memory, placed.first_page);
            placed.device.halt(now(), &mut dma)
        })
    }

    pub(crate) fn forget(&mut self) {
        self.all.iter_mut().for_each(|placed| placed.device.forget());
    }

    pub(crate) fn open(&mut self, name: &str) -> Reply {
        self.with(name, |placed, _| {
            placed.device.open();
            Reply::Done
        })
    }

    pub(crate) fn remaining(&mut self, name: &str) -> Reply {
        self.with(name, |placed, memory| {
            advanced(placed, memory, |device| {
                let (expected, at_most) = device.remaining();
                Reply::Remaining { expected, at_most }
            })
        })
    }

    /// The bytes follow the reply.
    pub(crate) fn read(&mut self, name: &str, max: usize) -> (Reply, Vec<u8>) {
        let mut bytes = Vec::new();
        let reply = self.with(name, |placed, memory| {
            advanced(placed, memory, |device| match device.read(max) {
                DeviceRead::Idle => Reply::Idle,
                DeviceRead::End => Reply::Ended,
                DeviceRead::Bytes(read) => {
                    bytes = read;
                    Reply::Bytes { len: bytes.len() as u64 }
                }
            })
        });
        (reply, bytes)
    }

    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> Reply {
        self.with(name, |placed, _| placed.device.write(bytes).map_or_else(Reply::Refused, |()| Reply::Done))
    }

    pub(crate) fn finish(&mut self, name: &str) -> Reply {
        self.with(name, |placed, _| placed.device.finish().map_or_else(Reply::Refused, |()| Reply::Done))
    }

    pub(crate) fn status(&self) -> Vec<DeviceStatus> {
        let status = |placed: &Placed| DeviceStatus {
            name: placed.device.plan().name.clone(),
            digest: placed.device.digest(),
            came_in: placed.device.is_loaded(),
            wrong_pinned_pages: self.wrong_pages(placed),
        };
        self.all.iter().map(status).collect()
    }

    /// A page that cannot be read is as wrong as one that reads differently.
    fn wrong_pages(&self, placed: &Placed) -> u64 {
        let first = placed.first_page;
        let read = |page, into: &mut [u8; PAGE_BYTES]| self.memory.read_exact_at(into, offset(first + page));
        placed.device.wrong_pages(read).unwrap_or(u64::MAX)
    }

    fn with(&mut self, name: &str, work: impl FnOnce(&mut Placed, &File) -> Reply) -> Reply {
        match self.all.iter_mut().find(|placed| placed.device.plan().name == name) {
            Some(placed) => work(placed, &self.memory),
            None => Reply::Refused(format!("there is no device {name}")),
        }
    }
}

/// What a device did meanwhile comes first.
fn advanced(placed: &mut Placed, memory: &File, then: impl FnOnce(&mut FakeDevice) -> Reply) -> Reply {
    let mut dma = dma(memory, placed.first_page);
    match placed.device.advance(now(), &mut dma) {
        Ok(()) => then(&mut placed.device),
        Err(error) => Reply::Refused(format!("a device cannot write its memory: {error}")),
    }
}

/// Through the memfd and not through a mapping: no page table learns of it, as of a real device's DMA.
fn dma(memory: &File, first_page: u64) -> impl FnMut(u64, &[u8; PAGE_BYTES]) -> std::io::Result<()> {
    move |page, bytes| memory.write_all_at(bytes, offset(first_page + page))
}

fn offset(page: u64) -> u64 {
    page.saturating_mul(PAGE_BYTES as u64)
}
