//! Writing: each rank its own shard, the coordinator (rank 0) the manifest once every shard's hash has arrived.
use super::manifest::{FileEntry, Manifest, SliceEntry, TensorEntry};
use super::{entries, folder, shard};
use crate::state::StatePart;
use crate::coordinator::shared;
use anyhow::{Context, Result, anyhow, bail};
use parallel::comm::{Communicator, barrier, broadcast_bytes, gather_bytes_at};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use tch::Tensor;

/// What a rank tells the coordinator of its shard.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Written {
    pub file: FileEntry,
    pub tensors: Vec<(String, TensorEntry)>,
}

/// Collective, and done when it returns: for what is no run. `parts` are this rank's; no two ranks have the same rows. On
/// any rank's failure nothing is left, and every rank gets the error.
pub fn save(world: &dyn Communicator, run_dir: &Path, head: Manifest, parts: Vec<StatePart>) -> Result<PathBuf> {
    let place = Place::of(run_dir, head.step);
    begin(world, &place)?;
    let (outline, tensor) = at_hand(parts);
    let written = write_shard(&place.partial, (world.rank(), world.size()), outline, tensor).map_err(|error| format!("{error:#}"));
    let all = gather_written(world, &written)?;
    let outcome = if world.rank() == 0 { commit(&place, head, all).map_err(|error| format!("{error:#}")) } else { Ok(()) };
    share(world, outcome)?.map_err(|error| shared(format!("checkpoint {} was not written: {error}", place.name)))?;
    Ok(place.target)
}

/// Where a step's checkpoint is written, and what it becomes.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub name: String,
    pub partial: PathBuf,
    pub target: PathBuf,
}

impl Place {
    pub fn of(run_dir: &Path, step: u64) -> Place {
        let name = format!("step-{step:08}");
        let folder = folder(run_dir);
        Place { partial: folder.join(format!(".{name}.partial")), target: folder.join(&name), name }
    }
}

/// Rank 0's outcome on every rank.
pub(super) fn share<T: Serialize + DeserializeOwned>(world: &dyn Communicator, outcome: Result<T, String>) -> Result<Result<T, String>> {
    Ok(serde_json::from_slice(&broadcast_bytes(world, &serde_json::to_vec(&outcome)?, 0)?)?)
}

/// Collective: rank 0 makes the folder to write in, and removes what crashes left.
pub(super) fn begin(world: &dyn Communicator, place: &Place) -> Result<()> {
    let made = if world.rank() == 0 { make_room(&place.partial) } else { Ok(()) };
    share(world, made.map_err(|error| format!("{error:#}")))?.map_err(|error| shared(format!("rank 0: {error}")))
}

/// Collective: rank 0 removes what was written of a checkpoint that comes to nothing. Best effort: every reader ignores it.
pub(super) fn discard(world: &dyn Communicator, place: &Place) -> Result<()> {
    if world.rank() == 0 {
        let _ = std::fs::remove_dir_all(&place.partial);
    }
    Ok(barrier(world)?) // who ends now ends all, and it may take a while
}

pub(super) fn make_room(partial: &Path) -> Result<()> {
    let hidden = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(".step-"));
    for left in entries(partial.parent().expect("in the checkpoint folder"))?.into_iter().filter(hidden) {
        let removed = std::fs::remove_dir_all(&left).with_context(|| format!("cannot remove {}", left.display()));
        // Somebody may still read in another: no reader takes it for a checkpoint, and the next save removes it.
        match removed {
            Err(error) if left == partial => return Err(error),
            Err(error) => tracing::warn!("{error:#}"),
            Ok(()) => {}
        }
    }
    std::fs::create_dir_all(partial).with_context(|| format!("cannot make {}", partial.display()))
}

pub(super) fn shard_name(rank: usize, ranks: usize) -> String {
    format!("shard-{rank:05}-of-{ranks:05}.safetensors")
}

/// What a shard is to hold: its tensors may come later.
pub(super) struct Outline {
    tensors: Vec<shard::Entry>,
    /// (first row, rows of the whole) of each.
    places: Vec<(i64, i64)>,
}

impl Outline {
    pub fn of<'a>(parts: impl Iterator<Item = &'a StatePart>) -> Outline {
        let one = |part: &StatePart| (shard::Entry::of(&part.name, &part.tensor), (part.start, part.total));
        let (tensors, places) = parts.map(one).unzip();
        Outline { tensors, places }
    }
}

/// What `write_shard` wants of parts that are there.
pub(super) fn at_hand(parts: Vec<StatePart>) -> (Outline, impl FnMut(usize) -> Result<Tensor> + Send) {
    let outline = Outline::of(parts.iter());
    let tensors: Vec<Tensor> = parts.into_iter().map(|part| part.tensor).collect();
    (outline, move |index: usize| Ok(tensors[index].shallow_clone()))
}

/// The shard of `rank` of so many ranks into `folder`; `tensor(i)` is the outline's i-th.
pub(super) fn write_shard(
    folder: &Path,
    (rank, ranks): (usize, usize),
    Outline { tensors, places }: Outline,
    tensor: impl FnMut(usize) -> Result<Tensor> + Send,
) -> Result<Written> {
    let name = shard_name(rank, ranks);
    let summed = shard::write(&folder.join(&name), &tensors, tensor)?;
    let tensors = described(&name, &tensors, places.into_iter());
    Ok(Written { tensors, file: FileEntry { name, bytes: summed.bytes, blake3: summed.blake3 } })
}

