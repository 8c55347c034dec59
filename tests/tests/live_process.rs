//! Whole moves of the embedded process guest through the command line: sealed, plain, refused, cancelled, killed, cut.
//!
//! The workload proves after each end that no page is stale, torn or lost; every failure before Commit must leave it
//! running where it was.
#![expect(clippy::unwrap_used, reason = "what a test's helper cannot have fails the test")]

use nix::sys::signal::Signal;
use vmferry_guest::process::Phase;
use vmferry_tests::command::{Done, Pki, Running, SOURCE_PHASES, TARGET_PHASES, hold, receive, send};
use vmferry_tests::proxy::Proxy;
use vmferry_tests::workload::Workload;

const PLAN: &str = "seed=7,set=2048,pattern=random,rate=20MiB,zero=200";
const RAM: &str = "64MiB";
/// Slow enough that a signal surely falls into the first rounds.
const SLOW: &[&str] = &["--bandwidth", "20MiB"];

fn tls(pki: &Pki) -> Vec<&str> {
    vec!["--tls-dir", pki.path().to_str().unwrap()]
}

/// Moves `source` into a fresh target with `more` on the sender, both ends as they come.
fn attempt(source: &Workload, target: &Workload, pki: &Pki, more: &[&str]) -> (Done, Done) {
    let (receiving, address) = receive(&target.spec(), &tls(pki), "");
    let sent = send(&source.spec(), &address, &[&tls(pki), more].concat(), "").done();
    (sent, receiving.done())
}

fn assert_moved(sent: &Done, received: &Done) {
    assert_eq!((sent.code(), received.code()), (0, 0), "send: {}\nreceive: {}", sent.stderr, received.stderr);
    assert_eq!(sent.report["status"], "completed");
    assert_eq!(received.report["status"], "completed");
}

fn assert_runs_on(source: &Workload) {
    source.wait_phase(Phase::Running);
    source.assert_memory_is_right();
}

#[test]
fn a_sealed_move_takes_every_page_along() {
    let pki = Pki::new("127.0.0.1");
    let (mut source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    let (sent, received) = attempt(&source, &target, &pki, &["--verify"]);
    assert_moved(&sent, &received);
    target.wait_phase(Phase::Running);
    target.assert_memory_is_right();
    assert!(!source.is_alive(), "the source's process has ended");
    let report = &sent.report;
    assert_eq!(report["verified"], true);
    assert!(report["cipher"].as_str().unwrap().starts_with("aes-256-gcm"), "{report}");
    for key in ["total_ms", "blackout_ms", "throughput_bytes_per_s", "cpu_seconds"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}: {report}");
    }
    let predicted = &report["predicted_blackout_ms"];
    assert!(
        predicted["p05"].as_f64() <= predicted["p50"].as_f64()
            && predicted["p50"].as_f64() <= predicted["p95"].as_f64()
    );
    assert!(
        report["ram"]["zero_pages"].as_u64().unwrap() > 0 && report["ram"]["rounds"].as_u64().unwrap() >= 2
    );
    assert!(report["device_state_bytes"].as_u64().unwrap() > 0);
    assert!(
        !report["lanes"].as_array().unwrap().is_empty() && !report["phases"].as_array().unwrap().is_empty()
    );
    assert!(report["own_memory_peak_bytes"].as_u64().unwrap() < 64 << 20, "{report}");
}

#[test]
fn plaintext_moves_when_both_sides_ask_for_it() {
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    let (receiving, address) = receive(&target.spec(), &["--insecure-plaintext"], "");
    let sent = send(&source.spec(), &address, &["--insecure-plaintext", "--lanes", "3"], "").done();
    assert_moved(&sent, &receiving.done());
    assert_eq!(sent.report["cipher"], "none");
    assert_eq!(sent.report["lanes"].as_array().unwrap().len(), 3);
    target.assert_memory_is_right();
}

#[test]
fn compressed_pages_arrive_whole_and_smaller() {
    let pki = Pki::new("127.0.0.1");
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    let (sent, received) = attempt(&source, &target, &pki, &["--compress", "zstd", "--verify"]);
    assert_moved(&sent, &received);
    target.assert_memory_is_right();
}

