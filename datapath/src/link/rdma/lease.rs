//! Which regions of the target's guest a lane may write, and when one may be closed again.
//!
//! ```text
//!   lane of the source                        target, for all lanes
//!     Want(7) ──────────────────────────────►   open 7                       held by 1
//!     ◄──────────────────────────── Region(7)
//!     WRITE … WRITE, until all have completed
//!     GiveBack(7), Want(9) ─────────────────►   7 is held by none: idle      closed when 9 needs its room
//! ```
//!
//! Each lane may hold a share of what the target may keep open, so whenever a lane wants a region, either there is room or
//! one is idle: nobody is ever asked to give something back, and no lane waits for another. A lane gives back the region that
//! it used longest ago, and only when each of its writes there has completed, which the target's card confirms; the target
//! closes only what no lane holds. What must never happen: a region closed with a write to it on its way.

use std::collections::{HashMap, HashSet};

use super::wire::Window;

/// What one lane of the source holds.
#[derive(Default)]
pub(super) struct Leases {
    /// At most so many, once the target told.
    allowed: usize,
    held: HashMap<u32, Lease>,
    /// Counts uses: the order in which regions were used.
    uses: u64,
}

struct Lease {
    /// Where it is, once the target told.
    window: Option<Window>,
    /// Writes to it that have not completed.
    on_their_way: usize,
    last_use: u64,
}

/// What a lane that wants to write to a region does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It writes there.
    Write(Window),
    /// It asks for the region, and gives another one back before.
    Ask {
        /// What it gives back.
        instead_of: Option<u32>,
    },
    /// It waits: for the answer, or until writes have completed.
    Wait,
}

impl Leases {
    /// The target lets this lane hold so many; `false` when it may hold none, or had been told already.
    pub(super) fn allow(&mut self, regions: u32) -> bool {
        let first = self.allowed == 0;
        self.allowed = usize::try_from(regions).unwrap_or(usize::MAX);
        first && regions > 0
    }

    /// The lane wants to write to a region. One that it must ask for counts as asked for.
    pub(super) fn want(&mut self, region: u32) -> Turn {
        self.uses += 1;
        if let Some(lease) = self.held.get_mut(&region) {
            lease.last_use = self.uses;
            return lease.window.map_or(Turn::Wait, Turn::Write);
        }
        let instead_of = if self.held.len() < self.allowed { None } else { self.longest_unused() };
        if self.held.len() >= self.allowed && instead_of.is_none() {
            return Turn::Wait;
        }
        instead_of.map(|back| self.held.remove(&back));
        self.held.insert(region, Lease { window: None, on_their_way: 0, last_use: self.uses });
        Turn::Ask { instead_of }
    }

    fn longest_unused(&self) -> Option<u32> {
        let idle = self.held.iter().filter(|(_, lease)| lease.window.is_some() && lease.on_their_way == 0);
        idle.min_by_key(|(_, lease)| lease.last_use).map(|(region, _)| *region)
    }

    /// The target says where a region is; `false` when that was not asked for.
    pub(super) fn told(&mut self, region: u32, window: Window) -> bool {
        match self.held.get_mut(&region) {
            Some(Lease { window: place @ None, .. }) => {
                *place = Some(window);
                true
            }
            Some(_) | None => false,
        }
    }

    /// A write to a region was posted.
    pub(super) fn posted(&mut self, region: u32) {
        if let Some(lease) = self.held.get_mut(&region) {
            lease.on_their_way += 1;
        }
    }

    /// A write to a region has completed.
    pub(super) fn completed(&mut self, region: u32) {
        if let Some(lease) = self.held.get_mut(&region) {
            lease.on_their_way = lease.on_their_way.saturating_sub(1);
        }
    }
}

/// What the target lets one lane of its peer hold, and what that lane holds.
pub(super) struct Share {
    allowed: usize,
    held: HashSet<u32>,
}

impl Share {
    pub(super) fn of(allowed: usize) -> Share {
        Share { allowed, held: HashSet::new() }
    }

    /// How many it may hold, as it is told.
    pub(super) fn allowed(&self) -> u32 {
        u32::try_from(self.allowed).unwrap_or(u32::MAX)
    }

    /// The lane wants one more; `false` when it may not.
    pub(super) fn take(&mut self, region: u32) -> bool {
        self.held.len() < self.allowed && self.held.insert(region)
    }

