//! Checkpoints: safetensors shards of *logical* tensors and a manifest, in a folder that is whole or absent.
//!
//! A checkpoint is written into `.step-N.partial`, every file and the folder synced, and renamed to `step-N`. A
//! layout never shows in it but in the slices' bounds, so any layout can read what any other wrote.
mod direct;
mod each;
pub mod hf;
mod load;
mod manifest;
mod pass;
mod place;
mod read;
mod reshard;
mod retention;
mod save;
mod saver;
pub mod second_tier;
mod shard;
mod staging;

pub use load::{Found, inspect, load, load_newest, load_whole, newest_whole, verify};
pub use manifest::{Cursor, Manifest, Mesh, Progress};
pub use place::{MARKER, copies};
pub use read::Reader;
pub use reshard::{Resharded, reshard};
pub use retention::{Pruned, Retention, prune};
pub use save::save;
pub use saver::{Saved, Saver};

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

pub fn folder(run_dir: &Path) -> PathBuf {
    run_dir.join("checkpoints")
}

/// Checkpoints of a run that were renamed into place, oldest first.
pub fn list(run_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let folder = folder(run_dir);
    let mut found: Vec<(u64, PathBuf)> = entries(&folder)?
        .into_iter()
        .filter_map(|path| Some((path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?, path)))
        .collect();
    found.sort();
    Ok(found)
}

/// Renames a damaged checkpoint to `damaged-step-N`, where nobody resumes from it or counts it among the newest.
pub fn set_aside(path: &Path) -> Result<PathBuf> {
    let name = format!("damaged-{}", path.file_name().and_then(|name| name.to_str()).unwrap_or_default());
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    let names = std::iter::once(name.clone()).chain(numbered).map(|name| path.with_file_name(name));
    let aside = names.into_iter().find(|aside| !aside.exists()).expect("some number is free");
    std::fs::rename(path, &aside).with_context(|| format!("cannot rename {} to {}", path.display(), aside.display()))?;
    Ok(aside)
}

/// Folders that a crash in mid-write left behind.
pub fn unfinished(run_dir: &Path) -> Result<Vec<PathBuf>> {
    let partial = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.ends_with(".partial"));
    Ok(entries(&folder(run_dir))?.into_iter().filter(partial).collect())
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let cannot = || format!("cannot list {}", folder.display());
    let read = match std::fs::read_dir(folder) {
        // Any other error may hide some.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        read => read.with_context(cannot)?,
    };
    read.map(|entry| Ok(entry.with_context(cannot)?.path())).collect()
}
