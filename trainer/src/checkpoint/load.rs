//! Checking: nothing is taken from a file whose hash is not the manifest's.
use super::each::each;
use super::manifest::{FileEntry, Manifest, TensorEntry};
use super::pass::Wanted;
use super::second_tier::SecondTier;
use super::shard::Summed;
use super::{Reader, list, unfinished};
use crate::coordinator::{all_or_none, shared};
use anyhow::{Context, Result, anyhow, ensure};
use parallel::comm::{Communicator, broadcast_bytes, gather_bytes};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use tch::{Device, Tensor};

/// Every file present, whole and unchanged, and every tensor complete. Every core reads a file.
pub fn verify(checkpoint: &Path) -> Result<Manifest> {
    let manifest = check_manifest(checkpoint)?;
    each(manifest.files.len(), || Ok(()), |(), index| check_file(checkpoint, &manifest.files[index], &[]))?;
    Ok(manifest)
}

/// The manifest, and that every file is there and as long as it says: what is in them, `verify` reads.
pub fn inspect(checkpoint: &Path) -> Result<Manifest> {
    let manifest = check_manifest(checkpoint)?;
    for entry in &manifest.files {
        let path = checkpoint.join(&entry.name);
        let length = path.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
        ensure!(length == entry.bytes, "{} has {length} bytes, {} were written", path.display(), entry.bytes);
    }
    Ok(manifest)
}

/// The manifest is sound, is its folder's, and every row of every tensor is in some file.
fn check_manifest(checkpoint: &Path) -> Result<Manifest> {
    let manifest = Manifest::read(checkpoint)?;
    if let Some(step) = step_of(checkpoint) {
        ensure!(manifest.step == step, "{} holds step {}: it was renamed", checkpoint.display(), manifest.step);
    }
    for (name, tensor) in &manifest.tensors {
        complete(tensor).with_context(|| format!("{}: {name}", checkpoint.display()))?;
    }
    Ok(manifest)
}

/// Of `…/step-00000120`.
pub(super) fn step_of(checkpoint: &Path) -> Option<u64> {
    checkpoint.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

fn complete(tensor: &TensorEntry) -> Result<()> {
    let total = tensor.shape.first().copied().unwrap_or(1);
    let mut slices: Vec<(i64, i64)> = tensor.slices.iter().map(|slice| (slice.start, slice.rows)).collect();
    slices.sort();
    let mut covered = 0;
    for (start, rows) in slices {
        ensure!(start == covered, "row {} of {total} is in no file or in two", start.min(covered));
        covered += rows;
    }
    ensure!(covered == total, "has {covered} of {total} rows");
    Ok(())
}

/// Why a checkpoint, or a file of one, is not taken.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Refused {
    pub words: String,
    /// It could not be read, and may be what was written.
    pub unread: bool,
}

impl From<anyhow::Error> for Refused {
    fn from(error: anyhow::Error) -> Refused {
        // A file that is gone, or ends too early, is not what was written.
        let unread = |error: &std::io::Error| !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::UnexpectedEof);
        let unread = error.chain().filter_map(|cause| cause.downcast_ref()).any(unread);
        Refused { words: format!("{error:#}"), unread }
    }
}

/// Takes what is wanted of it on the way.
pub(super) fn check_file(checkpoint: &Path, entry: &FileEntry, wanted: &[Wanted]) -> Result<()> {
    Summed { bytes: entry.bytes, blake3: entry.blake3.clone() }.check(&checkpoint.join(&entry.name), wanted)
}

/// The newest checkpoint whose every byte is right, and a line for each newer one that was passed over. Collective: the
/// ranks share out the files, and all get the same answer.
pub fn newest_whole(world: &dyn Communicator, run_dir: &Path) -> Result<(Option<PathBuf>, Vec<String>)> {
    let found = load_newest(world, run_dir, None, &mut |_| Ok(()))?;
    Ok((found.newest.map(|(path, _)| path), found.notes))
}

pub struct Found {
    /// What was loaded.
    pub newest: Option<(PathBuf, Manifest)>,
    /// Newer ones, passed over: they are not what was written.
    pub damaged: Vec<PathBuf>,
    /// For the operator.
    pub notes: Vec<String>,
}

/// `newest_whole` of both tiers, with `load` reading it as `load_whole` has it.
pub fn load_newest(
    world: &dyn Communicator,
    run_dir: &Path,
    tier: Option<&SecondTier>,
    load: &mut dyn FnMut(&mut Reader) -> Result<()>,
) -> Result<Found> {
    let (all, mut notes) = listed(world, run_dir)?;
    let mut damaged = Vec::new();
    // Below each checkpoint's step, then below all: what the second tier has that is newer comes first.
    for path in all.iter().rev().map(Some).chain([None]) {
        let above = path.and_then(|path| step_of(path));
        let (restored, said) = tier.map_or(Ok((None, Vec::new())), |tier| tier.restore(world, run_dir, above))?;
        notes.extend(said.into_iter().filter(|line| !notes.contains(line)).collect::<Vec<_>>());
        let Some(path) = restored.as_ref().or(path) else { break };
        match load_whole(world, path, load)? {
            Ok(()) => {
                damaged.retain(|other| other != path); // what the second tier had of that step took its place
                return Ok(Found { newest: Some((path.clone(), Manifest::read(path)?)), damaged, notes });
            }
            // Not they, but the disk is to blame.
            Err(damage) if restored.is_some() => {
                let words = format!("{} was whole when it was made of the second tier's copies, which are kept: {damage}", path.display());
                return Err(shared(words));
            }
            Err(damage) => {
                notes.push(format!("{} is damaged and was passed over: {damage}", path.display()));
                damaged.push(path.clone());
            }
        }
    }
    Ok(Found { newest: None, damaged, notes })
}

