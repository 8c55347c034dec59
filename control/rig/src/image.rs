//! A first file system under construction: parents are made, programs bring the shared libraries that they need.
//!
//! What must never happen: an entry before its folder. The kernel unpacks in order and leaves out what has no parent.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::RigError;
use crate::cpio::Archive;

/// Files, folders and programs for a kernel to unpack.
#[derive(Debug, Default)]
pub struct Image {
    archive: Archive,
    known: BTreeSet<PathBuf>,
}

impl Image {
    /// An empty file system.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A folder and its parents.
    pub fn folder(&mut self, path: &str) {
        self.folder_at(Path::new(path));
    }

    fn folder_at(&mut self, path: &Path) {
        let mut parents: Vec<_> = path.ancestors().filter(|path| *path != Path::new("/")).collect();
        parents.reverse();
        for parent in parents {
            if self.known.insert(parent.to_path_buf()) {
                self.archive.directory(&parent.to_string_lossy());
            }
        }
    }

    /// The console, which the kernel opens before its init.
    pub fn console(&mut self) {
        self.folder("/dev");
        self.archive.character_device("/dev/console", 5, 1);
    }

    /// A file with this content. The first one of a path stays.
    pub fn content(&mut self, path: &str, content: &[u8]) {
        let path = Path::new(path);
        if !self.known.insert(path.to_path_buf()) {
            return;
        }
        if let Some(parent) = path.parent() {
            self.folder_at(parent);
        }
        self.archive.file(&path.to_string_lossy(), content);
    }

    /// A copy of `file` at `path`.
    pub fn file(&mut self, path: &str, file: &Path) -> Result<(), RigError> {
        let what = format!("cannot read {}", file.display());
        self.content(path, &std::fs::read(file).map_err(RigError::host(what))?);
        Ok(())
    }

    /// A copy of a program at `path`, and every shared library that it needs.
    pub fn program(&mut self, path: &str, program: &Path) -> Result<(), RigError> {
        self.libraries_of(program)?;
        self.file(path, program)
    }

    /// The shared libraries that `program` (or a library that is loaded later) needs, where the loader looks for them.
    pub fn libraries_of(&mut self, program: &Path) -> Result<(), RigError> {
        for library in libraries(program)? {
            self.file(&library.to_string_lossy(), &library)?;
        }
        Ok(())
    }

    /// The archive.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.archive.finish()
    }
}

/// Asks the dynamic loader, as `ldd` does: lines like `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, RigError> {
    let what = format!("cannot list the libraries of {}", program.display());
    let output = Command::new("/lib64/ld-linux-x86-64.so.2")
        .arg("--list")
        .arg(program)
        .output()
        .map_err(RigError::host(what))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if let Some(missing) = text.lines().find(|line| line.ends_with("not found")) {
        return Err(RigError::Missing(format!("{} needs a library:{missing}", program.display())));
    }
    let paths = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(PathBuf::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_brings_its_libraries_and_folders_come_first() {
        let mut image = Image::new();
        let program = std::env::current_exe().unwrap();
        image.program("/lab/bin/me", &program).unwrap();
        let libc = image.known.iter().find(|path| path.to_string_lossy().contains("libc.so")).cloned();
        let folder = libc.as_deref().and_then(Path::parent).map(Path::to_path_buf);
        assert!(folder.is_some_and(|folder| image.known.contains(&folder)));
        let bytes = image.finish();
        let at = |name: &str| bytes.windows(name.len()).position(|window| window == name.as_bytes());
        assert!(at("lab\0") < at("lab/bin\0") && at("lab/bin\0") < at("lab/bin/me\0"));
    }
}
