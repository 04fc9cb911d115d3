//! The CPU's FP8 numerics against f64.
use kernels::fp8::{self, ScaleRule, TILE};
use kernels::ops::gemm_fp8::Write;
use kernels::ops::{gemm_grouped, quantise};
use tch::{Device, Kind, Tensor};

fn random(seed: i64, size: [i64; 2], mean: f64) -> Tensor {
    // A hash of the index: fresh numbers without torch's process-wide generator.
    let n = size[0] * size[1];
    let u = |salt: i64| {
        let i = Tensor::arange(n, (Kind::Double, Device::Cpu)) + (seed * 1_000_003 + salt * 77_777) as f64;
        ((i * 12.9898).sin() * 43_758.545_312_3).frac().abs().clamp_min(1e-9)
    };
    let normal = (u(1).log() * -2.0).sqrt() * (u(2) * std::f64::consts::TAU).cos();
    (normal + mean).view(size)
}

fn max_abs(t: &Tensor) -> f64 {
    t.abs().max().to_kind(Kind::Double).double_value(&[])
}

#[test]
fn quantised_values_are_within_half_a_step() {
    for rule in [ScaleRule::Amax, ScaleRule::PowerOfTwo] {
        for size in [[1, 16], [130, 192], [7, 1000]] {
            let x = random(1, size, 0.0).to_kind(Kind::Float);
            let exact = x.to_kind(Kind::Double);
            // E4M3 keeps 3 bits: half a step is 2^-4 of the value, or of the smallest normal number of the tile.
            let check = |back: Tensor, amax: f64| {
                let bound = exact.abs() / 16.0 + amax * 2.0 / 448.0 * 2f64.powi(-10);
                assert!(max_abs(&((back - &exact).abs() / bound)) <= 1.0);
            };
            let amax = max_abs(&x);
            check(fp8::quantise_rows(&x, rule).dequantise(Kind::Double), amax);
            check(fp8::quantise_blocks(&x, rule).dequantise(Kind::Double), amax);
            let columns = fp8::quantise_columns(&x, &[size[0]], rule).dequantise(Kind::Double);
            check(columns.narrow(1, 0, size[0]).tr(), amax);
        }
    }
}

#[test]
fn the_scale_is_amax_over_448_of_its_own_tile() {
    let x = random(2, [3, 300], 0.0).to_kind(Kind::Float);
    let rows = fp8::quantise_rows(&x, ScaleRule::Amax);
    assert_eq!(rows.scales.size(), [3, 4]);
    for (row, tile) in [(0, 0), (2, 1), (1, 2)] {
        let len = TILE.min(300 - tile * TILE);
        let want = max_abs(&x.get(row).narrow(0, tile * TILE, len)) / 448.0;
        let got = rows.scales.double_value(&[tile, row]);
        assert!((got - want).abs() < 1e-6 * want, "tile {tile} of row {row}: {got}, not {want}");
    }
    // The largest value of a tile uses the whole range, and a power-of-two scale lies in [s, 2s).
    assert_eq!(max_abs(&rows.values.to_kind(Kind::Float)), 448.0);
    let powers = fp8::quantise_rows(&x, ScaleRule::PowerOfTwo).scales;
    let ratio = powers.narrow(1, 0, 3) / rows.scales.narrow(1, 0, 3);
    assert!(ratio.min().double_value(&[]) >= 1.0 && ratio.max().double_value(&[]) < 2.0);
    assert_eq!(max_abs(&powers.narrow(1, 0, 3).log2().frac()), 0.0);
}

#[test]
fn zero_tiles_huge_and_tiny_values_stay_finite() {
    let x = Tensor::zeros([4, 256], (Kind::Float, Device::Cpu));
    let _ = x.get(1).fill_(1e38);
    let _ = x.get(2).fill_(1e-30);
    let rows = fp8::quantise_rows(&x, ScaleRule::Amax);
    let back = rows.dequantise(Kind::Double);
    assert_eq!(max_abs(&back.get(0)), 0.0);
    assert!((back.double_value(&[1, 0]) / 1e38 - 1.0).abs() < 1e-6);
    assert!(max_abs(&back.get(2)) < 1e-18);
    assert!(bool::try_from(rows.scales.isfinite().all()).unwrap());
    let not_a_number = fp8::quantise_rows(&(x.get(3).unsqueeze(0) * f64::INFINITY), ScaleRule::Amax);
    assert!(bool::try_from(not_a_number.dequantise(Kind::Double).isnan().all()).unwrap(), "a NaN must not be hidden");
}

#[test]
fn groups_start_on_whole_tiles_and_padding_is_zero() {
    let counts = [0, 5, 128, 0, 130];
    let x = random(3, [263, 20], 0.5).to_kind(Kind::Float);
    let columns = fp8::quantise_columns(&x, &counts, ScaleRule::Amax);
    assert_eq!(columns.values.size(), [20, fp8::padded_rows(263, 5)]);
    let back = columns.dequantise(Kind::Double);
    let (mut from, mut to) = (0, 0);
    for count in counts {
        let width = fp8::round_up(count, TILE);
        let error = fp8::relative_error(&back.narrow(1, to, count).tr(), &x.narrow(0, from, count));
        assert!(error < 0.04, "group of {count}: {error}");
        if width > count {
            assert_eq!(max_abs(&back.narrow(1, to + count, width - count)), 0.0);
        }
        (from, to) = (from + count, to + width);
    }
}

