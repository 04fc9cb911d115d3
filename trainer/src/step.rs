//! One training step.
//!
//! Legend: B sequences of a micro-batch, L positions, E experts.
use crate::balance;
use crate::checks::{Checks, Finding, Probe};
use crate::config::RunConfig;
use crate::device;
use crate::ema::Ema;
use crate::faults::Faults;
use crate::guard::{Guard, Reason, Verdict, Worst};
use crate::optimizer::Optimizer;
use crate::phase::Moment;
use crate::pipeline::{LocalStages, Pipeline, parts};
use crate::sentinel::{Seen, Sentinel};
use crate::state::StateReader;
use crate::zero::{Arriving, BUCKET_BYTES, Turn, Zero};
use anyhow::Result;
use kernels::Precision;
use kernels::ops::gradient_norm;
use kernels::ops::rope::RopeScaling;
use model::mla::Positions;
use model::{ExpertShare, Grads, MicroBatch, ModelConfig, ParamId, ParamTable, StepContext, Weights};
use parallel::comm::{Comm, CommError, Reduce};
use parallel::dispatch::Wire;
use parallel::mesh::{Groups, Mesh};
use parallel::schedule::run::run as run_schedule;
use parallel::schedule::{Action, Schedule};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// The model and its optimizer on one rank.
pub struct Trainer {
    pub config: ModelConfig,
    pub mesh: Mesh,
    pub stages: LocalStages,
    pub weights: Weights,
    pub zero: Zero,
    pub optimizer: Optimizer,
    pub ema: Option<Ema>,
    pub guard: Guard,
    pub checks: Checks,
    pub sentinel: Sentinel,
    pub faults: Faults,
    /// Of the step under way, as the log counts: from 1.
    pub number: u64,
    pub max_grad_norm: f64,
    pub groups: Groups,
    /// What runs on threads of its own while the next step's gradients are computed.
    pub beside: Vec<StateReader>,
    pub document_boundaries: bool,
    biases: Vec<Option<ParamId>>,
    positions: Option<(PositionsKey, Positions)>,
}

/// What a table of positions depends on.
type PositionsKey = (u64, Option<RopeScaling>);

/// Means over the global batch; the same on every rank.
#[derive(Clone, Debug)]
pub struct StepReport {
    pub loss: f64,
    pub mtp: Option<f64>,
    /// Mean over sequences, summed over layers, with α.
    pub balance: f64,
    pub grad_norm: f64,
    /// Largest and smallest expert load ÷ mean.
    pub load: (f64, f64),
    /// Why the update was not applied, if it was not.
    pub skipped: Option<Reason>,
    /// An element of a gradient above the limit, twice the same way: the samples' own.
    pub odd: Option<Worst>,
    /// Corruption in this step's computation or in what it rests on: nothing was changed, and the step is to be done again.
    pub found: Vec<Finding>,
    /// What the FP8 sentinel did.
    pub seen: Seen,
    /// Some rank was asked to stop.
    pub stop: bool,
    /// What the step waited for those that ran beside it.
    pub held_up: Duration,
}

/// What a rank's forwards and backwards came to, on its way to being summed.
pub struct Computed {
    /// [main, mtp, balance] f64, of this rank.
    losses: Tensor,
    counts: Tensor,
    gradients: Arriving,
    probe: Option<Probe>,
}

/// Of all ranks.
pub struct Totals {
    /// [main, mtp, balance] over the world.
    pub losses: Vec<f64>,
    /// How many ranks were asked to stop; how much is corrupt.
    pub stop: f64,
    pub corrupt: f64,
    /// ‖g‖ over all parameters: every element has one owner in the world.
    pub grad_norm: f64,
    /// Expert counts of this rank's layers over all that hold them, on the host.
    pub counts: Tensor,
    /// Of this rank's shards over all that hold them.
    pub gradients: Vec<Tensor>,
}

