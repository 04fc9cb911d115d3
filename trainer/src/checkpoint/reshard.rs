//! A checkpoint's tensors shared out anew over another number of files. Any layout reads any checkpoint; this is for storage
//! and readers that want more, or fewer, files than there were writers.
use super::load::step_of;
use super::manifest::FileEntry;
use super::save::{described, refuse_existing, shard_name, write_aside};
use super::{Manifest, Reader, inspect, shard, verify};
use anyhow::{Context, Result, ensure};
use std::path::Path;

pub struct Resharded {
    pub manifest: Manifest,
    /// Of tensors: each byte once.
    pub bytes_read: u64,
}

/// `checkpoint` → `out`, which must not exist, in so many files: the k-th holds the k-th of equal shares of every tensor's
/// rows. One tensor's share is in memory at a time.
pub fn reshard(checkpoint: &Path, out: &Path, files: usize) -> Result<Resharded> {
    ensure!(files >= 1, "--files 0: a checkpoint has at least one");
    refuse_existing(out)?;
    let rows = inspect(checkpoint)?.tensors.values().map(|tensor| tensor.shape[0]).max().unwrap_or(1);
    ensure!(files as u64 <= rows as u64, "--files {files}: no tensor has more than {rows} rows, and a file would be empty");
    let mut manifest = verify(checkpoint)?;
    let (step, named) = (manifest.step, step_of(out));
    ensure!(named.is_none_or(|named| named == step), "{}: {} holds step {step}: the copy would count as renamed", out.display(), checkpoint.display());
    let mut reader = Reader::open(checkpoint)?;
    let out = &std::path::absolute(out)?;
    let name = out.file_name().and_then(|name| name.to_str()).with_context(|| format!("{} names no folder", out.display()))?;
    let partial = &out.with_file_name(format!(".{name}.partial"));
    let tensors = std::mem::take(&mut manifest.tensors);
    manifest.files.clear();
    let mut write = |file: usize| -> Result<_> {
        let (mut entries, mut starts) = (Vec::new(), Vec::new());
        for (name, tensor) in &tensors {
            let share = |part: usize| tensor.shape[0] * part as i64 / files as i64;
            let (start, end) = (share(file), share(file + 1));
            if start < end {
                let mut shape = tensor.shape.clone();
                shape[0] = end - start;
                entries.push(shard::Entry { name: name.clone(), kind: reader.kind(name)?, shape });
                starts.push((start, tensor.shape[0]));
            }
        }
        let name = shard_name(file, files);
        let read = |index: usize| {
            let entry: &shard::Entry = &entries[index];
            reader.rows(&entry.name, &tensors[&entry.name].shape, starts[index].0, entry.shape[0])
        };
        let summed = shard::write(&partial.join(&name), &entries, read)?;
        let described = described(&name, &entries, starts.iter().copied());
        Ok((FileEntry { name, bytes: summed.bytes, blake3: summed.blake3 }, described))
    };
    write_aside(partial, out, || {
        for file in 0..files {
            let (file, described) = write(file)?;
            manifest.add(file, described);
        }
        manifest.write(partial)
    })?;
    Ok(Resharded { manifest, bytes_read: reader.tensor_bytes_read() })
}
