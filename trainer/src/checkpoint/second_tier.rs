//! A second tier of checkpoints: every few steps each rank's shard goes to a folder of its own node's, memory (/dev/shm) or a
//! local disk, and to one of another node's where there are several. It outlives the processes; and where one node and
//! what it held are gone, the others' copies still are every shard. What it holds becomes an ordinary checkpoint when it is
//! needed, so any layout resumes from it.
//!
//! On a node: DIR/tiefsee-PLACE/ID/node-K/step-N-ATTEMPT/rank-R/{manifest.json, one shard}, a folder for each shard, whole or
//! absent. A step of which some shard is missing or damaged everywhere counts for nothing. ID is in the run's directory: what a
//! node that was long away holds of a run that has had the same place counts for nothing either.
//!
//! Invariants: a step's copies go only after all ranks have said that those of a later one are written; and where they can
//! become no checkpoint for a reason that is not theirs (a full disk), the run ends and they stay.
use super::place::{MARKER, forget, place_and_id};
use super::{Manifest, entries};
use super::load::{Refused, check_file, first_error};
use super::save::{Outline, Place, Written, at_hand, begin, commit, discard, share, write_shard};
use super::shard::{dtype, kind_named};
use super::staging::{Copying, Piece, Staging};
use crate::coordinator::{Shared, shared};
use crate::state::{StatePart, StateReader};
use anyhow::{Context, Result, anyhow, ensure};
use parallel::comm::{Communicator, TensorSpec, broadcast_bytes, gather_bytes};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread::{JoinHandle, spawn};
use tch::{Device, Kind, Tensor};

/// `[checkpoint.second_tier]` of a run's config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SecondTierSection {
    /// Steps between copies; 0: none are made.
    pub every: u64,
    /// A folder that every node has of its own: its memory, or a local disk.
    pub dir: PathBuf,
}

impl Default for SecondTierSection {
    fn default() -> Self {
        SecondTierSection { every: 0, dir: PathBuf::from("/dev/shm") }
    }
}

pub struct SecondTier {
    /// Of this run on this node, whatever nodes wrote there: DIR/tiefsee-PLACE/ID.
    root: PathBuf,
    /// In the run directory: there are whole copies. The launcher resumes such a run, also where it has no checkpoint.
    marker: PathBuf,
    node: usize,
    rank: usize,
    /// Where the copy of this rank's shard goes, and whose come here.
    to: Option<usize>,
    from: Vec<usize>,
    /// Tells this start's copies from those of another.
    attempt: String,
    staging: Staging,
    /// The copy that the thread waits for, until somebody makes it.
    copy: Option<Copying>,
    running: Option<JoinHandle<(Vec<Piece>, Result<()>)>>,
    /// Of the copies under way, and of the newest that all ranks have whole.
    under_way: String,
    whole: Option<String>,
}

/// A shard that a rank sees on its node.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Seen {
    step: u64,
    label: String,
    rank: usize,
    /// Of the world that it is of; at least.
    ranks: usize,
    path: PathBuf,
}

impl Seen {
    fn at(path: PathBuf) -> Option<Seen> {
        let rank = path.file_name()?.to_str()?.strip_prefix("rank-")?.parse().ok()?;
        let label = path.parent()?.file_name()?.to_str()?.to_string();
        let (step, ranks) = match Manifest::read(&path).map_err(Refused::from) {
            Ok(manifest) => (manifest.step, manifest.mesh.world),
            // It may be whole: who tries to take it says why it cannot.
            Err(Refused { unread: true, .. }) => (label.strip_prefix("step-")?.split('-').next()?.parse().ok()?, 1),
            Err(_) => return None,
        };
        Some(Seen { step, label, rank, ranks, path })
    }
}

/// Where the copy of each rank's shard goes: to the same place on the next node; nowhere if there is but one node.
fn peers(nodes: &[usize]) -> Vec<Option<usize>> {
    let mut ranks = BTreeMap::<usize, Vec<usize>>::new();
    nodes.iter().enumerate().for_each(|(rank, node)| ranks.entry(*node).or_default().push(rank));
    let mut peers = vec![None; nodes.len()];
    for (here, there) in ranks.values().zip(ranks.values().cycle().skip(1)).filter(|_| ranks.len() > 1) {
        here.iter().zip(there.iter().cycle()).for_each(|(&rank, &peer)| peers[rank] = Some(peer));
    }
    peers
}

