//! The fused passes against their CPU references. Without a GPU each test says that it was skipped.
//!
//! Where a pass takes an exponential or a long sum, GPU and CPU differ in the last bits of FP32, and a value beside a
//! rounding boundary of BF16 or E4M3 goes to the other side: a few values may differ by one step, no more.
use kernels::device::Gpu;
use kernels::fp8::{Columns, Rows, ScaleRule, TILE, relative_error, round_up};
use kernels::ops::adamw::{AdamW, Fp8, Outputs, State, Step};
use kernels::ops::quantise::{self, Want};
use kernels::ops::mla_heads::{self, Widths};
use kernels::ops::rope::RopeTable;
use kernels::ops::gradient_norm::Parts;
use kernels::ops::{checksum, cross_entropy, gradient_norm, rms_norm, swiglu, unpermute};
use support::{counts_tensor, gpu, poison, random, same};
use tch::{Device, Kind, Tensor};

mod support;

const RULES: [ScaleRule; 2] = [ScaleRule::Amax, ScaleRule::PowerOfTwo];

fn cpu(x: &Tensor) -> Tensor {
    x.to_device(Device::Cpu)
}

/// Values [A, B] and scales [tiles, ≥ A] of which `real` are used.
fn assert_close(what: &str, [got, got_scales]: [&Tensor; 2], [want, want_scales]: [&Tensor; 2], real: i64) {
    assert_eq!(got.size(), want.size(), "{what}");
    let scales = [got_scales, want_scales].map(|scales| cpu(scales).narrow(1, 0, real));
    // A largest value that is rounded otherwise may double a scale that is a power of two, and so halve what belongs to it: what they
    // stand for is the same.
    let apart = (&scales[0] / &scales[1]).log2().abs();
    let doubled = apart.gt(0.01).to_kind(Kind::Double).sum(Kind::Double).double_value(&[]);
    assert!(apart.numel() == 0 || apart.max().double_value(&[]) < 1.01 && doubled <= 1.0 + 2e-3 * apart.numel() as f64, "{what}: scales");
    let (got, want) = (cpu(got).narrow(0, 0, real), want.narrow(0, 0, real));
    let (got, want) = (got.to_kind(Kind::Float), want.to_kind(Kind::Float));
    let differ = got.ne_tensor(&want).to_kind(Kind::Double);
    let share = if differ.numel() == 0 { 0.0 } else { differ.mean(Kind::Double).double_value(&[]) };
    let whole = |values: &Tensor, scales: &Tensor| values * scales.tr().repeat_interleave_self_int(TILE, 1, None).narrow(1, 0, values.size()[1]);
    let error = relative_error(&whole(&got, &scales[0]), &whole(&want, &scales[1]));
    assert!(share < 5e-3 && error < 4e-3, "{what}: {share} of the values differ, error {error}");
}

fn assert_rows(what: &str, got: &Option<Rows>, want: &Option<Rows>, real: i64) {
    match (got, want) {
        (Some(got), Some(want)) => assert_close(what, [&got.values, &got.scales], [&want.values, &want.scales], real),
        (None, None) => {}
        _ => panic!("{what}: only one side wrote rows"),
    }
}

/// The tiles of experts that have rows: the rest of the room is nobody's.
fn assert_columns(what: &str, got: &Option<Columns>, want: &Option<Columns>, counts: &[i64]) {
    let (Some(got), Some(want)) = (got, want) else {
        return assert!(got.is_none() && want.is_none(), "{what}: only one side wrote columns");
    };
    assert_eq!(got.values.size(), want.values.size(), "{what}: room");
    let tiles = counts.iter().map(|count| (count + TILE - 1) / TILE).sum::<i64>();
    let owned = |columns: &Columns| (columns.values.narrow(1, 0, tiles * TILE), columns.scales.narrow(0, 0, tiles));
    let ((got, got_scales), (want, want_scales)) = (owned(got), owned(want));
    assert_close(what, [&got, &got_scales], [&want, &want_scales], want.size()[0]);
}