#[test]
fn plaintext_on_one_side_is_refused_and_the_source_runs_on() {
    let pki = Pki::new("127.0.0.1");
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    for (ours, theirs) in
        [(vec!["--insecure-plaintext"], tls(&pki)), (tls(&pki), vec!["--insecure-plaintext"])]
    {
        let (receiving, address) = receive(&target.spec(), &theirs, "");
        let sent = send(&source.spec(), &address, &ours, "").done();
        assert_eq!(sent.code(), 78, "{}", sent.stderr);
        assert!(sent.sentence().contains("--insecure-plaintext"), "{}", sent.stderr);
        receiving.signal(Signal::SIGINT);
        let received = receiving.done();
        assert_eq!(received.code(), 130, "{}", received.stderr);
        assert_eq!(received.report["turned_away"], 1, "{}", received.stderr);
        assert_runs_on(&source);
    }
}

#[test]
fn a_strangers_certificate_and_a_wrong_host_are_refused() {
    let (ours, theirs, other_host) = (Pki::new("127.0.0.1"), Pki::new("127.0.0.1"), Pki::new("192.0.2.1"));
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    for (client, server, word) in [(&ours, &theirs, "same CA"), (&other_host, &other_host, "--tls-hostname")]
    {
        let (receiving, address) = receive(&target.spec(), &tls(server), "");
        let sent = send(&source.spec(), &address, &tls(client), "").done();
        assert_eq!(sent.code(), 78, "{}", sent.stderr);
        assert!(sent.sentence().contains(word), "{}", sent.stderr);
        drop(receiving);
        assert_runs_on(&source);
    }
}

#[test]
fn a_target_of_another_size_is_refused_with_both_sizes() {
    let pki = Pki::new("127.0.0.1");
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming("32MiB"));
    let (receiving, address) = receive(&target.spec(), &tls(&pki), "");
    let sent = send(&source.spec(), &address, &tls(&pki), "").done();
    assert_eq!(sent.code(), 78, "{}", sent.stderr);
    drop(receiving);
    assert_runs_on(&source);
}

#[test]
fn nobody_there_is_one_sentence() {
    let pki = Pki::new("127.0.0.1");
    let source = Workload::run(RAM, PLAN);
    let sent = send(&source.spec(), "tcp://127.0.0.1:1", &tls(&pki), "").done();
    assert_eq!(sent.code(), 69);
    assert!(sent.sentence().contains("vmferry receive"), "{}", sent.stderr);
    assert_runs_on(&source);
}

#[test]
fn ctrl_c_in_every_phase_before_commit_leaves_the_source_running() {
    let pki = Pki::new("127.0.0.1");
    let source = Workload::run(RAM, PLAN);
    for phase in SOURCE_PHASES {
        let target = Workload::incoming(RAM);
        let (receiving, address) = receive(&target.spec(), &tls(&pki), "");
        let mut sending = send(&source.spec(), &address, &tls(&pki), &hold("send", phase, 400));
        sending.wait_line("holding at");
        sending.signal(Signal::SIGINT);
        let (sent, received) = (sending.done(), receiving.done());
        if phase == "seal" && sent.code() == 0 {
            // The seal was recorded before the signal was heard: from there on there is no way back, and none is promised.
            assert_moved(&sent, &received);
            target.assert_memory_is_right();
            return;
        }
        assert_eq!(sent.code(), 130, "{phase}: {}", sent.stderr);
        assert_ne!(received.code(), 0, "{phase}: {}", received.stderr);
        assert_runs_on(&source);
    }
}

#[test]
fn a_killed_sender_leaves_the_source_running_in_every_phase() {
    let pki = Pki::new("127.0.0.1");
    let source = Workload::run(RAM, PLAN);
    for phase in SOURCE_PHASES {
        let target = Workload::incoming(RAM);
        let (_receiving, address) = receive(&target.spec(), &tls(&pki), "");
        let mut sending = send(&source.spec(), &address, &tls(&pki), &hold("send", phase, 5000));
        sending.wait_line("holding at");
        sending.signal(Signal::SIGKILL);
        drop(sending);
        assert_runs_on(&source);
    }
    let target = Workload::incoming(RAM);
    let (sent, received) = attempt(&source, &target, &pki, &["--verify"]);
    assert_moved(&sent, &received);
    target.assert_memory_is_right();
}

