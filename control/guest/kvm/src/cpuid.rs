//! What the guest's CPUs say of themselves, bit by bit with a name.
//!
//! Only bits that have a name in [`names::WORDS`] are ever given to a guest, so a bit that a target lacks can always be
//! told by its name. Bits that this machine could not carry to another host have none: nested virtualisation (its state is
//! not saved), the invariant TSC (another host's runs at another rate), the performance counters. What must never
//! happen: a guest that was given a bit and comes back on a CPU without it.

mod names;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::KvmError;
use crate::vcpu::Vcpu;
use names::{WORD_COUNT, WORDS};

/// Bits of the first leaf's ECX.
const HYPERVISOR: u32 = 1 << 31;
const DEADLINE_TIMER: u32 = 1 << 24;
/// Performance counters.
const LEAF_COUNTERS: u32 = 0xa;
/// The two leaves that tell a CPU's own number in the machine.
const LEAVES_TOPOLOGY: [u32; 2] = [0xb, 0x1f];
/// Where AMD's CPUs tell theirs, and how many there are.
const LEAF_AMD_NUMBER: u32 = 0x8000_001e;
const LEAF_AMD_COUNT: u32 = 0x8000_0008;

/// A set of named CPU features.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureSet {
    words: [u32; WORD_COUNT],
}

impl FeatureSet {
    /// Every named feature that this host's KVM can give to a guest.
    pub fn of_host() -> Result<FeatureSet, KvmError> {
        let kvm = Kvm::new().map_err(KvmError::refused("open /dev/kvm"))?;
        Ok(FeatureSet::of(supported(&kvm)?.as_slice()))
    }

    /// The named features among CPUID entries.
    #[must_use]
    pub fn of(entries: &[kvm_cpuid_entry2]) -> FeatureSet {
        let word = |number: usize| {
            let word = &WORDS[number];
            let found = entries.iter().find(|entry| entry.function == word.leaf && entry.index == word.index);
            found.map_or(0, |entry| *word.register.of(&mut { *entry })) & word.named()
        };
        FeatureSet { words: std::array::from_fn(word) }
    }

    /// Reads `host`, `host,-avx2,-pku` or a list of names; a name that this host lacks is refused.
    pub fn parse(text: &str, host: &FeatureSet) -> Result<FeatureSet, KvmError> {
        let mut set = FeatureSet { words: [0; WORD_COUNT] };
        for name in text.split([',', ' ']).map(str::trim).filter(|name| !name.is_empty()) {
            if name == "host" {
                set = host.clone();
                continue;
            }
            let (name, on) = name.strip_prefix('-').map_or((name, true), |name| (name, false));
            let Some((word, bit)) = names::find(name) else {
                return Err(KvmError::mistake(format!(
                    "--cpu-features: no feature '{name}' that a guest can be moved with; write 'host', 'host,-NAME' or names of /proc/cpuinfo"
                )));
            };
            if on {
                set.words[word] |= bit;
            } else {
                set.words[word] &= !bit;
            }
        }
        set.fits(host)?;
        Ok(set)
    }

    /// Refuses, with the first missing bit's name, when `host` cannot give all of this.
    pub fn fits(&self, host: &FeatureSet) -> Result<(), KvmError> {
        match self.missing_in(host).first() {
            None => Ok(()),
            Some(name) => Err(KvmError::mistake(format!(
                "this host's CPU cannot give the guest `{name}`: start it on the source with --cpu-features host,-{name}, or choose another target"
            ))),
        }
    }

    /// The names of what is in this set and not in `other`.
    #[must_use]
    pub fn missing_in(&self, other: &FeatureSet) -> Vec<&'static str> {
        let words = self.words.iter().zip(&other.words).zip(&WORDS);
        words.flat_map(|((mine, theirs), word)| word.names_of(mine & !theirs)).collect()
    }

    /// All names, as [`FeatureSet::parse`] reads them.
    #[must_use]
    pub fn names(&self) -> String {
        self.missing_in(&FeatureSet { words: [0; WORD_COUNT] }).join(" ")
    }

    /// What KVM supports, less every bit that is not in this set.
    pub(crate) fn mask(&self, supported: &CpuId) -> Vec<kvm_cpuid_entry2> {
        let mut entries = supported.as_slice().to_vec();
        for entry in &mut entries {
            let leaf = (entry.function, entry.index);
            for (word, allowed) in
                WORDS.iter().zip(self.words).filter(|(word, _)| (word.leaf, word.index) == leaf)
            {
                *word.register.of(entry) &= allowed;
            }
            if entry.function == LEAF_COUNTERS {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
        }
        entries
    }
}

