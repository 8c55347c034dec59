//! Taking CPU time away from a guest, by the cgroup CPU controller.
//!
//! The threads of the guest's processors move into a child `vmferry-PID` of the group that they are in, and that
//! child gets a quota; lifting moves them back and removes the child. Both versions of cgroups work so: in version
//! 2 the child is threaded. The VMM's other threads keep their time, so its monitor stays quick. What must never
//! happen: a brake that nobody lifts; the child's name alone is enough to find it again after a `kill -9`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::GuestError;

/// Short, so that a braked guest stutters little.
const PERIOD_US: u64 = 10_000;
/// Strong brakes need a longer period: the kernel refuses quotas under 1 ms.
const LONG_PERIOD_US: u64 = 100_000;
/// The kernel's smallest quota.
const QUOTA_US_MIN: u64 = 1_000;
/// The strongest brake; a guest that stands altogether is paused, not braked.
const PERCENT_MAX: u8 = 99;

/// The brake of one VMM.
#[derive(Debug)]
pub(crate) struct Throttle {
    vmm: i32,
    threads: Vec<i32>,
    on: bool,
}

impl Throttle {
    /// For the processors of `vmm`.
    pub(crate) fn of(vmm: i32, threads: Vec<i32>) -> Throttle {
        Throttle { vmm, threads, on: false }
    }

    /// Takes `percent` of their time away; 0 gives it back.
    pub(crate) fn set(&mut self, percent: u8) -> Result<(), GuestError> {
        if percent == 0 {
            if std::mem::take(&mut self.on) {
                self.lift()?;
            }
            return Ok(());
        }
        self.on = true;
        let braked = self.brake(percent.min(PERCENT_MAX));
        if braked.is_err() {
            self.on = false;
            let _ = self.lift();
        }
        braked
    }

    /// Lifts what a vmferry that died has left on.
    pub(crate) fn rescue(&self) -> Result<(), GuestError> {
        self.lift()
    }

    fn child_name(&self) -> String {
        format!("vmferry-{}", self.vmm)
    }

    fn brake(&self, percent: u8) -> Result<(), GuestError> {
        for (home, threads) in self.homes()? {
            let child = home.folder.join(self.child_name());
            home.version.make(&home.folder, &child).map_err(|error| refused(&home.folder, error))?;
            let limit = Limit::of(percent, threads.len(), home.version.quota(&home.folder));
            home.version.limit(&child, limit).map_err(|error| refused(&child, error))?;
            for thread in threads {
                home.version.put(&child, thread).map_err(|error| refused(&child, error))?;
            }
        }
        Ok(())
    }

    fn lift(&self) -> Result<(), GuestError> {
        for (home, _) in self.homes()? {
            let child = home.folder.join(self.child_name());
            if !child.exists() {
                continue;
            }
            let listed = fs::read_to_string(child.join(home.version.threads_file())).unwrap_or_default();
            for thread in listed.split_whitespace().filter_map(|word| word.parse().ok()) {
                home.version.put(&home.folder, thread).map_err(|error| refused(&home.folder, error))?;
            }
            home.version.remove(&home.folder, &child).map_err(|error| refused(&child, error))?;
        }
        Ok(())
    }

    /// The groups that the threads are in when they are not braked.
    fn homes(&self) -> Result<BTreeMap<Home, Vec<i32>>, GuestError> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut homes: BTreeMap<Home, Vec<i32>> = BTreeMap::new();
        for thread in &self.threads {
            // A thread that ended meanwhile needs no brake.
            let Ok(groups) = fs::read_to_string(format!("/proc/{}/task/{thread}/cgroup", self.vmm)) else {
                continue;
            };
            let mut home = find_home(&mounts, &groups).ok_or_else(no_controller)?;
            if home.folder.file_name().is_some_and(|name| name.to_string_lossy() == self.child_name()) {
                home.folder.pop();
            }
            homes.entry(home).or_default().push(*thread);
        }
        Ok(homes)
    }
}

