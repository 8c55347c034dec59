//! Attaching to a QEMU and letting go of it leaves the guest as it was, and misses no page in between.
#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is not as it must be")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use vmferry_datapath::{ChunkIndex, DirtyLog, GuestRam, PAGE_BYTES, PageIndex, PageSet};
use vmferry_guest::{GuestSpec, SourceGuest, open_source};
use vmferry_rig::{Assets, QemuGuest, RunningGuest, require};
use vmferry_workload::{MappedPages, PageMemory};

const MIB: u64 = 1 << 20;
/// Names the QMP socket to the process that `kill -9` hits.
const TRACK: &str = "VMFERRY_TEST_TRACK";
/// Names the memory file to the process that writes it.
const WRITE: &str = "VMFERRY_TEST_WRITE";

fn recipe(assets: &Assets) -> QemuGuest {
    let plan = "seed=7,pages=8192,set=4096,pattern=random,rate=16MiB,zero=100".parse().unwrap();
    QemuGuest::new(assets, 256 * MIB, plan).unwrap()
}

fn open(qmp: &Path) -> Box<dyn SourceGuest> {
    open_source(&GuestSpec::Qemu { qmp: qmp.to_path_buf() }).unwrap()
}

fn collect(log: &mut Box<dyn DirtyLog>, ram: &GuestRam) -> PageSet {
    let mut pages = PageSet::new(ram.layout());
    log.collect(&mut pages).unwrap();
    pages
}

/// Userfaultfds, write-protected mappings and blocked signals of a VMM: what an attach could leave behind.
fn traces(pid: u32) -> (usize, usize, BTreeMap<String, String>) {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let userfaultfds = descriptors
        .filter(|entry| {
            fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().contains("userfaultfd"))
        })
        .count();
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let protected = smaps.lines().filter(|line| line.starts_with("VmFlags:") && line.contains(" uw")).count();
    let mut masks = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap_or_default().trim();
        masks.insert(entry.file_name().to_string_lossy().into_owned(), mask.to_owned());
    }
    (userfaultfds, protected, masks)
}

/// The main thread's mask and nothing else held: other threads come and go.
fn assert_untouched(guest: &RunningGuest, before: &BTreeMap<String, String>) {
    let (userfaultfds, protected, masks) = traces(guest.pid());
    assert_eq!((userfaultfds, protected), (0, 0), "left behind in the VMM");
    let main = guest.pid().to_string();
    assert_eq!(masks[&main], before[&main], "the main thread's signal mask");
}

#[test]
fn no_page_is_missed_and_a_still_guest_is_clean() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let guest = recipe(&assets).boot("source").unwrap();
    let (_, _, masks) = traces(guest.pid());
    let mut source = open(guest.qmp_path());
    let ram = source.ram();
    let mut log = source.attach().unwrap();
    assert_eq!(traces(guest.pid()).0, 0, "the userfaultfd stayed inside of the VMM");
    let mut image = BTreeMap::new();
    let keep = |image: &mut BTreeMap<u64, [u8; PAGE_BYTES]>, pages: &PageSet| {
        for (ChunkIndex(chunk), word) in pages.iter_chunks() {
            for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
                let mut page = [0; PAGE_BYTES];
                ram.read_page(PageIndex(chunk * 64 + bit), &mut page).unwrap();
                image.insert(chunk * 64 + bit, page);
            }
        }
    };
    let _everything = collect(&mut log, &ram);
    keep(&mut image, &ram.populated().unwrap());
    for _ in 0..20 {
        keep(&mut image, &collect(&mut log, &ram));
        std::thread::sleep(Duration::from_millis(20));
    }
    source.pause().unwrap();
    let last = collect(&mut log, &ram);
    keep(&mut image, &last);
    assert!(collect(&mut log, &ram).is_empty(), "a paused guest dirtied pages");
    let mut now = [0; PAGE_BYTES];
    for (index, page) in &image {
        ram.read_page(PageIndex(*index), &mut now).unwrap();
        assert!(now == *page, "page {index} was written and not reported");
    }
    for (ChunkIndex(chunk), word) in ram.populated().unwrap().iter_chunks() {
        for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
            assert!(image.contains_key(&(chunk * 64 + bit)), "page {chunk}/{bit} appeared unreported");
        }
    }
    source.resume().unwrap();
    drop(log);
    source.detach();
    assert_untouched(&guest, &masks);
}

