//! A process that writes exactly the pages that it is told: the writer whose truth a dirty log is held against.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::RigError;
use crate::assets::find_program;

/// A running writer; it ends when dropped.
#[derive(Debug)]
pub struct CommandedWriter {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl CommandedWriter {
    /// Starts one on `file`. It has written every page once when this returns.
    pub fn start(file: &Path) -> Result<Self, RigError> {
        let program = find_program("vmferry-commanded-writer")?;
        let mut child = Command::new(program)
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(RigError::host("cannot start the commanded writer"))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (orders, answers) =
            pipes.ok_or_else(|| RigError::Guest("the commanded writer has no pipes".into()))?;
        let mut writer = Self { child, orders, answers: BufReader::new(answers) };
        writer.answer()?;
        Ok(writer)
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes these pages of the file, and returns when it did.
    pub fn write(&mut self, pages: impl Iterator<Item = u64>) -> Result<(), RigError> {
        let mut line = String::new();
        for page in pages {
            let _ = write!(line, "{page} ");
        }
        line.push('\n');
        self.orders.write_all(line.as_bytes()).map_err(RigError::host("the commanded writer is gone"))?;
        self.answer()
    }

    fn answer(&mut self) -> Result<(), RigError> {
        let mut line = String::new();
        self.answers.read_line(&mut line).map_err(RigError::host("the commanded writer does not answer"))?;
        if line.trim() == "done" {
            return Ok(());
        }
        Err(RigError::Guest(format!("the commanded writer said {line:?}: its messages are on stderr")))
    }
}

impl Drop for CommandedWriter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
