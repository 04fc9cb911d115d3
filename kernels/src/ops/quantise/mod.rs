//! BF16 (weights: FP32 too) → FP8 with fine-grained scales, in one pass over the tensor for all layouts (report §3.3.2).
//!
//! `counts` [E] i32, on the tensor's device, cuts the rows into experts; None is one group with all rows.
//! Of columns, the tiles of experts that have rows are written; the rest of the room is nobody's.
use crate::device::{self, Kernel};
use crate::fp8::{self, Blocks, Columns, Rows, ScaleRule, padded_rows, round_up};
use crate::jit::Source;
use crate::launch::{Launch, aligned};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

mod cpu;
pub(crate) mod tiles;
pub(crate) use cpu::{gather, group_sizes};
pub use tiles::{Quantised, Want};
use tiles::{every_tile, flag, rule_define, shape, tiles_of};

const TEXT: &str = include_str!("quantise.cu");
/// Of a row, in `pack`.
const MOST_PLACES: i64 = 64;

fn source(input: Kind, rule: ScaleRule) -> Source {
    assert!(matches!(input, Kind::BFloat16 | Kind::Float), "the quantiser takes BF16 or FP32, not {input:?}");
    let defines = vec![rule_define(rule), ("INPUT_FP32", flag(input == Kind::Float))];
    Source { name: "quantise", text: [tiles::TEXT, TEXT].concat(), defines }
}

fn kernel(x: &Tensor, rule: ScaleRule, entry: &str) -> Arc<Kernel> {
    let key = format!("quantise/{:?}/{rule:?}", x.kind());
    device::gpu(x.device()).kernel(&key, entry, || source(x.kind(), rule)).expect("our own kernels compile and load")
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    let rules = [ScaleRule::Amax, ScaleRule::PowerOfTwo];
    rules.iter().flat_map(|&rule| [Kind::BFloat16, Kind::Float].map(|kind| (source(kind, rule), "quantise"))).collect()
}

/// x [R, C], C a multiple of 16 → 1×128 tiles.
pub fn rows(x: &Tensor, rule: ScaleRule) -> Rows {
    activation(x, None, Want::ROWS, rule).rows.expect("rows were wanted")
}

/// The `rows` of x [T, C] at their places `sent_row` [T, P] i32 (−1: nowhere) among `sent`, in powers of two and in the same
/// pass: values [S, C] and scales [S, Cb], a row's together. A place that no row has means nothing.
pub fn pack(x: &Tensor, sent_row: &Tensor, sent: i64) -> (Tensor, Tensor) {
    let ((t, c), (_, p)) = (x.size2().expect("the quantiser takes a matrix"), sent_row.size2().expect("places are [T, P]"));
    if !x.device().is_cuda() || x.kind() != Kind::BFloat16 || p > MOST_PLACES {
        return cpu::pack(x, sent_row, sent);
    }
    assert!(c % 16 == 0, "{c} columns: a row of FP8 is a multiple of 16 bytes");
    let values = Tensor::empty([sent, c], (Kind::Float8e4m3fn, x.device()));
    let scales = Tensor::empty([sent, tiles_of(c)], (Kind::Float, x.device()));
    let kernel = kernel(x, ScaleRule::PowerOfTwo, "pack");
    let launch = Launch::new(device::gpu(x.device()), &kernel).early().tensor(&aligned(x), Kind::BFloat16);
    let launch = launch.tensor(&sent_row.contiguous(), Kind::Int).tensor(&values, Kind::Float8e4m3fn).tensor(&scales, Kind::Float);
    launch.int(c).int(p).run(shape(t, 1));
    (values, scales)
}

/// x [R, C] → 128×1 tiles, transposed.
pub fn columns(x: &Tensor, counts: Option<&Tensor>, rule: ScaleRule) -> Columns {
    activation(x, counts, Want::COLUMNS, rule).columns.expect("columns were wanted")
}

/// Both layouts from one read: what Fprop and Wgrad need of an activation, or Dgrad and Wgrad of a gradient.
pub fn rows_and_columns(x: &Tensor, counts: Option<&Tensor>, rule: ScaleRule) -> (Rows, Columns) {
    let both = activation(x, counts, Want::BOTH, rule);
    (both.rows.expect("rows were wanted"), both.columns.expect("columns were wanted"))
}

/// x [R, C] in the layouts wanted.
pub fn activation(x: &Tensor, counts: Option<&Tensor>, want: Want, rule: ScaleRule) -> Quantised {
    match x.device() {
        Device::Cuda(_) => on_gpu(x, counts, want, rule),
        _ => cpu::activation(x, counts, want, rule),
    }
}

