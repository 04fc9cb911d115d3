//! The reference: `fp8`'s GEMMs, expert by expert.
use super::{Groups, Write};
use crate::fp8::{self, Blocks, Columns, Rows, TILE, round_up};
use crate::ops::quantise::group_sizes;
use std::ops::Range;
use tch::Tensor;

pub(crate) fn forward(a: &Rows, b: &Blocks, counts: Option<&Tensor>, out: &Tensor) {
    let m = a.values.size()[0];
    let mut from = 0;
    for (expert, count) in group_sizes(counts, m).into_iter().enumerate() {
        let of = |t: &Tensor| if t.dim() == 3 { t.get(expert as i64) } else { t.shallow_clone() };
        let rows = Rows { values: a.values.narrow(0, from, count), scales: a.scales.narrow(1, from, count) };
        let product = fp8::gemm(&rows, &Blocks { values: of(&b.values), scales: of(&b.scales) });
        out.narrow(0, from, count).copy_(&product);
        from += count;
    }
}

pub(crate) fn wgrad(dy: &Columns, x: &Columns, (groups, wanted): (Groups, Range<i64>), gradient: &Tensor, write: Write) {
    let (m, n) = (dy.values.size()[0], x.values.size()[0]);
    let of_expert = gradient.view([-1, m, n]);
    let mut from = 0;
    for (expert, count) in group_sizes(groups.counts, groups.rows).into_iter().enumerate() {
        let len = round_up(count, TILE) / TILE;
        if wanted.contains(&(expert as i64)) {
            let product = fp8::gemm_wgrad(dy, x, from, len);
            let mut to = of_expert.get(expert as i64);
            match write {
                Write::Accumulate => drop(to.g_add_(&product)),
                Write::Assign => to.copy_(&product),
            }
        }
        from += len;
    }
}
