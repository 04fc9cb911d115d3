//! One training step.
//!
//! Legend: B sequences of a micro-batch, L positions, E experts.
use crate::balance;
use crate::guard::{Guard, Verdict};
use crate::optimizer::Optimizer;
use crate::phase::Moment;
use kernels::ops::rope::RopeScaling;
use model::mla::Positions;
use model::stage::StageIn;
use model::{Grads, MicroBatch, ModelConfig, ParamId, Stage, StepContext, Weights};
use model::params::Role;
use kernels::ops::adamw::sum_of_squares;
use parallel::comm::{Comm, CommError, Reduce};
use parallel::mesh::Groups;
use std::collections::HashMap;
use tch::{Kind, Tensor};

/// The model and its optimizer on one rank.
pub struct Trainer {
    pub config: ModelConfig,
    pub stage: Stage,
    pub weights: Weights,
    pub optimizer: Optimizer,
    pub guard: Guard,
    pub max_grad_norm: f64,
    pub groups: Groups,
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
    pub expert_counts: Vec<Vec<i64>>,
    pub applied: bool,
    pub skipped_in_a_row: u32,
    /// Some rank was asked to stop.
    pub stop: bool,
}

impl Trainer {
    pub fn new(config: &ModelConfig, stage: Stage, weights: Weights, optimizer: Optimizer, groups: Groups) -> Self {
        let biases = stage.biases();
        Trainer { config: config.clone(), stage, weights, optimizer, guard: Guard::default(), max_grad_norm: 1.0, groups, biases, positions: None }
    }

