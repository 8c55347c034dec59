//! Numbered datagrams to the host on the wire, all the time; each that comes back is counted once.
//!
//! The interface is the one that nobody else owns: the failover master where there is a pair, else the only NIC. It is
//! looked for again and again, because a device that is plugged into a running guest may make a new master.

use std::collections::HashSet;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use vmferry_rig::{GUEST_ADDRESS, NetStatus, WIRE_ADDRESS, WIRE_PORT};

use crate::sys;

/// Two hundred frames a second: an outage of 5 ms shows.
const SEND_EVERY: Duration = Duration::from_millis(5);
/// So many turns of sending between two looks at the interfaces.
const LOOK_EVERY: u64 = 10;

/// What the sender and the reader have done.
#[derive(Debug, Default)]
pub(crate) struct NetCounters {
    quiet: AtomicBool,
    sent: AtomicU64,
    refused: AtomicU64,
    answered: AtomicU64,
}

impl NetCounters {
    pub(crate) fn status(&self) -> NetStatus {
        NetStatus {
            sent: self.sent.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
            answered: self.answered.load(Ordering::Relaxed),
        }
    }

    /// Sends nothing while quiet.
    pub(crate) fn set_quiet(&self, quiet: bool) {
        self.quiet.store(quiet, Ordering::Relaxed);
    }
}

/// Starts to send, where the command line asks for it.
pub(crate) fn start(command_line: &str) -> Arc<NetCounters> {
    let counters = Arc::new(NetCounters::default());
    if command_line.split_whitespace().any(|word| word == "vmferry.net") {
        let counting = Arc::clone(&counters);
        std::thread::spawn(move || run(&counting));
    }
    counters
}

fn run(counters: &Arc<NetCounters>) {
    let mut interface = String::new();
    while interface.is_empty() {
        std::thread::sleep(SEND_EVERY);
        follow(&mut interface);
    }
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, WIRE_PORT + 1)).expect("a guest has ports");
    let reader = socket.try_clone().expect("a socket can be shared");
    let counting = Arc::clone(counters);
    std::thread::spawn(move || read(&reader, &counting));
    for turn in 0_u64.. {
        std::thread::sleep(SEND_EVERY);
        if turn.is_multiple_of(LOOK_EVERY) {
            follow(&mut interface);
        }
        if counters.quiet.load(Ordering::Relaxed) {
            continue;
        }
        match socket.send_to(&turn.to_le_bytes(), (Ipv4Addr::from(WIRE_ADDRESS), WIRE_PORT)) {
            Ok(_) => counters.sent.fetch_add(1, Ordering::Relaxed),
            Err(_) => counters.refused.fetch_add(1, Ordering::Relaxed),
        };
    }
}

fn read(socket: &UdpSocket, counters: &NetCounters) {
    let (mut seen, mut bytes) = (HashSet::new(), [0; 8]);
    loop {
        if socket.recv(&mut bytes).is_ok() && seen.insert(u64::from_le_bytes(bytes)) {
            counters.answered.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Puts the address on the interface that nobody owns, when it is another one than before.
fn follow(interface: &mut String) {
    let Some(newest) = top() else { return };
    if newest == *interface {
        return;
    }
    if !interface.is_empty() {
        sys::set_address(interface, [0, 0, 0, 0]);
    }
    sys::set_up(&newest);
    sys::set_address(&newest, GUEST_ADDRESS);
    *interface = newest;
}

/// From now on nobody in this guest hears that a device is to be unplugged; how many slots that are.
pub(crate) fn forget_hot_unplug() -> usize {
    const DRIVER: &str = "/sys/bus/pci_express/drivers/pciehp";
    let services = std::fs::read_dir(DRIVER).into_iter().flatten().flatten();
    let names = services.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let slots = names.filter(|name| name.contains(":pcie"));
    slots.filter(|slot| std::fs::write(format!("{DRIVER}/unbind"), slot).is_ok()).count()
}

/// A master before a device of its own.
fn top() -> Option<String> {
    let mut names: Vec<String> =
        std::fs::read_dir("/sys/class/net").ok()?.flatten().filter_map(|entry| free(&entry)).collect();
    names.sort_by_key(|name| (!is_master(name), name.clone()));
    names.into_iter().next()
}

fn free(entry: &std::fs::DirEntry) -> Option<String> {
    let name = entry.file_name().to_string_lossy().into_owned();
    (name != "lo" && !entry.path().join("master").exists()).then_some(name)
}

fn is_master(name: &str) -> bool {
    let links = std::fs::read_dir(format!("/sys/class/net/{name}")).into_iter().flatten().flatten();
    links.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("lower_"))
}
