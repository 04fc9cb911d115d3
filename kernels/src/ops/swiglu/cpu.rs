//! SwiGLU in torch ops.
use super::{Fused, FusedBackward, GateUp, Make};
use crate::fp8::quantise_rows;
use crate::ops::quantise::{Want, activation};
use crate::ops::wide;
use tch::{Kind, Tensor};

/// gate_up [R, 2I] (gate first), row_weight [R] → [R, I].
pub fn forward(gate_up: &Tensor, row_weight: Option<&Tensor>) -> Tensor {
    let halves = gate_up.chunk(2, -1);
    let out = halves[0].silu() * &halves[1];
    match row_weight {
        Some(weight) => out * weight.to_kind(gate_up.kind()).unsqueeze(1),
        None => out,
    }
}

/// dout [R, I] → dgate_up [R, 2I] and, where the rows were weighted, drow_weight [R].
pub fn backward(dout: &Tensor, gate_up: &Tensor, row_weight: Option<&Tensor>) -> (Tensor, Option<Tensor>) {
    let halves = gate_up.chunk(2, -1);
    let (gate, up) = (&halves[0], &halves[1]);
    let silu = gate.silu();
    let mut dout = dout.shallow_clone();
    let drow_weight = row_weight.map(|weight| {
        let per_row = (&dout * &silu * up).to_kind(wide(dout.kind())).sum_dim_intlist(&[-1i64][..], false, None);
        dout = &dout * weight.to_kind(dout.kind()).unsqueeze(1);
        per_row
    });
    let dgate = gate.silu_backward(&(&dout * up));
    let dup = dout * silu;
    (Tensor::cat(&[dgate, dup], -1), drow_weight)
}

/// The reference of the fused pass.
pub(super) fn quantised(gate_up: &Tensor, row_weight: Option<&Tensor>, counts: Option<&Tensor>, make: Make) -> Fused {
    let act = forward(&gate_up.to_kind(Kind::Float), row_weight).to_kind(Kind::BFloat16);
    let saved = make.save.then(|| {
        let halves = gate_up.chunk(2, -1);
        GateUp::Fp8([quantise_rows(&halves[0], make.rule), quantise_rows(&halves[1], make.rule)])
    });
    Fused { act: activation(&act, counts, make.want, make.rule), saved }
}

/// The reference of the fused backward.
pub(super) fn backward_quantised(
    dact: &Tensor,
    saved: &GateUp,
    row_weight: Option<&Tensor>,
    counts: Option<&Tensor>,
    make: Make,
) -> FusedBackward {
    let gate_up = match saved {
        GateUp::Bf16(gate_up) => gate_up.to_kind(Kind::Float),
        GateUp::Fp8(halves) => Tensor::cat(&halves.each_ref().map(|half| half.dequantise(Kind::Float)), 1),
    };
    let rounded = |x: Tensor| x.to_kind(Kind::BFloat16);
    let again = || activation(&rounded(forward(&gate_up, row_weight)), counts, Want::COLUMNS, make.rule).columns;
    let act = make.save.then(again);
    let (dgate_up, drow_weight) = backward(&dact.to_kind(Kind::Float), &gate_up, row_weight);
    FusedBackward {
        dgate_up: activation(&rounded(dgate_up), counts, make.want, make.rule),
        act: act.flatten(),
        drow_weight,
    }
}