impl StepReport {
    pub fn applied(&self) -> bool {
        self.skipped.is_none() && self.found.is_empty()
    }
}

impl Trainer {
    /// This rank's part of the model, with the seed's weights. Collective over `world`.
    pub fn new(config: &RunConfig, mesh: &Mesh, world: Comm) -> Result<Self> {
        let device = device::open(config, &*world)?;
        let parts = parts(&config.model, mesh.pp, &config.parallel.layers)?;
        let mut groups = Groups::new(world, mesh, config.model.num_nextn_predict_layers == 1)?;
        if device.is_cuda() {
            groups.meet(device)?;
        }
        if config.run.precision == Precision::Fp8 {
            groups.expert = groups.expert.with_wire(Wire::Fp8);
        }
        let stays = groups.expert_data.size() == 1 && groups.data.size() > 1;
        let share = ExpertShare { rank: groups.expert.all.rank() as i64, ranks: groups.expert.all.size() as i64, stays };
        let mut table = ParamTable::new(share, config.recompute);
        let stages = LocalStages::new(&mut table, &config.model, &parts, mesh, groups.world.rank());
        let weights = Weights::initial(Rc::new(table), config.run.precision, config.run.seed, device);
        let zero = Zero::new(&groups, &weights, BUCKET_BYTES)?;
        let optimizer = Optimizer::new(&config.optimizer, &weights, zero.shards(), config.run.seed);
        Ok(Trainer {
            config: config.model.clone(),
            mesh: mesh.clone(),
            biases: stages.biases(),
            stages,
            weights,
            zero,
            ema: (config.ema.decay > 0.0).then(|| Ema::new(config.ema.decay, &optimizer.slots)).transpose()?,
            optimizer,
            guard: Guard::new(config.guard.clone()),
            checks: Checks::new(config.checks.clone()),
            sentinel: Sentinel::new(&config.sentinel, &config.model),
            faults: Faults::open(&config.faults, &config.run.dir, (groups.world.rank(), groups.world.size()))?,
            number: 0,
            max_grad_norm: config.optimizer.max_grad_norm,
            groups,
            beside: Vec::new(),
            document_boundaries: config.attention.document_boundaries,
            positions: None,
        })
    }

    /// Counts of the global batch, and the phase's constants.
    pub fn context(&mut self, moment: &Moment, batch: u64) -> StepContext {
        let length = moment.phase.sequence_length;
        let key = (length, moment.phase.rope_scaling_of(&self.config));
        let positions = match self.positions.take() {
            Some((cached, positions)) if cached == key => positions,
            _ => Positions::new(&self.config, key.1.as_ref(), length as i64, (self.weights.precision.master(), self.weights.device())),
        };
        self.positions = Some((key, positions.clone()));
        StepContext {
            main_targets: (batch * length) as i64,
            mtp_targets: (batch * (length - 1)) as i64,
            sequences: batch as i64,
            mtp_weight: moment.phase.mtp_weight,
            balance_weight: moment.phase.balance_weight,
            positions,
            experts: self.groups.expert.clone(),
        }
    }

