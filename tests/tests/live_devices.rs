//! Whole moves of a guest with devices: their states pre-copied, drained and loaded in parallel, refused, and struck in
//! every phase. The devices are the fakes of the process guest; each proves its own state and what it wrote by DMA.
#![expect(clippy::unwrap_used, reason = "what a test's helper cannot have fails the test")]

use nix::sys::signal::Signal;
use serde_json::Value;
use vmferry_guest::process::Phase;
use vmferry_tests::command::{Done, receive, send};
use vmferry_tests::proxy::Proxy;
use vmferry_tests::workload::Workload;

const PLAN: &str = "seed=7,set=1024,pattern=random,rate=10MiB,zero=200";
const RAM: &str = "64MiB";
const PLAIN: &[&str] = &["--insecure-plaintext"];
/// One that changes while it leaves, one that gives nothing before the pause, one that writes memory unseen, and one
/// that hardly has a state.
const DEVICES: &[&str] =
    &["gpu0:8MiB:2MiB", "fpga0:1MiB:1MiB:stop-copy", "eth1:256KiB:4MiB:pinned=4MiB", "mtty0:1:0"];

fn guests() -> (Workload, Workload) {
    (Workload::run_with(RAM, PLAN, DEVICES), Workload::incoming_with(RAM, DEVICES))
}

fn assert_moved(sent: &Done, received: &Done) {
    assert_eq!((sent.code(), received.code()), (0, 0), "send: {}\nreceive: {}", sent.stderr, received.stderr);
}

fn assert_arrived(target: &Workload) {
    target.wait_phase(Phase::Running);
    target.assert_memory_is_right();
    target.assert_devices_came_in();
}

/// After every strike: the source and its devices run on.
fn assert_runs_on(source: &Workload) {
    source.wait_phase(Phase::Running);
    source.assert_memory_is_right();
    let digests = || source.devices().iter().map(|device| device.digest).collect::<Vec<_>>();
    let before = digests();
    for _ in 0..300 {
        // A device does what it owes when it is looked at: a move that begins looks.
        let target = Workload::incoming_with(RAM, DEVICES);
        let (receiving, address) = receive(&target.spec(), PLAIN, "");
        let mut sending = send(&source.spec(), &address, PLAIN, "send:pause:100");
        sending.wait_line("holding at");
        sending.signal(Signal::SIGINT);
        let _ = (sending.done(), receiving.done());
        if digests() != before {
            return;
        }
    }
    panic!("the devices of the source stand still");
}

fn device<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["devices"].as_array().unwrap().iter().find(|device| device["name"] == name).unwrap()
}

#[test]
fn the_states_of_all_devices_move_beside_the_memory_and_are_reported() {
    let (mut source, target) = guests();
    let (receiving, address) = receive(&target.spec(), PLAIN, "");
    let words = [PLAIN, &["--verify", "--lanes", "2"]].concat();
    let (sent, received) = (send(&source.spec(), &address, &words, "").done(), receiving.done());
    assert_moved(&sent, &received);
    assert_arrived(&target);
    assert!(!source.is_alive());
    assert_eq!(sent.report["verified"], true);

    let bytes = |name: &str, key: &str| device(&sent.report, name)[key].as_u64().unwrap();
    assert!(bytes("gpu0", "pre_copied_bytes") >= 8 << 20, "{}", sent.report);
    assert!(bytes("gpu0", "blackout_bytes") < 4 << 20, "pre-copy left too much: {}", sent.report);
    assert_eq!(bytes("fpga0", "pre_copied_bytes"), 0);
    assert!(bytes("fpga0", "blackout_bytes") >= 1 << 20);
    assert_eq!(bytes("eth1", "pinned_bytes"), 4 << 20);
    for name in ["gpu0", "fpga0", "eth1", "mtty0"] {
        let ours = device(&sent.report, name);
        let sum = bytes(name, "pre_copied_bytes") + bytes(name, "blackout_bytes");
        assert_eq!(device(&received.report, name)["received_bytes"], sum);
        assert!(ours["load_ms"].as_f64().unwrap() > 0.0, "{ours}");
        assert_eq!(
            ours["load_ms"].as_f64().unwrap() > 0.0,
            device(&received.report, name)["load_ms"].is_f64()
        );
        assert!(ours["predicted_state_ms"]["p95"].as_f64().unwrap() > 0.0, "{ours}");
    }
    assert!(device(&sent.report, "eth1")["predicted_pinned_ms"]["p95"].as_f64().unwrap() > 0.0);
    assert!(
        sent.stderr.contains("eth1 pins 4.0 MiB: adds") || sent.stderr.contains("eth1 pins 4096 KiB: adds")
    );
    let term = |name: &str| {
        let terms = sent.report["terms"].as_array().unwrap();
        terms.iter().find(|term| term["name"] == name).unwrap_or_else(|| panic!("no term {name}"))
    };
    for name in ["stop", "scan", "pages", "save", "devices", "close", "load", "handover", "run"] {
        let term = term(name);
        assert!(
            term["measured_ms"].is_f64() && term["predicted_ms"]["p95"].as_f64().unwrap() > 0.0,
            "{term}"
        );
    }
}

