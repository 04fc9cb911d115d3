//! What a row is on its way to the experts (report §3.2.2, §3.3): quantised once, before the first hop; its bytes pass
//! the second as they are. On the way back rows are sums, in the run's own type.
//!
//! Legend: T tokens, V rows received, R rows at the local experts, D width, Db = ceil(D/128).
use kernels::fp8::{self, ScaleRule};
use kernels::ops::quantise;
use kernels::ops::routes::Places;
use tch::{Kind, Tensor};

/// The rows of dispatch and of combine's backward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wire {
    /// As the tensor is.
    #[default]
    Own,
    /// E4M3 with one FP32 scale for each 1×128 tile. Scales are powers of two: quantising once more at the expert, in
    /// whatever tiles, rounds no value again but those that are tiny beside the largest of their new tile.
    Fp8,
}

/// Rows at the experts, as they came.
pub enum Rows {
    Own(Tensor), // [R, D]
    Fp8(Packed),
}

/// Each row once, however many of the experts here read it: that is all there is to keep of them.
pub struct Packed {
    values: Tensor, // [V, D] u8
    scales: Tensor, // [V, Db]
    /// The row of each local row, [R].
    row: Tensor,
    /// Of what was quantised.
    kind: Kind,
}

impl Packed {
    /// x [V, D], in the order `row` [R].
    pub fn new(x: &Tensor, row: &Tensor) -> Packed {
        let parts = Wire::Fp8.pack(x);
        Packed { values: parts[0].shallow_clone(), scales: parts[1].shallow_clone(), row: row.shallow_clone(), kind: x.kind() }
    }

    /// [R, D]
    pub fn gather(&self) -> fp8::Rows {
        rows(&self.values.index_select(0, &self.row), &self.scales.index_select(0, &self.row))
    }

    /// The same by columns for each of the experts, which have `counts` [E] i32 rows: in one pass over what is kept. Scales are
    /// powers of two and so are the new ones: none is rounded twice but what is tiny beside the largest of its new tile.
    pub fn columns(&self, counts: &Tensor) -> fp8::Columns {
        let source = self.row.to_kind(Kind::Int);
        quantise::columns_of(&rows(&self.values, &self.scales), Some(&source), Some(counts), ScaleRule::PowerOfTwo)
    }

    /// What it holds.
    pub fn tensors(&self) -> [&Tensor; 3] {
        [&self.values, &self.scales, &self.row]
    }
}

/// values [R, D] u8 and scales [R, Db] as the GEMM reads them.
fn rows(values: &Tensor, scales: &Tensor) -> fp8::Rows {
    let count = scales.size()[0];
    let scales = scales.tr().constant_pad_nd([0, fp8::round_up(count, 4) - count]).contiguous(); // [Db, R rounded up]
    fp8::Rows { values: values.view_dtype(Kind::Float8e4m3fn), scales }
}

impl Rows {
    /// [R, D] in the kind that was sent.
    pub fn into_tensor(self) -> Tensor {
        match self {
            Rows::Own(rows) => rows,
            Rows::Fp8(packed) => packed.gather().dequantise(packed.kind),
        }
    }
}

impl Wire {
    /// x [T, D] → what travels, a row each.
    pub(super) fn pack(self, x: &Tensor) -> Vec<Tensor> {
        match self {
            Wire::Own => vec![x.shallow_clone()],
            Wire::Fp8 => {
                let fp8::Rows { values, scales } = quantise::rows(x, ScaleRule::PowerOfTwo);
                vec![values.view_dtype(Kind::Uint8), scales.tr().narrow(0, 0, x.size()[0]).contiguous()] // [T, D], [T, Db]
            }
        }
    }

    /// The same by destination. FP8 takes one pass for both, and rows may have room for more.
    pub(super) fn pack_to(self, x: &Tensor, places: &Places) -> Vec<Tensor> {
        match self {
            Wire::Own => vec![x.index_select(0, &places.source)],
            Wire::Fp8 => {
                let (values, scales) = quantise::pack(x, &places.sent_row, places.source.size()[0]);
                vec![values.view_dtype(Kind::Uint8), scales]
            }
        }
    }

    /// What came, a row of each of [V, …], in the order `row` [R].
    pub(super) fn unpack(self, parts: Vec<Tensor>, row: &Tensor, kind: Kind) -> Rows {
        let mut parts = parts.into_iter();
        let values = parts.next().expect("rows travelled");
        match self {
            Wire::Own => Rows::Own(values.index_select(0, row)),
            Wire::Fp8 => Rows::Fp8(Packed { values, scales: parts.next().expect("scales travelled"), row: row.shallow_clone(), kind }),
        }
    }
}
