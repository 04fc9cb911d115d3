//! AdamW over the masters (report §4.2): FP32 masters, moments in the masters' kind or BF16; the weights the
//! layers use are written in the same pass.
use crate::config::{Moments, OptimizerSection};
use kernels::ops::adamw::{AdamW, State, Step};
use model::{ParamId, Weights};
use tch::{Kind, Tensor};

pub struct Optimizer {
    rule: AdamW,
    pub slots: Vec<Slot>,
    /// Updates done; a skipped step is none.
    pub updates: u64,
}

/// One trained parameter's state.
pub struct Slot {
    pub id: ParamId,
    /// Where the compute kind is the master's own, this is the weight itself.
    pub master: Tensor,
    pub first: Tensor,
    pub second: Tensor,
}

impl Optimizer {
    pub fn new(config: &OptimizerSection, weights: &Weights, seed: u64) -> Self {
        let kind = weights.precision.master();
        let moment = match config.moments {
            Moments::F32 => kind,
            Moments::Bf16 => Kind::BFloat16,
        };
        let table = &weights.table;
        let slots = table.ids().filter(|&id| table.spec(id).trained()).map(|id| {
            let weight = weights.get(id);
            // A BF16 weight has lost bits of the initial value: the master starts from the seed again.
            let master = if weight.kind() == kind { weight.shallow_clone() } else { table.spec(id).initial(seed, kind).to_device(weight.device()) };
            let zeros = || Tensor::zeros(weight.size(), (moment, weight.device()));
            Slot { id, master, first: zeros(), second: zeros() }
        });
        let rule = AdamW { beta1: config.beta1, beta2: config.beta2, eps: config.eps, weight_decay: config.weight_decay };
        Optimizer { rule, slots: slots.collect(), updates: 0 }
    }

    /// `gradients` in slot order, already summed over the data-parallel ranks.
    pub fn step(&mut self, weights: &mut Weights, gradients: &[(ParamId, Tensor)], clip: f64, lr: f64) {
        self.updates += 1;
        for (slot, (id, gradient)) in self.slots.iter_mut().zip(gradients) {
            assert_eq!(slot.id, *id, "gradients come in slot order");
            let at = Step { lr, step: self.updates, clip, decay: weights.table.spec(*id).decayed() };
            self.rule.update(State { master: &mut slot.master, first: &mut slot.first, second: &mut slot.second }, gradient, at);
            if weights.get(*id).kind() != slot.master.kind() {
                weights.set(*id, &slot.master);
            }
        }
    }
}
