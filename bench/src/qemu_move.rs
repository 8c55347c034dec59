//! QEMU's own migration, driven over QMP with the settings that a careful operator would give it.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vmferry_rig::RunningGuest;

use crate::measure::now;

/// Above what any link here carries: QEMU's default of 128 MiB/s would measure only itself.
const BANDWIDTH_BYTES_PER_S: u64 = 100 << 30;
/// As many as this project's bench machine has cores.
const MULTIFD_CHANNELS: u32 = 2;
const CANCEL_TIMEOUT: Duration = Duration::from_secs(20);

/// How QEMU moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mode {
    Plain,
    Multifd,
    MultifdTls,
}

/// What QEMU says about its own move.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QemuClaim {
    pub(crate) converged: bool,
    pub(crate) bytes: u64,
    pub(crate) downtime_ms: f64,
    pub(crate) rounds: u64,
}

/// Words for QEMU's command line that `Mode::MultifdTls` needs, source and target alike.
pub(crate) fn tls_objects(keys: &Path) -> [String; 4] {
    let object = |id: &str, endpoint: &str| {
        format!("tls-creds-x509,id={id},dir={},endpoint={endpoint},verify-peer=on", keys.display())
    };
    [
        "-object".to_owned(),
        object("tls-source", "client"),
        "-object".to_owned(),
        object("tls-target", "server"),
    ]
}

/// Prepares both sides; nothing moves yet.
pub(crate) fn prepare(
    mode: Mode,
    source: &mut RunningGuest,
    target: &mut RunningGuest,
    downtime_limit: Duration,
) -> Result<String> {
    configure(source, mode, "tls-source", downtime_limit).context("QEMU's source side")?;
    configure(target, mode, "tls-target", downtime_limit).context("QEMU's target side")?;
    let uri = format!("tcp:127.0.0.1:{}", free_port()?);
    target.qmp().execute("migrate-incoming", json!({ "uri": uri }))?;
    Ok(uri)
}

/// Moves the guest, or gives up after `timeout` and lets it run on.
pub(crate) fn run(uri: &str, source: &mut RunningGuest, timeout: Duration) -> Result<QemuClaim> {
    let start = now();
    source.qmp().execute("migrate", json!({ "uri": uri }))?;
    loop {
        let state = source.qmp().execute("query-migrate", Value::Null)?;
        match state["status"].as_str().unwrap_or_default() {
            "completed" => return Ok(claim(&state, true)),
            "failed" => anyhow::bail!("QEMU's migration failed: {}", state["error-desc"]),
            _ if start.elapsed() > timeout => {
                cancel(source)?;
                return Ok(claim(&state, false));
            }
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Returns once QEMU has let go: until then it refuses the next mover.
fn cancel(source: &mut RunningGuest) -> Result<()> {
    source.qmp().execute("migrate_cancel", Value::Null)?;
    let start = now();
    while source.qmp().execute("query-migrate", Value::Null)?["status"] != "cancelled" {
        anyhow::ensure!(start.elapsed() < CANCEL_TIMEOUT, "QEMU does not cancel its migration");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn configure(side: &mut RunningGuest, mode: Mode, creds: &str, downtime_limit: Duration) -> Result<()> {
    let multifd = mode != Mode::Plain;
    let capability = json!({ "capabilities": [
        { "capability": "multifd", "state": multifd },
        { "capability": "x-ignore-shared", "state": false },
    ] });
    side.qmp().execute("migrate-set-capabilities", capability)?;
    let mut parameters = json!({
        "max-bandwidth": BANDWIDTH_BYTES_PER_S,
        "downtime-limit": u64::try_from(downtime_limit.as_millis())?,
        "tls-creds": if mode == Mode::MultifdTls { creds } else { "" },
        "tls-hostname": if mode == Mode::MultifdTls { "127.0.0.1" } else { "" },
    });
    if multifd {
        parameters["multifd-channels"] = json!(MULTIFD_CHANNELS);
    }
    side.qmp().execute("migrate-set-parameters", parameters)?;
    Ok(())
}

fn claim(state: &Value, converged: bool) -> QemuClaim {
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let ram = &state["ram"];
    QemuClaim {
        converged,
        bytes: number(&ram["transferred"]),
        downtime_ms: state["downtime"].as_f64().unwrap_or(0.0),
        rounds: number(&ram["dirty-sync-count"]),
    }
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr())?.port())
}
