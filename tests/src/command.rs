//! The `vmferry` command as an operator runs it: started, spoken to by signals, judged by its last line and exit code.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// A move of a test never takes longer; one that does hangs.
pub const MOVE_TIMEOUT: Duration = Duration::from_secs(120);

/// Every phase of the source before Commit.
pub const SOURCE_PHASES: [&str; 8] =
    ["negotiate", "prepare", "copy", "pause", "last-round", "close-lanes", "target-load", "seal"];
/// Every phase of the target before it runs the guest.
pub const TARGET_PHASES: [&str; 5] = ["prepare", "receive", "complete", "load", "ready"];

/// What `VMFERRY_HOLD` says to hold `side` (`send` or `receive`) at `phase`.
#[must_use]
pub fn hold(side: &str, phase: &str, ms: u32) -> String {
    format!("{side}:{phase}:{ms}")
}

/// The `vmferry` program that this workspace built.
///
/// # Panics
/// When it is not built: a test without it proves nothing.
#[must_use]
pub fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap_or_default();
    let found = test.ancestors().skip(1).take(3).map(|dir| dir.join("vmferry")).find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("the vmferry program is not built: run 'cargo build --workspace --bins' first")
    })
}

/// Keys for 127.0.0.1, removed when dropped.
pub struct Pki(tempfile::TempDir);

impl Pki {
    /// A new CA and a host's certificates for `host`.
    ///
    /// # Panics
    /// When the keys cannot be made.
    #[must_use]
    pub fn new(host: &str) -> Self {
        let dir = tempfile::tempdir().unwrap_or_else(|e| panic!("no directory for keys: {e}"));
        vmferry::keys::init(dir.path(), &[host.to_owned()]).unwrap_or_else(|e| panic!("{e}"));
        Self(dir)
    }

    /// Every file of it in one line of text, for a test's other half on another host.
    ///
    /// # Panics
    /// When a file cannot be read.
    #[must_use]
    pub fn to_line(&self) -> String {
        let read = |entry: std::io::Result<std::fs::DirEntry>| {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            Ok((name, Value::from(std::fs::read_to_string(entry.path())?)))
        };
        let files = std::fs::read_dir(self.path()).and_then(|entries| entries.map(read).collect());
        Value::Object(files.unwrap_or_else(|e| panic!("no keys to hand over: {e}"))).to_string()
    }

    /// The same keys, from the line that the other half handed over.
    ///
    /// # Panics
    /// When they cannot be written.
    #[must_use]
    pub fn from_line(line: &str) -> Self {
        let dir = tempfile::tempdir().unwrap_or_else(|e| panic!("no directory for keys: {e}"));
        let files: std::collections::BTreeMap<String, String> =
            serde_json::from_str(line).unwrap_or_else(|e| panic!("no keys came: {e}"));
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap_or_else(|e| panic!("no keys: {e}"));
        }
        Self(dir)
    }

    /// The directory for `--tls-dir`.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

/// A `vmferry` that runs. Dropping it ends it.
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
    _state: tempfile::TempDir,
}

/// How a `vmferry` ended.
#[derive(Debug)]
pub struct Done {
    /// Its exit status.
    pub status: ExitStatus,
    /// The JSON object in its last line of stdout.
    pub report: Value,
    /// What it wrote on stderr.
    pub stderr: String,
}

impl Done {
    /// The exit code, -1 after a signal.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// The last sentence on stderr, which tells the operator what to do.
    #[must_use]
    pub fn sentence(&self) -> &str {
        self.stderr.lines().rev().find(|line| line.starts_with("vmferry: ")).unwrap_or("")
    }
}

impl Running {
    /// Starts `vmferry` with `words`; `hold` is what `VMFERRY_HOLD` says, empty for nothing.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(words: &[&str], hold: &str) -> Self {
        // A history of its own: what one test did to a move must not change the next one's forecast.
        let state = tempfile::tempdir().unwrap_or_else(|e| panic!("no directory for the history: {e}"));
        let mut child = Command::new(program())
            .args(words)
            .env("VMFERRY_HOLD", hold)
            .env("VMFERRY_STATE_DIR", state.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("vmferry does not start: {e}"));
        let stderr = child.stderr.take().unwrap_or_else(|| panic!("stderr is piped"));
        let (post, lines) = channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
            lines.try_for_each(|line| post.send(line))
        });
        Self { child, lines, said: Vec::new(), _state: state }
    }

    /// Waits until a line on stderr contains `text`, and gives it.
    ///
    /// # Panics
    /// When it does not come.
    pub fn wait_line(&mut self, text: &str) -> String {
        while let Ok(line) = self.lines.recv_timeout(MOVE_TIMEOUT) {
            self.said.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
        panic!("vmferry never said {text:?}, but:\n{}", self.said.join("\n"))
    }

    /// Its process id.
    ///
    /// # Panics
    /// Never on Linux, where process ids fit.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap_or_else(|_| panic!("a process id fits")))
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(self.pid(), signal);
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it hangs.
    #[must_use]
    pub fn done(mut self) -> Done {
        let mut stdout = self.child.stdout.take().unwrap_or_else(|| panic!("stdout is piped"));
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stdout.read_to_string(&mut text);
            text
        });
        let mut left = MOVE_TIMEOUT;
        let status = loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                break status;
            }
            let step = Duration::from_millis(5);
            left = left
                .checked_sub(step)
                .unwrap_or_else(|| panic!("vmferry hangs; it said:\n{}", self.everything()));
            std::thread::sleep(step);
        };
        let text = reader.join().unwrap_or_default();
        let report =
            text.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or(Value::Null);
        Done { status, report, stderr: self.everything() }
    }

    fn everything(&mut self) -> String {
        while let Ok(line) = self.lines.recv_timeout(Duration::from_millis(200)) {
            self.said.push(line);
        }
        self.said.join("\n")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts `vmferry receive` for `guest` on a port of its own and gives its address.
#[must_use]
pub fn receive(guest: &str, security: &[&str], hold: &str) -> (Running, String) {
    let mut words = vec!["receive", "--listen", "tcp://127.0.0.1:0", "--guest", guest, "--json"];
    words.extend(security);
    let mut running = Running::start(&words, hold);
    let line = running.wait_line("waiting for a guest on");
    let address = line.split(' ').next_back().unwrap_or_default().to_owned();
    (running, address)
}

/// Starts `vmferry send` of `guest` to `address`.
#[must_use]
pub fn send(guest: &str, address: &str, more: &[&str], hold: &str) -> Running {
    let mut words = vec!["send", "--guest", guest, "--to", address, "--json"];
    words.extend(more);
    Running::start(&words, hold)
}
