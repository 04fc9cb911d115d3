//! The activation between the two linears of an MLP or of the experts. In FP8 runs its input is kept in FP8, by rows,
//! and its output is quantised in the same pass (report §3.3.3).
//!
//! Legend: R rows, I intermediate size, E experts.
use crate::operand::{Operand, RowCounts};
use crate::saved::See;
use crate::{ParamId, Weights};
use kernels::Precision;
use kernels::fp8::ScaleRule;
use kernels::ops::quantise::{Quantised, Want};
use kernels::ops::swiglu::{self, GateUp, Make};
use tch::{Kind, Tensor};

pub struct SwigluSaved {
    gate_up: GateUp,
    /// What the down-projection's Wgrad reads; None: made again.
    out: Option<Operand>,
    /// The activation as it was, where the sentinel watches that projection.
    own: Option<Tensor>,
}

impl SwigluSaved {
    pub(crate) fn each(&self, part: &'static str, see: See) {
        match &self.gate_up {
            GateUp::Bf16(gate_up) => see(part, gate_up),
            GateUp::Fp8(halves) => halves.iter().flat_map(|half| [&half.values, &half.scales]).for_each(|tensor| see(part, tensor)),
        }
        self.out.iter().for_each(|out| out.each(part, see));
        self.own.iter().for_each(|own| see(part, own));
    }
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

/// gate_up [R, 2I] → the activation [R, I] as the down-projection `down` reads it; `recompute`: made again in backward.
pub fn forward(w: &Weights, gate_up: Tensor, experts: Option<OfExperts>, (down, recompute): (ParamId, bool)) -> (Operand, SwigluSaved) {
    let weights = experts.map(|experts| experts.weights);
    if w.precision != Precision::Fp8 {
        let out = swiglu::forward(&gate_up, weights);
        let kept = (!recompute).then(|| Operand::Own(out.shallow_clone()));
        return (Operand::Own(out), SwigluSaved { gate_up: GateUp::Bf16(gate_up), out: kept, own: None });
    }
    // As the fused passes make them.
    let wide = |x: &Tensor| x.to_kind(w.precision.master());
    let own = w.sentinel.watches(down).then(|| swiglu::forward(&wide(&gate_up), weights).to_kind(gate_up.kind()));
    let want = if recompute { Want::ROWS } else { Want::BOTH };
    let made = swiglu::quantised(&gate_up, weights, counts(experts), Make { want, save: true, rule: ScaleRule::Amax });
    let out = Operand::Fp8 { quantised: made.act, own: own.as_ref().map(Tensor::shallow_clone) };
    let kept = (!recompute).then(|| out.share().for_weight());
    (out, SwigluSaved { gate_up: made.saved.expect("the pass was asked to save"), out: kept, own })
}

/// dout [R, I] → d[gate, up], the gradient of `up`'s output, and whatever else the linears' gradients need.
pub fn backward(w: &Weights, dout: Tensor, saved: SwigluSaved, experts: Option<OfExperts>, up: ParamId) -> SwigluGrad {
    let weights = experts.map(|experts| experts.weights);
    if w.precision != Precision::Fp8 {
        let GateUp::Bf16(gate_up) = saved.gate_up else { panic!("forward keeps the run's own kind") };
        let out = saved.out.unwrap_or_else(|| Operand::Own(swiglu::forward(&gate_up, weights)));
        let (dgate_up, dweights) = swiglu::backward(&dout, &gate_up, weights);
        return SwigluGrad { gate_up: Operand::Own(dgate_up), out, weights: dweights };
    }
    let make = Make { want: Want::BOTH, save: saved.out.is_none(), rule: ScaleRule::Amax };
    let made = swiglu::backward_quantised(&dout, &saved.gate_up, weights, counts(experts), make);
    let own = w.sentinel.watches(up).then(|| {
        let wide = dout.to_kind(w.precision.master());
        swiglu::backward(&wide, &dequantised(&saved.gate_up), weights).0.to_kind(dout.kind())
    });
    let again = || Operand::Fp8 { quantised: Quantised { rows: None, columns: made.act }, own: saved.own };
    let gate_up = Operand::Fp8 { quantised: made.dgate_up, own };
    SwigluGrad { gate_up, out: saved.out.unwrap_or_else(again), weights: made.drow_weight }
}

fn dequantised(gate_up: &GateUp) -> Tensor {
    let GateUp::Fp8(halves) = gate_up else { panic!("forward keeps it in FP8") };
    Tensor::cat(&halves.each_ref().map(|half| half.dequantise(Kind::Float)), 1)
}

fn counts<'a>(experts: Option<OfExperts<'a>>) -> Option<&'a Tensor> {
    experts.map(|experts| &experts.counts.device)
}
