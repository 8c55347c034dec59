//! What every lane has, whichever way it carries: a thread, a number, a link, keys, and a common end.
//!
//! The lanes of a transfer fail together: the first failure is kept, every link is severed, and every thread ends
//! within a tick. What must never happen: one lane writing on after another one met a forged record.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};
use rustix::io::Errno;

use crate::error::{DataError, LinkFault};
use crate::limits::{LANES_MAX, TICK};
use crate::link::{Breaker, Link, LinkPlan};
use crate::meter::LaneGauge;
use crate::seal::{Cipher, LaneKey, Opener, Sealer};

/// The keys of one lane, one for each direction.
pub struct LaneKeys {
    /// Seals what this host sends.
    pub outbound: LaneKey,
    /// Opens what the other host sends.
    pub inbound: LaneKey,
}

/// This host's end of one lane.
pub struct LaneEnd {
    /// The transport.
    pub link: Box<dyn Link>,
    /// The keys; none when the transfer is plain.
    pub keys: Option<LaneKeys>,
    /// The CPU to pin the lane's thread to.
    pub cpu: Option<usize>,
}

/// How long the reason of an end may be awaited.
const REASON_WAIT: Duration = Duration::from_secs(1);

/// What the lanes of one transfer share: the way they end.
#[derive(Default)]
pub(crate) struct Fate {
    stopped: AtomicBool,
    inner: Mutex<FateInner>,
    changed: Condvar,
}

#[derive(Default)]
struct FateInner {
    failure: Option<DataError>,
    breakers: Vec<Box<dyn Breaker>>,
}

impl Fate {
    fn lock(&self) -> MutexGuard<'_, FateInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    pub(crate) fn failure(&self) -> Option<DataError> {
        self.lock().failure.clone()
    }

    /// The kept failure, as an error to return. A lane drops its queues a moment before it tells why, so this waits
    /// for the reason; a lane that ended without one is a bug.
    pub(crate) fn cause(&self) -> DataError {
        let waited =
            self.changed.wait_timeout_while(self.lock(), REASON_WAIT, |inner| inner.failure.is_none());
        let inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        inner.failure.clone().unwrap_or(DataError::Bug("a lane ended without a reason"))
    }

    /// Ends every lane. The first failure is kept.
    pub(crate) fn fail(&self, failure: DataError) {
        let mut inner = self.lock();
        self.stopped.store(true, Ordering::Release);
        inner.failure.get_or_insert(failure);
        inner.breakers.iter().for_each(|breaker| breaker.sever());
        drop(inner);
        self.changed.notify_all();
    }

    /// Ends every lane because this host wants it so.
    pub(crate) fn stop(&self) {
        self.fail(DataError::LinkLost { lane: 0, fault: LinkFault::Stopped });
    }

    fn adopt(&self, breaker: Box<dyn Breaker>) {
        self.lock().breakers.push(breaker);
    }

    /// Something that `wait_tick` waits for has happened.
    pub(crate) fn announce(&self) {
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Waits until something is announced, at most a tick.
    pub(crate) fn wait_tick(&self) {
        drop(self.changed.wait_timeout(self.lock(), TICK));
    }
}

/// A lane's place and its tools, ready on its own thread.
pub(crate) struct LaneKit {
    pub(crate) number: u16,
    /// How many lanes there are: a chunk belongs to the lane of its number modulo this.
    pub(crate) lanes: u64,
    pub(crate) link: Box<dyn Link>,
    pub(crate) sealer: Sealer,
    pub(crate) opener: Opener,
    pub(crate) gauge: Arc<LaneGauge>,
    pub(crate) fate: Arc<Fate>,
}

impl LaneKit {
    /// Lets the link move, waiting at most `wait`; the time counts as waited.
    pub(crate) fn progress(&mut self, wait: Duration) -> Result<bool, DataError> {
        let (link, number) = (&mut self.link, self.number);
        let moved = self.gauge.waiting(|| link.progress(wait)).map_err(|trouble| trouble.on_lane(number));
        if self.fate.is_stopped() { Err(self.fate.cause()) } else { moved }
    }
}

/// The threads of one transfer.
pub(crate) struct Crew {
    threads: Vec<JoinHandle<()>>,
    pub(crate) gauges: Vec<Arc<LaneGauge>>,
    pub(crate) fate: Arc<Fate>,
}