#[test]
fn fifty_attaches_while_it_boots_do_not_harm_a_guest() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let recipe = recipe(&assets);
    let qmp = recipe.directory().join("source.qmp");
    let booting = std::thread::spawn(move || recipe.boot("source").map(|guest| (guest, recipe)));
    while std::os::unix::net::UnixStream::connect(&qmp).is_err() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut source = open(&qmp);
    for _ in 0..50 {
        let mut log = source.attach().unwrap();
        collect(&mut log, &source.ram());
        drop(log);
        source.detach();
    }
    let (mut guest, _recipe) = booting.join().unwrap().unwrap();
    assert_eq!(guest.console().verify().unwrap().wrong, 0);
    assert_eq!(traces(guest.pid()).0, 0);
}

/// Not a test by itself: tracks the guest that the environment names until it is killed.
#[test]
#[ignore = "run by `a_killed_tracker_leaves_a_running_guest`"]
fn tracking_process() {
    let Some(qmp) = std::env::var_os(TRACK) else { return };
    let mut source = open(Path::new(&qmp));
    let mut log = source.attach().unwrap();
    let mut paused = false;
    loop {
        collect(&mut log, &source.ram());
        println!("tracking");
        if !paused && std::env::var_os("VMFERRY_TEST_PAUSE").is_some() {
            source.pause().unwrap();
            source.set_throttle(50).unwrap();
            paused = true;
        }
    }
}

fn run_self(
    test: &str,
    key: &str,
    value: &Path,
) -> (Child, ChildStdin, impl Iterator<Item = String> + use<>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env(key, value)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    (child, input, BufReader::new(output).lines().map_while(Result::ok))
}

#[test]
fn a_killed_tracker_leaves_a_running_guest() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let mut guest = recipe(&assets).boot("source").unwrap();
    let (_, _, masks) = traces(guest.pid());
    for round in 0..5 {
        let (mut tracker, _input, mut output) = run_self("tracking_process", TRACK, guest.qmp_path());
        assert!(output.any(|line| line == "tracking"));
        std::thread::sleep(Duration::from_millis(round * 3));
        tracker.kill().unwrap();
        tracker.wait().unwrap();
        assert_untouched(&guest, &masks);
        assert_eq!(guest.run_state().unwrap(), "running");
        let writes = guest.console().status().unwrap().writes;
        std::thread::sleep(Duration::from_millis(50));
        assert!(guest.console().status().unwrap().writes > writes, "the guest stands");
    }
    assert_eq!(guest.console().verify().unwrap().wrong, 0);
}

fn is_traced(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|tracer| tracer.trim() != "0"))
}

#[test]
fn a_kill_in_the_middle_of_an_injection_leaves_a_running_guest() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let mut guest = recipe(&assets).boot("source").unwrap();
    let (_, _, masks) = traces(guest.pid());
    let mut hits = 0;
    for _ in 0..40 {
        let (mut tracker, _input, _output) = run_self("tracking_process", TRACK, guest.qmp_path());
        // The moment in which a thread of the VMM holds foreign registers.
        let caught = (0..20_000).any(|_| is_traced(guest.pid()));
        tracker.kill().unwrap();
        tracker.wait().unwrap();
        hits += u32::from(caught);
        assert!(guest.is_alive(), "the VMM died: {}", guest.log());
    }
    assert!(hits > 0, "no kill fell into an injection");
    // The helper of the last round may still be at work.
    std::thread::sleep(Duration::from_millis(50));
    assert_untouched(&guest, &masks);
    assert_eq!(guest.run_state().unwrap(), "running");
    assert_eq!(guest.console().verify().unwrap().wrong, 0);
}

