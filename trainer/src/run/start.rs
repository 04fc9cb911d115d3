//! Before the first step: what is checked, what is restored, and the run directory.
use super::corpus::Corpus;
use super::save::Waiting;
use super::{Run, Start, State};
use crate::checkpoint::second_tier::SecondTier;
use crate::checkpoint::{self, copies, Cursor, Found, Manifest, Reader, MARKER};
use crate::config::RunConfig;
use crate::coordinator::{all_or_none, gather_layout, shared};
use crate::device;
use crate::estimate::{Need, needs};
use crate::phase::Plan;
use crate::step::Trainer;
use anyhow::{Context, Result, anyhow, bail, ensure};
use kernels::Precision;
use parallel::comm::{Comm, Communicator, broadcast_bytes, gather_bytes};
use parallel::mesh::Mesh;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// BLAKE3 of the program that runs: ranks of two builds must not meet.
pub(super) fn binary() -> Result<String> {
    // The program itself, also where a newer build lies at its path by now.
    let file = std::fs::File::open("/proc/self/exe").context("cannot read /proc/self/exe")?;
    Ok(blake3::Hasher::new().update_reader(file)?.finalize().to_hex().to_string())
}

/// A directory with a checkpoint, or with copies in the second tier, holds a run, and one with a summary did; one that a crash left
/// before all of them may be used again.
pub(super) fn check_free(dir: &Path) -> Result<()> {
    let used = !checkpoint::list(dir)?.is_empty() || copies(dir).is_some();
    ensure!(!used || resolved(dir).exists(), "{} holds checkpoints and no run (no resolved.toml): name one of them in run.init_from, and another run.dir", dir.display());
    ensure!(!used, "{} already holds a run: resume it (tiefsee resume {}) or name another run.dir", dir.display(), dir.display());
    let summary = dir.join("summary.json");
    ensure!(!summary.exists(), "{} already held a run, whose checkpoints are gone ({} is there, and logs): name another run.dir", dir.display(), summary.display());
    Ok(())
}

/// Collective: the directory of a run that begins, or goes on without what is damaged.
pub(super) fn ready_dir(config: &RunConfig, start: Start, damaged: &[PathBuf], world: &dyn Communicator) -> Result<()> {
    let ready = match start {
        Start::Fresh if world.rank() == 0 => prepare_dir(config),
        Start::Resume if world.rank() == 0 => damaged.iter().try_for_each(|path| checkpoint::set_aside(path).map(drop)),
        _ => Ok(()),
    };
    all_or_none(world, ready)?;
    if start == Start::Fresh { all_see(world, &config.run.dir, PATIENCE) } else { Ok(()) }
}

fn prepare_dir(config: &RunConfig) -> Result<()> {
    let dir = &config.run.dir;
    remove_ours(&dir.join("log"), "rank-", ".jsonl")?;
    remove_ours(&dir.join("tensorboard"), "events.out.tfevents.", "")?;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make the run directory {}", dir.display()))?;
    let mut kept = config.clone();
    kept.run.stop_after = None;
    kept.run.dir = std::path::absolute(dir)?;
    kept.run.init_from = kept.run.init_from.map(std::path::absolute).transpose()?;
    kept.checkpoint.second_tier.dir = std::path::absolute(kept.checkpoint.second_tier.dir)?;
    let (resolved, text) = (resolved(dir), kept.to_toml()?);
    // Checkpoints are synced: beside one, after a loss of power, it is not to be empty.
    let write = || -> std::io::Result<()> {
        let aside = resolved.with_extension("partial");
        let mut file = std::fs::File::create(&aside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&aside, &resolved)?;
        std::fs::File::open(dir)?.sync_all()
    };
    write().with_context(|| format!("cannot write {}", resolved.display()))
}

/// For how long a host's view of a shared file system may be an old one.
const PATIENCE: Duration = Duration::from_secs(65);

/// Collective: every rank sees what rank 0 has just written. In a directory of its own a host would write shards that no
/// checkpoint ever gets.
fn all_see(world: &dyn Communicator, dir: &Path, patience: Duration) -> Result<()> {
    // Never the same twice: a directory of before may hold all else that this start writes.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos().to_string();
    let (path, began) = (dir.join("begun"), Instant::now());
    let write = || std::fs::write(&path, &now).with_context(|| format!("cannot write {}", path.display()));
    all_or_none(world, if world.rank() == 0 { write() } else { Ok(()) })?;
    let written = broadcast_bytes(world, now.as_bytes(), 0)?;
    let sees = || std::fs::read(&path).is_ok_and(|text| text == written);
    let mut seen = sees();
    while !seen && began.elapsed() < patience {
        std::thread::sleep(Duration::from_millis(500));
        seen = sees();
    }
    let unseen = || anyhow!("{} does not show what rank 0 has written to {}: run.dir must lie on a file system that all hosts share", dir.display(), path.display());
    let all = all_or_none(world, seen.then_some(()).ok_or_else(unseen));
    if world.rank() == 0 {
        let _ = std::fs::remove_file(&path); // its purpose is served
    }
    all
}

