//! Cards of the lab's mtty, the kernel's sample of a device that can be passed through and moved.

use std::fs;

/// One card of this host's mtty, gone with this.
pub struct Card(String);

impl Card {
    /// `kind` is `mtty-1` or `mtty-2`: a card of one or two ports.
    ///
    /// # Panics
    /// When the lab host makes none.
    #[must_use]
    pub fn make(number: u8, kind: &str) -> Card {
        let uuid = format!("83b8f4f2-509f-382f-3c1e-e6bfe0fa10{number:02}");
        let place = format!("/sys/class/mdev_bus/mtty/mdev_supported_types/{kind}/create");
        fs::write(place, &uuid).unwrap_or_else(|e| panic!("no card {kind}: {e}"));
        Card(uuid)
    }

    /// For `--vfio`.
    #[must_use]
    pub fn words(&self) -> String {
        format!("mtty0=/sys/bus/mdev/devices/{}", self.0)
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        let _ = fs::write(format!("/sys/bus/mdev/devices/{}/remove", self.0), "1");
    }
}
