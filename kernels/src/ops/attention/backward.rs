//! The backward on a GPU in BF16, beside cuDNN's forward: dK and dV stay in registers, dQ is added up in FP32 in L2, in one order:
//! the same bits every time.
//!
//! Legend: B sequences, H heads, S positions, Dk / Dv head widths.
use super::rows;
use super::wgmma::{self, Left};
use crate::device::{self, Kernel};
use crate::jit::Source;
use crate::launch::{Launch, Shape, aligned};
use crate::ops::gemm_fp8::HOPPER;
use crate::shim::CudnnAttention;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

const PARTS: &str = include_str!("parts.cuh");
const BACKWARD: &str = include_str!("backward.cu");
const AROUND: &str = include_str!("around.cu");
/// Of a block: keys that it owns, queries at a time.
const KEYS: i64 = 128;
const QUERIES: i64 = 64;
const THREADS: usize = 256;

fn defines(width: i64, value: i64) -> Vec<(&'static str, String)> {
    vec![("DK", width.to_string()), ("DV", value.to_string())]
}

fn backward_source(width: i64, value: i64) -> Source {
    let (width_n, value_n) = (width as usize, value as usize);
    let products = [
        wgmma::text("product_rows", QUERIES as usize, Left::Rows, false, false),
        wgmma::text("add_rows", QUERIES as usize, Left::Rows, false, true),
        wgmma::text("add_values", value_n, Left::Registers, true, true),
        wgmma::text("add_keys", width_n, Left::Registers, true, true),
        wgmma::text("product_queries", width_n / 2, Left::Columns, true, false),
        wgmma::text("add_queries", width_n / 2, Left::Columns, true, true),
    ];
    Source { name: "attention_backward", text: [HOPPER, &products.concat(), PARTS, BACKWARD].concat(), defines: defines(width, value) }
}

fn around_source(width: i64, value: i64) -> Source {
    Source { name: "attention_around", text: [HOPPER, AROUND].concat(), defines: defines(width, value) }
}

/// Variants, V3's first, for a test that compiles them.
pub fn sources() -> Vec<(Source, &'static str)> {
    let widths = [(192, 128), (128, 128), (128, 64), (64, 128), (64, 64)];
    widths.iter().flat_map(|&(width, value)| [(backward_source(width, value), "attention_backward"), (around_source(width, value), "attention_finish")]).collect()
}

fn kernel(device: Device, entry: &str, width: i64, value: i64) -> Arc<Kernel> {
    let source = if entry == "attention_backward" { backward_source } else { around_source };
    device::gpu(device).kernel(&format!("{entry}/{width}/{value}"), entry, || source(width, value)).expect("our own kernels compile and load")
}

fn shared_bytes(width: i64, value: i64) -> usize {
    let each = width + value;
    // Keys and values; two stages of queries, gradients and statistics; dS; dQ; barriers; and room to begin at 1024 bytes.
    (KEYS * each * 2 + 2 * (QUERIES * each * 2 + 2 * QUERIES * 4) + KEYS * QUERIES * 2 + QUERIES * width * 4 + 5 * 8 + 1024) as usize
}

/// dout [B, H, S, Dv] → (dq, dk, dv) shaped as q, k, v: of widths that are no multiples of 64 with zeros beside them.
pub fn backward(dout: &Tensor, [q, k, v]: [&Tensor; 3], made: &CudnnAttention, scale: f64) -> (Tensor, Tensor, Tensor) {
    let (width, value) = (q.size()[3], v.size()[3]);
    if width % 64 == 0 && value % 64 == 0 {
        return of_whole_panels(dout, [q, k, v], made, scale);
    }
    let [q, k, v, dout, out] = [q, k, v, dout, &made.out].map(|x| x.constant_pad_nd([0, (64 - x.size()[3] % 64) % 64]));
    let made = CudnnAttention { out, log_sum_exp: made.log_sum_exp.shallow_clone() };
    let (dq, dk, dv) = of_whole_panels(&dout, [&q, &k, &v], &made, scale);
    (dq.narrow(3, 0, width), dk.narrow(3, 0, width), dv.narrow(3, 0, value))
}

/// In memory a position's heads lie together.
fn of_whole_panels(dout: &Tensor, [q, k, v]: [&Tensor; 3], made: &CudnnAttention, scale: f64) -> (Tensor, Tensor, Tensor) {
    let (batch, heads, positions, width) = q.size4().expect("q is [B, H, S, Dk]");
    let (value, device, gpu) = (v.size()[3], q.device(), device::gpu(q.device()));
    let (blocks, all) = ((positions + QUERIES - 1) / QUERIES, batch * heads);
    let by_position = |x: &Tensor| aligned(&x.transpose(1, 2));
    let (out, dout, lse) = (by_position(&made.out), by_position(dout), made.log_sum_exp.contiguous());
    let [q, k, v] = [q, k, v].map(rows); // copies live until the launch
    let stats = Tensor::empty([all, blocks, 2, QUERIES], (Kind::Float, device));
    let sums = Tensor::empty([all, blocks, QUERIES * width], (Kind::Float, device));
    let turns = Tensor::empty([all, blocks, 2], (Kind::Int, device));
    let around = Shape { grid: [all as usize, blocks as usize], block: THREADS, shared_bytes: 0 };
    let prepare = kernel(device, "attention_prepare", width, value);
    let launch = Launch::new(gpu, &prepare).early().tensor(&out, Kind::BFloat16).tensor(&dout, Kind::BFloat16);
    let launch = launch.tensor(&lse, Kind::Float).tensor(&stats, Kind::Float).tensor(&turns, Kind::Int);
    launch.int(positions).int(heads).run(around);

    let new = |width: i64| Tensor::empty([batch, positions, heads, width], (Kind::BFloat16, device));
    let (dq, dk, dv) = (new(width), new(width), new(value));
    let main = kernel(device, "attention_backward", width, value);
    let launch = Launch::new(gpu, &main).early().map_of_heads(&q, QUERIES as usize, 64).map_of_heads(&k, KEYS as usize, 32);
    let launch = launch.map_of_heads(&v, KEYS as usize, 64).map_of_heads(&dout.transpose(1, 2), QUERIES as usize, 64);
    let launch = launch.tensor(&stats, Kind::Float).tensor(&sums, Kind::Float).tensor(&turns, Kind::Int);
    let launch = launch.tensor(&dk, Kind::BFloat16).tensor(&dv, Kind::BFloat16);
    launch.int(positions).int(heads).float(scale as f32).run(Shape {
        grid: [(all * ((positions + KEYS - 1) / KEYS)) as usize, 1],
        block: THREADS,
        shared_bytes: shared_bytes(width, value),
    });

    let finish = kernel(device, "attention_finish", width, value);
    let launch = Launch::new(gpu, &finish).early().tensor(&sums, Kind::Float).tensor(&dq, Kind::BFloat16);
    launch.int(positions).int(heads).float(scale as f32).run(around);
    (dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2))
}
