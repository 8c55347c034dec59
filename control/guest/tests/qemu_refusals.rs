//! What vmferry will not do to a QEMU, each with a sentence that says what to change, and how it backs out.
#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is not as it must be")]

use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use vmferry_datapath::{ChunkIndex, GuestRam, PAGE_BYTES, PageIndex};
use vmferry_guest::{Blame, GuestError, GuestSpec, open_source, open_target};
use vmferry_rig::{Assets, Memory, QemuGuest, RunningGuest, require};

const MIB: u64 = 1 << 20;
const PROBE: &str = "VMFERRY_TEST_PROBE";

fn recipe(assets: &Assets) -> QemuGuest {
    let plan = "seed=5,pages=2048,set=512,pattern=random,rate=4MiB,zero=100".parse().unwrap();
    QemuGuest::new(assets, 192 * MIB, plan).unwrap()
}

fn spec(qmp: &Path) -> GuestSpec {
    GuestSpec::Qemu { qmp: qmp.to_path_buf() }
}

fn refusal<T>(outcome: Result<T, GuestError>) -> String {
    let Err(error) = outcome else { panic!("not refused") };
    assert_eq!(error.blame(), Blame::User, "{error}");
    error.to_string()
}

fn refused_source(guest: &RunningGuest) -> String {
    refusal(open_source(&spec(guest.qmp_path())))
}

fn refused_target(guest: &RunningGuest) -> String {
    refusal(open_target(&spec(guest.qmp_path())))
}

#[track_caller]
fn assert_says(sentence: &str, words: &[&str]) {
    for word in words {
        assert!(sentence.contains(word), "`{word}` is missing in: {sentence}");
    }
}

#[test]
fn private_memory_and_memfd_are_refused_with_the_option() {
    let assets = require!(Assets::find());
    for (memory, word) in [(Memory::Private, "is private to QEMU"), (Memory::Memfd, "is a memfd")] {
        let guest = recipe(&assets).memory(memory).await_incoming("a").unwrap();
        let sentence = refused_target(&guest);
        let option = "-object memory-backend-file,id=ram0,size=192M,mem-path=/dev/shm/";
        assert_says(&sentence, &[word, option, "share=on", "<memoryBacking><source type='file'/>"]);
    }
}

#[test]
fn memory_on_a_disk_is_refused() {
    let assets = require!(Assets::find());
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let recipe = recipe(&assets).memory(Memory::HugePages(folder.path().to_path_buf()));
    let guest = recipe.await_incoming("a").unwrap();
    assert_says(&refused_target(&guest), &["whose pages cannot be tracked", "mem-path=/dev/shm/"]);
}

#[test]
fn a_monitor_that_serves_another_client_is_named() {
    let assets = require!(Assets::find());
    let guest = recipe(&assets).await_incoming("a").unwrap();
    let _first = vmferry_rig::Qmp::connect(guest.qmp_path()).unwrap();
    assert_says(&refused_target(&guest), &["another client", "-qmp unix:"]);
    // Behind the second one in the queue even `connect` would wait for ever.
    let _second = std::os::unix::net::UnixStream::connect(guest.qmp_path());
    assert_says(&refused_target(&guest), &["another client", "-qmp unix:"]);
}

#[test]
fn sources_and_targets_are_told_apart() {
    let assets = require!(Assets::find());
    let recipe = recipe(&assets);
    let (mut source, target) = recipe.pair().unwrap();
    assert_says(&refused_source(&target), &["waits for a guest", "it is a target"]);
    assert_says(&refused_target(&source), &["does not wait for a guest", "-incoming defer"]);
    source.qmp().execute("stop", Value::Null).unwrap();
    assert_says(&refused_target(&source), &["it is `paused`", "-incoming defer"]);
}