    /// Forward, backward, reduce, judge, update. `batch`: this pipe's micro-batches; `stop` is this rank's own wish.
    pub fn step(&mut self, moment: &Moment, batch: &[MicroBatch], stop: bool) -> Result<StepReport, CommError> {
        let step = self.context(moment, moment.batch);
        let mut beside = std::mem::take(&mut self.beside);
        if self.faults.in_memory_due(self.number) {
            run_beside(beside.split_off(0), || ()); // what is injected comes after the copy
        }
        self.faults.in_memory(self.number, &mut self.weights, &self.zero, &self.optimizer)?;
        self.sentinel.begin(self.number, &mut self.weights);
        let (computed, held_up) = run_beside(beside, || self.gradients(&step, batch));
        let Totals { losses, stop, corrupt, grad_norm: norm, counts, gradients } = self.total(&step, batch, computed?, stop)?;
        let mut found = if corrupt > 0.0 { self.findings()? } else { Vec::new() };

        let loss = losses[0] / step.main_targets as f64;
        let mut odd = None;
        let verdict = if found.is_empty() {
            let worst = if self.guard.wants_worst(norm) { self.worst_gradient(&gradients)? } else { None };
            let all = if losses.iter().all(|loss| loss.is_finite()) { loss } else { f64::NAN };
            odd = worst.filter(|worst| self.guard.impossible(worst));
            let verdict = self.guard.judge(all, norm, odd.as_ref());
            found.extend(odd.take_if(|_| verdict == Verdict::Again).map(|worst| self.disbelieved(&worst)));
            verdict
        } else {
            Verdict::Again
        };
        let seen = if found.is_empty() { self.sentinel.end(self.number, &self.weights, &*self.groups.world)? } else { Seen::default() };
        if verdict == Verdict::Apply {
            let clip = if norm > self.max_grad_norm { self.max_grad_norm / norm } else { 1.0 };
            self.ema.iter_mut().for_each(Ema::keep_up);
            self.update(&gradients, clip, moment.lr)?;
            self.ema.iter_mut().for_each(|ema| ema.update(&self.optimizer.slots));
            balance::update(&mut self.weights, &self.biases, &counts, moment.phase.bias_speed);
            self.checks.set_biases(&self.weights);
        }
        let load = self.load(balance::extremes(&counts))?; // between hosts alone, while a GPU updates
        Ok(StepReport {
            loss,
            mtp: (self.config.num_nextn_predict_layers == 1).then(|| losses[1] / step.mtp_targets as f64),
            balance: losses[2] * step.balance_weight / step.sequences as f64,
            grad_norm: norm,
            load,
            skipped: if let Verdict::Skip(reason) = verdict { Some(reason) } else { None },
            odd: odd.filter(|worst| worst.value.is_finite()),
            found,
            seen,
            stop: stop > 0.0,
            held_up,
        })
    }

    /// New weights travel to those that compute with them as soon as they are written.
    fn update(&mut self, gradients: &[Tensor], clip: f64, lr: f64) -> Result<(), CommError> {
        assert_eq!(gradients.len(), self.optimizer.slots.len(), "a gradient for every shard");
        let rate = self.optimizer.begin(clip, lr);
        // While hosts tell each other where a turn's rows go, their GPUs update the next one's; but not all that stays here.
        let mut written: Option<Turn> = None;
        for turn in self.zero.turns() {
            if turn.stays() {
                written.take().map_or(Ok(()), |written| self.send(&written))?;
            }
            for &index in &turn.shards {
                self.optimizer.update(&mut self.weights, index, &gradients[index], rate);
                if self.checks.config.memory {
                    self.optimizer.sum_up(&self.weights, index);
                }
            }
            written.replace(turn).map_or(Ok(()), |written| self.send(&written))?;
        }
        written.map_or(Ok(()), |written| self.send(&written))
    }

    /// Forwards and backwards of a step; their sums are under way.
    pub fn gradients(&mut self, step: &StepContext, batch: &[MicroBatch]) -> Result<Computed, CommError> {
        let actions = self.actions(batch.len());
        let probe = self.probe(&actions);
        // Of DualPipe's two copies of the stages a step of few micro-batches runs one.
        let one_copy = self.mesh.schedule.for_step(self.mesh.pp, batch.len()) != self.mesh.schedule;
        let mut reduction = self.zero.begin(one_copy);
        let mut grads = Grads::new(&self.weights, self.stages.uses(&actions), &mut reduction);
        let mut pipeline = Pipeline::new(step, &self.stages, &mut self.weights, Some(&mut grads), batch, &self.config);
        pipeline.probe = probe;
        run_schedule(&actions, &*self.groups.pipe, &mut pipeline)?;
        let Pipeline { sums, probe, .. } = pipeline;
        grads.finish();
        Ok(Computed { counts: sums.counts(), losses: sums.losses, gradients: reduction.finish()?, probe })
    }

