//! Attention's backward: ours beside cuDNN's in the same run, and how far both are off the formula in f64.
use crate::Bench;
use kernels::fp8::relative_error;
use kernels::ops::attention::{self, Saved};
use tch::{Kind, Tensor};

/// Sequences, positions, heads, width of queries and of values: V3's first.
const SHAPES: [[i64; 5]; 5] = [[1, 4096, 128, 192, 128], [4, 1024, 128, 192, 128], [1, 16384, 128, 192, 128], [1, 4096, 16, 192, 128], [16, 512, 16, 64, 64]];

impl Bench {
    pub fn attention(&self) {
        println!("\nattention's backward, causal: TFLOP/s | cuDNN | ratio | error of dq, dk, dv | cuDNN's");
        for [sequences, positions, count, width, value] in SHAPES {
            let heads = |width: i64| self.random(&[sequences, positions, count, width]).transpose(1, 2);
            let inputs = [heads(width), heads(width), heads(value)];
            let [q, k, v] = &inputs;
            let (dout, scale) = (heads(value), 1.0 / (width as f64).sqrt());
            let (_, saved) = attention::forward(q, k, v, scale);
            let ours = || attention::backward(&dout, q, k, v, &saved, scale);
            let cudnn = || cudnn(&dout, [q, k, v], &saved, scale);
            let errors = |(dq, dk, dv): (Tensor, Tensor, Tensor)| {
                let pairs = [dq, dk, dv].into_iter().zip(of_last_head(&inputs, &dout, scale));
                pairs.map(|(made, exact)| format!("{:.2e}", relative_error(&last_head(&made), &exact))).collect::<Vec<_>>().join(" ")
            };
            let (our_errors, their_errors) = (errors(ours()), errors(cudnn()));
            let [ours, cudnn]: [f64; 2] = self.race(&[&|| drop(ours()), &|| drop(cudnn())]).try_into().expect("two");
            // Five products, of half the scores.
            let tera = (sequences * count * positions * positions * (3 * width + 2 * value)) as f64 / 1e9;
            let speeds = format!("{:>5.0} | {:>5.0} | {:.3}", tera / ours, tera / cudnn, cudnn / ours);
            println!("{sequences:>2} x {positions:<5}, {count:>3} heads of {width}/{value} {speeds} | {our_errors} | {their_errors}");
        }
    }
}

fn cudnn(dout: &Tensor, [q, k, v]: [&Tensor; 3], saved: &Saved, scale: f64) -> (Tensor, Tensor, Tensor) {
    let Saved::Fused(made) = saved else { panic!("cuDNN takes these widths") };
    let (none, positions, word) = (Tensor::new(), q.size()[2], Tensor::zeros([1], (Kind::Int64, q.device()))); // of a dropout that never happens
    let (out, lse) = (&made.out, &made.log_sum_exp);
    Tensor::internal_scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, &word, &word, &none, &none, &none, positions, positions, 0.0, true, scale,
    )
}

fn last_head(x: &Tensor) -> Tensor {
    x.select(0, -1).select(0, -1).to_kind(Kind::Double)
}

/// dq, dk, dv of the last head, from its scores.
fn of_last_head(inputs: &[Tensor; 3], dout: &Tensor, scale: f64) -> [Tensor; 3] {
    let ([q, k, v], dout) = (inputs.each_ref().map(last_head), last_head(dout));
    let positions = q.size()[0];
    let future = Tensor::ones([positions, positions], (Kind::Bool, q.device())).triu(1);
    let p = (q.matmul(&k.tr()) * scale).masked_fill(&future, f64::NEG_INFINITY).softmax(-1, Kind::Double);
    let delta = (p.matmul(&v) * &dout).sum_dim_intlist(&[-1i64][..], true, None);
    let dscores = (dout.matmul(&v.tr()) - delta) * &p * scale;
    [dscores.matmul(&k), dscores.tr().matmul(&q), p.tr().matmul(&dout)]
}
