//! Faults in a rank's tensors.
use super::{Dice, Fault, FaultKind, Faults};
use crate::optimizer::Optimizer;
use crate::zero::{Shard, Zero};
use model::Weights;
use parallel::comm::CommError;
use tch::{Kind, Tensor};

impl Faults {
    /// Does `in_memory` change something at this step?
    pub fn in_memory_due(&self, step: u64) -> bool {
        self.waiting.iter().any(|(_, fault)| fault.step == step && matches!(fault.kind, FaultKind::FlipWeight | FaultKind::FlipMaster))
    }

    /// Between the last update and the step's first use of a weight.
    pub fn in_memory(&mut self, step: u64, weights: &mut Weights, zero: &Zero, optimizer: &Optimizer) -> Result<(), CommError> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let now = |at: u64| at == step;
        if let Some(fault) = self.take(FaultKind::FlipWeight, now) {
            weights.ready(|_| true)?; // else what is on its way would mend it
            let mut dice = dice(&fault);
            let shard = *pick(&mut dice, &copies(weights, zero, optimizer));
            flip(&shard.of(weights.write(shard.id)), &mut dice, None);
        }
        if let Some(fault) = self.take(FaultKind::FlipMaster, now) {
            let mut dice = dice(&fault);
            let slot = pick(&mut dice, &optimizer.slots);
            let state = *pick(&mut dice, &[&slot.master, &slot.first, &slot.second]);
            flip(state, &mut dice, None);
        }
        Ok(())
    }

    /// Between the sum of the gradients and their use; whether one was changed.
    pub fn in_gradients(&mut self, step: u64, gradients: &[Tensor]) -> bool {
        let now = |at: u64| at == step;
        let before = self.waiting.len();
        if let Some(fault) = self.take(FaultKind::Nan, now) {
            let mut dice = dice(&fault);
            let gradient = pick(&mut dice, gradients);
            let _ = element(gradient, &mut dice).fill_(f64::NAN);
        }
        if self.take(FaultKind::Spike, now).is_some() {
            gradients.iter().for_each(|gradient| drop(gradient.shallow_clone().g_mul_scalar_(200.0)));
        }
        if let Some(fault) = self.take(FaultKind::FlipGradient, now) {
            let mut dice = dice(&fault);
            let gradient = pick(&mut dice, gradients);
            let top = bits(gradient.kind()) - 2; // below the sign
            // The largest: a zero that becomes 2 moves one weight by one step, and cannot be told from what odd text does.
            let flat = gradient.view(-1);
            let largest = flat.abs().argmax(0, false).int64_value(&[]);
            flip(&flat.narrow(0, largest, 1), &mut dice, Some(top));
        }
        self.waiting.len() < before
    }

    /// Is a bit of this step's checked activation to be flipped here?
    pub fn in_activation(&mut self, step: u64) -> bool {
        self.take(FaultKind::FlipActivation, |at| at <= step).is_some()
    }
}

/// Flips some bit of some element.
pub fn flip_any(tensor: &Tensor, seed: u64) {
    flip(tensor, &mut Dice(seed), None);
}

fn dice(fault: &Fault) -> Dice {
    Dice(fault.step.wrapping_mul(0x1_0000_0001) ^ fault.rank as u64)
}

/// Rows that AdamW has written a weight of beside the master, here or elsewhere; all there are, where there is no such row.
fn copies(weights: &Weights, zero: &Zero, optimizer: &Optimizer) -> Vec<Shard> {
    let alias =
        |shard: &Shard| optimizer.slots.iter().any(|slot| slot.shard == *shard && slot.master.kind() == weights.get(slot.shard.id).kind());
    let all = zero.held();
    let apart: Vec<Shard> = all.iter().copied().filter(|shard| !alias(shard)).collect();
    if apart.is_empty() { all } else { apart }
}

fn pick<'a, T>(dice: &mut Dice, of: &'a [T]) -> &'a T {
    assert!(!of.is_empty(), "a fault in a tensor of a rank that owns none");
    &of[dice.below(of.len() as u64) as usize]
}

fn element(tensor: &Tensor, dice: &mut Dice) -> Tensor {
    tensor.view(-1).narrow(0, dice.below(tensor.numel() as u64) as i64, 1)
}

pub(super) fn bits(kind: Kind) -> u64 {
    8 * kind.elt_size_in_bytes() as u64
}

pub(super) fn flip(tensor: &Tensor, dice: &mut Dice, bit: Option<u64>) {
    let element = element(tensor, dice);
    let bit = bit.unwrap_or_else(|| dice.below(bits(tensor.kind())));
    let word = match bits(tensor.kind()) {
        64 => Kind::Int64,
        32 => Kind::Int,
        _ => Kind::Int16,
    };
    let mask = Tensor::from(1_i64.wrapping_shl(bit as u32)).to_kind(word).to_device(tensor.device());
    let _ = element.view_dtype(word).bitwise_xor_tensor_(&mask);
}
