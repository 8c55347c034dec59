//! The devices that are passed through to a micro-VM: held by its process, and moved with it.
//!
//! ```text
//!   source: held ── pre_copy ──► stream ── rest: P2P → vCPUs → stop ──► stream, to its end     let_run undoes it
//!   target: free ── expect ──► RESUMING ◄── write … finish ──► loaded ── take_up ──► held, works
//! ```
//!
//! The process that moves the guest reads and writes device states over the control socket, each on a connection of its
//! own, and never holds a device or its data file: when it dies, this process still has everything that brings the
//! device back, and a guardian's one word is enough. What must never happen: a device that works on two hosts, so that
//! what came for one waits here, standing still, until the guest is told to run.

mod seat;
mod watches;

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmferry_kvm::{Blank, GuestMemory, KvmError};
use vmferry_vfio::quiesce::LastMile;
use vmferry_vfio::{
    Chunk, Crew, Held, Iommu, IovaRange, Milestone, Remaining, Rest, StateStream, Teller, Vcpus, VfioError,
};

use self::seat::Seat;
pub(super) use self::watches::Watches;
use super::args::PassedDevice;
use crate::{DeviceFacts, GuestError};

/// All devices of a micro-VM.
pub(super) struct Devices {
    seats: Vec<Seat>,
    /// Present when there are devices.
    iommu: Option<Iommu>,
    desk: Mutex<Desk>,
}

/// What belongs together: the devices that work for the guest, and how far they were brought to rest.
#[derive(Default)]
struct Desk {
    /// In the order of the seats that can move.
    held: Vec<Held>,
    rest: Option<Rest>,
}

impl Devices {
    /// Takes the devices, lets them reach the guest's memory and finds out who can tell what they write.
    pub(super) fn open(wanted: &[PassedDevice], memory: &GuestMemory) -> Result<Devices, GuestError> {
        let mut devices = Devices { seats: Vec::new(), iommu: None, desk: Mutex::default() };
        if wanted.is_empty() {
            return Ok(devices);
        }
        let iommu = Iommu::new()?;
        for PassedDevice { name, path } in wanted {
            if devices.seats.iter().any(|seat| seat.name() == name.as_str()) {
                return Err(GuestError::mistake(format!(
                    "two devices are named '{name}': rename one --vfio"
                )));
            }
            devices.seats.push(Seat::open(name, path, &iommu)?);
        }
        for region in memory.regions() {
            let range = IovaRange { iova: region.guest_addr, len: region.len.0 };
            iommu.map(range, memory.file(), region.file_offset)?;
        }
        devices.iommu = Some(iommu);
        // Logs are tried now, so that a guest can be inspected before it moves.
        drop(devices.watch(memory));
        Ok(devices)
    }

    /// Puts every device on the bus of a machine.
    pub(super) fn attach(&self, blank: &Blank) -> Result<(), KvmError> {
        self.seats
            .iter()
            .enumerate()
            .try_for_each(|(number, seat)| blank.pass_through(number, seat.regions()))
    }

    /// What they are.
    pub(super) fn facts(&self) -> Vec<DeviceFacts> {
        self.seats.iter().map(Seat::facts).collect()
    }

    /// Starts the logs of what devices write; they end with what this gives.
    pub(super) fn watch(&self, memory: &GuestMemory) -> Watches {
        let Some(iommu) = &self.iommu else { return Watches::none() };
        let watches = Watches::start(self.seats.iter().map(Seat::log), iommu, memory);
        let pinned = iommu.maps().bytes();
        for (seat, teller) in self.seats.iter().zip(watches.tellers()) {
            seat.learn(teller, if teller == Teller::Nobody { pinned } else { 0 });
        }
        watches
    }

    /// The guest runs here from now on: its devices work, with the state that was loaded where one was.
    pub(super) fn take_up(&self) -> Result<(), VfioError> {
        let held = self.movable().map(Seat::take_up).collect::<Result<Vec<_>, _>>()?;
        self.desk().held = held;
        Ok(())
    }

    /// Their states begin to leave while they work. One that cannot pre-copy gives its state after the stop.
    pub(super) fn pre_copy(&self) -> Result<(), VfioError> {
        self.end_pre_copy();
        let streams = self.desk().held.iter_mut().map(Held::pre_copy).collect::<Result<Vec<_>, _>>();
        let streams = streams.inspect_err(|_| self.end_pre_copy())?;
        self.movable().zip(streams).for_each(|(seat, stream)| *seat.stream() = stream);
        Ok(())
    }

    /// They work as before; what had left is of no use. Nothing happens while the guest is at rest.
    pub(super) fn end_pre_copy(&self) {
        let mut desk = self.desk();
        if desk.rest.is_some() {
            return;
        }
        for error in desk.held.iter_mut().filter_map(|held| held.let_run().err()) {
            tracing::warn!("{error}");
        }
        drop(desk);
        self.movable().for_each(|seat| *seat.stream() = None);
    }

