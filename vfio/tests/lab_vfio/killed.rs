//! A holder that is killed in every state: the next one gets a device that works.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use vmferry_vfio::{Iommu, MigState, MigratableDevice, Passthrough, Region, contract};

use crate::mtty::{Mtty, Uart};

/// Set for the child: the path of the device, and the number of the state to die in.
const CHILD: &str = "VMFERRY_TEST_HOLDER";

/// The child: goes to its state, says so, and waits for its end.
fn hold(path: &str, state: &str) {
    let mut device = Passthrough::open("mtty0", Path::new(path), &Iommu::container().unwrap()).unwrap();
    let file = device.set_state(MigState::from_kernel(state.parse().unwrap()).unwrap()).unwrap();
    println!("holding");
    std::thread::sleep(std::time::Duration::from_secs(60));
    drop(file);
}

fn kill_a_holder_in(card: &Mtty, state: MigState) {
    let path = card.path();
    let child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "killed::a_holder_that_is_killed_in_any_state_leaves_a_device_that_works",
            "--nocapture",
        ])
        .env(CHILD, format!("{} {}", path.display(), state.to_kernel()))
        .stdout(Stdio::piped())
        .spawn();
    let mut child = child.unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let holds = lines.map_while(Result::ok).any(|line| line.ends_with("holding"));
    assert!(holds, "the child did not get to {state}");
    let taken = Passthrough::open("mtty0", &path, &Iommu::container().unwrap());
    assert!(taken.is_err(), "a device that is held was taken a second time");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_holder_that_is_killed_in_any_state_leaves_a_device_that_works() {
    if let Ok(orders) = std::env::var(CHILD) {
        let (path, state) = orders.split_once(' ').unwrap();
        return hold(path, state);
    }
    let card = Mtty::create(1);
    let uart = Uart::example(7);
    uart.write(&card.open("mtty0").regions(), Region(0));
    let mut left = Vec::new();
    for state in MigState::ALL.into_iter().filter(|state| *state != MigState::Error) {
        kill_a_holder_in(&card, state);
        let mut device = card.open("mtty0");
        assert_eq!(device.state().unwrap(), MigState::Running, "after a kill in {state}");
        left.push(format!("{state}: found {}", device.found().unwrap()));
        contract::save(&mut device).unwrap();
        device.set_state(MigState::Running).unwrap();
    }
    println!("lab: killed in {}", left.join(", "));
    assert_eq!(
        Uart::read(&card.open("mtty0").regions(), Region(0)),
        uart,
        "what the guest wrote is still there"
    );
}
