//! A workload process is moved page by page while it writes, tracked from outside. Needs root.

use std::io::Cursor;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use clap::Parser;
use vmferry_datapath::{GuestRam, PAGE_BYTES, PageIndex, PageSet};
use vmferry_guest::process::{self, Phase, WorkloadArgs, WorkloadControl};
use vmferry_guest::{GuestSpec, open_source, open_target, rescue};
use vmferry_rig::require;

const ARGS: &str = "VMFERRY_TEST_WORKLOAD";

#[derive(Parser)]
struct Words {
    #[command(flatten)]
    workload: WorkloadArgs,
}

/// Not a test by itself: the tests below run it in a process of its own.
#[test]
fn workload_process() {
    let Ok(words) = std::env::var(ARGS) else { return };
    let words = Words::parse_from(std::iter::once("workload").chain(words.split_whitespace()));
    process::run(&words.workload).expect("the workload runs");
}

struct Workload {
    child: Child,
    name: String,
}

impl Workload {
    fn start(name: &str, words: &str) -> Self {
        let name = format!("test-{}-{name}", std::process::id());
        let child = Command::new(std::env::current_exe().expect("a test has a path"))
            .args(["--exact", "workload_process", "--nocapture"])
            .env(ARGS, format!("--name {name} {words}"))
            .stdout(Stdio::null())
            .spawn()
            .expect("a test can run itself");
        let workload = Self { child, name };
        while WorkloadControl::connect(&workload.name).is_err() {
            std::thread::sleep(Duration::from_millis(5));
        }
        workload
    }

    fn spec(&self) -> GuestSpec {
        GuestSpec::Process { name: self.name.clone() }
    }

    fn control(&self) -> WorkloadControl {
        WorkloadControl::connect(&self.name).expect("the workload listens")
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn copy(from: &GuestRam, to: &GuestRam, pages: &PageSet) {
    let mut page = [0; PAGE_BYTES];
    for (chunk, word) in pages.iter_chunks() {
        for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
            let index = PageIndex(chunk.0 * 64 + bit);
            from.read_page(index, &mut page).expect("the page is in the memory");
            to.write_page(index, &page).expect("the page is in the memory");
        }
    }
}

#[test]
fn a_writing_workload_arrives_whole() {
    require!(vmferry_rig::root());
    let source =
        Workload::start("a", "--ram 32MiB --writers 2 --plan set=2048,pattern=zipf-hot,rate=max,zero=200");
    let target = Workload::start("b", "--ram 32MiB --incoming");
    let mut from = open_source(&source.spec()).unwrap();
    let mut to = open_target(&target.spec()).unwrap();
    assert_eq!(from.description().layout, to.description().layout);
    assert_eq!(from.description().facts, to.description().facts);
    to.prepare().unwrap();
    let mut log = from.attach().unwrap();
    copy(&from.ram(), &to.ram(), &from.ram().populated().unwrap());
    let mut seen = 0;
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(5));
        let mut dirty = PageSet::new(&from.description().layout);
        log.collect(&mut dirty).unwrap();
        seen += dirty.count().0;
        copy(&from.ram(), &to.ram(), &dirty);
    }
    assert!(seen > 0, "a workload at full speed dirties pages");
    from.pause().unwrap();
    let mut dirty = PageSet::new(&from.description().layout);
    log.collect(&mut dirty).unwrap();
    copy(&from.ram(), &to.ram(), &dirty);
    assert_eq!(from.new_writers().unwrap(), Vec::<String>::new());
    let mut state = Vec::new();
    from.save_state(&mut state).unwrap();
    to.load_state(&mut Cursor::new(&state), Duration::ZERO).unwrap();
    assert_eq!(target.control().status().unwrap().phase, Phase::Loaded);
    let writes = source.control().status().unwrap().writes;
    to.run().unwrap();
    from.retire().unwrap();
    let report = target.control().verify().unwrap();
    assert!(report.is_clean() && report.pages == 8192, "{report}");
    assert!(target.control().status().unwrap().writes >= writes);
}

#[test]
fn a_dead_sender_leaves_a_workload_that_can_be_rescued() {
    let source = Workload::start("c", "--ram 4MiB");
    let mut from = open_source(&source.spec()).unwrap();
    from.pause().unwrap();
    drop(from);
    assert_eq!(source.control().status().unwrap().phase, Phase::Paused);
    rescue(&source.spec()).unwrap();
    assert_eq!(source.control().status().unwrap().phase, Phase::Running);
    rescue(&source.spec()).unwrap();
}

#[test]
fn the_wrong_side_is_refused_with_the_command_to_use() {
    let source = Workload::start("d", "--ram 4MiB");
    let target = Workload::start("e", "--ram 4MiB --incoming");
    let sentence = |error: Option<vmferry_guest::GuestError>| error.expect("a refusal").to_string();
    assert!(sentence(open_target(&source.spec()).err()).contains("--incoming"));
    assert!(sentence(open_source(&target.spec()).err()).contains("vmferry receive"));
    let nobody = GuestSpec::Process { name: "nobody-is-called-that".to_owned() };
    assert!(sentence(open_source(&nobody).err()).contains("vmferry workload --name"));
}
