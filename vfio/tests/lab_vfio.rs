//! Real devices of the kernel's VFIO: a migratable card, one that does DMA, and some that cannot move.

#![expect(clippy::unwrap_used, reason = "a test: a panic is its failure")]

#[path = "lab_vfio/edu.rs"]
mod edu;
#[path = "lab_vfio/killed.rs"]
mod killed;
#[path = "lab_vfio/mtty.rs"]
mod mtty;
#[path = "lab_vfio/pci.rs"]
mod pci;

use mtty::{Mtty, Uart};
use vmferry_vfio::{
    Crew, Dirty, DmaLog, Features, Held, Iommu, IovaRange, LastMile, Left, MigState, MigratableDevice,
    Migration, Milestone, Passthrough, Region, Rest, StateSink, StateStream, Teller, Vcpus, VfioError, Watch,
    WatchedLog, contract,
};

const PORTS: [Region; 2] = [Region(0), Region(1)];

#[test]
fn every_arc_of_the_card_is_the_tables() {
    let card = Mtty::create(1);
    let mut device = card.open("mtty0");
    assert_eq!(device.migration(), &Migration::V2(Features { p2p: true, pre_copy: true }));
    assert_eq!((device.model(), device.found()), ("mtty-2", Some(MigState::Running)));
    let state = contract::save(&mut device).unwrap();
    assert_eq!(device.stop_copy_bytes().unwrap(), state.len() as u64);
    assert_eq!(contract::every_arc(&mut device, &state).unwrap(), 7 * 8);
}

#[test]
fn what_the_guest_wrote_into_one_card_is_in_the_other_after_a_move() {
    let (here, there) = (Mtty::create(1), Mtty::create(2));
    let (mut source, mut target) = (here.open("mtty0"), there.open("mtty0"));
    for (seed, pre_copy) in [(3, false), (90, true)] {
        for port in PORTS {
            Uart::example(seed + u8::try_from(port.0).unwrap()).write(&source.regions(), port);
        }
        target = contract::moves(&mut source, target, pre_copy).unwrap();
        for port in PORTS {
            let expected = Uart::example(seed + u8::try_from(port.0).unwrap());
            assert_eq!(Uart::read(&target.regions(), port), expected, "pre-copy {pre_copy}, {port:?}");
        }
    }
}

#[test]
fn a_card_refuses_what_is_not_its_state_and_works_on() {
    let (here, there) = (Mtty::create(1), Mtty::create(2));
    let (mut source, target) = (here.open("mtty0"), there.open("mtty0"));
    let state = contract::save(&mut source).unwrap();
    let mut target = contract::refuses_rubbish(target, &state).unwrap();
    // The flags of the header, and the number of ports: the state of another model.
    for at in [20, 16] {
        let mut bad = state.clone();
        bad[at] = 1;
        let mut sink = StateSink::open(target).map_err(|refused| refused.error).unwrap();
        let error = sink.write_all(&bad).unwrap_err();
        assert!(error.to_string().contains("`mtty0` refused the state of its twin"), "{error}");
        target = sink.abandon(error).device;
        assert_eq!(target.state().unwrap(), MigState::Running);
    }
    // Saving left it in STOP_COPY, and pre-copy begins in a device that runs.
    source.set_state(MigState::Running).unwrap();
    contract::moves(&mut source, target, true).unwrap();
}

#[test]
fn a_failing_arc_leaves_the_state_that_is_read_back_and_a_reset_leads_out() {
    let card = Mtty::create(1);
    let mut device = card.open("mtty0");
    let file = device.set_state(MigState::Resuming).unwrap();
    // Nothing was written, so there is nothing to load: the first step of the way fails.
    let error = device.set_state(MigState::PreCopy).map(drop).unwrap_err();
    let VfioError::StateRefused { from, to, left, .. } = &error else { panic!("{error}") };
    assert_eq!((*from, *to, *left), (MigState::Resuming, MigState::PreCopy, Left::In(MigState::Resuming)));
    drop(file);
    device.reset().unwrap();
    assert_eq!(device.state().unwrap(), MigState::Running);
    contract::save(&mut device).unwrap();
}