fn no_controller() -> GuestError {
    GuestError::mistake(
        "the guest cannot be throttled: the CPU controller of cgroups is not mounted, or not enabled for the VMM's \
         group (systemd: Delegate=cpu or CPUAccounting=yes on its unit); use --on-no-converge abort or force",
    )
}

fn refused(folder: &Path, error: io::Error) -> GuestError {
    GuestError::HostRefused {
        what: format!(
            "the guest cannot be throttled: {} cannot be changed; run vmferry as root and outside of a container, or \
             use --on-no-converge abort or force",
            folder.display()
        ),
        source: error,
    }
}

/// A quota and its period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit {
    quota_us: u64,
    period_us: u64,
}

impl Limit {
    /// What `threads` threads may have under a brake, inside of what their group may have anyway.
    fn of(percent: u8, threads: usize, group: Option<Limit>) -> Limit {
        let left = u64::from(100 - percent.min(PERCENT_MAX));
        let period_us = if left < 10 { LONG_PERIOD_US } else { PERIOD_US };
        let threads = u64::try_from(threads).unwrap_or(u64::MAX);
        let whole = match group {
            Some(group) => {
                (group.quota_us * period_us / group.period_us.max(1)).min(threads.saturating_mul(period_us))
            }
            None => threads.saturating_mul(period_us),
        };
        Limit { quota_us: (whole * left / 100).max(QUOTA_US_MIN), period_us }
    }
}

/// A group with the CPU controller.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Home {
    folder: PathBuf,
    version: Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Version {
    One,
    Two,
}

impl Version {
    fn threads_file(self) -> &'static str {
        match self {
            Version::One => "tasks",
            Version::Two => "cgroup.threads",
        }
    }

    fn make(self, folder: &Path, child: &Path) -> io::Result<()> {
        if !child.exists() {
            fs::create_dir(child)?;
        }
        if self == Version::Two && !child.join("cpu.max").exists() {
            fs::write(child.join("cgroup.type"), "threaded")?;
            fs::write(folder.join("cgroup.subtree_control"), "+cpu")?;
        }
        Ok(())
    }

    /// Removes an empty child; in version 2 the controller goes with the last one.
    fn remove(self, folder: &Path, child: &Path) -> io::Result<()> {
        fs::remove_dir(child)?;
        let has_children = fs::read_dir(folder)?.flatten().any(|entry| entry.path().is_dir());
        if self == Version::Two && !has_children {
            fs::write(folder.join("cgroup.subtree_control"), "-cpu")?;
        }
        Ok(())
    }

    fn put(self, group: &Path, thread: i32) -> io::Result<()> {
        match fs::write(group.join(self.threads_file()), thread.to_string()) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    fn limit(self, child: &Path, limit: Limit) -> io::Result<()> {
        let Limit { quota_us, period_us } = limit;
        match self {
            Version::One => {
                fs::write(child.join("cpu.cfs_period_us"), period_us.to_string())?;
                fs::write(child.join("cpu.cfs_quota_us"), quota_us.to_string())
            }
            Version::Two => fs::write(child.join("cpu.max"), format!("{quota_us} {period_us}")),
        }
    }

    /// What the group itself may have; nothing when it is not limited.
    fn quota(self, folder: &Path) -> Option<Limit> {
        let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
        let (quota, period) = match self {
            Version::One => (read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?),
            Version::Two => {
                let (quota, period) =
                    read("cpu.max")?.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()))?;
                (quota, period)
            }
        };
        Some(Limit { quota_us: quota.trim().parse().ok()?, period_us: period.trim().parse().ok()? })
    }
}

