//! What a test needs and a machine may lack: said aloud, counted, never passed over in silence.

use std::io::Write;
use std::path::PathBuf;

use crate::RigError;

/// Gives what a test needs, or prints `SKIP <test>: <why>` and returns from the test.
///
/// ```ignore
/// let assets = require!(Assets::find());
/// require!(vmferry_rig::root());
/// ```
#[macro_export]
macro_rules! require {
    ($need:expr) => {
        match $need {
            Ok(thing) => thing,
            Err(why) => {
                $crate::skip(&why);
                return;
            }
        }
    };
}

/// Says that the running test skips and why; a line in the file that `VMFERRY_SKIPS` names lets a runner count it
/// where it captures what a passing test prints.
pub fn skip(why: &impl std::fmt::Display) {
    let thread = std::thread::current();
    let line = format!("SKIP {}: {why}\n", thread.name().unwrap_or("test"));
    let _ = std::io::stderr().write_all(line.as_bytes());
    let Some(path) = std::env::var_os("VMFERRY_SKIPS") else { return };
    if let Ok(mut file) = std::fs::OpenOptions::new().append(true).create(true).open(path) {
        let _ = file.write_all(line.as_bytes());
    }
}

/// Attaching to another process and cgroups need root here.
pub fn root() -> Result<(), RigError> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(RigError::Missing("this needs root (ptrace of another process): run it as root".to_owned()))
}

/// At least `count` free huge pages of 2 MiB, and the folder where a hugetlbfs is mounted.
pub fn huge_pages(count: u64) -> Result<PathBuf, RigError> {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free =
        std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
    if free < count {
        let fix =
            format!("only {free} huge pages of 2 MiB are free: run 'sysctl vm.nr_hugepages={count}' as root");
        return Err(RigError::Missing(fix));
    }
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let folder = mounts.lines().find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        (words.get(2) == Some(&"hugetlbfs")).then(|| words.get(1).map(PathBuf::from)).flatten()
    });
    folder.ok_or_else(|| {
        let fix = "no hugetlbfs is mounted: run 'mount -t hugetlbfs none /dev/hugepages' as root";
        RigError::Missing(fix.to_owned())
    })
}
