//! What a traced thread's system call filters would say to a call, found out without making it.
//!
//! A filter may answer a call with death. A VMM must not die because we asked, so each call that is injected is put
//! to the thread's own filters first: classic BPF programs over `struct seccomp_data`, the instructions that
//! seccomp(2) admits and no others. What must never happen: a call that a filter kills, traps or hands to a supervisor.

/// One instruction, `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) code: u16,
    pub(crate) if_true: u8,
    pub(crate) if_false: u8,
    pub(crate) value: u32,
}

/// What the kernel would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The call is made, or answered with an error number: neither harms.
    Harmless,
    /// The thread would be killed, trapped or held.
    Harmful,
}

/// `AUDIT_ARCH_X86_64` of <linux/audit.h>.
const ARCHITECTURE: u32 = 0xc000_003e;
/// Verdicts of <linux/seccomp.h>; the smallest as a signed number wins.
const ACTION_MASK: u32 = 0xffff_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;
/// A program has at most this many instructions (`BPF_MAXINSNS`).
pub(crate) const INSTRUCTIONS_MAX: usize = 4096;
const MEMORY_WORDS: usize = 16;
const DATA_WORDS: usize = 16;

/// `struct seccomp_data` as 32-bit words.
pub(crate) fn call_words(number: i64, instruction: u64, arguments: [u64; 3]) -> [u32; DATA_WORDS] {
    let mut words = [0; DATA_WORDS];
    words[0] = low(number.cast_unsigned());
    words[1] = ARCHITECTURE;
    (words[2], words[3]) = (low(instruction), high(instruction));
    for (at, argument) in arguments.into_iter().enumerate() {
        (words[4 + 2 * at], words[5 + 2 * at]) = (low(argument), high(argument));
    }
    words
}

fn low(word: u64) -> u32 {
    u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0)
}

fn high(word: u64) -> u32 {
    low(word >> 32)
}

/// What all filters together say.
pub(crate) fn judge(filters: &[Vec<Instruction>], call: &[u32; DATA_WORDS]) -> Verdict {
    // A program that this interpreter cannot follow is taken for the worst.
    let answers = filters.iter().map(|filter| run(filter, call).unwrap_or(KILL_PROCESS));
    let strongest = answers.map(u32::cast_signed).min().map_or(ALLOW, i32::cast_unsigned);
    match strongest & ACTION_MASK {
        ALLOW | LOG | ERRNO | TRACE => Verdict::Harmless,
        _ => Verdict::Harmful,
    }
}

#[derive(Default)]
struct Machine {
    accumulator: u32,
    index: u32,
    memory: [u32; MEMORY_WORDS],
}

fn run(program: &[Instruction], call: &[u32; DATA_WORDS]) -> Option<u32> {
    let mut machine = Machine::default();
    let mut at = 0_usize;
    loop {
        let instruction = *program.get(at)?;
        at += 1;
        // Jumps only go forward, so this ends.
        match instruction.code & 0x07 {
            0x05 => at = at.checked_add(machine.jump(instruction)?)?,
            0x06 => return machine.answer(instruction),
            _ => machine.step(instruction, call)?,
        }
    }
}

impl Machine {
    fn answer(&self, instruction: Instruction) -> Option<u32> {
        match instruction.code {
            0x06 => Some(instruction.value),
            0x16 => Some(self.accumulator),
            _ => None,
        }
    }

    fn operand(&self, instruction: Instruction) -> u32 {
        if instruction.code & 0x08 == 0 { instruction.value } else { self.index }
    }

    fn jump(&self, instruction: Instruction) -> Option<usize> {
        let (left, right) = (self.accumulator, self.operand(instruction));
        let taken = match instruction.code & 0xf0 {
            0x00 => return usize::try_from(instruction.value).ok(),
            0x10 => left == right,
            0x20 => left > right,
            0x30 => left >= right,
            0x40 => left & right != 0,
            _ => return None,
        };
        Some(usize::from(if taken { instruction.if_true } else { instruction.if_false }))
    }

