//! Where a guest's port and memory-mapped accesses go.
//!
//! A device claims a place; an access that nobody claims reads as all ones and writes to nothing, as on a PC. What
//! must never happen: a device that blocks, because its vCPU could then not be paused.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::KvmError;

/// What answers accesses.
pub trait Device: Send {
    /// The guest reads `data.len()` bytes at `offset` of the device's place.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` of the device's place.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Which of the two spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// `in` and `out`.
    Ports,
    /// Memory-mapped.
    Memory,
}

/// A piece of one of the spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The space.
    pub space: Space,
    /// Its first address.
    pub start: u64,
    /// Its length.
    pub len: u64,
}

impl Place {
    /// Ports from `start` on.
    #[must_use]
    pub const fn ports(start: u64, len: u64) -> Place {
        Place { space: Space::Ports, start, len }
    }

    /// Guest addresses from `start` on.
    #[must_use]
    pub const fn memory(start: u64, len: u64) -> Place {
        Place { space: Space::Memory, start, len }
    }

    fn offset(&self, space: Space, at: u64) -> Option<u64> {
        let offset = at.checked_sub(self.start).filter(|offset| *offset < self.len)?;
        (self.space == space).then_some(offset)
    }

    fn overlaps(&self, other: &Place) -> bool {
        let apart = self.start.saturating_add(self.len) <= other.start
            || other.start.saturating_add(other.len) <= self.start;
        self.space == other.space && !apart
    }
}

/// A device as the bus shares it with its owner.
pub type SharedDevice = Arc<Mutex<dyn Device>>;

/// All devices of a machine.
#[derive(Default)]
pub struct Bus {
    devices: RwLock<Vec<(Place, SharedDevice)>>,
}

impl Bus {
    /// Puts a device on its place; refused when another is there.
    pub fn attach(&self, place: Place, device: SharedDevice) -> Result<(), KvmError> {
        let mut devices = self.devices.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((taken, _)) = devices.iter().find(|(taken, _)| taken.overlaps(&place)) {
            return Err(KvmError::mistake(format!(
                "{place:x?} is taken by the device at {taken:x?}: choose another place"
            )));
        }
        devices.push((place, device));
        Ok(())
    }

    /// One access of the guest; reads that nobody answers give ones.
    pub(crate) fn read(&self, space: Space, at: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.find(space, at, |device, offset| device.read(offset, data));
    }

    pub(crate) fn write(&self, space: Space, at: u64, data: &[u8]) {
        self.find(space, at, |device, offset| device.write(offset, data));
    }

    fn find(&self, space: Space, at: u64, access: impl FnOnce(&mut dyn Device, u64)) {
        let devices = self.devices.read().unwrap_or_else(PoisonError::into_inner);
        let found = devices.iter().find_map(|(place, device)| Some((device, place.offset(space, at)?)));
        if let Some((device, offset)) = found {
            access(&mut *device.lock().unwrap_or_else(PoisonError::into_inner), offset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<(u64, Vec<u8>)>);

    impl Device for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_finds_its_device_and_no_other() {
        let (bus, echo) = (Bus::default(), Arc::new(Mutex::new(Echo(Vec::new()))));
        bus.attach(Place::ports(0x10, 4), echo.clone()).unwrap();
        bus.attach(Place::memory(0x10, 4), Arc::new(Mutex::new(Echo(Vec::new())))).unwrap();
        let mut data = [0; 2];
        bus.read(Space::Ports, 0x13, &mut data);
        assert_eq!(data, [3, 3]);
        bus.read(Space::Ports, 0x14, &mut data);
        assert_eq!(data, [0xff, 0xff]);
        bus.write(Space::Ports, 0x11, &[9]);
        bus.write(Space::Memory, 0x11, &[8]);
        assert_eq!(echo.lock().unwrap().0, [(1, vec![9])]);
        let taken = bus.attach(Place::ports(0x13, 1), Arc::new(Mutex::new(Echo(Vec::new()))));
        assert!(matches!(taken, Err(KvmError::UserMistake(_))));
    }
}
