//! The guest's first and only file system: the init, the shared libraries that it needs, and the disk's modules.

use crate::RigError;
use crate::assets::GuestFiles;
use crate::image::Image;

/// Builds the archive. It is made anew for every guest, so that it always holds the init that was built last.
pub(crate) fn build(files: &GuestFiles) -> Result<Vec<u8>, RigError> {
    let mut image = Image::new();
    image.console();
    image.folder("/proc");
    image.folder("/sys");
    image.folder("/modules");
    image.program("/init", &files.init)?;
    for (order, module) in files.modules.iter().enumerate() {
        image.file(&format!("/modules/{order}.ko"), module)?;
    }
    Ok(image.finish())
}
