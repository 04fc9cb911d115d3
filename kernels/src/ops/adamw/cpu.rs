//! AdamW done in pieces that stay in a core's cache, so that every state is read from memory once and written once.
use super::{AdamW, Fp8, Outputs, State, Step};
use crate::ops::quantise;
use tch::{Kind, Tensor};

/// Elements of a piece: large enough for two threads to share, small enough for a core's caches.
const PIECE: i64 = 64 * 1024;

/// The flat pieces of a contiguous tensor; on a GPU (f64 runs) one.
fn pieces(tensor: &Tensor) -> Vec<Tensor> {
    let flat = tensor.view(-1);
    if flat.device().is_cuda() { vec![flat] } else { flat.split(PIECE, 0) }
}

impl AdamW {
    pub fn update(&self, state: State, gradient: &Tensor, at: Step) {
        let states = pieces(state.master).into_iter().zip(pieces(state.first)).zip(pieces(state.second));
        for (((mut master, mut first), mut second), gradient) in states.zip(pieces(&gradient.contiguous())) {
            self.update_piece(&mut master, &mut first, &mut second, gradient, at);
        }
    }

    /// m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  w ← w(1 − lr·wd) − lr·m̂ / (√v̂ + eps)
    fn update_piece(
        &self,
        master: &mut Tensor,
        stored_first: &mut Tensor,
        stored_second: &mut Tensor,
        gradient: Tensor,
        at: Step,
    ) {
        let kind = master.kind();
        let gradient = gradient.to_kind(kind);
        let gradient = if at.clip == 1.0 { gradient } else { gradient * at.clip };
        // Where the moments are of the master's kind these are the stored tensors themselves.
        let (mut first, mut second) = (stored_first.to_kind(kind), stored_second.to_kind(kind));
        let _ = first.lerp_(&gradient, 1.0 - self.beta1);
        let scaled = gradient * (1.0 - self.beta2).sqrt();
        let _ = second.g_mul_scalar_(self.beta2).addcmul_(&scaled, &scaled);
        if stored_first.kind() != kind {
            stored_first.copy_(&first);
            stored_second.copy_(&second);
        }
        if at.lr == 0.0 {
            return;
        }
        if at.decay && self.weight_decay != 0.0 {
            let _ = master.g_mul_scalar_(1.0 - at.lr * self.weight_decay);
        }
        let correction1 = 1.0 - self.beta1.powf(at.step as f64);
        let correction2 = (1.0 - self.beta2.powf(at.step as f64)).sqrt();
        // −lr/c₁ goes into the denominator: one division an element is all that is left.
        let scale = -correction1 / at.lr;
        let mut denominator = second.sqrt();
        let _ = denominator.g_mul_scalar_(scale / correction2).g_add_scalar_(scale * self.eps);
        let _ = master.addcdiv_(&first, &denominator);
    }
}

/// Σ x², pieces summed in f64 in order.
pub fn sum_of_squares(gradient: &Tensor) -> f64 {
    pieces(&gradient.contiguous()).iter().map(|piece| piece.dot(piece).double_value(&[])).sum()
}

/// The reference of the fused pass.
pub(super) fn update_fused(adamw: &AdamW, state: State, gradient: &Tensor, clip: &Tensor, out: Outputs, at: Step) {
    let clip = clip.double_value(&[0]);
    if !clip.is_finite() {
        return;
    }
    let State { master, first, second } = state;
    adamw.update(State { master: &mut *master, first, second }, gradient, Step { clip: at.clip * clip, ..at });
    if let Some(weight) = out.weight {
        weight.shallow_clone().copy_(master);
    }
    if let Some(Fp8 { plain, transposed, rule }) = out.fp8 {
        let (new, new_transposed) = quantise::weights(&master.to_kind(Kind::BFloat16), rule);
        for (to, from) in [(plain, new), (transposed, new_transposed)] {
            to.values.shallow_clone().copy_(&from.values);
            to.scales.shallow_clone().copy_(&from.scales);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    /// A number that looks random, of an index.
    fn noise(seed: i64, count: i64) -> Tensor {
        (Tensor::arange(count, (Kind::Double, Device::Cpu)) * 12.9898 + seed as f64).sin() * 0.7
    }

    #[test]
    fn three_updates_equal_the_formula_element_by_element() {
        let rule = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-3, weight_decay: 0.1 };
        let count = 2 * PIECE + 17; // the last piece is short
        let (mut master, mut first, mut second) = (noise(1, count), noise(9, count) * 0.0, noise(9, count) * 0.0);
        let mut expected: Vec<f64> = Vec::try_from(&master).expect("f64");
        let (mut m, mut v) = (vec![0.0; count as usize], vec![0.0; count as usize]);
        for step in 1..=3 {
            let (gradient, lr, clip) = (noise(100 * step, count), 0.01 * (step - 1) as f64, 0.5);
            let at = Step { lr, step: step as u64, clip, decay: step != 2 };
            rule.update(State { master: &mut master, first: &mut first, second: &mut second }, &gradient, at);
            let gradient: Vec<f64> = Vec::try_from(&gradient).expect("f64");
            let (c1, c2) = (1.0 - 0.9f64.powi(step as i32), 1.0 - 0.95f64.powi(step as i32));
            for i in 0..count as usize {
                let g = gradient[i] * clip;
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let decay = if at.decay { 1.0 - lr * 0.1 } else { 1.0 };
                expected[i] = expected[i] * decay - lr * (m[i] / c1) / ((v[i] / c2).sqrt() + 1e-3);
            }
        }
        let largest = (&master - Tensor::from_slice(&expected)).abs().max().double_value(&[]);
        assert!(largest < 1e-14, "{largest:e}");
        assert!((second - Tensor::from_slice(&v)).abs().max().double_value(&[]) < 1e-14);
    }

    #[test]
    fn the_sum_of_squares_is_taken_over_every_piece() {
        let x = noise(3, 3 * PIECE + 5);
        let expected: f64 = Vec::<f64>::try_from(&x).expect("f64").iter().map(|x| x * x).sum();
        assert!((sum_of_squares(&x) / expected - 1.0).abs() < 1e-12);
    }
}
