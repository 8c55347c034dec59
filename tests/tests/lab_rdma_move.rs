//! Whole moves over RDMA in the lab: `rdma://` through the command line, cut in every phase, and tried again over TCP.
#![expect(clippy::unwrap_used, reason = "what a test's helper cannot have fails the test")]

use std::process::Command;

use nix::sys::signal::Signal;
use vmferry_guest::process::Phase;
use vmferry_tests::cable::Cut;
use vmferry_tests::command::{Done, Pki, Running, send};
use vmferry_tests::workload::Workload;

/// The card at the far end of the lab's cable.
const FAR: &str = "10.77.0.2";
const RAM: &str = "8MiB";
const PLAN: &str = "seed=7,set=256,pattern=random,rate=1MiB,zero=200";
/// Everything is emulated here, so no move fits the usual limit: without another one a busy host tries twenty rounds.
const FORCE: &[&str] = &["--on-no-converge", "force", "--downtime-limit", "20s"];

/// How long a phase is held for a cut: to start `tc` twice took longer than 0.3 s on a busy host, and the move was over.
const HOLD_MS: u32 = 2000;

fn receive(guest: &str, more: &[&str], hold: &str) -> (Running, String) {
    let listen = format!("rdma://{FAR}:0");
    let mut words = vec!["receive", "--listen", &listen, "--guest", guest, "--json"];
    words.extend(more);
    let mut running = Running::start(&words, hold);
    let line = running.wait_line("waiting for a guest on");
    let address = line.split(' ').next_back().unwrap_or_default().to_owned();
    assert!(address.starts_with("rdma://"), "{line}");
    (running, address)
}

fn tls(pki: &Pki) -> Vec<&str> {
    vec!["--tls-dir", pki.path().to_str().unwrap()]
}

fn assert_moved(sent: &Done, received: &Done, target: &Workload) {
    assert_eq!((sent.code(), received.code()), (0, 0), "send: {}\nreceive: {}", sent.stderr, received.stderr);
    target.wait_phase(Phase::Running);
    target.assert_memory_is_right();
}

fn assert_runs_on(source: &Workload) {
    source.wait_phase(Phase::Running);
    source.assert_memory_is_right();
}

#[test]
fn a_sealed_move_takes_every_page_along() {
    let pki = Pki::new(FAR);
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    let (receiving, address) = receive(&target.spec(), &tls(&pki), "");
    let words = [&tls(&pki), FORCE, &["--verify", "--lanes", "2"]].concat();
    let sent = send(&source.spec(), &address, &words, "").done();
    assert_moved(&sent, &receiving.done(), &target);
    assert_eq!(sent.report["verified"], true);
    assert!(sent.report["cipher"].as_str().unwrap().starts_with("aes-256-gcm"), "{}", sent.report);
    println!("lab: sealed over rdma: blackout {} ms", sent.report["blackout_ms"]);
}

/// On both sides, or on neither.
const DIRECT: &[&str] = &["--rdma-direct-plaintext"];

#[test]
fn a_direct_move_takes_every_page_along() {
    let pki = Pki::new(FAR);
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    let (receiving, address) = receive(&target.spec(), &[&tls(&pki), DIRECT].concat(), "");
    let words = [&tls(&pki), FORCE, DIRECT, &["--verify", "--lanes", "2"]].concat();
    let sent = send(&source.spec(), &address, &words, "").done();
    assert_moved(&sent, &receiving.done(), &target);
    assert_eq!(sent.report["verified"], true);
    println!("lab: direct over rdma: blackout {} ms", sent.report["blackout_ms"]);
}

/// A guest of several regions, more than may be pinned at a time.
#[test]
fn a_direct_move_of_more_than_may_be_pinned_takes_every_page_along() {
    let pki = Pki::new(FAR);
    let (source, target) = (Workload::run("16MiB", PLAN), Workload::incoming("16MiB"));
    let pin = &["--rdma-pin-max", "8MiB"];
    let (receiving, address) = receive(&target.spec(), &[&tls(&pki), DIRECT, pin].concat(), "");
    let words = [&tls(&pki), FORCE, DIRECT, &["--verify", "--lanes", "4"]].concat();
    let sent = send(&source.spec(), &address, &words, "").done();
    assert_moved(&sent, &receiving.done(), &target);
    assert_eq!(sent.report["verified"], true);
    assert_eq!(
        sent.report["lanes"].as_array().map(Vec::len),
        Some(2),
        "a lane needs a region: {}",
        sent.report
    );
}

#[test]
fn what_may_be_pinned_is_checked_before_anybody_comes() {
    let (pki, target) = (Pki::new(FAR), Workload::incoming(RAM));
    let (listen, spec) = (format!("rdma://{FAR}:0"), target.spec());
    let words = ["receive", "--listen", &listen, "--guest", &spec, "--rdma-pin-max", "1MiB"];
    let refused = Running::start(&[&words[..], &tls(&pki), DIRECT].concat(), "").done();
    assert_eq!(refused.code(), 78, "{}", refused.stderr);
    assert!(refused.sentence().contains("1048576 bytes: give it 4194304 or more"), "{}", refused.stderr);
}

#[test]
fn a_direct_move_into_a_guest_that_is_pinned_beforehand_takes_every_page_along() {
    let pki = Pki::new(FAR);
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    let (receiving, address) =
        receive(&target.spec(), &[&tls(&pki), DIRECT, &["--rdma-pin-all"]].concat(), "");
    let words = [&tls(&pki), FORCE, DIRECT, &["--verify"]].concat();
    let sent = send(&source.spec(), &address, &words, "").done();
    assert_moved(&sent, &receiving.done(), &target);
}

