//! QEMU guests: a recipe that can be started twice, as source and as target of a move.
//!
//! A guest must never outlive its [`RunningGuest`]: dropping it ends the VMM by its process id.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmferry_workload::Plan;

use crate::RigError;
use crate::assets::Assets;
use crate::console::Console;
use crate::heartbeat::{HeartBeat, now};
use crate::initramfs;
use crate::qmp::Qmp;

/// QEMU opens its sockets within this time, also on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Where shared guest memory lies.
const SHARED_MEMORY: &str = "/dev/shm";
/// Quiet, and without what only costs time under emulation. `panic=-1` with `-no-reboot` ends QEMU when init dies.
const KERNEL_WORDS: &str = "console=ttyS0 quiet loglevel=1 panic=-1 nokaslr mitigations=off audit=0 \
     no_timer_check tsc=reliable random.trust_cpu=on rcupdate.rcu_expedited=1";

/// A processor of software, with everything that it can.
const EMULATED: [&str; 4] = ["-accel", "tcg,thread=multi", "-cpu", "max"];
/// This host's own.
const ON_KVM: [&str; 4] = ["-accel", "kvm", "-cpu", "host"];

/// What the guest's memory is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Memory {
    /// `memory-backend-file,share=on` on shared memory: what vmferry moves.
    SharedFile,
    /// The same on a mounted hugetlbfs.
    HugePages(PathBuf),
    /// `memory-backend-memfd,share=on`: shared, but QEMU would carry it in the device state.
    Memfd,
    /// `memory-backend-ram`: private to the VMM.
    Private,
}

/// A folder for sockets and one on shared memory for RAM; both vanish with the value.
#[derive(Debug)]
pub struct RigDirectory {
    sockets: TempDir,
    memory: TempDir,
}

impl RigDirectory {
    /// Fresh folders. What a killed run left on shared memory is removed first: it would eat the machine's memory.
    pub fn create() -> Result<Self, RigError> {
        sweep_dead_runs();
        let prefix = format!("vmferry-rig-{}-", std::process::id());
        let folder = |parent: &Path| {
            let what = format!("cannot create a folder in {}", parent.display());
            tempfile::Builder::new().prefix(&prefix).tempdir_in(parent).map_err(RigError::host(what))
        };
        Ok(Self { sockets: folder(&std::env::temp_dir())?, memory: folder(Path::new(SHARED_MEMORY))? })
    }

    /// Where sockets and small files go.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.sockets.path()
    }
}

