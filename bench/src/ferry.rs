//! The `vmferry` program, run as an operator would run it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::measure::now;
use crate::qemu_move::free_port;

/// `vmferry`, next to this program or where `VMFERRY_BIN` says.
#[derive(Debug, Clone)]
pub(crate) struct Ferry {
    program: PathBuf,
}

/// How vmferry shall move.
#[derive(Debug, Clone)]
pub(crate) struct FerryPlan {
    /// A folder with keys; `None` moves in plaintext.
    pub(crate) keys: Option<PathBuf>,
    pub(crate) downtime_limit: Duration,
    pub(crate) timeout: Duration,
    /// More words for `send`.
    pub(crate) send_words: Vec<String>,
}

/// What both sides printed last.
#[derive(Debug, Clone)]
pub(crate) struct FerryReport {
    pub(crate) send: Value,
    pub(crate) converged: bool,
}

impl Ferry {
    pub(crate) fn find() -> Result<Self> {
        if let Some(given) = std::env::var_os("VMFERRY_BIN") {
            return Ok(Self { program: PathBuf::from(given) });
        }
        let here = std::env::current_exe().context("this program does not know where it is")?;
        let program = here.with_file_name("vmferry");
        if program.is_file() {
            return Ok(Self { program });
        }
        bail!(
            "'vmferry' is not built beside this program: run 'cargo build --release' first, or set VMFERRY_BIN"
        )
    }

    /// Makes keys for 127.0.0.1 under QEMU's file names.
    pub(crate) fn make_keys(&self, folder: &Path) -> Result<()> {
        let words = ["keys", "init", "--host", "127.0.0.1", "--dir"];
        let made =
            Command::new(&self.program).args(words).arg(folder).output().context("cannot run vmferry")?;
        if !made.status.success() {
            bail!("'vmferry keys init' failed: {}", String::from_utf8_lossy(&made.stderr).trim());
        }
        Ok(())
    }

    /// Starts the receiving side and returns once it listens.
    pub(crate) fn receive(&self, guest: &str, plan: &FerryPlan) -> Result<Receiving> {
        let port = free_port()?;
        let url = format!("tcp://127.0.0.1:{port}");
        let mut command = self.command("receive", guest, plan);
        command.args(["--listen", &url]);
        let child = command.spawn().context("cannot run 'vmferry receive'")?;
        let mut receiving = Receiving { child: Some(child), url };
        let start = now();
        while !is_listening(port) {
            if receiving.has_ended() || start.elapsed() > Duration::from_secs(20) {
                bail!("'vmferry receive' does not listen: {}", receiving.finish()?.1);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(receiving)
    }

    /// Sends the guest and waits for both sides to end.
    pub(crate) fn send(&self, guest: &str, receiving: Receiving, plan: &FerryPlan) -> Result<FerryReport> {
        let mut command = self.command("send", guest, plan);
        command.args(["--to", &receiving.url]);
        command.args(["--downtime-limit".to_owned(), format!("{}ms", plan.downtime_limit.as_millis())]);
        command.args(["--timeout".to_owned(), format!("{}s", plan.timeout.as_secs())]).args(&plan.send_words);
        let sent = command.output().context("cannot run 'vmferry send'")?;
        let report = last_json(&sent);
        let (received, why) = receiving.finish()?;
        let converged = sent.status.success() && received;
        let status = report["status"].as_str().unwrap_or_default();
        if !converged && status.is_empty() {
            bail!(
                "'vmferry send' ended with {}: {} / {why}",
                sent.status,
                String::from_utf8_lossy(&sent.stderr).trim()
            );
        }
        Ok(FerryReport { send: report, converged })
    }

    fn command(&self, verb: &str, guest: &str, plan: &FerryPlan) -> Command {
        let mut command = Command::new(&self.program);
        command.args([verb, "--json", "--guest", guest]);
        match &plan.keys {
            Some(keys) => command.arg("--tls-dir").arg(keys),
            None => command.arg("--insecure-plaintext"),
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }
}

/// A receiving side that listens; it is ended when dropped.
#[derive(Debug)]
pub(crate) struct Receiving {
    child: Option<Child>,
    url: String,
}

impl Receiving {
    fn has_ended(&mut self) -> bool {
        self.child.as_mut().is_none_or(|child| matches!(child.try_wait(), Ok(Some(_))))
    }

    /// Waits for the end, for a while, and gives whether it was a good one and what was said.
    fn finish(mut self) -> Result<(bool, String)> {
        let start = now();
        while !self.has_ended() && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let Some(mut child) = self.child.take() else { return Ok((false, String::new())) };
        let _ = child.kill();
        let output = child.wait_with_output()?;
        Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn last_json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or(Value::Null)
}

/// Looks without connecting: `receive` takes the first connection for the move.
fn is_listening(port: u16) -> bool {
    let wanted = format!(":{port:04X}");
    let text = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    text.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(&wanted)) && words.nth(1) == Some("0A")
    })
}