    /// Brings devices and vCPUs to rest, in the order in which that is safe. After a failure everything runs.
    pub(super) fn rest(&self, vcpus: &mut dyn Vcpus) -> Result<(), VfioError> {
        let mut desk = self.desk();
        if desk.rest.is_some() {
            return Ok(());
        }
        let mut crew = Crew { devices: &mut desk.held, vcpus, last_mile: &mut TheMoversWork };
        let plan = crew.plan();
        plan.notes().iter().for_each(|note| tracing::warn!("{note}"));
        let rest = Rest::begin(plan).go_on(Milestone::DmaCollected, &mut crew)?;
        desk.rest = Some(rest);
        Ok(())
    }

    /// Undoes [`Devices::rest`]. What could not be undone whole is told; a device then had to be reset.
    pub(super) fn let_run(&self, vcpus: &mut dyn Vcpus) -> Result<(), Vec<VfioError>> {
        let mut desk = self.desk();
        let Some(rest) = desk.rest.take() else { return vcpus.resume().map_err(|error| vec![error]) };
        let mut crew = Crew { devices: &mut desk.held, vcpus, last_mile: &mut TheMoversWork };
        let undone = rest.let_run(&mut crew);
        drop(desk);
        self.movable().for_each(|seat| *seat.stream() = None);
        undone
    }

    /// The next bytes of a device's state. A device that could not pre-copy begins to give it once it is at rest.
    pub(super) fn read(&self, device: usize, into: &mut [u8]) -> Result<Chunk, VfioError> {
        let mut stream = self.seat(device)?.stream();
        if stream.is_none() {
            *stream = self.begin_stopped(device)?;
        }
        stream.as_mut().map_or(Ok(Chunk::Idle), |stream| stream.read(into))
    }

    fn begin_stopped(&self, device: usize) -> Result<Option<StateStream>, VfioError> {
        let mut desk = self.desk();
        if desk.rest.is_none() {
            return Ok(None);
        }
        desk.held.get_mut(device).map_or(Ok(None), Held::save)
    }

    /// What a stop right now would still move of a device's state.
    pub(super) fn remaining(&self, device: usize) -> Result<Remaining, VfioError> {
        let mut stream = self.seat(device)?.stream();
        let desk = self.desk();
        let held = desk.held.get(device).ok_or_else(|| no_device(device))?;
        held.remaining(stream.as_mut())
    }

    /// A device's state will come.
    pub(super) fn expect(&self, device: usize) -> Result<(), VfioError> {
        self.seat(device)?.expect()
    }

    /// A piece of it.
    pub(super) fn write(&self, device: usize, bytes: &[u8]) -> Result<(), VfioError> {
        self.seat(device)?.write(bytes)
    }

    /// All of it came: the device takes it, or refuses.
    pub(super) fn finish(&self, device: usize) -> Result<(), VfioError> {
        self.seat(device)?.finish()
    }

    /// What came will not be used.
    pub(super) fn discard(&self) {
        self.seats.iter().for_each(Seat::discard);
    }

    /// The seats whose devices have states, in the order in which everybody counts them.
    fn movable(&self) -> impl Iterator<Item = &Seat> {
        self.seats.iter().filter(|seat| seat.can_move())
    }

    fn seat(&self, device: usize) -> Result<&Seat, VfioError> {
        self.movable().nth(device).ok_or_else(|| no_device(device))
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn no_device(device: usize) -> VfioError {
    VfioError::UserMistake(format!("this micro-VM has no device {device} that can be moved"))
}

/// What the plan leaves to the process that moves the guest: it reads the logs by a harvest once all is at rest, which
/// gives a failed move's bits back by itself, and sends the last pages and the states.
struct TheMoversWork;

impl LastMile for TheMoversWork {
    fn collect_dma(&mut self) -> Result<(), VfioError> {
        Ok(())
    }

    fn give_back_dma(&mut self) -> Result<(), VfioError> {
        Ok(())
    }

    fn last_memory(&mut self) -> Result<(), VfioError> {
        Err(VfioError::Bug("the micro-VM was told to send memory".to_owned()))
    }

    fn save(&mut self, stream: StateStream) -> Result<(), VfioError> {
        Err(VfioError::Bug(format!("the micro-VM was told to send the state of `{}`", stream.device())))
    }
}

impl From<VfioError> for GuestError {
    fn from(error: VfioError) -> GuestError {
        let sentence = error.to_string();
        match error {
            VfioError::HostRefused { what, source } => GuestError::HostRefused { what, source },
            VfioError::UserMistake(_) | VfioError::NotMigratable { .. } => GuestError::UserMistake(sentence),
            VfioError::Bug(what) => GuestError::Bug(what),
            VfioError::StateRefused { .. }
            | VfioError::DataRefused { .. }
            | VfioError::DataLost { .. }
            | VfioError::NotUndone { .. }
            | VfioError::Caller(_) => GuestError::GuestMisbehaved(sentence),
        }
    }
}
