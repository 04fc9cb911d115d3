//! What a step does about corruption: look, tell every rank, mend the weights.
use super::{Finding, Place, Probe};
use crate::guard::Worst;
use crate::pipeline::Pipeline;
use crate::step::Trainer;
use crate::zero::Turn;
use model::{GradSink, Grads, MicroBatch, ParamId, StepContext};
use parallel::comm::{CommError, Reduce, gather_bytes};
use parallel::schedule::run::run as run_schedule;
use parallel::schedule::{Action, Chunk, Schedule};
use tch::{Device, Kind, Tensor};

impl Trainer {
    /// Weights, masters and moments are as they should be: from here on they are held against their checksums. Collective.
    pub fn seal(&mut self) -> Result<(), CommError> {
        self.weights.ready(|_| true)?;
        if self.checks.config.memory {
            (0..self.optimizer.slots.len()).for_each(|index| self.optimizer.sum_up(&self.weights, index));
            self.checks.set_biases(&self.weights);
        }
        self.gather()
    }

    /// Every weight again from its master. They must come to what AdamW wrote: the checksums stay.
    pub fn rewrite_weights(&mut self) -> Result<(), CommError> {
        self.optimizer.rewrite(&mut self.weights);
        self.gather()
    }

    /// The new weights of this rank's shards to all that compute with them.
    pub(crate) fn gather(&mut self) -> Result<(), CommError> {
        self.zero.turns().iter().try_for_each(|turn| self.send(turn))
    }

    pub(crate) fn send(&mut self, turn: &Turn) -> Result<(), CommError> {
        let sums = self.checks.config.memory.then(|| self.optimizer.weight_sums(&turn.shards));
        self.zero.gather(turn, &mut self.weights, sums)
    }

    /// Is everything in memory as it was left? Collective.
    pub fn verify(&mut self) -> Result<Vec<Finding>, CommError> {
        let mine = self.inspect()?.to_kind(Kind::Double).to_device(Device::Cpu);
        let all = self.groups.world.all_reduce(vec![mine], Reduce::Sum)?.wait()?;
        if all[0].double_value(&[0]) > 0.0 { self.findings() } else { Ok(Vec::new()) }
    }

    /// What the guard does not believe.
    pub(crate) fn disbelieved(&self, worst: &Worst) -> Finding {
        let what = format!("the gradient of {} holds {:.3e}, the limit is {}", worst.tensor, worst.value, self.guard.gradient_limit());
        Finding { rank: worst.rank, place: Place::Gradient, what }
    }

    /// How much is wrong here: [1] f64.
    pub(crate) fn inspect(&mut self) -> Result<Tensor, CommError> {
        self.weights.ready(|_| true)?;
        Ok(self.checks.inspect(&self.weights, &self.zero, &self.optimizer.slots))
    }

    pub(crate) fn findings(&mut self) -> Result<Vec<Finding>, CommError> {
        self.checks.findings(&self.weights, &*self.groups.world)
    }

    /// The micro-batch that this step looks at twice, if it does: any of those that go up the pipe.
    pub(crate) fn probe(&mut self, actions: &[Action]) -> Option<Probe> {
        let every = self.checks.config.recompute_every;
        if every == 0 || !self.number.is_multiple_of(every) {
            return None;
        }
        let chunks = actions.iter().filter_map(|action| match action {
            Action::Forward(chunk) | Action::Pair { forward: chunk, .. } => Some(*chunk),
            _ => None,
        });
        let chunks: Vec<Chunk> = chunks.filter(|chunk| chunk.direction == 0).collect();
        // The same on every rank: each has one of them all.
        let turn = (self.number / every).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
        let mut probe = Probe::new(chunks[turn as usize % chunks.len()]);
        probe.flip = self.faults.in_activation(self.number);
        Some(probe)
    }

    /// Computes the probe's micro-batch again, for nothing but the comparison.
    pub(crate) fn compute_again(&mut self, step: &StepContext, batch: &[MicroBatch], probe: &Probe) -> Result<(), CommError> {
        let (micro_batch, pipe) = (probe.chunk.micro_batch, self.groups.pipe.clone());
        let actions = Schedule::GPipe.actions(pipe.rank(), self.mesh.pp, 1).expect("it is made for any number of ranks");
        let mut nowhere = Nowhere;
        let mut grads = Grads::new(&self.weights, self.stages.uses(&actions), &mut nowhere);
        let one = [batch[micro_batch].share()];
        let mut pipeline = Pipeline::new(step, &self.stages, &mut self.weights, Some(&mut grads), &one, &self.config);
        pipeline.probe = Some(Probe::new(Chunk { direction: 0, micro_batch: 0 }));
        run_schedule(&actions, &*pipe, &mut pipeline)?;
        let again = pipeline.probe.take().expect("just put there");
        grads.finish();
        self.checks.twice = probe.compare(&again, self.groups.world.rank(), micro_batch);
        Ok(())
    }

    /// The largest element of any gradient, and whose it is; one that is not a number is larger than all. Collective.
    pub(crate) fn worst_gradient(&self, gradients: &[Tensor]) -> Result<Option<Worst>, CommError> {
        let key = |value: f64| if value.is_nan() { f64::INFINITY } else { value };
        let rank = self.groups.world.rank();
        let named = self.optimizer.slots.iter().map(|slot| &self.weights.table.spec(slot.shard.id).name);
        let each = named.zip(gradients).filter(|(_, gradient)| gradient.numel() > 0);
        let worst = each.map(|(name, gradient)| Worst { rank, tensor: name.clone(), value: gradient.abs().max().double_value(&[]) });
        let worst = worst.max_by(|a, b| key(a.value).total_cmp(&key(b.value)));
        // As bits: JSON has no NaN.
        let told = worst.map(|worst| (worst.rank, worst.tensor, worst.value.to_bits()));
        let all = gather_bytes(&*self.groups.world, &serde_json::to_vec(&told).expect("plain values"))?;
        let read = |bytes: &Vec<u8>| serde_json::from_slice::<Option<(usize, String, u64)>>(bytes).expect("another rank's worst");
        let all = all.iter().filter_map(read).map(|(rank, tensor, bits)| Worst { rank, tensor, value: f64::from_bits(bits) });
        Ok(all.reduce(|a, b| if key(b.value) > key(a.value) { b } else { a }))
    }
}

struct Nowhere;

impl GradSink for Nowhere {
    fn complete(&mut self, _: ParamId, _: Tensor) {}
}
