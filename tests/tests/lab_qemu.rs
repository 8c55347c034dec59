//! Guests of an unmodified QEMU on KVM in a lab host, moved to a second QEMU there by the command line: one that has
//! nothing of the host, and one that has a virtual function of the host's NIC passed through.
//!
//! The function cannot migrate (vfio-pci has no migration for it), so it goes the way of failover. It and the host's own
//! interface are one switch: what the guest sends over its function arrives at the host's card, by the driver of a real
//! igb function in the guest, the IOMMU and vfio-pci in the host.
#![expect(clippy::unwrap_used, reason = "what a test's helper cannot have fails the test")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use vmferry_rig::{Assets, QemuGuest, RunningGuest, WIRE_MAC, Wire};
use vmferry_tests::command::{Done, Pki, receive, send};

const RAM_BYTES: u64 = 192 << 20;
const PAGES: u64 = 1024;
const PLAN: &str = "seed=5,pages=1024,set=256,pattern=zipf-hot,rate=200,zero=100";
/// Emulated hardware under emulated hardware: no probing for what is not there, and no heartbeat by port, which the
/// emulation of nested SVM cannot give a guest that was restored.
const KERNEL_WORDS: &str = "vmferry.beat_port=off vmferry.beat_ms=10 8250.nr_uarts=1";
const MACHINE: &str = "q35,smm=off,vmport=off,hpet=off,usb=off,sata=off,smbus=off";
const MAC: &str = "52:54:00:00:00:07";
const IGB: (&str, &str) = ("0x8086", "0x10c9");
const PATIENCE: Duration = Duration::from_secs(30);
/// An emulated host's blackout fits no usual limit.
const FORCE: &[&str] = &["--on-no-converge", "force", "--downtime-limit", "20s"];

fn recipe(words: &str) -> QemuGuest {
    let assets = Assets::find_failover().unwrap();
    let guest = QemuGuest::new(&assets, RAM_BYTES, PLAN.parse().unwrap()).unwrap();
    guest.kvm().machine(MACHINE).kernel_arguments(&format!("{KERNEL_WORDS} {words}"))
}

fn moved(source: &RunningGuest, target: &RunningGuest, more: &[&str]) -> (Done, Done) {
    let pki = Pki::new("127.0.0.1");
    let tls = ["--tls-dir", pki.path().to_str().unwrap()];
    let (receiving, address) = receive(&target.spec(), &[&tls[..], more].concat(), "");
    let sent = send(&source.spec(), &address, &[&tls[..], FORCE, &["--verify"]].concat(), "").done();
    let received = receiving.done();
    assert_eq!((sent.code(), received.code()), (0, 0), "send: {}\nreceive: {}", sent.stderr, received.stderr);
    assert_eq!(sent.report["verified"], true);
    (sent, received)
}

/// Every page has the version that its registers say, and the guest works on.
fn assert_alive(guest: &mut RunningGuest) {
    let report = guest.console().verify().unwrap_or_else(|error| panic!("{error}: {}", guest.log()));
    assert!(report.is_clean() && report.pages == PAGES, "{report}");
    let first = guest.console().status().unwrap();
    let on = (0..100).map(|_| {
        std::thread::sleep(Duration::from_millis(50));
        guest.console().status().unwrap()
    });
    let goes_on = on.into_iter().any(|now| now.writes > first.writes && now.beats > first.beats);
    assert!(goes_on, "it stands still since {first:?}");
}

#[test]
fn a_guest_on_kvm_moves_to_another_qemu() {
    let recipe = recipe("");
    let mut source = recipe.boot("source").unwrap();
    let before = source.console().status().unwrap();
    let mut target = recipe.await_incoming("target").unwrap();
    let (sent, _) = moved(&source, &target, &[]);
    assert_alive(&mut target);
    assert!(target.console().status().unwrap().writes >= before.writes);
    println!(
        "lab: qemu on kvm: away {} ms, {} rounds",
        sent.report["blackout_ms"], sent.report["ram"]["rounds"]
    );
}

/// The host's NIC: its interface, and the addresses of its functions.
struct Card {
    interface: String,
    functions: Vec<String>,
}

