//! The router's passes on a GPU are the CPU's. Without a GPU the test says that it was skipped.
use kernels::fp8::relative_error;
use kernels::ops::gate::{self, Rule};
use kernels::ops::wide_linear;
use support::{gpu, poison, random, same};
use tch::{Device, Kind, Tensor};

#[allow(dead_code)] // the other tests use the rest
mod support;

#[test]
fn routes_and_gradients_are_the_cpus() {
    let Some(gpu) = gpu("routes_and_gradients_are_the_cpus") else {
        return;
    };
    let rule = |experts, top_k, groups, top_groups, renormalise| Rule { softmax: false, experts, top_k, groups, top_groups, renormalise, factor: 2.5 };
    let cpu = |x: &Tensor| x.to_device(Device::Cpu);
    tch::manual_seed(1);
    for (b, s, rule, ours) in [
        (1, 4096, rule(256, 8, 8, 4, true), true),
        (3, 77, rule(32, 8, 1, 1, true), true),
        (2, 33, rule(12, 3, 4, 2, false), true),
        (5, 1, rule(512, 8, 16, 4, true), true),
        (2, 50, rule(64, 1, 1, 1, false), true),
        (1, 40, rule(33, 33, 1, 1, true), false),
        (1, 40, Rule { softmax: true, ..rule(32, 8, 1, 1, true) }, false),
    ] {
        let name = format!("{b} × {s}, {rule:?}");
        let options = (Kind::Float, gpu.device());
        let (logits, bias) = (Tensor::randn([b * s, rule.experts], options), Tensor::randn([rule.experts], options) * 0.1);
        assert_eq!(rule.on_gpu(&logits), ours, "{name}");
        // A softmax has none; nor has every sigmoid.
        let bias = (!rule.softmax && rule.top_k > 1).then_some(bias);
        let on_cpu = bias.as_ref().map(cpu);
        poison(gpu);
        let (got, want) = (gate::forward(&logits, bias.as_ref(), b, &rule), gate::forward(&cpu(&logits), on_cpu.as_ref(), b, &rule));
        for (part, got, want) in [("routes", &got.routes, &want.routes), ("counts", &got.counts, &want.counts), ("top", &got.top, &want.top)] {
            // A score beside another in the last bit may come before it on one side: of some 30 000 choices, a few.
            let apart = (cpu(got).to_kind(Kind::Double) - want.to_kind(Kind::Double)).abs().clamp_max(1.0).sum(Kind::Double).double_value(&[]);
            assert!(apart <= 2.5e-4 * (b * s * rule.top_k) as f64, "{name}: {apart} of the {part} differ");
        }
        for (part, got, want) in [("scores", &got.scores, &want.scores), ("weights", &got.weights, &want.weights), ("shares", &got.share, &want.share)] {
            assert!(relative_error(&cpu(got), want) < 1e-5, "{name}: {part}");
        }
        let again = gate::forward(&logits, bias.as_ref(), b, &rule);
        assert!(same(&again.share, &got.share) && same(&again.counts, &got.counts), "{name}: one order of sums");
        let (dweights, balance) = (Tensor::randn([b * s, rule.top_k], options), Tensor::randn([b, rule.experts], options));
        poison(gpu);
        let got_d = gate::backward(&dweights, &got.scores, &got.routes, &balance, &rule);
        let want_d = gate::backward(&cpu(&dweights), &cpu(&got.scores), &cpu(&got.routes), &cpu(&balance), &rule);
        assert!(relative_error(&cpu(&got_d), &want_d) < 1e-5, "{name}: gradient");
    }
}

#[test]
fn the_routers_products_of_bf16_parts_are_fp32s() {
    let Some(gpu) = gpu("the_routers_products_of_bf16_parts_are_fp32s") else {
        return;
    };
    tch::manual_seed(2);
    let wide = |size: &[i64], scale: f64| Tensor::randn(size, (Kind::Float, gpu.device())) * scale;
    let f64 = |x: &Tensor| x.to_kind(Kind::Double);
    for (t, o, i, mean) in [(4096, 256, 7168, 0.0), (4096, 16, 7168, 0.5), (77, 64, 512, 0.0), (1, 8, 16, 0.0), (33, 12, 40, 0.5)] {
        let name = format!("[{t}, {i}] to {o}, mean {mean}");
        let (x, weight, dy) = (random(gpu, &[t, i], mean), wide(&[o, i], 0.006), wide(&[t, o], 1e-6));
        poison(gpu);
        let logits = wide_linear::forward(&x, &weight);
        let error = relative_error(&logits, &f64(&x).matmul(&f64(&weight).tr()));
        let plain = relative_error(&x.to_kind(Kind::Float).matmul(&weight.tr()), &f64(&x).matmul(&f64(&weight).tr()));
        let dx = f64(&dy).matmul(&f64(&weight));
        let rounding = relative_error(&dx.to_kind(Kind::BFloat16), &dx);
        let dx_error = relative_error(&wide_linear::backward_input(&dy, &weight, Kind::BFloat16), &dx);
        let exact = f64(&dy).tr().matmul(&f64(&x));
        let mut gradient = Tensor::full([o, i], f64::NAN, (Kind::Float, gpu.device()));
        wide_linear::backward_weight(&dy, &x, &mut gradient, true);
        let first = relative_error(&gradient, &exact);
        wide_linear::backward_weight(&dy, &x, &mut gradient, false);
        let both = relative_error(&gradient, &(exact * 2.0));
        println!("{name}: logits {error:.1e} (FP32 GEMM {plain:.1e}), dx {:.4} of its rounding, gradient {first:.1e}, {both:.1e}", dx_error / rounding);
        assert!(error < 2e-5 && first < 2e-5 && both < 2e-5, "{name}");
        assert!(dx_error < 1.001 * rounding, "{name}: dx {dx_error:e}, rounding {rounding:e}");
    }
    // Nothing of an FP32 number is lost: products with 1 are the number.
    let (eye, weight) = (Tensor::eye(512, (Kind::BFloat16, gpu.device())), wide(&[64, 512], 1.0));
    assert!(same(&wide_linear::forward(&eye, &weight), &weight.tr()), "a weight's parts are the weight");
    let mut gradient = Tensor::full([64, 512], f64::NAN, (Kind::Float, gpu.device()));
    wide_linear::backward_weight(&weight.tr().contiguous(), &eye, &mut gradient, true);
    assert!(same(&gradient, &weight), "a gradient's parts are the gradient");
}
