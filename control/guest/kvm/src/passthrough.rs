//! A passed-through device on the machine's bus: its regions at fixed places, since this machine has no PCI bus.
//!
//! ```text
//!   device 0, BAR 0: ports 0xc000 …   BAR 1: ports 0xc040 …      memory BARs: 0xd0000000, 0xd0800000 …
//!   device 1, BAR 0: ports 0xc200 …                                            0xd4000000 …
//! ```
//!
//! Each access of the guest is one read or write of the device's file, on the vCPU's thread: while the CPUs are paused
//! nobody touches the device. Interrupts are not delivered; a guest polls. What must never happen: a region cut to fit.

use std::sync::{Arc, Mutex};

use vmferry_vfio::{Region, Regions};

use crate::bus::{Device, Place, Space};
use crate::{Blank, KvmError};

/// The most devices of a machine: as many as have a place.
pub const PASSED_DEVICES_MAX: usize = 8;
const BARS: u32 = 6;
/// Where the configuration space says what a BAR is.
const BAR_REGISTERS: u64 = 0x10;
const IS_PORTS: u8 = 1;

const PORTS: Stride = Stride { first: 0xc000, device: 0x200, bar: 0x40 };
const MEMORY: Stride = Stride { first: 0xd000_0000, device: 64 << 20, bar: 8 << 20 };

/// How places follow each other.
struct Stride {
    first: u64,
    device: u64,
    bar: u64,
}

impl Blank {
    /// Puts the regions of the machine's `number`th device on the bus.
    pub fn pass_through(&self, number: usize, regions: &Regions) -> Result<(), KvmError> {
        if number >= PASSED_DEVICES_MAX {
            return Err(KvmError::mistake(format!(
                "a micro-VM has place for {PASSED_DEVICES_MAX} devices: leave one --vfio out"
            )));
        }
        for bar in 0..BARS {
            let len = regions.bytes(Region(bar));
            if len > 0 {
                let window = BarWindow { regions: regions.clone(), bar };
                self.attach(window.place(number as u64, len)?, Arc::new(Mutex::new(window)))?;
            }
        }
        Ok(())
    }
}

/// One BAR.
struct BarWindow {
    regions: Regions,
    bar: u32,
}

impl BarWindow {
    fn place(&self, number: u64, len: u64) -> Result<Place, KvmError> {
        let mut register = [0];
        let at = BAR_REGISTERS + u64::from(self.bar) * 4;
        let read = self.regions.read(Region::CONFIG, at, &mut register);
        read.map_err(|error| KvmError::mistake(error.to_string()))?;
        let space = if register[0] & IS_PORTS != 0 { Space::Ports } else { Space::Memory };
        let stride = match space {
            Space::Ports => PORTS,
            Space::Memory => MEMORY,
        };
        if len > stride.bar {
            return Err(KvmError::mistake(format!(
                "BAR {} of that device has {len} bytes and a micro-VM has place for {}: leave the device out",
                self.bar, stride.bar
            )));
        }
        let start = stride.first + number * stride.device + u64::from(self.bar) * stride.bar;
        Ok(Place { space, start, len })
    }
}

impl Device for BarWindow {
    /// A device that does not answer reads as all ones, as on a PC.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if self.regions.read(Region(self.bar), offset, data).is_err() {
            data.fill(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // What a device does not take is lost, as on a PC.
        let _ = self.regions.write(Region(self.bar), offset, data);
    }
}
