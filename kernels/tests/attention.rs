//! Causal attention, over whole sequences and within documents, against its formula in f64. On a GPU in BF16 through cuDNN's forward
//! and our own backward, the same bits every time; without one those tests say that they were skipped.
use kernels::fp8::relative_error;
use kernels::ops::attention;
use support::{gpu, poison, random, same};
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

fn ours(inputs: &[Tensor; 4], documents: Option<&[Vec<i64>]>, scale: f64) -> [Tensor; 4] {
    let [q, k, v, dout] = inputs;
    let (out, saved) = match documents {
        None => attention::forward(q, k, v, scale),
        Some(documents) => attention::forward_within(documents, [q, k, v], scale),
    };
    if let Some(kept) = saved.out() {
        assert!(kept.equal(&out), "what is kept is the output");
    }
    let (dq, dk, dv) = attention::backward(dout, q, k, v, &saved, scale);
    [out, dq, dk, dv]
}

fn check(inputs: &[Tensor; 4], documents: Option<&[Vec<i64>]>, limit: f64) {
    let (sequences, positions) = (inputs[0].size()[0], inputs[0].size()[2]);
    let scale = 0.3 / (inputs[0].size()[3] as f64).sqrt();
    let whole = vec![vec![positions]; sequences as usize];
    let got = ours(inputs, documents, scale);
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
        check(&inputs, None, 1e-12);
        check(&inputs, Some(&documents(positions)), 1e-12);
    }
}

#[test]
fn on_a_gpu_it_is_the_formula() {
    let Some(gpu) = gpu("on_a_gpu_it_is_the_formula") else {
        return;
    };
    // V3's widths, others that are whole panels, and some that are filled up to them.
    for (positions, width, value) in [(200, 192, 128), (512, 192, 128), (65, 192, 128), (64, 128, 128), (321, 64, 64), (130, 96, 40), (200, 72, 128), (96, 40, 96)] {
        let [q, k] = [0.1, -0.1].map(|mean| random(gpu, &[2, 4, positions, width], mean));
        let [v, dout] = [0.2, 0.0].map(|mean| random(gpu, &[2, 4, positions, value], mean));
        let inputs = [q, k, v, dout];
        poison(gpu);
        check(&inputs, None, 5e-3);
        check(&inputs, Some(&documents(positions)), 5e-3);
        // As the model has them: heads beside each other, by their strides; and rows that no copy of 16 bytes begins at.
        let beside = inputs.each_ref().map(|x| x.transpose(1, 2).contiguous().transpose(1, 2));
        check(&beside, None, 5e-3);
        let apart = inputs.each_ref().map(|x| Tensor::cat(&[x, &x.narrow(3, 0, 4)], 3).narrow(3, 4, x.size()[3]));
        check(&apart, None, 5e-3);
    }
}

/// Blocks of one head add to the same sums, as many as the GPU runs at once and more.
#[test]
fn on_a_gpu_the_backward_gives_the_same_bits_every_time() {
    let Some(gpu) = gpu("on_a_gpu_the_backward_gives_the_same_bits_every_time") else {
        return;
    };
    for (sequences, heads, positions) in [(1, 16, 4096), (3, 5, 1000), (1, 1, 20000)] {
        let [q, k] = [0.1, -0.1].map(|mean| random(gpu, &[sequences, heads, positions, 192], mean));
        let [v, dout] = [0.2, 0.0].map(|mean| random(gpu, &[sequences, heads, positions, 128], mean));
        let (_, saved) = attention::forward(&q, &k, &v, 0.07);
        let (dq, dk, dv) = attention::backward(&dout, &q, &k, &v, &saved, 0.07);
        for _ in 0..5 {
            poison(gpu);
            let again = attention::backward(&dout, &q, &k, &v, &saved, 0.07);
            assert!(same(&again.0, &dq) && same(&again.1, &dk) && same(&again.2, &dv), "{sequences} x {heads} x {positions}");
        }
        assert!(f64::try_from(dq.to_kind(Kind::Float).norm()).expect("a number") > 0.0);
    }
}
