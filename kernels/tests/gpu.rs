//! The CUDA kernels against f64 and against the CPU's numerics. Without a GPU each test says that it was skipped.
use kernels::fp8::{self, Rows, ScaleRule, TILE, relative_error};
use kernels::ops::gemm_fp8::{self, FORWARD_PLANS, WGRAD_PLANS, Write};
use kernels::ops::{gemm_grouped, quantise};
use support::{counts_tensor, gpu, poison, random, same};
use tch::{Device, Kind, Tensor};

mod support;

#[test]
fn the_quantiser_gives_the_bits_of_the_cpu() {
    let Some(gpu) = gpu("the_quantiser_gives_the_bits_of_the_cpu") else {
        return;
    };
    for rule in [ScaleRule::Amax, ScaleRule::PowerOfTwo] {
        for (rows, cols) in [(1, 16), (130, 208), (517, 1024)] {
            let x = random(gpu, &[rows, cols], 0.1) * 3.0;
            let cpu = x.to_device(Device::Cpu);
            poison(gpu);
            let (by_row, by_column) = quantise::rows_and_columns(&x, None, rule);
            let want = fp8::quantise_rows(&cpu, rule);
            assert!(same(&by_row.values, &want.values), "rows of {rows}x{cols}");
            let real = |t: &Tensor, n| t.narrow(1, 0, n).contiguous();
            assert!(same(&real(&by_row.scales, rows), &real(&want.scales, rows)), "row scales of {rows}x{cols}");
            let want = fp8::quantise_columns(&cpu, &[rows], rule);
            assert!(same(&by_column.values, &want.values), "columns of {rows}x{cols}");
            assert!(same(&real(&by_column.scales, cols), &real(&want.scales, cols)), "column scales");
        }
        for (size, kind) in [(vec![256, 384], Kind::BFloat16), (vec![3, 144, 272], Kind::Float)] {
            let w = random(gpu, &size, 0.0).to_kind(kind) * 1.01;
            poison(gpu);
            let (plain, transposed) = quantise::weights(&w, rule);
            let (want, want_t) = quantise::weights(&w.to_device(Device::Cpu), rule);
            assert!(same(&plain.values, &want.values) && same(&plain.scales, &want.scales), "{size:?}");
            assert!(same(&transposed.values, &want_t.values) && same(&transposed.scales, &want_t.scales), "{size:?}");
        }
    }
    let x = random(gpu, &[600, 160], 0.0);
    let counts = [0, 5, 128, 0, 130, 300];
    let tiles = counts.iter().map(|count| (count + TILE - 1) / TILE).sum::<i64>();
    poison(gpu);
    let got = quantise::columns(&x, Some(&counts_tensor(gpu, &counts)), ScaleRule::Amax);
    let want = fp8::quantise_columns(&x.to_device(Device::Cpu), &counts, ScaleRule::Amax);
    let owned = |t: &Tensor| t.narrow(1, 0, tiles * TILE).contiguous();
    assert!(same(&owned(&got.values), &owned(&want.values)), "columns by expert");
    let owned = |t: &Tensor| t.narrow(0, 0, tiles).narrow(1, 0, 160).contiguous();
    assert!(same(&owned(&got.scales), &owned(&want.scales)), "scales by expert");
}

#[test]
fn forward_is_as_exact_as_promised() {
    let Some(gpu) = gpu("forward_is_as_exact_as_promised") else {
        return;
    };
    let mut of_k = Vec::new();
    for (m, n, k, mean) in [
        (1, 64, 64, 0.0),
        (129, 136, 192, 0.5),
        (300, 1000, 1040, 0.0),
        (512, 512, 1024, 0.5),
        (512, 512, 16384, 0.5),
        (512, 512, 1024, 0.0),
        (512, 512, 16384, 0.0),
    ] {
        let a = quantise::rows(&random(gpu, &[m, k], mean), ScaleRule::Amax);
        let (b, _) = quantise::weights(&random(gpu, &[(n + 15) / 16 * 16, k], mean), ScaleRule::Amax);
        let b = fp8::Blocks { values: b.values.narrow(0, 0, n), scales: b.scales.narrow(0, 0, (n + 127) / 128) };
        let exact = a.dequantise(Kind::Double).matmul(&b.dequantise(Kind::Double).tr());
        let error_of = |options| {
            poison(gpu);
            relative_error(&gemm_fp8::forward(&a, &b, options), &exact)
        };
        let fp32 = gemm_fp8::Options { out_fp32: true, ..Default::default() };
        let rounding = relative_error(&exact.to_kind(Kind::BFloat16), &exact);
        let (exactly, rounded) = (error_of(fp32), error_of(Default::default()));
        println!("{m}x{n}x{k} mean {mean}: fp32 {exactly:.2e}, bf16 {rounded:.2e} (rounding {rounding:.2e})");
        assert!(exactly < 2e-4 && rounded <= 1.05 * rounding, "{m}x{n}x{k}");
        if m == 512 {
            of_k.push(exactly);
        }
    }
    assert!(of_k[1] <= 1.2 * of_k[0] && of_k[3] <= 1.2 * of_k[2], "the error grows with K: {of_k:?}");
}

