//! Where QEMU, the guest kernel and the guest's init are.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::RigError;

/// The guest's init, a binary of this crate.
const INIT_NAME: &str = "vmferry-guest-init";
/// What `scripts/setup` unpacks beside the kernel, in the order in which it must be loaded.
const MODULES: [&str; 6] =
    ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"];

/// What a guest with a failover pair loads, in this order; its virtio bus is built in.
const FAILOVER_MODULES: [&str; 5] = ["failover", "net_failover", "virtio_net", "e1000e", "igbvf"];

/// All that it takes to boot a guest.
#[derive(Debug, Clone)]
pub struct Assets {
    /// `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// What the guest itself is made of.
    pub guest: GuestFiles,
}

/// What a Linux guest is made of, whatever runs it.
#[derive(Debug, Clone)]
pub struct GuestFiles {
    /// A Linux kernel image.
    pub kernel: PathBuf,
    /// Kernel modules for a virtio disk, in load order; empty where the kernel has none.
    pub modules: Vec<PathBuf>,
    /// The init program that runs the workload.
    pub init: PathBuf,
}

impl Assets {
    /// Looks for everything; the error says what is missing and how to get it.
    pub fn find() -> Result<Self, RigError> {
        Ok(Self { qemu: Self::find_qemu()?, guest: GuestFiles::find()? })
    }

    /// The same with the lab's generic kernel, whose guests have `net_failover` and a driver for e1000e NICs; the test
    /// kernel of `scripts/setup` has neither.
    pub fn find_failover() -> Result<Self, RigError> {
        Ok(Self { qemu: Self::find_qemu()?, guest: GuestFiles::find_generic(&FAILOVER_MODULES)? })
    }

    /// `$VMFERRY_QEMU`, or `qemu-system-x86_64` of the path.
    pub fn find_qemu() -> Result<PathBuf, RigError> {
        let given = std::env::var_os("VMFERRY_QEMU").map(PathBuf::from);
        given.or_else(|| in_path(OsStr::new("qemu-system-x86_64"))).ok_or_else(|| {
            RigError::Missing(
                "qemu-system-x86_64 is not installed: run 'scripts/setup', or set VMFERRY_QEMU".to_owned(),
            )
        })
    }
}

impl GuestFiles {
    /// Looks for everything; the error says what is missing and how to get it.
    pub fn find() -> Result<Self, RigError> {
        let folder = cache_folder().join("guest");
        let kernel = folder.join("vmlinuz");
        if !kernel.is_file() {
            let fix =
                "no guest kernel in the cache: run 'scripts/setup', or set VMFERRY_CACHE to where it ran";
            return Err(RigError::Missing(fix.to_owned()));
        }
        let modules = MODULES.iter().map(|name| folder.join(format!("modules/{name}.ko")));
        let modules = modules.filter(|path| path.is_file()).collect();
        Ok(Self { kernel, modules, init: find_init()? })
    }

    /// With the lab's generic kernel and these of its modules. It finds its processors by the table that the micro-VM writes
    /// for it, which the test kernel of `scripts/setup` does not read.
    pub(crate) fn find_generic(modules: &[&str]) -> Result<Self, RigError> {
        let folder = cache_folder().join("lab");
        let kernel = folder.join("vmlinuz");
        let modules: Vec<PathBuf> =
            modules.iter().map(|name| folder.join(format!("modules/{name}.ko"))).collect();
        if let Some(missing) = [&kernel].into_iter().chain(&modules).find(|file| !file.is_file()) {
            return Err(RigError::Missing(format!(
                "{} is missing: run 'scripts/lab setup', or set VMFERRY_CACHE to where it ran",
                missing.display()
            )));
        }
        Ok(Self { kernel, modules, init: find_init()? })
    }
}

fn in_path(name: &OsStr) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Where `scripts/setup` and `scripts/lab setup` keep what they fetched: `$VMFERRY_CACHE`, or `~/.cache/vmferry`.
#[must_use]
pub fn cache_folder() -> PathBuf {
    let given = std::env::var_os("VMFERRY_CACHE").map(PathBuf::from);
    given
        .unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache/vmferry"))
}

fn find_init() -> Result<PathBuf, RigError> {
    std::env::var_os("VMFERRY_GUEST_INIT")
        .map_or_else(|| find_program(INIT_NAME), |given| Ok(PathBuf::from(given)))
}

/// A program of this crate: next to the running program, one folder up (a test lies in `deps`), or in the workspace's
/// target folder.
pub(crate) fn find_program(name: &str) -> Result<PathBuf, RigError> {
    let program = std::env::current_exe().unwrap_or_default();
    let beside = program.ancestors().skip(1).take(2).map(Path::to_path_buf);
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
    let built = ["release", "debug"].map(|profile| workspace.join(profile));
    let found = beside.chain(built).map(|folder| folder.join(name)).find(|file| file.is_file());
    found.ok_or_else(|| RigError::Missing(format!("'{name}' is not built: run 'cargo build -p vmferry-rig'")))
}