    /// Counts of the global batch, and the phase's constants.
    pub fn context(&mut self, moment: &Moment, batch: u64) -> StepContext {
        let length = moment.phase.sequence_length;
        let key = (length, moment.phase.rope_scaling.clone().or_else(|| self.config.rope_scaling.clone()));
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

    /// Forward, backward, reduce, judge, update. `micro_batches` are this rank's; `stop` is its own wish.
    pub fn step(&mut self, moment: &Moment, micro_batches: &[MicroBatch], stop: bool) -> Result<StepReport, CommError> {
        let step = self.context(moment, moment.batch);
        let mut complete: Vec<(ParamId, Tensor)> = Vec::new();
        let uses = micro_batches.iter().flat_map(|_| self.stage.uses.iter().copied());
        let mut grads = Grads::new(&self.weights, uses, &mut complete);
        let mut sums = Sums::new(&self.weights, self.biases.len(), self.config.n_routed_experts);
        for micro_batch in micro_batches {
            let (_, stats, saved) = self.stage.forward(&step, &mut self.weights, micro_batch, StageIn::Tokens)?;
            sums.add(&stats);
            self.stage.backward(&self.weights, None, saved, &mut |work| self.stage.backward_weight(work, &mut grads))?;
        }
        grads.finish();
        complete.sort_by_key(|(id, _)| *id);
        let (losses, counts) = sums.reduce(&self.groups.data, stop)?;
        let gradients = self.reduce(complete)?;
        let norm = self.grad_norm(&gradients)?;

        let loss = losses[0] / step.main_targets as f64;
        let verdict = self.guard.judge(losses.iter().sum(), norm);
        if verdict == Verdict::Apply {
            let clip = if norm > self.max_grad_norm { self.max_grad_norm / norm } else { 1.0 };
            self.optimizer.step(&mut self.weights, &gradients, clip, moment.lr);
            balance::update(&mut self.weights, &self.biases, &counts, moment.phase.bias_speed);
        }
        Ok(StepReport {
            loss,
            mtp: (self.config.num_nextn_predict_layers == 1).then(|| losses[1] / step.mtp_targets as f64),
            balance: losses[2] * step.balance_weight / step.sequences as f64,
            grad_norm: norm,
            load: balance::extremes(&counts),
            expert_counts: Vec::<Vec<i64>>::try_from(&counts).unwrap_or_default(),
            applied: verdict == Verdict::Apply,
            skipped_in_a_row: if let Verdict::Skip { in_a_row } = verdict { in_a_row } else { 0 },
            stop: losses[3] > 0.0,
        })
    }

    /// Sums in rank order: experts over the ranks that hold the same ones, everything else over all.
    fn reduce(&self, gradients: Vec<(ParamId, Tensor)>) -> Result<Vec<(ParamId, Tensor)>, CommError> {
        let order: Vec<ParamId> = gradients.iter().map(|(id, _)| *id).collect();
        let (experts, dense): (Vec<_>, Vec<_>) = gradients.into_iter().partition(|(id, _)| self.is_expert(*id));
        let mut reduced = HashMap::new();
        for (group, part) in [(&self.groups.data, dense), (&self.groups.expert_data, experts)] {
            let (ids, tensors): (Vec<ParamId>, Vec<Tensor>) = part.into_iter().unzip();
            reduced.extend(ids.into_iter().zip(group.all_reduce(tensors, Reduce::Sum)?.wait()?));
        }
        Ok(order.into_iter().map(|id| (id, reduced.remove(&id).expect("every gradient was reduced"))).collect())
    }

    fn is_expert(&self, id: ParamId) -> bool {
        self.weights.table.spec(id).role == Role::Experts
    }

    /// ‖g‖ over all parameters; the experts of other ranks counted once.
    fn grad_norm(&self, gradients: &[(ParamId, Tensor)]) -> Result<f64, CommError> {
        let sum = |experts| gradients.iter().filter(|(id, _)| self.is_expert(*id) == experts).map(|(_, gradient)| sum_of_squares(gradient)).sum::<f64>();
        let mine = Tensor::from_slice(&[sum(true)]);
        let experts = self.groups.expert.all_reduce(vec![mine], Reduce::Sum)?.wait()?;
        Ok((sum(false) + experts[0].double_value(&[0])).sqrt())
    }

    /// Σ of the main loss over this rank's micro-batches, without a gradient.
    pub fn loss_only(&mut self, moment: &Moment, micro_batches: &[MicroBatch]) -> Result<f64, CommError> {
        let step = self.context(moment, micro_batches.len().max(1) as u64);
        let mut total = 0.0;
        for micro_batch in micro_batches {
            let (_, stats, _) = self.stage.forward(&step, &mut self.weights, micro_batch, StageIn::Tokens)?;
            total += stats.main.double_value(&[]);
        }
        Ok(total)
    }
}

/// Sums over micro-batches: [main, mtp, balance] in f64, expert counts in i64.
struct Sums {
    losses: Tensor,
    counts: Tensor,
}

impl Sums {
    fn new(weights: &Weights, layers: usize, experts: i64) -> Self {
        let device = weights.device();
        Sums { losses: Tensor::zeros([3], (Kind::Double, device)), counts: Tensor::zeros([layers as i64, experts], (Kind::Int64, device)) }
    }

    fn add(&mut self, stats: &model::StageStats) {
        let losses = Tensor::stack(&[&stats.main, &stats.mtp, &stats.balance], 0).to_kind(Kind::Double);
        let _ = self.losses.g_add_(&losses);
        if self.counts.numel() > 0 {
            let _ = self.counts.g_add_(&stats.expert_counts);
        }
    }

    /// ([main, mtp, balance, stop], counts) over all ranks.
    fn reduce(self, data: &Comm, stop: bool) -> Result<(Vec<f64>, Tensor), CommError> {
        let stop = Tensor::from_slice(&[stop as i64 as f64]).to_device(self.losses.device());
        let losses = Tensor::cat(&[self.losses, stop], 0);
        let mut reduced = data.all_reduce(vec![losses, self.counts], Reduce::Sum)?.wait()?;
        let counts = reduced.pop().expect("two went in");
        Ok((Vec::<f64>::try_from(&reduced[0]).expect("f64 sums"), counts))
    }
}