#[test]
fn a_rescue_lifts_the_brake_and_runs_a_guest_whose_sender_was_killed() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let mut guest = recipe(&assets).boot("source").unwrap();
    let spec = GuestSpec::Qemu { qmp: guest.qmp_path().to_path_buf() };
    for paused_by_owner in [false, true] {
        if paused_by_owner {
            guest.qmp().execute("stop", serde_json::Value::Null).unwrap();
        }
        let mut tracker = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tracking_process", "--ignored", "--nocapture"])
            .env(TRACK, guest.qmp_path())
            .env("VMFERRY_TEST_PAUSE", "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(tracker.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert_eq!(lines.filter(|line| line == "tracking").take(20).count(), 20);
        tracker.kill().unwrap();
        tracker.wait().unwrap();
        assert_eq!(guest.run_state().unwrap(), "paused");
        vmferry_guest::rescue(&spec).unwrap();
        assert_eq!(guest.run_state().unwrap(), if paused_by_owner { "paused" } else { "running" });
        let braked = format!("vmferry-{}", guest.pid());
        let cgroup = fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap().flatten();
        for thread in cgroup {
            let groups = fs::read_to_string(thread.path().join("cgroup")).unwrap_or_default();
            assert!(!groups.contains(&braked), "{groups}");
        }
    }
}

/// Not a test by itself: maps the file that the environment names and writes the pages that its input lists.
#[test]
#[ignore = "run by `a_second_writer_is_tracked_page_by_page`"]
fn writing_process() {
    let Some(path) = std::env::var_os(WRITE) else { return };
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let pages = usize::try_from(file.metadata().unwrap().len()).unwrap() / PAGE_BYTES;
    // Through a mapping, as a backend writes: `GuestRam` writes through the file, which no page table shows.
    let mut memory = MappedPages::shared(&file, 0, pages).unwrap();
    println!("mapped");
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let page = line.parse().unwrap();
        memory.store(page, 0, 0x5a5a);
        println!("wrote {page}");
    }
}

fn write_pages(pages: &[u64], input: &mut ChildStdin, output: &mut impl Iterator<Item = String>) {
    for page in pages {
        writeln!(input, "{page}").unwrap();
        assert!(output.any(|line| line == format!("wrote {page}")));
    }
}

#[test]
fn a_second_writer_is_tracked_page_by_page() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let guest = recipe(&assets).boot("source").unwrap();
    let memory = guest.memory_files()[0].clone();
    let (mut writer, mut input, mut output) = run_self("writing_process", WRITE, &memory);
    assert!(output.any(|line| line == "mapped"));
    let mut source = open(guest.qmp_path());
    let mut log = source.attach().unwrap();
    source.pause().unwrap();
    collect(&mut log, &source.ram());
    // Far above what this guest uses: never populated by it.
    let pages = [60_000, 60_001, 61_234, 63_999, 65_535];
    write_pages(&pages, &mut input, &mut output);
    let found = collect(&mut log, &source.ram());
    assert!(
        pages.iter().all(|page| found.contains(PageIndex(*page))),
        "a write of the second process was missed"
    );
    assert_eq!(found.count().0, pages.len() as u64, "pages that nobody wrote");
    assert!(source.pinned().is_empty() && source.new_writers().unwrap().is_empty());
    writer.kill().unwrap();
    writer.wait().unwrap();

    let (mut late, mut input, mut output) = run_self("writing_process", WRITE, &memory);
    assert!(output.any(|line| line == "mapped"));
    write_pages(&[64_000], &mut input, &mut output);
    let names = source.new_writers().unwrap();
    assert_eq!(names.len(), 1, "{names:?}");
    assert!(names[0].contains(&format!("(pid {})", late.id())), "{names:?}");
    assert_eq!(source.pinned().count().0, 65_536, "all that it maps travels in the blackout");
    assert!(source.new_writers().unwrap().is_empty(), "told once");
    late.kill().unwrap();
    late.wait().unwrap();
}

#[test]
fn disks_without_page_cache_are_named() {
    let assets = require!(Assets::find());
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let disk = folder.path().join("disk");
    vmferry_rig::create_disk(&disk, 2048).unwrap();
    let guest = recipe(&assets).disk(&disk).boot("source").unwrap();
    let source = open(guest.qmp_path());
    assert!(source.direct_io_nodes().contains(&"disk0-file".to_owned()), "{:?}", source.direct_io_nodes());
    drop(source);
    drop(guest);
    let guest = recipe(&assets).boot("source").unwrap();
    assert!(open(guest.qmp_path()).direct_io_nodes().is_empty());
}
