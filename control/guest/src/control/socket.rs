//! The listening end of a control socket, in a folder that only its user can reach.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Line;
use crate::GuestError;

/// Where `what` of this name listens: `$XDG_RUNTIME_DIR` or `/tmp`, then `vmferry-UID/NAME.SUFFIX`.
pub(crate) fn socket_path(what: &str, name: &str, suffix: &str) -> Result<PathBuf, GuestError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 48 || name.starts_with('.') || !name.chars().all(plain) {
        return Err(GuestError::mistake(format!(
            "'{name}' cannot be a {what}'s name: use up to 48 letters, digits, '-', '_' or '.'"
        )));
    }
    let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
    let user = rustix::process::getuid().as_raw();
    Ok(base.join(format!("vmferry-{user}")).join(format!("{name}.{suffix}")))
}

/// The socket; its file vanishes with it.
pub(crate) struct Socket {
    path: PathBuf,
    listener: UnixListener,
}

impl Socket {
    /// Listens at `path`; `what` is who would be there already.
    pub(crate) fn listen(path: &Path, what: &str) -> Result<Self, GuestError> {
        let folder = path.parent().unwrap_or(Path::new("/"));
        private_folder(folder)?;
        if UnixStream::connect(path).is_ok() {
            return Err(GuestError::mistake(format!("{what} runs already: choose another --name")));
        }
        let _ = fs::remove_file(path);
        let what = format!("cannot listen on {}", path.display());
        let listener = UnixListener::bind(path).map_err(GuestError::refused(what))?;
        Ok(Self { path: path.to_path_buf(), listener })
    }

    /// Gives every connection to `client`, in a thread of its own.
    pub(crate) fn serve(&self, client: impl Fn(Line) + Send + Sync + 'static) -> Result<(), GuestError> {
        let what = "the control socket cannot be shared";
        let listener = self.listener.try_clone().map_err(GuestError::refused(what))?;
        let client = Arc::new(client);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let client = Arc::clone(&client);
                std::thread::spawn(move || client(Line::new(stream)));
            }
        });
        Ok(())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Whoever can reach the socket can read the memory: the folder must be the user's own.
fn private_folder(folder: &Path) -> Result<(), GuestError> {
    let what = format!("cannot create {}", folder.display());
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(GuestError::refused(what)(error));
        }
        Ok(()) | Err(_) => {}
    }
    let found = fs::symlink_metadata(folder).map_err(GuestError::refused(what))?;
    if found.is_dir() && found.uid() == rustix::process::getuid().as_raw() && found.mode() & 0o022 == 0 {
        return Ok(());
    }
    let sentence =
        format!("{} is not a folder of yours alone: remove it, or set XDG_RUNTIME_DIR", folder.display());
    Err(GuestError::mistake(sentence))
}
