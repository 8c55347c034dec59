//! Workload processes for tests: started, asked, ended.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use vmferry_guest::process::{DeviceStatus, Phase, WorkloadControl};

use crate::command::program;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A workload process, ended when it is dropped.
pub struct Workload {
    name: String,
    child: Child,
}

impl Workload {
    /// One that runs `plan` in `ram` (such as `64MiB`).
    #[must_use]
    pub fn run(ram: &str, plan: &str) -> Self {
        Self::start(&["--ram", ram, "--plan", plan])
    }

    /// One that waits for a guest.
    #[must_use]
    pub fn incoming(ram: &str) -> Self {
        Self::start(&["--ram", ram, "--incoming"])
    }

    /// The same with fake devices.
    #[must_use]
    pub fn run_with(ram: &str, plan: &str, devices: &[&str]) -> Self {
        Self::start(&[&["--ram", ram, "--plan", plan], &device_words(devices)[..]].concat())
    }

    /// One that waits for a guest with fake devices.
    #[must_use]
    pub fn incoming_with(ram: &str, devices: &[&str]) -> Self {
        Self::start(&[&["--ram", ram, "--incoming"], &device_words(devices)[..]].concat())
    }

    fn start(words: &[&str]) -> Self {
        let name = format!("test-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let child = Command::new(program())
            .args(["workload", "--name", &name])
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("no workload: {e}"));
        let workload = Self { name, child };
        for _ in 0..1000 {
            if WorkloadControl::connect(&workload.name).and_then(|mut c| c.status()).is_ok() {
                return workload;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the workload {} does not answer", workload.name);
    }

    /// For `--guest`.
    #[must_use]
    pub fn spec(&self) -> String {
        format!("process:{}", self.name)
    }

    /// Whether its process is there.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What it does now, `None` when it does not answer.
    #[must_use]
    pub fn phase(&self) -> Option<Phase> {
        WorkloadControl::connect(&self.name).and_then(|mut c| c.status()).ok().map(|status| status.phase)
    }

    /// Its fake devices.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceStatus> {
        let status = WorkloadControl::connect(&self.name).and_then(|mut c| c.status());
        status.unwrap_or_else(|e| panic!("{e}")).devices
    }

    /// Panics unless every device came in with the digest that the source had, and no page that it wrote was lost.
    ///
    /// # Panics
    /// When one did not.
    pub fn assert_devices_came_in(&self) {
        for device in self.devices() {
            assert!(device.came_in && device.wrong_pinned_pages == 0, "{device:?}");
        }
    }

    /// Waits until it is in `phase`.
    ///
    /// # Panics
    /// When it never is.
    pub fn wait_phase(&self, phase: Phase) {
        for _ in 0..3000 {
            if self.phase() == Some(phase) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{} is {:?}, not {phase:?}", self.name, self.phase());
    }

    /// Panics unless every page is right.
    ///
    /// # Panics
    /// When a page is wrong, or the workload does not answer.
    pub fn assert_memory_is_right(&self) {
        let report = WorkloadControl::connect(&self.name)
            .and_then(|mut c| c.verify())
            .unwrap_or_else(|e| panic!("{e}"));
        assert!(
            report.is_clean(),
            "{} of {} pages are wrong: {:?}",
            report.wrong,
            report.pages,
            report.faults
        );
    }
}

fn device_words<'a>(devices: &[&'a str]) -> Vec<&'a str> {
    devices.iter().flat_map(|device| ["--device", device]).collect()
}

impl Drop for Workload {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
