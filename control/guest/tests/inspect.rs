//! `vmferry inspect` against real QEMUs and processes: what it shows is there, and nothing is different afterwards.
#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is not as it must be")]

use std::os::unix::net::UnixStream;

use vmferry_guest::inspect::{InspectSpec, Inspection, inspect};
use vmferry_guest::{Blame, GuestSpec};
use vmferry_rig::{Assets, Memory, QemuGuest, RunningGuest, SecondWriter, create_disk, require};

const MIB: u64 = 1 << 20;

fn recipe(assets: &Assets) -> QemuGuest {
    let plan = "seed=5,pages=2048,set=512,pattern=random,rate=4MiB,zero=100".parse().unwrap();
    QemuGuest::new(assets, 192 * MIB, plan).unwrap()
}

fn by_qmp(guest: &RunningGuest) -> Inspection {
    inspect(&InspectSpec::Guest(GuestSpec::Qemu { qmp: guest.qmp_path().to_path_buf() })).unwrap()
}

#[test]
fn a_qemu_is_shown_with_its_blocks_disks_and_writers_and_stays_as_it_is() {
    let assets = require!(Assets::find());
    let recipe = recipe(&assets);
    let disk = recipe.directory().join("direct.raw");
    create_disk(&disk, 64).unwrap();
    let node = format!("driver=file,filename={},node-name=direct0,cache.direct=on", disk.display());
    let mut guest = recipe.extra_args(&["-blockdev", &node]).await_incoming("a").unwrap();
    let before = guest.run_state().unwrap();

    let seen = by_qmp(&guest);
    assert_eq!(seen.pid, i32::try_from(guest.pid()).unwrap());
    assert_eq!(seen.status.as_deref(), Some("inmigrate"));
    let ram: Vec<_> = seen.memory.iter().filter(|file| file.block.is_some()).collect();
    assert_eq!(ram.len(), 1, "{:?}", seen.memory);
    assert_eq!((ram[0].bytes, ram[0].page_bytes), (192 * MIB, 4096));
    assert_eq!(ram[0].path, guest.memory_files()[0].to_string_lossy());
    assert_eq!(seen.direct_io_nodes, ["direct0"]);
    assert_eq!((seen.blockers.len(), seen.devices.len()), (0, 0), "{:?}", seen.blockers);
    assert_eq!(seen.writers.len(), 1);
    assert_eq!(seen.writers[0].pid, seen.pid);
    assert!(seen.trackers.iter().any(|tracker| tracker.unavailable.is_none()), "{:?}", seen.trackers);

    // The same process by its number, and a second writer of its memory.
    let words = "seed=9,pages=64,set=64,pattern=random,rate=1MiB,zero=0".parse().unwrap();
    let writer = SecondWriter::start(&guest.memory_files()[0], 1024, &words).unwrap();
    let by_pid = inspect(&InspectSpec::Pid(seen.pid)).unwrap();
    assert_eq!(by_pid.status, None);
    assert_eq!(by_pid.writers.len(), 2, "{:?}", by_pid.writers);
    assert!(
        by_pid.writers[1].name.contains("second-writer") || by_pid.writers[1].name.contains("vmferry-second")
    );
    assert!(by_pid.writers[1].bytes >= 64 * 4096);
    assert!(by_pid.writers.iter().all(|writer| writer.tracked.starts_with("by ")), "{:?}", by_pid.writers);
    drop(writer);

    assert_eq!(guest.run_state().unwrap(), before, "it was touched");
    let again = by_qmp(&guest);
    assert_eq!(serde_json::to_value(&again).unwrap(), serde_json::to_value(&seen).unwrap());
}

#[test]
fn what_keeps_a_qemu_from_being_moved_is_said_with_its_fix() {
    let assets = require!(Assets::find());
    let guest = recipe(&assets).memory(Memory::Private).await_incoming("a").unwrap();
    let seen = by_qmp(&guest);
    assert!(seen.private_bytes >= 192 * MIB, "{}", seen.private_bytes);
    assert!(seen.memory.iter().all(|file| file.block.is_none()));
    let said = seen.blockers.join("\n");
    assert!(said.contains("is private to QEMU") && said.contains("share=on"), "{said}");
    let by_pid = inspect(&InspectSpec::Pid(seen.pid)).unwrap();
    assert!(by_pid.blockers.join("\n").contains("RAM is private"), "{:?}", by_pid.blockers);
}

#[test]
fn bad_input_is_one_sentence_that_says_what_to_do() {
    let sentence = |spec: InspectSpec| {
        let error = inspect(&spec).unwrap_err();
        assert_eq!(error.blame(), Blame::User, "{error}");
        error.to_string()
    };
    let gone = sentence(InspectSpec::Pid(i32::MAX));
    assert!(gone.contains("no process") && gone.contains("pgrep"), "{gone}");
    let nobody = sentence(InspectSpec::Guest(GuestSpec::Process { name: "nobody-there".into() }));
    assert!(nobody.contains("vmferry workload --name"), "{nobody}");
    let folder = tempfile::tempdir().unwrap();
    let qmp = folder.path().join("none.qmp");
    let absent = sentence(InspectSpec::Guest(GuestSpec::Qemu { qmp }));
    assert!(absent.contains("none.qmp"), "{absent}");
    // This process runs no guest.
    let (_one, _other) = UnixStream::pair().unwrap();
    let seen = inspect(&InspectSpec::Pid(i32::try_from(std::process::id()).unwrap())).unwrap();
    assert!(seen.blockers.join("\n").contains("runs no guest"), "{:?}", seen.blockers);
}