fn random_order(gpu: &Gpu, rows: i64, of: i64) -> Tensor {
    Tensor::randint_low(-1, of, [rows], (Kind::Int, gpu.device()))
}

#[test]
fn rows_in_fp8_are_transposed_as_on_the_cpu() {
    let Some(gpu) = gpu("rows_in_fp8_are_transposed_as_on_the_cpu") else {
        return;
    };
    for (d, counts) in [(16, vec![1i64]), (272, vec![0, 200, 3, 129, 0]), (1024, vec![0, 0]), (384, vec![300])] {
        let rows = counts.iter().sum::<i64>();
        let (sizes, counts) = (counts.clone(), counts_tensor(gpu, &counts));
        let x = quantise::rows(&random(gpu, &[rows, d], 0.2), ScaleRule::PowerOfTwo);
        let on_cpu = Rows { values: cpu(&x.values), scales: cpu(&x.scales) };
        poison(gpu);
        let got = quantise::columns_of(&x, None, Some(&counts), ScaleRule::PowerOfTwo);
        let want = quantise::columns_of(&on_cpu, None, Some(&cpu(&counts)), ScaleRule::PowerOfTwo);
        assert_columns(&format!("{rows}x{d}"), &Some(got), &Some(want), &sizes);
        // Half of the rows, each read by several.
        let Some(half) = Some((rows + 1) / 2).filter(|&half| half > 0) else { continue };
        let source = (Tensor::arange(rows, (Kind::Int, gpu.device())) * 5 + 3).remainder(half).to_kind(Kind::Int);
        let few = Rows { values: x.values.narrow(0, 0, half), scales: x.scales.narrow(1, 0, round_up(half, 4)).contiguous() };
        let on_cpu = Rows { values: cpu(&few.values), scales: cpu(&few.scales) };
        let got = quantise::columns_of(&few, Some(&source), Some(&counts), ScaleRule::PowerOfTwo);
        let want = quantise::columns_of(&on_cpu, Some(&cpu(&source)), Some(&cpu(&counts)), ScaleRule::PowerOfTwo);
        assert_columns(&format!("{rows}x{d}, gathered"), &Some(got), &Some(want), &sizes);
    }
}

#[test]
fn rows_whose_scales_fp16_has_no_room_for_are_transposed_too() {
    let Some(gpu) = gpu("rows_whose_scales_fp16_has_no_room_for_are_transposed_too") else {
        return;
    };
    let (d, sizes) = (272, [200, 3, 129]);
    let (rows, counts) = (sizes.iter().sum::<i64>(), counts_tensor(gpu, &sizes));
    let powers = |count: i64, exponent: f64, of: i64| (Tensor::arange(count, (Kind::Float, gpu.device())).remainder(of) * exponent).exp2();
    let apart = |row: f64, column: f64| random(gpu, &[rows, d], 0.2) * powers(rows, row, 3).view([-1, 1]) * powers(d, column, 2);
    let some_zeros = powers(rows, 1.0, 3).view([-1, 1]) - 1.0;
    for (what, x, rule) in [
        ("near", apart(-5.0, 0.0), ScaleRule::PowerOfTwo),
        ("rows apart", apart(-8.0, 0.0), ScaleRule::PowerOfTwo),
        ("columns apart", apart(0.0, -12.0), ScaleRule::PowerOfTwo),
        ("columns out of reach", apart(0.0, -30.0), ScaleRule::PowerOfTwo),
        ("no powers", apart(0.0, 0.0), ScaleRule::Amax),
        ("zeros", random(gpu, &[rows, d], 0.2) * some_zeros, ScaleRule::PowerOfTwo),
    ] {
        let x = quantise::rows(&x.to_kind(Kind::BFloat16), rule);
        let on_cpu = Rows { values: cpu(&x.values), scales: cpu(&x.scales) };
        poison(gpu);
        let got = quantise::columns_of(&x, None, Some(&counts), ScaleRule::PowerOfTwo);
        let want = quantise::columns_of(&on_cpu, None, Some(&cpu(&counts)), ScaleRule::PowerOfTwo);
        let tiles = sizes.iter().map(|count| (count + TILE - 1) / TILE).sum::<i64>();
        let of = |columns: &Columns| [columns.values.view_dtype(Kind::Uint8).narrow(1, 0, tiles * TILE), columns.scales.narrow(0, 0, tiles).narrow(1, 0, d)].map(|part| cpu(&part));
        for (part, (got, want)) in ["values", "scales"].iter().zip(of(&got).iter().zip(of(&want))) {
            assert!(got.equal(&want), "{what}: other {part}");
        }
    }
}

