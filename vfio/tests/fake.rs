//! The fake keeps the contract of the kernel's devices, whatever it can do.

use vmferry_vfio::{FakeDevice, Features, MigState, MigratableDevice, StateSink, contract};

fn each_kind(mut check: impl FnMut(Features)) {
    for (p2p, pre_copy) in [(true, true), (true, false), (false, true), (false, false)] {
        check(Features { p2p, pre_copy });
    }
}

#[test]
fn every_arc_of_every_kind() {
    each_kind(|features| {
        let mut fake = FakeDevice::new("fake", features);
        let state = contract::save(&mut fake).unwrap();
        let tried = contract::every_arc(&mut fake, &state).unwrap();
        let known = 5
            + usize::from(features.p2p)
            + usize::from(features.pre_copy)
            + usize::from(features.p2p && features.pre_copy);
        assert_eq!(tried, (known - 1) * 8);
    });
}

#[test]
fn moves_with_and_without_pre_copy_and_refuses_rubbish() {
    each_kind(|features| {
        let (mut source, target) = (FakeDevice::new("fake", features), FakeDevice::new("fake", features));
        source.hold(b"what the guest wrote");
        let target = contract::moves(&mut source, target, false).unwrap();
        assert_eq!(target.held(), b"what the guest wrote");
        source.hold(b"more");
        let target = contract::moves(&mut source, target, features.pre_copy).unwrap();
        assert_eq!(target.held(), b"more");
        let state = contract::save(&mut source).unwrap();
        contract::refuses_rubbish(target, &state).unwrap();
    });
}

#[test]
fn a_target_that_fails_while_it_loads_is_reset_and_can_be_asked_again() {
    let features = Features { p2p: true, pre_copy: true };
    let (mut source, looker_on) = (FakeDevice::new("fake", features), FakeDevice::new("fake", features));
    let state = contract::save(&mut source).unwrap();
    looker_on.fail(MigState::Stop, MigState::Error);
    let mut sink = StateSink::open(looker_on.clone()).map_err(|refused| refused.error);
    if sink.is_err() {
        // The way to RESUMING goes through STOP: that was the failing one.
        assert_eq!(looker_on.at(), MigState::Error);
        sink = StateSink::open(looker_on.clone()).map_err(|refused| refused.error);
    }
    let mut sink = sink.unwrap();
    sink.write_all(&state).unwrap();
    looker_on.fail(MigState::Stop, MigState::Error);
    let refused = sink.finish().unwrap_err();
    assert_eq!(looker_on.at(), MigState::Running);
    let mut sink = StateSink::open(refused.device).map_err(|refused| refused.error).unwrap();
    sink.write_all(&state).unwrap();
    looker_on.fail(MigState::Running, MigState::Error);
    let loaded = sink.finish().map_err(|refused| refused.error).unwrap();
    let refused = loaded.run().unwrap_err();
    assert_eq!(refused.device.state().unwrap(), MigState::Running);
}