/// Collective: newer copies are not passed over because this start looks elsewhere for them, or nowhere.
fn check_copies(config: &RunConfig, tier: Option<&SecondTier>, reached: Option<u64>, world: &dyn Communicator) -> Result<()> {
    let (dir, second) = (&config.run.dir, &config.checkpoint.second_tier);
    let text = copies(dir).unwrap_or_default();
    let text = String::from_utf8(broadcast_bytes(world, if world.rank() == 0 { text.as_bytes() } else { &[] }, 0)?)?;
    let Some((label, root)) = text.trim_end().split_once(" in ") else { return Ok(()) };
    let step = label.split('-').nth(1).and_then(|step| step.parse::<u64>().ok());
    let elsewhere = tier.is_none_or(|tier| tier.root() != Path::new(root));
    let there = gather_bytes(world, &[u8::from(elsewhere && Path::new(root).exists())])?;
    if step <= reached || there.iter().all(|there| *there != [1]) {
        return Ok(());
    }
    Err(shared(format!(
        "{} has newer copies ({}) than its checkpoints, and with checkpoint.second_tier.every = {} and dir = {} nobody looks there: set these back to go on from them, or remove {} to do without them",
        dir.display(), text.trim_end(), second.every, second.dir.display(), dir.join(MARKER).display()
    )))
}