#[test]
fn e5m6_is_the_cpus() {
    let Some(gpu) = gpu("e5m6_is_the_cpus") else {
        return;
    };
    for scale in [1.0, 1e-5, 3e4] {
        let x = (random(gpu, &[64, 40], 0.0).to_kind(Kind::Float) * scale).to_kind(Kind::BFloat16);
        poison(gpu);
        assert!(same(&quantise::round_e5m6(&x), &quantise::round_e5m6(&cpu(&x))), "{scale}");
    }
}

#[test]
fn heads_of_latent_attention_are_the_cpus() {
    let Some(gpu) = gpu("heads_of_latent_attention_are_the_cpus") else {
        return;
    };
    for (b, s, w) in [
        (1, 5, Widths { heads: 3, nope: 8, rotary: 8, value: 16 }),
        (2, 77, Widths { heads: 16, nope: 128, rotary: 64, value: 128 }),
        (3, 64, Widths { heads: 4, nope: 48, rotary: 16, value: 48 }),
    ] {
        let table = |device| RopeTable::new(s + 3, w.rotary, 10000.0, None, (Kind::Float, device));
        let (on_gpu, on_cpu) = (table(gpu.device()), table(Device::Cpu));
        let close = |what: &str, got: &Tensor, want: &Tensor| {
            let error = relative_error(&cpu(got), want);
            assert!(error < 2e-3, "{what} of {b}x{s} {w:?}: {error}");
        };
        let q = random(gpu, &[b * s, w.heads * (w.nope + w.rotary)], 0.1);
        let kv = random(gpu, &[b * s, w.heads * (w.nope + w.value)], 0.1);
        let key = random(gpu, &[b * s, w.rotary], 0.1);
        let want = mla_heads::queries(cpu(&q), b, &on_cpu, w);
        poison(gpu);
        close("q", &mla_heads::queries(q.copy(), b, &on_gpu, w), &want);
        let (want_k, want_v) = mla_heads::keys_and_values(&cpu(&kv), &cpu(&key), b, &on_cpu, w);
        let (k, v) = mla_heads::keys_and_values(&kv, &key, b, &on_gpu, w);
        close("k", &k, &want_k);
        assert!(same(&v.contiguous(), &want_v), "v");
        let (dq, dk, dv) = (random(gpu, &want.size(), 0.1), random(gpu, &want_k.size(), 0.1), random(gpu, &want_v.size(), 0.1));
        let want = mla_heads::queries_backward(cpu(&dq), &on_cpu, w);
        close("dq", &mla_heads::queries_backward(dq, &on_gpu, w), &want);
        let (want_dkv, want_dkey) = mla_heads::keys_and_values_backward(&cpu(&dk), &cpu(&dv), &on_cpu, w);
        let (dkv, dkey) = mla_heads::keys_and_values_backward(&dk, &dv, &on_gpu, w);
        assert!(same(&dkv, &want_dkv), "dkv");
        close("d(rotary key)", &dkey, &want_dkey);
    }
}