/// A file's tensors as the manifest names them; `places` are (first row, rows of the whole) of each.
pub(super) fn described(file: &str, tensors: &[shard::Entry], places: impl Iterator<Item = (i64, i64)>) -> Vec<(String, TensorEntry)> {
    let entry = |(tensor, (start, total)): (&shard::Entry, (i64, i64))| {
        let mut shape = tensor.shape.clone();
        let slices = vec![SliceEntry { file: file.to_string(), start, rows: shape[0] }];
        shape[0] = total;
        (tensor.name.clone(), TensorEntry { dtype: format!("{:?}", shard::dtype(tensor.kind)), shape, slices })
    };
    tensors.iter().zip(places).map(entry).collect()
}

/// On rank 0, which alone needs them, every rank's, in rank order; an error names its rank.
pub(super) fn gather_written(world: &dyn Communicator, mine: &Result<Written, String>) -> Result<Vec<Result<Written, String>>> {
    let all = gather_bytes_at(world, &serde_json::to_vec(mine)?, 0)?;
    let named = |(rank, bytes): (usize, &Vec<u8>)| {
        // The others go on to hear rank 0's outcome: it must not leave before.
        let told: Result<Written, String> = serde_json::from_slice(bytes).unwrap_or_else(|error| Err(error.to_string()));
        told.map_err(|error| format!("rank {rank}: {error}"))
    };
    Ok(all.iter().enumerate().map(named).collect())
}

/// The manifest is the last file; the rename makes the checkpoint exist. On failure nothing is left.
pub(super) fn commit(place: &Place, mut manifest: Manifest, all: Vec<Result<Written, String>>) -> Result<()> {
    let mut failures = Vec::new();
    for written in all {
        match written {
            Ok(written) => manifest.add(written.file, written.tensors),
            Err(error) => failures.push(error),
        }
    }
    let outcome = if failures.is_empty() { put_in_place(place, &manifest) } else { Err(anyhow!(failures.join("; "))) };
    if outcome.is_err() {
        // Best effort: what cannot be removed is ignored by every reader.
        let _ = std::fs::remove_dir_all(&place.partial);
    }
    outcome
}

fn put_in_place(Place { partial, target, .. }: &Place, manifest: &Manifest) -> Result<()> {
    manifest.write(partial)?;
    // The same step again, after a resume from further back: its content is the same by construction.
    rename_into_place(partial, target, true)
}

/// Its files are synced; a folder that is `replaced` goes once the new one is, another is refused by the rename.
fn rename_into_place(partial: &Path, target: &Path, replaced: bool) -> Result<()> {
    let finish = || -> std::io::Result<()> {
        std::fs::File::open(partial)?.sync_all()?;
        if replaced && target.exists() {
            std::fs::remove_dir_all(target)?;
        }
        std::fs::rename(partial, target)?;
        std::fs::File::open(target.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new(".")))?.sync_all()
    };
    finish().with_context(|| format!("cannot rename {} into place", partial.display()))
}

/// For the write of one process alone, outside a run: a folder `out` of what `write` puts into `partial`, whole or absent.
pub(super) fn write_aside<T>(partial: &Path, out: &Path, write: impl FnOnce() -> Result<T>) -> Result<T> {
    if partial.exists() {
        // A crash left it.
        std::fs::remove_dir_all(partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    std::fs::create_dir_all(partial).with_context(|| format!("cannot make {}", partial.display()))?;
    let all = || {
        let written = write()?;
        let sync = |path: PathBuf| std::fs::File::open(&path).and_then(|file| file.sync_all()).with_context(|| format!("cannot write {}", path.display()));
        entries(partial)?.into_iter().try_for_each(sync)?;
        rename_into_place(partial, out, false).map(|()| written)
    };
    all().inspect_err(|_| drop(std::fs::remove_dir_all(partial)))
}

/// Before it reads for hours.
pub(super) fn refuse_existing(out: &Path) -> Result<()> {
    if out.exists() {
        bail!("{} exists already", out.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_removed_is_in_the_way_only_where_a_save_is_to_write() {
        let run = tempfile::tempdir().expect("a folder");
        let place = Place::of(run.path(), 8);
        let [others, busy] = [".step-00000004.partial", ".step-00000003.removed"].map(|name| folder(run.path()).join(name));
        std::fs::create_dir_all(&others).expect("a folder");
        std::fs::write(&busy, "a folder that cannot be removed is more than this test can make").expect("written");
        make_room(&place.partial).expect("room");
        assert!(place.partial.is_dir() && !others.exists() && busy.exists());
        std::fs::remove_dir(&place.partial).and_then(|()| std::fs::write(&place.partial, "")).expect("written");
        let error = format!("{:#}", make_room(&place.partial).expect_err("in the way"));
        assert!(error.contains("cannot remove ") && error.contains(".step-00000008.partial"), "{error}");
    }

    #[test]
    fn what_is_written_aside_is_whole_or_absent_and_in_nobodys_place() {
        let folder = tempfile::tempdir().expect("a folder");
        let [partial, out] = [".out.partial", "out"].map(|name| folder.path().join(name));
        let write = |text: &str| std::fs::write(partial.join("file"), text).context("no room");
        std::fs::create_dir_all(partial.join("of a crash")).expect("a folder");
        write_aside(&partial, &out, || write("whole")).expect("written");
        assert!(!partial.exists() && !out.join("of a crash").exists());
        // Somebody was faster.
        let error = write_aside(&partial, &out, || write("late")).expect_err("it is there");
        assert!(format!("{error:#}").contains(".out.partial into place"), "{error:#}");
        assert_eq!(std::fs::read_to_string(out.join("file")).expect("as it was"), "whole");
        let error = write_aside(&partial, &folder.path().join("other"), || write("half").and_then(|()| -> Result<()> { bail!("no room") }));
        assert_eq!((error.expect_err("half").to_string().as_str(), std::fs::read_dir(folder.path()).expect("a folder").count()), ("no room", 1));
    }
}