/// Rows that came in FP8, in the order `gathered` [R] i32 names them (None: as they are) → 128×1 tiles, transposed, for Wgrad.
/// C is a multiple of 16.
pub fn columns_of(rows: &Rows, gathered: Option<&Tensor>, counts: Option<&Tensor>, rule: ScaleRule) -> Columns {
    let (v, c) = rows.values.size2().expect("values are [V, C]");
    let r = gathered.map_or(v, |source| source.size1().expect("the rows' sources are [R]"));
    if !rows.values.device().is_cuda() {
        let x = rows.dequantise(Kind::Float).to_kind(Kind::BFloat16); // in BF16 the scales would be rounded first
        let x = gathered.map_or_else(|| x.shallow_clone(), |source| cpu::gather(&x, source));
        return cpu::activation(&x, counts, Want::COLUMNS, rule).columns.expect("they were wanted");
    }
    let num_experts = counts.map_or(1, |counts| counts.size1().expect("counts are [E]"));
    let columns = Quantised::empty([r, c], num_experts, Want::COLUMNS, rows.values.device()).columns.expect("they were wanted");
    let key = format!("quantise/{:?}/{rule:?}", Kind::BFloat16);
    let gpu = device::gpu(rows.values.device());
    let kernel = gpu.kernel(&key, "transpose", || source(Kind::BFloat16, rule)).expect("our own kernels compile and load");
    let launch = Launch::new(gpu, &kernel).early().tensor(&rows.values, Kind::Float8e4m3fn).tensor(&rows.scales, Kind::Float);
    let launch = launch.int(round_up(v, 4)).tensor_or_null(gathered, Kind::Int);
    let launch = launch.tensor(&columns.values, Kind::Float8e4m3fn).tensor(&columns.scales, Kind::Float);
    let launch = launch.tensor_or_null(counts, Kind::Int).int(num_experts).int(r).int(c);
    // Four tiles a block.
    let launch = launch.int(padded_rows(r, num_experts)).int(round_up(c, 4));
    launch.run(shape(tiles::row_tiles(r, num_experts), (tiles_of(c) + 3) / 4));
    columns
}

/// x in E5M6, of its own kind: what the linear after attention keeps of its input (report §3.3.3).
pub fn round_e5m6(x: &Tensor) -> Tensor {
    let count = x.numel() as i64;
    if !x.device().is_cuda() || x.kind() != Kind::BFloat16 || count % 8 != 0 {
        return fp8::round_e5m6(x).to_kind(x.kind());
    }
    let (x, y) = (aligned(x), x.empty_like());
    let kernel = kernel(&x, ScaleRule::Amax, "round_e5m6");
    Launch::new(device::gpu(x.device()), &kernel).early()
        .tensor(&x, Kind::BFloat16)
        .tensor(&y, Kind::BFloat16)
        .int(count / 8)
        .run(shape((count / 8 + tiles::THREADS as i64 - 1) / tiles::THREADS as i64, 1));
    y
}

/// w [R, C] or [E, R, C], R and C multiples of 16 → 128×128 blocks of w and of its transpose, which Dgrad reads.
pub fn weights(w: &Tensor, rule: ScaleRule) -> (Blocks, Blocks) {
    if !w.device().is_cuda() {
        return cpu::weights(w, rule);
    }
    let (plain, transposed) = empty_weights(&w.size(), w.device());
    let size = w.size();
    let (r, c) = (size[size.len() - 2], size[size.len() - 1]);
    let kernel = kernel(w, rule, "quantise_weights");
    let launch = Launch::new(device::gpu(w.device()), &kernel).early().tensor(w, w.kind());
    blocks(launch, &plain, &transposed).int(r).int(c).run(every_tile(&size));
    (plain, transposed)
}

/// Room for the blocks of a weight of `size` [R, C] or [E, R, C], and of its transpose. Not written yet.
pub fn empty_weights(size: &[i64], device: Device) -> (Blocks, Blocks) {
    let [leading @ .., r, c] = size else { panic!("weights are [R, C] or [E, R, C], not {size:?}") };
    assert!(leading.len() < 2 && r % 16 == 0 && c % 16 == 0, "weights of {size:?}: both sides are multiples of 16");
    let new = |a: i64, b: i64, kind: Kind| Tensor::empty([leading, &[a, b]].concat(), (kind, device));
    let of = |r: i64, c: i64| Blocks {
        values: new(r, c, Kind::Float8e4m3fn),
        scales: new(tiles_of(r), tiles_of(c), Kind::Float),
    };
    (of(*r, *c), of(*c, *r))
}

/// values, scales, transposed, scales_transposed
pub(crate) fn blocks<'a>(launch: Launch<'a>, plain: &Blocks, transposed: &Blocks) -> Launch<'a> {
    launch
        .tensor(&plain.values, Kind::Float8e4m3fn)
        .tensor(&plain.scales, Kind::Float)
        .tensor(&transposed.values, Kind::Float8e4m3fn)
        .tensor(&transposed.scales, Kind::Float)
}

fn on_gpu(x: &Tensor, counts: Option<&Tensor>, want: Want, rule: ScaleRule) -> Quantised {
    let (r, c) = x.size2().expect("the quantiser takes a matrix");
    let num_experts = counts.map_or(1, |counts| counts.size1().expect("counts are [E]"));
    let quantised = Quantised::empty([r, c], num_experts, want, x.device());
    let kernel = kernel(x, rule, "quantise");
    let launch = Launch::new(device::gpu(x.device()), &kernel).early().tensor(x, Kind::BFloat16);
    let launch = quantised.tensors(launch).tensor_or_null(counts, Kind::Int).int(num_experts).int(r).int(c);
    tiles::strides(launch, [r, c], num_experts).run(shape(tiles_of(c), tiles::row_tiles(r, num_experts)));
    quantised
}