    /// The lane gives one back; `false` when it does not hold it.
    pub(super) fn give_back(&mut self, region: u32) -> bool {
        self.held.remove(&region)
    }
}

/// What the target keeps open, with the key of each region.
pub(super) struct Ledger<K> {
    room: usize,
    open: HashMap<u32, Open<K>>,
    /// Counts what was given back: the order in which regions became idle.
    returns: u64,
    closed: u64,
}

struct Open<K> {
    key: K,
    /// Lanes that hold it.
    holders: usize,
    idle_since: u64,
}

impl<K> Ledger<K> {
    /// Room for so many.
    pub(super) fn new(room: usize) -> Ledger<K> {
        Ledger { room, open: HashMap::new(), returns: 0, closed: 0 }
    }

    /// One more lane holds a region, which is opened by `open` where it is not. `Ok(None)` when there is no room, and
    /// every region is held.
    pub(super) fn hold<E>(
        &mut self,
        region: u32,
        open: impl FnOnce() -> Result<K, E>,
    ) -> Result<Option<&K>, E> {
        if !self.open.contains_key(&region) {
            if self.open.len() >= self.room && !self.close_longest_idle() {
                return Ok(None);
            }
            self.open.insert(region, Open { key: open()?, holders: 0, idle_since: self.returns });
        }
        Ok(self.open.get_mut(&region).map(|open| {
            open.holders += 1;
            &open.key
        }))
    }

    /// A lane does not hold a region any more.
    pub(super) fn give_back(&mut self, region: u32) {
        self.returns += 1;
        if let Some(open) = self.open.get_mut(&region) {
            open.holders = open.holders.saturating_sub(1);
            open.idle_since = self.returns;
        }
    }

    /// Closes the region that was idle for longest; whether there was one.
    fn close_longest_idle(&mut self) -> bool {
        let idle = self.open.iter().filter(|(_, open)| open.holders == 0);
        let Some(region) = idle.min_by_key(|(_, open)| open.idle_since).map(|(region, _)| *region) else {
            return false;
        };
        self.open.remove(&region);
        self.closed += 1;
        true
    }

    /// Regions that are open.
    pub(super) fn opened(&self) -> usize {
        self.open.len()
    }

