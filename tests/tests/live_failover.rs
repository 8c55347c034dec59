//! Whole moves of a Linux guest whose fast NIC cannot migrate, between two unmodified QEMUs through the command line.
//!
//! The guest has a `net_failover` pair: an emulated e1000e as primary (`failover_pair_id`), a virtio NIC as standby
//! (`failover=on`). It sends 200 numbered datagrams a second; the host on the wire answers each by the port that it
//! came by. So the ports say which device carries the traffic, and the numbers what a move has cost.
#![expect(clippy::unwrap_used, reason = "what a test's helper cannot have fails the test")]

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vmferry_rig::{Assets, NetStatus, QemuGuest, RunningGuest, Wire, require, root};
use vmferry_tests::command::{Done, Pki, receive, send};
use vmferry_tests::proxy::Proxy;

const MIB: u64 = 1 << 20;
const PLAN: &str = "seed=3,pages=4096,set=1024,pattern=random,rate=2MiB,zero=100";
const MAC: &str = "52:54:00:00:00:07";
/// Numbers that may be lost between the guest's last frame over the source's primary and the first answer by the target's
/// standby: one change of the device and one blackout, at 200 a second on two cores that emulate both hosts. Seen: none.
const LOST_MAX: u64 = 40;
/// The longest silence that the host on the wire may have heard. Seen: 83 ms, most of it the blackout.
const SILENCE_MAX: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(20);

/// A recipe, and the wire that its guests are on.
struct Site {
    recipe: QemuGuest,
    wire: Wire,
    pki: Pki,
}

impl Site {
    fn new(assets: &Assets, more: &[&str]) -> Self {
        let recipe = QemuGuest::new(assets, 256 * MIB, PLAN.parse().unwrap())
            .unwrap()
            .kernel_arguments("vmferry.net")
            .extra_args(more)
            .extra_args(&["-device", "pcie-root-port,id=rp0,slot=1"])
            .extra_args(&["-device", "pcie-root-port,id=rp1,slot=2"]);
        let wire = Wire::new(recipe.directory());
        Self { recipe, wire, pki: Pki::new("127.0.0.1") }
    }

    /// A VMM's two ways to the wire, and its standby. The ports are `NAME-standby` and `NAME-primary`.
    fn host(&self, name: &str) -> QemuGuest {
        let standby = format!("{name}-standby");
        let device = format!("virtio-net-pci,id=net0,netdev={standby},failover=on,mac={MAC},bus=rp0");
        let [to_standby, to_primary] =
            [standby, format!("{name}-primary")].map(|port| self.wire.port(&port).unwrap());
        let words = to_standby.iter().chain(&to_primary).map(String::as_str);
        let recipe = self.recipe.clone().extra_args(&words.collect::<Vec<_>>());
        recipe.extra_args(&["-device", &device])
    }

    /// A guest that runs, and sends over its primary.
    fn boot(&self, name: &str) -> RunningGuest {
        let guest = self.host(name).extra_args(&["-device", &primary(name)]).boot(name).unwrap();
        self.wire.wait_traffic(&format!("{name}-primary"), PATIENCE).unwrap();
        guest
    }

    fn tls(&self) -> Vec<&str> {
        vec!["--tls-dir", self.pki.path().to_str().unwrap()]
    }

    /// Moves a guest to `name`, whose receiver is given `words`.
    fn move_to(&self, source: &RunningGuest, name: &str, words: &[&str]) -> (RunningGuest, Done, Done) {
        self.move_between(source, &[], self.host(name).await_incoming(name).unwrap(), words)
    }

    fn move_between(
        &self,
        source: &RunningGuest,
        send_words: &[&str],
        target: RunningGuest,
        receive_words: &[&str],
    ) -> (RunningGuest, Done, Done) {
        let (receiving, address) = receive(&target.spec(), &[&self.tls(), receive_words].concat(), "");
        let words = [&self.tls()[..], &["--downtime-limit", "2s"], send_words].concat();
        let sent = send(&source.spec(), &address, &words, "").done();
        let received = receiving.done();
        assert_eq!(
            (sent.code(), received.code()),
            (0, 0),
            "send: {}\nreceive: {}",
            sent.stderr,
            received.stderr
        );
        (target, sent, received)
    }
}

