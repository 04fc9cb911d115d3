//! Causal attention, over whole sequences and within documents, against its formula in f64. On a GPU in BF16 through cuDNN
//! and, repeatably, through our own backward; without one that test says that it was skipped.
use kernels::fp8::relative_error;
use kernels::ops::attention;
use support::{gpu, random};
use tch::{Device, Kind, Tensor};

#[allow(dead_code)] // what the other tests share
mod support;

/// out, dq, dk, dv by autograd: a position sees those before it in its own document.
fn formula(inputs: &[Tensor; 4], documents: &[Vec<i64>], scale: f64) -> [Tensor; 4] {
    let [q, k, v, dout] = inputs.each_ref().map(|x| x.to_device(Device::Cpu).to_kind(Kind::Double));
    let positions = q.size()[2];
    let [q, k, v] = [q, k, v].map(|x| x.detach().set_requires_grad(true));
    let of_sequence = |lengths: &Vec<i64>| {
        let ids: Vec<i64> = lengths.iter().enumerate().flat_map(|(id, &length)| vec![id as i64; length as usize]).take(positions as usize).collect();
        let ids = Tensor::from_slice(&ids);
        ids.unsqueeze(1).eq_tensor(&ids.unsqueeze(0)).tril(0)
    };
    let seen = Tensor::stack(&documents.iter().map(of_sequence).collect::<Vec<_>>(), 0).unsqueeze(1); // [B, 1, S, S]
    let scores = (q.matmul(&k.transpose(2, 3)) * scale).masked_fill(&seen.logical_not(), f64::NEG_INFINITY);
    let out = scores.softmax(-1, Kind::Double).matmul(&v);
    (&out * dout).sum(Kind::Double).backward();
    [out.detach(), q.grad(), k.grad(), v.grad()]
}

fn ours(inputs: &[Tensor; 4], documents: Option<&[Vec<i64>]>, scale: f64, repeatable: bool) -> [Tensor; 4] {
    let [q, k, v, dout] = inputs;
    let (out, saved) = match documents {
        None => attention::forward(q, k, v, scale, repeatable),
        Some(documents) => attention::forward_within(documents, [q, k, v], scale, repeatable),
    };
    if let Some(kept) = saved.out() {
        assert!(kept.equal(&out), "what is kept is the output");
    }
    let (dq, dk, dv) = attention::backward(dout, q, k, v, &saved, scale);
    [out, dq, dk, dv]
}

fn check(inputs: &[Tensor; 4], documents: Option<&[Vec<i64>]>, repeatable: bool, limit: f64) {
    let (sequences, positions) = (inputs[0].size()[0], inputs[0].size()[2]);
    let scale = 0.3 / (inputs[0].size()[3] as f64).sqrt();
    let whole = vec![vec![positions]; sequences as usize];
    let got = ours(inputs, documents, scale, repeatable);
    let want = formula(inputs, documents.unwrap_or(&whole), scale);
    for ((what, got), want) in ["out", "dq", "dk", "dv"].iter().zip(&got).zip(&want) {
        assert_eq!(got.size(), want.size(), "{what}");
        let error = relative_error(&got.to_device(Device::Cpu), want);
        assert!(error < limit, "{what} of {positions} positions, documents {documents:?}: {error:e}");
    }
}

/// The last document of a sequence may reach past its end, and a document may be one position.
fn documents(positions: i64) -> [Vec<i64>; 2] {
    [vec![1, positions / 3, positions], vec![positions / 2, 1, 1, positions - positions / 2 - 2]]
}

#[test]
fn within_documents_it_is_the_formula() {
    let value = |i: i64, shape: &[i64]| {
        let count: i64 = shape.iter().product();
        ((Tensor::arange(count, (Kind::Double, Device::Cpu)) + 0.5) * (1.7 + i as f64)).sin().view(shape)
    };
    for positions in [5, 37] {
        let inputs = [value(0, &[2, 3, positions, 12]), value(1, &[2, 3, positions, 12]), value(2, &[2, 3, positions, 8]), value(3, &[2, 3, positions, 8])];
        check(&inputs, None, true, 1e-12);
        check(&inputs, Some(&documents(positions)), true, 1e-12);
    }
}

#[test]
fn on_a_gpu_it_is_the_formula() {
    let Some(gpu) = gpu("on_a_gpu_it_is_the_formula") else {
        return;
    };
    for positions in [200, 512] {
        let [q, k] = [0.1, -0.1].map(|mean| random(gpu, &[2, 4, positions, 192], mean));
        let [v, dout] = [0.2, 0.0].map(|mean| random(gpu, &[2, 4, positions, 128], mean));
        let inputs = [q, k, v, dout];
        for repeatable in [false, true] {
            check(&inputs, None, repeatable, 1e-2);
            check(&inputs, Some(&documents(positions)), repeatable, 1e-2);
        }
    }
}
