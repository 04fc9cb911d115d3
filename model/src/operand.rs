//! What the GEMMs of linears and experts read (report §3.3): a tensor in the run's own kind or, in FP8 runs, one that was
//! quantised once for all its readers. Fprop and Dgrad read it by rows, Wgrad by columns. Only Wgrad's layout is kept
//! for backward.
//!
//! Legend: T tokens, I in, O out, R rows sorted by expert, E experts.
use crate::saved::See;
use crate::sentinel::{Product, Sentinel};
use crate::{Grads, ParamId, Weights};
use kernels::Precision;
use kernels::fp8::{Columns, ScaleRule};
use kernels::ops::gemm_fp8::{self, Options, Write};
use kernels::ops::quantise::{self, Quantised, Want};
use kernels::ops::{gemm_grouped, linear};
use parallel::dispatch::Rows;
use std::ops::Range;
use tch::{Kind, Tensor};

pub enum Operand {
    Own(Tensor), // [T, I]
    Fp8 {
        quantised: Quantised,
        /// As it was before, where the sentinel watches a reader.
        own: Option<Tensor>,
    },
}

/// Rows of each local expert.
pub struct RowCounts {
    pub host: Vec<i64>,
    pub device: Tensor, // [E] i32
}

impl RowCounts {
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
    /// What the linears `readers` read.
    pub fn new(w: &Weights, x: Tensor, want: Want, readers: &[ParamId]) -> Operand {
        Operand::with_rule(w, x, want, ScaleRule::Amax, readers)
    }

    pub fn with_rule(w: &Weights, x: Tensor, want: Want, rule: ScaleRule, readers: &[ParamId]) -> Operand {
        if w.precision != Precision::Fp8 {
            return Operand::Own(x);
        }
        let quantised = quantise::activation(&x, None, want, rule);
        let watched = readers.iter().any(|&reader| w.sentinel.watches(reader));
        Operand::Fp8 { quantised, own: watched.then_some(x) }
    }

    /// Rows as they came to the experts, in their order, for the stack `reader`. What came in FP8 was never anything else here.
    pub fn arrived(w: &Weights, rows: &Rows, reader: ParamId) -> Operand {
        match rows {
            Rows::Own(rows) => Operand::Own(rows.shallow_clone()),
            Rows::Fp8(packed) => {
                let rows = packed.gather();
                let own = w.sentinel.watches(reader).then(|| rows.dequantise(w.precision.compute()));
                Operand::Fp8 { quantised: Quantised { rows: Some(rows), columns: None }, own }
            }
        }
    }

    /// The same as the experts' Wgrad reads them.
    pub fn arrived_for_weight(w: &Weights, rows: &Rows, counts: &RowCounts, reader: ParamId) -> Operand {
        match rows {
            Rows::Own(rows) => Operand::Own(rows.shallow_clone()),
            Rows::Fp8(packed) => {
                let own = w.sentinel.watches(reader).then(|| packed.gather().dequantise(w.precision.compute()));
                Operand::Fp8 { quantised: Quantised { rows: None, columns: Some(packed.columns(&counts.device)) }, own }
            }
        }
    }

    /// The gradient of `weight`'s output, in the form of what it read.
    pub fn gradient(&self, w: &Weights, dy: Tensor, weight: ParamId) -> Operand {
        match self {
            Operand::Own(_) => Operand::Own(dy),
            Operand::Fp8 { .. } => Operand::new(w, dy, Want::BOTH, &[weight]),
        }
    }

    pub(crate) fn each(&self, part: &'static str, see: See) {
        match self {
            Operand::Own(x) => see(part, x),
            Operand::Fp8 { quantised: Quantised { rows, columns }, own } => {
                let rows = rows.iter().flat_map(|rows| [&rows.values, &rows.scales]);
                let columns = columns.iter().flat_map(|columns| [&columns.values, &columns.scales]);
                rows.chain(columns).chain(own).for_each(|tensor| see(part, tensor));
            }
        }
    }

