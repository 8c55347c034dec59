//! What `vmferry microvm` takes.

use std::fs::File;
use std::path::PathBuf;
use std::str::FromStr;

use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use vmferry_datapath::ByteLen;
use vmferry_kvm::{Blank, KvmError, LinuxBoot, Machine, Tracking};

use crate::GuestError;

/// Runs a Linux guest on KVM until it ends or is moved away.
#[derive(Debug, Clone, Args)]
pub struct MicroVmArgs {
    /// The name that `--guest kvm:NAME` finds it by.
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// Wait for a guest to be moved here instead of booting one.
    #[arg(long)]
    pub incoming: bool,
    /// A Linux bzImage with CONFIG_X86_MPPARSE, as distributions' generic kernels have it. One without finds no processors
    /// but the first, and waits for ever for a timer: it needs --cpus 1 and --append nolapic.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["incoming", "flat"])]
    pub kernel: Option<PathBuf>,
    /// 32-bit code instead of a kernel: it begins at 0x1000, in protected mode with flat segments.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initramfs"])]
    pub flat: Option<PathBuf>,
    /// Its first file system.
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,
    /// More words for the kernel's command line.
    #[arg(long, value_name = "WORDS", default_value = "", allow_hyphen_values = true)]
    pub append: String,
    /// Its memory.
    #[arg(long, value_name = "BYTES", default_value = "128MiB")]
    pub ram: ByteSize,
    /// Its processors.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    pub cpus: u8,
    /// How KVM tells which pages were written.
    #[arg(long, value_enum, default_value_t = TrackingWord::Bitmap)]
    pub dirty: TrackingWord,
    /// What its processors may do: host, host,-NAME,... or names of /proc/cpuinfo. The same on both hosts.
    #[arg(long, value_name = "LIST", default_value = "host", allow_hyphen_values = true)]
    pub cpu_features: String,
    /// A device of this host for the guest: its name, the same on both hosts, and its place in sysfs, as in
    /// mtty0=/sys/bus/mdev/devices/UUID. Repeatable; the order is the same on both hosts too.
    #[arg(long, value_name = "NAME=PATH")]
    pub vfio: Vec<PassedDevice>,
    /// The serial console: stdio, none, or unix:PATH of a socket that listens.
    #[arg(long, value_name = "ROUTE", default_value = "stdio")]
    pub console: Route,
    /// Where the bytes go that the guest writes to port 0xe9: none, or unix:PATH of a socket that listens.
    #[arg(long, value_name = "ROUTE", default_value = "none")]
    pub beat: Route,
}

/// `--dirty`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackingWord {
    /// The bitmap: costs by the size of the guest.
    Bitmap,
    /// Rings, one a processor: cost by the pages written.
    Ring,
}

impl TrackingWord {
    /// What reports and inspections call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            TrackingWord::Bitmap => "kvm-bitmap",
            TrackingWord::Ring => "kvm-ring",
        }
    }
}

impl From<TrackingWord> for Tracking {
    fn from(word: TrackingWord) -> Tracking {
        match word {
            TrackingWord::Bitmap => Tracking::Bitmap,
            TrackingWord::Ring => Tracking::Ring,
        }
    }
}

/// `--vfio`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedDevice {
    /// The operator's name for it.
    pub name: String,
    /// Where sysfs has it.
    pub path: PathBuf,
}

impl FromStr for PassedDevice {
    type Err = String;

    fn from_str(text: &str) -> Result<PassedDevice, String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && name.chars().all(plain) && path.starts_with('/') => {
                Ok(PassedDevice { name: name.to_owned(), path: PathBuf::from(path) })
            }
            _ => Err("write NAME=/sys/bus/pci/devices/ADDRESS or NAME=/sys/bus/mdev/devices/UUID".to_owned()),
        }
    }
}

/// Where a device's bytes go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// Nowhere.
    Nothing,
    /// This process's own input and output.
    Stdio,
    /// A socket that listens.
    Unix(PathBuf),
}

impl FromStr for Route {
    type Err = String;

    fn from_str(text: &str) -> Result<Route, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Route::Nothing),
            None if text == "stdio" => Ok(Route::Stdio),
            Some(("unix", path)) if !path.is_empty() => Ok(Route::Unix(PathBuf::from(path))),
            _ => Err("write stdio, none or unix:/path/of/a/socket".to_owned()),
        }
    }
}

/// A console, and an end of the process when the guest ends; no devices to look for that are not there. Of a keyboard's
/// controller only the reset line is: a kernel that knocks ten thousand times for the rest stood still for half a minute.
const KERNEL_WORDS: &str = "console=ttyS0 reboot=k panic=-1 pci=off initcall_blacklist=i8042_init";

/// The files of a guest to boot, read.
pub(super) enum BootFiles {
    Linux { kernel: File, initramfs: Vec<u8>, command_line: String },
    Flat(Vec<u8>),
}

impl BootFiles {
    pub(super) fn boot(&self, blank: Blank) -> Result<Machine, KvmError> {
        match self {
            BootFiles::Flat(code) => blank.boot_code(code),
            BootFiles::Linux { kernel, initramfs, command_line } => {
                blank.boot_linux(&LinuxBoot { kernel, initramfs, command_line })
            }
        }
    }
}

impl MicroVmArgs {
    pub(super) fn ram(&self) -> ByteLen {
        ByteLen(self.ram.as_u64())
    }

    fn command_line(&self) -> String {
        format!("{KERNEL_WORDS} {}", self.append).trim_end().to_owned()
    }

    /// Nothing for a guest that comes in.
    pub(super) fn boot_files(&self) -> Result<Option<BootFiles>, GuestError> {
        let cannot = |path: &PathBuf| GuestError::refused(format!("cannot read {}", path.display()));
        if let Some(flat) = self.flat.as_ref().filter(|_| !self.incoming) {
            return Ok(Some(BootFiles::Flat(std::fs::read(flat).map_err(cannot(flat))?)));
        }
        let Some(kernel) = self.kernel.as_ref().filter(|_| !self.incoming) else { return Ok(None) };
        let initramfs = self.initramfs.as_ref().map(|path| std::fs::read(path).map_err(cannot(path)));
        Ok(Some(BootFiles::Linux {
            kernel: File::open(kernel).map_err(cannot(kernel))?,
            initramfs: initramfs.transpose()?.unwrap_or_default(),
            command_line: self.command_line(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_a_name_and_a_place() {
        let device = "mtty0=/sys/bus/mdev/devices/83b8".parse::<PassedDevice>().unwrap();
        assert_eq!(
            (device.name.as_str(), device.path.as_path()),
            ("mtty0", "/sys/bus/mdev/devices/83b8".as_ref())
        );
        for wrong in ["mtty0", "=/sys/x", "a b=/sys/x", "a=sys/x"] {
            assert!(wrong.parse::<PassedDevice>().unwrap_err().contains("NAME=/sys"), "{wrong}");
        }
    }

    #[test]
    fn routes_are_read_or_refused_with_the_forms_that_work() {
        assert_eq!("unix:/run/a".parse(), Ok(Route::Unix("/run/a".into())));
        assert_eq!("stdio".parse(), Ok(Route::Stdio));
        for wrong in ["unix:", "tcp:1", "/run/a", ""] {
            assert!(wrong.parse::<Route>().unwrap_err().contains("unix:/path"), "{wrong}");
        }
    }
}
