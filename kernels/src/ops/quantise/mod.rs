//! BF16 or FP32 → FP8 with fine-grained scales, in one pass over the tensor for all layouts (report §3.3.2).
//!
//! `counts` [E] i32, on the tensor's device, cuts the rows into experts; None is one group with all rows.
use crate::device::{self, Kernel};
use crate::fp8::{self, Blocks, Columns, Rows, ScaleRule, TILE, padded_rows, round_up};
use crate::jit::Source;
use crate::launch::{Launch, Shape};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

mod cpu;
pub(crate) use cpu::group_sizes;

const TEXT: &str = include_str!("quantise.cu");
const THREADS: usize = 256;

/// One variant of the CUDA text.
#[derive(Clone, Copy)]
struct Variant {
    input_fp32: bool,
    blocks: bool,
    power_of_two: bool,
}

impl Variant {
    fn of(x: &Tensor, blocks: bool, rule: ScaleRule) -> Variant {
        assert!(matches!(x.kind(), Kind::BFloat16 | Kind::Float), "the quantiser takes BF16 or FP32, not {:?}", x.kind());
        Variant { input_fp32: x.kind() == Kind::Float, blocks, power_of_two: rule == ScaleRule::PowerOfTwo }
    }
    fn source(self) -> Source {
        let flag = |on: bool| u8::from(on).to_string();
        Source {
            name: "quantise",
            text: TEXT.to_string(),
            defines: vec![
                ("INPUT_FP32", flag(self.input_fp32)),
                ("BLOCKS", flag(self.blocks)),
                ("POWER_OF_TWO", flag(self.power_of_two)),
            ],
        }
    }
    fn kernel(self, device: Device) -> Arc<Kernel> {
        let key = format!("quantise/{}{}{}", self.input_fp32, self.blocks, self.power_of_two);
        device::gpu(device).kernel(&key, "quantise", || self.source()).expect("our own kernels compile and load")
    }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    let all = [false, true];
    let variants = all.iter().flat_map(|&input_fp32| all.map(|blocks| (input_fp32, blocks)));
    let variants = variants.flat_map(|(input_fp32, blocks)| all.map(|power_of_two| Variant { input_fp32, blocks, power_of_two }));
    variants.map(|v| (v.source(), "quantise")).collect()
}

/// x [R, C], C a multiple of 16 → 1×128 tiles.
pub fn rows(x: &Tensor, rule: ScaleRule) -> Rows {
    match x.device() {
        Device::Cuda(_) => on_gpu(x, None, Want { rows: true, columns: false }, rule).0.expect("rows were wanted"),
        _ => fp8::quantise_rows(x, rule),
    }
}

/// x [R, C] → 128×1 tiles, transposed.
pub fn columns(x: &Tensor, counts: Option<&Tensor>, rule: ScaleRule) -> Columns {
    match x.device() {
        Device::Cuda(_) => on_gpu(x, counts, Want { rows: false, columns: true }, rule).1.expect("columns were wanted"),
        _ => cpu::columns(x, counts, rule),
    }
}

/// Both layouts from one read: what Fprop and Wgrad need of an activation, or Dgrad and Wgrad of a gradient.
pub fn rows_and_columns(x: &Tensor, counts: Option<&Tensor>, rule: ScaleRule) -> (Rows, Columns) {
    match x.device() {
        Device::Cuda(_) => {
            let (rows, columns) = on_gpu(x, counts, Want { rows: true, columns: true }, rule);
            (rows.expect("rows were wanted"), columns.expect("columns were wanted"))
        }
        _ => (fp8::quantise_rows(x, rule), cpu::columns(x, counts, rule)),
    }
}