#[test]
fn as_many_devices_as_can_move_at_once_move_over_one_lane() {
    let plans: Vec<String> = (0..16).map(|n| format!("d{n}:64KiB:256KiB")).collect();
    let devices: Vec<&str> = plans.iter().map(String::as_str).collect();
    let (source, target) = (Workload::run_with(RAM, PLAN, &devices), Workload::incoming_with(RAM, &devices));
    let (receiving, address) = receive(&target.spec(), PLAIN, "");
    let sent = send(&source.spec(), &address, &[PLAIN, &["--lanes", "1"]].concat(), "").done();
    assert_moved(&sent, &receiving.done());
    assert_arrived(&target);
    assert_eq!(sent.report["devices"].as_array().unwrap().len(), 16);
}

#[test]
fn a_device_of_the_target_that_refuses_is_named_and_the_source_runs_on() {
    let source = Workload::run_with(RAM, PLAN, DEVICES);
    let refusing: Vec<String> = DEVICES
        .iter()
        .map(|text| text.to_string() + if text.starts_with("eth1") { ":refuse" } else { "" })
        .collect();
    let refusing: Vec<&str> = refusing.iter().map(String::as_str).collect();
    let target = Workload::incoming_with(RAM, &refusing);
    let (receiving, address) = receive(&target.spec(), PLAIN, "");
    let (sent, received) = (send(&source.spec(), &address, PLAIN, "").done(), receiving.done());
    assert_ne!(sent.code(), 0);
    assert!(sent.sentence().contains("`eth1` refused its state"), "{}", sent.stderr);
    assert!(received.sentence().contains("`eth1` refused its state"), "{}", received.stderr);
    assert_runs_on(&source);
    // The same guest moves to one that takes it.
    let target = Workload::incoming_with(RAM, DEVICES);
    let (receiving, address) = receive(&target.spec(), PLAIN, "");
    assert_moved(&send(&source.spec(), &address, PLAIN, "").done(), &receiving.done());
    assert_arrived(&target);
}

#[test]
fn devices_that_differ_are_refused_by_name_before_anything_moves() {
    let source = Workload::run_with(RAM, PLAN, DEVICES);
    let cases: [(&[&str], &str); 3] = [
        (&DEVICES[..3], "`mtty0`"),
        (&[DEVICES[0], DEVICES[1], DEVICES[2], DEVICES[3], "extra:1"], "`extra`"),
        (&["gpu0:4MiB", DEVICES[1], DEVICES[2], DEVICES[3]], "`gpu0`"),
    ];
    for (devices, name) in cases {
        let target = Workload::incoming_with(RAM, devices);
        let (receiving, address) = receive(&target.spec(), PLAIN, "");
        let sent = send(&source.spec(), &address, PLAIN, "").done();
        assert_eq!(sent.code(), 78, "{}", sent.stderr);
        assert!(sent.sentence().contains(name), "{}", sent.stderr);
        drop(receiving);
    }
    source.wait_phase(Phase::Running);
    source.assert_memory_is_right();
}

#[test]
fn what_a_device_pins_counts_and_is_named_when_the_blackout_cannot_fit() {
    let devices = &["eth1:1MiB:0:pinned=32MiB"];
    let (source, target) = (Workload::run_with(RAM, PLAN, devices), Workload::incoming_with(RAM, devices));
    let (receiving, address) = receive(&target.spec(), PLAIN, "");
    let words = [PLAIN, &["--bandwidth", "100MiB", "--downtime-limit", "50ms"]].concat();
    let sent = send(&source.spec(), &address, &words, "").done();
    assert_eq!(sent.code(), 75, "{}", sent.stderr);
    assert!(sent.sentence().contains("eth1 pins 32 MiB: adds"), "{}", sent.stderr);
    drop(receiving);
    source.wait_phase(Phase::Running);
    source.assert_memory_is_right();
}

/// Every phase of the source before Commit in which devices have something to lose.
const SOURCE_PHASES: &[&str] =
    &["prepare", "copy", "pause", "last-round", "close-lanes", "target-load", "seal"];

fn hold(side: &str, phase: &str, ms: u32) -> String {
    format!("{side}:{phase}:{ms}")
}

#[test]
fn ctrl_c_with_devices_in_every_phase_leaves_the_source_running() {
    let source = Workload::run_with(RAM, PLAN, DEVICES);
    for phase in SOURCE_PHASES {
        let target = Workload::incoming_with(RAM, DEVICES);
        let (receiving, address) = receive(&target.spec(), PLAIN, "");
        let mut sending = send(&source.spec(), &address, PLAIN, &hold("send", phase, 300));
        sending.wait_line("holding at");
        sending.signal(Signal::SIGINT);
        let (sent, received) = (sending.done(), receiving.done());
        if *phase == "seal" && sent.code() == 0 {
            // The seal was recorded before the signal was heard: there is no way back from there.
            assert_moved(&sent, &received);
            assert_arrived(&target);
            return;
        }
        assert_eq!(sent.code(), 130, "{phase}: {}", sent.stderr);
        source.wait_phase(Phase::Running);
    }
    assert_runs_on(&source);
}

