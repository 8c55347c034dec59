//! The demo with two workload processes: what runs where neither QEMU nor a guest kernel is installed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use vmferry_guest::process::WorkloadControl;

use super::Stage;
use super::run::{Moved, move_guest};
use crate::blame;
use crate::failure::Failure;
use crate::report::human;

/// Tries until a started workload listens, 20 ms apart.
const TRIES: u32 = 500;

/// A workload, ended when it is dropped.
struct Workload {
    name: String,
    child: Child,
}

/// The workload that runs, and how the next one is started.
pub(super) struct ProcessStage {
    here: Workload,
    moves: usize,
    ram: u64,
}

impl Workload {
    fn start(ram: u64, number: usize, incoming: bool) -> Result<Self, Failure> {
        let cannot = |e: std::io::Error| Failure::Permission(format!("cannot start a workload process: {e}"));
        let name = format!("demo-{}-{number}", std::process::id());
        let mut command = Command::new(std::env::current_exe().map_err(cannot)?);
        command.args(["workload", "--name", &name, "--ram", &format!("{ram}B")]);
        if incoming {
            command.arg("--incoming");
        } else {
            let set = (ram / 4096 / 8).max(1);
            command.args(["--plan", &format!("seed=1,set={set},pattern=random,rate=50MiB,zero=100")]);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().map_err(cannot)?;
        let workload = Self { name, child };
        workload.wait_ready()?;
        Ok(workload)
    }

    fn wait_ready(&self) -> Result<(), Failure> {
        for _ in 0..TRIES {
            if WorkloadControl::connect(&self.name).and_then(|mut control| control.status()).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(Failure::Unavailable(format!("the workload {} does not answer", self.name)))
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl ProcessStage {
    /// Starts the workload; an eighth of its memory is written again and again.
    pub(super) fn start(ram: u64) -> Result<Self, Failure> {
        Ok(Self { here: Workload::start(ram, 0, false)?, moves: 0, ram })
    }
}

impl Stage for ProcessStage {
    fn title(&self) -> String {
        format!("a workload process with {} of memory, writing 50 MiB/s at random", human(self.ram))
    }

    fn move_once(&mut self, pki: &Path) -> Result<Moved, Failure> {
        self.moves += 1;
        let there = Workload::start(self.ram, self.moves, true)?;
        let moved =
            move_guest(pki, &format!("process:{}", self.here.name), &format!("process:{}", there.name))?;
        self.here = there;
        Ok(moved)
    }

    fn verify(&mut self) -> Result<String, Failure> {
        let mut control = WorkloadControl::connect(&self.here.name).map_err(|e| blame::refused_guest(&e))?;
        let report = control.verify().map_err(|e| blame::refused_guest(&e))?;
        if !report.is_clean() {
            return Err(Failure::Bug(format!(
                "the workload found {} wrong pages of {}: {:?}",
                report.wrong, report.pages, report.faults
            )));
        }
        Ok(format!(
            "the workload verified {} pages after {} moves: none stale, torn or lost",
            report.pages, self.moves
        ))
    }
}