#[test]
fn a_guest_that_was_never_started_is_refused() {
    let assets = require!(Assets::find());
    let recipe = recipe(&assets).extra_args(&["-S"]);
    let qmp = recipe.directory().join("halted.qmp");
    let booting = std::thread::spawn(move || recipe.boot("halted").map(|guest| (guest, recipe)));
    while std::os::unix::net::UnixStream::connect(&qmp).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_says(&refusal(open_source(&spec(&qmp))), &["never started", "`cont`"]);
    vmferry_rig::Qmp::connect(&qmp).unwrap().execute("cont", Value::Null).unwrap();
    booting.join().unwrap().unwrap();
}

#[test]
fn a_qemu_that_already_migrates_is_refused_until_it_is_cancelled() {
    let assets = require!(Assets::find());
    let recipe = recipe(&assets);
    let mut guest = recipe.boot("source").unwrap();
    let sink = recipe.directory().join("sink");
    let _stuck = std::os::unix::net::UnixListener::bind(&sink).unwrap();
    guest.qmp().execute("migrate", json!({ "uri": format!("unix:{}", sink.display()) })).unwrap();
    assert_says(&refused_source(&guest), &["already migrating", "migrate_cancel"]);
    guest.qmp().execute("migrate_cancel", Value::Null).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    open_source(&spec(guest.qmp_path())).unwrap();
}

#[test]
fn an_unmovable_device_is_refused_in_qemus_words() {
    let assets = require!(Assets::find());
    let folder = tempfile::tempdir().unwrap();
    let drive = format!("driver=vvfat,node-name=fat,rw=on,dir={}", folder.path().display());
    let guest = recipe(&assets).extra_args(&["-blockdev", &drive]).boot("source").unwrap();
    assert_says(&refused_source(&guest), &["cannot be migrated", "vvfat", "device_del"]);
}

/// Not a test by itself: opens and attaches as whoever runs it.
#[test]
#[ignore = "run by `a_stranger_is_refused_with_the_permission`"]
fn probing_process() {
    let Some(qmp) = std::env::var_os(PROBE) else { return };
    match open_source(&spec(Path::new(&qmp))).and_then(|mut source| source.attach().map(|_| ())) {
        Ok(()) => println!("attached"),
        Err(error) => println!("{:?}: {error}", error.blame()),
    }
}

#[test]
fn a_stranger_is_refused_with_the_permission() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let guest = recipe(&assets).boot("source").unwrap();
    let folder = guest.qmp_path().parent().unwrap();
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(guest.qmp_path(), std::fs::Permissions::from_mode(0o666)).unwrap();
    let program = folder.join("probe");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let output = Command::new(program)
        .args(["--exact", "probing_process", "--ignored", "--nocapture"])
        .env(PROBE, guest.qmp_path())
        .current_dir("/")
        .gid(65_534)
        .uid(65_534)
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_says(&words, &["Host: ", "run vmferry as root"]);
}

#[test]
fn a_guest_in_qemus_own_sandbox_is_attached_to() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    let recipe = recipe(&assets).extra_args(&["-sandbox", sandbox]);
    let Ok(mut guest) = recipe.boot("source") else {
        vmferry_rig::skip(&"this QEMU is built without seccomp");
        return;
    };
    let mut source = open_source(&spec(guest.qmp_path())).unwrap();
    let log = source.attach().unwrap();
    drop(log);
    assert!(guest.is_alive());
    assert_eq!(guest.console().verify().unwrap().wrong, 0);
}

/// Takes so much and then fails, as a link that is cut.
struct Cut(usize);

