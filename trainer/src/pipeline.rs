//! One rank's part of the model under a pipeline schedule: which stages it holds, and what the schedule's actions
//! do with them.
use crate::checks::{BACKWARD, FORWARD, Probe};
use anyhow::{Result, bail, ensure};
use model::flow::{Backward, Forward, StageSaved, StageWork, Work, alone, forward_backward};
use model::stage::{StageIn, StageOut};
use model::{Grads, MicroBatch, ModelConfig, ParamId, ParamTable, Stage, StagePart, StageStats, StepContext, Weights};
use parallel::comm::{CommError, TensorSpec};
use parallel::mesh::Mesh;
use parallel::schedule::run::{Parcel, Stages};
use parallel::schedule::{Action, Chunk, Payload};
use std::collections::{HashMap, VecDeque};
use tch::{Kind, Tensor};

/// The stages of one rank, in model order: one, or under DualPipe stage r and its mirror P − 1 − r.
pub struct LocalStages {
    list: Vec<Stage>,
    /// The second one is this rank's of direction 0.
    flipped: bool,
}

/// The layers of every stage. Empty `counts`: as even as can be, the later stages (which have head and MTP) the fewer.
pub fn parts(config: &ModelConfig, num_stages: usize, counts: &[i64]) -> Result<Vec<StagePart>> {
    let (layers, stages) = (config.num_hidden_layers, num_stages as i64);
    let even = |stage: i64| layers / stages + (stage < layers % stages) as i64;
    let counts = if counts.is_empty() { (0..stages).map(even).collect() } else { counts.to_vec() };
    ensure!(counts.len() == num_stages, "parallel.layers names {} stages, parallel.pp is {num_stages}", counts.len());
    ensure!(counts.iter().all(|count| (0..=layers).contains(count)), "parallel.layers = {counts:?}: each from 0 to model.num_hidden_layers = {layers}");
    // The first has the embedding, the last the head.
    if let Some(stage) = (1..num_stages.max(2) - 1).find(|&stage| counts[stage] == 0) {
        bail!("parallel.pp = {num_stages}: stage {stage} of {counts:?} layers has none, as only the first and the last may");
    }
    let sum: i64 = counts.iter().sum();
    ensure!(sum == layers, "parallel.layers = {counts:?}: its sum is {sum}, model.num_hidden_layers is {layers}");
    let mut next = 0;
    let part = |(stage, count): (usize, i64)| {
        next += count;
        StagePart { layers: next - count..next, first: stage == 0, last: stage + 1 == num_stages }
    };
    Ok(counts.into_iter().enumerate().map(part).collect())
}

impl LocalStages {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, parts: &[StagePart], mesh: &Mesh, rank: usize) -> Self {
        let (place, stages) = (mesh.place(rank).pp, parts.len());
        let mirror = stages - 1 - place;
        if mesh.num_copies() == 1 {
            return LocalStages { list: vec![Stage::new(table, config, &parts[place])], flipped: false };
        }
        let list = [place.min(mirror), place.max(mirror)].iter().map(|&stage| Stage::new(table, config, &parts[stage])).collect();
        LocalStages { list, flipped: place > mirror }
    }

    /// The whole model on one rank.
    pub fn whole(table: &mut ParamTable, config: &ModelConfig) -> Self {
        LocalStages { list: vec![Stage::whole(table, config)], flipped: false }
    }

    fn index(&self, direction: usize) -> usize {
        if self.flipped { 1 - direction } else { direction }
    }

    pub fn direction(&self, direction: usize) -> &Stage {
        &self.list[self.index(direction)]
    }

    /// Of every MoE layer here, in model order.
    pub fn biases(&self) -> Vec<Option<ParamId>> {
        self.list.iter().flat_map(Stage::biases).collect()
    }

    /// Does any micro-batch need its tokens here?
    pub fn reads_tokens(&self) -> bool {
        self.list.iter().any(|stage| stage.is_first() || stage.is_last())
    }

    /// Every contribution to a gradient that these actions make.
    pub fn uses(&self, actions: &[Action]) -> Vec<ParamId> {
        let forwards = actions.iter().filter_map(|action| match action {
            Action::Forward(chunk) | Action::Pair { forward: chunk, .. } => Some(chunk),
            _ => None,
        });
        forwards.flat_map(|chunk| self.direction(chunk.direction).uses.iter().copied()).collect()
    }
}