impl SecondTier {
    /// Collective. `nodes`: what is lost together; rank 0 sees the run's directory. `fresh`: the run begins.
    pub fn new(section: &SecondTierSection, run_dir: &Path, nodes: &[usize], fresh: bool, world: &dyn Communicator) -> Result<SecondTier> {
        let there = section.dir.is_dir();
        let named = || anyhow!("rank {}: checkpoint.second_tier.dir = {}: there is no such folder", world.rank(), section.dir.display());
        if let Some(error) = first_error(world, if there { Ok(()) } else { Err(named()) })? {
            return Err(shared(format!("{error:#}")));
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64;
        let attempt = String::from_utf8(broadcast_bytes(world, format!("{now:016x}").as_bytes(), 0)?)?;
        let root = if world.rank() == 0 { place_and_id(run_dir, &section.dir, &attempt, fresh) } else { Ok(String::new()) };
        let root = share(world, root.map_err(|error| format!("{error:#}")))?.map_err(|error| shared(format!("rank 0: {error}")))?;
        let (peers, rank) = (peers(nodes), world.rank());
        Ok(SecondTier {
            root: section.dir.join(root),
            marker: run_dir.join(MARKER),
            node: nodes[rank],
            rank,
            to: peers[rank],
            from: (0..nodes.len()).filter(|&other| peers[other] == Some(rank)).collect(),
            attempt,
            staging: Staging::default(),
            copy: None,
            running: None,
            under_way: String::new(),
            whole: None,
        })
    }

    /// What other runs of this place left on this node: one begins here, and what they took is mostly memory.
    pub fn clear_place(&self) {
        let _ = std::fs::remove_dir_all(self.place());
    }

    /// The folder of this run's copies, on every node.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn place(&self) -> &Path {
        self.root.parent().expect("an ID has a place")
    }

    fn node(&self) -> PathBuf {
        self.root.join(format!("node-{}", self.node))
    }

    /// Collective. The state may change again once what `take_copy` gives has run, or after `wait`. Waits for the copies
    /// before; their failure, the same on every rank, is returned, and no reason to end a run.
    pub fn save(&mut self, world: &dyn Communicator, head: &Manifest, parts: Vec<StatePart>) -> Result<Option<String>> {
        let failed = self.wait(world)?;
        let (copying, mut mine) = self.staging.begin(parts);
        let received = self.exchange(world, &copying)?;
        let outline = Outline::of(copying.now());
        self.copy = Some(copying);
        self.under_way = format!("step-{:08}-{}", head.step, self.attempt);
        let (node, label, kept, rank) = (self.node(), self.under_way.clone(), self.whole.clone(), self.rank);
        let (head, ranks) = (head.clone(), world.size());
        self.running = Some(spawn(move || {
            let write = || -> Result<()> {
                let of = received.iter().map(|(rank, _)| *rank).chain([rank]).collect::<Vec<_>>();
                // Nor the folder of these copies: the node's other ranks are filling it.
                clear(&node, &of, &[kept.as_deref(), Some(&label)])?;
                let step = node.join(&label);
                write_copy(&step, (rank, ranks), &head, outline, |index| mine.tensor(index))?;
                for (from, parts) in received {
                    let (outline, tensor) = at_hand(parts);
                    write_copy(&step, (from, ranks), &head, outline, tensor)?;
                }
                Ok(())
            };
            let outcome = write();
            (mine.here, outcome)
        }));
        Ok(failed)
    }

    /// As `Saver::take_copy`.
    pub fn take_copy(&mut self) -> Option<StateReader> {
        let copying = self.copy.take()?;
        Some(Box::new(move || copying.copy()))
    }

