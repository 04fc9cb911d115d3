//! A run from its first step (or its newest checkpoint) to its last.
mod corpus;
mod mend;
mod tier;

pub use corpus::open_checked;
pub use mend::StateLost;

use crate::checkpoint::second_tier::SecondTier;
use crate::checkpoint::{self, Cursor, Manifest, Progress, Reader, Retention, Saved, Saver};
use crate::config::RunConfig;
use crate::coordinator::{StopSignal, agree, all_or_none, gather_layout, nodes};
use crate::device;
use crate::metrics::{Metrics, StepLine, ValidationLine};
use crate::phase::{Moment, Phase, Plan};
use crate::step::{StepReport, Trainer};
use crate::summary::Summary;
use crate::validate::held_out_loss;
use crate::waiting::Reporter;
use anyhow::{Context, Result, bail, ensure};
use corpus::Corpus;
use data::{Sample, Source};
use kernels::ops::rope::RopeScaling;
use model::{MicroBatch, ModelConfig};
use parallel::comm::watched::{Watch, watched};
use parallel::comm::{Comm, barrier};
use parallel::mesh::Mesh;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::{Device, Tensor};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The run directory must not hold a run.
    Fresh,
    /// From the newest whole checkpoint.
    Resume,
}

pub struct Outcome {
    pub summary: Summary,
}

struct Run<'a> {
    config: &'a RunConfig,
    plan: Plan,
    world: Comm,
    trainer: Trainer,
    corpus: Corpus,
    metrics: Metrics,
    watch: Watch,
    /// Of the time that was last taken.
    waited_ms: f64,
    state: State,
    saver: Saver,
    tier: Option<SecondTier>,
    /// The newest whole one.
    last_checkpoint: Option<(u64, PathBuf)>,
    /// What the newest save held the run up, until a step's line has said it.
    stall_ms: Option<f64>,
    validated: Option<u64>,
    /// How often the step under way was done again.
    again: u32,
    /// Of the newest step's phase: what an export must say.
    rope_scaling: Option<RopeScaling>,
    memory_said: bool,
}

/// What a checkpoint remembers beside the tensors.
#[derive(Clone, Default)]
struct State {
    step: u64,
    tokens: u64,
    cursor: Cursor,
    progress: Progress,
}

/// Runs to the end of the phases, a stop signal or `run.stop_after`. Collective over `world`.
pub fn train(config: &RunConfig, world: Comm, start: Start, stop: &StopSignal) -> Result<Outcome> {
    device::open(config, &*world)?; // before the long part: a machine without what it needs says so at once
    let layout = config.mesh(&nodes(&*world)?)?;
    let (world, watch) = watched(device::connect(config, &layout, world)?);
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let schedules = prove_schedules(&plan, &layout)?;
    let free = if world.rank() == 0 && start == Start::Fresh { check_free(&config.run.dir) } else { Ok(()) };
    all_or_none(&*world, free)?;
    let corpus = all_or_none(&*world, Corpus::open(config, &plan))?;
    if let (Some(held_out), true) = (&corpus.held_out, layout.ep > 1) {
        let sequences = config.validation.sequences.min(held_out.num_samples());
        let dp = layout.dp as u64;
        ensure!(sequences % dp == 0, "validation over {sequences} sequences on dp {dp} with experts shared by ep {} ranks: must be a multiple of dp", layout.ep);
    }
    let facts = [("binary", binary()?), ("config", config.to_toml()?), ("corpus", corpus.fingerprint())];
    agree(&*world, &facts)?;

    let mut trainer = Trainer::new(config, &layout, world.clone())?;
    let second = &config.checkpoint.second_tier;
    let tier = (second.every > 0).then(|| SecondTier::new(second, &config.run.dir, &layout.nodes, &*world)).transpose()?;
    let (state, last_checkpoint, notes) = restore((config, start, tier.as_ref()), &world, &mut trainer, &corpus)?;
    tier.iter().for_each(SecondTier::clear); // the run goes on from a checkpoint, or begins again
    // Only now, with everything checked, is anything written.
    let ready = if world.rank() == 0 && start == Start::Fresh { prepare_dir(config) } else { Ok(()) };
    all_or_none(&*world, ready)?;
    trainer.seal()?;
    let metrics = all_or_none(&*world, Metrics::open(&config.run.dir, world.rank(), state.step, plan.num_steps()))?;
    let retention = Retention { last: config.checkpoint.keep_last, every: config.checkpoint.keep_every };
    let (saver, rope_scaling) = (Saver::new(&config.run.dir, retention), config.model.rope_scaling.clone());
    let mut run = Run { config, plan, world, trainer, corpus, metrics, watch, waited_ms: 0.0, state, saver, tier, last_checkpoint, stall_ms: None, validated: None, again: 0, rope_scaling, memory_said: false };
    let _reporter = Reporter::start(&run.watch, &config.run.dir, run.world.rank());
    run.announce(start, &[notes, schedules].concat())?;
    let finished = run.steps(stop)?;
    run.finish(finished)
}

