//! SwiGLU on a packed projection: silu(gate) · up, with an optional weight a row (the routing weight, which is applied
//! here, at the expert, so that neither forward nor backward touches the wider down-projection for it). In torch ops for
//! any kind, and fused with the quantiser for the FP8 linears around it.
//!
//! Legend: R rows, I intermediate size, E experts.
use crate::device;
use crate::fp8::{Columns, Rows, ScaleRule, padded_rows, round_up};
use crate::jit::Source;
use crate::launch::Launch;
use crate::ops::quantise::tiles::{self, Quantised, Want, flag, row_tiles, rule_define, shape, strides, tiles_of};
use tch::{Device, Kind, Tensor};

mod cpu;
pub use cpu::{backward, forward};

const TEXT: &str = include_str!("swiglu.cu");

/// What a fused pass writes.
#[derive(Clone, Copy, Debug)]
pub struct Make {
    /// Layouts of its result: the activation, or in backward d[gate, up].
    pub want: Want,
    /// Forward: keep gate and up in FP8. Backward: make the activation by columns again, for the down-projection's Wgrad.
    pub save: bool,
    pub rule: ScaleRule,
}

/// The pass's input as kept for backward.
pub enum GateUp {
    /// [R, 2I], gate first.
    Bf16(Tensor),
    /// gate and up, [R, I] each.
    Fp8([Rows; 2]),
}

pub struct Fused {
    pub act: Quantised, // [R, I]
    pub saved: Option<GateUp>,
}

pub struct FusedBackward {
    pub dgate_up: Quantised, // [R, 2I]
    pub act: Option<Columns>,
    /// [R] FP32, where the rows were weighted.
    pub drow_weight: Option<Tensor>,
}

fn source(saved_fp8: bool, rule: ScaleRule) -> Source {
    let defines = vec![rule_define(rule), ("SAVED_FP8", flag(saved_fp8))];
    Source { name: "swiglu", text: [tiles::TEXT, TEXT].concat(), defines }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    let rules = [ScaleRule::Amax, ScaleRule::PowerOfTwo];
    rules.iter().flat_map(|&rule| [false, true].map(|saved| (source(saved, rule), "swiglu_backward"))).collect()
}

fn num_experts(counts: Option<&Tensor>) -> i64 {
    counts.map_or(1, |counts| counts.size1().expect("counts are [E]"))
}

/// gate_up [R, 2I] BF16, row_weight [R] FP32, counts [E] i32 → the activation, rounded to BF16 on the way. I is a
/// multiple of 16. Of the rows past the sum of the counts nothing is written.
pub fn quantised(gate_up: &Tensor, row_weight: Option<&Tensor>, counts: Option<&Tensor>, make: Make) -> Fused {
    let Device::Cuda(_) = gate_up.device() else {
        return cpu::quantised(gate_up, row_weight, counts, make);
    };
    let (r, both) = gate_up.size2().expect("gate_up is [R, 2I]");
    let (i, experts, gpu) = (both / 2, num_experts(counts), device::gpu(gate_up.device()));
    let act = Quantised::empty([r, i], experts, make.want, gate_up.device());
    let half = || Quantised::empty([r, i], 1, Want { rows: make.save, columns: false }, gate_up.device()).rows;
    let (gate, up) = (half(), half());
    let key = format!("swiglu/false/{:?}", make.rule);
    let kernel = gpu.kernel(&key, "swiglu", || source(false, make.rule)).expect("our own kernels compile and load");
    let mut launch = Launch::new(gpu, &kernel).early().tensor(gate_up, Kind::BFloat16).tensor_or_null(row_weight, Kind::Float);
    for half in [&gate, &up] {
        launch = rows_or_null(launch, half.as_ref());
    }
    let launch = act.tensors(launch).tensor_or_null(counts, Kind::Int).int(experts).int(r).int(i);
    strides(launch, [r, i], experts).run(shape(tiles_of(i), row_tiles(r, experts)));
    Fused { act, saved: gate.zip(up).map(|(gate, up)| GateUp::Fp8([gate, up])) }
}

/// dact [R, I] BF16 and what forward kept → d[gate, up] and the activation again, rounded to BF16 on the way, and
/// d(row weight). A tile of 128 columns must not hold gate and up together: for other I the passes are torch's.
pub fn backward_quantised(
    dact: &Tensor,
    saved: &GateUp,
    row_weight: Option<&Tensor>,
    counts: Option<&Tensor>,
    make: Make,
) -> FusedBackward {
    let (device, (r, i)) = (dact.device(), dact.size2().expect("dact is [R, I]"));
    if !device.is_cuda() || i % 128 != 0 {
        return cpu::backward_quantised(dact, saved, row_weight, counts, make);
    }
    let (experts, gpu) = (num_experts(counts), device::gpu(device));
    let dgate_up = Quantised::empty([r, 2 * i], experts, make.want, device);
    let act = Quantised::empty([r, i], experts, Want { rows: false, columns: make.save }, device).columns;
    let parts = row_weight.map(|_| Tensor::empty([tiles_of(i), r], (Kind::Float, device)));
    let (bf16, halves) = match saved {
        GateUp::Bf16(gate_up) => (Some(gate_up), None),
        GateUp::Fp8(halves) => (None, Some(halves)),
    };
    let key = format!("swiglu/{}/{:?}", halves.is_some(), make.rule);
    let source = || source(halves.is_some(), make.rule);
    let kernel = gpu.kernel(&key, "swiglu_backward", source).expect("our own kernels compile and load");
    let mut launch = Launch::new(gpu, &kernel).early().tensor(dact, Kind::BFloat16).tensor_or_null(bf16, Kind::BFloat16);
    for half in [0, 1] {
        launch = rows_or_null(launch, halves.map(|halves| &halves[half]));
    }
    let launch = launch
        .tensor_or_null(row_weight, Kind::Float)
        .tensor_or_null(parts.as_ref(), Kind::Float)
        .tensor_or_null(act.as_ref().map(|act| &act.values), Kind::Float8e4m3fn)
        .tensor_or_null(act.as_ref().map(|act| &act.scales), Kind::Float);
    dgate_up
        .tensors(launch)
        .tensor_or_null(counts, Kind::Int)
        .int(experts)
        .int(r)
        .int(i)
        .int(padded_rows(r, experts))
        .int(round_up(r, 4))
        .int(round_up(2 * i, 4))
        .int(round_up(i, 4))
        .run(shape(tiles_of(i), row_tiles(r, experts)));
    let drow_weight = parts.map(|parts| {
        let sums = Tensor::empty([r], (Kind::Float, device));
        let kernel = gpu.kernel(&key, "sum_weights", source).expect("our own kernels compile and load");
        let launch = Launch::new(gpu, &kernel).early().tensor(&parts, Kind::Float).tensor(&sums, Kind::Float);
        launch.tensor_or_null(counts, Kind::Int).int(experts).int(r).int(tiles_of(i)).run(shape((r + 31) / 32, 1));
        sums
    });
    FusedBackward { dgate_up, act, drow_weight }
}

fn rows_or_null<'a>(launch: Launch<'a>, rows: Option<&Rows>) -> Launch<'a> {
    let launch = launch.tensor_or_null(rows.map(|rows| &rows.values), Kind::Float8e4m3fn);
    launch.tensor_or_null(rows.map(|rows| &rows.scales), Kind::Float)
}