#[test]
fn rms_norm_is_the_cpus() {
    let Some(gpu) = gpu("rms_norm_is_the_cpus") else {
        return;
    };
    for (t, d, want) in [
        (1, 16, Want::BOTH),
        (130, 208, Want::ROWS),
        (517, 7168, Want::BOTH),
        (4096, 1536, Want::COLUMNS),
        (3, 16384, Want::BOTH),
        (45, 16384, Want::ROWS),
        (45, 1600, Want::ROWS), // half a tile at the end
        (33, 2832, Want::ROWS), // 16 columns of one
        (1030, 1536, Want::ROWS),
        (300, 5120, Want::BOTH), // a row of three warps
    ] {
        for rule in RULES {
            let (x, weight) = (random(gpu, &[t, d], 0.3) * 2.0, random(gpu, &[d], 1.0));
            let make = rms_norm::Make { want, bf16: want == Want::BOTH, rule };
            poison(gpu);
            let (sum, rstd) = rms_norm::add(&x, &x, 1e-6);
            let (cpu_sum, _) = rms_norm::add(&cpu(&x), &cpu(&x), 1e-6);
            let what = format!("{t}x{d} {want:?} {rule:?}");
            assert!(same(&sum, &cpu_sum), "{what}: sum");
            // In f64: over a wide row the CPU's own FP32 sum is off by as much as is asked for.
            let exact = |x: &Tensor| (x.to_kind(Kind::Double).square().mean_dim(&[-1i64][..], true, None) + 1e-6).rsqrt();
            assert!(relative_error(&cpu(&rstd), &exact(&cpu_sum)) < 1e-6, "{what}: rstd of the sum");
            poison(gpu);
            let (y, rstd) = rms_norm::forward(&x, &weight, 1e-6);
            let (cpu_y, cpu_rstd) = rms_norm::forward(&cpu(&x), &cpu(&weight), 1e-6);
            // Three roundings to BF16 in all, which of few elements may all go the same way.
            assert!(relative_error(&cpu(&y), &cpu_y) < 3.0 * 2f64.powi(-8), "{what}: forward");
            poison(gpu);
            assert!(same(&y, &rms_norm::normed(&x, &rstd, &weight)), "{what}: made again for backward");
            assert!(relative_error(&cpu(&rstd), &exact(&cpu(&x))) < 1e-6, "{what}: rstd");
            let (dy, residual) = (random(gpu, &[t, d], 0.1), random(gpu, &[t, d], 0.0));
            for add in [None, Some(&residual)] {
                poison(gpu);
                let (dx, dweight) = rms_norm::backward_add(&dy, &x, &rstd, &weight, add);
                let wide = |x: &Tensor| cpu(x).to_kind(Kind::Double);
                let wide_add = add.map(wide);
                let (dy, x, rstd, weight) = (wide(&dy), wide(&x), wide(&rstd), wide(&weight));
                let (want_dx, want_dweight) = rms_norm::backward_add(&dy, &x, &rstd, &weight, wide_add.as_ref());
                assert!(relative_error(&cpu(&dx), &want_dx) < 3e-3, "{what}: dx");
                assert!(relative_error(&cpu(&dweight), &want_dweight) < 1e-5, "{what}: dweight");
            }
            let wanted = rms_norm::quantised(&cpu(&x), &cpu_rstd, &cpu(&weight), make);
            let check = |what: &str, got: rms_norm::Normed| {
                assert_rows(what, &got.quantised.rows, &wanted.quantised.rows, t);
                assert_columns(what, &got.quantised.columns, &wanted.quantised.columns, &[t]);
                if let (Some(got), Some(wanted)) = (&got.y, &wanted.y) {
                    assert!(relative_error(&cpu(got), wanted) < 1e-3, "{what}: bf16");
                }
            };
            poison(gpu);
            check(&what, rms_norm::quantised(&x, &rstd, &weight, make));
            poison(gpu);
            let (got, own) = rms_norm::forward_quantised(&x, &weight, 1e-6, make);
            assert!(same(&own, &rstd), "{what}: the order of the sum is fixed");
            check(&format!("{what}, by its own statistics"), got);
        }
    }
}