#[test]
fn e5m6_rounds_to_seven_bits() {
    let t = |v: &[f32]| fp8::round_e5m6(&Tensor::from_slice(v));
    let ulp = 2f32.powi(-6);
    let exact = [0.0, 1.0, -1.0 - ulp, 65024.0, 2f32.powi(-14), 2f32.powi(-20)];
    assert_eq!(Vec::<f32>::try_from(t(&exact)).unwrap(), exact);
    // Ties go to even; above the range it saturates; below the smallest step it is zero.
    let rounded = t(&[1.0 + 0.5 * ulp, 1.0 + 1.5 * ulp, 1e9, 2f32.powi(-22), 1.5 * 2f32.powi(-20), 2f32.powi(-15) * 1.001]);
    let want = [1.0, 1.0 + 2.0 * ulp, 65024.0, 0.0, 2f32.powi(-19), 2f32.powi(-15)];
    assert_eq!(Vec::<f32>::try_from(rounded).unwrap(), want);
    let x = random(4, [1, 4096], 0.0).to_kind(Kind::Float);
    let relative = (fp8::round_e5m6(&x) - &x) / x.abs().clamp_min(2f64.powi(-14));
    assert!(max_abs(&relative) <= 2f64.powi(-7));
}

#[test]
fn gemm_matches_the_product_of_its_operands() {
    for (m, n, k, mean) in [(5, 64, 128, 0.0), (130, 192, 1088, 0.5), (17, 200, 4096, 0.5)] {
        let a = fp8::quantise_rows(&random(5, [m, k], mean), ScaleRule::Amax);
        let b = fp8::quantise_blocks(&random(6, [n, k], mean), ScaleRule::Amax);
        let exact = a.dequantise(Kind::Double).matmul(&b.dequantise(Kind::Double).tr());
        let error = fp8::relative_error(&fp8::gemm(&a, &b), &exact);
        assert!(error < 2e-6, "{m}x{n}x{k}: {error}");
        // And quantising cost what E4M3 costs, so the scales sit where they belong.
        let unquantised = random(5, [m, k], mean).matmul(&random(6, [n, k], mean).tr());
        let cost = fp8::relative_error(&exact, &unquantised);
        assert!((1e-5..0.06).contains(&cost), "{m}x{n}x{k}: quantising cost {cost}");
    }
}

#[test]
fn wgrad_matches_the_product_of_its_operands() {
    let (t, m, n) = (300, 72, 130);
    let (dy, x) = (random(7, [t, m], 0.0), random(8, [t, n], 0.5));
    let quantise = |x: &Tensor| fp8::quantise_columns(x, &[t], ScaleRule::PowerOfTwo);
    let (a, b) = (quantise(&dy), quantise(&x));
    let exact = a.dequantise(Kind::Double).matmul(&b.dequantise(Kind::Double).tr());
    assert!(fp8::relative_error(&fp8::gemm_wgrad(&a, &b, 0, 3), &exact) < 2e-6);
    let cost = fp8::relative_error(&exact, &dy.tr().matmul(&x));
    assert!((1e-4..0.06).contains(&cost), "quantising cost {cost}");
}

#[test]
fn experts_are_separate_gemms() {
    let (k, n, counts) = (192, 80, [0i64, 130, 1, 0, 40]);
    let rows: i64 = counts.iter().sum();
    let (x, dy) = (random(9, [rows, k], 0.2), random(10, [rows, n], 0.0));
    let w = random(11, [5 * n, k], 0.0).view([5, n, k]);
    let on_device = Tensor::from_slice(&counts).to_kind(Kind::Int);
    let (weights, transposed) = quantise::weights(&w, ScaleRule::Amax);
    let y = gemm_grouped::forward(&quantise::rows(&x, ScaleRule::Amax), &weights, &on_device, Default::default());
    let dx = gemm_grouped::forward(&quantise::rows(&dy, ScaleRule::Amax), &transposed, &on_device, Default::default());
    let mut gradient = Tensor::ones([5, n, k], (Kind::Float, Device::Cpu));
    let columns = |t: &Tensor| quantise::columns(t, Some(&on_device), ScaleRule::Amax);
    let mut wgrad = |experts| gemm_grouped::wgrad(&columns(&dy), &columns(&x), (&on_device, experts), &mut gradient, Write::Accumulate, Default::default());
    wgrad(2..5);
    wgrad(0..2);
    let mut from = 0;
    for (expert, count) in counts.into_iter().enumerate() {
        let (expert, part) = (expert as i64, |t: &Tensor| t.narrow(0, from, count));
        let close = |got: Tensor, want: Tensor| {
            let error = fp8::relative_error(&got, &want);
            assert!(error < 0.06, "expert {expert} with {count} rows: {error}");
        };
        close(part(&y), part(&x).matmul(&w.get(expert).tr()));
        close(part(&dx), part(&dy).matmul(&w.get(expert)));
        close(gradient.get(expert) - 1.0, part(&dy).tr().matmul(&part(&x)));
        from += count;
    }
}
