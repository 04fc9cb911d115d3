//! FP8 numerics on the CPU (DeepSeek-V3 report §3.3): what the CUDA kernels compute, in a few torch ops.
//!
//! The quantiser: one FP32 scale = amax / 448 for each tile, value = E4M3(x · (1 / scale)), saturating, ties to even.
//! Edge rule: a tile at an edge is what it would be if the tensor were padded with zeros to whole tiles.
//! The GEMM: products of 128 along K are summed, scaled, and added to an FP32 sum ("promotion").
//!
//! Legend: R rows, C columns, M×N output, K contraction, Kb = ceil(K/128).
use tch::{Kind, Tensor};

/// Side of a tile: 1×128 for activations, 128×128 for weights.
pub const TILE: i64 = 128;
/// Largest finite E4M3 value.
pub const E4M3_MAX: f64 = 448.0;
/// Largest finite E5M6 value, 2¹⁵ · (2 − 2⁻⁶).
pub const E5M6_MAX: f64 = 65024.0;
/// 2⁻⁶⁰: a tile whose largest value is smaller is scaled as if this were it, so that neither a scale nor its inverse leaves FP32.
pub const AMAX_FLOOR: f64 = 8.673617379884035e-19;

/// How amax becomes a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleRule {
    Amax,
    /// Rounded up to a power of two: scaling is then exact.
    PowerOfTwo,
}

/// Activations for Fprop and Dgrad: a scale for each 1×128 tile.
pub struct Rows {
    pub values: Tensor, // [R, C] E4M3
    pub scales: Tensor, // [ceil(C/128), R rounded up to 4] FP32: rows contiguous and 16-byte aligned, as the copy engine wants
}

/// The same activations for Wgrad, transposed: a scale for each 128×1 tile.
/// Each group of rows starts on a whole tile, and the values between a group's end and the next tile are zero.
pub struct Columns {
    pub values: Tensor, // [C, P] E4M3, P = `padded_rows`
    pub scales: Tensor, // [P/128, C rounded up to 4] FP32
}

/// Weights: a scale for each 128×128 block.
pub struct Blocks {
    pub values: Tensor, // [R, C] E4M3
    pub scales: Tensor, // [ceil(R/128), ceil(C/128)] FP32
}

pub fn round_up(n: i64, to: i64) -> i64 {
    (n + to - 1) / to * to
}

/// Room for `rows` rows in `num_groups` groups whose sizes the host need not know: every group may waste one tile.
pub fn padded_rows(rows: i64, num_groups: i64) -> i64 {
    let waste = if num_groups > 1 { (TILE - 1) * num_groups } else { 0 };
    round_up(rows + waste, TILE)
}

/// amax of tiles → scales. FP32 throughout, so that the CUDA kernel can give the same bits.
pub fn scale_of(amax: &Tensor, rule: ScaleRule) -> Tensor {
    let scale = amax.clamp_min(AMAX_FLOOR) / E4M3_MAX;
    match rule {
        ScaleRule::Amax => scale,
        ScaleRule::PowerOfTwo => {
            let bits = scale.view_dtype(Kind::Int);
            (bits + 0x7f_ffff).bitwise_and(0x7f80_0000).to_kind(Kind::Int).view_dtype(Kind::Float)
        }
    }
}

/// FP32 → E4M3, saturating (torch's own cast is not).
pub fn to_e4m3(x: &Tensor) -> Tensor {
    x.clamp(-E4M3_MAX, E4M3_MAX).to_kind(Kind::Float8e4m3fn)
}

/// x [R, C] → values [R, C], scales [ceil(R/tile.0), ceil(C/tile.1)].
fn quantise(x: &Tensor, tile: (i64, i64), rule: ScaleRule) -> (Tensor, Tensor) {
    let (rows, cols) = x.size2().expect("the quantiser takes a matrix");
    let (padded_r, padded_c) = (round_up(rows, tile.0), round_up(cols, tile.1));
    let tiles = x
        .to_kind(Kind::Float)
        .constant_pad_nd([0, padded_c - cols, 0, padded_r - rows])
        .view([padded_r / tile.0, tile.0, padded_c / tile.1, tile.1]);
    let scales = scale_of(&tiles.abs().amax([1, 3], true), rule);
    let values = to_e4m3(&(tiles * scales.reciprocal())).view([padded_r, padded_c]);
    let values = values.narrow(0, 0, rows).narrow(1, 0, cols).contiguous();
    (values, scales.squeeze_dim(3).squeeze_dim(1))
}

/// [R, Cb] → [Cb, R rounded up to 4].
fn scales_by_column(scales: &Tensor) -> Tensor {
    let rows = scales.size()[0];
    scales.tr().constant_pad_nd([0, round_up(rows, 4) - rows]).contiguous()
}

/// x [R, C] → 1×128 tiles.
pub fn quantise_rows(x: &Tensor, rule: ScaleRule) -> Rows {
    let (values, scales) = quantise(x, (1, TILE), rule);
    Rows { values, scales: scales_by_column(&scales) }
}

/// x [R, C] → 128×1 tiles, transposed; `counts` are the rows of each group, in order, and sum to at most R.
pub fn quantise_columns(x: &Tensor, counts: &[i64], rule: ScaleRule) -> Columns {
    let (rows, cols) = x.size2().expect("the quantiser takes a matrix");
    let padded = Tensor::zeros([cols, padded_rows(rows, counts.len() as i64)], (Kind::Float, x.device()));
    let (mut from, mut to) = (0, 0);
    for &count in counts {
        padded.narrow(1, to, count).copy_(&x.narrow(0, from, count).tr());
        from += count;
        to += round_up(count, TILE);
    }
    let (values, scales) = quantise(&padded, (1, TILE), rule);
    Columns { values, scales: scales_by_column(&scales) }
}