/// Sums over micro-batches: [main, mtp, balance] in f64, expert counts in i64 by MoE layer of this rank.
pub struct Sums {
    pub losses: Tensor,
    counts: Vec<Tensor>,
}

impl Sums {
    pub fn new(stages: &LocalStages, weights: &Weights, experts: i64) -> Self {
        let device = weights.device();
        let counts = stages.list.iter().map(|stage| Tensor::zeros([stage.biases().len() as i64, experts], (Kind::Int64, device)));
        Sums { losses: Tensor::zeros([3], (Kind::Double, device)), counts: counts.collect() }
    }

    fn add(&mut self, stage: usize, stats: &StageStats) {
        let losses = Tensor::stack(&[&stats.main, &stats.mtp, &stats.balance], 0).to_kind(Kind::Double);
        let _ = self.losses.g_add_(&losses);
        if self.counts[stage].numel() > 0 {
            let _ = self.counts[stage].g_add_(&stats.expert_counts);
        }
    }

    /// [MoE layers of this rank, E] i64
    pub fn counts(&self) -> Tensor {
        Tensor::cat(&self.counts, 0)
    }
}

/// One step, or one loss without gradients.
pub struct Pipeline<'a, 'g> {
    pub step: &'a StepContext,
    pub stages: &'a LocalStages,
    pub weights: &'a mut Weights,
    /// None: nothing is kept for a backward.
    pub grads: Option<&'a mut Grads<'g>>,
    /// Of this pipe, in order.
    pub batch: &'a [MicroBatch],
    pub hidden_size: i64,
    pub sums: Sums,
    /// Follows one micro-batch.
    pub probe: Option<Probe>,
    saved: HashMap<Chunk, StageSaved>,
    /// Weight gradients put off, first made first.
    queue: VecDeque<(Chunk, StageWork)>,
    /// Of the last backward: its stage's direction, and gradients that hide the way of its result.
    rest: (usize, StageWork),
}

impl<'a, 'g> Pipeline<'a, 'g> {
    pub fn new(step: &'a StepContext, stages: &'a LocalStages, weights: &'a mut Weights, grads: Option<&'a mut Grads<'g>>, batch: &'a [MicroBatch], config: &ModelConfig) -> Self {
        let sums = Sums::new(stages, weights, config.n_routed_experts);
        Pipeline { step, stages, weights, grads, batch, hidden_size: config.hidden_size, sums, probe: None, saved: HashMap::new(), queue: VecDeque::new(), rest: (0, StageWork::new()) }
    }

    fn start(&mut self, chunk: Chunk, input: Parcel) -> Forward<'a> {
        if let Some(probe) = self.probed(chunk) {
            probe.came(FORWARD, &input);
        }
        let x = input.map_or(StageIn::Tokens, |tensors| StageIn::Hidden(one(tensors)));
        Forward::new(self.stages.direction(chunk.direction), self.step, self.weights, &self.batch[chunk.micro_batch], x)
    }

    fn keep(&mut self, chunk: Chunk, (out, stats, saved): (StageOut, StageStats, StageSaved)) -> Parcel {
        if let Some(probe) = self.probed(chunk) {
            let StageStats { main, mtp, balance, expert_counts } = &stats;
            let hidden = if let StageOut::Hidden(hidden) = &out { Some(hidden) } else { None };
            probe.went(FORWARD, &hidden.into_iter().chain([main, mtp, balance, expert_counts]).collect::<Vec<_>>());
        }
        self.sums.add(self.stages.index(chunk.direction), &stats);
        if self.grads.is_some() {
            self.saved.insert(chunk, saved);
        }
        match out {
            StageOut::Hidden(hidden) => Some(vec![hidden]),
            StageOut::Loss => None,
        }
    }

    fn probed(&mut self, chunk: Chunk) -> Option<&mut Probe> {
        self.probe.as_mut().filter(|probe| probe.chunk == chunk)
    }

    /// What comes back down the pipe, and what goes on.
    fn came_back(&mut self, chunk: Chunk, gradient: &Parcel) {
        if let Some(probe) = self.probed(chunk) {
            probe.came(BACKWARD, gradient);
        }
    }

    fn went_back(&mut self, chunk: Chunk, dx: &Parcel) {
        if let Some(probe) = self.probed(chunk) {
            probe.went(BACKWARD, &dx.iter().flatten().collect::<Vec<_>>());
        }
    }

    fn saved(&mut self, chunk: Chunk) -> StageSaved {
        self.saved.remove(&chunk).expect("forward ran before backward")
    }

    fn grads<'s>(grads: &'s mut Option<&'a mut Grads<'g>>) -> &'s mut Grads<'g> {
        grads.as_mut().expect("a backward needs somewhere for its gradients")
    }
}