    /// The same tensors again.
    pub fn share(&self) -> Operand {
        match self {
            Operand::Own(x) => Operand::Own(x.shallow_clone()),
            Operand::Fp8 { quantised: q, own } => Operand::Fp8 {
                quantised: Quantised { rows: q.rows.as_ref().map(|rows| rows.share()), columns: q.columns.as_ref().map(|columns| columns.share()) },
                own: own.as_ref().map(Tensor::shallow_clone),
            },
        }
    }

    /// What Wgrad reads.
    pub fn for_weight(self) -> Operand {
        match self {
            Operand::Fp8 { quantised, own } => Operand::Fp8 { quantised: Quantised { rows: None, columns: quantised.columns }, own },
            own => own,
        }
    }

    /// x · Wᵀ, [T, O].
    pub fn forward(&self, w: &Weights, weight: ParamId) -> Tensor {
        let fp8 = |x: &Quantised| gemm_fp8::forward(by_rows(x), &w.blocks(weight).plain, Options::default());
        self.product(w, (weight, Product::Fprop), |x| linear::forward(x, w.get(weight)), fp8)
    }

    /// dy · W, [T, I], and dy as Wgrad reads it.
    pub fn backward_input(self, w: &Weights, weight: ParamId) -> (Tensor, Operand) {
        let fp8 = |dy: &Quantised| gemm_fp8::forward(by_rows(dy), &w.blocks(weight).transposed, Options::default());
        let dx = self.product(w, (weight, Product::Dgrad), |dy| linear::backward_input(dy, w.get(weight)), fp8);
        (dx, self.for_weight())
    }

    /// Each row times its own expert's Wᵀ: [R, I], W [E, O, I] → [R, O].
    pub fn grouped_forward(&self, w: &Weights, weight: ParamId, counts: &RowCounts) -> Tensor {
        let fp8 = |x: &Quantised| gemm_grouped::forward(by_rows(x), &w.blocks(weight).plain, &counts.device, Options::default());
        self.product(w, (weight, Product::Fprop), |x| grouped(x, counts, w.get(weight), |matrix| matrix.tr(), 1), fp8)
    }

    /// Each row times its own expert's W: [R, O] → [R, I].
    pub fn grouped_backward_input(&self, w: &Weights, weight: ParamId, counts: &RowCounts) -> Tensor {
        let fp8 = |dy: &Quantised| gemm_grouped::forward(by_rows(dy), &w.blocks(weight).transposed, &counts.device, Options::default());
        self.product(w, (weight, Product::Dgrad), |dy| grouped(dy, counts, w.get(weight), |matrix| matrix, 2), fp8)
    }

    /// In FP8 where this is, unless the weight has fallen back to the tensor `in_own`; with a shadow where it is its turn.
    fn product(
        &self, w: &Weights, (weight, which): (ParamId, Product), in_own: impl Fn(&Tensor) -> Tensor, in_fp8: impl Fn(&Quantised) -> Tensor,
    ) -> Tensor {
        let (quantised, own) = match self {
            Operand::Own(x) => (None, Some(x)),
            Operand::Fp8 { quantised, own } => (Some(quantised), own.as_ref()),
        };
        let unquantised = || own.expect("an operand that the sentinel watches is kept as it was");
        match quantised.filter(|_| !w.sentinel.in_bf16(weight)) {
            None => {
                w.gemms.count(unquantised().kind());
                in_own(unquantised())
            }
            Some(quantised) => {
                w.gemms.count(Kind::Float8e4m3fn);
                let product = in_fp8(quantised);
                if w.sentinel.shadows(weight) {
                    w.sentinel.record(which, &product, &in_own(unquantised()));
                }
                product
            }
        }
    }
}

