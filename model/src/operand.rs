//! What the GEMMs of linears and experts read (report §3.3): a tensor in the run's own kind or, in FP8 runs, one that was
//! quantised once for all its readers. Fprop and Dgrad read it by rows, Wgrad by columns. Only Wgrad's layout is kept
//! for backward.
//!
//! Legend: T tokens, I in, O out, R rows sorted by expert, E experts.
use crate::{Grads, ParamId, Weights};
use kernels::Precision;
use kernels::fp8::ScaleRule;
use kernels::ops::gemm_fp8::{self, Options, Write};
use kernels::ops::quantise::{self, Quantised, Want};
use kernels::ops::{gemm_grouped, linear};
use parallel::dispatch::Rows;
use tch::Tensor;

pub enum Operand {
    Own(Tensor), // [T, I]
    Fp8(Quantised),
}

/// Rows of each local expert.
pub struct RowCounts {
    pub host: Vec<i64>,
    pub device: Tensor, // [E] i32
}

impl RowCounts {
    pub fn new(host: Vec<i64>, like: &Tensor) -> RowCounts {
        let counts: Vec<i32> = host.iter().map(|&count| i32::try_from(count).expect("fewer than 2³¹ rows")).collect();
        RowCounts { host, device: Tensor::from_slice(&counts).to_device(like.device()) }
    }

    /// (expert, first row, rows) of the experts that have any.
    fn groups(&self) -> impl Iterator<Item = (i64, i64, i64)> + '_ {
        let starts = self.host.iter().scan(0, |next, &count| {
            let start = *next;
            *next += count;
            Some(start)
        });
        self.host.iter().zip(starts).enumerate().filter(|(_, (count, _))| **count > 0).map(|(expert, (&count, start))| (expert as i64, start, count))
    }
}

impl Operand {
    /// A linear's input, or the gradient of its output.
    pub fn new(precision: Precision, x: Tensor, want: Want) -> Operand {
        Operand::with_rule(precision, x, want, ScaleRule::Amax)
    }

    pub fn with_rule(precision: Precision, x: Tensor, want: Want, rule: ScaleRule) -> Operand {
        match precision {
            Precision::Fp8 => Operand::Fp8(quantise::activation(&x, None, want, rule)),
            _ => Operand::Own(x),
        }
    }

    /// Rows as they came to the experts.
    pub fn arrived(rows: Rows) -> Operand {
        match rows {
            Rows::Own(rows) => Operand::Own(rows),
            Rows::Fp8 { rows, .. } => Operand::Fp8(Quantised { rows: Some(rows), columns: None }),
        }
    }

    /// The gradient of the output of a linear that read `self`, in the same form.
    pub fn gradient(&self, dy: Tensor) -> Operand {
        match self {
            Operand::Own(_) => Operand::Own(dy),
            Operand::Fp8(_) => Operand::Fp8(quantise::activation(&dy, None, Want::BOTH, ScaleRule::Amax)),
        }
    }

    /// The same tensors again.
    pub fn share(&self) -> Operand {
        match self {
            Operand::Own(x) => Operand::Own(x.shallow_clone()),
            Operand::Fp8(q) => Operand::Fp8(Quantised { rows: q.rows.as_ref().map(|rows| rows.share()), columns: q.columns.as_ref().map(|columns| columns.share()) }),
        }
    }

    /// What Wgrad reads.
    pub fn for_weight(self) -> Operand {
        match self {
            Operand::Fp8(q) => Operand::Fp8(Quantised { rows: None, columns: q.columns }),
            own => own,
        }
    }

    /// Rows that came quantised by rows, as the experts' Wgrad reads them. Their scales are powers of two and so are the
    /// new ones: nothing is rounded twice.
    pub fn for_expert_weight(self, counts: &RowCounts) -> Operand {
        match self {
            Operand::Fp8(Quantised { rows: Some(rows), columns: None }) => {
                let columns = quantise::columns_of(&rows, Some(&counts.device), ScaleRule::PowerOfTwo);
                Operand::Fp8(Quantised { rows: None, columns: Some(columns) })
            }
            other => other.for_weight(),
        }
    }

    /// x · Wᵀ, [T, O].
    pub fn forward(&self, w: &Weights, weight: ParamId) -> Tensor {
        match self {
            Operand::Own(x) => linear::forward(x, w.get(weight)),
            Operand::Fp8(x) => gemm_fp8::forward(by_rows(x), &w.blocks(weight).plain, Options::default()),
        }
    }

