//! A run from its first step (or its newest checkpoint) to its last.
mod batch;
mod corpus;
mod lock;
mod mend;
mod record;
mod save;
mod start;
mod streams;
mod tier;

pub use batch::micro_batches;
pub use corpus::open_checked;
pub use mend::StateLost;
pub use record::GaveUp;
pub use start::{check_validation, prove_schedules, resolved};

use crate::checkpoint::second_tier::SecondTier;
use crate::checkpoint::{Cursor, Progress, Retention, Saver};
use crate::config::RunConfig;
use crate::coordinator::{StopSignal, agree, all_or_none, nodes};
use crate::device;
use crate::metrics::Metrics;
use crate::phase::Plan;
use crate::step::Trainer;
use crate::summary::Summary;
use crate::waiting::Reporter;
use anyhow::{Context, Result};
use corpus::Corpus;
use kernels::ops::rope::RopeScaling;
use parallel::comm::nccl::Hold;
use parallel::comm::watched::{Watch, watched};
use parallel::comm::{Comm, Communicator, barrier};
use parallel::mesh::Mesh;
use start::{Restored, binary, check_free, ready_dir, restore};
use std::path::PathBuf;
use std::time::Instant;

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
    // What every rank finds alike, one of them says.
    let (layout, apart) = lay_out(config, &*world, start)?;
    let hold = Hold::held(); // until all is done: an error, from here on, is one rank's
    let (world, watch) = watched(device::connect(config, &layout, world, &hold)?);
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let free = if world.rank() == 0 && start == Start::Fresh { check_free(&config.run.dir) } else { Ok(()) };
    all_or_none(&*world, free)?;
    let corpus = Corpus::open(config, &plan).with_context(|| match start {
        Start::Fresh => "the run's corpora".into(),
        Start::Resume => format!("the corpora that {} names", resolved(&config.run.dir).display()),
    });
    let mut corpus = all_or_none(&*world, corpus)?;
    if start == Start::Fresh {
        corpus.look_for_files(&*world, 0)?; // a resume knows later what is still to be read
    }
    all_or_none(&*world, check_validation(config, &layout, corpus.held_out.as_ref().map(data::Loader::num_samples)))?;
    let facts = [("binary", binary()?), ("config", config.to_toml()?), ("corpus", corpus.fingerprint())];
    agree(&*world, &facts)?;

    // From here on nobody else may write, or have written, in the directory.
    let held = || lock::hold(&config.run.dir).and_then(|lock| if start == Start::Fresh { check_free(&config.run.dir).map(|()| lock) } else { Ok(lock) });
    let _lock = all_or_none(&*world, if world.rank() == 0 { held() } else { Ok(None) })?;
    let mut trainer = Trainer::new(config, &layout, world.clone())?;
    let second = &config.checkpoint.second_tier;
    let tier = (second.every > 0).then(|| SecondTier::new(second, &config.run.dir, &apart, start == Start::Fresh, &*world)).transpose()?;
    let Restored { state, newest: last_checkpoint, damaged, notes } = restore((config, start, tier.as_ref()), &world, &mut trainer, &corpus)?;
    let schedules = all_or_none(&*world, prove_schedules(config, &layout, state.tokens))?;
    if start == Start::Resume {
        // A checkpoint on an order's edge, or at the end, reads nothing more of the order that it has reached.
        let from = plan.at(state.tokens).map_or(state.cursor.order + 1, |moment| moment.order);
        corpus.look_for_files(&*world, from)?;
    }
    // The run goes on from a checkpoint, or begins.
    tier.iter().for_each(if start == Start::Fresh { SecondTier::clear_place } else { SecondTier::clear });
    // Only now, with everything checked, is anything written.
    ready_dir(config, start, &damaged, &*world)?;
    trainer.seal()?;
    let metrics = all_or_none(&*world, Metrics::open(&config.run.dir, (world.rank(), world.size()), state.step, plan.num_steps()))?;
    let retention = Retention { last: config.checkpoint.keep_last, every: config.checkpoint.keep_every };
    let mut saver = Saver::new(&config.run.dir, retention);
    last_checkpoint.iter().for_each(|(step, _)| saver.adopt(&*world, *step, &state.progress.guard));
    // Of the phase of the last token read: a checkpoint on an edge, or at the end, belongs to the one before it.
    let last = config.phase.last().expect("a run has a phase");
    let rope_scaling = plan.at(state.tokens.saturating_sub(1)).map_or(last, |moment| moment.phase).rope_scaling_of(&config.model);
    let mut run = Run {
        config,
        plan,
        world,
        trainer,
        corpus,
        metrics,
        watch,
        waited_ms: 0.0,
        state,
        saver,
        tier,
        last_checkpoint,
        stall_ms: None,
        again: 0,
        rope_scaling,
        memory_said: false,
    };
    let _reporter = Reporter::start(&run.watch, &config.run.dir, run.world.rank());
    let notes = [notes, schedules, run.corpus.notes.clone()].concat();
    let outcome = run.announce(start, &notes).and_then(|()| run.steps(stop)).and_then(|finished| run.finish(finished));
    if outcome.is_ok() {
        hold.let_go();
    } else if run.trainer.weights.device().is_cuda() {
        run.saver.removed();
        std::mem::forget(run); // a transfer that is dropped is waited for, and peers wait for this rank
    }
    outcome
}

/// And what is lost together: emulated nodes of one host are, where there are several.
fn lay_out(config: &RunConfig, world: &dyn Communicator, start: Start) -> Result<(Mesh, Vec<usize>)> {
    let hosts = nodes(world)?;
    let layout = config.layout(&hosts).and_then(|layout| match start {
        Start::Fresh => prove_schedules(config, &layout, 0).map(|_| layout),
        Start::Resume => Ok(layout), // proven once it is known where it stands
    });
    let layout = all_or_none(world, layout)?;
    let apart = if hosts.iter().any(|&host| host > 0) { hosts } else { layout.nodes.clone() };
    Ok((layout, apart))
}

impl Run<'_> {
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
                self.corpus.loader(self.state.cursor.order).forget();
                self.state.cursor = Cursor { order: moment.order, next: 0 };
                self.trainer.guard.forget();
            }
            self.trainer.number = self.state.step + 1;
            self.trainer.faults.before_step(self.trainer.number, &*self.world)?;
            let first = self.state.cursor.next;
            let batches = self.read_batch(&plan, first)?;
            self.trainer.beside = self.copies();
            let report = self.trainer.step(&moment, &batches, stop.raised())?;
            self.stall_ms = self.stall_ms.map(|ms| ms + report.held_up.as_secs_f64() * 1e3);
            if !report.found.is_empty() {
                self.mend(&report.found, ", and the step is done again")?;
                continue;
            }
            self.again = 0;
            self.rope_scaling = moment.phase.rope_scaling_of(&self.config.model);
            let tokens = moment.batch * moment.phase.sequence_length;
            self.state.step += 1;
            self.state.tokens += tokens;
            self.state.cursor.next += moment.batch;
            let seconds = self.take_time(&mut mark);
            self.record(&report, (tokens, seconds, moment.lr), [first, first + moment.batch - 1]);
            self.metrics.sentinel(self.state.step, &report.seen);
            self.report_memory()?;
            self.judge(&report, moment.batch)?;
            let ended = self.saver.poll(&*self.world)?;
            self.saved(ended);
            self.remove_old();
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

    fn finish(&mut self, finished: bool) -> Result<Outcome> {
        if finished && self.state.progress.validated != Some(self.state.step) {
            self.verified()?;
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
        if finished {
            self.check_learnt()?;
        }
        Ok(Outcome { summary })
    }
}
