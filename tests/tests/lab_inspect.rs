//! `vmferry inspect` of a real micro-VM with a passed-through card, by its name and by its process.
#![expect(clippy::unwrap_used, reason = "what a test's helper cannot have fails the test")]

use std::process::Command;

use serde_json::Value;
use vmferry_rig::SecondWriter;
use vmferry_tests::card::Card;
use vmferry_tests::command::program;
use vmferry_tests::microvm::CountingVm;

/// Behind the pages that the guest counts in.
const WRITERS_PAGE: u64 = 1024;

fn inspect(guest: &str) -> (Value, String) {
    let output = |more: &[&str]| {
        let output = Command::new(program()).args(["inspect", guest]).args(more).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    (serde_json::from_str(&output(&["--json"])).unwrap(), output(&[]))
}

fn kinds(seen: &Value) -> Vec<&str> {
    let held = seen["host_devices"].as_array().unwrap();
    held.iter().filter_map(|device| device["kind"].as_str()).collect()
}

#[test]
fn a_micro_vm_is_shown_by_its_name_and_by_its_process_and_counts_on() {
    let card = Card::make(7, "mtty-1");
    let vm = CountingVm::run(&["--dirty", "ring", "--vfio", &card.words()]);
    let (seen, table) = inspect(&vm.spec());
    println!();
    table.lines().for_each(|line| println!("lab: {line}"));
    assert_eq!((&seen["pid"], &seen["status"]), (&vm.pid().into(), &"running".into()), "{seen}");
    assert_eq!(seen["trackers"][0]["name"], "kvm-ring", "{seen}");
    assert_eq!(seen["devices"][0]["name"], "mtty0", "{seen}");
    assert_eq!(seen["devices"][0]["migratable"], true, "{seen}");
    assert_eq!(seen["memory"][0]["bytes"], 8 << 20, "{seen}");
    assert_eq!(seen["writers"][0]["tracked"], "by its own log, kvm-ring", "{seen}");

    // Any process, by its number: what it holds of the host's devices, and who else writes its memory.
    let plan = "seed=9,pages=64,set=64,pattern=random,rate=1MiB,zero=0".parse().unwrap();
    let writer = SecondWriter::start(&vm.memory_path(), WRITERS_PAGE, &plan).unwrap();
    let (seen, table) = inspect(&format!("pid:{}", vm.pid()));
    table.lines().for_each(|line| println!("lab: {line}"));
    for kind in ["kvm-vm", "kvm-vcpu", "vfio-device"] {
        assert!(kinds(&seen).contains(&kind), "no {kind}: {seen}");
    }
    let writers = seen["writers"].as_array().unwrap();
    assert_eq!(writers.len(), 2, "{seen}");
    assert!(writers[1]["name"].as_str().unwrap().contains("vmferry-second"), "{seen}");
    drop(writer);
    vm.assert_counts_on();
}
