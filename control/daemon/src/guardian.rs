//! The guardian: a small process that brings the source guest back when the sender dies.
//!
//! A sender that is killed while its guest is paused would leave a guest that nobody resumes. So before the first
//! page the sender starts a guardian in a session of its own, joined by one pipe:
//!
//! ```text
//!   sender ── 'S' sealed: Commit may be on its way ──► guardian
//!          ── 'U' unsealed by the target's proof  ──►
//!          ── 'D' done: nothing to guard          ──►   (exits)
//!          ── end of file, sender died            ──►   not sealed: rescue the guest; sealed: say so, touch nothing
//! ```
//!
//! The pipe outlives its writer, so a byte written before death is read after it. What must never happen: a
//! rescue after 'S'.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};

use vmferry_guest::GuestSpec;

use crate::failure::Failure;

const SEALED: u8 = b'S';
const UNSEALED: u8 = b'U';
const DONE: u8 = b'D';

/// The sender's end: stands between the guest and the sender's sudden death.
pub struct Guardian {
    child: Child,
    pipe: Option<ChildStdin>,
}

impl Guardian {
    /// Starts the guardian for `spec`.
    pub fn start(spec: &GuestSpec) -> Result<Self, Failure> {
        let cannot = |e: io::Error| Failure::Permission(format!("cannot start the guardian process: {e}"));
        let program = std::env::current_exe().map_err(cannot)?;
        // A process group of its own: Ctrl-C on the terminal must end the sender only.
        let mut child = Command::new(program)
            .args(["guardian", "--guest", &spec.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(cannot)?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe })
    }

    /// Recorded before Commit is sent; after it the guardian never resumes the guest.
    pub fn seal(&mut self) -> Result<(), Failure> {
        self.tell(SEALED)
    }

    /// The target proved that it never ran the guest.
    pub fn unseal(&mut self) -> Result<(), Failure> {
        self.tell(UNSEALED)
    }

    fn tell(&mut self, word: u8) -> Result<(), Failure> {
        let pipe =
            self.pipe.as_mut().ok_or_else(|| Failure::Bug("the guardian was dismissed already".into()))?;
        pipe.write_all(&[word]).map_err(|e| {
            Failure::Unavailable(format!(
                "the guardian process is gone ({e}): the guest is not handed over without it"
            ))
        })
    }

    /// Nothing is left to guard.
    pub fn dismiss(mut self) {
        if let Some(mut pipe) = self.pipe.take() {
            let _ = pipe.write_all(&[DONE]);
        }
        let _ = self.child.wait();
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        // Dropped without `dismiss` (an early return, a panic): the end of the pipe starts the rescue.
        if self.pipe.take().is_some() {
            let _ = self.child.wait();
        }
    }
}

/// What the words on the pipe ask for when it ends.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Leave,
    Rescue,
    InDoubt,
}

fn verdict(words: &mut impl Read) -> Verdict {
    let mut verdict = Verdict::Rescue;
    let mut word = [0u8; 1];
    loop {
        match words.read(&mut word) {
            Ok(0) => return verdict,
            Ok(_) => match word[0] {
                SEALED => verdict = Verdict::InDoubt,
                UNSEALED => verdict = Verdict::Rescue,
                DONE => return Verdict::Leave,
                // An unknown word comes from another version: touching nothing is the safe side.
                _ => verdict = Verdict::InDoubt,
            },
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return verdict,
        }
    }
}

/// The guardian process itself: `vmferry guardian --guest SPEC`, words on stdin.
#[must_use]
pub fn run(spec: &GuestSpec) -> ExitCode {
    match verdict(&mut io::stdin().lock()) {
        Verdict::Leave => ExitCode::SUCCESS,
        Verdict::InDoubt => {
            eprintln!(
                "vmferry guardian: the sender of {spec} died after Commit: the guest stays paused here; look at the target, and resume it here only if it does not run there"
            );
            ExitCode::from(3)
        }
        Verdict::Rescue => match vmferry_guest::rescue(spec) {
            Ok(()) => {
                eprintln!(
                    "vmferry guardian: the sender of {spec} died before Commit: the guest runs on here"
                );
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!(
                    "vmferry guardian: the sender of {spec} died and the guest could not be resumed: {error}"
                );
                ExitCode::from(70)
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_unsealed_death_is_a_rescue() {
        for (words, expected) in [
            (&b""[..], Verdict::Rescue),
            (b"S", Verdict::InDoubt),
            (b"SU", Verdict::Rescue),
            (b"SUS", Verdict::InDoubt),
            (b"D", Verdict::Leave),
            (b"SD", Verdict::Leave),
            (b"?", Verdict::InDoubt),
        ] {
            assert_eq!(verdict(&mut &*words), expected, "{words:?}");
        }
    }
}
