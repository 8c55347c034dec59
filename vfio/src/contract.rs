//! What every [`MigratableDevice`] keeps, as checks that run on a fake and on a real device alike.
//!
//! A check takes a device that works and leaves one that works, or says what is broken.

use crate::device::MigratableDevice;
use crate::state::{Features, MigState};
use crate::stream::{Chunk, StateSink, StateStream};
use crate::{Left, Migration, VfioError};

/// What a device did that its contract forbids.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Broken(String);

impl From<VfioError> for Broken {
    fn from(error: VfioError) -> Broken {
        Broken(error.to_string())
    }
}

fn expect(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), Broken> {
    if holds { Ok(()) } else { Err(Broken(otherwise())) }
}

/// What a migratable device can do.
pub fn features<D: MigratableDevice + ?Sized>(device: &D) -> Result<Features, Broken> {
    match device.migration() {
        Migration::V2(features) => Ok(*features),
        Migration::NotMigratable(why) => Err(Broken(why.clone())),
    }
}

/// Its state after a stop.
pub fn save(device: &mut dyn MigratableDevice) -> Result<Vec<u8>, Broken> {
    let file = device.set_state(MigState::StopCopy)?.ok_or(Broken("STOP_COPY brought no file".into()))?;
    Ok(StateStream::stopped(device.name(), file).read_to_end()?)
}

/// Every state and every arc: a legal one arrives and brings a file when the table says so, an illegal one is refused and
/// moves nothing. `state` is a state of this device, for the arcs out of RESUMING. Returns how many arcs were tried.
pub fn every_arc(device: &mut dyn MigratableDevice, state: &[u8]) -> Result<usize, Broken> {
    let features = features(device)?;
    let known =
        || MigState::ALL.into_iter().filter(|state| *state != MigState::Error && features.know(*state));
    let mut tried = 0;
    for from in known() {
        for to in MigState::ALL {
            one_arc(device, features, (from, to), state)?;
            tried += 1;
        }
    }
    device.reset()?;
    Ok(tried)
}

fn one_arc(
    device: &mut dyn MigratableDevice,
    features: Features,
    (from, to): (MigState, MigState),
    state: &[u8],
) -> Result<(), Broken> {
    device.reset()?;
    expect(device.state()? == MigState::Running, || "a reset leads to RUNNING".into())?;
    // The file lives until the arc was tried: a driver may refuse a device whose file was closed.
    let mut file = device.set_state(from)?;
    if let (MigState::Resuming, Some(file)) = (from, &mut file) {
        file.write_all(state).map_err(|error| Broken(format!("the device's own state: {error}")))?;
    }
    match (features.path(from, to), device.set_state(to)) {
        (Some(_), Ok(file)) => {
            let (at, brought) = (device.state()?, file.is_some());
            expect(at == to, || format!("{from} » {to} arrived at {at}"))?;
            let should = features.brings_file(from, to);
            expect(brought == should, || format!("{from} » {to}: a file {brought}, expected {should}"))
        }
        (None, Err(VfioError::StateRefused { left, .. })) => {
            expect(left == Left::In(from), || {
                format!("{from} » {to} was refused and left the device {left}")
            })?;
            let at = device.state()?;
            expect(at == from, || format!("{from} » {to} was refused and moved the device to {at}"))
        }
        (None, Ok(_)) => Err(Broken(format!("{from} » {to} is illegal and was done"))),
        (_, Err(error)) => Err(Broken(format!("{from} » {to}: {error}"))),
    }
}

/// What one device holds is what the other one holds after a move; with pre-copy when both can.
pub fn moves<D: MigratableDevice>(
    source: &mut dyn MigratableDevice,
    target: D,
    pre_copy: bool,
) -> Result<D, Broken> {
    let mut state = Vec::new();
    let mut buffer = [0; 48];
    if pre_copy {
        let file = source.set_state(MigState::PreCopy)?.ok_or(Broken("PRE_COPY brought no file".into()))?;
        let (mut stream, mark) = StateStream::pre_copying(source.name(), file);
        let before = stream.precopy_bytes()?;
        while let Chunk::Bytes(count) = stream.read(&mut buffer)? {
            state.extend_from_slice(&buffer[..count]);
        }
        expect(before == state.len() as u64, || format!("{before} bytes announced, {} came", state.len()))?;
        expect(stream.precopy_bytes()? == 0, || "read to the pause, and more announced".into())?;
        if features(source)?.p2p {
            let file = source.set_state(MigState::PreCopyP2p)?;
            expect(file.is_none(), || "PRE_COPY_P2P brought a second file".into())?;
        }
        let file = source.set_state(MigState::StopCopy)?;
        expect(file.is_none(), || "the stop of a device that pre-copies brought a second file".into())?;
        mark.set();
        state.extend(stream.read_to_end()?);
    } else {
        state = save(source)?;
    }
    expect(source.stop_copy_bytes()? > 0, || "a device's state has no size".into())?;
    let mut sink = StateSink::open(target).map_err(|refused| refused.error)?;
    // In pieces, as they come from a link.
    state.chunks(7).try_for_each(|piece| sink.write_all(piece))?;
    let target = sink.finish().map_err(|refused| refused.error)?.run().map_err(|refused| refused.error)?;
    expect(target.state()? == MigState::Running, || "the target does not run".into())?;
    source.set_state(MigState::Running)?;
    expect(source.state()? == MigState::Running, || "the source does not run again".into())?;
    Ok(target)
}

/// Rubbish, a state that is cut off, and none at all are refused; the device is reset, works, and can be asked again.
pub fn refuses_rubbish<D: MigratableDevice>(mut device: D, state: &[u8]) -> Result<D, Broken> {
    let rubbish: Vec<u8> = state.iter().map(|byte| byte ^ 0x5a).collect();
    let bad: [(&str, &[u8]); 3] =
        [("rubbish", &rubbish), ("half", &state[..state.len() / 2]), ("nothing", &[])];
    for (name, bytes) in bad {
        let mut sink = StateSink::open(device).map_err(|refused| refused.error)?;
        let refused = match sink.write_all(bytes) {
            Ok(()) => sink.finish().err().ok_or(Broken(format!("{name} was loaded")))?,
            Err(error) => sink.abandon(error),
        };
        let is_told = matches!(refused.error, VfioError::DataRefused { .. });
        expect(is_told, || format!("{name}: {}", refused.error))?;
        device = refused.device;
        expect(device.state()? == MigState::Running, || format!("after {name} the device does not run"))?;
    }
    Ok(device)
}