    /// The sums, and what the host must know of them: it waits once. `stop` is this rank's own wish.
    pub fn total(&mut self, step: &StepContext, batch: &[MicroBatch], computed: Computed, stop: bool) -> Result<Totals, CommError> {
        let Computed { losses, counts, gradients, probe } = computed;
        let (gradients, mut squares) = gradients.sum()?;
        if let Some(probe) = probe {
            self.compute_again(step, batch, &probe)?;
        }
        if self.faults.in_gradients(self.number, &gradients) {
            squares = gradient_norm::sum_of_squares(&gradients.iter().collect::<Vec<_>>());
        }
        // Made where they are: every copy from or to the host waits for the GPU.
        let stop = Tensor::full([1], stop as i64, (Kind::Double, losses.device()));
        let mine = Tensor::cat(&[&losses, &stop, &self.inspect()?, &squares.view(1).to_device(losses.device())], 0);
        // A few numbers, which the host waits for: over MPI, where thousands of ranks tell each other in a dozen rounds.
        let [counts, mine] = [counts, mine].map(|small| vec![small.to_device(Device::Cpu)]);
        let counts = self.groups.data.all_reduce(counts, Reduce::Sum)?;
        let sums = self.groups.world.all_reduce(mine, Reduce::Sum)?.wait()?;
        let mut losses = Vec::<f64>::try_from(&sums[0]).expect("f64 sums");
        let [stop, corrupt, squares] = losses.split_off(3)[..] else { unreachable!("six sums") };
        let counts = counts.wait()?.pop().expect("one went in");
        Ok(Totals { losses, stop, corrupt, grad_norm: squares.sqrt(), counts, gradients })
    }

    /// This rank's list for a step of so many micro-batches.
    fn actions(&self, micro_batches: usize) -> Vec<Action> {
        let schedule = self.mesh.schedule.for_step(self.mesh.pp, micro_batches);
        schedule.actions(self.groups.pipe.rank(), self.mesh.pp, micro_batches).expect("every step's schedule was checked at the start")
    }

    /// Largest and smallest load of an expert ÷ its layer's mean, over all layers of the model, from those of a rank's.
    fn load(&self, (max, min): (f64, f64)) -> Result<(f64, f64), CommError> {
        let both = self.groups.world.all_reduce(vec![Tensor::from_slice(&[max, -min])], Reduce::Max)?.wait()?;
        let (max, min) = (both[0].double_value(&[0]), -both[0].double_value(&[1]));
        Ok(if min.is_finite() { (max, min) } else { (1.0, 1.0) }) // a model without a router
    }

    /// Σ of the main loss over this pipe's micro-batches, without a gradient; 0 on every rank but the last stage's.
    pub fn loss_only(&mut self, moment: &Moment, batch: &[MicroBatch]) -> Result<f64, CommError> {
        let step = self.context(moment, batch.len().max(1) as u64);
        let actions = Schedule::forwards(self.groups.pipe.rank(), self.mesh.pp, batch.len());
        let mut pipeline = Pipeline::new(&step, &self.stages, &mut self.weights, None, batch, &self.config);
        run_schedule(&actions, &*self.groups.pipe, &mut pipeline)?;
        Ok(pipeline.sums.losses.double_value(&[0]))
    }
}

/// `work` of the rank's own thread, which changes nothing of the state, with the readers of the state on theirs; and how long
/// it waited for them after that. None of them is left when it returns.
pub fn run_beside<R>(readers: Vec<StateReader>, work: impl FnOnce() -> R) -> (R, Duration) {
    std::thread::scope(|scope| {
        let threads: Vec<_> = readers.into_iter().map(|reader| scope.spawn(reader)).collect();
        let (result, done) = (work(), Instant::now());
        threads.into_iter().for_each(|thread| thread.join().expect("a copy does not panic"));
        (result, done.elapsed())
    })
}