/// Without the promotion the matrix unit's own accumulator shows: the accuracy test above is able to fail.
#[test]
fn promotion_is_what_makes_it_exact() {
    let Some(gpu) = gpu("promotion_is_what_makes_it_exact") else {
        return;
    };
    let (m, n, k) = (256, 256, 16384);
    // The same scale in every tile, since a sum along all of K can only be scaled at its end.
    let even = |rows| {
        let x = random(gpu, &[rows, k], 0.5).clamp(-4, 4).view([rows, k / 128, 128]);
        let _ = x.narrow(2, 0, 1).fill_(4);
        x.view([rows, k])
    };
    let (a, b) = (quantise::rows(&even(m), ScaleRule::Amax), quantise::weights(&even(n), ScaleRule::Amax).0);
    let exact = a.dequantise(Kind::Double).matmul(&b.dequantise(Kind::Double).tr());
    let error_of = |without_promotion| {
        let options = gemm_fp8::Options { out_fp32: true, without_promotion, ..Default::default() };
        relative_error(&gemm_fp8::forward(&a, &b, options), &exact)
    };
    let (with, without) = (error_of(false), error_of(true));
    println!("with promotion {with:.2e}, without {without:.2e}");
    assert!(with < 2e-4 && (1e-3..0.5).contains(&without), "with {with}, without {without}");
}

#[test]
fn every_tile_agrees() {
    let Some(gpu) = gpu("every_tile_agrees") else {
        return;
    };
    // Of whole groups of 32 columns, and not.
    for n in [1408, 1416] {
        let (m, k) = (700, 640);
        let a = quantise::rows(&random(gpu, &[m, k], 0.5), ScaleRule::PowerOfTwo);
        let (b, _) = quantise::weights(&random(gpu, &[1424, k], 0.5), ScaleRule::PowerOfTwo);
        let b = fp8::Blocks { values: b.values.narrow(0, 0, n), scales: b.scales.narrow(0, 0, (n + 127) / 128) };
        let exact = a.dequantise(Kind::Double).matmul(&b.dequantise(Kind::Double).tr());
        for (plan, num_sms) in FORWARD_PLANS.into_iter().flat_map(|plan| [Some(2), Some(97), None].map(|n| (plan, n))) {
            let forward = |out_fp32| {
                poison(gpu);
                let options = gemm_fp8::Options { num_sms, plan: Some(plan), out_fp32, ..Default::default() };
                gemm_fp8::forward(&a, &b, options)
            };
            let fp32 = forward(true);
            let error = relative_error(&fp32, &exact);
            assert!(error < 2e-4, "{plan:?}, {num_sms:?} multiprocessors: {error}");
            assert!(same(&forward(false), &fp32.to_kind(Kind::BFloat16)), "{plan:?}, {n} columns: BF16 is not FP32 rounded");
        }
    }
}

/// The last: experts of many rows and of few, whose weight gradients are made in other ways.
const COUNTS: [&[i64]; 6] = [&[0, 300, 1, 128, 0, 515, 0], &[0, 0], &[0], &[7], &[129, 0, 0, 1000], &[4200, 0, 130, 2047, 2048]];
/// All multiprocessors have a tile at most of such small products; six have many, one after another.
const SMS: [Option<usize>; 2] = [None, Some(6)];

#[test]
fn grouped_forward_takes_any_counts() {
    let Some(gpu) = gpu("grouped_forward_takes_any_counts") else {
        return;
    };
    let k = 720;
    // Also where 50 rows belong to nobody.
    let plans = FORWARD_PLANS.into_iter().map(Some).chain([None]).flat_map(|plan| SMS.map(|num_sms| (plan, num_sms)));
    let sizes = COUNTS.into_iter().flat_map(|counts| [(counts, 400, 50), (counts, 416, 50), (counts, 416, 0)]);
    for ((counts, n, more), (plan, num_sms)) in sizes.flat_map(|size| plans.clone().map(move |plan| (size, plan))) {
        let rows: i64 = counts.iter().sum::<i64>() + more;
        let a = quantise::rows(&random(gpu, &[rows, k], 0.2), ScaleRule::Amax);
        let (b, _) = quantise::weights(&random(gpu, &[counts.len() as i64, n, k], 0.2), ScaleRule::Amax);
        let forward = |out_fp32| {
            poison(gpu);
            let options = gemm_fp8::Options { out_fp32, plan, num_sms, ..Default::default() };
            gemm_grouped::forward(&a, &b, &counts_tensor(gpu, counts), options)
        };
        let (got, rounded) = (forward(true), forward(false));
        let mut from = 0;
        for (expert, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let part = Rows { values: a.values.narrow(0, from, count), scales: a.scales.narrow(1, from, count) };
            let block = fp8::Blocks { values: b.values.get(expert as i64), scales: b.scales.get(expert as i64) };
            let exact = part.dequantise(Kind::Double).matmul(&block.dequantise(Kind::Double).tr());
            let got = got.narrow(0, from, count);
            let error = relative_error(&got, &exact);
            assert!(error < 2e-4, "expert {expert} of {counts:?}: {error}");
            let rounded = rounded.narrow(0, from, count);
            assert!(same(&rounded, &got.to_kind(Kind::BFloat16)), "expert {expert} of {counts:?}, {n} columns: BF16");
            from += count;
        }
    }
}