#[test]
fn swiglu_is_the_cpus() {
    let Some(gpu) = gpu("swiglu_is_the_cpus") else {
        return;
    };
    for (i, counts, weighted, save) in [
        (128, vec![5i64], false, true),
        (256, vec![0, 300, 1, 128, 0], true, true),
        (512, vec![700], false, false),
        (384, vec![0, 0], true, true),
        (192, vec![130], false, true),
    ] {
        let r = counts.iter().sum::<i64>();
        let (sizes, counts) = (counts.clone(), counts_tensor(gpu, &counts));
        let gate_up = random(gpu, &[r, 2 * i], 0.0) * 2.0;
        let weight = weighted.then(|| Tensor::rand([r], (Kind::Float, gpu.device())));
        let cpu_weight = weight.as_ref().map(cpu);
        for rule in RULES {
            let make = swiglu::Make { want: Want::BOTH, save, rule };
            let what = format!("{r} rows of {i}, {rule:?}");
            poison(gpu);
            let got = swiglu::quantised(&gate_up, weight.as_ref(), Some(&counts), make);
            let want = swiglu::quantised(&cpu(&gate_up), cpu_weight.as_ref(), Some(&cpu(&counts)), make);
            assert_rows(&what, &got.act.rows, &want.act.rows, r);
            assert_columns(&what, &got.act.columns, &want.act.columns, &sizes);
            let dact = random(gpu, &[r, i], 0.1);
            let (saved, want_saved) = match (got.saved, want.saved) {
                (Some(swiglu::GateUp::Fp8(got)), Some(swiglu::GateUp::Fp8(want))) => {
                    for (got, want) in got.iter().zip(&want) {
                        assert!(same(&got.values, &want.values), "{what}: saved");
                    }
                    (swiglu::GateUp::Fp8(got), swiglu::GateUp::Fp8(want))
                }
                _ => (swiglu::GateUp::Bf16(gate_up.shallow_clone()), swiglu::GateUp::Bf16(cpu(&gate_up))),
            };
            poison(gpu);
            let got = swiglu::backward_quantised(&dact, &saved, weight.as_ref(), Some(&counts), make);
            let want =
                swiglu::backward_quantised(&cpu(&dact), &want_saved, cpu_weight.as_ref(), Some(&cpu(&counts)), make);
            assert_rows(&format!("backward {what}"), &got.dgate_up.rows, &want.dgate_up.rows, r);
            assert_columns(&format!("backward {what}"), &got.dgate_up.columns, &want.dgate_up.columns, &sizes);
            assert_columns(&format!("activation {what}"), &got.act, &want.act, &sizes);
            if let (Some(got), Some(want)) = (got.drow_weight, want.drow_weight) {
                assert!(relative_error(&cpu(&got), &want) < 1e-4, "{what}: d(row weight)");
            }
        }
    }
}

#[test]
fn unpermuted_rows_are_summed() {
    let Some(gpu) = gpu("unpermuted_rows_are_summed") else {
        return;
    };
    for (t, k, d, rows) in [(1, 1, 8, 1), (77, 8, 1032, 300), (33, 6, 7168, 5)] {
        let (x, add, more) = (random(gpu, &[rows, d], 0.1), random(gpu, &[t, d], 0.0), random(gpu, &[t, d], 1.0));
        let index = random_order(gpu, t * k, rows).view([t, k]);
        for add in [&[][..], &[&add], &[&add, &more]] {
            poison(gpu);
            let got = unpermute::forward(&x, &index, add);
            let cpu_add = add.iter().map(|add| cpu(add)).collect::<Vec<_>>();
            let want = unpermute::forward(&cpu(&x), &cpu(&index), &cpu_add.iter().collect::<Vec<_>>());
            assert!(relative_error(&cpu(&got), &want) < 1e-3, "{t}x{k}x{d}");
        }
    }
}