impl Crew {
    /// Starts a thread for each end. Returns when every lane has registered its buffers, or the first failure.
    /// `work` is made for each lane here, and runs there.
    pub(crate) fn muster<W>(
        ends: Vec<LaneEnd>,
        cipher: Cipher,
        plan: LinkPlan,
        mut work: impl FnMut(u16) -> W,
    ) -> Result<Crew, DataError>
    where
        W: FnOnce(LaneKit) -> Result<(), DataError> + Send + 'static,
    {
        if ends.is_empty() || ends.len() > LANES_MAX {
            return Err(DataError::Bug("a transfer needs one lane to LANES_MAX lanes"));
        }
        let lanes = ends.len() as u64;
        let mut crew = Crew { threads: Vec::new(), gauges: Vec::new(), fate: Arc::new(Fate::default()) };
        let (ready, readiness) = bounded(ends.len());
        for (number, end) in (0_u16..).zip(ends) {
            crew.fate.adopt(end.link.breaker().map_err(|trouble| trouble.on_lane(number))?);
            let gauge = Arc::new(LaneGauge::new(end.cpu));
            crew.gauges.push(Arc::clone(&gauge));
            let post = Post { number, lanes, gauge, fate: Arc::clone(&crew.fate) };
            let (ready, work) = (ready.clone(), work(number));
            let run = move || run_lane(end, cipher, plan, post, ready, work);
            let thread = Builder::new().name(format!("lane {number}")).spawn(run).map_err(|error| {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::AGAIN);
                DataError::HostRefused {
                    service: "start a thread",
                    fix: "raise the limit of processes (ulimit -u)",
                    errno,
                }
            })?;
            crew.threads.push(thread);
        }
        drop(ready);
        if readiness.iter().take(crew.threads.len()).count() == crew.threads.len() {
            Ok(crew)
        } else {
            Err(crew.fate.cause())
        }
    }

    /// Waits for every thread to end by itself.
    pub(crate) fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A lane that panicked has told the panic hook, and has failed the transfer.
            let _ = thread.join();
        }
    }

    /// Severs every link and waits for every thread.
    pub(crate) fn disband(&mut self) {
        self.fate.stop();
        self.join();
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.disband();
    }
}

/// A lane's thread, from its first breath to its last word.
fn run_lane<W>(end: LaneEnd, cipher: Cipher, plan: LinkPlan, post: Post, ready: Sender<()>, work: W)
where
    W: FnOnce(LaneKit) -> Result<(), DataError>,
{
    let fate = Arc::clone(&post.fate);
    let _last_word = LastWord(Arc::clone(&post.gauge), Arc::clone(&fate));
    let kit = equip(end, cipher, plan, post);
    let outcome = kit.and_then(move |kit| {
        // Whoever started the crew may have given up already.
        let _ = ready.send(());
        drop(ready);
        work(kit)
    });
    if let Err(failure) = outcome {
        fate.fail(failure);
    }
}

/// Spoken at the end of a lane's thread, also when it panics: nobody may wait for a lane that is gone.
struct LastWord(Arc<LaneGauge>, Arc<Fate>);

impl Drop for LastWord {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.1.fail(DataError::Bug("a lane panicked"));
        }
        self.0.end();
        self.1.announce();
    }
}

/// Where a lane stands.
struct Post {
    number: u16,
    lanes: u64,
    gauge: Arc<LaneGauge>,
    fate: Arc<Fate>,
}

/// Pins the thread, registers the buffers and expands the keys: all before the first record.
fn equip(end: LaneEnd, cipher: Cipher, plan: LinkPlan, post: Post) -> Result<LaneKit, DataError> {
    let LaneEnd { mut link, keys, cpu } = end;
    if let Some(id) = cpu
        && !core_affinity::set_for_current(core_affinity::CoreId { id })
    {
        let (service, fix) =
            ("pin a lane to its CPU", "name CPUs that this process may run on (taskset, cgroup cpuset)");
        return Err(DataError::HostRefused { service, fix, errno: Errno::INVAL });
    }
    link.prepare(plan).map_err(|trouble| trouble.on_lane(post.number))?;
    let (outbound, inbound) = keys.map_or((None, None), |keys| (Some(keys.outbound), Some(keys.inbound)));
    let (sealer, opener) = (Sealer::new(cipher, outbound)?, Opener::new(cipher, inbound)?);
    // Starts the lane's clock.
    post.gauge.now();
    let Post { number, lanes, gauge, fate } = post;
    Ok(LaneKit { number, lanes, link, sealer, opener, gauge, fate })
}
