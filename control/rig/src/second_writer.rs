//! A second process that maps a guest's memory and writes it: what a vhost-user backend is to a dirty tracker.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

use vmferry_workload::{MappedPages, Plan, Registers, Report, Verifier};

use crate::RigError;
use crate::assets::find_program;

/// A running second writer; it ends when dropped.
#[derive(Debug)]
pub struct SecondWriter {
    child: Child,
    output: BufReader<ChildStdout>,
    first_page: u64,
    pages: u64,
}

/// What a second writer had written when it stopped.
#[derive(Debug)]
pub struct SecondWriting {
    registers: Registers,
    first_page: u64,
}

impl SecondWriter {
    /// Starts to write `plan.pages` pages of `memory` from `first_page` on. Nobody else may use them: keep the guest
    /// away with [`crate::QemuGuest::reserve_top`]. Returns once every page holds its first version.
    pub fn start(memory: &Path, first_page: u64, plan: &Plan) -> Result<Self, RigError> {
        let program = find_program("vmferry-second-writer")?;
        let mut child = Command::new(program)
            .arg(memory)
            .args([first_page.to_string(), plan.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(RigError::host("cannot start the second writer"))?;
        let output = child.stdout.take().map(BufReader::new);
        let mut output =
            output.ok_or_else(|| RigError::Guest("the second writer has no output".to_owned()))?;
        let mut line = String::new();
        output.read_line(&mut line).map_err(RigError::host("the second writer does not answer"))?;
        let writer = Self { child, output, first_page, pages: plan.pages };
        if line.trim() == "ready" {
            return Ok(writer);
        }
        Err(RigError::Guest("the second writer ended at once: its messages are on stderr".to_owned()))
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it and takes what it knows.
    pub fn stop(mut self) -> Result<SecondWriting, RigError> {
        drop(self.child.stdin.take());
        let mut text = String::new();
        self.output.read_to_string(&mut text).map_err(RigError::host("the second writer does not answer"))?;
        let bytes = from_hex(text.trim())
            .ok_or_else(|| RigError::Guest("the second writer printed rubbish".into()))?;
        let registers =
            Registers::load(&bytes, self.pages).map_err(|error| RigError::Guest(error.to_string()))?;
        Ok(SecondWriting { registers, first_page: self.first_page })
    }
}

impl Drop for SecondWriter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl SecondWriting {
    /// Holds a memory file, the source's or the target's, against what was written.
    pub fn verify(&self, memory: &Path) -> Result<Report, RigError> {
        let what = || format!("cannot map {}", memory.display());
        let file = File::options().read(true).write(true).open(memory).map_err(RigError::host(what()))?;
        let pages = usize::try_from(self.registers.plan.pages).unwrap_or(usize::MAX);
        let mapped = MappedPages::shared(&file, self.first_page, pages)
            .map_err(|error| RigError::Host { what: what(), source: error.into() })?;
        Ok(Verifier::new().all(&mapped, &self.registers))
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).ok());
    pairs.map(|pair| u8::from_str_radix(pair?, 16).ok()).collect()
}
