//! What past moves of this kind of guest from this host predicted and took, so that the next prediction is better.
//!
//! A file in `$VMFERRY_STATE_DIR` (default `$XDG_STATE_HOME/vmferry`, else `~/.local/state/vmferry`). It is advice: a file
//! that cannot be read or written costs a prediction some precision and is never an error of a move.

use std::fs;
use std::path::PathBuf;

use vmferry_session::{History, MoveRecord};

/// A history larger than this is not read: 256 records are far below it.
const HISTORY_BYTES_MAX: u64 = 4 << 20;

/// The history of one kind of guest.
pub(super) struct HistoryFile {
    path: Option<PathBuf>,
    history: History,
}

impl HistoryFile {
    /// Reads the history of `kind`; an empty one where there is none.
    #[must_use]
    pub(super) fn of_kind(kind: &str) -> Self {
        let path = state_dir().map(|dir| dir.join(format!("history-{kind}.json")));
        let history = path
            .as_ref()
            .filter(|path| fs::metadata(path).is_ok_and(|file| file.len() <= HISTORY_BYTES_MAX))
            .and_then(|path| fs::read(path).ok())
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        Self { path, history }
    }

    /// Moves before this one.
    #[must_use]
    pub(super) fn past(&self) -> &History {
        &self.history
    }

    /// Adds a finished move.
    pub(super) fn add(&mut self, record: MoveRecord) {
        self.history.push(record);
        if let Err(why) = self.write() {
            tracing::info!("the history of moves was not kept: {why}");
        }
    }

    fn write(&self) -> Result<(), Box<dyn std::error::Error>> {
        let Some(path) = &self.path else { return Ok(()) };
        let dir = path.parent().ok_or("the state directory has no name")?;
        fs::create_dir_all(dir)?;
        // Renamed into place: two moves that end together leave one whole history, not half of two.
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        serde_json::to_writer(&mut file, &self.history)?;
        file.persist(path)?;
        Ok(())
    }
}

fn state_dir() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("VMFERRY_STATE_DIR")
        .or_else(|| set("XDG_STATE_HOME").map(|dir| dir.join("vmferry")))
        .or_else(|| set("HOME").map(|home| home.join(".local/state/vmferry")))
}