/// grads[weight] += dyᵀ · x.
pub fn backward_weight(grads: &mut Grads, weight: ParamId, dy: &Operand, x: &Operand) {
    let (dy, x, own) = match both(&grads.sentinel, weight, dy, x) {
        Sides::Own(dy, x) => return grads.add_product(weight, dy, x),
        Sides::Fp8 { dy, x, own } => (dy, x, own),
    };
    // One group: its rows are those of all tiles, zeros where there are none.
    let rows = dy.values.size()[1];
    let product = |gradient: &mut Tensor, write: Write| gemm_fp8::wgrad(dy, x, rows, gradient, write, Options::default());
    grads.accumulate_product(weight, Kind::Float8e4m3fn, |gradient, fresh| product(gradient, write(fresh)));
    if let Some((dy, x)) = own {
        let mut alone = grads.empty(weight);
        product(&mut alone, Write::Assign);
        grads.sentinel.record(Product::Wgrad, &alone, &linear::weight_gradient(dy, x));
    }
}

/// grads[weight][e] += dyᵀ · x over the rows of each expert e.
pub fn grouped_backward_weight(grads: &mut Grads, weight: ParamId, dy: &Operand, x: &Operand, counts: &RowCounts) {
    let (dy, x, own) = match both(&grads.sentinel, weight, dy, x) {
        Sides::Own(dy, x) => {
            return grads.accumulate_products(weight, dy.kind(), |gradient, fresh, experts| grouped_gradient(gradient, fresh, (dy, x), counts, experts));
        }
        Sides::Fp8 { dy, x, own } => (dy, x, own),
    };
    let product = |gradient: &mut Tensor, write: Write, experts: Range<i64>| gemm_grouped::wgrad(dy, x, (&counts.device, experts), gradient, write, Options::default());
    grads.accumulate_products(weight, Kind::Float8e4m3fn, |gradient, fresh, experts| product(gradient, write(fresh), experts));
    if let Some(own) = own {
        let (mut alone, mut exact, all) = (grads.empty(weight), grads.empty(weight), 0..counts.host.len() as i64);
        product(&mut alone, Write::Assign, all.clone());
        grouped_gradient(&mut exact, true, own, counts, all);
        grads.sentinel.record(Product::Wgrad, &alone, &exact);
    }
}

/// What a weight's gradient is made of.
enum Sides<'a> {
    Own(&'a Tensor, &'a Tensor),
    /// With the same in the run's own kind where the product is shadowed.
    Fp8 { dy: &'a Columns, x: &'a Columns, own: Option<(&'a Tensor, &'a Tensor)> },
}

fn both<'a>(sentinel: &Sentinel, weight: ParamId, dy: &'a Operand, x: &'a Operand) -> Sides<'a> {
    match (dy, x) {
        (Operand::Own(dy), Operand::Own(x)) => Sides::Own(dy, x),
        (Operand::Fp8 { own: Some(dy), .. }, Operand::Fp8 { own: Some(x), .. }) if sentinel.in_bf16(weight) => Sides::Own(dy, x),
        (Operand::Fp8 { quantised: dy, own: dy_own }, Operand::Fp8 { quantised: x, own: x_own }) => {
            let own = dy_own.as_ref().zip(x_own.as_ref()).filter(|_| sentinel.shadows(weight));
            Sides::Fp8 { dy: by_columns(dy), x: by_columns(x), own }
        }
        _ => panic!("both sides of a weight's gradient come from one linear"),
    }
}

/// gradient [E, O, I] = (`fresh`) or += dyᵀ · x, expert by expert, of these experts.
fn grouped_gradient(gradient: &mut Tensor, fresh: bool, (dy, x): (&Tensor, &Tensor), counts: &RowCounts, experts: Range<i64>) {
    for expert in experts.clone().filter(|&expert| fresh && counts.host[expert as usize] == 0) {
        let _ = gradient.select(0, expert).zero_();
    }
    for (expert, start, count) in counts.groups().filter(|(expert, ..)| experts.contains(expert)) {
        let (dy, x, mut matrix) = (dy.narrow(0, start, count), x.narrow(0, start, count), gradient.select(0, expert));
        match fresh {
            true => matrix.copy_(&linear::weight_gradient(&dy, &x)),
            false => linear::backward_weight(&dy, &x, &mut matrix),
        }
    }
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
