//! Moves of a micro-VM struck in every phase before Commit: the guest runs on where it was with every page as it must be,
//! the target waits for the next guest, and the next move succeeds.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use vmferry_guest::kvm::MicroVmPhase;
use vmferry_tests::command::{Done, Running, SOURCE_PHASES, TARGET_PHASES, hold, receive, send};
use vmferry_tests::microvm::CountingVm;
use vmferry_tests::proxy::Proxy;

const PLAIN: [&str; 1] = ["--insecure-plaintext"];
/// The lab's blackouts are emulated ones.
const WORDS: [&str; 3] = ["--insecure-plaintext", "--downtime-limit", "20s"];
/// Long enough that a strike surely falls into it.
const LONG_MS: u32 = 20_000;
const SHORT_MS: u32 = 600;

/// A guest, and a micro-VM that waits for it; how the source tracks is of no matter to a strike, so both ways are used.
fn pair(dirty: &str) -> (CountingVm, CountingVm) {
    (CountingVm::run(&["--dirty", dirty]), CountingVm::incoming(&[]))
}

/// The target after a failed move: it waits, as if nothing had been.
fn assert_waits_again(target: &CountingVm) {
    target.wait_phase(MicroVmPhase::Waiting);
}

/// At last the move succeeds, and the guest counts on there, from where it was.
fn move_at_last(source: &mut CountingVm, target: &CountingVm) {
    let before = source.assert_counts_on();
    let (receiving, address) = receive(&target.spec(), &PLAIN, "");
    let sent = send(&source.spec(), &address, &[&WORDS[..], &["--verify"]].concat(), "").done();
    assert_completed(&sent, &receiving.done());
    let there = target.assert_counts_on();
    assert!(there > before, "{there} passes there, {before} here");
    source.wait_end();
    let blackout = &sent.report["blackout_ms"];
    println!("\nlab: after all that it moved, {blackout} ms away; {before} passes here, {there} there");
}

fn assert_completed(sent: &Done, received: &Done) {
    assert_eq!((sent.code(), received.code()), (0, 0), "send: {}\nreceive: {}", sent.stderr, received.stderr);
}

#[test]
fn ctrl_c_in_every_phase_leaves_the_guest_where_it_was() {
    let (mut source, target) = pair("bitmap");
    for phase in SOURCE_PHASES.into_iter().filter(|phase| *phase != "seal") {
        let (receiving, address) = receive(&target.spec(), &PLAIN, "");
        let mut sending = send(&source.spec(), &address, &WORDS, &hold("send", phase, SHORT_MS));
        sending.wait_line("holding at");
        sending.signal(Signal::SIGINT);
        let (sent, received) = (sending.done(), receiving.done());
        assert_eq!(sent.code(), 130, "{phase}: {}", sent.stderr);
        assert_ne!(received.code(), 0, "{phase}: {}", received.stderr);
        source.assert_counts_on();
        assert_waits_again(&target);
    }
    move_at_last(&mut source, &target);
}

#[test]
fn a_killed_sender_in_every_phase_leaves_the_guest_where_it_was() {
    let (mut source, target) = pair("ring");
    for phase in SOURCE_PHASES {
        let (receiving, address) = receive(&target.spec(), &PLAIN, "");
        let mut sending = send(&source.spec(), &address, &WORDS, &hold("send", phase, LONG_MS));
        sending.wait_line("holding at");
        sending.signal(Signal::SIGKILL);
        drop(sending);
        source.assert_counts_on();
        end(receiving, phase);
        assert_waits_again(&target);
    }
    move_at_last(&mut source, &target);
}

/// A receiver whose source died: it ends by itself once it knows, or waits for another source; then it is told to.
fn end(receiving: Running, phase: &str) {
    receiving.signal(Signal::SIGINT);
    let received = receiving.done();
    assert_ne!(received.code(), 0, "{phase}: {}", received.stderr);
}

