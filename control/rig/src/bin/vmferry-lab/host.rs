//! One lab host: a QEMU whose emulated hardware has everything that the build machine lacks.
//!
//! Its console goes to one file and its results to another, so that a kernel's words never tear a result.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmferry_rig::{Assets, DISK_BLOCK_BYTES, RigError, create_disk};

use crate::image::LabFiles;
use crate::pulse::Pulse;
use crate::{clock, host_error};

const RAM_MIB: u32 = 2048;
/// One. With two, 4 of 80 moves of a guest with two virtual CPUs ended in a guest or a host that was wrecked; with one, none
/// of 170. What one CPU does to the other while that enters a nested guest is most likely what [`Pulse`] tells of. Two hosts
/// on two cores are faster so, too.
const CPUS: u32 = 1;
/// The nvme's size in blocks whose every word says where it is.
const NVME_BLOCKS: u64 = (4 << 20) / DISK_BLOCK_BYTES as u64;
/// Lines of a console that explain a failure.
const LAST_WORDS_LINES: usize = 40;

/// What a host is booted for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mode<'a> {
    /// To run the plan, each test within this time.
    Tests(Duration),
    /// For a person at this terminal.
    Terminal,
    /// For a person who comes by this UNIX socket.
    Socket(&'a Path),
}

/// Whether a host has ended.
pub(crate) enum Ended {
    No,
    ByItself,
    /// It wrote nothing for too long.
    Silent,
}

/// A running host; dropping it ends it.
pub(crate) struct LabHost {
    name: &'static str,
    child: Child,
    results: PathBuf,
    console: PathBuf,
    read: u64,
    part: String,
    heard_at: Instant,
    _pulse: Pulse,
}

impl LabHost {
    pub(crate) fn boot(
        name: &'static str,
        files: &LabFiles,
        image: &Path,
        folder: &Path,
        mode: Mode<'_>,
    ) -> Result<LabHost, RigError> {
        let file = |kind: &str| folder.join(format!("{name}.{kind}"));
        let (results, console, nvme) = (file("results"), file("console"), file("nvme"));
        create_disk(&nvme, NVME_BLOCKS)
            .map_err(|source| host_error("cannot write the nvme's disk", source))?;
        let mut command = Command::new(Assets::find_qemu()?);
        command
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
                "-accel",
                "tcg,thread=multi",
            ])
            .args(["-machine", "q35", "-cpu", "max", "-smp", &CPUS.to_string(), "-m", &format!("{RAM_MIB}M")])
            .args(["-device", "intel-iommu,intremap=off,caching-mode=on"])
            .args(["-device", "pcie-root-port,id=rp1,slot=1", "-device", "igb,bus=rp1,mac=52:54:00:79:00:01"])
            .arg("-drive")
            .arg(format!("file={},format=raw,if=none,id=nvme0", nvme.display()))
            .args(["-device", "nvme,drive=nvme0,serial=lab", "-device", "edu"])
            .args(network(name, folder))
            .arg("-kernel")
            .arg(&files.kernel)
            .arg("-initrd")
            .arg(image)
            .args(["-append", &kernel_words(name, mode)]);
        match mode {
            Mode::Tests(_) => command
                .arg("-serial")
                .arg(format!("file:{}", console.display()))
                .stdin(Stdio::null())
                .stdout(Stdio::null()),
            Mode::Terminal => command.args(["-serial", "mon:stdio"]),
            Mode::Socket(path) => command
                .arg("-serial")
                .arg(format!("unix:{},server=on,wait=off", path.display()))
                .stdin(Stdio::null())
                .stdout(Stdio::null()),
        };
        // Before QEMU: what fails from here on leaves no process behind.
        let pulse = Pulse::into(&lan(name, folder))?;
        let errors =
            File::create(file("errors")).map_err(|source| host_error("cannot write a log", source))?;
        let child = command.arg("-serial").arg(format!("file:{}", results.display())).stderr(errors).spawn();
        let child = child.map_err(|source| host_error("cannot start QEMU", source))?;
        Ok(LabHost {
            name,
            child,
            results,
            console,
            read: 0,
            part: String::new(),
            heard_at: clock(),
            _pulse: pulse,
        })
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// The whole lines that came since the last call.
    pub(crate) fn lines(&mut self) -> Result<Vec<String>, RigError> {
        let what = "cannot read a lab host's results";
        let mut file = match File::open(&self.results) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(host_error(what, error)),
        };
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(self.read)).map_err(|source| host_error(what, source))?;
        file.read_to_end(&mut bytes).map_err(|source| host_error(what, source))?;
        self.read += bytes.len() as u64;
        if !bytes.is_empty() {
            self.heard_at = clock();
        }
        self.part.push_str(&String::from_utf8_lossy(&bytes));
        let end = self.part.rfind('\n').map_or(0, |at| at + 1);
        let rest = self.part.split_off(end);
        let whole = std::mem::replace(&mut self.part, rest);
        Ok(whole.lines().map(|line| line.trim_end().to_owned()).collect())
    }

    pub(crate) fn ended(&mut self, silence_max: Duration) -> Ended {
        match self.child.try_wait() {
            Ok(None) if self.heard_at.elapsed() > silence_max => Ended::Silent,
            Ok(None) => Ended::No,
            Ok(Some(_)) | Err(_) => Ended::ByItself,
        }
    }

    /// The end of what it wrote on its console, and QEMU's own errors.
    pub(crate) fn last_words(&self) -> String {
        let read =
            |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
        let text = read(&self.console) + &read(&self.console.with_extension("errors"));
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LAST_WORDS_LINES)..].join("\n")
    }

    /// Until it powers off.
    pub(crate) fn wait(mut self) -> Result<bool, RigError> {
        self.child.wait().map(|_| true).map_err(|source| host_error("cannot wait for QEMU", source))
    }
}

impl Drop for LabHost {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A host's end of that network: a datagram socket.
fn lan(name: &str, folder: &Path) -> PathBuf {
    folder.join(format!("{name}.lan"))
}

/// The network between the two hosts.
fn network(name: &str, folder: &Path) -> [String; 4] {
    let (other, number) = if name == "a" { ("b", 1) } else { ("a", 2) };
    [
        "-netdev".to_owned(),
        format!(
            "dgram,id=lan,local.type=unix,local.path={},remote.type=unix,remote.path={}",
            lan(name, folder).display(),
            lan(other, folder).display()
        ),
        "-device".to_owned(),
        format!("virtio-net-pci,netdev=lan,mac=52:54:00:78:00:0{number}"),
    ]
}

fn kernel_words(name: &str, mode: Mode<'_>) -> String {
    let (mode, limit) = match mode {
        Mode::Tests(limit) => ("tests", limit.as_secs()),
        Mode::Terminal | Mode::Socket(_) => ("shell", 0),
    };
    format!(
        "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic softlockup_panic=0 intel_iommu=on nokaslr mitigations=off audit=0 \
         tsc=reliable no_timer_check random.trust_cpu=on lab.host={name} lab.mode={mode} lab.limit={limit}"
    )
}
