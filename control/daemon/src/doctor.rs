//! `vmferry doctor`: what this host offers, and what vmferry will use of it.
//!
//! It changes nothing. Each row was read or tried just now; a row that could not be read says so.

mod failover;
mod host;
mod kvm;
mod rdma;
mod sriov;
mod vfio;

use std::fs;
use std::path::Path;

use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use serde::Serialize;

use host::Host;

/// How a row bears on a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Used as it is.
    Good,
    /// A move works without it, slower or with less.
    Without,
    /// A move from or to this host fails until this is mended.
    Blocks,
}

/// One row of the doctor's table.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub part: &'static str,
    /// What was found.
    pub found: String,
    /// What vmferry does with it, or how to mend it.
    pub consequence: String,
    /// How it bears on a move.
    pub verdict: Verdict,
}

fn finding(
    part: &'static str,
    verdict: Verdict,
    found: impl Into<String>,
    consequence: impl Into<String>,
) -> Finding {
    Finding { part, found: found.into(), consequence: consequence.into(), verdict }
}

/// Looks at everything.
#[must_use]
pub fn examine() -> Vec<Finding> {
    let mut findings = vec![kernel(), ring()];
    findings.extend([
        tracking(),
        soft_dirty(),
        ptrace(),
        aes(),
        seal(),
        memlock(),
        huge_pages(),
        numa(),
        isolation(),
    ]);
    let host = Host::this();
    findings.extend([kvm::row(&host), vfio::row(&host), vfio::iommufd_row(&host), sriov::row(&host)]);
    findings.extend([rdma::row(&host), qemu(), failover::row(&host), throttle()]);
    findings
}

/// The table for a person.
#[must_use]
pub fn to_table(findings: &[Finding]) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(["", "part", "found", "what vmferry does"]);
    for row in findings {
        let mark = match row.verdict {
            Verdict::Good => "ok",
            Verdict::Without => "-",
            Verdict::Blocks => "FIX",
        };
        table.add_row([mark, row.part, row.found.as_str(), row.consequence.as_str()]);
    }
    table.to_string()
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn kernel() -> Finding {
    let release = read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into());
    finding(
        "kernel",
        Verdict::Good,
        release,
        "6.7 or newer tracks writes with PAGEMAP_SCAN; older ones with soft-dirty",
    )
}

fn ring() -> Finding {
    use io_uring::{IoUring, Probe, opcode};
    let part = "io_uring";
    let probe = IoUring::new(4).and_then(|ring| {
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        Ok(probe)
    });
    match probe {
        Ok(probe) => {
            let offered: Vec<&str> = [
                ("send", opcode::Send::CODE),
                ("recv", opcode::Recv::CODE),
                ("write-fixed", opcode::WriteFixed::CODE),
                ("read-fixed", opcode::ReadFixed::CODE),
                ("send-zc", opcode::SendZc::CODE),
            ]
            .into_iter()
            .filter(|(_, code)| probe.is_supported(*code))
            .map(|(name, _)| name)
            .collect();
            finding(
                part,
                Verdict::Good,
                offered.join(", "),
                "lanes: one ring each, registered buffers; send-zc only where a measurement wins",
            )
        }
        Err(error) => finding(
            part,
            Verdict::Blocks,
            error.to_string(),
            "allow it: sysctl kernel.io_uring_disabled=0, or the container's seccomp profile",
        ),
    }
}

fn tracking() -> Finding {
    match vmferry_guest::attach::kernel_support() {
        Ok(text) => {
            finding("PAGEMAP_SCAN", Verdict::Good, text, "dirty pages of a running guest, from outside")
        }
        Err(why) => {
            finding("PAGEMAP_SCAN", Verdict::Without, why, "soft-dirty instead, where the kernel has it")
        }
    }
}

/// Bit 55 of a fresh page's pagemap entry (Documentation/admin-guide/mm/soft-dirty.rst).
fn soft_dirty() -> Finding {
    match vmferry_guest::attach::soft_dirty_support() {
        true => finding("soft-dirty", Verdict::Good, "present", "the fallback for kernels before 6.7"),
        false => {
            finding("soft-dirty", Verdict::Without, "not in this kernel", "nothing where PAGEMAP_SCAN works")
        }
    }
}