/// w [R, C] or [E, R, C], R and C multiples of 16 → 128×128 blocks of w and of its transpose, which Dgrad reads.
pub fn weights(w: &Tensor, rule: ScaleRule) -> (Blocks, Blocks) {
    if !w.device().is_cuda() {
        return cpu::weights(w, rule);
    }
    let size = w.size();
    let (matrices, r, c) = match size[..] {
        [r, c] => (1, r, c),
        [e, r, c] => (e, r, c),
        _ => panic!("weights are [R, C] or [E, R, C], not {size:?}"),
    };
    assert!(r % 16 == 0 && c % 16 == 0, "weights of {r}x{c}: both sides are multiples of 16");
    let (tiles_r, tiles_c) = ((r + TILE - 1) / TILE, (c + TILE - 1) / TILE);
    let new = |a: i64, b: i64, kind: Kind| {
        let size = if size.len() == 3 { vec![matrices, a, b] } else { vec![a, b] };
        Tensor::empty(size, (kind, w.device()))
    };
    let plain = Blocks { values: new(r, c, Kind::Float8e4m3fn), scales: new(tiles_r, tiles_c, Kind::Float) };
    let transposed = Blocks { values: new(c, r, Kind::Float8e4m3fn), scales: new(tiles_c, tiles_r, Kind::Float) };
    let kernel = Variant::of(w, true, rule).kernel(w.device());
    Launch::new(device::gpu(w.device()), &kernel)
        .tensor(w, w.kind())
        .tensor(&plain.values, Kind::Float8e4m3fn)
        .tensor(&plain.scales, Kind::Float)
        .tensor(&transposed.values, Kind::Float8e4m3fn)
        .tensor(&transposed.scales, Kind::Float)
        .tensor_or_null(None, Kind::Int)
        .int(1)
        .int(r)
        .int(c)
        .int(r)
        .int(0)
        .int(0)
        .run(Shape { grid: [tiles_c as usize, (tiles_r * matrices) as usize], block: THREADS, shared_bytes: 0 });
    (plain, transposed)
}

struct Want {
    rows: bool,
    columns: bool,
}

fn on_gpu(x: &Tensor, counts: Option<&Tensor>, want: Want, rule: ScaleRule) -> (Option<Rows>, Option<Columns>) {
    let (r, c) = x.size2().expect("the quantiser takes a matrix");
    assert!(c % 16 == 0, "{c} columns: a row of FP8 is a multiple of 16 bytes");
    let num_experts = counts.map_or(1, |counts| counts.size1().expect("counts are [E]"));
    let fp8 = |a, b| Tensor::empty([a, b], (Kind::Float8e4m3fn, x.device()));
    let fp32 = |a, b| Tensor::empty([a, b], (Kind::Float, x.device()));
    let (tiles_c, p) = ((c + TILE - 1) / TILE, if want.columns { padded_rows(r, num_experts) } else { r });
    let (stride, stride_t) = (round_up(r, 4), round_up(c, 4));
    let rows = want.rows.then(|| Rows { values: fp8(r, c), scales: fp32(tiles_c, stride) });
    let columns = want.columns.then(|| Columns { values: fp8(c, p), scales: fp32(p / TILE, stride_t) });
    let kernel = Variant::of(x, false, rule).kernel(x.device());
    Launch::new(device::gpu(x.device()), &kernel)
        .tensor(x, x.kind())
        .tensor_or_null(rows.as_ref().map(|q| &q.values), Kind::Float8e4m3fn)
        .tensor_or_null(rows.as_ref().map(|q| &q.scales), Kind::Float)
        .tensor_or_null(columns.as_ref().map(|q| &q.values), Kind::Float8e4m3fn)
        .tensor_or_null(columns.as_ref().map(|q| &q.scales), Kind::Float)
        .tensor_or_null(counts, Kind::Int)
        .int(num_experts)
        .int(r)
        .int(c)
        .int(p)
        .int(stride)
        .int(stride_t)
        .run(Shape { grid: [tiles_c as usize, ((p + TILE - 1) / TILE) as usize], block: THREADS, shared_bytes: 0 });
    (rows, columns)
}