/// What an earlier try of this run wrote; nobody else's file.
fn remove_ours(folder: &Path, start: &str, end: &str) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with(start) && name.ends_with(end) {
            std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Proves that what is to come after `tokens` fits the layout: whole micro-batches on every rank, and the schedule of every
/// step. Says where that is not the one asked for.
pub fn prove_schedules(config: &RunConfig, mesh: &Mesh, tokens: u64) -> Result<Vec<String>> {
    config.check_batches(mesh, tokens)?;
    let mut proven = BTreeMap::new();
    for (moment, _) in Plan::new(&config.phase, &config.data.mixture).stretches(tokens) {
        let micro_batches = (moment.batch / (moment.phase.micro_batch * mesh.dp as u64)) as usize;
        if let std::collections::btree_map::Entry::Vacant(entry) = proven.entry(micro_batches) {
            let schedule = mesh.schedule.for_step(mesh.pp, micro_batches);
            schedule.proven(mesh.pp, micro_batches)?;
            entry.insert(schedule);
        }
    }
    let note = |(count, schedule)| {
        format!("steps of {count} micro-batches a pipe run {schedule}, {} needs an even number of at least {}", mesh.schedule, 2 * mesh.pp)
    };
    Ok(proven.into_iter().filter(|(_, schedule)| *schedule != mesh.schedule).map(note).collect())
}

/// Ranks that share experts validate in step. `there`: in the held-out split; None: not known yet, and enough.
pub fn check_validation(config: &RunConfig, mesh: &Mesh, there: Option<u64>) -> Result<()> {
    let (wanted, dp, ep) = (config.validation.sequences, mesh.dp as u64, mesh.ep);
    let sequences = there.map_or(wanted, |there| wanted.min(there));
    if ep == 1 || config.validation.every == 0 || sequences.is_multiple_of(dp) {
        return Ok(());
    }
    let most = sequences.max(dp) / dp * dp;
    let instead = if there.is_none_or(|there| most <= there) { format!("validation.sequences = {most}") } else { "validation.every = 0".into() };
    let known = there.map_or(String::new(), |there| format!(", of which the held-out split has {there}: {sequences}"));
    bail!("validation.sequences = {wanted}{known}: no multiple of dp {dp}, as it must be where ep {ep} ranks share experts; {instead} would do")
}

/// That weights from elsewhere know the tokens of this run's corpora. What else they may mean that the run does not, for people.
fn check_meaning(config: &RunConfig, corpus: &Corpus, from: &Reader) -> Result<Vec<String>> {
    let (manifest, path, mut notes) = (from.manifest(), from.path().display(), Vec::new());
    let (theirs, ours) = (&manifest.tokenizer_blake3, corpus.loader(0).tokenizer_blake3());
    if !theirs.is_empty() && theirs != ours {
        let differs = format!("{path} knows the tokens of a tokenizer.json whose BLAKE3 is {theirs}, the run's corpora have one of {ours}");
        // Released ones are often written anew, to the same tokens.
        ensure!(manifest.is_import(), "{differs}: prepare --tokenizer takes the first");
        notes.push(format!("{differs}: where these are not the same tokens, the weights mean nothing"));
    }
    let [theirs, ours] = [manifest.model.rope_scaling.clone(), config.phase[0].rope_scaling_of(&config.model)];
    if theirs != ours {
        let words = |scaling| toml::Value::try_from(&scaling).map_or("none".to_string(), |value: toml::Value| value.to_string());
        notes.push(format!("{path} was trained with rope_scaling {}, phase 0 has {}", words(theirs), words(ours)));
    }
    Ok(notes)
}

#[derive(Default)]
pub(super) struct Restored {
    pub state: State,
    pub newest: Option<(u64, PathBuf)>,
    /// Newer ones that were passed over.
    pub damaged: Vec<PathBuf>,
    pub notes: Vec<String>,
}

type Begin<'a> = (&'a RunConfig, Start, Option<&'a SecondTier>);

pub(super) fn restore((config, start, tier): Begin, world: &Comm, trainer: &mut Trainer, corpus: &Corpus) -> Result<Restored> {
    let _waiting = Waiting::of(&config.run.dir, world.rank());
    if start == Start::Fresh {
        let mut notes = Vec::new();
        if let Some(path) = &config.run.init_from {
            let mut load = |reader: &mut Reader| {
                notes = check_meaning(config, corpus, reader)?;
                trainer.load_weights(reader)
            };
            let loaded = checkpoint::load_whole(&**world, path, &mut load).with_context(|| format!("run.init_from = {path:?}"))?;
            loaded.map_err(|damage| shared(format!("run.init_from: {damage}")))?;
        }
        return Ok(Restored { notes, ..Default::default() });
    }
    let dir = &config.run.dir;
    let Found { newest, damaged, mut notes } = checkpoint::load_newest(&**world, dir, tier, &mut |reader| trainer.load_all(reader))?;
    check_copies(config, tier, newest.as_ref().map(|(_, manifest)| manifest.step), &**world)?;
    if newest.is_none() {
        tier.iter().for_each(|tier| tier.clear()); // the launcher is not to try again
    }
    let none = || anyhow!("{} holds no whole checkpoint to resume from{}", dir.display(), notes.iter().map(|note| format!("\n  {note}")).collect::<String>());
    let fits = newest.ok_or_else(none).and_then(|(path, manifest)| {
        let (written, seed) = (manifest.seed, config.run.seed);
        ensure!(written == seed, "{} was written with seed {written}, the run's is {seed}", path.display());
        let read = corpus.check_read(&manifest.corpus, manifest.cursor.order);
        read.with_context(|| format!("{} does not go on with these corpora", path.display()))?;
        let phases = check_order(config, &manifest).and_then(|()| check_begun(config, &manifest));
        phases.with_context(|| format!("{} does not go on with these phases", path.display()))?;
        Ok((path, manifest))
    });
    let (path, manifest) = all_or_none(&**world, fits)?;
    trainer.guard.state = manifest.progress.guard.clone();
    if config.run.precision == Precision::Fp8 {
        trainer.sentinel.state = manifest.progress.sentinel.clone();
        if manifest.step > 0 {
            trainer.sentinel.begin(manifest.step, &mut trainer.weights); // it may be that only a validation follows
        }
    }
    notes.push(format!("resuming from {} (step {}, {} tokens)", path.display(), manifest.step, manifest.tokens));
    if manifest.precision != config.run.precision {
        notes.push(format!("run.precision is {:?} from here on, it was {:?}", config.run.precision, manifest.precision));
    }
    let state = State { step: manifest.step, tokens: manifest.tokens, cursor: manifest.cursor, progress: manifest.progress };
    Ok(Restored { state, newest: Some((manifest.step, path)), damaged, notes })
}

/// A phase that is over may not become longer or shorter: samples would be read from the first on again, as would those of an
/// order that phases before it no longer have.
fn check_order(config: &RunConfig, manifest: &Manifest) -> Result<()> {
    let (plan, reached) = (Plan::new(&config.phase, &config.data.mixture), manifest.cursor.order);
    if let Some(moment) = plan.at(manifest.tokens) {
        let (order, tokens) = (moment.order, manifest.tokens);
        ensure!(order >= reached, "it has reached sample order {reached}, and after its {tokens} tokens the phases are still in order {order}: one that is over was made longer");
        let Cursor { next, .. } = manifest.cursor;
        let planned = plan.orders().iter().find(|planned| planned.number == reached).map_or(0, |planned| planned.samples);
        // Its last step, and that of the order before it, goes beyond the end, as far as a batch that may have been another.
        let batch = config.phase.iter().map(|phase| phase.batch.most()).max().unwrap_or(0);
        ensure!(
            order == reached || planned.abs_diff(next) < 2 * batch,
            "it has read {next} samples of sample order {reached}, of which the phases read {planned} now before they come to order {order}: \
             one that is over was changed in its tokens, its sequence length or its mixture, and samples would be read twice or left out"
        );
    }
    Ok(())
}

/// A phase that has had a step stays what it was: ramp and curve go by how far it is, and what is done says what is to come. The
/// last one, where it has neither, may end sooner or later, but not before what is done.
fn check_begun(config: &RunConfig, manifest: &Manifest) -> Result<()> {
    let mut end = 0;
    for (index, was) in manifest.phases.iter().enumerate() {
        let now = config.phase.get(index).with_context(|| format!("phase.{index} has begun, and is gone"))?;
        now.check_begun(was, index + 1 == manifest.phases.len()).map_err(|error| anyhow!("phase.{index}.{error}"))?;
        end += now.tokens;
        let done = manifest.tokens;
        ensure!(now.tokens >= was.tokens || end >= done, "phase.{index}.tokens = {}: it would end after {end} tokens, and {done} are done", now.tokens);
    }
    Ok(())
}

impl Run<'_> {
    pub(super) fn announce(&self, start: Start, notes: &[String]) -> Result<()> {
        let places = gather_layout(&*self.world, &device::describe(self.trainer.weights.device()), tch::get_num_threads() as usize)?;
        notes.iter().for_each(|note| self.metrics.say(note));
        let count = self.config.model.count();
        let hosts: std::collections::BTreeSet<&str> = places.iter().map(|place| place.host.as_str()).collect();
        self.metrics.say(&format!(
            "{} {} | {:.2}M parameters, {:.2}M active | {} ranks on {} host(s) (pp {}, dp {}, ep {}, {}), {} thread(s) each | {}, {:?} | {} steps, {} tokens",
            if start == Start::Fresh { "starting" } else { "resuming" },
            self.config.run.dir.display(),
            (count.main + count.mtp) as f64 / 1e6,
            count.active as f64 / 1e6,
            self.world.size(),
            hosts.len(),
            self.trainer.mesh.pp,
            self.trainer.mesh.dp,
            self.trainer.mesh.ep,
            self.trainer.mesh.schedule,
            places[0].threads,
            places[0].device,
            self.config.run.precision,
            self.plan.num_steps(),
            self.plan.trained_tokens(),
        ));
        if let (on @ tch::Device::Cuda(_), 0) = (self.trainer.weights.device(), self.world.rank()) {
            let most = needs(self.config, &self.trainer.mesh, 1.0, self.state.tokens)?.iter().map(Need::most).max().unwrap_or(0);
            let (total, gib) = (kernels::device::gpu(on).memory()?.total_bytes as i64, |bytes: i64| bytes as f64 / (1u64 << 30) as f64);
            let verdict = if most > total { ": it will not fit" } else { "" };
            self.metrics.say(&format!("weights, gradients, optimizer and what is kept for backward take up to {:.1} GiB, with even routes, of a GPU's {:.1}{verdict}", gib(most), gib(total)));
        }
        Ok(())
    }
}

