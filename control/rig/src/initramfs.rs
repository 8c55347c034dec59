//! The guest's first and only file system: the init, the shared libraries that it needs, and the disk's modules.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::RigError;
use crate::assets::Assets;
use crate::cpio::Archive;

/// Builds the archive. It is made anew for every guest, so that it always holds the init that was built last.
pub(crate) fn build(assets: &Assets) -> Result<Vec<u8>, RigError> {
    let mut archive = Archive::new();
    archive.directory("/dev");
    archive.character_device("/dev/console", 5, 1);
    archive.directory("/proc");
    archive.directory("/modules");
    add(&mut archive, "/init", &assets.init)?;
    for (order, module) in assets.modules.iter().enumerate() {
        add(&mut archive, &format!("/modules/{order}.ko"), module)?;
    }
    let mut known = Vec::new();
    for library in libraries(&assets.init)? {
        add_parents(&mut archive, &library, &mut known);
        add(&mut archive, &library.to_string_lossy(), &library)?;
    }
    Ok(archive.finish())
}

fn add(archive: &mut Archive, name: &str, file: &Path) -> Result<(), RigError> {
    let content = std::fs::read(file).map_err(RigError::host(format!("cannot read {}", file.display())))?;
    archive.file(name, &content);
    Ok(())
}

fn add_parents(archive: &mut Archive, file: &Path, known: &mut Vec<PathBuf>) {
    let mut parents: Vec<_> = file.ancestors().skip(1).filter(|path| *path != Path::new("/")).collect();
    parents.reverse();
    for parent in parents {
        if !known.iter().any(|path| path == parent) {
            archive.directory(&parent.to_string_lossy());
            known.push(parent.to_path_buf());
        }
    }
}

/// Asks the dynamic loader, as `ldd` does: lines like `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, RigError> {
    let what = format!("cannot list the libraries of {}", program.display());
    let output =
        Command::new(program).env("LD_TRACE_LOADED_OBJECTS", "1").output().map_err(RigError::host(what))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let paths = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(PathBuf::from).collect())
}