/// The group with the CPU controller of a thread whose `/proc/…/cgroup` says `groups`.
fn find_home(mounts: &str, groups: &str) -> Option<Home> {
    let path_of = |wanted: fn(&str) -> bool| {
        groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let controllers = parts.next()?;
            wanted(controllers).then(|| parts.next().unwrap_or("/").to_owned())
        })
    };
    let has_cpu = |names: &str| names.split(',').any(|name| name == "cpu");
    if let Some(path) = path_of(|controllers| controllers.split(',').any(|name| name == "cpu"))
        && let Some(folder) = folder(mounts, &path, |kind, options| kind == "cgroup" && has_cpu(options))
    {
        return Some(Home { folder, version: Version::One });
    }
    let path = path_of(str::is_empty)?;
    let folder = folder(mounts, &path, |kind, _| kind == "cgroup2")?;
    let controllers = fs::read_to_string(folder.join("cgroup.controllers")).unwrap_or_default();
    controllers.split_whitespace().any(|name| name == "cpu").then_some(Home { folder, version: Version::Two })
}

/// `36 35 0:30 /in/hierarchy /mount/point rw - cgroup2 cgroup2 rw,options`
fn folder(mounts: &str, path: &str, wanted: impl Fn(&str, &str) -> bool) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let mut kind = kind.split(' ');
        if !wanted(kind.next()?, kind.nth(1)?) {
            return None;
        }
        let mut place = place.split(' ').skip(3);
        let (root, point) = (place.next()?, place.next()?);
        let below = Path::new(path).strip_prefix(root).ok()?;
        Some(Path::new(point).join(below))
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const MOUNTS: &str = "25 20 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
        26 25 0:23 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
        27 25 0:24 /pod7 /mnt/two rw - cgroup2 cgroup2 rw,nsdelegate\n";

    #[test]
    fn the_controller_of_version_1_is_found_by_its_name() {
        let home = find_home(MOUNTS, "4:memory:/m\n3:cpu,cpuacct:/machine/a\n0::/pod7/b\n").unwrap();
        assert_eq!(home.folder, Path::new("/sys/fs/cgroup/cpu,cpuacct/machine/a"));
        assert_eq!(home.version, Version::One);
    }

    #[test]
    fn a_mounts_own_root_is_taken_off() {
        let found = folder(MOUNTS, "/pod7/vm", |kind, _| kind == "cgroup2");
        assert_eq!(found.unwrap(), Path::new("/mnt/two/vm"));
        assert_eq!(folder(MOUNTS, "/elsewhere", |kind, _| kind == "cgroup2"), None);
    }

    #[test]
    fn a_limit_is_a_share_of_what_the_group_has() {
        assert_eq!(Limit::of(30, 2, None), Limit { quota_us: 14_000, period_us: 10_000 });
        assert_eq!(Limit::of(99, 1, None), Limit { quota_us: 1_000, period_us: 100_000 });
        let group = Limit { quota_us: 50_000, period_us: 100_000 };
        assert_eq!(Limit::of(50, 2, Some(group)), Limit { quota_us: 2_500, period_us: 10_000 });
        assert!(Limit::of(255, 1, None).quota_us >= QUOTA_US_MIN);
    }

    fn cpu_ticks(pid: u32) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let words: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        words[11].parse::<u64>().unwrap() + words[12].parse::<u64>().unwrap()
    }

    #[test]
    fn a_braked_process_gets_its_share_and_lifting_leaves_nothing() {
        let mut busy = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let pid = i32::try_from(busy.id()).unwrap();
        let mut throttle = Throttle::of(pid, vec![pid]);
        if let Err(why) = throttle.set(80) {
            vmferry_rig::skip(&why);
        } else {
            let home = throttle.homes().unwrap().into_keys().next().unwrap().folder;
            let before = cpu_ticks(busy.id());
            std::thread::sleep(std::time::Duration::from_millis(1500));
            let ticks = cpu_ticks(busy.id()) - before;
            // 20 % of 150 ticks of 10 ms is 30; a busy machine only makes it fewer.
            assert!(ticks <= 45, "{ticks} ticks");
            // Another instance, as after a kill -9, finds and lifts it.
            Throttle::of(pid, vec![pid]).rescue().unwrap();
            assert!(!home.join(throttle.child_name()).exists());
            throttle.set(0).unwrap();
        }
        busy.kill().unwrap();
        busy.wait().unwrap();
    }
}
