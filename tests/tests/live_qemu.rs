//! Whole moves of a Linux guest between two unmodified QEMUs through the command line.
//!
//! The guest proves itself: its init knows what every page of its workload must hold and verifies them after the move,
//! and its heart beat says whether it ran on one side at a time. One boot under emulation serves many attempts: a
//! failed one must leave the source running, which is what these tests are about.
#![expect(clippy::unwrap_used, reason = "what a test's helper cannot have fails the test")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vmferry_rig::{
    Assets, Memory, QemuGuest, RunningGuest, SecondWriter, create_disk, guest_gap, huge_pages, require, root,
};
use vmferry_tests::command::{Done, Pki, receive, send};
use vmferry_tests::proxy::Proxy;
use vmferry_workload::Plan;

const MIB: u64 = 1 << 20;
const IDLE: &str = "seed=1,pages=8192,set=8192,pattern=sequential,rate=1,zero=100";
const DIRTYING: &str = "seed=2,pages=16384,set=4096,pattern=random,rate=30MiB,zero=100";

fn plan(words: &str) -> Plan {
    words.parse().unwrap()
}

fn tls(pki: &Pki) -> Vec<&str> {
    vec!["--tls-dir", pki.path().to_str().unwrap()]
}

fn assert_moved(sent: &Done, received: &Done) {
    assert_eq!((sent.code(), received.code()), (0, 0), "send: {}\nreceive: {}", sent.stderr, received.stderr);
}

/// The guest beats, writes and finds all of its pages right.
fn assert_alive(guest: &mut RunningGuest) {
    #[expect(clippy::disallowed_methods, reason = "heart beats are stamped by this clock")]
    let now = Instant::now();
    assert!(
        guest.beats().wait_since(now, Duration::from_secs(20)).is_some(),
        "no heart beat: {}",
        guest.log()
    );
    let report = guest.console().verify().unwrap();
    assert!(report.is_clean(), "{} of {} pages are wrong: {:?}", report.wrong, report.pages, report.faults);
    let status = guest.console().status().unwrap();
    assert_eq!((status.wrong, status.disk_wrong), (0, 0), "{status:?}");
}

/// Moves the guest with `--verify`, and lets it prove itself; returns the target and the sender's report.
fn move_and_prove(
    recipe: &QemuGuest,
    source: &RunningGuest,
    pki: &Pki,
    name: &str,
    more: &[&str],
) -> (RunningGuest, Done) {
    #[expect(clippy::disallowed_methods, reason = "heart beats are stamped by this clock")]
    let since = Instant::now();
    let mut target = recipe.await_incoming(name).unwrap();
    let (receiving, address) = receive(&target.spec(), &tls(pki), "");
    let sent = send(&source.spec(), &address, &[&tls(pki), more].concat(), "").done();
    assert_moved(&sent, &receiving.done());
    assert_alive(&mut target);
    let handover = guest_gap(source.beats(), target.beats(), since).unwrap();
    assert!(!handover.overlaps(), "the guest beat on both sides at once");
    (target, sent)
}

#[test]
fn an_idle_and_then_a_dirtying_guest_go_there_and_back() {
    require!(root());
    let assets = require!(Assets::find());
    let pki = Pki::new("127.0.0.1");
    let recipe = QemuGuest::new(&assets, 256 * MIB, plan(IDLE)).unwrap();
    let source = recipe.boot("a").unwrap();
    let (mut there, sent) =
        move_and_prove(&recipe, &source, &pki, "b", &["--verify", "--downtime-limit", "2s"]);
    assert_eq!(sent.report["verified"], true);
    assert_eq!(sent.report["tracker"], "pagemap-scan");
    assert!(sent.report["own_memory_peak_bytes"].as_u64().unwrap() < 64 << 20);
    drop(source);
    for word in ["set rate=30MiB", "set set=4096", "set pattern=random"] {
        let answer = there.console().ask(word).unwrap();
        assert!(!answer.contains("error"), "{word}: {answer}");
    }
    let (back, sent) =
        move_and_prove(&recipe, &there, &pki, "c", &["--verify", "--lanes", "2", "--downtime-limit", "2s"]);
    assert_eq!(sent.report["verified"], true);
    assert!(sent.report["ram"]["rounds"].as_u64().unwrap() >= 2);
    drop(back);
}

