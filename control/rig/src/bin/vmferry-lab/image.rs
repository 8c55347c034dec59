//! The lab host's first file system: busybox, modules, tools, verbs providers, our programs and the plan.

use std::path::{Path, PathBuf};
use std::process::Command;

use vmferry_rig::{Assets, Image, RigError};

use crate::host_error;
use crate::plan::Plan;
use crate::tests::TestBinary;

/// Tools that the init and the tests call, and where the lab has them.
const TOOLS: [(&str, &[&str]); 5] = [
    ("/sbin/ip", &["/usr/sbin/ip", "/sbin/ip", "/bin/ip"]),
    ("/sbin/rdma", &["/usr/bin/rdma", "/sbin/rdma", "/usr/sbin/rdma"]),
    ("/bin/ibv_devinfo", &["/usr/bin/ibv_devinfo"]),
    // What counts instructions: the launcher, which Debian wraps in a script, and the tool that it starts.
    ("/bin/valgrind", &["/usr/bin/valgrind.bin"]),
    ("/usr/libexec/valgrind/callgrind-amd64-linux", &["/usr/libexec/valgrind/callgrind-amd64-linux"]),
];
/// What the tool maps into the program, and reads.
const VALGRIND: &str = "/usr/libexec/valgrind";
const VALGRIND_FILES: [&str; 2] = ["vgpreload_core-amd64-linux.so", "default.supp"];
/// Verbs providers, which libibverbs loads by itself.
const PROVIDERS: &str = "/usr/lib/x86_64-linux-gnu/libibverbs";
const PROVIDER_NAMES: &str = "/etc/libibverbs.d";
/// Programs of the workspace that tests start.
const PROGRAMS: [&str; 5] =
    ["vmferry", "vmferry-bench", "vmferry-guest-init", "vmferry-second-writer", "vmferry-commanded-writer"];

/// Lab tests that boot guests in a QEMU on the lab's KVM. It is big, so other plans do without.
const NEEDS_QEMU: &str = "lab_qemu";
/// What QEMU reads when it starts, where its package has it.
const FIRMWARE: [&str; 3] =
    ["/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/kvmvapic.bin", "/usr/share/qemu/linuxboot_dma.bin"];

/// What `scripts/lab setup` prepared.
pub(crate) struct LabFiles {
    /// The cache folder.
    pub(crate) cache: PathBuf,
    /// The lab host's kernel.
    pub(crate) kernel: PathBuf,
}

impl LabFiles {
    pub(crate) fn find() -> Result<LabFiles, RigError> {
        let cache = vmferry_rig::cache_folder();
        let kernel = cache.join("lab/vmlinuz");
        if !kernel.is_file() {
            return Err(RigError::Missing("there is no lab yet: run 'scripts/lab setup'".into()));
        }
        Ok(LabFiles { cache, kernel })
    }
}

/// Writes the file system; `folder` takes it and the stripped programs.
pub(crate) fn build(
    files: &LabFiles,
    plan: &Plan,
    binaries: &[TestBinary],
    folder: &Path,
) -> Result<PathBuf, RigError> {
    let mut image = Image::new();
    image.console();
    image.folder("/lab/bin");
    image.program("/bin/busybox", &first_of(&["/bin/busybox", "/usr/bin/busybox"])?)?;
    image.content("/init", include_bytes!("../../../../../scripts/lab-init"));
    image.content("/lab/plan", plan.to_string().as_bytes());
    for (path, places) in TOOLS {
        image.program(path, &first_of(places)?)?;
    }
    add_folder(&mut image, &files.cache.join("lab/modules"), "/lab/modules")?;
    add_folder(&mut image, &files.cache.join("guest"), "/lab/cache/guest")?;
    add_folder(&mut image, &files.cache.join("guest/modules"), "/lab/cache/guest/modules")?;
    if plan.names(NEEDS_QEMU) {
        add_qemu(&mut image)?;
    }
    // A guest's kernel is the host's, and its modules are (the init links them).
    image.file("/lab/cache/lab/vmlinuz", &files.kernel)?;
    add_verbs(&mut image)?;
    for name in VALGRIND_FILES {
        let path = format!("{VALGRIND}/{name}");
        image.file(&path, &first_of(&[&path])?)?;
    }
    add_programs(&mut image, plan, binaries, folder)?;
    let path = folder.join("lab.cpio");
    std::fs::write(&path, image.finish())
        .map_err(|source| host_error("cannot write the lab's file system (is the disk full?)", source))?;
    Ok(path)
}

fn first_of(places: &[&str]) -> Result<PathBuf, RigError> {
    let found = places.iter().map(PathBuf::from).find(|path| path.is_file());
    found.ok_or_else(|| RigError::Missing(format!("{} is not installed: run 'scripts/setup'", places[0])))
}

/// The plain files of a folder.
fn add_folder(image: &mut Image, from: &Path, to: &str) -> Result<(), RigError> {
    image.folder(to);
    let entries = std::fs::read_dir(from)
        .map_err(|source| host_error(&format!("cannot read {}", from.display()), source))?;
    for entry in entries.flatten().filter(|entry| entry.path().is_file()) {
        image.file(&format!("{to}/{}", entry.file_name().to_string_lossy()), &entry.path())?;
    }
    Ok(())
}

fn add_qemu(image: &mut Image) -> Result<(), RigError> {
    image.program("/bin/qemu-system-x86_64", &Assets::find_qemu()?)?;
    for file in FIRMWARE {
        image.file(file, &first_of(&[file])?)?;
    }
    Ok(())
}

fn add_verbs(image: &mut Image) -> Result<(), RigError> {
    add_folder(image, Path::new(PROVIDERS), PROVIDERS)?;
    add_folder(image, Path::new(PROVIDER_NAMES), PROVIDER_NAMES)?;
    let providers =
        std::fs::read_dir(PROVIDERS).map_err(|source| host_error("cannot read providers", source))?;
    for provider in providers.flatten() {
        image.libraries_of(&provider.path())?;
    }
    Ok(())
}

/// Our programs, without their debug information: an emulated host unpacks slowly.
fn add_programs(
    image: &mut Image,
    plan: &Plan,
    binaries: &[TestBinary],
    folder: &Path,
) -> Result<(), RigError> {
    let beside = std::env::current_exe().map_err(|source| host_error("cannot find this program", source))?;
    let beside = beside.parent().unwrap_or(Path::new("/")).to_path_buf();
    let programs = PROGRAMS.iter().map(|name| ((*name).to_owned(), beside.join(name)));
    let tests = binaries.iter().filter(|binary| plan.names(&binary.name));
    for (name, file) in programs.chain(tests.map(|binary| (binary.name.clone(), binary.file.clone()))) {
        let stripped = folder.join(&name);
        let status = Command::new("strip").args(["-s", "-o"]).arg(&stripped).arg(&file).status();
        let status = status.map_err(|source| host_error("cannot run strip (package binutils)", source))?;
        if !status.success() {
            return Err(RigError::Missing(format!("strip of {} failed: see above", file.display())));
        }
        image.program(&format!("/lab/bin/{name}"), &stripped)?;
        let _ = std::fs::remove_file(&stripped);
    }
    Ok(())
}