/// w [R, C] → 128×128 blocks.
pub fn quantise_blocks(w: &Tensor, rule: ScaleRule) -> Blocks {
    let (values, scales) = quantise(w, (TILE, TILE), rule);
    Blocks { values, scales }
}

/// Rounds to E5M6 (report §3.3.3: the saved input of the linear after attention), kept as FP32.
/// Ties to even; saturates; below 2⁻¹⁴ the steps are 2⁻²⁰, as in any such format.
pub fn round_e5m6(x: &Tensor) -> Tensor {
    let x = x.to_kind(Kind::Float).clamp(-E5M6_MAX, E5M6_MAX);
    let bits = x.view_dtype(Kind::Int);
    let odd = bits.bitwise_right_shift_tensor_scalar(17).bitwise_and(1);
    let normal = (&bits + odd + 0xffff).bitwise_and(!0x1_ffff).to_kind(Kind::Int).view_dtype(Kind::Float);
    let step = 2f64.powi(-20);
    let subnormal = (&x / step).round() * step;
    subnormal.where_self(&x.abs().lt(2f64.powi(-14)), &normal)
}

/// Σ over K tiles of (a · bᵀ of the tile) · scale(tile); a [M, K], b [N, K] E4M3 → [M, N] FP32.
fn promoted(a: &Tensor, b: &Tensor, scale: impl Fn(i64) -> Tensor) -> Tensor {
    let (m, k) = a.size2().expect("a is a matrix");
    let (n, kb) = b.size2().expect("b is a matrix");
    assert_eq!(k, kb, "a [{m}, {k}] and b [{n}, {kb}] contract over different lengths");
    let mut sum = Tensor::zeros([m, n], (Kind::Float, a.device()));
    for tile in 0..(k + TILE - 1) / TILE {
        let (from, len) = (tile * TILE, TILE.min(k - tile * TILE));
        let part = a.narrow(1, from, len).to_kind(Kind::Float).matmul(&b.narrow(1, from, len).to_kind(Kind::Float).tr());
        sum += part * scale(tile);
    }
    sum
}

/// Fprop and Dgrad: a [M, K], b [N, K] → a · bᵀ, [M, N] FP32.
pub fn gemm(a: &Rows, b: &Blocks) -> Tensor {
    let (m, n) = (a.values.size()[0], b.values.size()[0]);
    promoted(&a.values, &b.values, |tile| {
        let of_row = a.scales.get(tile).narrow(0, 0, m).unsqueeze(1); // [M, 1]
        let of_col = b.scales.select(1, tile).repeat_interleave_self_int(TILE, 0, None).narrow(0, 0, n); // [N]
        of_row * of_col
    })
}

/// Wgrad of one group: dy [P, M], x [P, N] by columns → dyᵀ · x, [M, N] FP32, over the tiles `from .. from + len`.
pub fn gemm_wgrad(dy: &Columns, x: &Columns, from: i64, len: i64) -> Tensor {
    let (m, n) = (dy.values.size()[0], x.values.size()[0]);
    let part = |t: &Tensor| t.narrow(1, from * TILE, len * TILE);
    promoted(&part(&dy.values), &part(&x.values), |tile| {
        let of_row = dy.scales.get(from + tile).narrow(0, 0, m).unsqueeze(1);
        of_row * x.scales.get(from + tile).narrow(0, 0, n)
    })
}

impl Rows {
    /// The same tensors again.
    pub fn share(&self) -> Rows {
        Rows { values: self.values.shallow_clone(), scales: self.scales.shallow_clone() }
    }

    /// [R, C] in `kind`.
    pub fn dequantise(&self, kind: Kind) -> Tensor {
        let (rows, cols) = self.values.size2().expect("a matrix");
        let scales = self.scales.tr().narrow(0, 0, rows).repeat_interleave_self_int(TILE, 1, None).narrow(1, 0, cols);
        self.values.to_kind(kind) * scales.to_kind(kind)
    }
}

impl Columns {
    /// The same tensors again.
    pub fn share(&self) -> Columns {
        Columns { values: self.values.shallow_clone(), scales: self.scales.shallow_clone() }
    }

    /// [C, P] in `kind`: still transposed.
    pub fn dequantise(&self, kind: Kind) -> Tensor {
        let cols = self.values.size()[0];
        let scales = self.scales.tr().narrow(0, 0, cols).repeat_interleave_self_int(TILE, 1, None);
        self.values.to_kind(kind) * scales.to_kind(kind)
    }
}

impl Blocks {
    /// [R, C] in `kind`.
    pub fn dequantise(&self, kind: Kind) -> Tensor {
        let (rows, cols) = self.values.size2().expect("a matrix");
        let scales = self.scales.repeat_interleave_self_int(TILE, 0, None).narrow(0, 0, rows);
        let scales = scales.repeat_interleave_self_int(TILE, 1, None).narrow(1, 0, cols);
        self.values.to_kind(kind) * scales.to_kind(kind)
    }
}

/// ‖a − b‖ / ‖b‖ in f64, with 0/0 = 0: the one measure that FP8 results are judged by.
pub fn relative_error(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let norm = |t: &Tensor| t.square().sum(Kind::Double).sqrt().double_value(&[]);
    let (difference, size) = (norm(&(a - &b)), norm(&b));
    if difference == 0.0 { 0.0 } else { difference / size }
}