#[test]
fn cross_entropy_is_the_cpus() {
    let Some(gpu) = gpu("cross_entropy_is_the_cpus") else {
        return;
    };
    for (t, v) in [(1, 8), (5, 1000), (3, 129280), (0, 64)] {
        let logits = random(gpu, &[t, v], 0.0) * 5.0;
        let targets = Tensor::randint_low(0, v, [t], (Kind::Int64, gpu.device()));
        let mut dlogits = Tensor::full([t, v], f64::NAN, (Kind::BFloat16, gpu.device()));
        let loss = cross_entropy::forward(logits.shallow_clone(), &targets, &mut dlogits);
        let exact = cpu(&logits).to_kind(Kind::Double);
        let mut want = exact.zeros_like();
        let exact_loss = cross_entropy::forward(exact, &cpu(&targets), &mut want);
        assert!(relative_error(&cpu(&loss), &exact_loss) < 1e-5, "{t}x{v}: loss");
        assert!(relative_error(&cpu(&dlogits), &want) < 3e-3, "{t}x{v}: gradient");
        let mut in_place = logits.shallow_clone();
        let again = cross_entropy::forward(logits, &targets, &mut in_place);
        assert!(same(&again, &loss) && same(&in_place, &dlogits), "{t}x{v}: in place");
    }
}

#[test]
fn a_checksum_is_the_cpus_and_sees_a_flipped_bit() {
    let Some(gpu) = gpu("a_checksum_is_the_cpus_and_sees_a_flipped_bit") else {
        return;
    };
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double, Kind::Int64] {
        let tensors: Vec<Tensor> =
            [1, 3, 7, 4096, 1_000_003].iter().map(|&n| (Tensor::randn([n], (Kind::Float, gpu.device())) * 1e6).to_kind(kind)).collect();
        let on_cpu: Vec<Tensor> = tensors.iter().map(cpu).collect();
        let sums = checksum::checksums(&tensors);
        assert!(same(&cpu(&sums), &checksum::checksums(&on_cpu)), "{kind:?}");
        assert!(same(&sums, &checksum::checksums(&tensors)), "{kind:?}: again");
        tensors.iter().for_each(|tensor| drop(tensor.narrow(0, tensor.size()[0] - 1, 1).g_mul_scalar_(-1)));
        let differ = sums.ne_tensor(&checksum::checksums(&tensors)).sum(Kind::Int64).int64_value(&[]);
        assert_eq!(differ, tensors.len() as i64, "{kind:?}: the last element's sign");
    }
}

#[test]
fn the_gradient_norm_is_exact_and_repeats() {
    let Some(gpu) = gpu("the_gradient_norm_is_exact_and_repeats") else {
        return;
    };
    let gradients = [1, 3, 4096, 1_000_003].map(|n| Tensor::randn([n], (Kind::Float, gpu.device())) + 0.1);
    let all: Vec<&Tensor> = gradients.iter().collect();
    let on_cpu = gradients.each_ref().map(cpu);
    let want = gradient_norm::sum_of_squares(&on_cpu.iter().collect::<Vec<_>>());
    let got = gradient_norm::sum_of_squares(&all);
    assert!(relative_error(&cpu(&got), &want) < 1e-6);
    assert!(same(&got, &gradient_norm::sum_of_squares(&all)), "one order of the sum");
}

#[test]
fn what_ranks_made_of_a_gradient_is_added_up_in_their_order() {
    let Some(gpu) = gpu("what_ranks_made_of_a_gradient_is_added_up_in_their_order") else {
        return;
    };
    for (rank, ranks) in [(0, 2), (1, 2), (0, 3), (2, 4), (3, 4), (7, 8), (4, 11)] {
        // A later row of 1_000_003 does not start at 16 bytes.
        for n in [1, 3, 4096, 1_000_003] {
            let made = Tensor::randn([ranks, n], (Kind::Float, gpu.device()));
            poison(gpu);
            let room = |shape: &[i64]| Ok::<_, std::convert::Infallible>(Tensor::empty(shape, (Kind::Float, gpu.device())));
            let Ok(parts) = Parts::of(made.get(rank), (rank as usize, ranks as usize), room);
            for (other, peer) in (0..ranks).filter(|&peer| peer != rank).enumerate() {
                parts.place(other).copy_(&made.get(peer));
            }
            let want = (1..ranks).fold(made.get(0), |sum, peer| sum + made.get(peer));
            let mut squares = gradient_norm::Squares::default();
            let sum = squares.add_and_take(parts);
            let what = format!("{n} of rank {rank} of {ranks}");
            assert!(same(&sum, &want), "{what}");
            assert!(relative_error(&cpu(&squares.total()), &gradient_norm::sum_of_squares(&[&cpu(&sum)])) < 1e-6, "{what}");
        }
    }
}

