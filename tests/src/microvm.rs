//! Micro-VMs whose guest counts: a few bytes of code that add one to the first word of every page, page after page.
//!
//! So at any moment the words are one number up to some page, and the number before from there on. A page that a move left
//! behind, or that came twice, breaks that.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use vmferry_guest::kvm::{MicroVmControl, MicroVmPhase};

use crate::command::program;

static NUMBER: AtomicU32 = AtomicU32::new(0);
const RAM: &str = "8MiB";
/// Where the counted pages begin, and how many they are.
const FIRST: u32 = 0x10_0000;
const PAGES: u32 = 512;
const PAGE: u32 = 4096;
/// Emulated twice, everything is slow.
const PATIENCE: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(10);

/// 32-bit code: all pages once, and again, for ever.
fn code() -> Vec<u8> {
    let mut code = vec![0xbf]; //             next:  mov edi, FIRST
    code.extend(FIRST.to_le_bytes());
    code.push(0xb9); //                              mov ecx, PAGES
    code.extend(PAGES.to_le_bytes());
    code.extend([0xff, 0x07, 0x81, 0xc7]); // write: inc dword [edi]; add edi, PAGE
    code.extend(PAGE.to_le_bytes());
    code.extend([0xe2, 0xf6, 0xeb, 0xea]); //        loop write; jmp next
    code
}

/// A micro-VM's process, ended when it is dropped.
pub struct CountingVm {
    name: String,
    child: Child,
    _folder: tempfile::TempDir,
}

impl CountingVm {
    /// One whose guest counts.
    #[must_use]
    pub fn run(words: &[&str]) -> Self {
        let vm = Self::start(words, true);
        vm.wait_phase(MicroVmPhase::Running);
        vm
    }

    /// One that waits for a guest.
    #[must_use]
    pub fn incoming(words: &[&str]) -> Self {
        let vm = Self::start(words, false);
        vm.wait_phase(MicroVmPhase::Waiting);
        vm
    }

    fn start(words: &[&str], boots: bool) -> Self {
        let folder = tempfile::tempdir().unwrap_or_else(|e| panic!("no directory for the code: {e}"));
        let name = format!("counts-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut command = Command::new(program());
        command.args(["microvm", "--name", &name, "--ram", RAM, "--console", "none"]).args(words);
        if boots {
            let file = folder.path().join("code");
            fs::write(&file, code()).unwrap_or_else(|e| panic!("no code: {e}"));
            command.arg("--flat").arg(file);
        } else {
            command.arg("--incoming");
        }
        let child = command.stdin(Stdio::null()).spawn().unwrap_or_else(|e| panic!("no micro-VM: {e}"));
        Self { name, child, _folder: folder }
    }

    /// For `--guest`.
    #[must_use]
    pub fn spec(&self) -> String {
        format!("kvm:{}", self.name)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends the process, as an accident would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until the process has ended by itself.
    ///
    /// # Panics
    /// When it does not.
    pub fn wait_end(&mut self) {
        until("the micro-VM ends", || matches!(self.child.try_wait(), Ok(Some(_))));
    }

    /// Waits until it is in `phase`.
    ///
    /// # Panics
    /// When it never is.
    pub fn wait_phase(&self, phase: MicroVmPhase) {
        until(&format!("{} is {phase:?}", self.name), || {
            let status = MicroVmControl::connect(&self.name).and_then(|mut control| control.status());
            status.is_ok_and(|status| status.phase == phase)
        });
    }

    /// How often the guest has been through all pages, or nearly; it may run meanwhile.
    ///
    /// # Panics
    /// When its memory cannot be read.
    #[must_use]
    pub fn passes(&self) -> u32 {
        word(&self.memory(), 0)
    }

    /// Panics unless the guest runs, goes on counting, and has every page as it must be. Gives its passes.
    ///
    /// # Panics
    /// When it does not.
    pub fn assert_counts_on(&self) -> u32 {
        self.wait_phase(MicroVmPhase::Running);
        let before = self.passes();
        until(&format!("{} counts beyond {before}", self.name), || self.passes() > before + 1);
        let mut control = MicroVmControl::connect(&self.name).unwrap_or_else(|e| panic!("{e}"));
        control.stop().unwrap_or_else(|e| panic!("{e}"));
        let memory = self.memory();
        let words: Vec<u32> = (0..PAGES).map(|page| word(&memory, page)).collect();
        control.start().unwrap_or_else(|e| panic!("{e}"));
        let (first, last) = (words[0], words[words.len() - 1]);
        assert!(words.is_sorted_by(|a, b| a >= b) && first - last <= 1, "{words:?}");
        first
    }

    /// The memory, as anybody of the same user can open it.
    fn memory(&self) -> File {
        File::open(self.memory_path()).unwrap_or_else(|e| panic!("its memory cannot be read: {e}"))
    }

    /// The memory's place, for a second writer.
    ///
    /// # Panics
    /// When it has none.
    #[must_use]
    pub fn memory_path(&self) -> PathBuf {
        let folder = format!("/proc/{}/fd", self.pid());
        let found = fs::read_dir(folder).into_iter().flatten().flatten().find(|entry| {
            fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:"))
        });
        found.unwrap_or_else(|| panic!("{} has no memory", self.name)).path()
    }
}

fn word(memory: &File, page: u32) -> u32 {
    let mut word = [0; 4];
    let at = u64::from(FIRST + page * PAGE);
    memory.read_exact_at(&mut word, at).unwrap_or_else(|e| panic!("the memory ends before {at:#x}: {e}"));
    u32::from_le_bytes(word)
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let mut left = PATIENCE;
    while !is_so() {
        left = left.checked_sub(STEP).unwrap_or_else(|| panic!("it never was so that {what}"));
        std::thread::sleep(STEP);
    }
}

impl Drop for CountingVm {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_land_where_the_listing_says() {
        let code = code();
        let at = |target: usize, from: usize| u8::try_from((target + 256 - (from + 2)) % 256);
        assert_eq!(Ok(code[19]), at(10, 18), "loop write");
        assert_eq!(Ok(code[21]), at(0, 20), "jmp next");
    }
}
