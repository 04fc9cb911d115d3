//! The routed experts of this rank as grouped GEMMs over rows sorted by expert. The routing weight is applied
//! here, to the activation before the down-projection, so that what goes back to the token's rank is a plain sum.
//!
//! Legend: R rows routed here, E local experts, D hidden size, I expert intermediate size.
use crate::linear::LinearWork;
use crate::operand::{self, Operand, RowCounts};
use crate::saved::{EXPERTS_ROWS, PUT_OFF, See};
use crate::swiglu::{self, OfExperts, SwigluSaved};
use crate::{Grads, Layer, ModelConfig, ParamId, ParamTable, Recompute, Weights};
use parallel::dispatch::Rows;
use tch::Tensor;

#[derive(Debug)]
pub struct Experts {
    gate_up: ParamId, // [E, 2I, D]
    down: ParamId,    // [E, D, I]
    recompute: Recompute,
}

pub struct Routed {
    pub rows: Rows,        // [R, D], sorted by expert
    pub counts: RowCounts, // any may be 0
    pub weights: Tensor,   // [R]
}

pub struct RoutedGrad {
    pub rows: Tensor,    // [R, D]
    pub weights: Tensor, // [R]
}

pub struct ExpertsSaved {
    routed: Routed,
    activation: SwigluSaved,
}

impl ExpertsSaved {
    pub(crate) fn each(&self, see: See) {
        let Routed { rows, counts, weights } = &self.routed;
        match rows {
            Rows::Own(rows) => see(EXPERTS_ROWS, rows),
            Rows::Fp8(packed) => packed.tensors().into_iter().for_each(|tensor| see(EXPERTS_ROWS, tensor)),
        }
        see(EXPERTS_ROWS, &counts.device);
        see(EXPERTS_ROWS, weights);
        self.activation.each("experts' gate and up", see);
    }
}

/// Operands of both weights' gradients.
pub struct ExpertsWork {
    counts: RowCounts,
    gate_up: LinearWork,
    down: LinearWork,
}

impl ExpertsWork {
    pub(crate) fn each(&self, see: See) {
        see(PUT_OFF, &self.counts.device);
        [&self.gate_up, &self.down].into_iter().for_each(|linear| linear.each(see));
    }
}

impl Experts {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, prefix: &str) -> Self {
        let (experts, d, width) = (config.n_routed_experts, config.hidden_size, config.moe_intermediate_size);
        let gate_up = table.experts(format!("{prefix}.gate_up_proj.weight"), &[experts, 2 * width, d], config);
        let down = table.experts(format!("{prefix}.down_proj.weight"), &[experts, d, width], config);
        Experts { gate_up, down, recompute: table.recompute }
    }
}

impl Layer for Experts {
    type In = Routed;
    type Out = Tensor; // [R, D], weighted
    type DOut = Rows; // [R, D]
    type DIn = RoutedGrad;
    type Saved = ExpertsSaved;
    type WeightWork = ExpertsWork;

    fn forward(&self, w: &Weights, routed: Routed) -> (Tensor, ExpertsSaved) {
        let Routed { rows, counts, weights } = &routed;
        let gate_up = Operand::arrived(w, rows, self.gate_up).grouped_forward(w, self.gate_up, counts); // [R, 2I]
        let experts = Some(OfExperts { weights, counts });
        let (act, activation) = swiglu::forward(w, gate_up, experts, (self.down, self.recompute.swiglu));
        (act.grouped_forward(w, self.down, counts), ExpertsSaved { routed, activation })
    }

    fn backward_input(&self, w: &Weights, dout: Rows, saved: ExpertsSaved) -> (RoutedGrad, ExpertsWork) {
        let Routed { rows, counts, weights } = saved.routed;
        let dactivation = Operand::arrived(w, &dout, self.down).grouped_backward_input(w, self.down, &counts); // [R, I]
        let experts = Some(OfExperts { weights: &weights, counts: &counts });
        let d = swiglu::backward(w, dactivation, saved.activation, experts, self.gate_up);
        let drows = d.gate_up.grouped_backward_input(w, self.gate_up, &counts);
        let gate_up = LinearWork { dy: d.gate_up.for_weight(), x: Operand::arrived_for_weight(w, &rows, &counts, self.gate_up) };
        let down = LinearWork { dy: Operand::arrived_for_weight(w, &dout, &counts, self.down), x: d.out };
        (RoutedGrad { rows: drows, weights: d.weights.expect("the rows were weighted") }, ExpertsWork { counts, gate_up, down })
    }

    fn backward_weight(&self, work: ExpertsWork, grads: &mut Grads) {
        for (id, LinearWork { dy, x }) in [(self.down, &work.down), (self.gate_up, &work.gate_up)] {
            operand::grouped_backward_weight(grads, id, dy, x, &work.counts);
        }
    }
}
