//! AdamW over the masters (report §4.2): FP32 masters, moments in the masters' kind or BF16, of this rank's shards alone;
//! the weights the layers use are written in the same pass.
use crate::checks::Sums;
use crate::config::{Moments, OptimizerSection};
use crate::zero::Shard;
use kernels::fp8::ScaleRule;
use kernels::ops::adamw::{AdamW, Fp8, Outputs, State, Step};
use model::Weights;
use model::params::ParamSpec;
use tch::{Kind, Tensor};

pub struct Optimizer {
    rule: AdamW,
    /// One for each of `Zero::shards`, in their order.
    pub slots: Vec<Slot>,
    /// Updates done; a skipped step is none.
    pub updates: u64,
    /// [1] on the device: the clip factor is the host's, which has judged the norm.
    one: Tensor,
}

/// What all updates of a step share.
#[derive(Clone, Copy)]
pub struct Rate {
    clip: f64,
    lr: f64,
}

/// A shard's state; every tensor has its shape.
pub struct Slot {
    pub shard: Shard,
    /// Where the compute kind is the master's own, an alias of the weight's rows.
    pub master: Tensor,
    pub first: Tensor,
    pub second: Tensor,
    /// Of what the last update wrote; None: nobody keeps them.
    pub sums: Option<Sums>,
}

impl Optimizer {
    pub fn new(config: &OptimizerSection, weights: &Weights, shards: &[Shard], seed: u64) -> Self {
        let kind = weights.precision.master();
        let moment = match config.moments {
            Moments::F32 => kind,
            Moments::Bf16 => Kind::BFloat16,
        };
        let slots = shards.iter().map(|shard| {
            let rows = shard.of(weights.get(shard.id));
            let spec = shard.spec(weights.table.spec(shard.id));
            let zeros = || Tensor::zeros(&spec.shape, (moment, rows.device()));
            let (first, second) = (zeros(), zeros());
            // A BF16 weight has lost bits of the initial value: the master starts from the seed again.
            let master = if rows.kind() == kind { rows } else { spec.initial(seed, kind, rows.device()) };
            Slot { shard: *shard, master, first, second, sums: None }
        });
        let rule = AdamW { beta1: config.beta1, beta2: config.beta2, eps: config.eps, weight_decay: config.weight_decay };
        let one = Tensor::ones([1], (Kind::Float, weights.device()));
        Optimizer { rule, slots: slots.collect(), updates: 0, one }
    }

    /// From here on `update` makes the next update of every slot.
    pub fn begin(&mut self, clip: f64, lr: f64) -> Rate {
        self.updates += 1;
        Rate { clip, lr }
    }

    /// `gradient` of one slot, summed over all ranks that hold the parameter. Writes the shard's rows of `weights`; the other
    /// rows are for `Zero::gather` to bring.
    pub fn update(&mut self, weights: &mut Weights, index: usize, gradient: &Tensor, Rate { clip, lr }: Rate) {
        let (slot, table) = (&mut self.slots[index], weights.table.clone());
        let spec: &ParamSpec = table.spec(slot.shard.id);
        assert_eq!(gradient.size(), slot.master.size(), "shape of the gradient of {}", spec.name);
        let at = Step { lr, step: self.updates, clip, decay: spec.decayed() };
        let id = slot.shard.id;
        let whole = slot.shard.rows == spec.shape[0];
        let (weight, blocks) = if whole { weights.write_whole(id) } else { (weights.write(id), None) };
        let rows = slot.shard.of(weight);
        let fp8 = blocks.map(|both| Fp8 { plain: &both.plain, transposed: &both.transposed, rule: ScaleRule::Amax });
        let weight = (rows.kind() != slot.master.kind()).then_some(&rows); // else they are one tensor
        let state = State { master: &mut slot.master, first: &mut slot.first, second: &mut slot.second };
        self.rule.update_fused(state, gradient, &self.one, Outputs { weight, fp8 }, at);
    }

    /// The checksums of a slot and its weight's rows as they are now.
    pub fn sum_up(&mut self, weights: &Weights, index: usize) {
        let slot = &mut self.slots[index];
        slot.sums = Some(Sums::of(slot, weights));
    }

    /// The weights' rows from the masters, with the sums that AdamW left.
    pub fn rewrite(&self, weights: &mut Weights) {
        for slot in &self.slots {
            slot.shard.of(weights.write(slot.shard.id)).copy_(&slot.master);
        }
    }

    /// Of the weights' rows of these slots.
    pub fn weight_sums(&self, slots: &[usize]) -> Vec<&Tensor> {
        slots.iter().map(|&index| &self.slots[index].sums.as_ref().expect("`sum_up` came before").weight).collect()
    }
}
