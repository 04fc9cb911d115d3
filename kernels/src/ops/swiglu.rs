//! SwiGLU on a packed projection: silu(gate) · up, with an optional weight a row (the routing weight, which is
//! applied here, at the expert, so that neither forward nor backward touches the wider down-projection for it).
//!
//! Legend: R rows, I intermediate size.
use super::wide;
use tch::Tensor;

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
