//! Two guests' memory, the links between them, and a wire that can be tampered with.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmferry_datapath::link::memory::Tap;
use vmferry_datapath::*;

pub(crate) fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub(crate) fn noise_page(seed: u64) -> [u8; PAGE_BYTES] {
    let mut state = seed;
    let mut page = [0; PAGE_BYTES];
    page.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&splitmix(&mut state).to_le_bytes()));
    page
}

/// Empty memory of these blocks, in pages each.
pub(crate) fn empty_ram(blocks: &[u64]) -> Arc<GuestRam> {
    let block = |(n, pages): (usize, &u64)| RamBlock {
        name: format!("ram{n}"),
        len: PageCount(*pages).bytes(),
        page_bytes: 4096,
    };
    let layout = RamLayout::new(blocks.iter().enumerate().map(block).collect()).unwrap();
    let file = |block: &RamBlock| {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(block.len.0).unwrap();
        RamFile { file, offset: 0 }
    };
    let files = layout.blocks().iter().map(file).collect();
    Arc::new(GuestRam::map(layout, files, Access::ReadWrite).unwrap())
}

/// Fills memory with a mixture: noise, runs of zeroes that were written, holes, and text that compresses.
pub(crate) fn fill(ram: &GuestRam, seed: u64) {
    let mut state = seed;
    let all = PageSet::full(ram.layout());
    for (chunk, word) in all.iter_chunks() {
        let kind = splitmix(&mut state) % 5;
        for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
            let page = PageIndex(chunk.first_page().0 + bit);
            match (kind, splitmix(&mut state) % 4) {
                (0, _) | (1, 0) => continue,
                (2, _) | (1, 1) => ram.write_page(page, &[0; PAGE_BYTES]).unwrap(),
                (3, 0..2) => ram.write_page(page, &[b'v'; PAGE_BYTES]).unwrap(),
                _ => ram.write_page(page, &noise_page(state)).unwrap(),
            }
        }
    }
}

pub(crate) fn key(lane: usize, direction: u8) -> LaneKey {
    let mut bytes = [direction; 32];
    bytes[0] = u8::try_from(lane).unwrap();
    LaneKey::from_bytes(bytes)
}

/// Keys as the sender holds them, or as the receiver does.
pub(crate) fn keys(cipher: Cipher, lane: usize, sender: bool) -> Option<LaneKeys> {
    let (outbound, inbound) = if sender { (1, 2) } else { (2, 1) };
    let keys = || LaneKeys { outbound: key(lane, outbound), inbound: key(lane, inbound) };
    (cipher != Cipher::Plain).then(keys)
}

pub(crate) fn end(link: impl Link + 'static, cipher: Cipher, lane: usize, sender: bool) -> LaneEnd {
    LaneEnd { link: Box::new(link), keys: keys(cipher, lane, sender), cpu: None }
}

pub(crate) fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

/// The lanes' ends, the sender's and the receiver's.
pub(crate) type Ends = (Vec<LaneEnd>, Vec<LaneEnd>);

pub(crate) fn over_tcp(cipher: Cipher, lanes: usize) -> Ends {
    let lane = |n| {
        let (a, b) = tcp_pair();
        (end(TcpLink::new(a), cipher, n, true), end(TcpLink::new(b), cipher, n, false))
    };
    (0..lanes).map(lane).unzip()
}

pub(crate) fn over_memory(cipher: Cipher, lanes: usize) -> Ends {
    let lane = |n| {
        let (a, b) = MemoryLink::pair();
        (end(a, cipher, n, true), end(b, cipher, n, false))
    };
    (0..lanes).map(lane).unzip()
}

/// One lane with a stranger between its ends, who may change what the sender's host sends.
pub(crate) fn tampered(
    cipher: Cipher,
    tamper: impl FnMut(Vec<u8>) -> Vec<u8> + Send + 'static,
) -> (LaneEnd, LaneEnd, JoinHandle<()>) {
    let (a, near) = MemoryLink::tapped();
    let (b, far) = MemoryLink::tapped();
    let stranger = thread::spawn(move || relay(near, far, tamper));
    (end(a, cipher, 0, true), end(b, cipher, 0, false), stranger)
}

fn relay(mut near: Tap, mut far: Tap, mut tamper: impl FnMut(Vec<u8>) -> Vec<u8>) {
    let wait = Duration::from_millis(1);
    loop {
        let Ok(there) = near.read(wait) else { return };
        if !there.is_empty() && far.write(&tamper(there)).is_err() {
            return;
        }
        let Ok(back) = far.read(Duration::ZERO) else { return };
        if !back.is_empty() && near.write(&back).is_err() {
            return;
        }
    }
}

pub(crate) fn plan(cipher: Cipher) -> SendPlan {
    SendPlan { cipher, compression: Compression::Off, keep_hashes: false, rate_limit: None }
}

pub(crate) fn yes() -> impl FnMut() -> bool {
    || true
}

/// Populated pages are read and sent; the rest is told to be zero.
pub(crate) fn send_everything(sender: &mut Sender, ram: &GuestRam) {
    let populated = ram.populated().unwrap();
    let mut holes = PageSet::full(ram.layout());
    holes.subtract(&populated);
    sender.send_zero(&holes).unwrap();
    assert!(sender.send(&populated, &mut yes()).unwrap());
}

#[track_caller]
pub(crate) fn assert_same(source: &GuestRam, target: &GuestRam) {
    assert_eq!(source.digest(2).unwrap(), target.digest(2).unwrap(), "the target's memory differs");
}

pub(crate) const SEALED: Cipher = Cipher::Aes256Gcm(Provider::AwsLc);
pub(crate) const CIPHERS: [Cipher; 3] = [Cipher::Plain, Cipher::Aes256Gcm(Provider::AesGcm), SEALED];