/// What this host's KVM can give, with what it leaves to the VMM to say: that there is a hypervisor, and whether its
/// local APIC has the deadline timer.
pub(crate) fn supported(kvm: &Kvm) -> Result<CpuId, KvmError> {
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::refused("say what its CPUs can do"))?;
    let deadline = if kvm.check_extension(Cap::TscDeadlineTimer) { DEADLINE_TIMER } else { 0 };
    let first_leaf = cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == 1);
    first_leaf.for_each(|entry| entry.ecx |= HYPERVISOR | deadline);
    Ok(cpuid)
}

/// Gives each CPU the entries, with its own number in them.
pub(crate) fn give(vcpus: &[Vcpu], entries: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    let count = u32::try_from(vcpus.len()).unwrap_or(u32::MAX);
    for vcpu in vcpus {
        let mut mine = entries.to_vec();
        mine.iter_mut().for_each(|entry| number_entry(entry, u32::from(vcpu.number), count));
        let mine = CpuId::from_entries(&mine)
            .map_err(|_| KvmError::state("the guest's CPUs have more CPUID entries than KVM takes"))?;
        vcpu.fd.set_cpuid2(&mine).map_err(KvmError::refused("give a virtual CPU its features"))?;
    }
    Ok(())
}

/// The places in which a CPU finds its own number, and how many there are.
fn number_entry(entry: &mut kvm_cpuid_entry2, number: u32, count: u32) {
    match entry.function {
        1 => entry.ebx = entry.ebx & 0xffff | number << 24 | (count & 0xff) << 16,
        leaf if LEAVES_TOPOLOGY.contains(&leaf) => entry.edx = number,
        // One thread a core, one node.
        LEAF_AMD_NUMBER => (entry.eax, entry.ebx, entry.ecx) = (number, number & 0xff, 0),
        LEAF_AMD_COUNT => entry.ecx = entry.ecx & !0xf0ff | (count - 1) & 0xff | number_bits(count) << 12,
        _ => {}
    }
}

/// Bits of a number below `count`.
fn number_bits(count: u32) -> u32 {
    u32::BITS - (count - 1).leading_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> FeatureSet {
        let entry = |function, index, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        };
        // sse3 (pni), vmx (no name), hypervisor; avx2 and bmi2.
        FeatureSet::of(&[entry(1, 0, 0, 1 | 1 << 5 | 1 << 31, 1), entry(7, 0, 1 << 5 | 1 << 8, 0, 0)])
    }

    #[test]
    fn a_set_reads_back_what_it_prints() {
        assert_eq!(host().names(), "fpu pni hypervisor avx2 bmi2");
        assert_eq!(FeatureSet::parse(&host().names(), &host()).unwrap(), host());
        let less = FeatureSet::parse("host,-avx2", &host()).unwrap();
        assert_eq!(less.names(), "fpu pni hypervisor bmi2");
        assert_eq!(host().missing_in(&less), ["avx2"]);
    }

    #[test]
    fn what_a_host_lacks_is_refused_by_name() {
        let less = FeatureSet::parse("host,-avx2", &host()).unwrap();
        assert!(host().fits(&less).unwrap_err().to_string().contains("`avx2`"));
        assert!(FeatureSet::parse("host,avx512f", &host()).unwrap_err().to_string().contains("`avx512f`"));
        assert!(FeatureSet::parse("vmx", &host()).unwrap_err().to_string().contains("'vmx'"));
    }

    #[test]
    fn a_bit_without_a_name_is_never_given() {
        let mut entry = kvm_cpuid_entry2 { function: 1, ecx: u32::MAX, ..kvm_cpuid_entry2::default() };
        entry.edx = u32::MAX;
        let all = FeatureSet::of(&[entry]);
        let given = all.mask(&CpuId::from_entries(&[entry]).unwrap())[0];
        assert_eq!((given.ecx >> 5 & 1, given.ecx >> 31), (0, 1), "vmx is masked, hypervisor is not");
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = WORDS.iter().flat_map(|word| word.names_of(u32::MAX)).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn every_cpu_finds_its_own_number() {
        let mut entry = kvm_cpuid_entry2 { function: 1, ebx: 0x12_34_56, ..kvm_cpuid_entry2::default() };
        number_entry(&mut entry, 3, 4);
        assert_eq!(entry.ebx, 0x0304_3456);
        entry.function = LEAF_AMD_NUMBER;
        number_entry(&mut entry, 3, 4);
        assert_eq!((entry.eax, entry.ebx, entry.ecx), (3, 3, 0));
        (entry.function, entry.ecx) = (LEAF_AMD_COUNT, 0x1_503f);
        number_entry(&mut entry, 3, 4);
        assert_eq!(entry.ecx, 0x1_2003);
        assert_eq!([1, 2, 3, 32].map(number_bits), [0, 1, 2, 5]);
    }
}
