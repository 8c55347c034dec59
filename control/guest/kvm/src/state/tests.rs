//! The bytes of a state: they read back, they stay as they were shipped, and no other host's bytes do harm.

use super::*;

/// A state that no machine has, with something in every field.
fn some(cpus: usize) -> State {
    let entry = |function, ecx| kvm_cpuid_entry2 { function, ecx, ..kvm_cpuid_entry2::default() };
    let vcpu = |number: u64| VcpuState {
        regs: kvm_regs { rip: 0x1000 + number, rflags: 2, ..kvm_regs::default() },
        sregs: kvm_sregs { cr0: 0x11, efer: 0x500, ..kvm_sregs::default() },
        xcrs: kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() },
        debugregs: kvm_debugregs { dr6: 0xffff_0ff0, dr7: 0x400, ..kvm_debugregs::default() },
        events: kvm_vcpu_events { flags: 0xd, ..kvm_vcpu_events::default() },
        mp_state: kvm_mp_state { mp_state: 3 },
        lapic: kvm_lapic_state::default(),
        tsc: 0x1234_5678_9abc + number,
        xsave: vec![0x5a; 64],
        msrs: vec![kvm_msr_entry { index: 0x1b, data: 0xfee0_0900, ..kvm_msr_entry::default() }],
    };
    let chip = |chip_id| kvm_irqchip { chip_id, ..kvm_irqchip::default() };
    State {
        clock_ns: 77_000_000_001,
        tsc_khz: 2_600_000,
        cpuid: vec![entry(0, 1), entry(1, 1)],
        irqchips: [chip(0), chip(1), chip(2)],
        pit: kvm_pit_state2::default(),
        serial: SerialState { in_buffer: vec![b'v', b'm'], ..SerialState::default() },
        vcpus: (0..cpus as u64).map(vcpu).collect(),
    }
}

#[test]
fn a_state_survives_the_trip() {
    for cpus in [1, 3] {
        let bytes = some(cpus).to_bytes();
        let read = State::from_bytes(&bytes).unwrap();
        assert_eq!(read.to_bytes(), bytes);
        assert_eq!(
            (read.cpus(), read.clock_ns(), read.features().names().as_str()),
            (cpus, 77_000_000_001, "pni")
        );
        assert!(bytes.len() <= STATE_BYTES_MAX);
    }
}

/// Version 1 as it was shipped: what a source of that version sends must be read for ever.
#[test]
fn golden_bytes_of_version_1() {
    let golden = include_bytes!("../../tests/golden/state-1.bin");
    assert_eq!(some(1).to_bytes(), golden, "the form changed: raise VERSION and keep reading the old one");
    assert!(State::from_bytes(golden).is_ok());
}

#[test]
fn every_cut_and_every_surplus_is_refused() {
    let bytes = some(2).to_bytes();
    for len in 0..bytes.len() {
        assert!(matches!(State::from_bytes(&bytes[..len]), Err(KvmError::StateRefused(_))), "cut at {len}");
    }
    assert!(State::from_bytes(&[bytes, vec![0]].concat()).is_err());
}

#[test]
fn counts_are_met_by_their_limits() {
    let bytes = some(1).to_bytes();
    // The number of CPUs, then that of CPUID entries.
    for (at, word) in [(12, "CPUs"), (28, "CPUID entries")] {
        for count in [0, 10_000, u32::MAX] {
            let mut wrong = bytes.clone();
            wrong[at..at + 4].copy_from_slice(&count.to_le_bytes());
            let sentence = State::from_bytes(&wrong).err().expect("a refusal").to_string();
            assert!(sentence.contains(word), "{sentence}");
        }
    }
}

#[test]
fn another_version_says_which() {
    let mut bytes = some(1).to_bytes();
    bytes[8] = 9;
    let sentence = State::from_bytes(&bytes).err().expect("a refusal").to_string();
    assert!(sentence.contains("version 9"), "{sentence}");
}

#[test]
fn no_flipped_byte_makes_it_panic() {
    let bytes = some(1).to_bytes();
    for at in 0..bytes.len() {
        let mut wrong = bytes.clone();
        wrong[at] ^= 0xff;
        if let Ok(state) = State::from_bytes(&wrong) {
            assert_eq!(state.to_bytes().len(), bytes.len());
        }
    }
}