/// BLAKE3 of the program that runs: ranks of two builds must not meet.
fn binary() -> Result<String> {
    let path = std::env::current_exe()?;
    let file = std::fs::File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(blake3::Hasher::new().update_reader(file)?.finalize().to_hex().to_string())
}

/// A directory with a checkpoint holds a run; one that a crash left before its first checkpoint may be used again.
fn check_free(dir: &Path) -> Result<()> {
    let used = !checkpoint::list(dir)?.is_empty();
    ensure!(!used, "{} already holds a run: resume it (tiefsee resume {}) or name another run.dir", dir.display(), dir.display());
    Ok(())
}

fn prepare_dir(config: &RunConfig) -> Result<()> {
    let dir = &config.run.dir;
    remove_ours(&dir.join("log"), "rank-", ".jsonl")?;
    remove_ours(&dir.join("tensorboard"), "events.out.tfevents.", "")?;
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make the run directory {}", dir.display()))?;
    let mut kept = config.clone();
    kept.run.stop_after = None;
    kept.run.dir = std::path::absolute(dir)?;
    let local = |source: &&mut Source| !data::is_url(&source.path);
    let absolute = |sources: &mut Vec<Source>| sources.iter_mut().filter(local).try_for_each(|source| std::path::absolute(&source.path).map(|path| source.path = path));
    absolute(&mut kept.data.mixture)?;
    kept.phase.iter_mut().filter_map(|phase| phase.mixture.as_mut()).try_for_each(absolute)?;
    kept.run.init_from = kept.run.init_from.map(std::path::absolute).transpose()?;
    let resolved = resolved(dir);
    std::fs::write(&resolved, kept.to_toml()?).with_context(|| format!("cannot write {}", resolved.display()))
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

/// Proves the schedule of every step of the run, and says where it is not the one asked for.
fn prove_schedules(plan: &Plan, mesh: &Mesh) -> Result<Vec<String>> {
    let mut proven = BTreeMap::new();
    for moment in plan.moments() {
        let micro_batches = (moment.batch / (moment.phase.micro_batch * mesh.dp as u64)) as usize;
        if let std::collections::btree_map::Entry::Vacant(entry) = proven.entry(micro_batches) {
            let schedule = mesh.schedule.for_step(mesh.pp, micro_batches);
            schedule.proven(mesh.pp, micro_batches)?;
            entry.insert(schedule);
        }
    }
    let note = |(count, schedule)| format!("steps of {count} micro-batches a pipe run {schedule}, {} needs an even number of at least {}", mesh.schedule, 2 * mesh.pp);
    Ok(proven.into_iter().filter(|(_, schedule)| *schedule != mesh.schedule).map(note).collect())
}

type Restored = (State, Option<(u64, PathBuf)>, Vec<String>);

type Begin<'a> = (&'a RunConfig, Start, Option<&'a SecondTier>);

fn restore((config, start, tier): Begin, world: &Comm, trainer: &mut Trainer, corpus: &Corpus) -> Result<Restored> {
    if start == Start::Fresh {
        if let Some(path) = &config.run.init_from {
            all_or_none(&**world, if world.rank() == 0 { checkpoint::verify(path).map(|_| ()) } else { Ok(()) })?;
            all_or_none(&**world, Reader::open(path).and_then(|mut reader| trainer.load_weights(&mut reader)))?;
        }
        return Ok((State::default(), None, Vec::new()));
    }
    let dir = &config.run.dir;
    let (found, mut notes) = checkpoint::load_newest(&**world, dir, tier, &mut |reader| trainer.load_all(reader))?;
    let Some((path, manifest)) = found else {
        tier.iter().for_each(|tier| tier.clear()); // the launcher is not to try again
        bail!("{} holds no whole checkpoint to resume from{}", dir.display(), notes.iter().map(|note| format!("\n  {note}")).collect::<String>());
    };
    ensure!(manifest.seed == config.run.seed, "{} was written with seed {}, the run's is {}", path.display(), manifest.seed, config.run.seed);
    ensure!(manifest.corpus == corpus.fingerprint(), "{} was written over another corpus than {} now is", path.display(), config.data.mixture[0].path.display());
    trainer.guard.state = manifest.progress.guard.clone();
    trainer.sentinel.state = manifest.progress.sentinel.clone();
    notes.push(format!("resuming from {} (step {}, {} tokens)", path.display(), manifest.step, manifest.tokens));
    let state = State { step: manifest.step, tokens: manifest.tokens, cursor: manifest.cursor, progress: manifest.progress };
    Ok((state, Some((manifest.step, path)), notes))
}

impl Run<'_> {
    fn announce(&self, start: Start, notes: &[String]) -> Result<()> {
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
            self.plan.total_tokens(),
        ));
        Ok(())
    }

    /// True: the phases are over. False: stopped on request.
    fn steps(&mut self, stop: &StopSignal) -> Result<bool> {
        let plan = self.plan.clone();
        let mut mark = Instant::now();
        if self.state.step == 0 {
            self.validate(&mut mark)?;
        }
        while let Some(moment) = plan.at(self.state.tokens) {
            if self.config.run.stop_after.is_some_and(|limit| self.state.step >= limit) {
                return Ok(false);
            }
            if self.state.cursor.order != moment.order {
                self.state.cursor = Cursor { order: moment.order, next: 0 };
            }
            self.trainer.number = self.state.step + 1;
            self.trainer.faults.before_step(self.trainer.number, &*self.world)?;
            let first = self.state.cursor.next;
            let batches = self.read_batch(&plan, first)?;
            let report = self.trainer.step(&moment, &batches, stop.raised())?;
            if !report.found.is_empty() {
                self.mend(&report.found)?;
                continue;
            }
            self.again = 0;
            self.rope_scaling = moment.phase.rope_scaling.clone().or_else(|| self.config.model.rope_scaling.clone());
            let tokens = moment.batch * moment.phase.sequence_length;
            self.state.step += 1;
            self.state.tokens += tokens;
            self.state.cursor.next += moment.batch;
            let seconds = self.take_time(&mut mark);
            self.record(&report, (tokens, seconds, moment.lr), [first, first + moment.batch - 1])?;
            self.metrics.sentinel(self.state.step, &report.seen)?;
            self.report_memory()?;
            self.judge(&report, moment.batch)?;
            let ended = self.saver.poll(&*self.world)?;
            self.saved(ended);
            if self.due(self.config.validation.every) {
                self.validate(&mut mark)?;
            }
            if self.due(self.config.checkpoint.every) {
                self.save()?;
                self.take_time(&mut mark);
            }
            if self.due(self.config.checkpoint.second_tier.every) {
                self.copy_to_tier()?;
                self.take_time(&mut mark);
            }
            if report.stop {
                self.metrics.say("stopping on request");
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn due(&self, every: u64) -> bool {
        every > 0 && self.state.step.is_multiple_of(every)
    }

    /// Seconds since `mark`, added to the run's; `mark` moves.
    fn take_time(&mut self, mark: &mut Instant) -> f64 {
        let seconds = mark.elapsed().as_secs_f64();
        self.state.progress.seconds += seconds;
        self.waited_ms = self.watch.take_waited().as_secs_f64() * 1e3;
        *mark = Instant::now();
        seconds
    }

    /// This rank's micro-batches of the step that starts at sample `first`; the next step's are asked for.
    fn read_batch(&self, plan: &Plan, first: u64) -> Result<Vec<MicroBatch>> {
        let moment = plan.at(self.state.tokens).expect("the caller is inside a phase");
        if !self.trainer.stages.reads_tokens() {
            return Ok(self.blank_batch(&moment));
        }
        let loader = self.corpus.loader(moment.order);
        let samples = loader.read(&self.share(first, moment.batch))?;
        let after = self.state.tokens + moment.batch * moment.phase.sequence_length;
        if let Some(next) = plan.at(after).filter(|next| next.order == moment.order) {
            loader.prefetch(&self.share(first + moment.batch, next.batch));
        }
        Ok(micro_batches(&samples, moment.phase.micro_batch as usize, self.trainer.weights.device()))
    }

    /// For the stages between the ends of the pipe, which look at no token: the shapes of the step's micro-batches.
    fn blank_batch(&self, moment: &Moment) -> Vec<MicroBatch> {
        let (size, length) = (moment.phase.micro_batch as i64, moment.phase.sequence_length as i64);
        let count = moment.batch / moment.phase.micro_batch / self.trainer.mesh.dp as u64;
        let blank = Tensor::zeros([1, 1], (tch::Kind::Int64, self.trainer.weights.device())).expand([size, length + 1], false);
        (0..count).map(|_| MicroBatch { tokens: blank.shallow_clone() }).collect()
    }

    /// The samples of a global batch that this rank's pipe takes: the r-th of `dp` equal runs.
    fn share(&self, first: u64, batch: u64) -> Vec<u64> {
        let mesh = &self.trainer.mesh;
        let each = batch / mesh.dp as u64;
        let start = first + each * mesh.place(self.world.rank()).dp as u64;
        (start..start + each).collect()
    }

    fn record(&mut self, report: &StepReport, (tokens, seconds, lr): (u64, f64, f64), samples: [u64; 2]) -> Result<()> {
        let line = StepLine {
            step: self.state.step,
            tokens: self.state.tokens,
            loss: report.loss,
            mtp_loss: report.mtp,
            balance_loss: report.balance,
            grad_norm: report.grad_norm,
            lr,
            load_max: report.load.0,
            load_min: report.load.1,
            tokens_per_s: tokens as f64 / seconds,
            step_ms: seconds * 1e3,
            busy_ms: (seconds * 1e3 - self.waited_ms).max(0.0),
            stage: self.trainer.mesh.place(self.world.rank()).pp,
            applied: report.applied(),
            order: self.state.cursor.order,
            samples,
            save_stall_ms: self.stall_ms.take(),
        };
        self.metrics.step(&line)
    }

    /// On a GPU; for people once, when the first step has shown the peak.
    fn report_memory(&mut self) -> Result<()> {
        let Some(report) = self.trainer.memory()? else { return Ok(()) };
        self.metrics.memory(self.state.step, &report);
        if !std::mem::replace(&mut self.memory_said, true) {
            self.metrics.say(&report.to_string());
        }
        Ok(())
    }

    fn judge(&mut self, report: &StepReport, batch: u64) -> Result<()> {
        let Some(reason) = &report.skipped else { return Ok(()) };
        self.state.progress.skipped_steps += 1;
        let next = self.state.cursor.next;
        let samples = format!("samples {} to {} of order {}", next - batch, next - 1, self.state.cursor.order);
        self.metrics.event(self.state.step, "skipped", &format!("step {}: {reason}; the update was skipped ({samples})", self.state.step))?;
        if self.trainer.guard.gives_up() {
            self.save_whole()?;
            let skipped = self.trainer.guard.state.in_a_row;
            bail!("{skipped} steps in a row were skipped, the last because {reason}: stopped, with a checkpoint at step {}", self.state.step);
        }
        Ok(())
    }

    fn validate(&mut self, mark: &mut Instant) -> Result<()> {
        let (Some(held_out), true) = (&self.corpus.held_out, self.config.validation.every > 0) else { return Ok(()) };
        // Always the first phase's sequence length, so that the numbers of one run compare.
        let plan = self.plan.clone();
        let first = plan.at(0).expect("a run has a first phase");
        let phase = Phase { rope_scaling: self.rope_scaling.clone(), ..first.phase.clone() };
        let moment = Moment { phase: &phase, ..first };
        let loss = held_out_loss(&mut self.trainer, held_out, &moment, self.config.validation.sequences)?;
        self.state.progress.val_loss_start.get_or_insert(loss);
        self.state.progress.val_loss = Some(loss);
        self.validated = Some(self.state.step);
        self.take_time(mark);
        self.metrics.validation(&ValidationLine { step: self.state.step, validation_loss: loss })
    }

    fn head(&self) -> Manifest {
        let head = Manifest::head(self.config, &self.trainer.mesh, self.trainer.optimizer.updates);
        let State { step, tokens, cursor, progress } = self.state.clone();
        let model = ModelConfig { rope_scaling: self.rope_scaling.clone(), ..head.model.clone() };
        let (guard, sentinel) = (self.trainer.guard.state.clone(), self.trainer.sentinel.state.clone());
        let progress = Progress { guard, sentinel, ..progress };
        Manifest { step, tokens, cursor, progress, model, corpus: self.corpus.fingerprint(), ..head }
    }

    fn save(&mut self) -> Result<()> {
        self.verified()?;
        let start = Instant::now();
        self.saver.injected = self.trainer.faults.disk(self.state.step).err();
        let ended = self.saver.begin(&*self.world, self.head(), self.trainer.state())?;
        self.stalled(start);
        self.saved(ended);
        Ok(())
    }

    /// A failed save is no end of the run: the one before stays, and the next may go well.
    fn saved(&mut self, ended: Option<Saved>) {
        match ended {
            Some(Saved { step, path, seconds, outcome: Ok(()) }) => {
                self.metrics.say(&format!("checkpoint {} | written in {seconds:.1} s", path.display()));
                self.last_checkpoint = Some((step, path));
            }
            Some(Saved { path, outcome: Err(error), .. }) => {
                let newest = self.last_checkpoint.as_ref().map_or("there is none yet".into(), |(_, path)| format!("the newest whole one is {}", path.display()));
                self.metrics.say(&format!("checkpoint {} was NOT written: {error}; {newest}", path.display()));
            }
            None => {}
        }
    }

    /// A checkpoint of this very step, on the disk when it returns.
    fn save_whole(&mut self) -> Result<()> {
        let step = self.state.step;
        let whole = |run: &Self| run.last_checkpoint.as_ref().is_some_and(|(at, _)| *at == step);
        let ended = self.saver.wait(&*self.world)?;
        self.saved(ended);
        if !whole(self) {
            self.save()?;
            let ended = self.saver.wait(&*self.world)?;
            self.saved(ended);
        }
        ensure!(whole(self), "there is no checkpoint of step {step}: see above");
        Ok(())
    }

    fn finish(mut self, finished: bool) -> Result<Outcome> {
        if finished && self.validated != Some(self.state.step) {
            self.validate(&mut Instant::now())?;
        }
        self.save_whole()?;
        self.leave_tier(finished)?;
        let progress = &self.state.progress;
        let summary = Summary {
            steps: self.state.step,
            tokens: self.state.tokens,
            tokens_per_s: self.state.tokens as f64 / progress.seconds.max(1e-9),
            unigram_entropy: self.corpus.unigram_entropy,
            val_loss_start: progress.val_loss_start,
            val_loss_end: progress.val_loss,
            checkpoint: self.last_checkpoint.as_ref().map(|(_, path)| path.clone()),
            seconds: progress.seconds,
            skipped_steps: progress.skipped_steps,
            finished,
        };
        let written = if self.world.rank() == 0 { summary.write(&self.config.run.dir) } else { Ok(()) };
        all_or_none(&*self.world, written)?;
        self.metrics.say(&format!("{} at step {}", if finished { "finished" } else { "stopped" }, self.state.step));
        barrier(&*self.world)?;
        Ok(Outcome { summary })
    }
}

/// Samples → micro-batches of up to `size` sequences.
pub fn micro_batches(samples: &[Sample], size: usize, device: Device) -> Vec<MicroBatch> {
    let batch = |chunk: &[Sample]| {
        let tokens: Vec<i64> = chunk.iter().flat_map(|sample| sample.tokens.iter().map(|&token| token as i64)).collect();
        MicroBatch { tokens: Tensor::from_slice(&tokens).view([chunk.len() as i64, -1]).to_device(device) }
    };
    samples.chunks(size).map(batch).collect()
}

/// Where `resume` finds the run's config.
pub fn resolved(run_dir: &Path) -> PathBuf {
    run_dir.join("resolved.toml")
}
