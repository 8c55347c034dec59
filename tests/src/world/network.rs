//! The faulty link: control connections that carry bytes, and the lanes.
//!
//! A connection keeps the order of what it carries; two connections know nothing of each other's order. A cut loses
//! what was on its way. A deaf end hears of the cut first, while what it sent still arrives at the other end.

use std::collections::VecDeque;
use std::time::Duration;

use vmferry_session::{LaneTally, Message, encode};

use super::target_host::TargetJob;
use super::{Calendar, Common, Dice, Due};

/// One end of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The sending host.
    Source,
    /// The receiving host.
    Target,
}

/// How a connection breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// In both directions, and what was on its way is lost.
    Both,
    /// The source hears of it at once and nothing more; what it sent still arrives, the target hears of it late.
    SourceDeaf,
    /// The other way round.
    TargetDeaf,
}

/// Names a connection.
pub(super) type ConnectionId = usize;

/// What a connection brings to one end.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The connection.
    pub connection: ConnectionId,
    /// To whom.
    pub to: End,
    /// What.
    pub what: Brought,
}

/// What a connection brings.
#[derive(Clone, Debug)]
pub enum Brought {
    /// It was opened by the other end.
    Opened,
    /// Bytes.
    Bytes(Vec<u8>),
    /// Its end.
    Closed,
}

#[derive(Debug, Default)]
struct Connection {
    /// Until when each end's deliveries are taken, so that order is kept.
    busy_until: [Duration; 2],
    /// Whether bytes still get to each end.
    reaches: [bool; 2],
}

/// Every connection there was, and the lanes.
#[derive(Debug, Default)]
pub struct Network {
    connections: Vec<Connection>,
    /// Whether somebody listens at the target's address.
    pub target_listens: bool,
    /// The lanes.
    pub lanes: Lanes,
}

const fn side(end: End) -> usize {
    match end {
        End::Source => 0,
        End::Target => 1,
    }
}

impl End {
    /// The one across.
    pub const fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

impl Network {
    /// A new control connection, opened by the source.
    pub fn connect(common: &mut Common) -> ConnectionId {
        let connection = common.network.connections.len();
        let reaches = [true, true];
        common.network.connections.push(Connection { reaches, ..Connection::default() });
        Self::bring(common, connection, End::Target, Brought::Opened);
        connection
    }

    /// Sends a message through the real codec. False: the sender knows that the connection is gone.
    pub fn send(common: &mut Common, connection: ConnectionId, from: End, message: &Message) -> bool {
        let to = from.other();
        let alive = common.network.connections[connection].reaches;
        if !alive[side(from)] && !alive[side(to)] {
            return false;
        }
        let Ok(bytes) = encode(message) else { return false };
        if common.dice.per_mille(common.story.losses_per_mille) {
            return true;
        }
        if common.dice.per_mille(common.story.repeats_per_mille) {
            Self::bring(common, connection, to, Brought::Bytes(bytes.clone()));
        }
        Self::bring(common, connection, to, Brought::Bytes(bytes));
        true
    }

    /// One end closes it, or dies: the other end reads what was sent, and then the end.
    pub fn close(common: &mut Common, connection: ConnectionId, by: End) {
        common.network.connections[connection].reaches[side(by)] = false;
        Self::bring(common, connection, by.other(), Brought::Closed);
    }

    /// Whether a delivery still gets through when its time has come.
    pub fn gets_through(&self, delivery: &Delivery) -> bool {
        matches!(delivery.what, Brought::Closed)
            || self.connections[delivery.connection].reaches[side(delivery.to)]
    }

    /// Breaks the newest connection.
    pub fn cut(&mut self, cut: Cut, calendar: &mut Calendar, dice: &mut Dice) {
        let Some(connection) = self.connections.len().checked_sub(1) else { return };
        let late = dice.time(200_000, 6_000_000);
        let soon = dice.time(0, 20_000);
        let (deaf, notice): (&[End], [Duration; 2]) = match cut {
            Cut::Both => (&[End::Source, End::Target], [soon, dice.time(0, 6_000_000)]),
            Cut::SourceDeaf => (&[End::Source], [soon, late]),
            Cut::TargetDeaf => (&[End::Target], [late, soon]),
        };
        for end in deaf {
            self.connections[connection].reaches[side(*end)] = false;
        }
        for to in [End::Source, End::Target] {
            let delivery = Delivery { connection, to, what: Brought::Closed };
            calendar.schedule(notice[side(to)], Due::Net(delivery));
        }
    }

    /// The lanes break; the target's receiver hears of it.
    pub fn cut_lanes(common: &mut Common) {
        common.network.lanes.cut();
        let notice = common.dice.time(0, 5_000);
        common.calendar.schedule(notice, Due::Target(TargetJob::lanes_broke()));
    }

    fn bring(common: &mut Common, connection: ConnectionId, to: End, what: Brought) {
        let stalls = common.dice.per_mille(common.story.stalls_per_mille);
        let delay = if stalls { common.dice.time(500_000, 40_000_000) } else { common.dice.time(50, 3_000) };
        let busy = &mut common.network.connections[connection].busy_until[side(to)];
        let at = (common.calendar.now() + delay).max(*busy);
        *busy = at;
        common.calendar.schedule_at(at, Due::Net(Delivery { connection, to, what }));
    }
}

/// What lanes carry, one behind the other.
#[derive(Clone, Debug)]
pub enum Record {
    /// A page.
    Page(usize, u64),
    /// The device state.
    State(u64),
    /// The end.
    End,
}

/// The lanes, as one queue: sent is not arrived.
#[derive(Debug, Default)]
pub struct Lanes {
    line: Line,
    on_the_way: VecDeque<Record>,
    sent: u64,
    arrived: u64,
    ended: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Line {
    #[default]
    Closed,
    Open,
    Cut,
}

impl Lanes {
    /// The source connects them.
    pub fn open(&mut self) -> bool {
        if self.line == Line::Closed {
            self.line = Line::Open;
        }
        self.line == Line::Open
    }

    /// They carry.
    pub fn stand(&self) -> bool {
        self.line == Line::Open
    }

    /// They broke, and not all had arrived.
    pub fn broke(&self) -> bool {
        self.line == Line::Cut && !self.ended
    }

    /// They broke, or an end closed them.
    pub fn cut(&mut self) {
        self.line = Line::Cut;
        self.on_the_way.clear();
    }

    /// False: they are broken, and the source knows.
    pub fn send(&mut self, record: Record) -> bool {
        if self.line != Line::Open {
            return false;
        }
        self.sent += 1;
        self.on_the_way.push_back(record);
        true
    }

    /// What arrives by now.
    pub fn receive(&mut self) -> Option<Record> {
        let record = self.on_the_way.pop_front()?;
        self.arrived += 1;
        self.ended |= matches!(record, Record::End);
        Some(record)
    }

    /// By the source's count.
    pub fn tally(&self) -> LaneTally {
        LaneTally { lane: 0, records: self.sent, bytes: self.sent * 4096 }
    }

    /// Whether everything announced is there.
    pub fn complete(&self, tallies: &[LaneTally]) -> bool {
        self.ended && tallies.iter().map(|tally| tally.records).sum::<u64>() == self.arrived
    }
}