#[test]
fn adamw_is_the_cpus() {
    let Some(gpu) = gpu("adamw_is_the_cpus") else {
        return;
    };
    let rule = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
    for (size, fp8) in [(vec![7i64], false), (vec![100_001], false), (vec![144, 272], true), (vec![3, 256, 144], true)]
    {
        let options = (Kind::Float, gpu.device());
        let mut master = Tensor::randn(&size, options);
        let moment = || Tensor::zeros(&size, (Kind::BFloat16, gpu.device()));
        let (mut first, mut second) = (moment(), moment());
        let (mut cpu_master, mut cpu_first, mut cpu_second) = (cpu(&master), cpu(&first), cpu(&second));
        for (step, clip) in [(1, 0.5), (2, 1.0), (3, f64::NAN)] {
            let gradient = Tensor::randn(&size, options);
            let at = Step { lr: 0.01, step, clip: 1.0, decay: step == 1 };
            let matrix = if fp8 { size.clone() } else { vec![16, 16] };
            let (got, want) = [gpu.device(), Device::Cpu]
                .map(|device| {
                    (quantise::empty_weights(&matrix, device), Tensor::full(&size, 9.0, (Kind::BFloat16, device)))
                })
                .into();
            for (device, blocks, weight, state) in [
                (gpu.device(), &got.0, &got.1, State { master: &mut master, first: &mut first, second: &mut second }),
                (
                    Device::Cpu,
                    &want.0,
                    &want.1,
                    State { master: &mut cpu_master, first: &mut cpu_first, second: &mut cpu_second },
                ),
            ] {
                let fp8 = fp8.then_some(Fp8 { plain: &blocks.0, transposed: &blocks.1, rule: ScaleRule::Amax });
                let clip = Tensor::full([1], clip, (Kind::Float, device));
                let outputs = Outputs { weight: Some(weight), fp8 };
                rule.update_fused(state, &gradient.to_device(device), &clip, outputs, at);
            }
            assert!(relative_error(&cpu(&master), &cpu_master) < 1e-6, "{size:?} step {step}: master");
            assert!(relative_error(&cpu(&first), &cpu_first) < 1e-3, "{size:?} step {step}: first moment");
            assert!(relative_error(&cpu(&second), &cpu_second) < 1e-3, "{size:?} step {step}: second moment");
            assert!(relative_error(&cpu(&got.1), &want.1) < 1e-3, "{size:?} step {step}: weight");
            if fp8 && clip.is_finite() {
                for (got, want) in [(&got.0.0, &want.0.0), (&got.0.1, &want.0.1)] {
                    let dequantised = |blocks: &kernels::fp8::Blocks, matrix: i64| {
                        let of = |t: &Tensor| {
                            if t.dim() == 3 { t.get(matrix) } else { t.shallow_clone() }
                        };
                        kernels::fp8::Blocks { values: of(&cpu(&blocks.values)), scales: of(&cpu(&blocks.scales)) }
                            .dequantise(Kind::Float)
                    };
                    for matrix in 0..if size.len() == 3 { size[0] } else { 1 } {
                        let error = relative_error(&dequantised(got, matrix), &dequantised(want, matrix));
                        assert!(error < 4e-3, "{size:?} step {step}: blocks {error}");
                    }
                }
            }
        }
    }
}