    /// Collective: until what is under way is written, or has failed somewhere.
    pub fn wait(&mut self, world: &dyn Communicator) -> Result<Option<String>> {
        let Some(running) = self.running.take() else { return Ok(None) };
        self.copy.take().into_iter().for_each(Copying::lend);
        let (parts, outcome) = running.join().expect("a writer returns its errors");
        self.staging.give_back(parts);
        let named = outcome.map_err(|error| anyhow!("rank {}: {error:#}", self.rank));
        let failed = first_error(world, named)?;
        if failed.is_some() {
            return Ok(failed);
        }
        self.whole = Some(self.under_way.clone());
        let text = format!("{} in {}\n", self.under_way, self.root.display());
        let marked = if self.rank == 0 { std::fs::write(&self.marker, text) } else { Ok(()) };
        let named = |error| format!("they are whole, but rank 0 cannot write {}: {error}", self.marker.display());
        Ok(share(world, marked.map_err(named))?.err())
    }

    /// Every rank's parts to its peer; the result is (rank, its parts) for each that has this rank as its peer.
    fn exchange(&self, world: &dyn Communicator, mine: &Copying) -> Result<Vec<(usize, Vec<StatePart>)>> {
        let Some(to) = self.to else { return Ok(Vec::new()) };
        type Description = (String, i64, i64, String, Vec<i64>);
        let describe =
            |part: &StatePart| (part.name.clone(), part.start, part.total, format!("{:?}", dtype(part.tensor.kind())), part.tensor.size());
        let described: Vec<Description> = mine.now().map(describe).collect();
        // Only its peer reads it: how long it is goes before it.
        let text = serde_json::to_vec(&described)?;
        let of = |rank: usize, length: i64, kind: Kind| (rank, TensorSpec { shape: vec![length], kind, device: Device::Cpu });
        let lengths = self.from.iter().map(|&rank| of(rank, 1, Kind::Int64)).collect();
        let lengths = world.exchange(vec![(to, Tensor::from_slice(&[text.len() as i64]))], lengths)?.wait()?;
        let texts = self.from.iter().zip(&lengths).map(|(&rank, length)| of(rank, length.int64_value(&[0]), Kind::Uint8)).collect();
        let texts = world.exchange(vec![(to, Tensor::from_slice(&text))], texts)?.wait()?;
        let read = |text: &Tensor| -> Result<Vec<Description>> { Ok(serde_json::from_slice(&Vec::<u8>::try_from(text)?)?) };
        let theirs: Vec<Vec<Description>> = texts.iter().map(read).collect::<Result<_>>()?;
        let spec = |(rank, (.., kind, shape)): (usize, &Description)| -> Result<(usize, TensorSpec)> {
            let kind = kind_named(kind).with_context(|| format!("rank {rank} sends {kind}"))?;
            Ok((rank, TensorSpec { shape: shape.clone(), kind, device: Device::Cpu }))
        };
        let each = self.from.iter().zip(&theirs).flat_map(|(&rank, parts)| parts.iter().map(move |part| (rank, part)));
        let expected = each.map(spec).collect::<Result<Vec<_>>>()?;
        let sends = mine.now().map(|part| (to, part.tensor.shallow_clone())).collect();
        let mut arrived = world.exchange(sends, expected)?.wait()?.into_iter();
        let part = |(name, start, total, ..): Description, tensor| StatePart { name, tensor, start, total };
        let mut parts = |theirs: Vec<Description>| -> Vec<StatePart> {
            theirs.into_iter().map(|one| part(one, arrived.next().expect("one for each"))).collect()
        };
        Ok(self.from.iter().copied().zip(theirs.into_iter().map(&mut parts).collect::<Vec<_>>()).collect())
    }

    /// Collective: the newest step above `above` of which every shard is somewhere whole, made a checkpoint of the run;
    /// `above` None: there is none yet. The lines are for the operator. The error is of copies that may be whole, and are kept.
    pub fn restore(&self, world: &dyn Communicator, run_dir: &Path, above: Option<u64>) -> Result<(Option<PathBuf>, Vec<String>)> {
        let all = gather_bytes(world, &serde_json::to_vec(&self.seen().map_err(|error| format!("{error:#}")))?)?;
        let mut by_step: BTreeMap<(u64, String), Vec<(usize, Seen)>> = BTreeMap::new();
        for (holder, bytes) in all.iter().enumerate() {
            let seen: Result<Vec<Seen>, String> = serde_json::from_slice(bytes)?;
            for seen in seen.map_err(|error| shared(format!("rank {holder}: {error}: there may be copies of the second tier")))? {
                by_step.entry((seen.step, seen.label.clone())).or_default().push((holder, seen));
            }
        }
        let mut notes = Vec::new();
        for ((step, _), seen) in by_step.into_iter().rev().filter(|((step, _), _)| above.is_none_or(|above| *step > above)) {
            let kept = |error: anyhow::Error| {
                let words = format!("{error:#}; the copies of step {step} in the second tier are kept");
                if error.is::<Shared>() { shared(words) } else { anyhow!(words) }
            };
            match self.restore_step(world, run_dir, step, &seen).map_err(kept)? {
                Ok(path) => {
                    notes.push(format!("step {step} is restored from the second tier into {}", path.display()));
                    return Ok((Some(path), notes));
                }
                Err(error) => notes.push(format!("step {step} of the second tier was passed over: {error}")),
            }
        }
        Ok((None, notes))
    }

