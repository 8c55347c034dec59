//! Every step fails once, on fakes, and everything runs again.

use std::io;

use super::*;
use crate::fake::FakeDevice;
use crate::state::MigState;
use crate::stream::{Chunk, StateStream};

const ALL: Features = Features { p2p: true, pre_copy: true };
const P2P: Features = Features { p2p: true, pre_copy: false };
const NONE: Features = Features { p2p: false, pre_copy: false };

#[derive(Default)]
struct Cpus {
    stand: bool,
    pause_fails: bool,
    resume_fails: bool,
    looks: Vec<FakeDevice>,
    /// Where the devices were when the vCPUs were paused, and when they were let run.
    seen: Vec<Vec<MigState>>,
}

impl Vcpus for Cpus {
    fn pause(&mut self) -> Result<(), VfioError> {
        self.seen.push(self.looks.iter().map(FakeDevice::at).collect());
        // Half of them stand still by now.
        self.stand = true;
        if self.pause_fails { Err(VfioError::caller("a vCPU does not stop")) } else { Ok(()) }
    }

    fn resume(&mut self) -> Result<(), VfioError> {
        self.seen.push(self.looks.iter().map(FakeDevice::at).collect());
        if self.resume_fails {
            return Err(VfioError::caller("a vCPU does not start"));
        }
        self.stand = false;
        Ok(())
    }
}

#[derive(Default)]
struct Mile {
    collected: bool,
    fails_at: Option<&'static str>,
    states: Vec<(String, Vec<u8>)>,
    steps: Vec<&'static str>,
}

impl Mile {
    fn step(&mut self, name: &'static str) -> Result<(), VfioError> {
        self.steps.push(name);
        if self.fails_at == Some(name) { Err(VfioError::caller(name)) } else { Ok(()) }
    }
}

impl LastMile for Mile {
    fn collect_dma(&mut self) -> Result<(), VfioError> {
        self.collected = true;
        self.step("collect")
    }

    fn give_back_dma(&mut self) -> Result<(), VfioError> {
        self.collected = false;
        self.step("give back")
    }

    fn last_memory(&mut self) -> Result<(), VfioError> {
        self.step("memory")
    }

    fn save(&mut self, mut stream: StateStream) -> Result<(), VfioError> {
        self.step("save")?;
        self.states.push((stream.device().to_owned(), stream.read_to_end()?));
        Ok(())
    }
}

fn devices(features: &[Features]) -> Vec<FakeDevice> {
    features.iter().enumerate().map(|(at, features)| FakeDevice::new(&format!("d{at}"), *features)).collect()
}

fn held(fakes: &[FakeDevice]) -> Vec<Held> {
    fakes.iter().map(|fake| Held::new(Box::new(fake.clone())).unwrap()).collect()
}

#[test]
fn the_plan_takes_all_to_p2p_before_any_stops_and_says_who_cannot() {
    let ability = |name: &str, features| Ability { name: name.into(), features };
    let plan = Plan::of(vec![ability("gpu", P2P), ability("eth1", NONE), ability("nvme", ALL)]);
    let seen = plan.to_string();
    let expected = "1. gpu to P2P\n2. nvme to P2P\n3. vCPUs paused\n4. gpu stopped\n5. eth1 stopped\n6. nvme stopped\n\
                    7. DMA log and pinned pages collected\n8. last memory\n9. state of gpu\n10. state of eth1\n\
                    11. state of nvme\nnote: device `eth1` has no P2P state: it is stopped after the vCPUs, and until \
                    then other devices may still write to it\n";
    assert_eq!(seen, expected);
    assert!(Plan::of(vec![ability("eth1", NONE)]).notes().is_empty(), "one device has no peers");
    assert!(plan.steps().windows(2).all(|pair| pair[0].reaches() <= pair[1].reaches()));
}

#[test]
fn everything_comes_to_rest_in_order_and_runs_again() {
    let fakes = devices(&[P2P, NONE, ALL]);
    fakes.iter().for_each(|fake| fake.hold(b"state"));
    let mut held = held(&fakes);
    let mut stream = held[2].pre_copy().unwrap().expect("it can");
    let mut buffer = [0; 64];
    assert_eq!(stream.read(&mut buffer).unwrap(), Chunk::Bytes(13));
    assert_eq!(stream.read(&mut buffer).unwrap(), Chunk::Idle, "a pause, no end");
    fakes[2].hold(b"later");
    assert_eq!(held[2].remaining(Some(&mut stream)).unwrap().expected(), 13);
    let (mut cpus, mut mile) = (Cpus { looks: fakes.clone(), ..Cpus::default() }, Mile::default());
    let mut crew = Crew { devices: &mut held, vcpus: &mut cpus, last_mile: &mut mile };
    let rest = Rest::begin(crew.plan());
    assert_eq!(rest.reached(), Milestone::Begun);
    let rest = rest.go_on(Milestone::Stopped, &mut crew).unwrap();
    assert_eq!(rest.reached(), Milestone::Stopped);
    let states = fakes.iter().map(FakeDevice::at).collect::<Vec<_>>();
    assert_eq!(states, [MigState::Stop, MigState::Stop, MigState::StopCopy]);
    let rest = rest.go_on(Milestone::StatesSaved, &mut crew).unwrap();
    assert_eq!(stream.read(&mut buffer).unwrap(), Chunk::Bytes(13), "what changed since");
    assert_eq!(stream.read(&mut buffer).unwrap(), Chunk::End);
    rest.let_run(&mut crew).unwrap();
    assert!(stream.read(&mut buffer).is_err(), "the stream of a device that runs again is dead");
    assert!(fakes.iter().all(|fake| fake.at() == MigState::Running && fake.resets() == 0));
    let paused = vec![MigState::RunningP2p, MigState::Running, MigState::PreCopyP2p];
    let resumed = vec![MigState::RunningP2p, MigState::Running, MigState::RunningP2p];
    assert_eq!(cpus.seen, [paused, resumed]);
    assert!(!cpus.stand && !mile.collected);
    assert_eq!(mile.states.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["d0", "d1"]);
}