    fn step(&mut self, instruction: Instruction, call: &[u32; DATA_WORDS]) -> Option<()> {
        let slot = usize::try_from(instruction.value).ok()?;
        match instruction.code {
            0x20 if slot % 4 == 0 => self.accumulator = *call.get(slot / 4)?,
            0x80 => self.accumulator = u32::try_from(size_of_val(call)).ok()?,
            0x81 => self.index = u32::try_from(size_of_val(call)).ok()?,
            0x00 => self.accumulator = instruction.value,
            0x01 => self.index = instruction.value,
            0x60 => self.accumulator = *self.memory.get(slot)?,
            0x61 => self.index = *self.memory.get(slot)?,
            0x02 => *self.memory.get_mut(slot)? = self.accumulator,
            0x03 => *self.memory.get_mut(slot)? = self.index,
            0x07 => self.index = self.accumulator,
            0x87 => self.accumulator = self.index,
            code if code & 0x07 == 0x04 => self.accumulator = self.arithmetic(instruction)?,
            _ => return None,
        }
        Some(())
    }

    fn arithmetic(&self, instruction: Instruction) -> Option<u32> {
        let (left, right) = (self.accumulator, self.operand(instruction));
        match instruction.code & 0xf0 {
            0x00 => Some(left.wrapping_add(right)),
            0x10 => Some(left.wrapping_sub(right)),
            0x20 => Some(left.wrapping_mul(right)),
            0x30 => left.checked_div(right),
            0x40 => Some(left | right),
            0x50 => Some(left & right),
            0x60 => left.checked_shl(right),
            0x70 => left.checked_shr(right),
            0x80 => Some(left.wrapping_neg()),
            0xa0 => Some(left ^ right),
            _ => None,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn line(code: u16, if_true: u8, if_false: u8, value: u32) -> Instruction {
        Instruction { code, if_true, if_false, value }
    }

    /// Answers `action` to one call and allows every other, as libseccomp compiles it.
    pub(crate) fn denying(number: i64, action: u32) -> Vec<Instruction> {
        vec![
            line(0x20, 0, 0, 4),
            line(0x15, 1, 0, ARCHITECTURE),
            line(0x06, 0, 0, KILL_PROCESS),
            line(0x20, 0, 0, 0),
            line(0x15, 0, 1, u32::try_from(number).unwrap()),
            line(0x06, 0, 0, action),
            line(0x06, 0, 0, ALLOW),
        ]
    }

    #[test]
    fn only_verdicts_that_harm_are_harmful() {
        for (action, verdict) in [
            (KILL_PROCESS, Verdict::Harmful),
            (0, Verdict::Harmful),
            (0x0003_0000, Verdict::Harmful),
            (0x7fc0_0000, Verdict::Harmful),
            (ERRNO | 1, Verdict::Harmless),
            (TRACE, Verdict::Harmless),
            (LOG, Verdict::Harmless),
            (ALLOW, Verdict::Harmless),
        ] {
            let filters = [denying(323, action)];
            assert_eq!(judge(&filters, &call_words(323, 0, [0; 3])), verdict, "{action:#x}");
            assert_eq!(judge(&filters, &call_words(16, 0, [0; 3])), Verdict::Harmless);
        }
    }

    #[test]
    fn the_strongest_of_several_filters_wins() {
        let filters = [denying(3, ALLOW), denying(3, KILL_PROCESS), denying(3, ERRNO)];
        assert_eq!(judge(&filters, &call_words(3, 0, [0; 3])), Verdict::Harmful);
        assert_eq!(judge(&[], &call_words(3, 0, [0; 3])), Verdict::Harmless);
    }

    #[test]
    fn arguments_are_seen_in_halves() {
        // Kills ioctl whose second argument has this low half: words 6 and 7 are its halves.
        let filter = vec![
            line(0x20, 0, 0, 24),
            line(0x54, 0, 0, 0xffff_ffff),
            line(0x15, 0, 1, 0xc018_aa3f),
            line(0x06, 0, 0, KILL_PROCESS),
            line(0x06, 0, 0, ALLOW),
        ];
        let filters = [filter];
        assert_eq!(judge(&filters, &call_words(16, 0, [3, 0xc018_aa3f, 0])), Verdict::Harmful);
        assert_eq!(judge(&filters, &call_words(16, 0, [3, 0x5401, 0])), Verdict::Harmless);
    }

    #[test]
    fn a_program_that_cannot_be_followed_is_taken_for_the_worst() {
        for program in
            [vec![], vec![line(0xffff, 0, 0, 0)], vec![line(0x20, 0, 0, 64)], vec![line(0x05, 0, 0, 9)]]
        {
            assert_eq!(judge(&[program], &call_words(3, 0, [0; 3])), Verdict::Harmful);
        }
    }
}