#[test]
fn a_killed_sender_with_devices_leaves_the_source_running_in_every_phase() {
    let source = Workload::run_with(RAM, PLAN, DEVICES);
    for phase in SOURCE_PHASES {
        let target = Workload::incoming_with(RAM, DEVICES);
        let (_receiving, address) = receive(&target.spec(), PLAIN, "");
        let mut sending = send(&source.spec(), &address, PLAIN, &hold("send", phase, 5000));
        sending.wait_line("holding at");
        sending.signal(Signal::SIGKILL);
        drop(sending);
        source.wait_phase(Phase::Running);
    }
    assert_runs_on(&source);
    let target = Workload::incoming_with(RAM, DEVICES);
    let (receiving, address) = receive(&target.spec(), PLAIN, "");
    let sent = send(&source.spec(), &address, &[PLAIN, &["--verify"]].concat(), "").done();
    assert_moved(&sent, &receiving.done());
    assert_arrived(&target);
}

#[test]
fn a_killed_receiver_with_devices_leaves_the_source_running() {
    let source = Workload::run_with(RAM, PLAN, DEVICES);
    for phase in ["prepare", "receive", "complete", "load"] {
        let target = Workload::incoming_with(RAM, DEVICES);
        let (mut receiving, address) = receive(&target.spec(), PLAIN, &hold("receive", phase, 5000));
        let sending = send(&source.spec(), &address, PLAIN, "");
        receiving.wait_line("holding at");
        receiving.signal(Signal::SIGKILL);
        let sent = sending.done();
        assert_eq!(sent.code(), 69, "{phase}: {}", sent.stderr);
        source.wait_phase(Phase::Running);
    }
    assert_runs_on(&source);
}

#[test]
fn a_cut_link_with_devices_leaves_the_source_running_in_every_phase() {
    let source = Workload::run_with(RAM, PLAN, DEVICES);
    for phase in SOURCE_PHASES {
        let target = Workload::incoming_with(RAM, DEVICES);
        let (receiving, address) = receive(&target.spec(), PLAIN, "");
        let proxy = Proxy::to(&address);
        let mut sending = send(&source.spec(), &proxy.address(), PLAIN, &hold("send", phase, 300));
        sending.wait_line("holding at");
        proxy.cut();
        let sent = sending.done();
        if *phase == "seal" && sent.code() == 3 {
            return;
        }
        assert_eq!(sent.code(), 69, "{phase}: {}", sent.stderr);
        drop(receiving);
        source.wait_phase(Phase::Running);
    }
    assert_runs_on(&source);
}

/// `vmferry` with `words`: its exit code, what it said on stdout and on stderr.
fn vmferry(words: &[&str]) -> (i32, String, String) {
    let output = std::process::Command::new(vmferry_tests::command::program()).args(words).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn inspect_shows_a_workload_and_its_devices_and_leaves_them_alone() {
    let source = Workload::run_with(RAM, PLAN, DEVICES);
    let (code, table, stderr) = vmferry(&["inspect", &source.spec()]);
    assert_eq!(code, 0, "{stderr}");
    for words in [
        "running",
        // What a device pins is written through the file and not mapped.
        "memory      60.0 MiB in /memfd:vmferry-workload",
        "device      gpu0 (a fake device of the workload): can move, pre-copied while the guest runs",
        "device      fpga0 (a fake device of the workload): can move, copied after the pause",
        "nobody tells what it writes: 4.0 MiB travel in the blackout",
        "blocker     none was found",
    ] {
        assert!(table.contains(words), "{words:?} is missing in:\n{table}");
    }
    let (code, json, _) = vmferry(&["inspect", &source.spec(), "--json"]);
    let seen: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, seen["devices"].as_array().unwrap().len()), (0, 4));
    let pid = format!("pid:{}", seen["pid"]);
    let (code, by_pid, _) = vmferry(&["inspect", &pid, "--json"]);
    let by_pid: Value = serde_json::from_str(&by_pid).unwrap();
    assert_eq!((code, &by_pid["memory"]), (0, &seen["memory"]));
    assert_eq!(by_pid["writers"][0]["pid"], seen["pid"]);
    source.wait_phase(Phase::Running);
    source.assert_memory_is_right();
}

#[test]
fn inspect_of_nothing_is_one_sentence() {
    for (word, says, expected) in [
        ("pid:2147483647", "no process 2147483647 runs here", 78),
        ("process:nobody-there", "vmferry workload --name nobody-there", 78),
        ("qemu:/nowhere/a.qmp", "/nowhere/a.qmp", 78),
        ("whatever", "or pid:PID", 2),
    ] {
        let (code, stdout, stderr) = vmferry(&["inspect", word]);
        assert_eq!((code, stdout.as_str()), (expected, ""), "{word}: {stderr}");
        assert!(stderr.contains(says), "{word}: {stderr}");
    }
}