/// Brings fakes to rest with something broken, and expects that all of them run again.
fn breaks(name: &str, break_it: impl FnOnce(&[FakeDevice], &mut Cpus, &mut Mile)) -> VfioError {
    let fakes = devices(&[P2P, NONE, ALL]);
    fakes.iter().for_each(|fake| fake.hold(b"state"));
    let mut held = held(&fakes);
    let _stream = held[2].pre_copy().unwrap();
    let (mut cpus, mut mile) = (Cpus::default(), Mile::default());
    break_it(&fakes, &mut cpus, &mut mile);
    let mut crew = Crew { devices: &mut held, vcpus: &mut cpus, last_mile: &mut mile };
    let rest = Rest::begin(crew.plan());
    let error = rest.go_on(Milestone::StatesSaved, &mut crew).expect_err(name);
    assert!(fakes.iter().all(|fake| fake.at().works()), "{name}: a device does not run");
    held.iter_mut().for_each(|device| device.let_run().expect(name));
    assert!(fakes.iter().all(|fake| fake.at() == MigState::Running), "{name}: a device pre-copies");
    assert!(!cpus.stand && !mile.collected, "{name}");
    error
}

#[test]
fn every_step_that_fails_is_undone_with_all_before_it() {
    use MigState::{Error, PreCopyP2p, Running, RunningP2p, Stop, StopCopy};
    // The state that the device refuses, and where the refusal leaves it.
    let refusals = [
        (0, RunningP2p, Running),
        (2, PreCopyP2p, MigState::PreCopy),
        (0, Stop, RunningP2p),
        (1, Stop, Running),
        (2, StopCopy, PreCopyP2p),
        (0, StopCopy, Stop),
        (1, StopCopy, Stop),
    ];
    for (device, to, left) in refusals {
        let name = format!("d{device} to {to}");
        let error = breaks(&name, |fakes, _, _| fakes[device].fail(to, left));
        assert!(matches!(error, VfioError::StateRefused { .. }), "{name}: {error}");
    }
    for step in ["collect", "memory", "save"] {
        let error = breaks(step, |_, _, mile| mile.fails_at = Some(step));
        assert_eq!(error.to_string(), step);
    }
    breaks("vCPUs", |_, cpus, _| cpus.pause_fails = true);
    for (device, to) in [(0, RunningP2p), (2, StopCopy), (1, Stop)] {
        let error = breaks("ERROR", |fakes, _, _| fakes[device].fail(to, Error));
        let sentence = error.to_string();
        assert!(sentence.contains("in ERROR") && sentence.contains("lost what it held"), "{sentence}");
        assert!(matches!(error.cause(), VfioError::StateRefused { .. }));
    }
}

#[test]
fn what_cannot_be_undone_is_told_and_keeps_nothing_else_at_rest() {
    let fakes = devices(&[P2P, P2P]);
    let mut held = held(&fakes);
    let (mut cpus, mut mile) = (Cpus::default(), Mile { fails_at: Some("memory"), ..Mile::default() });
    cpus.resume_fails = true;
    let mut crew = Crew { devices: &mut held, vcpus: &mut cpus, last_mile: &mut mile };
    let rest = Rest::begin(crew.plan());
    let error = rest.go_on(Milestone::MemorySent, &mut crew).unwrap_err();
    let VfioError::NotUndone { cause, back } = &error else { panic!("{error}") };
    assert_eq!((cause.to_string().as_str(), back.len()), ("memory", 1));
    assert!(fakes.iter().all(|fake| fake.at() == MigState::Running));

    // A device in ERROR that cannot be reset stays there, and the other one runs.
    fakes[0].fail(MigState::Stop, MigState::Error);
    fakes[0].fail_resets();
    let (mut cpus, mut mile) = (Cpus::default(), Mile::default());
    let mut crew = Crew { devices: &mut held, vcpus: &mut cpus, last_mile: &mut mile };
    let error = Rest::begin(crew.plan()).go_on(Milestone::Stopped, &mut crew).unwrap_err();
    assert!(error.to_string().contains("cannot be reset"), "{error}");
    assert_eq!((fakes[0].at(), fakes[1].at()), (MigState::Error, MigState::Running));
    assert!(!cpus.stand);
}

#[test]
fn an_unmovable_device_is_never_held() {
    let vf = FakeDevice::unmovable("eth1", "unplug it first");
    let Err(error) = Held::new(Box::new(vf)) else { panic!("it was taken") };
    assert!(error.to_string().contains("unplug it first"), "{error}");
    let io = VfioError::refused("x")(io::Error::other("y"));
    assert!(matches!(io.cause(), VfioError::HostRefused { .. }));
}