    /// The inner error is that some shard has no whole copy.
    fn restore_step(&self, world: &dyn Communicator, run_dir: &Path, step: u64, seen: &[(usize, Seen)]) -> Result<Result<PathBuf, String>> {
        let ranks = seen.iter().map(|(_, one)| one.ranks).max().unwrap_or(0);
        let (mut copied, mut refused) = (BTreeMap::<usize, Manifest>::new(), Vec::<(usize, &Seen, Refused)>::new());
        let place = Place::of(run_dir, step);
        while copied.len() < ranks {
            let plan = match next_copies(seen, (0..ranks).filter(|rank| !copied.contains_key(rank)), &refused) {
                Ok(plan) => plan,
                Err(Refused { words, unread }) => {
                    discard(world, &place)?;
                    return if unread { Err(shared(words)) } else { Ok(Err(words)) };
                }
            };
            if copied.is_empty() && refused.is_empty() {
                begin(world, &place)?;
            }
            let mine = plan.iter().filter(|(holder, _)| *holder == self.rank);
            let mine: Result<Vec<_>> = mine.map(|(_, one)| take(&one.path, &place.partial)).collect();
            let all = gather_bytes(world, &serde_json::to_vec(&mine.map_err(|error| format!("{error:#}")))?)?;
            let mut taken = Vec::new();
            for (rank, bytes) in all.iter().enumerate() {
                match serde_json::from_slice::<Result<Vec<Result<Manifest, Refused>>, String>>(bytes)? {
                    Ok(theirs) => taken.push(theirs.into_iter()),
                    Err(error) => {
                        discard(world, &place)?;
                        return Err(shared(format!("rank {rank}: {error}")));
                    }
                }
            }
            for (holder, one) in plan {
                match taken[*holder].next().expect("one for each") {
                    Ok(manifest) => drop(copied.insert(one.rank, manifest)),
                    Err(error) => refused.push((*holder, one, error)),
                }
            }
        }
        let head = Manifest { files: Vec::new(), tensors: BTreeMap::new(), ..copied[&0].clone() };
        let written = |mut manifest: Manifest| {
            Ok(Written { file: manifest.files.remove(0), tensors: manifest.tensors.into_iter().collect() })
        };
        let all = copied.into_values().map(written).collect();
        let outcome = if self.rank == 0 { commit(&place, head, all).map_err(|error| format!("{error:#}")) } else { Ok(()) };
        share(world, outcome)?.map_err(|error| shared(format!("rank 0: {error}")))?;
        Ok(Ok(place.target))
    }

    /// Every shard that lies on this rank's node, unless its manifest is damaged.
    fn seen(&self) -> Result<Vec<Seen>> {
        let below = |above: Vec<PathBuf>| above.iter().map(|path| folders(path)).collect::<Result<Vec<_>>>().map(|all| all.concat());
        let shards = folders(&self.root).and_then(below).and_then(below)?;
        Ok(shards.into_iter().filter_map(Seen::at).collect())
    }

    /// The copies of this step on this node: of a state that nobody is to go on from.
    pub fn forget(&self, step: u64) {
        if !forget(&self.root, step) {
            self.clear();
        }
    }

    /// What other starts of the run left on this node: the run goes on from a checkpoint, or is over.
    pub fn clear(&self) {
        // Best effort, and the node's other ranks do the same.
        let _ = std::fs::remove_dir_all(&self.root);
        let _ = std::fs::remove_dir(self.place()); // once it is empty
        let _ = std::fs::remove_file(&self.marker);
    }
}

