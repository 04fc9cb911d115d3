//! Between the up-projections of multi-head latent attention and attention itself (report §2.1.1): queries, and keys of
//! which all heads share the rotary part, turned by their positions; and the way back. On a GPU BF16 goes through one
//! pass each, and heads stay where the projection wrote them: what comes out is [B, H, S, …] by its strides.
//!
//! Legend: B sequences, S positions, T = B·S, H heads, N no-position width, R rotary width, V value width.
use crate::device::{self, Kernel};
use crate::fp8::ScaleRule;
use crate::jit::Source;
use crate::launch::{Launch, Shape};
use crate::ops::quantise::tiles::{self, rule_define};
use crate::ops::rope::RopeTable;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

mod cpu;

const TEXT: &str = include_str!("mla_heads.cu");
const THREADS: i64 = tiles::THREADS as i64;

#[derive(Clone, Copy, Debug)]
pub struct Widths {
    pub heads: i64,
    pub nope: i64,
    pub rotary: i64,
    pub value: i64,
}

impl Widths {
    fn on_gpu(&self, x: &Tensor, table: &RopeTable) -> bool {
        let eights = [self.nope, self.rotary, self.value].iter().all(|width| width % 8 == 0) && self.rotary <= THREADS;
        x.device().is_cuda() && x.kind() == Kind::BFloat16 && table.cos.kind() == Kind::Float && eights
    }
}

fn source() -> Source {
    Source { name: "mla_heads", text: [tiles::TEXT, TEXT].concat(), defines: vec![rule_define(ScaleRule::Amax)] }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    vec![(source(), "join")]
}

fn kernel(device: Device, entry: &str) -> Arc<Kernel> {
    device::gpu(device).kernel("mla_heads", entry, source).expect("our own kernels compile and load")
}

fn shape(tokens: i64, shared_bytes: i64) -> Shape {
    Shape { grid: [tokens as usize, 1], block: THREADS as usize, shared_bytes: shared_bytes as usize }
}

/// The table's rows, as many as there are positions.
fn angles<'a>(launch: Launch<'a>, table: &RopeTable) -> Launch<'a> {
    launch.tensor(&table.cos, Kind::Float).tensor(&table.sin, Kind::Float)
}

/// q [T, H (N + R)] → [B, H, S, N + R], the last R of each head turned.
pub fn queries(q: Tensor, sequences: i64, table: &RopeTable, w: Widths) -> Tensor {
    if !w.on_gpu(&q, table) {
        return cpu::queries(&q, sequences, table, w);
    }
    rotate(&q, sequences, table, w, 1.0);
    q.view([sequences, -1, w.heads, w.nope + w.rotary]).transpose(1, 2)
}

/// dq as q → [T, H (N + R)].
pub fn queries_backward(dq: Tensor, table: &RopeTable, w: Widths) -> Tensor {
    if !w.on_gpu(&dq, table) {
        return cpu::queries_backward(&dq, table, w);
    }
    let sequences = dq.size()[0];
    let dq = dq.transpose(1, 2).contiguous().view([-1, w.heads * (w.nope + w.rotary)]);
    rotate(&dq, sequences, table, w, -1.0);
    dq
}

/// In place.
fn rotate(q: &Tensor, sequences: i64, table: &RopeTable, w: Widths, way: f32) {
    let (tokens, kernel) = (q.size()[0], kernel(q.device(), "rotate"));
    angles(Launch::new(device::gpu(q.device()), &kernel).tensor(q, Kind::BFloat16), table)
        .float(way)
        .int(tokens / sequences)
        .int(w.heads)
        .int(w.nope)
        .int(w.rotary)
        .run(shape(tokens, 0));
}

/// kv [T, H (N + V)], rotary_key [T, R] → k [B, H, S, N + R], v [B, H, S, V].
pub fn keys_and_values(kv: &Tensor, rotary_key: &Tensor, sequences: i64, table: &RopeTable, w: Widths) -> (Tensor, Tensor) {
    if !w.on_gpu(kv, table) {
        return cpu::keys_and_values(kv, rotary_key, sequences, table, w);
    }
    let (tokens, options, rotary_key) = (kv.size()[0], (Kind::BFloat16, kv.device()), rotary_key.contiguous());
    let new = |width: i64| Tensor::empty([sequences, tokens / sequences, w.heads, width], options);
    let (k, v, kernel) = (new(w.nope + w.rotary), new(w.value), kernel(kv.device(), "split"));
    let launch = Launch::new(device::gpu(kv.device()), &kernel).tensor(kv, Kind::BFloat16).tensor(&rotary_key, Kind::BFloat16);
    let launch = angles(launch, table).tensor(&k, Kind::BFloat16).tensor(&v, Kind::BFloat16).int(tokens / sequences);
    launch.int(w.heads).int(w.nope).int(w.rotary).int(w.value).run(shape(tokens, 0));
    (k.transpose(1, 2), v.transpose(1, 2))
}

/// dk as k, dv as v → dkv [T, H (N + V)], d(rotary_key) [T, R].
pub fn keys_and_values_backward(dk: &Tensor, dv: &Tensor, table: &RopeTable, w: Widths) -> (Tensor, Tensor) {
    if !w.on_gpu(dk, table) {
        return cpu::keys_and_values_backward(dk, dv, table, w);
    }
    let (sequences, positions, options) = (dk.size()[0], dk.size()[2], (Kind::BFloat16, dk.device()));
    let (dk, dv) = (dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous());
    let tokens = sequences * positions;
    let dkv = Tensor::empty([tokens, w.heads * (w.nope + w.value)], options);
    let (drotary, kernel) = (Tensor::empty([tokens, w.rotary], options), kernel(dk.device(), "join"));
    let launch = Launch::new(device::gpu(dk.device()), &kernel).tensor(&dk, Kind::BFloat16).tensor(&dv, Kind::BFloat16);
    let launch = angles(launch, table).tensor(&dkv, Kind::BFloat16).tensor(&drotary, Kind::BFloat16).int(positions);
    let sums = THREADS / (w.rotary / 8) * w.rotary * 4;
    launch.int(w.heads).int(w.nope).int(w.rotary).int(w.value).run(shape(tokens, sums));
    (dkv, drotary)
}