fn one(mut tensors: Vec<Tensor>) -> Tensor {
    assert_eq!(tensors.len(), 1, "stages exchange one hidden state a micro-batch");
    tensors.pop().expect("one")
}

impl Stages for Pipeline<'_, '_> {
    type Error = CommError;

    fn specs(&self, chunk: Chunk, _: Payload) -> Vec<TensorSpec> {
        let batch = &self.batch[chunk.micro_batch];
        let shape = vec![batch.sequences() * batch.length(), self.hidden_size];
        vec![TensorSpec { shape, kind: self.weights.precision.compute(), device: self.weights.device() }]
    }

    fn forward(&mut self, chunk: Chunk, input: Parcel) -> Result<Parcel, CommError> {
        let mut run = self.start(chunk, input);
        while run.advance(self.weights, &mut alone)? {}
        Ok(self.keep(chunk, run.finish()))
    }

    fn backward(&mut self, chunk: Chunk, gradient: Parcel, split: bool) -> Result<Parcel, CommError> {
        self.came_back(chunk, &gradient);
        let (stage, saved) = (self.stages.direction(chunk.direction), self.saved(chunk));
        let mut work = StageWork::new();
        let grads = Self::grads(&mut self.grads);
        let (dx, mut rest) = stage.backward(self.weights, gradient.map(one), saved, &mut |piece| match split {
            true => work.push(piece),
            false => stage.backward_weight(piece, grads),
        })?;
        if split {
            work.append(&mut rest);
            // A pipe's worth of logits' gradients is more than all else that a last stage holds: they go as soon as the result does.
            (rest, work) = work.into_iter().partition(|piece| matches!(piece, Work::Head(_) | Work::MtpOut(_)));
            self.queue.push_back((chunk, work));
        }
        self.rest = (chunk.direction, rest);
        let dx = dx.map(|dx| vec![dx]);
        self.went_back(chunk, &dx);
        Ok(dx)
    }

    fn backward_weight(&mut self, chunk: Chunk) -> Result<(), CommError> {
        let (first, work) = self.queue.pop_front().expect("the schedule was proven");
        assert_eq!(first, chunk, "weight gradients are made in the order of the backwards");
        let (stage, grads) = (self.stages.direction(chunk.direction), Self::grads(&mut self.grads));
        work.into_iter().for_each(|piece| stage.backward_weight(piece, grads));
        Ok(())
    }

    fn pair(&mut self, (f, input): (Chunk, Parcel), (b, gradient): (Chunk, Parcel)) -> Result<(Parcel, Parcel), CommError> {
        self.came_back(b, &gradient);
        let forward = self.start(f, input);
        let backward = Backward::new(self.stages.direction(b.direction), gradient.map(one), self.saved(b));
        let (out, (dx, rest)) = forward_backward(forward, backward, self.weights, Self::grads(&mut self.grads))?;
        self.rest = (b.direction, rest);
        let dx = dx.map(|dx| vec![dx]);
        self.went_back(b, &dx);
        Ok((self.keep(f, out), dx))
    }

    fn rest(&mut self) -> Result<(), CommError> {
        let (direction, work) = std::mem::take(&mut self.rest);
        for piece in work {
            self.stages.direction(direction).backward_weight(piece, Self::grads(&mut self.grads));
        }
        Ok(())
    }
}
