//! The activation between the two linears of an MLP or of the experts. In FP8 runs its input is kept in FP8, by rows,
//! and its output is quantised in the same pass (report §3.3.3).
//!
//! Legend: R rows, I intermediate size, E experts.
use crate::operand::{Operand, RowCounts};
use kernels::Precision;
use kernels::fp8::ScaleRule;
use kernels::ops::quantise::{Quantised, Want};
use kernels::ops::swiglu::{self, GateUp, Make};
use tch::Tensor;

pub struct SwigluSaved {
    gate_up: GateUp,
    /// What the down-projection's Wgrad reads; None: made again.
    out: Option<Operand>,
}

/// Of experts' rows: the routing weight of each [R], applied to the activation, and how many each expert has.
#[derive(Clone, Copy)]
pub struct OfExperts<'a> {
    pub weights: &'a Tensor,
    pub counts: &'a RowCounts,
}

pub struct SwigluGrad {
    pub gate_up: Operand, // [R, 2I]
    /// The activation, for the down-projection's Wgrad.
    pub out: Operand,
    pub weights: Option<Tensor>, // [R]
}

/// gate_up [R, 2I] → the activation [R, I] as the down-projection reads it.
pub fn forward(precision: Precision, gate_up: Tensor, experts: Option<OfExperts>, recompute: bool) -> (Operand, SwigluSaved) {
    let weights = experts.map(|experts| experts.weights);
    if precision != Precision::Fp8 {
        let out = swiglu::forward(&gate_up, weights);
        let kept = (!recompute).then(|| Operand::Own(out.shallow_clone()));
        return (Operand::Own(out), SwigluSaved { gate_up: GateUp::Bf16(gate_up), out: kept });
    }
    let want = if recompute { Want::ROWS } else { Want::BOTH };
    let made = swiglu::quantised(&gate_up, weights, counts(experts), Make { want, save: true, rule: ScaleRule::Amax });
    let Quantised { rows, columns } = made.act;
    let kept = (!recompute).then_some(Operand::Fp8(Quantised { rows: None, columns }));
    let saved = SwigluSaved { gate_up: made.saved.expect("the pass was asked to save"), out: kept };
    (Operand::Fp8(Quantised { rows, columns: None }), saved)
}

/// dout [R, I] → d[gate, up], and whatever else the linears' gradients need.
pub fn backward(precision: Precision, dout: Tensor, saved: SwigluSaved, experts: Option<OfExperts>) -> SwigluGrad {
    let weights = experts.map(|experts| experts.weights);
    if precision != Precision::Fp8 {
        let GateUp::Bf16(gate_up) = saved.gate_up else { panic!("forward keeps the run's own kind") };
        let out = saved.out.unwrap_or_else(|| Operand::Own(swiglu::forward(&gate_up, weights)));
        let (dgate_up, dweights) = swiglu::backward(&dout, &gate_up, weights);
        return SwigluGrad { gate_up: Operand::Own(dgate_up), out, weights: dweights };
    }
    let make = Make { want: Want::BOTH, save: saved.out.is_none(), rule: ScaleRule::Amax };
    let made = swiglu::backward_quantised(&dout, &saved.gate_up, weights, counts(experts), make);
    let again = || Operand::Fp8(Quantised { rows: None, columns: made.act });
    SwigluGrad { gate_up: Operand::Fp8(made.dgate_up), out: saved.out.unwrap_or_else(again), weights: made.drow_weight }
}

fn counts<'a>(experts: Option<OfExperts<'a>>) -> Option<&'a Tensor> {
    experts.map(|experts| &experts.counts.device)
}
