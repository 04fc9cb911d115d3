//! The reference: the layouts of `fp8`, with counts read from their tensor.
use super::{Quantised, Want};
use crate::fp8::{self, Blocks, Rows, ScaleRule};
use tch::{Kind, Tensor};

/// The rows of each group; one group with all of them where there are no counts.
pub fn group_sizes(counts: Option<&Tensor>, rows: i64) -> Vec<i64> {
    match counts {
        Some(counts) => Vec::try_from(counts.to_kind(Kind::Int64)).expect("counts are [E]"),
        None => vec![rows],
    }
}

pub fn activation(x: &Tensor, counts: Option<&Tensor>, want: Want, rule: ScaleRule) -> Quantised {
    Quantised {
        rows: want.rows.then(|| fp8::quantise_rows(x, rule)),
        columns: want.columns.then(|| fp8::quantise_columns(x, &group_sizes(counts, x.size()[0]), rule)),
    }
}

pub fn pack(x: &Tensor, sent_row: &Tensor, sent: i64) -> (Tensor, Tensor) {
    let Rows { values, scales } = super::rows(x, ScaleRule::PowerOfTwo);
    let options = (Kind::Int64, x.device());
    let there = sent_row.ge(0);
    let row = Tensor::arange(x.size()[0], options).unsqueeze(1).expand_as(sent_row).masked_select(&there);
    let row = Tensor::zeros([sent], options).scatter(0, &sent_row.masked_select(&there).to_kind(Kind::Int64), &row);
    let values = values.view_dtype(Kind::Uint8).index_select(0, &row).view_dtype(Kind::Float8e4m3fn);
    (values, scales.tr().index_select(0, &row))
}

/// Rows of x [T, C] as `source` [R] names them, zeros for −1.
pub fn gather(x: &Tensor, source: &Tensor) -> Tensor {
    let there = source.ge(0).unsqueeze(1);
    let rows = x.index_select(0, &source.clamp_min(0).to_kind(Kind::Int64));
    rows.where_self(&there, &Tensor::zeros([1, x.size()[1]], (x.kind(), x.device()))) // x may have no row
}

pub fn weights(w: &Tensor, rule: ScaleRule) -> (Blocks, Blocks) {
    if w.dim() == 2 {
        return (fp8::quantise_blocks(w, rule), fp8::quantise_blocks(&w.tr(), rule));
    }
    let stack = |transposed: bool| {
        let each = w.unbind(0).into_iter().map(|w| fp8::quantise_blocks(&if transposed { w.tr() } else { w }, rule));
        let (values, scales): (Vec<Tensor>, Vec<Tensor>) = each.map(|b| (b.values, b.scales)).unzip();
        Blocks { values: Tensor::stack(&values, 0), scales: Tensor::stack(&scales, 0) }
    };
    (stack(false), stack(true))
}

#[cfg(test)]
mod tests {
    use super::super::{Quantised, columns_of};
    use super::*;
    use tch::Device;

    #[test]
    fn a_rank_whose_experts_get_no_row_has_columns_of_none() {
        let counts = Tensor::from_slice(&[0, 0]);
        let Quantised { rows, .. } = activation(&Tensor::empty([0, 256], (Kind::BFloat16, Device::Cpu)), Some(&counts), Want { rows: true, columns: false }, ScaleRule::PowerOfTwo);
        let source = Tensor::empty([0], (Kind::Int, Device::Cpu));
        let columns = columns_of(&rows.expect("they were wanted"), Some(&source), Some(&counts), ScaleRule::PowerOfTwo);
        assert_eq!((columns.values.size()[0], columns.values.to_kind(Kind::Float).abs().sum(Kind::Double).double_value(&[])), (256, 0.0));
    }
}
