//! The names of the bits, as `/proc/cpuinfo` and QEMU write them; an empty name is a bit that no guest is given.

use kvm_bindings::kvm_cpuid_entry2;

/// One register of one leaf.
pub(super) struct Word {
    pub(super) leaf: u32,
    pub(super) index: u32,
    pub(super) register: Register,
    names: &'static [&'static str],
}

/// Which register of a leaf.
#[derive(Clone, Copy)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    pub(super) fn of(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        }
    }
}

impl Word {
    /// The bits that have a name.
    pub(super) fn named(&self) -> u32 {
        let bits = self.names.iter().zip(0_u32..).filter(|(name, _)| !name.is_empty());
        bits.fold(0, |word, (_, bit)| word | 1 << bit)
    }

    /// The names of those bits of `word` that have one.
    pub(super) fn names_of(&self, word: u32) -> impl Iterator<Item = &'static str> + use<> {
        let named = self
            .names
            .iter()
            .zip(0_u32..)
            .filter(move |(name, bit)| word >> bit & 1 == 1 && !name.is_empty());
        named.map(|(name, _)| *name)
    }
}

/// The word and the bit of a name.
pub(super) fn find(name: &str) -> Option<(usize, u32)> {
    WORDS.iter().enumerate().find_map(|(number, word)| {
        let bit = word.names.iter().position(|known| *known == name && !name.is_empty())?;
        Some((number, 1 << bit))
    })
}

const fn word(leaf: u32, index: u32, register: Register, names: &'static [&'static str]) -> Word {
    Word { leaf, index, register, names }
}

pub(super) const WORD_COUNT: usize = 16;

#[rustfmt::skip]
pub(super) static WORDS: [Word; WORD_COUNT] = [
    word(1, 0, Register::Edx, &[
        "fpu", "vme", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "", "sep", "mtrr", "pge", "mca", "cmov",
        "pat", "pse36", "pn", "clflush", "", "", "", "mmx", "fxsr", "sse", "sse2", "ss", "ht", "", "", "",
    ]),
    // Bit 27, osxsave, follows CR4 by itself.
    word(1, 0, Register::Ecx, &[
        "pni", "pclmulqdq", "", "monitor", "", "", "", "", "", "ssse3", "", "", "fma", "cx16", "", "",
        "", "pcid", "", "sse4_1", "sse4_2", "x2apic", "movbe", "popcnt", "tsc_deadline_timer", "aes", "xsave", "", "avx", "f16c", "rdrand", "hypervisor",
    ]),
    // Bit 1, tsc_adjust, is an MSR that is saved.
    word(7, 0, Register::Ebx, &[
        "fsgsbase", "tsc_adjust", "", "bmi1", "hle", "avx2", "fdp_excptn_only", "smep", "bmi2", "erms", "invpcid", "rtm", "", "zero_fcs_fds", "", "",
        "avx512f", "avx512dq", "rdseed", "adx", "smap", "avx512ifma", "", "clflushopt", "clwb", "", "avx512pf", "avx512er", "avx512cd", "sha_ni", "avx512bw", "avx512vl",
    ]),
    word(7, 0, Register::Ecx, &[
        "prefetchwt1", "avx512vbmi", "umip", "pku", "", "waitpkg", "avx512_vbmi2", "", "gfni", "vaes", "vpclmulqdq", "avx512_vnni", "avx512_bitalg", "", "avx512_vpopcntdq", "",
        "la57", "", "", "", "", "", "rdpid", "", "bus_lock_detect", "cldemote", "", "movdiri", "movdir64b", "", "", "",
    ]),
    word(7, 0, Register::Edx, &[
        "", "", "avx512_4vnniw", "avx512_4fmaps", "fsrm", "", "", "", "avx512_vp2intersect", "", "md_clear", "", "", "", "serialize", "",
        "tsxldtrk", "", "", "", "", "", "amx_bf16", "avx512_fp16", "amx_tile", "amx_int8", "spec_ctrl", "intel_stibp", "flush_l1d", "arch_capabilities", "", "spec_ctrl_ssbd",
    ]),
    word(7, 1, Register::Eax, &[
        "sha512", "sm3", "sm4", "", "avx_vnni", "avx512_bf16", "", "cmpccxadd", "", "", "fzrm", "fsrs", "fsrc", "", "", "",
        "", "", "", "", "", "amx_fp16", "", "avx_ifma", "", "", "lam",
    ]),
    // What XSAVE may hold: it goes with the features above.
    word(0xd, 0, Register::Eax, &[
        "xcr0_x87", "xcr0_sse", "xcr0_avx", "xcr0_bndregs", "xcr0_bndcsr", "xcr0_opmask", "xcr0_zmm_hi256", "xcr0_hi16_zmm", "", "xcr0_pkru", "", "", "", "", "", "",
        "", "xcr0_tilecfg", "xcr0_tiledata",
    ]),
    word(0xd, 0, Register::Edx, &[]),
    word(0xd, 1, Register::Eax, &["xsaveopt", "xsavec", "xgetbv1", "xsaves", "xfd"]),
    word(0x8000_0001, 0, Register::Ecx, &[
        "lahf_lm", "cmp_legacy", "", "", "cr8_legacy", "abm", "sse4a", "misalignsse", "3dnowprefetch", "osvw", "", "xop", "", "", "", "",
        "fma4", "tce", "", "", "", "tbm", "topoext", "", "", "", "", "", "", "", "", "",
    ]),
    // AMD repeats the first leaf's bits here.
    word(0x8000_0001, 0, Register::Edx, &[
        "amd_fpu", "amd_vme", "amd_de", "amd_pse", "amd_tsc", "amd_msr", "amd_pae", "amd_mce", "amd_cx8", "amd_apic", "", "syscall", "amd_mtrr", "amd_pge", "amd_mca", "amd_cmov",
        "amd_pat", "amd_pse36", "", "mp", "nx", "", "mmxext", "amd_mmx", "amd_fxsr", "fxsr_opt", "pdpe1gb", "rdtscp", "", "lm", "3dnowext", "3dnow",
    ]),
    // Bit 8 is the invariant TSC.
    word(0x8000_0007, 0, Register::Edx, &[]),
    word(0x8000_0008, 0, Register::Ebx, &[
        "clzero", "", "xsaveerptr", "", "", "", "", "", "", "wbnoinvd", "", "", "ibpb", "", "ibrs", "stibp",
        "", "", "", "", "", "", "", "", "amd_ssbd", "virt_ssbd", "amd_no_ssb", "", "amd_psfd",
    ]),
    // Nested virtualisation.
    word(0x8000_000a, 0, Register::Edx, &[]),
    word(0x8000_0021, 0, Register::Eax, &["no_nested_data_bp", "", "lfence_always_serializing", "", "", "", "null_sel_clr_base", "", "auto_ibrs"]),
    word(0x4000_0001, 0, Register::Eax, &[
        "kvmclock", "kvm_nopiodelay", "", "kvmclock2", "kvm_asyncpf", "kvm_steal_time", "kvm_pv_eoi", "kvm_pv_unhalt", "", "kvm_pv_tlb_flush", "kvm_asyncpf_vmexit", "kvm_pv_ipi", "kvm_poll_control", "kvm_pv_sched_yield", "kvm_asyncpf_int", "kvm_msi_ext_dest_id",
        "", "", "", "", "", "", "", "", "kvmclock_stable",
    ]),
];
