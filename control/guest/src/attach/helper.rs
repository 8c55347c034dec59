//! A short-lived process that does the injection.
//!
//! A tracer that is killed between two steps leaves its registers in the traced thread, and the VMM would crash.
//! `kill -9` of vmferry must not do that, whenever it falls. So a child of our own process, in a session of its
//! own and deaf to signals, does the 0.2 ms of work and hands the descriptor back over a socket. When its parent is
//! gone by then, the descriptor dies with the child, and the VMM is as it was.
#![expect(unsafe_code, reason = "fork")]

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, fork, setsid};

use super::inject::{InjectFault, inject};

/// Far more than an injection takes, also on a host that swaps.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest answer.
const ANSWER_BYTES_MAX: usize = 4096;

/// [`inject`], in a process of its own.
pub(crate) fn inject_apart(process: i32, ranges: &[(u64, u64)]) -> Result<OwnedFd, InjectFault> {
    let (ours, theirs) = UnixStream::pair().map_err(other("cannot make a socket pair"))?;
    ours.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(other("cannot set a deadline"))?;
    // SAFETY: the child runs only `serve`, which uses no lock that another thread of ours could hold (glibc makes
    // its allocator usable after a fork), and ends by `_exit`.
    let forked = unsafe { fork() }.map_err(|errno| InjectFault::Other(format!("cannot fork: {errno}")))?;
    let ForkResult::Parent { child } = forked else { serve(&theirs, process, ranges) };
    drop(theirs);
    let answer = receive(&ours);
    drop(ours);
    if answer.is_ok() {
        let _ = waitpid(child, None);
    } else {
        // It is stuck inside the VMM and must not be killed there; it ends by itself when the VMM answers.
        let _ = waitpid(child, Some(WaitPidFlag::WNOHANG));
    }
    answer?
}

fn serve(answer: &UnixStream, process: i32, ranges: &[(u64, u64)]) -> ! {
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None);
    let _ = setsid();
    let outcome = catch_unwind(AssertUnwindSafe(|| inject(process, ranges)))
        .unwrap_or_else(|_| Err(InjectFault::Other("the injection panicked".into())));
    let (fault, descriptor) = match outcome {
        Ok(descriptor) => (None, Some(descriptor)),
        Err(fault) => (Some(fault), None),
    };
    let words = serde_json::to_vec(&fault).unwrap_or_default();
    let rights: Vec<_> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&rights)];
    let control = if rights.is_empty() { &[] } else { &control[..] };
    let _ = sendmsg::<()>(answer.as_raw_fd(), &[IoSlice::new(&words)], control, MsgFlags::MSG_NOSIGNAL, None);
    // SAFETY: ends this child without running the exit handlers it shares with its parent.
    unsafe { libc::_exit(0) }
}

fn receive(from: &UnixStream) -> Result<Result<OwnedFd, InjectFault>, InjectFault> {
    let mut words = [0; ANSWER_BYTES_MAX];
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    let (len, descriptor) = {
        let mut slices = [IoSliceMut::new(&mut words)];
        let message =
            recvmsg::<()>(from.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)
                .map_err(|_| InjectFault::Stuck)?;
        let rights = message.cmsgs().into_iter().flatten().find_map(|part| {
            let ControlMessageOwned::ScmRights(rights) = part else { return None };
            rights.first().copied()
        });
        (message.bytes, rights)
    };
    // SAFETY: the descriptor just arrived for us and nobody else knows its number.
    let descriptor = descriptor.map(|number| unsafe { OwnedFd::from_raw_fd(number) });
    match (serde_json::from_slice::<Option<InjectFault>>(&words[..len]), descriptor) {
        (Ok(None), Some(descriptor)) => Ok(Ok(descriptor)),
        (Ok(Some(fault)), _) => Ok(Err(fault)),
        _ => Ok(Err(InjectFault::Other("the helper process ended without an answer".into()))),
    }
}

fn other(what: &'static str) -> impl FnOnce(std::io::Error) -> InjectFault {
    move |error| InjectFault::Other(format!("{what}: {error}"))
}