/// The options of a host's fast device.
fn primary(name: &str) -> String {
    format!("e1000e,id=pri0,netdev={name}-primary,mac={MAC},failover_pair_id=net0,bus=rp1,bootindex=5")
}

fn notes(done: &Done) -> String {
    done.report["notes"].to_string()
}

fn devices(guest: &mut RunningGuest) -> String {
    guest.qmp().execute("qom-list", json!({ "path": "/machine/peripheral" })).unwrap().to_string()
}

/// Stops the guest's sending and waits for answers that are under way: an emulated NIC may hand them over late.
fn settled(guest: &mut RunningGuest, lost_before: u64) -> NetStatus {
    let mut quiet = || serde_json::from_str::<NetStatus>(&guest.console().ask("net quiet").unwrap()).unwrap();
    for _ in 0..25 {
        let now = quiet();
        if now.lost() <= lost_before {
            return now;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    quiet()
}

fn lost_between(before: NetStatus, after: NetStatus) -> u64 {
    after.lost().saturating_sub(before.lost())
}

fn assert_alive(guest: &mut RunningGuest) {
    let report = guest.console().verify().unwrap();
    assert!(report.is_clean(), "{} of {} pages are wrong", report.wrong, report.pages);
    assert_eq!(guest.run_state().unwrap(), "running");
}

/// The guest has its device again, uses it, and nothing is left of the move in QEMU.
fn assert_as_before(site: &Site, source: &mut RunningGuest, what: &str) {
    assert!(devices(source).contains("pri0"), "{what}: {}", devices(source));
    site.wire.wait_traffic("a-primary", PATIENCE).unwrap_or_else(|error| panic!("{what}: {error}"));
    let objects = source.qmp().execute("qom-list", json!({ "path": "/objects" })).unwrap().to_string();
    assert!(!objects.contains("vmferry"), "{what}: {objects}");
    assert_alive(source);
}

#[test]
fn a_guest_moves_over_its_standby_and_takes_the_targets_primary() {
    require!(root());
    let assets = require!(Assets::find_failover());
    let site = Site::new(&assets, &[]);
    let mut source = site.boot("a");
    assert_eq!(site.wire.arrived_by("a-standby"), 0, "the primary comes first");
    let before = source.console().net().unwrap();
    let _ = site.wire.take_longest_silence();

    let (mut target, sent, received) = site.move_to(&source, "b", &["--failover-primary", &primary("b")]);
    site.wire.wait_traffic("b-primary", PATIENCE).unwrap();
    let silence = site.wire.take_longest_silence();
    std::thread::sleep(Duration::from_millis(500));
    let after = settled(&mut target, before.lost());

    let lost = lost_between(before, after);
    println!(
        "{} sent during the move, {lost} lost, {} refused by the guest's kernel; longest silence {silence:?}; {} over the \
         source's standby, {} over the target's, {} answers found nobody",
        after.sent - before.sent,
        after.refused,
        site.wire.arrived_by("a-standby"),
        site.wire.arrived_by("b-standby"),
        site.wire.undeliverable()
    );
    // A primary that has just been plugged has no link yet, and until it has one the guest sends by its standby and drops
    // what comes back by it (`net_failover_handle_frame` in Linux). Nobody outside of the guest can help that.
    let plugged = site.wire.arrived_by("b-standby");
    assert!(lost <= LOST_MAX + plugged, "{lost} of {} numbers were lost", after.sent - before.sent);
    assert!(silence <= SILENCE_MAX, "nothing was heard of the guest for {silence:?}");
    assert!(site.wire.arrived_by("a-standby") > 0 && site.wire.arrived_by("b-standby") > 0);
    for word in ["gave up `pri0`", "frames over `net0`"] {
        assert!(notes(&sent).contains(word), "{word}: {}", notes(&sent));
    }
    assert!(notes(&received).contains("took `pri0`"), "{}", notes(&received));
    assert_alive(&mut target);
}

#[test]
fn a_primary_on_the_targets_command_line_is_plugged_by_qemu() {
    require!(root());
    let assets = require!(Assets::find_failover());
    let site = Site::new(&assets, &[]);
    let source = site.boot("a");
    let target = site.host("b").extra_args(&["-device", &primary("b")]).await_incoming("b").unwrap();
    let (mut target, _, received) = site.move_between(&source, &[], target, &[]);
    assert!(notes(&received).contains("took `pri0`"), "{}", notes(&received));
    site.wire.wait_traffic("b-primary", PATIENCE).unwrap();
    assert_alive(&mut target);
}

#[test]
fn a_device_without_a_standby_is_given_one_for_the_move() {
    require!(root());
    let assets = require!(Assets::find_failover());
    let site = Site::new(&assets, &[]);
    // The standby's way to the wire is there, the standby is not.
    let ports = ["a-standby", "a-primary"].map(|port| site.wire.port(port).unwrap());
    let alone = primary("a").replace(",failover_pair_id=net0", "");
    let words: Vec<&str> = ports.iter().flatten().map(String::as_str).chain(["-device", &alone]).collect();
    let mut source = site.recipe.clone().extra_args(&words).boot("a").unwrap();
    site.wire.wait_traffic("a-primary", PATIENCE).unwrap();
    let standby = ["--failover-standby", "virtio-net-pci,for=pri0,id=net0,netdev=a-standby,bus=rp0"];

    // A move that fails gives the device back and takes the standby away again.
    let target = site.host("b").await_incoming("b").unwrap();
    let (receiving, address) = receive(&target.spec(), &site.tls(), "");
    let proxy = Proxy::to(&address);
    let words = [&site.tls()[..], &["--downtime-limit", "2s"], &standby].concat();
    let mut sending = send(&source.spec(), &proxy.address(), &words, "send:copy:300");
    sending.wait_line("holding at");
    assert!(devices(&mut source).contains("net0") && !devices(&mut source).contains("pri0"));
    proxy.cut();
    assert_eq!(sending.done().code(), 69);
    drop((receiving, target));
    assert!(!devices(&mut source).contains("net0"), "{}", devices(&mut source));
    assert_as_before(&site, &mut source, "cut");

    let target = site.host("b").await_incoming("b").unwrap();
    let (mut target, _, _) =
        site.move_between(&source, &standby, target, &["--failover-primary", &primary("b")]);
    site.wire.wait_traffic("b-primary", PATIENCE).unwrap();
    assert_alive(&mut target);
}

#[test]
fn a_primary_that_cannot_be_plugged_leaves_a_guest_on_its_standby_and_a_warning() {
    require!(root());
    let assets = require!(Assets::find_failover());
    let site = Site::new(&assets, &[]);
    let mut source = site.boot("a");
    let before = source.console().net().unwrap();
    let broken = primary("b").replace("netdev=b-primary", "netdev=nowhere");
    let (mut target, _, received) = site.move_to(&source, "b", &["--failover-primary", &broken]);
    assert!(
        notes(&received).contains("WARNING") && notes(&received).contains("device_add e1000e"),
        "{}",
        notes(&received)
    );
    assert!(received.stderr.contains("could not be plugged"), "{}", received.stderr);
    site.wire.wait_traffic("b-standby", PATIENCE).unwrap();
    // Without a second change of the device this is what the first one and the blackout cost.
    let lost = lost_between(before, settled(&mut target, before.lost()));
    println!("{lost} lost until the guest is on the target's standby");
    assert!(lost <= LOST_MAX, "{lost} numbers were lost");
    assert_alive(&mut target);
}

#[test]
fn cancel_kill_and_cut_after_the_unplug_give_the_primary_back() {
    require!(root());
    let assets = require!(Assets::find_failover());
    let site = Site::new(&assets, &[]);
    let mut source = site.boot("a");
    for (phase, blow) in [
        ("copy", "cancel"),
        ("pause", "cut"),
        ("last-round", "kill"),
        ("target-load", "cut"),
        ("copy", "kill"),
    ] {
        let target = site.host("b").await_incoming("b").unwrap();
        let (receiving, address) = receive(&target.spec(), &site.tls(), "");
        let proxy = Proxy::to(&address);
        let ms = if blow == "kill" { 10_000 } else { 300 };
        let words = [&site.tls()[..], &["--downtime-limit", "2s"]].concat();
        let mut sending = send(&source.spec(), &proxy.address(), &words, &format!("send:{phase}:{ms}"));
        sending.wait_line("holding at");
        assert!(!devices(&mut source).contains("pri0"), "{phase}: the primary is away");
        match blow {
            "cancel" => sending.signal(Signal::SIGINT),
            "kill" => sending.signal(Signal::SIGKILL),
            _ => proxy.cut(),
        }
        let sent = sending.done();
        assert_ne!(sent.code(), 0, "{phase}, {blow}: {}", sent.stderr);
        drop((receiving, target));
        if blow == "kill" {
            // The guardian needs a moment.
            let came = site.wire.wait_traffic("a-primary", PATIENCE);
            came.unwrap_or_else(|error| {
                panic!("{phase}, {blow}: {error}: {} {}", sent.stderr, devices(&mut source))
            });
        }
        assert_as_before(&site, &mut source, &format!("{phase}, {blow}"));
    }
    let (mut target, _, _) = site.move_to(&source, "b", &["--failover-primary", &primary("b")]);
    site.wire.wait_traffic("b-primary", PATIENCE).unwrap();
    assert_alive(&mut target);
}

#[test]
fn a_guest_that_gives_nothing_up_is_left_as_it_was() {
    require!(root());
    let assets = require!(Assets::find_failover());
    // Slots that PCI Express itself unplugs, in a guest that loses the driver for it.
    let site = Site::new(&assets, &["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"]);
    let mut source = site.boot("a");
    assert_eq!(source.console().ask("deaf").unwrap(), "2", "slots without their driver");
    let target = site.host("b").await_incoming("b").unwrap();
    let (_receiving, address) = receive(&target.spec(), &site.tls(), "");
    let words = [&site.tls()[..], &["--unplug-timeout", "2s"]].concat();
    let sent = send(&source.spec(), &address, &words, "").done();
    assert_eq!(sent.code(), 75, "{}", sent.stderr);
    for word in ["`pri0`", "asked 4 times", "acpiphp", "--unplug-timeout"] {
        assert!(sent.sentence().contains(word), "{word}: {}", sent.sentence());
    }
    assert_eq!(sent.report["ram"]["wire_bytes"], 0);
    assert_as_before(&site, &mut source, "no answer");

    let words = [&site.tls()[..], &["--on-unplug-timeout", "wait", "--unplug-timeout", "1s"]].concat();
    let target = site.host("b").await_incoming("b").unwrap();
    let (_receiving, address) = receive(&target.spec(), &site.tls(), "");
    let sending = send(&source.spec(), &address, &words, "");
    std::thread::sleep(Duration::from_secs(4));
    sending.signal(Signal::SIGINT);
    let sent = sending.done();
    assert_eq!(sent.code(), 130, "{}", sent.stderr);
    assert_as_before(&site, &mut source, "cancelled while it was asked");
}

#[test]
fn what_does_not_fit_is_refused_before_the_first_page() {
    require!(root());
    let assets = require!(Assets::find_failover());
    let site = Site::new(&assets, &[]);
    let mut source = site.boot("a");
    let target = site.host("b").await_incoming("b").unwrap();
    let (_receiving, address) = receive(&target.spec(), &site.tls(), "");
    let off = [&site.tls()[..], &["--failover", "off"]].concat();
    let sent = send(&source.spec(), &address, &off, "").done();
    assert_eq!((sent.code(), sent.sentence().contains("`pri0`")), (78, true), "{}", sent.stderr);
    source.qmp().execute("stop", Value::Null).unwrap();
    let sent = send(&source.spec(), &address, &site.tls(), "").done();
    assert_eq!((sent.code(), sent.sentence().contains("is paused")), (78, true), "{}", sent.stderr);
    source.qmp().execute("cont", Value::Null).unwrap();
    assert_as_before(&site, &mut source, "refused");
}
