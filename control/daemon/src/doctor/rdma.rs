//! RDMA: devices, the state of their links, and the network interface behind each.

use super::host::{Host, names, text};
use super::{Finding, Verdict, finding};

pub(super) fn row(host: &Host) -> Finding {
    const PART: &str = "RDMA";
    let folder = host.sys("class/infiniband");
    let mut links: Vec<(String, bool)> = Vec::new();
    for device in names(&folder) {
        let ports = folder.join(&device).join("ports");
        for port in names(&ports) {
            let read = |file: &str| text(&ports.join(&port).join(file)).unwrap_or_else(|| "?".into());
            // The kernel writes `4: ACTIVE`.
            let state = read("state").rsplit(": ").next().unwrap_or("?").to_owned();
            let behind = text(&ports.join(&port).join("gid_attrs/ndevs/0"));
            let behind = behind.map_or_else(String::new, |interface| format!(" on {interface}"));
            let words = format!("{device}/{port}{behind}: {state}, {}", read("link_layer"));
            links.push((words, state == "ACTIVE"));
        }
    }
    if links.is_empty() {
        return finding(
            PART,
            Verdict::Without,
            "no device",
            "lanes over TCP; `rdma link add` makes one in software",
        );
    }
    let active = links.iter().filter(|(_, active)| *active).count();
    let found: Vec<&str> = links.iter().map(|(words, _)| words.as_str()).collect();
    let (verdict, consequence) = match (cfg!(feature = "rdma"), active) {
        (false, _) => {
            (Verdict::Without, "this vmferry was built without the feature rdma: lanes over TCP".to_owned())
        }
        (true, 0) => (Verdict::Without, "no link is active: lanes over TCP".to_owned()),
        (true, _) if !host.dev("infiniband/rdma_cm").exists() => (
            Verdict::Without,
            "no /dev/infiniband/rdma_cm: load rdma_ucm; until then lanes over TCP".to_owned(),
        ),
        (true, _) => (Verdict::Good, format!("lanes over rdma://HOST:PORT by {active} active links, sealed")),
    };
    finding(PART, verdict, found.join("; "), consequence)
}

#[cfg(test)]
mod tests {
    use super::super::host::tree::file;
    use super::*;

    #[test]
    fn links_are_named_with_state_and_interface() {
        let folder = tempfile::tempdir().unwrap();
        let host = Host::in_folder(folder.path());
        assert_eq!(row(&host).found, "no device");
        let port = "sys/class/infiniband/rxe0/ports/1";
        for (name, content) in
            [("state", "4: ACTIVE\n"), ("link_layer", "Ethernet\n"), ("gid_attrs/ndevs/0", "ve0\n")]
        {
            file(folder.path(), &format!("{port}/{name}"), content);
        }
        let before = row(&host);
        assert_eq!(
            (before.found.as_str(), before.verdict),
            ("rxe0/1 on ve0: ACTIVE, Ethernet", Verdict::Without)
        );
        file(folder.path(), "dev/infiniband/rdma_cm", "");
        let expected = if cfg!(feature = "rdma") { Verdict::Good } else { Verdict::Without };
        assert_eq!(row(&host).verdict, expected);
    }

    #[test]
    fn a_link_that_is_down_carries_no_lane() {
        let folder = tempfile::tempdir().unwrap();
        file(folder.path(), "sys/class/infiniband/mlx5_0/ports/1/state", "1: DOWN\n");
        let row = row(&Host::in_folder(folder.path()));
        assert!(row.found.contains("DOWN") && row.verdict == Verdict::Without, "{row:?}");
    }
}
