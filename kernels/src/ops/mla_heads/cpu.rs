//! In torch ops, for any kind and device.
use super::Widths;
use crate::ops::rope::{self, RopeTable};
use tch::Tensor;

pub fn queries(q: &Tensor, sequences: i64, table: &RopeTable, w: Widths) -> Tensor {
    let q = q.view([sequences, -1, w.heads, w.nope + w.rotary]);
    let parts = q.split_with_sizes([w.nope, w.rotary], 3);
    Tensor::cat(&[parts[0].shallow_clone(), rope::forward(&parts[1], table)], 3).transpose(1, 2).contiguous()
}

pub fn queries_backward(dq: &Tensor, table: &RopeTable, w: Widths) -> Tensor {
    let dq = dq.transpose(1, 2);
    let dq = dq.split_with_sizes([w.nope, w.rotary], 3);
    Tensor::cat(&[dq[0].shallow_clone(), rope::backward(&dq[1], table)], 3).reshape([-1, w.heads * (w.nope + w.rotary)])
}

pub fn keys_and_values(kv: &Tensor, rotary_key: &Tensor, sequences: i64, table: &RopeTable, w: Widths) -> (Tensor, Tensor) {
    let kv = kv.view([sequences, -1, w.heads, w.nope + w.value]);
    let parts = kv.split_with_sizes([w.nope, w.value], 3);
    let rotary_key = rope::forward(&rotary_key.reshape([sequences, -1, 1, w.rotary]), table).expand([-1, -1, w.heads, -1], false);
    (Tensor::cat(&[parts[0].shallow_clone(), rotary_key], 3).transpose(1, 2).contiguous(), parts[1].transpose(1, 2).contiguous())
}

pub fn keys_and_values_backward(dk: &Tensor, dv: &Tensor, table: &RopeTable, w: Widths) -> (Tensor, Tensor) {
    let dk = dk.transpose(1, 2); // [B, S, H, N + R]
    let dk = dk.split_with_sizes([w.nope, w.rotary], 3);
    let dkv = Tensor::cat(&[dk[0].shallow_clone(), dv.transpose(1, 2)], 3).reshape([-1, w.heads * (w.nope + w.value)]);
    // One rotary key served all heads, so its gradient is their sum.
    let drotary = rope::backward(&dk[1].sum_dim_intlist(&[2i64][..], true, None), table).reshape([-1, w.rotary]);
    (dkv, drotary)
}
