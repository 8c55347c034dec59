//! The guest's clocks: KVM's (which its kernel reads as `kvm-clock`) and every CPU's time stamp counter.
//!
//! ```text
//!   source  run ─┤pause ── save├─ age by the source's clock ─┤ one way ├─ and by the target's ─┤restore ── run├─   target
//!   clock        │ ticks on    │ · · · added by the restore ·│ · lost ·│· · · added · · · · · ·│     ticks on │
//! ```
//!
//! Both tick while a guest is paused. They are read as the last of all when a machine is saved. The restore is told how old
//! that reading is: by the source's own clock until its last word left, and by the target's since that word came in. So the
//! guest sees the blackout pass, less one way of one message: its clocks never go back, and never jump by more than
//! the real blackout. The alternative, `KVM_CLOCK_REALTIME`, adds the difference of the two hosts' wall clocks: a guest
//! would jump by whatever they differ. All CPUs' counters are written with the time since the reading added, so their distance
//! from each other and from the clock stays as it was.

use kvm_bindings::{Msrs, kvm_clock_data, kvm_msr_entry};
use kvm_ioctls::{Cap, VmFd};
use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

use crate::KvmError;
use crate::vcpu::Vcpu;

/// The time stamp counter.
pub(crate) const MSR_TSC: u32 = 0x10;
/// What KVM itself takes for the same rate: 250 in a million.
const RATE_TOLERANCE_PPM: u64 = 250;

/// All clocks of a machine at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Clocks {
    pub(crate) clock_ns: u64,
    pub(crate) tsc_khz: u32,
    pub(crate) tscs: Vec<u64>,
}

/// This host's time, for differences only.
pub(crate) fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// What a counter of `khz` has gained after `passed`.
fn ticks(passed: Duration, khz: u32) -> u64 {
    u64::try_from(passed.as_nanos() * u128::from(khz) / 1_000_000).unwrap_or(u64::MAX)
}

impl Clocks {
    pub(crate) fn read(vm: &VmFd, vcpus: &[Vcpu]) -> Result<Clocks, KvmError> {
        let first = vcpus.first().ok_or_else(|| KvmError::state("a machine without a CPU has no clock"))?;
        let tsc_khz =
            first.fd.get_tsc_khz().map_err(KvmError::refused("tell the rate of the time stamp counter"))?;
        let mut tscs = Vec::with_capacity(vcpus.len());
        for vcpu in vcpus {
            let mut list = tsc_entry(0)?;
            vcpu.fd.get_msrs(&mut list).map_err(KvmError::refused("read a time stamp counter"))?;
            tscs.push(list.as_slice().first().map_or(0, |entry| entry.data));
        }
        let clock_ns = vm.get_clock().map_err(KvmError::refused("read the guest's clock"))?.clock;
        Ok(Clocks { clock_ns, tsc_khz, tscs })
    }

    /// The rate that the guest knows: this host's own, or scaled to it, or refused.
    pub(crate) fn set_rate(&self, vcpus: &[Vcpu]) -> Result<(), KvmError> {
        for vcpu in vcpus {
            let here = vcpu
                .fd
                .get_tsc_khz()
                .map_err(KvmError::refused("tell the rate of the time stamp counter"))?;
            if is_same_rate(here, self.tsc_khz) {
                continue;
            }
            let scaled = vcpu.fd.set_tsc_khz(self.tsc_khz);
            scaled.map_err(|_| {
                KvmError::state(format!(
                    "the guest's time stamp counter runs at {} kHz and this host's at {here}, which it cannot scale: choose a target with the same CPU",
                    self.tsc_khz
                ))
            })?;
        }
        Ok(())
    }

    /// Writes all clocks as they must be now. They were read when this host's clock showed `read_at`.
    pub(crate) fn write(&self, vm: &VmFd, vcpus: &[Vcpu], read_at: Duration) -> Result<(), KvmError> {
        for (vcpu, tsc) in vcpus.iter().zip(&self.tscs) {
            let passed = now().saturating_sub(read_at);
            let list = tsc_entry(tsc.saturating_add(ticks(passed, self.tsc_khz)))?;
            vcpu.fd.set_msrs(&list).map_err(KvmError::refused("write a time stamp counter"))?;
        }
        let passed = u64::try_from(now().saturating_sub(read_at).as_nanos()).unwrap_or(u64::MAX);
        let clock =
            kvm_clock_data { clock: self.clock_ns.saturating_add(passed), ..kvm_clock_data::default() };
        if vm.check_extension(Cap::AdjustClock) {
            vm.set_clock(&clock).map_err(KvmError::refused("set the guest's clock"))?;
        }
        Ok(())
    }
}

fn tsc_entry(data: u64) -> Result<Msrs, KvmError> {
    let entry = kvm_msr_entry { index: MSR_TSC, data, ..kvm_msr_entry::default() };
    Msrs::from_entries(&[entry]).map_err(|_| KvmError::state("one MSR is more than KVM takes"))
}

fn is_same_rate(one: u32, other: u32) -> bool {
    u64::from(one.abs_diff(other)) * 1_000_000 <= u64::from(one) * RATE_TOLERANCE_PPM
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_follow_the_rate() {
        assert_eq!(ticks(Duration::from_millis(20), 2_500_000), 50_000_000);
        assert_eq!(ticks(Duration::MAX, u32::MAX), u64::MAX);
    }

    #[test]
    fn rates_of_one_kind_of_cpu_are_the_same() {
        assert!(is_same_rate(2_500_000, 2_500_600));
        assert!(!is_same_rate(2_500_000, 2_501_000));
        assert!(!is_same_rate(0, 1));
    }
}
