//! Linux guests in the micro-VM, as `vmferry microvm` runs them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use vmferry_workload::Plan;

use crate::RigError;
use crate::assets::{GuestFiles, find_program};
use crate::console::Console;
use crate::heartbeat::HeartBeat;
use crate::initramfs;
use crate::qemu::{RigDirectory, Vmm, accept, listener};

/// Few lines and few probes: every access to a device costs a nested machine a quarter of a millisecond. The other
/// processors are brought up by the init.
const KERNEL_WORDS: &str = "quiet loglevel=1 nokaslr mitigations=off audit=0 8250.nr_uarts=1 random.trust_cpu=on rcupdate.rcu_expedited=1 \
    init_on_alloc=0 maxcpus=1";
/// A nested and emulated guest cannot beat each millisecond and work as well.
const BEAT_MS: u32 = 10;
const BOOT_TIMEOUT: Duration = Duration::from_secs(100);

/// A recipe for a guest. Started twice, it gives a source and a target that fit each other.
#[derive(Debug, Clone)]
pub struct MicroVmGuest {
    files: GuestFiles,
    directory: Arc<RigDirectory>,
    plan: Plan,
    words: Vec<String>,
    beat_port: bool,
}

impl MicroVmGuest {
    /// A guest with `ram_bytes` of memory and one processor.
    pub fn new(ram_bytes: u64, plan: Plan) -> Result<Self, RigError> {
        let words = vec!["--ram".to_owned(), format!("{}KiB", ram_bytes / 1024)];
        let files = GuestFiles::find_generic(&[])?;
        Ok(Self { files, directory: Arc::new(RigDirectory::create()?), plan, words, beat_port: true })
    }

    /// More words for `vmferry microvm`, such as `--dirty ring`.
    #[must_use]
    pub fn words(mut self, words: &[&str]) -> Self {
        self.words.extend(words.iter().map(|word| (*word).to_owned()));
        self
    }

    /// Lets the beat be counted by the guest alone. Under QEMU's emulation of nested SVM, `out` by a program faults after a
    /// restore: it wants a task register of the kind that no saved one is (KVM tells a busy one, as hardware has it).
    #[must_use]
    pub fn without_beat_port(mut self) -> Self {
        self.beat_port = false;
        self
    }

    /// Boots the guest and waits until its workload runs.
    pub fn boot(&self, name: &str) -> Result<RunningMicroVm, RigError> {
        let initramfs = self.directory.path().join(format!("{name}.cpio"));
        std::fs::write(&initramfs, initramfs::build(&self.files)?)
            .map_err(RigError::host("cannot write the guest's file system"))?;
        let words = [
            "--kernel".into(),
            self.files.kernel.clone().into_os_string(),
            "--initramfs".into(),
            initramfs.into_os_string(),
            "--append".into(),
            self.kernel_words().into(),
        ];
        let mut guest = self.launch(name, &words)?;
        guest.console.wait_ready(BOOT_TIMEOUT)?;
        Ok(guest)
    }

    /// Starts a micro-VM that waits for a guest to come in.
    pub fn await_incoming(&self, name: &str) -> Result<RunningMicroVm, RigError> {
        self.launch(name, &["--incoming".into()])
    }

    fn kernel_words(&self) -> String {
        let port = if self.beat_port { "on" } else { "off" };
        format!(
            "{KERNEL_WORDS} vmferry.beat_ms={BEAT_MS} vmferry.beat_port={port} vmferry.plan={}",
            self.plan
        )
    }

    fn launch(&self, name: &str, more: &[std::ffi::OsString]) -> Result<RunningMicroVm, RigError> {
        let path = |kind: &str| self.directory.path().join(format!("{name}.{kind}"));
        let route = |path: &Path| format!("unix:{}", path.display());
        let (beats, serial) = (listener(&path("beat"))?, listener(&path("serial"))?);
        let log = path("log");
        let errors =
            std::fs::File::create(&log).map_err(RigError::host("cannot write the micro-VM's log"))?;
        let child = Command::new(find_program("vmferry")?)
            .args(["microvm", "--name", name])
            .args(["--console".to_owned(), route(&path("serial")), "--beat".to_owned(), route(&path("beat"))])
            .args(&self.words)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .map_err(RigError::host("cannot start vmferry microvm"))?;
        let mut vmm = Vmm { child, memory_files: Vec::<PathBuf>::new(), log };
        // In the order in which the micro-VM connects.
        let console = Console::open(accept(&serial, &mut vmm)?)?;
        let beats = HeartBeat::listen(accept(&beats, &mut vmm)?);
        Ok(RunningMicroVm {
            name: name.to_owned(),
            vmm,
            console,
            beats,
            _directory: Arc::clone(&self.directory),
        })
    }
}

/// A guest in a micro-VM, or a micro-VM that waits for one; ended when dropped.
#[derive(Debug)]
pub struct RunningMicroVm {
    name: String,
    vmm: Vmm,
    console: Console,
    beats: HeartBeat,
    _directory: Arc<RigDirectory>,
}

impl RunningMicroVm {
    /// What `--guest` takes.
    #[must_use]
    pub fn spec(&self) -> String {
        format!("kvm:{}", self.name)
    }

    /// The guest's console.
    pub fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    /// The beats that arrived from this micro-VM.
    #[must_use]
    pub fn beats(&self) -> &HeartBeat {
        &self.beats
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.vmm.child.id()
    }

    /// True while the process lives.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.vmm.child.try_wait(), Ok(None))
    }

    /// What it wrote on its standard error.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.vmm.log).unwrap_or_default()
    }
}
