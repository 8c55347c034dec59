//! The table in which a PC without ACPI names its processors and interrupt lines (Intel's MultiProcessor Specification 1.4).
//!
//! Without it a kernel finds one processor at most, and an interrupt controller that it does not trust with its timer.

/// The last kilobyte below 640 KiB: where a kernel looks, and no memory by the map that it gets.
pub(super) const MP_TABLE: u64 = 0x9_fc00;

const POINTER_BYTES: u32 = 16;
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const SPEC_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;
const ISA_IRQS: u8 = 16;

/// Kinds of interrupt entries.
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTERNAL: u8 = 3;
const EVERY_CPU: u8 = 0xff;

/// The pointer, and the table behind it.
pub(super) fn table(cpus: u8) -> Vec<u8> {
    let entries = entries(cpus);
    let count = u16::from(cpus) + 2 + u16::from(ISA_IRQS) + 2;
    let len = u16::try_from(44 + entries.len()).unwrap_or(u16::MAX);
    let mut table = Vec::new();
    table.extend_from_slice(b"PCMP");
    table.extend_from_slice(&len.to_le_bytes());
    table.extend_from_slice(&[SPEC_1_4, 0]);
    table.extend_from_slice(b"VMFERRY MICROVM     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    balance(&mut table, 7);
    let mut whole = b"_MP_".to_vec();
    let begin = u32::try_from(MP_TABLE).unwrap_or(0) + POINTER_BYTES;
    whole.extend_from_slice(&begin.to_le_bytes());
    whole.extend_from_slice(&[1, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    balance(&mut whole, 10);
    whole.extend_from_slice(&table);
    whole
}

fn entries(cpus: u8) -> Vec<u8> {
    let io_apic = cpus;
    let mut bytes = Vec::new();
    for cpu in 0..cpus {
        // Enabled, and the first of them boots.
        let flags = if cpu == 0 { 3 } else { 1 };
        bytes.extend_from_slice(&[0, cpu, APIC_VERSION, flags]);
        bytes.extend_from_slice(&[0; 16]);
    }
    bytes.extend_from_slice(&[1, ISA_BUS]);
    bytes.extend_from_slice(b"ISA   ");
    bytes.extend_from_slice(&[2, io_apic, APIC_VERSION, 1]);
    bytes.extend_from_slice(&IO_APIC.to_le_bytes());
    for irq in 0..ISA_IRQS {
        bytes.extend_from_slice(&[3, VECTORED, 0, 0, ISA_BUS, irq, io_apic, irq]);
    }
    bytes.extend_from_slice(&[4, EXTERNAL, 0, 0, ISA_BUS, 0, 0, 0]);
    bytes.extend_from_slice(&[4, NMI, 0, 0, ISA_BUS, 0, EVERY_CPU, 1]);
    bytes
}

/// Sets the byte that makes the sum of all zero.
fn balance(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[at] = sum.wrapping_neg();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn both_sums_are_zero_and_the_lengths_are_true() {
        for cpus in [1, 2, 32] {
            let whole = table(cpus);
            let (pointer, table) = whole.split_at(16);
            assert_eq!((sum(pointer), sum(table)), (0, 0));
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let count = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(
                table.len(),
                44 + usize::from(cpus) * 20 + (usize::from(count) - usize::from(cpus)) * 8
            );
            assert!(whole.len() <= 1024, "it ends below 640 KiB");
        }
    }
}