#[test]
fn a_killed_receiver_leaves_the_source_running_in_every_phase() {
    let pki = Pki::new("127.0.0.1");
    let source = Workload::run(RAM, PLAN);
    for phase in TARGET_PHASES {
        let target = Workload::incoming(RAM);
        let (mut receiving, address) = receive(&target.spec(), &tls(&pki), &hold("receive", phase, 5000));
        let sending = send(&source.spec(), &address, &tls(&pki), "");
        receiving.wait_line("holding at");
        receiving.signal(Signal::SIGKILL);
        let sent = sending.done();
        if phase == "ready" {
            // Killed between Ready and the answer to Commit: the source cannot know, and says so.
            assert!(sent.code() == 3 || sent.code() == 69, "{phase}: {}", sent.stderr);
            return;
        }
        assert_eq!(sent.code(), 69, "{phase}: {}", sent.stderr);
        assert_runs_on(&source);
    }
}

#[test]
fn a_cut_link_leaves_the_source_running_in_every_phase() {
    let pki = Pki::new("127.0.0.1");
    let source = Workload::run(RAM, PLAN);
    for phase in SOURCE_PHASES {
        let target = Workload::incoming(RAM);
        let (receiving, address) = receive(&target.spec(), &tls(&pki), "");
        let proxy = Proxy::to(&address);
        let mut sending = send(&source.spec(), &proxy.address(), &tls(&pki), &hold("send", phase, 400));
        sending.wait_line("holding at");
        proxy.cut();
        let sent = sending.done();
        if phase == "seal" && sent.code() == 3 {
            return;
        }
        assert_eq!(sent.code(), 69, "{phase}: {}", sent.stderr);
        drop(receiving);
        assert_runs_on(&source);
    }
}

#[test]
fn a_silent_link_is_noticed_and_the_source_runs_on() {
    let pki = Pki::new("127.0.0.1");
    let (source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    let (_receiving, address) = receive(&target.spec(), &tls(&pki), "");
    let proxy = Proxy::to(&address);
    let words = [&tls(&pki), SLOW, &["--timeout", "4s"]].concat();
    let mut sending = send(&source.spec(), &proxy.address(), &words, &hold("send", "copy", 300));
    sending.wait_line("holding at");
    proxy.fall_silent();
    let sent = sending.done();
    assert!(sent.code() == 75 || sent.code() == 69, "{}", sent.stderr);
    assert_runs_on(&source);
}

#[test]
fn a_commit_whose_answer_is_lost_is_asked_for_again() {
    let pki = Pki::new("127.0.0.1");
    let (mut source, target) = (Workload::run(RAM, PLAN), Workload::incoming(RAM));
    let (mut receiving, address) = receive(&target.spec(), &tls(&pki), &hold("receive", "ran", 1500));
    let proxy = Proxy::to(&address);
    let sending = send(&source.spec(), &proxy.address(), &tls(&pki), "");
    // Commit has arrived and the guest runs; `Running` is held back, and its connection dies.
    receiving.wait_line("holding at");
    proxy.cut();
    proxy.mend();
    let (sent, received) = (sending.done(), receiving.done());
    assert_moved(&sent, &received);
    target.assert_memory_is_right();
    assert!(!source.is_alive());
}

#[test]
fn what_cannot_converge_says_why_and_ends_as_it_was_told() {
    let pki = Pki::new("127.0.0.1");
    let source = Workload::run(RAM, "seed=3,pattern=random,rate=max");
    let words = ["--bandwidth", "30MiB", "--downtime-limit", "20ms"];
    let target = Workload::incoming(RAM);
    let (sent, received) = attempt(&source, &target, &pki, &words);
    assert_eq!(sent.code(), 75, "{}", sent.stderr);
    assert_ne!(received.code(), 0);
    assert_runs_on(&source);
    let target = Workload::incoming(RAM);
    let (sent, received) =
        attempt(&source, &target, &pki, &[&words[..], &["--on-no-converge", "force"]].concat());
    assert_moved(&sent, &received);
    target.assert_memory_is_right();
}

#[test]
fn two_senders_of_one_guest_or_into_one_target_do_not_meet() {
    let pki = Pki::new("127.0.0.1");
    let (source, other, target) =
        (Workload::run(RAM, PLAN), Workload::run(RAM, PLAN), Workload::incoming(RAM));
    let (receiving, address) = receive(&target.spec(), &tls(&pki), "");
    let mut first: Running = send(&source.spec(), &address, &tls(&pki), &hold("send", "copy", 1000));
    first.wait_line("holding at");
    let second = send(&other.spec(), &address, &tls(&pki), "").done();
    assert_ne!(second.code(), 0);
    assert_runs_on(&other);
    assert_moved(&first.done(), &receiving.done());
    target.assert_memory_is_right();
}