struct Cpus(Vec<&'static str>);

impl Vcpus for Cpus {
    fn pause(&mut self) -> Result<(), VfioError> {
        self.0.push("pause");
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VfioError> {
        self.0.push("resume");
        Ok(())
    }
}

#[derive(Default)]
struct Mile {
    memory_fails: bool,
    states: Vec<Vec<u8>>,
}

impl LastMile for Mile {
    fn collect_dma(&mut self) -> Result<(), VfioError> {
        Ok(())
    }

    fn give_back_dma(&mut self) -> Result<(), VfioError> {
        Ok(())
    }

    fn last_memory(&mut self) -> Result<(), VfioError> {
        if self.memory_fails { Err(VfioError::caller("the link is lost")) } else { Ok(()) }
    }

    fn save(&mut self, mut stream: StateStream) -> Result<(), VfioError> {
        self.states.push(stream.read_to_end()?);
        Ok(())
    }
}

#[test]
fn two_cards_come_to_rest_and_run_again_when_the_last_memory_fails() {
    let cards = [Mtty::create(1), Mtty::create(2)];
    let mut held: Vec<_> = cards.iter().map(|card| Held::new(Box::new(card.open("mtty"))).unwrap()).collect();
    let mut stream = held[1].pre_copy().unwrap().unwrap();
    let remaining = held[1].remaining(Some(&mut stream)).unwrap();
    assert!(remaining.precopy_bytes > 0 && remaining.expected() >= remaining.precopy_bytes);
    let (mut cpus, mut mile) = (Cpus(vec![]), Mile { memory_fails: true, ..Mile::default() });
    let mut crew = Crew { devices: &mut held, vcpus: &mut cpus, last_mile: &mut mile };
    let rest = Rest::begin(crew.plan()).go_on(Milestone::Stopped, &mut crew).unwrap();
    let states: Vec<_> = crew.devices.iter().map(|held| held.device().state().unwrap()).collect();
    assert_eq!(states, [MigState::Stop, MigState::StopCopy]);
    let error = rest.go_on(Milestone::StatesSaved, &mut crew).unwrap_err();
    assert_eq!(error.to_string(), "the link is lost");
    for held in crew.devices.iter() {
        assert_eq!(held.device().state().unwrap(), MigState::Running);
    }
    assert!(stream.read(&mut [0; 8]).is_err(), "the stream of a device that runs again is dead");
    let mut mile = Mile::default();
    crew.last_mile = &mut mile;
    let rest = Rest::begin(crew.plan()).go_on(Milestone::StatesSaved, &mut crew).unwrap();
    rest.let_run(&mut crew).unwrap();
    assert_eq!(mile.states.len(), 2);
    assert_eq!(cpus.0, ["pause", "resume", "pause", "resume"]);
}

#[test]
fn a_device_log_whose_reports_fail_means_everything_and_type1s_knows_that_a_card_pins_nothing() {
    let card = Mtty::create(1);
    let device = card.open("mtty0");
    let (memory, iommu) = (pci::memory(16), device.iommu());
    let range = IovaRange { iova: 0x10_0000, len: 16 * 4096 };
    iommu.map(range, &memory, 0).unwrap();
    // The driver keeps a log, it starts, and this kernel has no code to report it.
    let mut own = WatchedLog::start(device.log(), iommu.maps()).unwrap();
    let dirty = own.collect();
    assert!(matches!(&dirty, Dirty::Everything(why) if why.contains("a report of DMA failed")), "{dirty:?}");
    assert_eq!(dirty.ranges(&iommu.maps()), [range]);
    own.stop().unwrap();
    let type1 = || Some(Box::new(iommu.log().unwrap()) as Box<dyn DmaLog>);
    let mut watch = Watch::best(Some(Box::new(device.log())), type1(), iommu.maps());
    assert_eq!((watch.teller(), watch.collect()), (Teller::Iommu, Dirty::Ranges(vec![])));
    assert!(watch.pinned().is_empty());
    let Watch::Iommu(log) = watch else { panic!("it has told before") };
    log.stop().unwrap();
    // Logs that do not run answer with an error, never with "clean".
    assert!(iommu.log().unwrap().report(range).is_err());
    assert!(device.log().report(range).is_err());
    iommu.unmap(range).unwrap();
}

#[test]
fn virtual_functions_answer_that_they_cannot_move_and_why() {
    let functions = pci::find("8086:10ca");
    assert_eq!(functions.len(), 2, "the lab has two");
    for path in functions {
        let mut device = Passthrough::open("eth1", &path, &Iommu::container().unwrap()).unwrap();
        assert_eq!(device.model(), "8086:10ca");
        let Migration::NotMigratable(why) = device.migration().clone() else { panic!("it can move?") };
        assert!(why.contains("vfio-pci has no migration for 8086:10ca") && why.contains("failover"), "{why}");
        assert!(matches!(device.set_state(MigState::Stop), Err(VfioError::NotMigratable { .. })));
        let Err(error) = Held::new(Box::new(device)) else { panic!("it was held") };
        println!("lab: {error}");
    }
}

#[test]
fn iommufd_is_refused_with_a_sentence_where_the_kernel_has_none() {
    let Err(error) = Iommu::iommufd() else {
        panic!("the lab's kernel got an iommufd: now it can be tested")
    };
    assert!(error.to_string().contains("iommufd part of this kernel"), "{error}");
}
