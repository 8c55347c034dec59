//! The states of a micro-VM's devices, as the mover reads and writes them: each by a connection of its own.

use std::io::{self, Write};

use super::{DEVICE_CHUNK_MAX, MicroVmControl};
use crate::{DeviceFacts, DeviceStream, GuestError, StateEstimate, StateRead};

/// The names of the devices whose states move, in the order in which the micro-VM counts them.
fn moving(devices: &[DeviceFacts]) -> impl Iterator<Item = (usize, &str)> {
    devices.iter().filter(|device| device.has_stream()).map(|device| device.name.as_str()).enumerate()
}

/// A device's state on its way out.
struct Leaving {
    name: String,
    device: usize,
    control: MicroVmControl,
}

/// One stream for each device that moves.
pub(super) fn leaving(
    micro_vm: &str,
    devices: &[DeviceFacts],
) -> Result<Vec<Box<dyn DeviceStream>>, GuestError> {
    let stream = |(device, name): (usize, &str)| {
        let control = MicroVmControl::connect(micro_vm)?;
        Ok(Box::new(Leaving { name: name.to_owned(), device, control }) as Box<dyn DeviceStream>)
    };
    moving(devices).map(stream).collect()
}

impl DeviceStream for Leaving {
    fn name(&self) -> &str {
        &self.name
    }

    fn remaining(&mut self) -> Result<StateEstimate, GuestError> {
        self.control.remaining(self.device)
    }

    fn read(&mut self, into: &mut [u8]) -> Result<StateRead, GuestError> {
        self.control.read_device(self.device, into)
    }
}

/// A device's state on its way in.
struct Arriving {
    device: usize,
    control: MicroVmControl,
}

/// One sink for each device that moves; the devices stand still from here on.
pub(super) fn arriving(
    micro_vm: &str,
    devices: &[DeviceFacts],
) -> Result<Vec<Box<dyn Write + Send>>, GuestError> {
    let sink = |(device, _): (usize, &str)| {
        let mut control = MicroVmControl::connect(micro_vm)?;
        control.expect_device(device)?;
        Ok(Box::new(Arriving { device, control }) as Box<dyn Write + Send>)
    };
    moving(devices).map(sink).collect()
}

impl Write for Arriving {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(usize::try_from(DEVICE_CHUNK_MAX).unwrap_or(usize::MAX));
        self.control.write_device(self.device, &bytes[..len]).map_err(io::Error::other)?;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.control.finish_device(self.device).map_err(io::Error::other)
    }
}