#[test]
fn wgrad_accumulates_and_assigns() {
    let Some(gpu) = gpu("wgrad_accumulates_and_assigns") else {
        return;
    };
    let (m, n) = (208, 336);
    for counts in COUNTS {
        let both = |plan| [Write::Accumulate, Write::Assign].map(|write| (write, plan));
        let plans = WGRAD_PLANS.into_iter().map(Some).chain([None]).flat_map(both);
        let plans = plans.filter(|(write, plan)| plan.is_none_or(|plan| plan.takes(*write)));
        for ((write, plan), num_sms) in plans.flat_map(|plan| SMS.map(|num_sms| (plan, num_sms))) {
            let rows = counts.iter().sum::<i64>();
            let tensor = counts_tensor(gpu, counts);
            let q = |size, mean| quantise::columns(&random(gpu, &[rows, size], mean), Some(&tensor), ScaleRule::Amax);
            let (dy, x) = (q(m, 0.5), q(n, 0.5));
            let before = Tensor::randn([counts.len() as i64, m, n], (Kind::Float, gpu.device()));
            let mut gradient = if write == Write::Assign { before.full_like(f64::NAN) } else { before.copy() };
            let options = gemm_fp8::Options { plan, num_sms, ..Default::default() };
            // All at once, or the last ones first, and one of the first by itself.
            let (all, middle) = (counts.len() as i64, if num_sms.is_some() { counts.len() as i64 / 2 } else { 0 });
            gemm_grouped::wgrad(&dy, &x, (&tensor, middle..all), &mut gradient, write, options);
            if middle > 0 {
                let [now, then] = [&gradient, &before].map(|all| all.narrow(0, 0, middle));
                assert!(if write == Write::Assign { bool::try_from(now.isnan().all()).unwrap() } else { same(&now, &then) }, "{counts:?}: others' were touched");
                for experts in [0..1, 1..middle].into_iter().filter(|experts| !experts.is_empty()) {
                    gemm_grouped::wgrad(&dy, &x, (&tensor, experts), &mut gradient, write, options);
                }
            }
            let (a, b) = (dy.dequantise(Kind::Double), x.dequantise(Kind::Double));
            let mut from = 0;
            for (expert, &count) in counts.iter().enumerate() {
                let width = fp8::round_up(count, TILE);
                let exact = a.narrow(1, from, width).matmul(&b.narrow(1, from, width).tr());
                let start = before.get(expert as i64).to_kind(Kind::Double);
                let exact = if write == Write::Assign { exact } else { exact + start };
                let error = relative_error(&gradient.get(expert as i64), &exact);
                assert!(error < 2e-4, "{write:?} of expert {expert} of {counts:?}: {error}");
                from += width;
            }
        }
    }
}

#[test]
fn wgrad_of_one_group_matches_the_cpu() {
    let Some(gpu) = gpu("wgrad_of_one_group_matches_the_cpu") else {
        return;
    };
    for (rows, m, n) in [(1, 16, 16), (333, 144, 272), (4096, 512, 512)] {
        let (dy, x) = (random(gpu, &[rows, m], 0.0), random(gpu, &[rows, n], 0.0));
        let quantised = |x: &Tensor| quantise::columns(x, None, ScaleRule::Amax);
        let mut got = Tensor::full([m, n], f64::NAN, (Kind::Float, gpu.device()));
        gemm_fp8::wgrad(&quantised(&dy), &quantised(&x), rows, &mut got, Write::Assign, Default::default());
        let mut want = Tensor::full([m, n], f64::NAN, (Kind::Float, Device::Cpu));
        let (dy, x) = (dy.to_device(Device::Cpu), x.to_device(Device::Cpu));
        gemm_fp8::wgrad(&quantised(&dy), &quantised(&x), rows, &mut want, Write::Assign, Default::default());
        let error = relative_error(&got.to_device(Device::Cpu), &want);
        assert!(error < 2e-4, "{rows} rows, {m}x{n}: {error}");
    }
}
