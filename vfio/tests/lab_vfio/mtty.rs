//! A mediated serial card of the kernel's sample driver, and its UARTs.

use std::fs;
use std::path::PathBuf;

use vmferry_vfio::{Iommu, Passthrough, Region, Regions};

/// Registers of a UART, in a BAR.
const DATA: u64 = 0;
const INTERRUPTS: u64 = 1;
const FIFO: u64 = 2;
const LINE: u64 = 3;
const STATUS: u64 = 5;
const SCRATCH: u64 = 7;
/// While this is set in the line control, the first two registers are the divisor; setting it clears the divisor.
const LATCH: u8 = 0x80;

/// One card of two ports; it goes with this value.
pub(crate) struct Mtty {
    uuid: String,
}

impl Mtty {
    pub(crate) fn create(number: u32) -> Mtty {
        let uuid = format!("83b8f4f2-509f-4821-b3f6-{:012x}", u64::from(number));
        fs::write("/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-2/create", &uuid).unwrap();
        Mtty { uuid }
    }

    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from("/sys/bus/mdev/devices").join(&self.uuid)
    }

    pub(crate) fn open(&self, name: &str) -> Passthrough {
        Passthrough::open(name, &self.path(), &Iommu::container().unwrap()).unwrap()
    }
}

impl Drop for Mtty {
    fn drop(&mut self) {
        fs::write(self.path().join("remove"), "1").unwrap();
    }
}

/// What a guest wrote into a UART and wants to find there again.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Uart {
    pub divisor: u16,
    pub line: u8,
    pub scratch: u8,
    pub fifo: Vec<u8>,
}

impl Uart {
    pub(crate) fn example(seed: u8) -> Uart {
        let fifo = (0..9).map(|at| seed.wrapping_mul(31).wrapping_add(at)).collect();
        Uart { divisor: 0x0100 | u16::from(seed), line: LATCH | 0x1b, scratch: seed ^ 0x5a, fifo }
    }

    /// Writes it as a guest's driver would: FIFO on and filled, then line control with the latch, then the divisor.
    pub(crate) fn write(&self, regions: &Regions, bar: Region) {
        let out = |at, value| regions.write(bar, at, &[value]).unwrap();
        out(LINE, self.line & !LATCH);
        out(INTERRUPTS, 0);
        out(FIFO, 0x07);
        self.fifo.iter().for_each(|byte| out(DATA, *byte));
        out(SCRATCH, self.scratch);
        out(LINE, self.line);
        let [low, high] = self.divisor.to_le_bytes();
        out(DATA, low);
        out(INTERRUPTS, high);
    }

    /// Reads it back; the FIFO is empty then.
    pub(crate) fn read(regions: &Regions, bar: Region) -> Uart {
        let get = |at| {
            let mut byte = [0];
            regions.read(bar, at, &mut byte).unwrap();
            byte[0]
        };
        let (line, divisor, scratch) =
            (get(LINE), u16::from_le_bytes([get(DATA), get(INTERRUPTS)]), get(SCRATCH));
        regions.write(bar, LINE, &[line & !LATCH]).unwrap();
        let mut fifo = Vec::new();
        while get(STATUS) & 1 == 1 {
            fifo.push(get(DATA));
        }
        Uart { divisor, line, scratch, fifo }
    }
}
