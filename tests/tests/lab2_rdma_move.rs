//! Moves over RDMA from one lab host to the other: their soft cards are at the ends of the network between the hosts.
#![expect(clippy::unwrap_used, reason = "what a test's helper cannot have fails the test")]

use vmferry_guest::process::Phase;
use vmferry_rig::lab::{Host, Place};
use vmferry_tests::cable::Cut;
use vmferry_tests::command::{Pki, Running, send};
use vmferry_tests::workload::Workload;

const RAM: &str = "16MiB";
const PLAN: &str = "seed=9,set=256,pattern=random,rate=1MiB,zero=200";
/// Everything is emulated here, so no move fits the usual limit.
const FORCE: &[&str] = &["--on-no-converge", "force", "--downtime-limit", "20s", "--lanes", "2"];
const DIRECT: &[&str] = &["--rdma-direct-plaintext"];

/// The keys of both hosts: made on host b, whose address they name, and handed over at the meeting.
fn keys(place: &Place) -> Pki {
    match place.host {
        Host::A => Pki::from_line(&place.meet("keys", "").unwrap()),
        Host::B => {
            let pki = Pki::new(&place.address.to_string());
            place.meet("keys", &pki.to_line()).unwrap();
            pki
        }
    }
}

/// Starts `vmferry receive` on this host and tells the other one where.
fn receive(place: &Place, pki: &Pki, guest: &Workload, mode: &[&str]) -> Running {
    let (listen, spec) = (format!("rdma://{}:0", place.address), guest.spec());
    let words = ["receive", "--listen", &listen, "--guest", &spec, "--json", "--tls-dir"];
    let mut running = Running::start(&[&words[..], &[pki.path().to_str().unwrap()], mode].concat(), "");
    let line = running.wait_line("waiting for a guest on");
    place.meet("the receiver listens", line.split(' ').next_back().unwrap_or_default()).unwrap();
    running
}

/// Starts `vmferry send` to where the other host listens.
fn start_send(place: &Place, pki: &Pki, guest: &Workload, more: &[&str], hold: &str) -> Running {
    let address = place.meet("the receiver listens", "").unwrap();
    assert!(address.starts_with("rdma://"), "{address}");
    let words = [&["--tls-dir", pki.path().to_str().unwrap()], FORCE, more].concat();
    send(&guest.spec(), &address, &words, hold)
}

/// No half ends before the other has looked at everything.
fn ended(place: &Place) {
    place.meet("all was looked at", "").unwrap();
}

fn moves(mode: &[&str]) {
    let place = Place::find().unwrap();
    let pki = keys(&place);
    match place.host {
        Host::A => {
            let source = Workload::run(RAM, PLAN);
            let sent = start_send(&place, &pki, &source, &[&["--verify"], mode].concat(), "").done();
            assert_eq!(sent.code(), 0, "{}", sent.stderr);
            assert_eq!(sent.report["verified"], true, "{}", sent.report);
            println!("lab: from host to host over rdma {mode:?}: blackout {} ms", sent.report["blackout_ms"]);
        }
        Host::B => {
            let target = Workload::incoming(RAM);
            let received = receive(&place, &pki, &target, mode).done();
            assert_eq!(received.code(), 0, "{}", received.stderr);
            target.wait_phase(Phase::Running);
            target.assert_memory_is_right();
        }
    }
    ended(&place);
}

#[test]
fn a_sealed_move_from_host_to_host_takes_every_page_along() {
    moves(&[]);
}

#[test]
fn a_direct_move_from_host_to_host_takes_every_page_along() {
    moves(DIRECT);
}

/// Cuts the network between the hosts while the source holds in the blackout.
fn cut_in_the_blackout(mode: &[&str]) {
    let place = Place::find().unwrap();
    let pki = keys(&place);
    match place.host {
        Host::A => {
            let source = Workload::run(RAM, PLAN);
            let mut sending = start_send(&place, &pki, &source, mode, "send:last-round:2000");
            sending.wait_line("holding at");
            let cut = Cut::now(&["lan0"]);
            let sent = sending.done();
            drop(cut);
            println!("lab: cut between the hosts {mode:?}: {}", sent.sentence());
            assert_eq!(sent.code(), 69, "{}", sent.stderr);
            source.wait_phase(Phase::Running);
            source.assert_memory_is_right();
        }
        Host::B => {
            let target = Workload::incoming(RAM);
            let received = receive(&place, &pki, &target, mode).done();
            assert_eq!(received.code(), 69, "{}", received.stderr);
            target.wait_phase(Phase::Waiting);
        }
    }
    ended(&place);
}

#[test]
fn a_cut_between_the_hosts_leaves_the_source_running() {
    cut_in_the_blackout(&[]);
}

#[test]
fn a_cut_between_the_hosts_in_direct_mode_leaves_the_source_running() {
    cut_in_the_blackout(DIRECT);
}