fn ptrace() -> Finding {
    const CAP_SYS_PTRACE: u64 = 1 << 19;
    let capable = read("/proc/self/status")
        .and_then(|status| {
            status.lines().find_map(|l| l.strip_prefix("CapEff:").map(str::trim).map(str::to_owned))
        })
        .and_then(|hex| u64::from_str_radix(&hex, 16).ok())
        .is_some_and(|capabilities| capabilities & CAP_SYS_PTRACE != 0);
    let scope = read("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_else(|| "no yama".into());
    let found =
        format!("CAP_SYS_PTRACE {}, yama ptrace_scope {scope}", if capable { "held" } else { "missing" });
    match (capable, scope.as_str()) {
        (true, "3") => finding(
            "ptrace",
            Verdict::Blocks,
            found,
            "yama forbids every attach: sysctl kernel.yama.ptrace_scope=1 needs a reboot here",
        ),
        (true, _) => finding("ptrace", Verdict::Good, found, "attaches to any VMM for under a millisecond"),
        (false, "0" | "no yama") => finding(
            "ptrace",
            Verdict::Without,
            found,
            "attaches to VMMs of this user only; run as root for others",
        ),
        (false, _) => {
            finding("ptrace", Verdict::Blocks, found, "run vmferry send as root or with CAP_SYS_PTRACE")
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn aes() -> Finding {
    let has = [
        ("aes", std::arch::is_x86_feature_detected!("aes")),
        ("pclmulqdq", std::arch::is_x86_feature_detected!("pclmulqdq")),
        ("vaes", std::arch::is_x86_feature_detected!("vaes")),
        ("vpclmulqdq", std::arch::is_x86_feature_detected!("vpclmulqdq")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
    ];
    let found: Vec<&str> = has.iter().filter(|(_, yes)| *yes).map(|(name, _)| *name).collect();
    let verdict = if has[0].1 { Verdict::Good } else { Verdict::Without };
    finding("AES in the CPU", verdict, found.join(", "), "sealing; without aes it is ten times slower")
}

#[cfg(not(target_arch = "x86_64"))]
fn aes() -> Finding {
    finding(
        "AES in the CPU",
        Verdict::Without,
        "not looked at on this architecture",
        "sealing is measured below",
    )
}

fn seal() -> Finding {
    let (fastest, rates) = vmferry_datapath::fastest_provider();
    let found: Vec<String> =
        rates.iter().map(|(provider, rate)| format!("{provider} {rate:.1} GB/s")).collect();
    finding("AES-256-GCM, measured", Verdict::Good, found.join(", "), format!("lanes seal with {fastest}"))
}

fn memlock() -> Finding {
    use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
    let needed = u64::try_from(vmferry_datapath::limits::BUDGET_BYTES).unwrap_or(u64::MAX);
    match getrlimit(Resource::RLIMIT_MEMLOCK) {
        Ok((soft, _)) if soft == RLIM_INFINITY => {
            finding("memlock limit", Verdict::Good, "unlimited", "lane buffers are registered")
        }
        Ok((soft, _)) if soft >= needed => {
            finding("memlock limit", Verdict::Good, crate::report::human(soft), "lane buffers are registered")
        }
        Ok((soft, _)) => finding(
            "memlock limit",
            Verdict::Without,
            crate::report::human(soft),
            format!(
                "root is exempt; else 'ulimit -l {}' for registered buffers of every lane",
                needed / 1024
            ),
        ),
        Err(error) => finding("memlock limit", Verdict::Without, error.to_string(), "could not be read"),
    }
}

fn huge_pages() -> Finding {
    let mut sizes = Vec::new();
    for entry in fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let count = read(&format!("{}/nr_hugepages", entry.path().display())).unwrap_or_default();
        sizes.push(format!("{count} of {}", name.trim_start_matches("hugepages-")));
    }
    if sizes.is_empty() {
        return finding("huge pages", Verdict::Without, "none in this kernel", "guests on 4 KiB pages");
    }
    finding(
        "huge pages",
        Verdict::Good,
        sizes.join(", "),
        "guests on hugetlbfs are tracked by whole huge pages",
    )
}

fn numa() -> Finding {
    let nodes = read("/sys/devices/system/node/online").unwrap_or_else(|| "0".into());
    let cpus = read("/sys/devices/system/cpu/online").unwrap_or_else(|| "?".into());
    finding(
        "NUMA",
        Verdict::Good,
        format!("nodes {nodes}, CPUs {cpus}"),
        "name CPUs next to the NIC with --cpus",
    )
}

fn isolation() -> Finding {
    match read("/sys/devices/system/cpu/isolated").filter(|list| !list.is_empty()) {
        Some(list) => finding(
            "CPU isolation",
            Verdict::Good,
            list,
            "--cpus with isolated CPUs keeps lanes away from vCPUs",
        ),
        None => finding(
            "CPU isolation",
            Verdict::Without,
            "none",
            "lanes share CPUs with everything else; --cpus pins them",
        ),
    }
}

fn qemu() -> Finding {
    let version = std::process::Command::new("qemu-system-x86_64").arg("--version").output();
    match version {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout);
            finding(
                "QEMU",
                Verdict::Good,
                text.lines().next().unwrap_or("?").to_owned(),
                "guests and the demo",
            )
        }
        Err(_) => finding(
            "QEMU",
            Verdict::Without,
            "not installed",
            "the demo uses process guests; scripts/setup installs it",
        ),
    }
}

fn throttle() -> Finding {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        finding(
            "cgroup CPU controller",
            Verdict::Good,
            "v2",
            "--on-no-converge throttle slows the VMM's own group",
        )
    } else if Path::new("/sys/fs/cgroup/cpu").is_dir() {
        finding(
            "cgroup CPU controller",
            Verdict::Good,
            "v1",
            "--on-no-converge throttle slows the VMM's own group",
        )
    } else {
        finding(
            "cgroup CPU controller",
            Verdict::Without,
            "not mounted",
            "--on-no-converge throttle is refused",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_issue_has_a_row() {
        let findings = examine();
        for part in [
            "io_uring",
            "AES in the CPU",
            "KVM",
            "VFIO",
            "iommufd",
            "SR-IOV",
            "RDMA",
            "failover",
            "huge pages",
            "PAGEMAP_SCAN",
            "soft-dirty",
            "ptrace",
            "memlock limit",
            "NUMA",
            "CPU isolation",
        ] {
            assert!(findings.iter().any(|f| f.part == part), "{part}");
        }
        assert!(to_table(&findings).contains("lanes seal with"));
    }
}
