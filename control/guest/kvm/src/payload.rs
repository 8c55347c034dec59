//! A guest of 26 bytes of code, for tests that must be fast: it does what it is told, page by page.
//!
//! ```text
//!   next: eax ← port 0x90: address   ┐
//!         eax ← port 0x94: count     ├─ from the Commander; a count of 0 when there is no command
//!         eax ← port 0x98: stride    ┘
//!         add 1 to the word at address, `count` times, `stride` bytes apart
//!         port 0x9c ← eax: how many rounds this guest did, wherever it ran
//! ```
//!
//! So a page's first word counts the times it was written, and whoever commanded the writes knows what it must be. The
//! guest has no state but its registers: a command that a pause cuts in two is begun again or is not done, because the
//! answers of the three ports are latched together.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::bus::Device;

/// Where the code lies.
pub const FLAT_ENTRY: u64 = 0x1000;
/// Where a [`Commander`] belongs.
pub const FLAT_PORTS: u64 = 0x90;
/// How many ports it has.
pub const FLAT_PORTS_LEN: u64 = 16;
/// Below this the guest's own page lies.
pub const FLAT_FREE_FROM: u64 = 0x2000;

/// 32-bit code with flat segments.
pub const FLAT_CODE: [u8; 26] = [
    0xe5, 0x90, //       next:  in   eax, 0x90
    0x89, 0xc7, //              mov  edi, eax
    0xe5, 0x94, //              in   eax, 0x94
    0x89, 0xc1, //              mov  ecx, eax
    0xe5, 0x98, //              in   eax, 0x98
    0xe3, 0x06, //              jecxz done
    0xff, 0x07, //       write: inc  dword [edi]
    0x01, 0xc7, //              add  edi, eax
    0xe2, 0xfa, //              loop write
    0x46, //             done:  inc  esi
    0x89, 0xf0, //              mov  eax, esi
    0xe7, 0x9c, //              out  0x9c, eax
    0xeb, 0xe7, //              jmp  next
    0x90, //                    nop
];

/// How long an idle guest waits for a command before its round of nothing: the wait is its vCPU's, so it is short.
const IDLE: Duration = Duration::from_millis(1);

/// Writes that a guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writes {
    /// The first address.
    pub address: u32,
    /// How many words.
    pub count: u32,
    /// Bytes from one to the next.
    pub stride: u32,
}

/// The device that tells the flat guest what to write.
#[derive(Clone, Default)]
pub struct Commander(Arc<Shared>);

#[derive(Default)]
struct Shared {
    orders: Mutex<Orders>,
    changed: Condvar,
}

#[derive(Default)]
struct Orders {
    waiting: VecDeque<Writes>,
    latched: Option<Writes>,
    done: u64,
    rounds: u32,
}

impl Commander {
    /// Adds an order.
    pub fn order(&self, writes: Writes) {
        self.orders().waiting.push_back(writes);
        self.0.changed.notify_all();
    }

    /// Waits until the guest did everything that it was told; `false` when it did not within `timeout`.
    #[must_use]
    pub fn wait_done(&self, timeout: Duration) -> bool {
        let is_busy = |orders: &mut Orders| !orders.waiting.is_empty() || orders.latched.is_some();
        let waited = self.0.changed.wait_timeout_while(self.orders(), timeout, is_busy);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Orders that were carried out here.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.orders().done
    }

    /// Rounds of the guest, wherever it ran: what its own register says.
    #[must_use]
    pub fn rounds(&self) -> u32 {
        self.orders().rounds
    }

    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.0.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn latch(&self) -> u32 {
        let orders = self.orders();
        let idle = |orders: &mut Orders| orders.waiting.is_empty();
        let mut orders = match self.0.changed.wait_timeout_while(orders, IDLE, idle) {
            Ok((orders, _)) => orders,
            Err(poisoned) => poisoned.into_inner().0,
        };
        // An order that was latched before the guest came here again was cut off by a restore: it is done anew.
        if orders.latched.is_none() {
            orders.latched = orders.waiting.pop_front();
        }
        orders.latched.map_or(0, |writes| writes.address)
    }

    fn finish(&self, rounds: u32) {
        let mut orders = self.orders();
        orders.rounds = rounds;
        if orders.latched.take().is_some() {
            orders.done += 1;
        }
        self.0.changed.notify_all();
    }
}

impl Device for Commander {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let answer = match offset {
            0 => self.latch(),
            4 => self.orders().latched.map_or(0, |writes| writes.count),
            8 => self.orders().latched.map_or(0, |writes| writes.stride),
            _ => 0,
        };
        let len = data.len().min(4);
        data[..len].copy_from_slice(&answer.to_le_bytes()[..len]);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (12, Ok(rounds)) = (offset, data.try_into()) {
            self.finish(u32::from_le_bytes(rounds));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_answers_belong_together() {
        let mut device = Commander::default();
        let host = device.clone();
        let mut ask = |offset| {
            let mut data = [0; 4];
            device.read(offset, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!([ask(0), ask(4), ask(8)], [0, 0, 0], "no order is a round of nothing");
        assert_eq!(ask(0), 0);
        host.order(Writes { address: 0x2000, count: 3, stride: 4096 });
        assert_eq!([ask(4), ask(8)], [0, 0], "an order that came in between waits for the next round");
        assert_eq!([ask(0), ask(4), ask(8)], [0x2000, 3, 4096]);
        assert!(!host.wait_done(Duration::from_millis(1)));
        device.write(12, &7_u32.to_le_bytes());
        assert!(host.wait_done(Duration::ZERO));
        assert_eq!((host.done(), host.rounds()), (1, 7));
    }

    #[test]
    fn jumps_land_where_the_listing_says() {
        let at = |target: usize, from: usize| u8::try_from((target + 256 - (from + 2)) % 256).unwrap();
        assert_eq!(FLAT_CODE[11], at(18, 10), "jecxz done");
        assert_eq!(FLAT_CODE[17], at(12, 16), "loop write");
        assert_eq!(FLAT_CODE[24], at(0, 23), "jmp next");
    }
}