/// Collective: the ranks share out the files of a checkpoint and check each in the pass in which `load` reads it. What `load`
/// came to counts only where all is then as it was written; of a damaged checkpoint, the inner error, it may get anything, or
/// fail. One that cannot be read may be whole, and whoever starts the run is to say what to do about it.
pub fn load_whole(world: &dyn Communicator, path: &Path, load: &mut dyn FnMut(&mut Reader) -> Result<()>) -> Result<Result<(), String>> {
    let (loaded, checked) = load_checked((world.rank(), world.size()), path, load);
    let mut unread = None;
    for (rank, bytes) in gather_bytes(world, &serde_json::to_vec(&checked.err())?)?.iter().enumerate() {
        match serde_json::from_slice::<Option<Refused>>(bytes)? {
            Some(Refused { words, unread: false }) => return Ok(Err(words)),
            Some(Refused { words, .. }) => unread = unread.or(Some((rank, words))),
            None => {}
        }
    }
    if let Some((rank, words)) = unread {
        return Err(shared(format!("rank {rank}: {} could not be read and may be whole (mend that, or move it away): {words}", path.display())));
    }
    all_or_none(world, loaded)?;
    Ok(Ok(()))
}

/// A run's checkpoints, oldest first, and a line for each that was never finished: rank 0's view, for all.
fn listed(world: &dyn Communicator, run_dir: &Path) -> Result<(Vec<PathBuf>, Vec<String>)> {
    let listed: Result<(Vec<PathBuf>, Vec<PathBuf>), String> = match world.rank() {
        0 => list(run_dir).and_then(|all| Ok((all.into_iter().map(|(_, path)| path).collect(), unfinished(run_dir)?))),
        _ => Ok(Default::default()),
    }
    .map_err(|error: anyhow::Error| format!("{error:#}"));
    let listed: Result<(Vec<PathBuf>, Vec<PathBuf>), String> =
        serde_json::from_slice(&broadcast_bytes(world, &serde_json::to_vec(&listed)?, 0)?)?;
    let (all, unfinished) = listed.map_err(|text| shared(format!("rank 0: {text}")))?;
    Ok((all, unfinished.iter().map(|path| format!("{} was never finished", path.display())).collect()))
}

/// What loading came to, and whether that counts: the manifest and this rank's share of the files are as they were written.
fn load_checked(
    share: (usize, usize),
    path: &Path,
    load: &mut dyn FnMut(&mut Reader) -> Result<()>,
) -> (Result<()>, Result<(), Refused>) {
    match check_manifest(path).and_then(|_| Reader::checking(path, share)) {
        Ok(mut reader) => {
            let loaded = load(&mut reader);
            assert!(loaded.is_err() || reader.has_read(), "`load` did not read what it wanted");
            (loaded, reader.checked())
        }
        Err(error) => (Ok(()), Err(error.into())),
    }
}

/// Of the lowest rank that has one; the same on all.
pub(super) fn first_error(world: &dyn Communicator, mine: Result<()>) -> Result<Option<String>> {
    let mine = mine.err().map(|error| format!("{error:#}"));
    for bytes in gather_bytes(world, &serde_json::to_vec(&mine)?)? {
        if let Some(error) = serde_json::from_slice::<Option<String>>(&bytes)? {
            return Ok(Some(error));
        }
    }
    Ok(None)
}

/// The tensors whose name `wanted` accepts, whole, on the CPU; of a checkpoint whose every byte is right.
pub fn load(checkpoint: &Path, wanted: impl Fn(&str) -> bool) -> Result<(Manifest, HashMap<String, Tensor>)> {
    let mut reader = check_manifest(checkpoint).and_then(|_| Reader::checking(checkpoint, (0, 1)))?;
    let mut tensors = HashMap::new();
    for name in reader.manifest().tensors.keys().filter(|name| wanted(name)).cloned().collect::<Vec<_>>() {
        let target = Tensor::empty(reader.shape(&name)?, (reader.kind(&name)?, Device::Cpu));
        reader.fill(&name, &target.size(), 0, &target)?;
        tensors.insert(name, target);
    }
    reader.read()?;
    let manifest = reader.manifest().clone();
    reader.checked().map_err(|refused| anyhow!(refused.words))?;
    Ok((manifest, tensors))
}
