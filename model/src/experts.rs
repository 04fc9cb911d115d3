//! The routed experts of this rank as grouped GEMMs over rows sorted by expert. The routing weight is applied
//! here, to the activation before the down-projection, so that what goes back to the token's rank is a plain sum.
//!
//! Legend: R rows routed here, E local experts, D hidden size, I expert intermediate size.
use crate::{Grads, Layer, ModelConfig, ParamId, ParamTable, Weights};
use kernels::ops::{linear, swiglu};
use tch::Tensor;

#[derive(Debug)]
pub struct Experts {
    gate_up: ParamId, // [E, 2I, D]
    down: ParamId,    // [E, D, I]
}

pub struct Routed {
    pub rows: Tensor,     // [R, D], sorted by expert
    pub counts: Vec<i64>, // [E], any may be 0
    pub weights: Tensor,  // [R]
}

pub struct RoutedGrad {
    pub rows: Tensor,    // [R, D]
    pub weights: Tensor, // [R]
}

pub struct ExpertsSaved {
    routed: Routed,
    gate_up: Tensor, // [R, 2I]
}

pub struct ExpertsWork {
    counts: Vec<i64>,
    rows: Tensor,
    dgate_up: Tensor,
    activation: Tensor,
    dout: Tensor,
}

impl Experts {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, prefix: &str) -> Self {
        let (experts, d, width) = (config.n_routed_experts, config.hidden_size, config.moe_intermediate_size);
        let gate_up = table.experts(format!("{prefix}.gate_up_proj.weight"), &[experts, 2 * width, d], config);
        let down = table.experts(format!("{prefix}.down_proj.weight"), &[experts, d, width], config);
        Experts { gate_up, down }
    }
}

/// (expert, first row, rows) of the experts that have any.
fn groups(counts: &[i64]) -> impl Iterator<Item = (i64, i64, i64)> + '_ {
    let starts = counts.iter().scan(0, |next, &count| {
        let start = *next;
        *next += count;
        Some(start)
    });
    counts.iter().zip(starts).enumerate().filter(|(_, (count, _))| **count > 0).map(|(expert, (&count, start))| (expert as i64, start, count))
}

/// rows [R, A] times each expert's own matrix [A, B] → [R, B].
fn grouped(rows: &Tensor, counts: &[i64], width: i64, matrix: impl Fn(i64) -> Tensor) -> Tensor {
    let out = Tensor::empty([rows.size()[0], width], (rows.kind(), rows.device()));
    for (expert, start, count) in groups(counts) {
        let _ = rows.narrow(0, start, count).mm_out(&out.narrow(0, start, count), &matrix(expert));
    }
    out
}

impl Layer for Experts {
    type In = Routed;
    type Out = Tensor; // [R, D], weighted
    type DOut = Tensor;
    type DIn = RoutedGrad;
    type Saved = ExpertsSaved;
    type WeightWork = ExpertsWork;

    fn forward(&self, w: &Weights, routed: Routed) -> (Tensor, ExpertsSaved) {
        let (up, down) = (w.get(self.gate_up), w.get(self.down));
        assert_eq!(routed.counts.iter().sum::<i64>(), routed.rows.size()[0], "row counts of the experts");
        let gate_up = grouped(&routed.rows, &routed.counts, up.size()[1], |e| up.select(0, e).tr()); // [R, 2I]
        let activation = swiglu::forward(&gate_up, Some(&routed.weights));
        let out = grouped(&activation, &routed.counts, down.size()[1], |e| down.select(0, e).tr());
        (out, ExpertsSaved { routed, gate_up })
    }

    fn backward_input(&self, w: &Weights, dout: Tensor, saved: ExpertsSaved) -> (RoutedGrad, ExpertsWork) {
        let (up, down) = (w.get(self.gate_up), w.get(self.down));
        let Routed { rows, counts, weights } = saved.routed;
        let activation = swiglu::forward(&saved.gate_up, Some(&weights));
        let dactivation = grouped(&dout, &counts, down.size()[2], |e| down.select(0, e)); // [R, I]
        let (dgate_up, dweights) = swiglu::backward(&dactivation, &saved.gate_up, Some(&weights));
        let drows = grouped(&dgate_up, &counts, up.size()[2], |e| up.select(0, e));
        let dweights = dweights.expect("the rows were weighted");
        (RoutedGrad { rows: drows, weights: dweights }, ExpertsWork { counts, rows, dgate_up, activation, dout })
    }

    fn backward_weight(&self, work: ExpertsWork, grads: &mut Grads) {
        for (id, dy, x) in [(self.gate_up, &work.dgate_up, &work.rows), (self.down, &work.dout, &work.activation)] {
            grads.accumulate(id, |gradient, fresh| {
                for (expert, _) in work.counts.iter().enumerate().filter(|(_, count)| fresh && **count == 0) {
                    let _ = gradient.select(0, expert as i64).zero_();
                }
                for (expert, start, count) in groups(&work.counts) {
                    let (dy, x, mut matrix) = (dy.narrow(0, start, count), x.narrow(0, start, count), gradient.select(0, expert));
                    match fresh {
                        true => matrix.copy_(&linear::weight_gradient(&dy, &x)),
                        false => linear::backward_weight(&dy, &x, &mut matrix),
                    }
                }
            });
        }
    }
}
