//! The injection itself: a userfaultfd is made inside a process and taken out of it at once.
//!
//! It runs in a process of its own (see `helper`), because a tracer that dies half way would leave its registers in
//! the thread. What must never happen: a userfaultfd that stays behind in the VMM; it is closed there on every path.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};

use super::kernel::{API_REQUEST, REGISTER_REQUEST, USER_MODE_ONLY, api_words, register_words};
use super::tracee::{TraceFault, Tracee};

/// A thread may stand at a bad moment this often before we give up on it.
const TRIES_MAX: usize = 64;

/// Why a process could not be given a userfaultfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum InjectFault {
    /// ptrace was refused (errno).
    NotPermitted(i32),
    /// The process ended.
    Gone,
    /// No thread of it stopped in time.
    Stuck,
    /// userfaultfd or one of its features was refused (what, errno).
    Unsupported(String, i32),
    /// A range could not be registered (address, errno).
    Register(u64, i32),
    /// Anything else, in words.
    Other(String),
}

impl From<TraceFault> for InjectFault {
    fn from(fault: TraceFault) -> InjectFault {
        match fault {
            TraceFault::Refused(Errno::ESRCH) => InjectFault::Gone,
            TraceFault::Refused(errno) => InjectFault::NotPermitted(raw(errno)),
            TraceFault::Stuck | TraceFault::BadMoment => InjectFault::Stuck,
            TraceFault::Unfit(why) => InjectFault::Other(why.to_owned()),
            TraceFault::Memory(error) => match error.raw_os_error() {
                Some(libc::ESRCH | libc::ENOENT) => InjectFault::Gone,
                Some(errno @ (libc::EPERM | libc::EACCES)) => InjectFault::NotPermitted(errno),
                _ => InjectFault::Other(format!("its memory cannot be reached: {error}")),
            },
        }
    }
}

fn raw(errno: Errno) -> i32 {
    errno as i32
}

/// Write-protects `ranges` (address, length) of `process`; returns the only descriptor of the userfaultfd.
pub(crate) fn inject(process: i32, ranges: &[(u64, u64)]) -> Result<OwnedFd, InjectFault> {
    let pid = Pid::from_raw(process).ok_or(InjectFault::Gone)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|_| InjectFault::Gone)?;
    let mut tracee = seize(process)?;
    let theirs = make(&mut tracee)?;
    let taken = register_all(&mut tracee, theirs, ranges).and_then(|()| {
        let number =
            i32::try_from(theirs).map_err(|_| InjectFault::Other("its descriptor has no number".into()))?;
        pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).map_err(|errno| match errno {
            rustix::io::Errno::PERM => InjectFault::NotPermitted(errno.raw_os_error()),
            _ => InjectFault::Unsupported("pidfd_getfd".into(), errno.raw_os_error()),
        })
    });
    let closed = tracee.call(libc::SYS_close, [theirs, 0, 0])?;
    drop(tracee);
    closed.map_err(|errno| InjectFault::Unsupported("close".into(), raw(errno)))?;
    taken
}

/// Stops a thread of the process at a good moment: the first one, which mostly waits for events, and else any.
fn seize(process: i32) -> Result<Tracee, InjectFault> {
    let mut last = InjectFault::Gone;
    for _ in 0..TRIES_MAX {
        for thread in threads(process) {
            match Tracee::seize(process, thread) {
                Ok(tracee) => return Ok(tracee),
                Err(TraceFault::Refused(errno)) if errno != Errno::ESRCH => {
                    return Err(InjectFault::NotPermitted(raw(errno)));
                }
                Err(fault) => last = fault.into(),
            }
        }
        // A thread that ended is not its process: taken for it, a living writer would go untracked in silence.
        if last == InjectFault::Gone && is_there(process) {
            last = InjectFault::Stuck;
        }
        if last != InjectFault::Stuck {
            break;
        }
    }
    Err(last)
}

/// Whether the process has a thread.
pub(crate) fn is_there(process: i32) -> bool {
    !threads(process).is_empty()
}

/// The thread ids of a process, the first thread first.
pub(crate) fn threads(process: i32) -> Vec<i32> {
    let entries = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let mut threads: Vec<i32> =
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    threads.sort_unstable_by_key(|thread| (*thread != process, *thread));
    threads
}

/// Makes a userfaultfd with the features that tracking needs.
fn make(tracee: &mut Tracee) -> Result<u64, InjectFault> {
    // What could not be closed again must not be made.
    tracee.must_permit(libc::SYS_close, [0; 3])?;
    for asked in [API_REQUEST, REGISTER_REQUEST] {
        tracee.must_permit(libc::SYS_ioctl, [0, u64::from(asked), tracee.scratch()])?;
    }
    let flags = u64::from((libc::O_CLOEXEC | libc::O_NONBLOCK).cast_unsigned());
    let mut made = tracee.call(libc::SYS_userfaultfd, [flags, 0, 0])?;
    if made == Err(Errno::EPERM) {
        made = tracee.call(libc::SYS_userfaultfd, [flags | u64::from(USER_MODE_ONLY), 0, 0])?;
    }
    let theirs = made.map_err(|errno| InjectFault::Unsupported("userfaultfd".into(), raw(errno)))?;
    match request(tracee, theirs, API_REQUEST, &api_words()) {
        Ok(Ok(())) => Ok(theirs),
        Ok(Err(errno)) => {
            let _ = tracee.call(libc::SYS_close, [theirs, 0, 0]);
            Err(InjectFault::Unsupported("asynchronous write protection".into(), raw(errno)))
        }
        Err(fault) => {
            let _ = tracee.call(libc::SYS_close, [theirs, 0, 0]);
            Err(fault.into())
        }
    }
}

fn register_all(tracee: &mut Tracee, theirs: u64, ranges: &[(u64, u64)]) -> Result<(), InjectFault> {
    for (start, len) in ranges {
        request(tracee, theirs, REGISTER_REQUEST, &register_words(*start, *len))?
            .map_err(|errno| InjectFault::Register(*start, raw(errno)))?;
    }
    Ok(())
}

fn request(
    tracee: &mut Tracee,
    theirs: u64,
    request: u32,
    bytes: &[u8],
) -> Result<Result<(), Errno>, TraceFault> {
    tracee.put(bytes)?;
    let outcome = tracee.call(libc::SYS_ioctl, [theirs, u64::from(request), tracee.scratch()])?;
    Ok(outcome.map(|_| ()))
}