impl Card {
    /// The igb, up, as the host on the wire; its functions have the guest's address.
    fn ready() -> Card {
        let all = std::fs::read_dir("/sys/bus/pci/devices").unwrap().flatten();
        let word =
            |path: &Path, name: &str| std::fs::read_to_string(path.join(name)).unwrap().trim().to_owned();
        let device = all
            .map(|entry| entry.path())
            .find(|path| (word(path, "vendor").as_str(), word(path, "device").as_str()) == IGB);
        let device = device.expect("the lab has an igb");
        let interface = std::fs::read_dir(device.join("net")).unwrap().flatten().next().unwrap();
        let interface = interface.file_name().to_string_lossy().into_owned();
        let function = |number: usize| {
            let link = std::fs::read_link(device.join(format!("virtfn{number}"))).unwrap();
            link.file_name().unwrap().to_string_lossy().into_owned()
        };
        let mac = WIRE_MAC.map(|byte| format!("{byte:02x}")).join(":");
        ip(&["link", "set", &interface, "address", &mac]);
        ip(&["link", "set", &interface, "up"]);
        for number in ["0", "1"] {
            // Trusted, because the guest's failover driver asks its function for more than one address.
            ip(&["link", "set", &interface, "vf", number, "mac", MAC, "trust", "on"]);
        }
        Card { functions: vec![function(0), function(1)], interface }
    }
}

fn ip(words: &[&str]) {
    let ran = Command::new("/sbin/ip").args(words).output().unwrap();
    assert!(ran.status.success(), "ip {words:?}: {}", String::from_utf8_lossy(&ran.stderr));
}

fn host(recipe: &QemuGuest, wire: &Wire, name: &str) -> QemuGuest {
    let standby = format!("{name}-standby");
    let device = format!("virtio-net-pci,id=net0,netdev={standby},failover=on,mac={MAC},bus=rp0,romfile=");
    let port = wire.port(&standby).unwrap();
    recipe.clone().extra_args(&[&port[0], &port[1], "-device", &device])
}

fn primary(function: &str) -> String {
    format!("vfio-pci,host={function},id=pri0,failover_pair_id=net0,bus=rp1")
}

#[test]
fn a_guest_with_a_virtual_function_moves_over_its_standby_to_the_other_function() {
    let card = Card::ready();
    let [first, second] = [0, 1].map(|number| primary(&card.functions[number]));
    let recipe = recipe("vmferry.net").extra_args(&[
        "-device",
        "pcie-root-port,id=rp0,slot=1",
        "-device",
        "pcie-root-port,id=rp1,slot=2",
    ]);
    let wire = Wire::new(recipe.directory());
    wire.card_port("card", &card.interface).unwrap();
    let mut source = host(&recipe, &wire, "a").extra_args(&["-device", &first]).boot("a").unwrap();
    wire.wait_traffic("card", PATIENCE).unwrap();
    let before = source.console().net().unwrap();
    let _ = wire.take_longest_silence();

    let target = host(&recipe, &wire, "b").await_incoming("b").unwrap();
    let (mut target, (sent, received)) = {
        let done = moved(&source, &target, &["--failover-primary", &second]);
        (target, done)
    };
    for word in ["gave up `pri0`", "frames over `net0`"] {
        assert!(sent.report["notes"].to_string().contains(word), "{word}: {}", sent.report["notes"]);
    }
    assert!(received.report["notes"].to_string().contains("took `pri0`"), "{}", received.report["notes"]);
    wire.wait_traffic("card", PATIENCE).unwrap();
    let plugged =
        target.qmp().execute("qom-get", json!({ "path": "/machine/peripheral/pri0", "property": "host" }));
    assert_eq!(plugged.unwrap(), json!(card.functions[1]), "the target has the other function");
    let after = target.console().net().unwrap();
    println!(
        "lab: virtual function: {} sent during the move, {} lost; longest silence {:?}; {} over the source's standby, {} over the target's; away {} ms",
        after.sent - before.sent,
        after.lost().saturating_sub(before.lost()),
        wire.take_longest_silence(),
        wire.arrived_by("a-standby"),
        wire.arrived_by("b-standby"),
        sent.report["blackout_ms"]
    );
    assert!(wire.arrived_by("a-standby") > 0 && wire.arrived_by("b-standby") > 0);
    assert_alive(&mut target);
}