#[test]
fn two_numa_blocks_with_one_above_four_gibibytes() {
    require!(root());
    let assets = require!(Assets::find());
    let pki = Pki::new("127.0.0.1");
    // Sparse files: only what the guest touches is there. q35 maps all above 2 GiB beyond the fourth gibibyte.
    let recipe = QemuGuest::new(&assets, 0, plan(DIRTYING)).unwrap().numa(&[2048 * MIB, 512 * MIB]);
    let source = recipe.boot("a").unwrap();
    let (_target, sent) =
        move_and_prove(&recipe, &source, &pki, "b", &["--verify", "--downtime-limit", "5s"]);
    assert_eq!(sent.report["ram"]["total_bytes"], 2560 * MIB);
    assert_eq!(sent.report["verified"], true);
}

#[test]
fn a_guest_on_huge_pages() {
    require!(root());
    let assets = require!(Assets::find());
    let folder: PathBuf = require!(huge_pages(2 * 96));
    let pki = Pki::new("127.0.0.1");
    let memory = Memory::HugePages(folder);
    let recipe = QemuGuest::new(&assets, 192 * MIB, plan("seed=4,pages=8192,set=1024,rate=4MiB"))
        .unwrap()
        .memory(memory);
    let source = recipe.boot("a").unwrap();
    let (_target, sent) =
        move_and_prove(&recipe, &source, &pki, "b", &["--verify", "--downtime-limit", "2s"]);
    assert_eq!(sent.report["verified"], true);
}

#[test]
fn a_disk_read_with_o_direct_during_the_move() {
    require!(root());
    let assets = require!(Assets::find());
    let pki = Pki::new("127.0.0.1");
    let recipe = QemuGuest::new(&assets, 256 * MIB, plan(DIRTYING)).unwrap();
    let disk = recipe.directory().join("disk.raw");
    create_disk(&disk, 4096).unwrap();
    let recipe = recipe.disk(&disk);
    let mut source = recipe.boot("a").unwrap();
    let before = source.console().status().unwrap();
    assert!(before.disk_reads > 0, "{before:?}");
    let (mut target, sent) =
        move_and_prove(&recipe, &source, &pki, "b", &["--verify", "--downtime-limit", "2s"]);
    assert!(sent.report["notes"].to_string().contains("O_DIRECT"), "{}", sent.report["notes"]);
    std::thread::sleep(Duration::from_millis(300));
    let after = target.console().status().unwrap();
    assert!(after.disk_reads > before.disk_reads, "the disk is read on the target: {after:?}");
    assert_eq!(after.disk_wrong, 0);
}

#[test]
fn a_second_process_that_writes_the_guests_memory() {
    require!(root());
    let assets = require!(Assets::find());
    let pki = Pki::new("127.0.0.1");
    let (ram, top) = (256 * MIB, 16 * MIB);
    let recipe = QemuGuest::new(&assets, ram, plan(IDLE)).unwrap().reserve_top(top);
    let source = recipe.boot("a").unwrap();
    let first_page = (ram - top) / 4096;
    let words = format!("seed=9,pages={},set={},pattern=random,rate=20MiB,zero=100", top / 4096, top / 4096);
    let writer = SecondWriter::start(&source.memory_files()[0], first_page, &plan(&words)).unwrap();
    let mut target = recipe.await_incoming("b").unwrap();
    let (receiving, address) = receive(&target.spec(), &tls(&pki), "");
    // A backend stops before its VMM does: hold the move between the last round of copying and the pause, stop it there.
    let words = [&tls(&pki)[..], &["--verify", "--downtime-limit", "2s"]].concat();
    let mut sending = send(&source.spec(), &address, &words, "send:pause:1000");
    sending.wait_line("holding at");
    let written = writer.stop().unwrap();
    assert_moved(&sending.done(), &receiving.done());
    let report = written.verify(&target.memory_files()[0]).unwrap();
    assert!(report.is_clean(), "{} of {} pages are wrong: {:?}", report.wrong, report.pages, report.faults);
    assert_alive(&mut target);
}