fn folders(path: &Path) -> Result<Vec<PathBuf>> {
    let mut found = entries(path)?;
    found.retain(|path| path.is_dir());
    found.sort();
    Ok(found)
}

/// The copy of each of these ranks' shards that is tried next, and its holder: a rank's own before its peer's, of several the one
/// with the least to do (all ranks of a node see its copies), and none that was refused. The error is of a shard that has none left:
/// of one that may be whole, if there is any such.
fn next_copies<'a>(
    seen: &'a [(usize, Seen)],
    ranks: impl Iterator<Item = usize>,
    refused: &[(usize, &Seen, Refused)],
) -> Result<Vec<&'a (usize, Seen)>, Refused> {
    let (mut plan, mut unread, mut work) = (Vec::new(), None, BTreeMap::<usize, usize>::new());
    for rank in ranks {
        let was_refused = |holder: usize, one: &Seen| refused.iter().any(|(by, other, _)| *by == holder && other.path == one.path);
        let left = seen.iter().filter(|(holder, one)| one.rank == rank && !was_refused(*holder, one));
        if let Some(one) = left.min_by_key(|(holder, _)| (*holder != rank, work.get(holder).copied())) {
            *work.entry(one.0).or_default() += 1;
            plan.push(one);
            continue;
        }
        let all = || refused.iter().filter(|(_, one, _)| one.rank == rank);
        match all().find(|(.., why)| why.unread) {
            Some((holder, _, why)) => {
                let words = format!("rank {holder}: {}: it may be whole (mend that, or remove it)", why.words);
                unread = Some(Refused { words, unread: true });
            }
            None => {
                let why = all().next().map(|(.., why)| format!("; {}", why.words)).unwrap_or_default();
                return Err(Refused { words: format!("no whole copy of rank {rank}'s shard is left{why}"), unread: false });
            }
        }
    }
    unread.map_or(Ok(plan), Err)
}