/// Where `resume` finds the run's config.
pub fn resolved(run_dir: &Path) -> PathBuf {
    run_dir.join("resolved.toml")
}

#[cfg(test)]
mod tests {
    use super::all_see;
    use parallel::comm::local::run_local;
    use std::time::{Duration, Instant};

    #[test]
    fn a_run_directory_that_is_another_on_a_host_is_told_and_a_late_view_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let dirs = ["0", "1"].map(|host| folder.path().join(host));
        dirs.iter().for_each(|dir| std::fs::create_dir(dir).unwrap());
        // Ranks 0 and 1 on one host, rank 2 on another.
        let seen = |patience| run_local(3, |world| all_see(&*world, &dirs[world.rank() / 2], Duration::from_secs(patience)).map_err(|error| error.to_string()));
        let said = seen(0);
        assert!(said[0].as_ref().is_err_and(|error| error.starts_with("rank 2: ") && error.contains("share")), "{said:?}");
        // As a shared file system shows it after a while.
        let late = std::thread::scope(|scope| {
            scope.spawn(|| {
                let (from, began) = (dirs[0].join("begun"), Instant::now());
                while !from.exists() && began.elapsed() < Duration::from_secs(50) {
                    std::thread::sleep(Duration::from_millis(5));
                }
                std::thread::sleep(Duration::from_millis(200));
                std::fs::copy(from, dirs[1].join("begun")).unwrap();
            });
            seen(60)
        });
        assert!(late.iter().all(Result::is_ok), "{late:?}");
        assert!(!dirs[0].join("begun").exists());
        // What another start has left there is not this one's.
        assert!(dirs[1].join("begun").exists() && seen(0)[0].is_err());
    }
}
