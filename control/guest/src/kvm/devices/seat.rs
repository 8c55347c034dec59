//! One device's place: where the device is right now, and its state on the way.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmferry_datapath::ByteLen;
use vmferry_vfio::{
    DeviceLog, Held, Iommu, Loaded, MigratableDevice, Migration, Passthrough, Refused, Regions, StateSink,
    StateStream, Teller, VfioError,
};

use crate::{DeviceFacts, DeviceMigration, DmaTracking, GuestError};

pub(super) struct Seat {
    regions: Regions,
    log: DeviceLog,
    facts: Mutex<DeviceFacts>,
    place: Mutex<Place>,
    stream: Mutex<Option<StateStream>>,
}

/// Where the device is.
enum Place {
    /// Here, working for no guest yet.
    Free(Passthrough),
    /// Here, and taking a state.
    Taking(StateSink<Passthrough>),
    /// Here, standing still with a state.
    Loaded(Loaded<Passthrough>),
    /// With those that work for the guest.
    AtWork,
}

impl Seat {
    pub(super) fn open(name: &str, path: &Path, iommu: &Iommu) -> Result<Seat, GuestError> {
        let device = Passthrough::open(name, path, iommu)?;
        let migration = match device.migration() {
            Migration::V2(features) if features.pre_copy => DeviceMigration::PreCopy { p2p: features.p2p },
            Migration::V2(features) => DeviceMigration::StopCopy { p2p: features.p2p },
            Migration::NotMigratable(why) => DeviceMigration::NotMigratable(why.clone()),
        };
        let facts = DeviceFacts {
            name: name.to_owned(),
            model: device.model().to_owned(),
            what: device.what(),
            migration,
            dma: DmaTracking::None,
            pinned: ByteLen(0),
        };
        Ok(Seat {
            regions: device.regions(),
            log: device.log(),
            facts: Mutex::new(facts),
            place: Mutex::new(Place::Free(device)),
            stream: Mutex::default(),
        })
    }

    pub(super) fn name(&self) -> String {
        self.facts().name
    }

    pub(super) fn facts(&self) -> DeviceFacts {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Who tells what it writes, and what it pins.
    pub(super) fn learn(&self, teller: Teller, pinned: u64) {
        let mut facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        facts.dma = match teller {
            Teller::Device => DmaTracking::DeviceLog,
            Teller::Iommu => DmaTracking::IommuLog,
            Teller::Nobody => DmaTracking::None,
        };
        facts.pinned = ByteLen(pinned);
    }

    pub(super) fn can_move(&self) -> bool {
        self.facts().has_stream()
    }

    pub(super) fn regions(&self) -> &Regions {
        &self.regions
    }

    pub(super) fn log(&self) -> DeviceLog {
        self.log.clone()
    }

    pub(super) fn stream(&self) -> MutexGuard<'_, Option<StateStream>> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It works for the guest from now on.
    pub(super) fn take_up(&self) -> Result<Held, VfioError> {
        let mut place = self.place();
        let device = match std::mem::replace(&mut *place, Place::AtWork) {
            Place::Free(device) => device,
            Place::Loaded(loaded) => loaded.run().map_err(|refused| put_back(&mut place, refused))?,
            Place::Taking(sink) => {
                let why = self.misused("its state did not come whole");
                return Err(put_back(&mut place, sink.abandon(why)));
            }
            Place::AtWork => return Err(self.misused("it works for the guest already")),
        };
        Held::new(Box::new(device))
    }

    /// It will be written.
    pub(super) fn expect(&self) -> Result<(), VfioError> {
        self.discard();
        let mut place = self.place();
        match std::mem::replace(&mut *place, Place::AtWork) {
            Place::Free(device) => {
                let sink = StateSink::open(device).map_err(|refused| put_back(&mut place, refused))?;
                *place = Place::Taking(sink);
                Ok(())
            }
            other @ (Place::Taking(_) | Place::Loaded(_) | Place::AtWork) => {
                *place = other;
                Err(self.misused("it works for a guest"))
            }
        }
    }

    pub(super) fn write(&self, bytes: &[u8]) -> Result<(), VfioError> {
        let mut place = self.place();
        let refused = match &mut *place {
            Place::Taking(sink) => match sink.write_all(bytes) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
            Place::Free(_) | Place::Loaded(_) | Place::AtWork => {
                return Err(self.misused("no state is expected"));
            }
        };
        // A driver may check a piece when it is written and never again: what refused once takes nothing more.
        match std::mem::replace(&mut *place, Place::AtWork) {
            Place::Taking(sink) => Err(put_back(&mut place, sink.abandon(refused))),
            other @ (Place::Free(_) | Place::Loaded(_) | Place::AtWork) => {
                *place = other;
                Err(refused)
            }
        }
    }

    pub(super) fn finish(&self) -> Result<(), VfioError> {
        let mut place = self.place();
        match std::mem::replace(&mut *place, Place::AtWork) {
            Place::Taking(sink) => {
                *place = Place::Loaded(sink.finish().map_err(|refused| put_back(&mut place, refused))?);
                Ok(())
            }
            other @ (Place::Free(_) | Place::Loaded(_) | Place::AtWork) => {
                *place = other;
                Err(self.misused("no state is expected"))
            }
        }
    }

    /// What came is forgotten, and the device is free.
    pub(super) fn discard(&self) {
        let mut place = self.place();
        let why = self.misused("the move ended");
        match std::mem::replace(&mut *place, Place::AtWork) {
            Place::Taking(sink) => drop(put_back(&mut place, sink.abandon(why))),
            Place::Loaded(loaded) => drop(put_back(&mut place, loaded.abandon(why))),
            other @ (Place::Free(_) | Place::AtWork) => *place = other,
        }
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn misused(&self, why: &str) -> VfioError {
        VfioError::UserMistake(format!("device `{}`: {why}", self.name()))
    }
}

/// A device that did not take its state is free again.
fn put_back(place: &mut Place, refused: Refused<Passthrough>) -> VfioError {
    *place = Place::Free(refused.device);
    refused.error
}
