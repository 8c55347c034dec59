//! Runs `vmferry receive` and `vmferry send` as an operator would, and reads their last lines.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::failure::Failure;
use crate::report::human;

/// What one move did, from `send --json` and from the guest's heart beat.
pub(super) struct Moved {
    pub(super) blackout_ms: f64,
    pub(super) predicted_ms: (f64, f64),
    pub(super) total_ms: f64,
    pub(super) wire_bytes: u64,
    pub(super) cipher: String,
    /// By the host's clock, where the guest beats.
    pub(super) gap_ms: Option<f64>,
}

impl Moved {
    pub(super) fn line(&self) -> String {
        let gap = self.gap_ms.map_or_else(String::new, |gap| format!(", guest away {gap:.1} ms"));
        format!(
            "blackout {:.1} ms (predicted {:.1} to {:.1}){gap}, {} in {:.0} ms, {}",
            self.blackout_ms,
            self.predicted_ms.0,
            self.predicted_ms.1,
            human(self.wire_bytes),
            self.total_ms,
            self.cipher
        )
    }
}

/// A child that is ended when it is dropped before its time.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Moves `source` into `target`.
pub(super) fn move_guest(pki: &Path, source: &str, target: &str) -> Result<Moved, Failure> {
    let cannot = |e: std::io::Error| Failure::Bug(format!("vmferry could not run itself: {e}"));
    let program = std::env::current_exe().map_err(cannot)?;
    let mut receive = Ended(
        Command::new(&program)
            .args(["receive", "--listen", "tcp://127.0.0.1:0", "--guest", target, "--json", "--tls-dir"])
            .arg(pki)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(cannot)?,
    );
    let (address, said) = listening_address(&mut receive.0)?;
    let sent = Command::new(&program)
        .args(["send", "--guest", source, "--to", &address, "--json", "--tls-dir"])
        .arg(pki)
        .stderr(Stdio::piped())
        .output()
        .map_err(cannot)?;
    let send_says = String::from_utf8_lossy(&sent.stderr).into_owned();
    if !sent.status.success() {
        let _ = receive.0.kill();
        let receive_says = said.join().unwrap_or_default();
        return Err(Failure::Unavailable(format!(
            "the demo's move failed\nsend: {send_says}\nreceive: {receive_says}"
        )));
    }
    let received = receive.0.wait().map_err(cannot)?;
    if !received.success() {
        return Err(Failure::Unavailable(format!(
            "the demo's receive failed: {}",
            said.join().unwrap_or_default()
        )));
    }
    moved(&String::from_utf8_lossy(&sent.stdout))
}

/// The address in `receive`'s first line, and the thread that reads the rest.
fn listening_address(receive: &mut Child) -> Result<(String, std::thread::JoinHandle<String>), Failure> {
    let stderr = receive.stderr.take().ok_or_else(|| Failure::Bug("receive has no stderr".into()))?;
    let mut lines = BufReader::new(stderr).lines();
    let mut before = String::new();
    for line in lines.by_ref().map_while(Result::ok) {
        if let Some(at) = line.find("tcp://") {
            let rest = std::thread::spawn(move || lines.map_while(Result::ok).collect::<Vec<_>>().join("\n"));
            return Ok((line[at..].to_owned(), rest));
        }
        before.push_str(&line);
    }
    Err(Failure::Unavailable(format!("the demo's receive did not start: {before}")))
}

fn moved(stdout: &str) -> Result<Moved, Failure> {
    let report: Value = stdout
        .lines()
        .last()
        .and_then(|line| serde_json::from_str(line).ok())
        .ok_or_else(|| Failure::Bug(format!("send's last line is no report: {stdout}")))?;
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let predicted = &report["predicted_blackout_ms"];
    Ok(Moved {
        blackout_ms: number(&report["blackout_ms"]),
        predicted_ms: (number(&predicted["p05"]), number(&predicted["p95"])),
        total_ms: number(&report["total_ms"]),
        wire_bytes: report["ram"]["wire_bytes"].as_u64().unwrap_or(0),
        cipher: report["cipher"].as_str().unwrap_or("?").to_owned(),
        gap_ms: None,
    })
}