const SOURCE_PHASES: &[&str] =
    &["negotiate", "prepare", "copy", "pause", "last-round", "close-lanes", "target-load", "seal"];
const TARGET_PHASES: &[&str] = &["prepare", "receive", "complete", "load"];

#[test]
fn cancel_kill_and_cut_in_every_phase_leave_the_guest_running() {
    require!(root());
    let assets = require!(Assets::find());
    let pki = Pki::new("127.0.0.1");
    let recipe = QemuGuest::new(&assets, 192 * MIB, plan(DIRTYING)).unwrap();
    let mut source = recipe.boot("a").unwrap();
    for phase in SOURCE_PHASES {
        for blow in ["cancel", "kill", "cut"] {
            if (*phase, blow) == ("seal", "cut") || (*phase, blow) == ("seal", "cancel") {
                // What was sealed is not undone by these; the process guest's tests cover both ends of it.
                continue;
            }
            let target = recipe.await_incoming("b").unwrap();
            let (receiving, address) = receive(&target.spec(), &tls(&pki), "");
            let proxy = Proxy::to(&address);
            let ms = if blow == "kill" { 10_000 } else { 300 };
            let mut sending =
                send(&source.spec(), &proxy.address(), &tls(&pki), &format!("send:{phase}:{ms}"));
            sending.wait_line("holding at");
            match blow {
                "cancel" => sending.signal(Signal::SIGINT),
                "kill" => sending.signal(Signal::SIGKILL),
                _ => proxy.cut(),
            }
            let sent = sending.done();
            assert_ne!(sent.code(), 0, "{phase}, {blow}: {}", sent.stderr);
            drop((receiving, target));
            assert_alive(&mut source);
        }
    }
    for phase in TARGET_PHASES {
        let target = recipe.await_incoming("b").unwrap();
        let (mut receiving, address) = receive(&target.spec(), &tls(&pki), &format!("receive:{phase}:10000"));
        let sending = send(&source.spec(), &address, &tls(&pki), "");
        receiving.wait_line("holding at");
        receiving.signal(Signal::SIGKILL);
        let sent = sending.done();
        assert_eq!(sent.code(), 69, "{phase}: {}", sent.stderr);
        drop(target);
        assert_alive(&mut source);
    }
    let (_target, sent) =
        move_and_prove(&recipe, &source, &pki, "b", &["--verify", "--downtime-limit", "2s"]);
    assert_eq!(sent.report["verified"], true, "after all of that a retry is complete");
}

#[test]
fn a_target_that_does_not_fit_is_refused_before_the_first_page() {
    require!(root());
    let assets = require!(Assets::find());
    let pki = Pki::new("127.0.0.1");
    let recipe = QemuGuest::new(&assets, 128 * MIB, plan("seed=1,pages=1024")).unwrap();
    let mut source = recipe.boot("a").unwrap();
    let others = [
        ("machine", QemuGuest::new(&assets, 128 * MIB, plan("seed=1,pages=1024")).unwrap().machine("pc")),
        ("RAM", QemuGuest::new(&assets, 160 * MIB, plan("seed=1,pages=1024")).unwrap()),
        ("cpus", QemuGuest::new(&assets, 128 * MIB, plan("seed=1,pages=1024")).unwrap().cpus(2)),
    ];
    for (what, other) in &others {
        let target = other.await_incoming("b").unwrap();
        let (_receiving, address) = receive(&target.spec(), &tls(&pki), "");
        let sent = send(&source.spec(), &address, &tls(&pki), "").done();
        assert_eq!(sent.code(), 78, "{what}: {}", sent.stderr);
        assert!(sent.sentence().contains(what), "{what}: {}", sent.stderr);
        assert_eq!(sent.report["ram"]["wire_bytes"], 0);
    }
    assert_alive(&mut source);
}
