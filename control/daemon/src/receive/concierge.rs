//! Takes what comes through the door and brings it where it belongs while a move goes on.
//!
//! ```text
//!   door ─► control connection ─► first message: Offer, and nobody is here ─► the newest line
//!        │                        first message: Ask of our attempt, same certificate ─► the newest line
//!        │                        anything else ─► refused as busy
//!        └► lane of our attempt ─► lanes
//! ```
//!
//! What must never happen: a stranger who takes the line away from the source of the move.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};
use vmferry_session::{AbortReason, AttemptId, LANES_MAX, Message, TargetEvent};

use crate::channel::{ChannelEvent, ControlChannel};
use crate::door::{Arrival, Door, LaneHello};
use crate::failure::Failure;
use crate::lanes::LaneWire;

/// The line to the source: its newest control connection, and the attempt that it belongs to.
#[derive(Clone)]
pub(super) struct Line(Arc<Mutex<Held>>, Arc<AtomicU32>);

#[derive(Default)]
struct Held {
    channel: Option<ControlChannel>,
    identity: Option<Vec<u8>>,
    attempt: Option<AttemptId>,
}

/// The lanes that have arrived.
pub(super) type LaneArrivals = Receiver<(LaneHello, LaneWire)>;

impl Line {
    fn new() -> Self {
        Self(Arc::default(), Arc::default())
    }

    /// Writes to the newest connection.
    pub(super) fn send(&self, message: &Message) -> Result<(), Failure> {
        match self.channel() {
            Some(channel) => channel.send(message),
            None => Err(Failure::Unavailable("no control connection is open".into())),
        }
    }

    /// The newest connection.
    pub(super) fn channel(&self) -> Option<ControlChannel> {
        self.lock().channel.clone()
    }

    /// The offer was refused: the next source may come.
    pub(super) fn vacate(&self) {
        let mut held = self.lock();
        *held = Held::default();
        self.1.fetch_add(1, Ordering::SeqCst);
    }

    /// Gives the line to `channel` if its first message entitles it; the number that names it is then the newest.
    fn claim(&self, channel: &ControlChannel, first: &Message) -> Result<u32, AbortReason> {
        let mut held = self.lock();
        let identity = channel.peer_identity();
        let entitled = match (first, held.attempt) {
            (Message::Offer(offer), None) => {
                held.attempt = Some(offer.attempt);
                held.identity.clone_from(&identity);
                true
            }
            (Message::Ask { .. }, None) => true,
            (Message::Ask { attempt }, Some(ours)) => *attempt == ours && identity == held.identity,
            _ => false,
        };
        if !entitled {
            return Err(AbortReason::busy());
        }
        held.channel = Some(channel.clone());
        Ok(self.1.fetch_add(1, Ordering::SeqCst) + 1)
    }

    fn is_newest(&self, number: u32) -> bool {
        self.1.load(Ordering::SeqCst) == number
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the concierge; what the source says goes to `post`.
pub(super) fn start(door: &Door, post: &Sender<TargetEvent>) -> Result<(Line, LaneArrivals), Failure> {
    let line = Line::new();
    let (lanes, arrived) = bounded(usize::from(LANES_MAX));
    let arrivals = door.arrivals().clone();
    let (keeper, post) = (line.clone(), post.clone());
    let work = move || {
        for arrival in arrivals {
            match arrival {
                // A full queue means more lanes than any agreement: dropped like a stranger's.
                Arrival::Lane(hello, stream) => drop(lanes.try_send((hello, stream))),
                Arrival::Control(channel) => admit(&keeper, &channel, &post),
            }
        }
    };
    std::thread::Builder::new()
        .name("concierge".into())
        .spawn(work)
        .map_err(|e| Failure::Bug(format!("no thread for the door: {e}")))?;
    Ok((line, arrived))
}

/// Reads `channel`; its first message decides whether it may speak at all.
fn admit(line: &Line, channel: &ControlChannel, post: &Sender<TargetEvent>) {
    let (line, post, own) = (line.clone(), post.clone(), channel.clone());
    let mut number = None;
    let sink = move |event: ChannelEvent| {
        let number = match (number, &event) {
            (Some(number), _) => number,
            (None, ChannelEvent::Message(first)) => match line.claim(&own, first) {
                Ok(claimed) => *number.insert(claimed),
                Err(reason) => {
                    tracing::warn!("refused a control connection: {reason}");
                    let _ = own.send(&Message::Refuse(reason));
                    own.close();
                    return false;
                }
            },
            (None, ChannelEvent::Lost(_) | ChannelEvent::Misbehaved(_)) => return false,
        };
        if !line.is_newest(number) {
            return false;
        }
        let event = match event {
            ChannelEvent::Message(message) => TargetEvent::Message(message),
            ChannelEvent::Lost(why) => TargetEvent::ControlLost(why),
            ChannelEvent::Misbehaved(why) => TargetEvent::PeerBroke(why),
        };
        post.send(event).is_ok()
    };
    if let Err(error) = channel.start_reader(sink) {
        tracing::warn!("no thread to read a control connection: {error}");
    }
}
