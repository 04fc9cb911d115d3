//! Files that are whole or absent: written under another name, synced, renamed, and the folder
//! synced. Every step of `prepare` that a restart relies on goes through here.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::DataError;

/// Writes `path` through `fill`; returns what `fill` does.
pub(super) fn write<T>(
    path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> Result<T, DataError>,
) -> Result<T, DataError> {
    let aside = path.with_added_extension("tmp");
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&aside).map_err(DataError::io(&aside, "create"))?);
    let result = fill(&mut file)?;
    let file = file.into_inner().map_err(|e| DataError::io(&aside, "write")(e.into_error()))?;
    file.sync_all().map_err(DataError::io(&aside, "sync"))?;
    rename(&aside, path)?;
    Ok(result)
}

pub(super) fn write_bytes(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    write(path, |file| file.write_all(bytes).map_err(DataError::io(path, "write")))
}

pub(super) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<Vec<u8>, DataError> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("plain structs serialise");
    bytes.push(b'\n');
    write_bytes(path, &bytes)?;
    Ok(bytes)
}

/// A file that an earlier run may have finished.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, DataError> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| DataError::Manifest { path: path.to_owned(), reason: e.to_string() }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(DataError::io(path, "read")(error)),
    }
}

/// Renames a file or folder that is already synced, and makes the rename itself last.
pub(super) fn rename(from: &Path, to: &Path) -> Result<(), DataError> {
    fs::rename(from, to).map_err(DataError::io(to, "rename into place"))?;
    let parent = parent(to);
    File::open(parent).and_then(|folder| folder.sync_all()).map_err(DataError::io(parent, "sync"))
}

/// The folder that holds `path`'s entry.
pub(super) fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

pub(super) fn make_folder(path: &Path) -> Result<(), DataError> {
    fs::create_dir_all(path).map_err(DataError::io(path, "create"))
}
