//! Failover: what it takes for a device that cannot migrate to leave its guest and come back.

use super::host::{Host, names};
use super::{Finding, Verdict, finding, read};

pub(super) fn row(host: &Host) -> Finding {
    let kernel = if host.sys("module/net_failover").exists() {
        "net_failover is loaded".to_owned()
    } else if has_module("net_failover") {
        "net_failover is in this kernel".to_owned()
    } else {
        "no net_failover in this kernel".to_owned()
    };
    let pairs = masters(host);
    let found = if pairs.is_empty() {
        kernel
    } else {
        format!("{kernel}; pairs of this machine: {}", pairs.join(", "))
    };
    finding(
        "failover",
        Verdict::Good,
        found,
        "needed inside the guest: send --failover auto asks it for its primary and moves it over its standby",
    )
}

/// Interfaces of this machine that are pairs, when it is a guest itself.
fn masters(host: &Host) -> Vec<String> {
    let folder = host.sys("class/net");
    let lower = |name: &String| {
        let below = names(&folder.join(name));
        below.iter().filter_map(|file| file.strip_prefix("lower_").map(str::to_owned)).collect::<Vec<_>>()
    };
    let is_virtio =
        |name: &String| super::host::linked(&folder.join(name).join("device/driver")) == "virtio_net";
    let masters = names(&folder).into_iter().filter(|name| is_virtio(name) && !lower(name).is_empty());
    masters.map(|name| format!("{name} over {}", lower(&name).join(" and "))).collect()
}

fn has_module(name: &str) -> bool {
    let release = read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let folder = format!("/lib/modules/{release}");
    ["modules.dep", "modules.builtin"]
        .into_iter()
        .filter_map(|list| read(&format!("{folder}/{list}")))
        .any(|text| text.contains(&format!("/{name}.ko")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::host::tree::file;
    use super::*;

    #[test]
    fn a_guests_own_pair_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let host = Host::in_folder(folder.path());
        assert!(!row(&host).found.contains("pairs"));
        file(folder.path(), "sys/module/net_failover/refcnt", "1");
        for lower in ["lower_eth1", "lower_eth2"] {
            file(folder.path(), &format!("sys/class/net/eth0/{lower}/x"), "");
        }
        file(folder.path(), "sys/class/net/eth0/device/x", "");
        symlink("../../drivers/virtio_net", folder.path().join("sys/class/net/eth0/device/driver")).unwrap();
        assert_eq!(
            row(&host).found,
            "net_failover is loaded; pairs of this machine: eth0 over eth1 and eth2"
        );
    }
}
