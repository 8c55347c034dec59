//! The serial line: one command a line in, one marked line out.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};

use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use vmferry_rig::ANSWER_PREFIX;

/// The guest's side of the line.
pub(crate) struct Serial {
    reader: BufReader<File>,
    writer: File,
}

impl Serial {
    /// Opens the line raw: no echo, no signals, no translation.
    pub(crate) fn open() -> std::io::Result<Self> {
        let writer = OpenOptions::new().read(true).write(true).open("/dev/ttyS0")?;
        let mut settings = tcgetattr(&writer)?;
        settings.make_raw();
        tcsetattr(&writer, OptionalActions::Now, &settings)?;
        Ok(Self { reader: BufReader::new(writer.try_clone()?), writer })
    }

    pub(crate) fn say(&mut self, text: &str) {
        // A leading newline: the kernel may have left half a line behind.
        let line = format!("\n{ANSWER_PREFIX}{text}\n");
        let _ = self.writer.write_all(line.as_bytes());
    }

    pub(crate) fn read_command(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }
}