fn sweep_dead_runs() {
    for entry in std::fs::read_dir(SHARED_MEMORY).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix("vmferry-rig-").and_then(|rest| rest.split('-').next());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// A recipe for a guest. Started twice, it gives a source and a target that fit each other.
#[derive(Debug, Clone)]
pub struct QemuGuest {
    assets: Assets,
    directory: Arc<RigDirectory>,
    plan: Plan,
    blocks: Vec<u64>,
    cpus: u32,
    memory: Memory,
    disk: Option<PathBuf>,
    machine: String,
    processor: [&'static str; 4],
    extra: Vec<String>,
    words: String,
    prealloc: bool,
    reserved: u64,
}

impl QemuGuest {
    /// A guest with one memory block of `ram_bytes` and one processor.
    pub fn new(assets: &Assets, ram_bytes: u64, plan: Plan) -> Result<Self, RigError> {
        Ok(Self {
            assets: assets.clone(),
            directory: Arc::new(RigDirectory::create()?),
            plan,
            blocks: vec![ram_bytes],
            cpus: 1,
            memory: Memory::SharedFile,
            disk: None,
            machine: "q35".to_owned(),
            processor: EMULATED,
            extra: Vec::new(),
            words: String::new(),
            prealloc: false,
            reserved: 0,
        })
    }

    /// Several memory blocks, one NUMA node each, instead of one.
    #[must_use]
    pub fn numa(mut self, block_bytes: &[u64]) -> Self {
        self.blocks = block_bytes.to_vec();
        self
    }

    /// What the memory is made of.
    #[must_use]
    pub fn memory(mut self, memory: Memory) -> Self {
        self.memory = memory;
        self
    }

    /// Memory that is there before the guest is, as hosts for fast guests have it.
    #[must_use]
    pub fn prealloc(mut self) -> Self {
        self.prealloc = true;
        self
    }

    /// Virtual processors.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// A virtio disk on `path`, opened with O_DIRECT, which the guest reads all the time. See `create_disk`.
    #[must_use]
    pub fn disk(mut self, path: &Path) -> Self {
        self.disk = Some(path.to_path_buf());
        self
    }

    /// The machine type and its options, "q35" unless told.
    #[must_use]
    pub fn machine(mut self, machine: &str) -> Self {
        machine.clone_into(&mut self.machine);
        self
    }

    /// Runs on this host's KVM, with all features of its CPU, instead of an emulated one.
    #[must_use]
    pub fn kvm(mut self) -> Self {
        self.processor = ON_KVM;
        self
    }

    /// Keeps the guest's kernel out of the last `bytes` of its memory, for a second writer. With one block below
    /// 2 GiB, as q35 maps it, they are the last bytes of the memory file too.
    #[must_use]
    pub fn reserve_top(mut self, bytes: u64) -> Self {
        self.reserved = bytes;
        self
    }

    /// More words for QEMU's command line.
    #[must_use]
    pub fn extra_args(mut self, words: &[&str]) -> Self {
        self.extra.extend(words.iter().map(|word| (*word).to_owned()));
        self
    }

    /// More words for the guest's kernel; `vmferry.net` makes its init send over the network.
    #[must_use]
    pub fn kernel_arguments(mut self, words: &str) -> Self {
        self.words = format!("{words} ");
        self
    }

    /// The folder that this guest's sockets lie in.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Boots the guest and waits until its workload runs.
    pub fn boot(&self, name: &str) -> Result<RunningGuest, RigError> {
        let mut guest = self.launch(name, &[])?;
        guest.console.wait_ready(Duration::from_secs(120))?;
        Ok(guest)
    }

    /// Starts a VMM that waits for a guest to come in (`-incoming defer`).
    pub fn await_incoming(&self, name: &str) -> Result<RunningGuest, RigError> {
        self.launch(name, &["-incoming", "defer"])
    }

    /// Starts a source and a target.
    pub fn pair(&self) -> Result<(RunningGuest, RunningGuest), RigError> {
        let target = self.await_incoming("target")?;
        Ok((self.boot("source")?, target))
    }

    fn launch(&self, name: &str, more: &[&str]) -> Result<RunningGuest, RigError> {
        let socket = |kind: &str| self.directory.path().join(format!("{name}.{kind}"));
        let (qmp, control) = (socket("qmp"), socket("control"));
        let beats = listener(&socket("beat"))?;
        let serial = listener(&socket("serial"))?;
        for path in [&qmp, &control] {
            let _ = std::fs::remove_file(path);
        }
        let initramfs = self.directory.path().join(format!("{name}.cpio"));
        std::fs::write(&initramfs, initramfs::build(&self.assets.guest)?)
            .map_err(RigError::host("cannot write the guest's file system"))?;
        let log = socket("log");
        let errors = std::fs::File::create(&log).map_err(RigError::host("cannot write QEMU's log"))?;
        let memory_files = self.memory_files(name);
        let mut command = Command::new(&self.assets.qemu);
        command
            .args(self.machine_args(&memory_files))
            .args([
                "-kernel".as_ref(),
                self.assets.guest.kernel.as_os_str(),
                "-initrd".as_ref(),
                initramfs.as_os_str(),
            ])
            .args(["-append".to_owned(), self.kernel_words()])
            .args(["-chardev".to_owned(), format!("socket,id=beat,path={}", socket("beat").display())])
            .args(["-device", "isa-debugcon,iobase=0xe9,chardev=beat"])
            .args(["-chardev".to_owned(), format!("socket,id=serial,path={}", socket("serial").display())])
            .args(["-serial", "chardev:serial"])
            .args(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", qmp.display())])
            .args(["-qmp".to_owned(), format!("unix:{},server=on,wait=off", control.display())])
            .args(self.disk_args())
            .args(&self.extra)
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors);
        let child = command.spawn().map_err(RigError::host("cannot start QEMU"))?;
        let mut vmm = Vmm { child, memory_files, log };
        let beats = HeartBeat::listen(accept(&beats, &mut vmm)?);
        let console = Console::open(accept(&serial, &mut vmm)?)?;
        let control = connect(&control, &mut vmm)?;
        Ok(RunningGuest {
            vmm,
            qmp_path: qmp,
            control,
            console,
            beats,
            _directory: Arc::clone(&self.directory),
        })
    }

    fn memory_files(&self, name: &str) -> Vec<PathBuf> {
        let folder = match &self.memory {
            Memory::SharedFile => self.directory.memory.path().to_path_buf(),
            Memory::HugePages(folder) => folder.clone(),
            Memory::Memfd | Memory::Private => return Vec::new(),
        };
        let unique =
            self.directory.memory.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        (0..self.blocks.len()).map(|block| folder.join(format!("{unique}-{name}-ram{block}"))).collect()
    }

    fn machine_args(&self, memory_files: &[PathBuf]) -> Vec<String> {
        let total: u64 = self.blocks.iter().sum();
        let mut args: Vec<String> =
            ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"].map(str::to_owned).to_vec();
        args.extend(self.processor.map(str::to_owned));
        args.extend(["-smp".to_owned(), self.cpus.to_string()]);
        args.extend(["-m".to_owned(), format!("{}K", total / 1024)]);
        for (block, bytes) in self.blocks.iter().enumerate() {
            let prealloc = if self.prealloc { ",prealloc=on" } else { "" };
            let size = format!("id=ram{block},size={}K{prealloc}", bytes / 1024);
            let path = memory_files.get(block).map(|path| path.display().to_string()).unwrap_or_default();
            args.extend([
                "-object".to_owned(),
                match &self.memory {
                    Memory::SharedFile | Memory::HugePages(_) => {
                        format!("memory-backend-file,{size},mem-path={path},share=on")
                    }
                    Memory::Memfd => format!("memory-backend-memfd,{size},share=on"),
                    Memory::Private => format!("memory-backend-ram,{size}"),
                },
            ]);
        }
        if self.blocks.len() == 1 {
            args.extend(["-machine".to_owned(), format!("{},memory-backend=ram0", self.machine)]);
            return args;
        }
        args.extend(["-machine".to_owned(), self.machine.clone()]);
        for block in 0..self.blocks.len() {
            let cpus =
                if block == 0 { format!(",cpus=0-{}", self.cpus.saturating_sub(1)) } else { String::new() };
            args.extend(["-numa".to_owned(), format!("node,nodeid={block},memdev=ram{block}{cpus}")]);
        }
        args
    }

    fn kernel_words(&self) -> String {
        let limit = match self.reserved {
            0 => String::new(),
            bytes => format!("mem={}K ", (self.blocks.iter().sum::<u64>().saturating_sub(bytes)) / 1024),
        };
        format!("{KERNEL_WORDS} {limit}{}vmferry.plan={}", self.words, self.plan)
    }

    fn disk_args(&self) -> Vec<String> {
        let Some(path) = &self.disk else { return Vec::new() };
        let path = path.display();
        vec![
            "-blockdev".to_owned(),
            format!(
                "driver=file,node-name=disk0-file,filename={path},cache.direct=on,aio=threads,locking=off"
            ),
            "-blockdev".to_owned(),
            "driver=raw,node-name=disk0,file=disk0-file,cache.direct=on".to_owned(),
            "-device".to_owned(),
            "virtio-blk-pci,drive=disk0,share-rw=on".to_owned(),
        ]
    }
}

/// A VMM process; dropping it ends the process and removes its memory.
#[derive(Debug)]
pub(crate) struct Vmm {
    pub(crate) child: Child,
    pub(crate) memory_files: Vec<PathBuf>,
    pub(crate) log: PathBuf,
}

impl Vmm {
    fn check(&mut self) -> Result<(), RigError> {
        let Ok(Some(status)) = self.child.try_wait() else { return Ok(()) };
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        Err(RigError::Guest(format!("the VMM ended with {status}: {}", log.trim())))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for file in &self.memory_files {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// A guest, or a VMM that waits for one.
#[derive(Debug)]
pub struct RunningGuest {
    vmm: Vmm,
    qmp_path: PathBuf,
    control: Qmp,
    console: Console,
    beats: HeartBeat,
    _directory: Arc<RigDirectory>,
}

impl RunningGuest {
    /// The VMM's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.vmm.child.id()
    }

    /// The monitor that is free for vmferry (a QMP socket serves one client at a time).
    #[must_use]
    pub fn qmp_path(&self) -> &Path {
        &self.qmp_path
    }

    /// What `--guest` takes.
    #[must_use]
    pub fn spec(&self) -> String {
        format!("qemu:{}", self.qmp_path.display())
    }

    /// The files that hold the guest's memory, a block each.
    #[must_use]
    pub fn memory_files(&self) -> &[PathBuf] {
        &self.vmm.memory_files
    }

    /// The rig's own monitor.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.control
    }

    /// The guest's console.
    pub fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    /// The beats that arrived from this VMM.
    #[must_use]
    pub fn beats(&self) -> &HeartBeat {
        &self.beats
    }

    /// QEMU's word for what it does: "running", "paused", "inmigrate", "postmigrate", …
    pub fn run_state(&mut self) -> Result<String, RigError> {
        let answer = self.control.execute("query-status", serde_json::Value::Null)?;
        Ok(answer["status"].as_str().unwrap_or_default().to_owned())
    }

    /// What QEMU wrote on its standard error.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.vmm.log).unwrap_or_default()
    }

    /// True while the VMM's process lives.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.vmm.child.try_wait(), Ok(None))
    }

    /// Waits until the VMM has ended by itself.
    pub fn wait_end(&mut self, timeout: Duration) -> Result<(), RigError> {
        until(timeout, "the VMM", || if self.is_alive() { Ok(None) } else { Ok(Some(())) })
    }
}

pub(crate) fn listener(path: &Path) -> Result<UnixListener, RigError> {
    let _ = std::fs::remove_file(path);
    let what = || format!("cannot listen on {}", path.display());
    let listener = UnixListener::bind(path).map_err(RigError::host(what()))?;
    listener.set_nonblocking(true).map_err(RigError::host(what()))?;
    Ok(listener)
}

pub(crate) fn accept(listener: &UnixListener, vmm: &mut Vmm) -> Result<UnixStream, RigError> {
    let stream = until(START_TIMEOUT, "the VMM", || match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => vmm.check().map(|()| None),
        Err(error) => Err(RigError::host("cannot accept QEMU's connection")(error)),
    })?;
    stream.set_nonblocking(false).map_err(RigError::host("cannot use QEMU's connection"))?;
    Ok(stream)
}

fn connect(path: &Path, vmm: &mut Vmm) -> Result<Qmp, RigError> {
    until(START_TIMEOUT, "QEMU's monitor", || {
        vmm.check()?;
        Ok(if path.exists() { Qmp::connect(path).ok() } else { None })
    })
}

fn until<T>(
    timeout: Duration,
    what: &str,
    mut attempt: impl FnMut() -> Result<Option<T>, RigError>,
) -> Result<T, RigError> {
    let start: Instant = now();
    loop {
        if let Some(found) = attempt()? {
            return Ok(found);
        }
        if now().duration_since(start) >= timeout {
            return Err(RigError::Timeout { what: what.to_owned(), after_ms: timeout.as_millis() });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
