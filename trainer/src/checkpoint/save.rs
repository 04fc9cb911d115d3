//! Writing: each rank its own shard, the coordinator (rank 0) the manifest once every shard's hash has arrived.
use super::manifest::{FileEntry, Manifest, SliceEntry, TensorEntry};
use super::{folder, list, shard, unfinished};
use crate::state::StatePart;
use anyhow::{Context, Result, bail};
use parallel::comm::{Communicator, broadcast_bytes, gather_bytes};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What a rank tells the coordinator of its shard.
#[derive(Serialize, Deserialize)]
struct Written {
    file: FileEntry,
    tensors: Vec<(String, TensorEntry)>,
}

/// Collective. `parts` are this rank's; no two ranks have the same rows. On any rank's
/// failure nothing is left, and every rank gets the error.
pub fn save(world: &dyn Communicator, run_dir: &Path, head: Manifest, parts: Vec<StatePart>, keep_last: usize) -> Result<PathBuf> {
    let step = head.step;
    let name = format!("step-{step:08}");
    let partial = folder(run_dir).join(format!(".{name}.partial"));
    let start = if world.rank() == 0 { begin(run_dir, &partial) } else { Ok(()) };
    let started = share(world, start.map_err(|error| format!("{error:#}")))?;
    if let Err(error) = started {
        bail!(error);
    }
    let written = write_share(world, &partial, parts).map_err(|error| format!("rank {}: {error:#}", world.rank()));
    let all = gather_bytes(world, &serde_json::to_vec(&written)?)?;
    let target = folder(run_dir).join(&name);
    let outcome = if world.rank() == 0 { commit(&partial, &target, head, &all).map_err(|error| format!("{error:#}")) } else { Ok(()) };
    if let Err(error) = share(world, outcome)? {
        bail!("checkpoint {name} was not written: {error}");
    }
    if world.rank() == 0 {
        // The checkpoint is there; what is left too long is no reason to end a run.
        if let Err(error) = prune(run_dir, step, keep_last) {
            tracing::warn!("{error:#}");
        }
    }
    Ok(target)
}

/// Rank 0's outcome on every rank.
fn share(world: &dyn Communicator, outcome: Result<(), String>) -> Result<Result<(), String>> {
    Ok(serde_json::from_slice(&broadcast_bytes(world, &serde_json::to_vec(&outcome)?, 0)?)?)
}

fn begin(run_dir: &Path, partial: &Path) -> Result<()> {
    for left in unfinished(run_dir)? {
        std::fs::remove_dir_all(&left).with_context(|| format!("cannot remove {}", left.display()))?;
    }
    std::fs::create_dir_all(partial).with_context(|| format!("cannot make {}", partial.display()))
}

fn write_share(world: &dyn Communicator, partial: &Path, parts: Vec<StatePart>) -> Result<Written> {
    let file = format!("shard-{:05}-of-{:05}.safetensors", world.rank(), world.size());
    let entries = parts.iter().map(|part| {
        let mut shape = part.tensor.size();
        let slices = vec![SliceEntry { file: file.clone(), start: part.start, rows: shape[0] }];
        shape[0] = part.total;
        (part.name.clone(), TensorEntry { dtype: format!("{:?}", shard::dtype(part.tensor.kind())), shape, slices })
    });
    let entries = entries.collect();
    let tensors = parts.into_iter().map(|part| (part.name, part.tensor)).collect();
    let path = partial.join(&file);
    shard::write(&path, tensors)?;
    Ok(Written { file: FileEntry { name: file, bytes: path.metadata()?.len(), blake3: hash(&path)? }, tensors: entries })
}

pub(super) fn hash(path: &Path) -> Result<String> {
    let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// The manifest is the last file; the rename makes the checkpoint exist.
fn commit(partial: &Path, target: &Path, mut manifest: Manifest, all: &[Vec<u8>]) -> Result<()> {
    let mut failures = Vec::new();
    for bytes in all {
        match serde_json::from_slice::<Result<Written, String>>(bytes)? {
            Ok(written) => {
                manifest.files.push(written.file);
                for (name, entry) in written.tensors {
                    match manifest.tensors.get_mut(&name) {
                        Some(known) => known.slices.extend(entry.slices),
                        None => drop(manifest.tensors.insert(name, entry)),
                    }
                }
            }
            Err(error) => failures.push(error),
        }
    }
    let finish = || -> Result<()> {
        let path = partial.join("manifest.json");
        std::fs::write(&path, serde_json::to_vec_pretty(&manifest)?).with_context(|| format!("cannot write {}", path.display()))?;
        std::fs::File::open(&path)?.sync_all()?;
        std::fs::File::open(partial)?.sync_all()?;
        if target.exists() {
            // The same step again, after a resume from further back: its content is the same by construction.
            std::fs::remove_dir_all(target)?;
        }
        std::fs::rename(partial, target).with_context(|| format!("cannot rename {} into place", partial.display()))?;
        Ok(std::fs::File::open(target.parent().expect("in the checkpoint folder"))?.sync_all()?)
    };
    let outcome = if failures.is_empty() { finish() } else { Err(anyhow::anyhow!(failures.join("; "))) };
    if outcome.is_err() {
        // Best effort: what cannot be removed is ignored by every reader.
        let _ = std::fs::remove_dir_all(partial);
    }
    outcome
}

/// Keeps the newest `keep_last` up to `step`. A later one was passed over as damaged: it counts for nothing.
fn prune(run_dir: &Path, step: u64, keep_last: usize) -> Result<()> {
    let all: Vec<_> = list(run_dir)?.into_iter().filter(|(at, _)| *at <= step).collect();
    for (_, path) in &all[..all.len().saturating_sub(keep_last)] {
        std::fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}