/// Removes the shards of these ranks, half written ones too, from every step but those `kept`.
fn clear(node: &Path, ranks: &[usize], kept: &[Option<&str>]) -> Result<()> {
    for label in folders(node)?.iter().filter(|label| !kept.contains(&label.file_name().and_then(|name| name.to_str()))) {
        for path in ranks.iter().flat_map(|&rank| [whole_copy(label, rank), partial_copy(label, rank)]).filter(|path| path.exists()) {
            std::fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
        let _ = std::fs::remove_dir(label); // once it is empty
    }
    Ok(())
}

fn whole_copy(label: &Path, rank: usize) -> PathBuf {
    label.join(format!("rank-{rank}"))
}

fn partial_copy(label: &Path, rank: usize) -> PathBuf {
    label.join(format!(".rank-{rank}.partial"))
}

fn write_copy(
    step: &Path,
    (rank, ranks): (usize, usize),
    head: &Manifest,
    outline: Outline,
    tensor: impl FnMut(usize) -> Result<Tensor> + Send,
) -> Result<()> {
    let partial = partial_copy(step, rank);
    let write = || -> Result<()> {
        std::fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
        let written = write_shard(&partial, (rank, ranks), outline, tensor)?;
        let mut manifest = head.clone();
        manifest.add(written.file, written.tensors);
        manifest.write(&partial)?;
        std::fs::rename(&partial, whole_copy(step, rank)).with_context(|| format!("cannot rename {} into place", partial.display()))
    };
    // Half a copy is good for nothing, and mostly it is memory that it takes.
    write().inspect_err(|_| drop(std::fs::remove_dir_all(&partial)))
}

/// Copies a shard into the folder of a checkpoint to be, and checks what arrived there. The inner error is of the shard; the outer
/// one of the folder: what was to go there is whole.
fn take(from: &Path, partial: &Path) -> Result<Result<Manifest, Refused>> {
    let error = match copy(from, partial) {
        Ok(manifest) => return Ok(Ok(manifest)),
        Err(error) => error,
    };
    let sound = one_shard(from).and_then(|manifest| check_file(from, &manifest.files[0], &[]));
    sound.map_or_else(|bad| Ok(Err(bad.into())), |()| Err(error))
}

fn copy(from: &Path, partial: &Path) -> Result<Manifest> {
    let manifest = one_shard(from)?;
    let file = &manifest.files[0];
    let (shard, to) = (from.join(&file.name), partial.join(&file.name));
    std::fs::copy(&shard, &to).with_context(|| format!("cannot copy {} to {}", shard.display(), to.display()))?;
    std::fs::File::open(&to).and_then(|copy| copy.sync_all()).with_context(|| format!("cannot write {}", to.display()))?;
    check_file(partial, file, &[]).with_context(|| format!("the copy of {}", shard.display()))?;
    Ok(manifest)
}

/// A copy's manifest.
fn one_shard(copy: &Path) -> Result<Manifest> {
    let manifest = Manifest::read(copy)?;
    ensure!(manifest.files.len() == 1, "{} holds {} shards, a copy is of one", copy.display(), manifest.files.len());
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::{Manifest, Refused, Seen, at_hand, clear, next_copies, peers, write_copy};
    use crate::state::StatePart;
    use anyhow::bail;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn a_rank_clears_its_own_shards_and_not_the_folder_that_others_are_about_to_fill() {
        let node = tempfile::tempdir().unwrap();
        for path in ["step-1/rank-0", "step-1/.rank-0.partial", "step-1/rank-1", "step-2/rank-0", "step-3"] {
            std::fs::create_dir_all(node.path().join(path)).unwrap();
        }
        clear(node.path(), &[0], &[Some("step-2"), Some("step-3")]).unwrap();
        let there = ["step-1/rank-0", "step-1/.rank-0.partial", "step-1/rank-1", "step-2/rank-0", "step-3"];
        assert_eq!(there.map(|path| node.path().join(path).exists()), [false, false, true, true, true]);
        clear(node.path(), &[1], &[Some("step-2"), None]).unwrap();
        assert!(!node.path().join("step-1").exists() && !node.path().join("step-3").exists(), "empty and nobody's");
    }

    #[test]
    fn a_copy_that_finds_no_room_takes_none() {
        let node = tempfile::tempdir().unwrap();
        let part = StatePart { name: "weight/a".into(), tensor: Tensor::zeros([4, 4], (Kind::Float, Device::Cpu)), start: 0, total: 4 };
        let head = Manifest::imported(toml::from_str(include_str!("../../../configs/model/tiny.toml")).unwrap(), kernels::Precision::F32);
        let (outline, _) = at_hand(vec![part]);
        let failed = write_copy(node.path(), (0, 1), &head, outline, |_| bail!("no room"));
        assert_eq!(failed.unwrap_err().to_string(), "no room");
        assert_eq!(std::fs::read_dir(node.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_lost_nodes_shards_are_shared_out_among_the_ranks_that_see_their_copies() {
        let seen = |holder: usize, rank: usize| (holder, Seen { step: 8, label: "step-8".into(), rank, ranks: 4, path: format!("rank-{rank}").into() });
        let all: Vec<_> = (2..4).flat_map(|holder| (0..4).map(move |rank| seen(holder, rank))).collect();
        let plan = |refused: &[(usize, &Seen, Refused)]| match next_copies(&all, 0..4, refused) {
            Ok(plan) => plan.iter().map(|(holder, one)| (one.rank, *holder)).collect::<Vec<_>>(),
            Err(error) => panic!("{}", error.words),
        };
        assert_eq!(plan(&[]), [(0, 2), (1, 3), (2, 2), (3, 3)]);
        let no = || Refused { words: "damaged".into(), unread: false };
        assert_eq!(plan(&[(2, &all[0].1, no()), (3, &all[7].1, no())]), [(0, 3), (1, 2), (2, 2), (3, 2)]);
    }

    #[test]
    fn a_shard_goes_to_the_same_place_on_the_next_node() {
        assert_eq!(peers(&[0, 0, 1, 1]), [2, 3, 0, 1].map(Some));
        assert_eq!(peers(&[0, 1, 2]), [1, 2, 0].map(Some));
        assert_eq!(peers(&[0, 0, 0, 1]), [3, 3, 3, 0].map(Some));
        assert_eq!(peers(&[0, 0]), [None, None]);
    }
}