    /// dy · W, [T, I], and dy as Wgrad reads it.
    pub fn backward_input(self, w: &Weights, weight: ParamId) -> (Tensor, Operand) {
        let dx = match &self {
            Operand::Own(dy) => linear::backward_input(dy, w.get(weight)),
            Operand::Fp8(dy) => gemm_fp8::forward(by_rows(dy), &w.blocks(weight).transposed, Options::default()),
        };
        (dx, self.for_weight())
    }

    /// Each row times its own expert's Wᵀ: [R, I], W [E, O, I] → [R, O].
    pub fn grouped_forward(&self, w: &Weights, weight: ParamId, counts: &RowCounts) -> Tensor {
        match self {
            Operand::Own(x) => grouped(x, counts, w.get(weight), |matrix| matrix.tr(), 1),
            Operand::Fp8(x) => gemm_grouped::forward(by_rows(x), &w.blocks(weight).plain, &counts.device, Options::default()),
        }
    }

    /// Each row times its own expert's W: [R, O] → [R, I].
    pub fn grouped_backward_input(&self, w: &Weights, weight: ParamId, counts: &RowCounts) -> Tensor {
        match self {
            Operand::Own(dy) => grouped(dy, counts, w.get(weight), |matrix| matrix, 2),
            Operand::Fp8(dy) => gemm_grouped::forward(by_rows(dy), &w.blocks(weight).transposed, &counts.device, Options::default()),
        }
    }
}

/// grads[weight] += dyᵀ · x.
pub fn backward_weight(grads: &mut Grads, weight: ParamId, dy: &Operand, x: &Operand) {
    match (dy, x) {
        (Operand::Own(dy), Operand::Own(x)) => grads.add_product(weight, dy, x),
        (Operand::Fp8(dy), Operand::Fp8(x)) => {
            let (dy, x) = (by_columns(dy), by_columns(x));
            // One group: its rows are those of all tiles, zeros where there are none.
            let rows = dy.values.size()[1];
            grads.accumulate(weight, |gradient, fresh| gemm_fp8::wgrad(dy, x, rows, gradient, write(fresh), Options::default()));
        }
        _ => panic!("both sides of a weight's gradient come from one linear"),
    }
}

/// grads[weight][e] += dyᵀ · x over the rows of each expert e.
pub fn grouped_backward_weight(grads: &mut Grads, weight: ParamId, dy: &Operand, x: &Operand, counts: &RowCounts) {
    grads.accumulate(weight, |gradient, fresh| match (dy, x) {
        (Operand::Own(dy), Operand::Own(x)) => {
            for expert in (0..counts.host.len()).filter(|&expert| fresh && counts.host[expert] == 0) {
                let _ = gradient.select(0, expert as i64).zero_();
            }
            for (expert, start, count) in counts.groups() {
                let (dy, x, mut matrix) = (dy.narrow(0, start, count), x.narrow(0, start, count), gradient.select(0, expert));
                match fresh {
                    true => matrix.copy_(&linear::weight_gradient(&dy, &x)),
                    false => linear::backward_weight(&dy, &x, &mut matrix),
                }
            }
        }
        (Operand::Fp8(dy), Operand::Fp8(x)) => {
            gemm_grouped::wgrad(by_columns(dy), by_columns(x), &counts.device, gradient, write(fresh), Options::default());
        }
        _ => panic!("both sides of a weight's gradient come from one linear"),
    });
}

/// The first contribution assigns: no zeros are written to be read again.
fn write(fresh: bool) -> Write {
    if fresh { Write::Assign } else { Write::Accumulate }
}

fn by_rows(q: &Quantised) -> &kernels::fp8::Rows {
    q.rows.as_ref().expect("quantised by rows")
}

fn by_columns(q: &Quantised) -> &kernels::fp8::Columns {
    q.columns.as_ref().expect("quantised by columns")
}

/// rows [R, A] times each expert's own matrix, made [A, B] by `side` → [R, B]; B is dim `out` of the weights.
fn grouped(rows: &Tensor, counts: &RowCounts, weights: &Tensor, side: impl Fn(Tensor) -> Tensor, out: usize) -> Tensor {
    let product = Tensor::empty([rows.size()[0], weights.size()[out]], (rows.kind(), rows.device()));
    for (expert, start, count) in counts.groups() {
        let _ = rows.narrow(0, start, count).mm_out(&product.narrow(0, start, count), &side(weights.select(0, expert)));
    }
    product
}