    /// Regions that were closed to make room.
    pub(super) fn closed(&self) -> u64 {
        self.closed
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    const WINDOW: Window = Window { address: 0x1000, key: 5, len: 4096 };

    #[test]
    fn a_region_is_asked_for_once_and_believed_once() {
        let mut leases = Leases::default();
        assert_eq!(leases.want(2), Turn::Wait, "nothing is allowed yet");
        assert!(!leases.allow(0), "a target that lets nobody write did not agree to direct mode");
        assert!(leases.allow(2) && !leases.allow(2));
        assert_eq!(leases.want(2), Turn::Ask { instead_of: None });
        assert_eq!(leases.want(2), Turn::Wait);
        assert!(!leases.told(1, WINDOW), "nobody asked");
        assert!(leases.told(2, WINDOW));
        assert!(!leases.told(2, WINDOW), "a region does not move");
        assert_eq!(leases.want(2), Turn::Write(WINDOW));
    }

    #[test]
    fn the_longest_unused_region_goes_back_once_its_writes_have_completed() {
        let mut leases = Leases::default();
        leases.allow(2);
        for region in [1, 2] {
            leases.want(region);
            leases.told(region, WINDOW);
            leases.posted(region);
        }
        assert_eq!(leases.want(3), Turn::Wait, "both are written to");
        leases.completed(2);
        assert_eq!(leases.want(1), Turn::Write(WINDOW));
        assert_eq!(leases.want(3), Turn::Ask { instead_of: Some(2) });
        leases.completed(1);
        assert_eq!(leases.want(2), Turn::Ask { instead_of: Some(1) });
        assert_eq!(leases.want(1), Turn::Wait, "3 and 2 were asked for and not told");
    }

    #[test]
    fn a_lane_holds_no_more_than_its_share() {
        let mut share = Share::of(1);
        assert!(share.take(4) && !share.take(4) && !share.take(5));
        assert!(!share.give_back(5) && share.give_back(4) && share.take(5));
    }

    #[test]
    fn what_is_held_is_never_closed() {
        let mut ledger = Ledger::new(1);
        let opened = |key| move || Ok::<_, Infallible>(key);
        assert_eq!(ledger.hold(1, opened(10)), Ok(Some(&10)));
        assert_eq!(ledger.hold(1, opened(11)), Ok(Some(&10)), "opened once, for all lanes");
        ledger.give_back(1);
        assert_eq!(ledger.hold(2, opened(20)), Ok(None), "the other lane still holds it");
        ledger.give_back(1);
        assert_eq!(ledger.hold(2, opened(20)), Ok(Some(&20)));
        assert_eq!((ledger.opened(), ledger.closed()), (1, 1));
    }

    /// A lane with both of its ends, and what is on its way between them.
    struct Lane {
        leases: Leases,
        share: Share,
        there: VecDeque<Word>,
        back: VecDeque<u32>,
        writes: VecDeque<u32>,
        wanted: VecDeque<u32>,
    }

    enum Word {
        Want(u32),
        GiveBack(u32),
    }

    impl Lane {
        fn new(allowed: usize, wanted: &[u32]) -> Lane {
            let (mut leases, share) = (Leases::default(), Share::of(allowed));
            leases.allow(share.allowed());
            let wanted = wanted.iter().copied().collect();
            Lane { leases, share, there: [].into(), back: [].into(), writes: [].into(), wanted }
        }

        /// One step of the lane or of the target, as the dice says; what is written must be open.
        fn step(&mut self, dice: u8, ledger: &mut Ledger<()>) {
            match dice % 4 {
                0 => self.write_next(ledger),
                1 => self.target_hears(ledger),
                2 => assert!(self.back.pop_front().is_none_or(|region| self.leases.told(region, WINDOW))),
                _ => self.complete_one(ledger),
            }
        }

        fn complete_one(&mut self, ledger: &Ledger<()>) {
            let Some(region) = self.writes.pop_front() else { return };
            assert!(ledger.open.contains_key(&region), "a write met a closed region");
            self.leases.completed(region);
        }

        fn write_next(&mut self, ledger: &Ledger<()>) {
            let Some(&region) = self.wanted.front() else { return };
            match self.leases.want(region) {
                Turn::Wait => {}
                Turn::Ask { instead_of } => {
                    self.there.extend(instead_of.map(Word::GiveBack));
                    self.there.push_back(Word::Want(region));
                }
                Turn::Write(_) => {
                    assert!(ledger.open.contains_key(&region), "{region} is closed and believed open");
                    self.leases.posted(region);
                    self.writes.push_back(region);
                    self.wanted.pop_front();
                }
            }
        }

        fn target_hears(&mut self, ledger: &mut Ledger<()>) {
            match self.there.pop_front() {
                Some(Word::GiveBack(region)) => {
                    assert!(self.share.give_back(region));
                    ledger.give_back(region);
                }
                Some(Word::Want(region)) => {
                    assert!(self.share.take(region), "an honest lane was refused");
                    let held = ledger.hold(region, || Ok::<_, Infallible>(())).unwrap();
                    assert!(held.is_some(), "no room for an honest lane");
                    self.back.push_back(region);
                }
                None => {}
            }
        }
    }

    proptest! {
        #[test]
        fn lanes_that_take_turns_in_any_order_never_write_what_is_closed_and_all_get_through(
            wanted in prop::collection::vec(prop::collection::vec(0..12_u32, 1..40), 1..5),
            allowed in 1..4_usize,
            dice in prop::collection::vec(any::<(u8, u8)>(), 0..400),
        ) {
            let mut ledger = Ledger::new(allowed * wanted.len());
            let mut lanes: Vec<Lane> = wanted.iter().map(|wanted| Lane::new(allowed, wanted)).collect();
            let count = lanes.len();
            let luck = dice.iter().map(|(lane, step)| (usize::from(*lane) % count, *step));
            let rest = (0..).flat_map(|_| (0..count).flat_map(|lane| (0..4).map(move |step| (lane, step))));
            for (lane, step) in luck.chain(rest.take(count * 4 * 400)) {
                lanes[lane].step(step, &mut ledger);
                prop_assert!(ledger.opened() <= allowed * count);
            }
            prop_assert!(lanes.iter().all(|lane| lane.wanted.is_empty() && lane.writes.is_empty()), "a lane starved");
        }
    }
}