impl Write for Cut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::ConnectionReset)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_source_resumes_from_any_point_and_can_be_moved_again() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let mut guest = recipe(&assets).boot("source").unwrap();
    let before = guest.qmp().execute("query-migrate-capabilities", Value::Null).unwrap();
    let parameters = guest.qmp().execute("query-migrate-parameters", Value::Null).unwrap();
    let mut source = open_source(&spec(guest.qmp_path())).unwrap();
    let log = source.attach().unwrap();
    source.pause().unwrap();
    source.resume().unwrap();
    assert_eq!(guest.run_state().unwrap(), "running", "after pause");
    for room in [0, 8, 1000, 250_000] {
        source.pause().unwrap();
        assert!(matches!(source.save_state(&mut Cut(room)), Err(GuestError::Relay(_))), "cut at {room}");
        source.resume().unwrap();
        assert_eq!(guest.run_state().unwrap(), "running", "cut at {room}");
    }
    for _ in 0..2 {
        source.pause().unwrap();
        let mut state = Vec::new();
        assert_eq!(source.save_state(&mut state).unwrap().0, state.len() as u64);
        assert_eq!(guest.run_state().unwrap(), "postmigrate");
        source.resume().unwrap();
        assert_eq!(guest.run_state().unwrap(), "running", "after a whole state");
    }
    drop(log);
    source.detach();
    drop(source);
    assert_eq!(guest.qmp().execute("query-migrate-capabilities", Value::Null).unwrap(), before);
    assert_eq!(guest.qmp().execute("query-migrate-parameters", Value::Null).unwrap(), parameters);
    assert_eq!(guest.console().verify().unwrap().wrong, 0);
}

fn copy_all(source: &GuestRam, target: &GuestRam) {
    let mut page = [0; PAGE_BYTES];
    for (ChunkIndex(chunk), word) in source.populated().unwrap().iter_chunks() {
        for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
            source.read_page(PageIndex(chunk * 64 + bit), &mut page).unwrap();
            target.write_page(PageIndex(chunk * 64 + bit), &page).unwrap();
        }
    }
}

#[test]
fn a_target_with_other_devices_is_seen_before_and_refuses_the_state() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let recipe = recipe(&assets);
    let mut guest = recipe.boot("source").unwrap();
    let other = recipe.clone().extra_args(&["-device", "virtio-rng-pci"]);
    let mut waiting = other.await_incoming("target").unwrap();
    let mut source = open_source(&spec(guest.qmp_path())).unwrap();
    let mut target = open_target(&spec(waiting.qmp_path())).unwrap();
    let (here, there) = (source.description().facts.clone(), target.description().facts.clone());
    assert_ne!(here["pci devices"], there["pci devices"]);
    target.prepare().unwrap();
    let log = source.attach().unwrap();
    source.pause().unwrap();
    copy_all(&source.ram(), &target.ram());
    let mut state = Vec::new();
    source.save_state(&mut state).unwrap();
    // A state that is cut short, then one byte of it wrong: both end on the target, never in a running guest.
    let error = target.load_state(&mut &state[..state.len() / 2], Duration::ZERO).unwrap_err();
    assert_eq!(error.blame(), Blame::Guest, "{error}");
    assert_says(&error.to_string(), &["failed to load the device state"]);
    target.discard();
    waiting.wait_end(Duration::from_secs(10)).unwrap();
    source.resume().unwrap();
    drop(log);
    assert_eq!(guest.run_state().unwrap(), "running");
    assert_eq!(guest.console().verify().unwrap().wrong, 0);
}

#[test]
fn a_guest_that_its_owner_paused_stays_paused_on_the_target() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let (mut a, mut b) = recipe(&assets).pair().unwrap();
    a.qmp().execute("stop", Value::Null).unwrap();
    let mut source = open_source(&spec(a.qmp_path())).unwrap();
    let mut target = open_target(&spec(b.qmp_path())).unwrap();
    target.prepare().unwrap();
    let log = source.attach().unwrap();
    source.pause().unwrap();
    source.resume().unwrap();
    assert_eq!(a.run_state().unwrap(), "paused", "resume does not wake what its owner paused");
    source.pause().unwrap();
    copy_all(&source.ram(), &target.ram());
    let mut state = Vec::new();
    source.save_state(&mut state).unwrap();
    target.load_state(&mut state.as_slice(), Duration::ZERO).unwrap();
    target.run().unwrap();
    drop(log);
    source.retire().unwrap();
    assert_eq!(b.run_state().unwrap(), "paused");
    b.qmp().execute("cont", Value::Null).unwrap();
    assert_eq!(b.console().verify().unwrap().wrong, 0);
}