#[test]
fn a_killed_receiver_in_every_phase_leaves_the_guest_where_it_was() {
    let (mut source, target) = pair("bitmap");
    for phase in TARGET_PHASES {
        let (mut receiving, address) = receive(&target.spec(), &PLAIN, &hold("receive", phase, LONG_MS));
        let sending = send(&source.spec(), &address, &WORDS, "");
        receiving.wait_line("holding at");
        receiving.signal(Signal::SIGKILL);
        drop(receiving);
        let sent = sending.done();
        assert_eq!(sent.code(), 69, "{phase}: {}", sent.stderr);
        source.assert_counts_on();
        assert_waits_again(&target);
    }
    move_at_last(&mut source, &target);
}

#[test]
fn a_cut_link_in_every_phase_leaves_the_guest_where_it_was() {
    let (mut source, target) = pair("ring");
    for phase in SOURCE_PHASES.into_iter().filter(|phase| *phase != "seal") {
        let (receiving, address) = receive(&target.spec(), &PLAIN, "");
        let proxy = Proxy::to(&address);
        let mut sending = send(&source.spec(), &proxy.address(), &WORDS, &hold("send", phase, SHORT_MS));
        sending.wait_line("holding at");
        proxy.cut();
        let sent = sending.done();
        assert_eq!(sent.code(), 69, "{phase}: {}", sent.stderr);
        source.assert_counts_on();
        end(receiving, phase);
        assert_waits_again(&target);
    }
    move_at_last(&mut source, &target);
}

#[test]
fn a_micro_vm_that_dies_under_its_receiver_leaves_the_guest_where_it_was() {
    let mut source = CountingVm::run(&[]);
    for phase in TARGET_PHASES {
        let mut target = CountingVm::incoming(&[]);
        let (mut receiving, address) = receive(&target.spec(), &PLAIN, &hold("receive", phase, SHORT_MS));
        let sending = send(&source.spec(), &address, &WORDS, "");
        receiving.wait_line("holding at");
        target.kill();
        let (sent, received) = (sending.done(), receiving.done());
        // In `ready` the Commit comes after the death: the receiver proves that the guest never ran there.
        assert_ne!(sent.code(), 0, "{phase}: {}", sent.stderr);
        assert_ne!(sent.code(), 3, "{phase}, in doubt: {}", sent.stderr);
        assert_ne!(received.code(), 0, "{phase}: {}", received.stderr);
        assert!(received.sentence().contains("never ran here"), "{phase}: {}", received.stderr);
        source.assert_counts_on();
    }
    move_at_last(&mut source, &CountingVm::incoming(&[]));
}

/// Where the brake of a micro-VM's processors shows, while it is on.
fn brake(source: &CountingVm) -> PathBuf {
    Path::new("/sys/fs/cgroup").join(format!("vmferry-{}", source.pid()))
}

fn comes(is_so: impl Fn() -> bool) -> bool {
    (0..500).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        is_so()
    })
}

#[test]
fn a_guest_that_was_slowed_down_is_not_when_its_sender_is_killed() {
    let (mut source, target) = pair("bitmap");
    // It writes all of its two megabytes all the time, and they take two seconds.
    let words = [PLAIN[0], "--downtime-limit", "500ms", "--on-no-converge", "throttle"];
    let (receiving, address) = receive(&target.spec(), &PLAIN, "");
    let proxy = Proxy::to(&address);
    proxy.slow_down(1 << 20);
    let mut sending = send(&source.spec(), &proxy.address(), &words, "");
    println!("\nlab: {}", sending.wait_line("the guest is slowed down by"));
    // It is said before it is done.
    assert!(comes(|| brake(&source).is_dir()), "no brake at {}", brake(&source).display());
    sending.signal(Signal::SIGKILL);
    drop(sending);
    assert!(comes(|| !brake(&source).exists()), "the brake stays on");
    end(receiving, "copy");
    move_at_last(&mut source, &target);
}
