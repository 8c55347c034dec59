//! A guest boots, works, beats and answers. Needs QEMU and a guest kernel.

use std::time::Duration;

use serde_json::json;
use vmferry_rig::{Assets, Memory, QemuGuest, SecondWriter, create_disk, guest_gap, huge_pages, require};
use vmferry_workload::Plan;

const MIB: u64 = 1 << 20;

fn plan() -> Plan {
    "seed=5,pages=4096,set=2048,pattern=random,rate=2000".parse().expect("a plan")
}

#[test]
fn a_guest_boots_works_and_answers() {
    let assets = require!(Assets::find());
    let recipe = QemuGuest::new(&assets, 256 * MIB, plan()).unwrap();
    let mut guest = recipe.boot("source").unwrap();
    assert_eq!(guest.run_state().unwrap(), "running");
    let before = guest.console().status().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let after = guest.console().status().unwrap();
    assert!(after.writes > before.writes + 500, "{before:?} {after:?}");
    assert!(after.beats > before.beats + 200, "{before:?} {after:?}");
    assert!(guest.console().verify().unwrap().is_clean());
    assert!(after.verified > 0 && after.wrong == 0);
    assert!(guest.beats().last().is_some());
    guest.console().ask("rate 0").unwrap();
    assert!(guest.console().ask("set seed=3").unwrap_err().to_string().contains("cannot change 'seed'"));
}

#[test]
fn the_beat_and_the_workload_survive_qemus_own_move() {
    let assets = require!(Assets::find());
    let recipe = QemuGuest::new(&assets, 256 * MIB, plan()).unwrap().numa(&[128 * MIB, 128 * MIB]);
    let (mut source, mut target) = recipe.pair().unwrap();
    let start =
        source.beats().wait_since(source.beats().last().unwrap().at, Duration::from_secs(5)).unwrap().at;
    let uri = format!("unix:{}", recipe.directory().join("stream").display());
    target.qmp().execute("migrate-incoming", json!({ "uri": uri })).unwrap();
    source.qmp().execute("migrate", json!({ "uri": uri })).unwrap();
    while target.run_state().unwrap() == "inmigrate" {
        std::thread::sleep(Duration::from_millis(5));
    }
    target.beats().wait_since(start, Duration::from_secs(20)).unwrap();
    let handover = guest_gap(source.beats(), target.beats(), start).unwrap();
    assert!(!handover.overlaps());
    assert!(handover.gap() < Duration::from_secs(10), "{:?}", handover.gap());
    println!("gap {:?}, {} beats lost", handover.gap(), handover.beats_lost());
    assert!(target.console().verify().unwrap().is_clean());
    assert!(target.console().gap().unwrap().gap_us > 0);
    assert_eq!(source.run_state().unwrap(), "postmigrate");
}

#[test]
fn an_o_direct_disk_is_read_all_the_time() {
    let assets = require!(Assets::find());
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let disk = folder.path().join("disk.img");
    create_disk(&disk, 1024).unwrap();
    let mut guest = QemuGuest::new(&assets, 256 * MIB, plan()).unwrap().disk(&disk).boot("source").unwrap();
    std::thread::sleep(Duration::from_secs(1));
    let status = guest.console().status().unwrap();
    assert!(
        status.disk_reads > 300 && status.disk_wrong == 0,
        "{status:?} {:?}",
        guest.console().kernel_lines()
    );
}

#[test]
fn a_guest_boots_on_huge_pages() {
    let assets = require!(Assets::find());
    let folder = require!(huge_pages(128));
    let recipe = QemuGuest::new(&assets, 256 * MIB, plan()).unwrap().memory(Memory::HugePages(folder));
    let mut guest = recipe.boot("source").unwrap();
    assert!(guest.memory_files()[0].exists());
    assert!(guest.console().verify().unwrap().is_clean());
}

#[test]
fn a_second_writer_and_the_guest_keep_out_of_each_others_way() {
    let assets = require!(Assets::find());
    let recipe = QemuGuest::new(&assets, 256 * MIB, plan()).unwrap().reserve_top(16 * MIB);
    let mut guest = recipe.boot("source").unwrap();
    let memory = guest.memory_files()[0].clone();
    let pages: Plan = "seed=8,pages=4096,set=512,rate=max".parse().unwrap();
    let first = (240 * MIB) / 4096;
    let writer = SecondWriter::start(&memory, first, &pages).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let written = writer.stop().unwrap();
    let report = written.verify(&memory).unwrap();
    assert!(report.is_clean(), "{report}");
    assert!(guest.console().verify().unwrap().is_clean());
}