#[test]
fn pages_in_clear_on_one_side_only_are_refused() {
    let pki = Pki::new(FAR);
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    for (ours, theirs) in [(DIRECT, &[][..]), (&[][..], DIRECT)] {
        let (receiving, address) = receive(&target.spec(), &[&tls(&pki), theirs].concat(), "");
        let sent = send(&source.spec(), &address, &[&tls(&pki), FORCE, ours].concat(), "").done();
        assert_eq!(sent.code(), 78, "{}", sent.stderr);
        assert!(sent.sentence().contains("--rdma-direct-plaintext to both sides"), "{}", sent.stderr);
        drop(receiving);
        assert_runs_on(&source);
    }
}

/// Cuts the cable while the source holds in each of these phases.
fn cut_in(phases: &[&str], mode: &[&str]) {
    let pki = Pki::new(FAR);
    let source = Workload::run(RAM, PLAN);
    for phase in phases {
        let target = Workload::incoming(RAM);
        let (receiving, address) = receive(&target.spec(), &[&tls(&pki), mode].concat(), "");
        let words = [&tls(&pki), FORCE, mode].concat();
        let mut sending = send(&source.spec(), &address, &words, &format!("send:{phase}:{HOLD_MS}"));
        sending.wait_line("holding at");
        let cut = Cut::now(&["ve0", "ve1"]);
        let sent = sending.done();
        drop(cut);
        if *phase == "seal" && sent.code() == 3 {
            return;
        }
        println!("lab: cut in {phase}: {}", sent.sentence());
        assert_eq!(sent.code(), 69, "{phase}: {}", sent.stderr);
        drop(receiving);
        assert_runs_on(&source);
    }
}

#[test]
fn a_cut_before_the_blackout_leaves_the_source_running() {
    cut_in(&["negotiate", "prepare", "copy"], &[]);
}

#[test]
fn a_cut_in_the_blackout_leaves_the_source_running() {
    cut_in(&["pause", "last-round", "close-lanes"], &[]);
}

#[test]
fn a_cut_around_the_seal_leaves_the_source_running_or_in_doubt() {
    cut_in(&["target-load", "seal"], &[]);
}

#[test]
fn a_cut_in_direct_mode_leaves_the_source_running() {
    cut_in(&["copy", "last-round"], DIRECT);
}

#[test]
fn a_killed_receiver_leaves_the_source_running() {
    let pki = Pki::new(FAR);
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    let (mut receiving, address) = receive(&target.spec(), &tls(&pki), "receive:receive:5000");
    let sending = send(&source.spec(), &address, &[&tls(&pki), FORCE].concat(), "");
    receiving.wait_line("holding at");
    receiving.signal(Signal::SIGKILL);
    let sent = sending.done();
    assert_eq!(sent.code(), 69, "{}", sent.stderr);
    assert_runs_on(&source);
}

#[test]
fn a_lost_rdma_link_is_tried_again_over_tcp_when_told_so() {
    let pki = Pki::new(FAR);
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    let fallback = &["--rdma-fallback", "tcp"];
    let (receiving, address) = receive(&target.spec(), &[&tls(&pki), &fallback[..]].concat(), "");
    let words = [&tls(&pki), FORCE, fallback].concat();
    let mut sending = send(&source.spec(), &address, &words, &format!("send:copy:{HOLD_MS}"));
    sending.wait_line("holding at");
    let cut = Cut::now(&["ve0", "ve1"]);
    sending.wait_line("trying again over tcp");
    drop(cut);
    assert_moved(&sending.done(), &receiving.done(), &target);
}

#[test]
fn a_target_without_rdma_is_refused_in_a_sentence_or_reached_over_tcp_when_told_so() {
    let pki = Pki::new(FAR);
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    let listen = format!("tcp://{FAR}:0");
    let mut words = vec!["receive", "--listen", &listen, "--guest"];
    let spec = target.spec();
    words.extend([spec.as_str(), "--json"]);
    words.extend(tls(&pki));
    let mut receiving = Running::start(&words, "");
    let line = receiving.wait_line("waiting for a guest on");
    let address = line.split(' ').next_back().unwrap().replace("tcp://", "rdma://");
    let refused = send(&source.spec(), &address, &[&tls(&pki), FORCE].concat(), "").done();
    assert_eq!(refused.code(), 78, "{}", refused.stderr);
    assert!(refused.sentence().contains("--listen rdma://"), "{}", refused.stderr);
    assert_runs_on(&source);
    let words = [&tls(&pki), FORCE, &["--rdma-fallback", "tcp"]].concat();
    let sent = send(&source.spec(), &address, &words, "").done();
    assert_moved(&sent, &receiving.done(), &target);
}

#[test]
fn the_bench_counts_what_each_way_asks_for() {
    let bench = vmferry_tests::command::program().with_file_name("vmferry-bench");
    let ran = Command::new(bench).args(["rdma", "--address", FAR, "--quick", "--json"]).output().unwrap();
    let (said, told) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    assert!(ran.status.success(), "{told}");
    let report: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
    let rows = report["rdma"].as_array().unwrap();
    assert_eq!(rows.len(), 3, "{report}");
    for row in rows {
        let count = |key: &str| row[key].as_f64().unwrap();
        assert!(count("operations") > 0.0 && count("system_calls") > 0.0, "{row}");
        println!("\nlab: per GiB: {row}");
    }
}
