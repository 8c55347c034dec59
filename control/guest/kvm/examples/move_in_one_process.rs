//! Moves a running micro-VM into another one, in one process: all that a VMM on the rust-vmm crates has to do to be moved
//! by `vmferry-datapath`. Needs a KVM that runs guests: `cargo run -p vmferry-kvm --example move_in_one_process`.
//!
//! Between two hosts it is the same with `TcpLink` over a connection for each lane, and keys for a sealing cipher.

use std::error::Error;
use std::io::Read;
use std::sync::Arc;
use std::time::Instant;

use vmferry_datapath::{
    Access, ByteLen, Cipher, Compression, DirtyLog, GuestRam, LaneEnd, MemoryLink, PageSet, RamFile,
    Receiver, SendPlan, Sender,
};
use vmferry_kvm::{Config, FeatureSet, Flat, GuestMemory, State, Tracking};

const RAM: ByteLen = ByteLen(16 << 20);
const PAGES: u32 = 512;
const CIPHER: Cipher = Cipher::Plain;

fn config(features: &FeatureSet) -> Result<Config, Box<dyn Error>> {
    let memory = Arc::new(GuestMemory::new(RAM)?);
    let (console, beat) = (Box::new(std::io::sink()), Box::new(std::io::sink()));
    Ok(Config { memory, cpus: 1, tracking: Tracking::Bitmap, features: features.clone(), console, beat })
}

/// What the lanes need of a VMM's memory: its file, mapped a second time.
fn map(memory: &GuestMemory, access: Access) -> Result<Arc<GuestRam>, Box<dyn Error>> {
    let file = RamFile { file: memory.file().try_clone()?, offset: 0 };
    Ok(Arc::new(GuestRam::map(memory.layout().clone(), vec![file], access)?))
}

/// Moves a guest that writes all the time, and counts what every page must hold.
pub(crate) fn move_in_one_process() -> Result<u64, Box<dyn Error>> {
    let features = FeatureSet::of_host()?;
    let (here, there) = (config(&features)?, config(&features)?);
    let (from, to) = (map(&here.memory, Access::ReadOnly)?, map(&there.memory, Access::ReadWrite)?);
    let (near, far) = MemoryLink::pair();
    let end = |link| vec![LaneEnd { link: Box::new(link), keys: None, cpu: None }];
    let plan =
        SendPlan { cipher: CIPHER, compression: Compression::Off, keep_hashes: false, rate_limit: None };
    let (mut receiver, mut state_in) = Receiver::start(to, end(far), CIPHER)?;
    let mut sender = Sender::start(Arc::clone(&from), end(near), plan)?;
    let go_on = &mut || true;

    // Rounds: what the log tells, while the guest writes on. The first harvest is every page.
    let guest = Flat::boot(here)?;
    let mut log = guest.machine.track()?;
    let guest = guest.run()?;
    let mut sent = 0;
    for round in 0..3 {
        guest.write_run(16, PAGES >> round)?;
        let mut dirty = PageSet::new(from.layout());
        log.collect(&mut dirty)?;
        sent += dirty.count().0;
        sender.send(&dirty, go_on)?;
        sender.flush()?;
        guest.write_run(16 + PAGES, 8)?;
    }

    // The blackout: pause, last pages, state, and the end of every lane.
    let guest = guest.pause()?;
    let mut last = PageSet::new(from.layout());
    log.collect(&mut last)?;
    sender.send(&last, go_on)?;
    let (state, saved_at) = (guest.machine.save()?, now());
    sender.send_state(&state.to_bytes())?;
    sender.end_state()?;
    let totals = sender.finish()?;
    let mut state = Vec::new();
    state_in.read_to_end(&mut state)?;
    receiver.wait_complete(&totals, go_on)?;

    // There: a machine is made of the state and the memory, and its clocks are as much older as the state is. The one here is dropped, and never runs again.
    let arrived = Flat::restore(there, &State::from_bytes(&state)?, saved_at.elapsed())?;
    drop(guest);
    let arrived = arrived.run()?;
    arrived.write_run(16, PAGES)?;
    let arrived = arrived.pause()?;
    for (page, writes) in [(16, 4), (16 + PAGES / 2, 2), (15 + PAGES, 2), (16 + PAGES, 3)] {
        let found = arrived.count(page)?;
        if found != writes {
            return Err(format!("page {page} was written {writes} times and holds {found}").into());
        }
    }
    Ok(sent + last.count().0)
}

#[expect(clippy::disallowed_methods, reason = "whoever moves a guest has a clock")]
fn now() -> Instant {
    Instant::now()
}

/// The example's own way in; a test includes this file and calls the function above.
#[cfg_attr(test, expect(dead_code, reason = "a test calls the move itself"))]
fn main() -> Result<(), Box<dyn Error>> {
    println!("{} pages moved, and the guest runs on", move_in_one_process()?);
    Ok(())
}
