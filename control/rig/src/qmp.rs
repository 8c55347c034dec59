//! Just enough QMP to drive a VMM from a test: one command at a time, events kept aside.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::RigError;

/// A monitor that does not answer for this long has hung.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Events kept until somebody asks; older ones are dropped.
const EVENTS_KEPT_MAX: usize = 256;

/// A connected monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to a monitor's socket and leaves the greeting behind.
    pub fn connect(path: &Path) -> Result<Self, RigError> {
        let what = || format!("cannot connect to the monitor {}", path.display());
        let stream = UnixStream::connect(path).map_err(RigError::host(what()))?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(RigError::host(what()))?;
        let mut qmp = Self { reader: BufReader::new(stream), events: VecDeque::new() };
        qmp.read()?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs one command and returns its answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, RigError> {
        let arguments = if arguments.is_null() { json!({}) } else { arguments };
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.reader
            .get_mut()
            .write_all(line.as_bytes())
            .map_err(RigError::host(format!("cannot send {command}")))?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                return Err(RigError::Guest(format!(
                    "{command} failed: {}",
                    error["desc"].as_str().unwrap_or("?")
                )));
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Events that came in since the last call.
    pub fn take_events(&mut self) -> Vec<Value> {
        self.events.drain(..).collect()
    }

    fn read(&mut self) -> Result<Value, RigError> {
        let mut line = String::new();
        let count =
            self.reader.read_line(&mut line).map_err(RigError::host("the monitor does not answer"))?;
        if count == 0 {
            return Err(RigError::Guest("the VMM closed its monitor: it has ended".to_owned()));
        }
        let value: Value = serde_json::from_str(&line)
            .map_err(|error| RigError::Guest(format!("the monitor sent no JSON ({error}): {line}")))?;
        if value.get("event").is_some() {
            if self.events.len() == EVENTS_KEPT_MAX {
                self.events.pop_front();
            }
            self.events.push_back(value.clone());
        }
        Ok(value)
    }
}
