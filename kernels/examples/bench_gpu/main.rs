//! FP8 GEMMs at V3's shapes beside cuBLASLt's block-scaled FP8 (through torch) in the same run; correctness first.
//!
//! `bench_gpu [forward] [wgrad] [grouped] [passes] [router] [attention] [sweep] [warm]`: which tables; `sweep` times every tile.
//! A GPU at its power limit has lower clocks, and may exceed the limit for a moment: each row of products is timed after a second
//! of rest, or `warm`, after a second of the same.
use kernels::device::{self, Found, Gpu};
use kernels::fp8::{ScaleRule, relative_error};
use kernels::ops::gemm_fp8::{self, FORWARD_PLANS, Options, Plan, WGRAD_PLANS, Write};
use kernels::ops::{gemm_grouped, quantise};
use std::thread;
use std::time::{Duration, Instant};
use tch::{Kind, Tensor};

mod attention;
mod passes;
mod router;

const M: i64 = 4096;
const SHAPES: [(i64, i64); 6] = [(2176, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)];
const GROUPED: [(i64, i64, i64, i64); 4] =
    [(4, 8192, 4096, 7168), (4, 8192, 7168, 2048), (8, 4096, 4096, 7168), (32, 1024, 4096, 7168)];

struct Bench {
    gpu: &'static Gpu,
    /// 1 GiB, larger than the L2 cache: read before each call, so that no operand is found there and nothing waits to be
    /// written back.
    large: Tensor,
    sweep: bool,
    warm: bool,
}

impl Bench {
    /// Median milliseconds of one call of each, taken in turns: clocks and heat are the same for all.
    fn race(&self, works: &[&dyn Fn()]) -> Vec<f64> {
        let turn = || -> Vec<f32> {
            let one = |work: &&dyn Fn()| {
                let _ = self.large.narrow(0, 0, 1 << 26).sum(Kind::Float);
                self.gpu.time_ms(work).expect("the device works")
            };
            works.iter().map(one).collect()
        };
        let begin = Instant::now();
        thread::sleep(Duration::from_secs(u64::from(!self.warm)));
        while begin.elapsed() < Duration::from_secs(1) {
            turn();
        }
        let turns: Vec<Vec<f32>> = (0..17).map(|_| turn()).skip(2).collect();
        let median = |of: usize| {
            let mut times: Vec<f32> = turns.iter().map(|turn| turn[of]).collect();
            times.sort_by(f32::total_cmp);
            f64::from(times[times.len() / 2])
        };
        (0..works.len()).map(median).collect()
    }

    fn random(&self, size: &[i64]) -> Tensor {
        Tensor::randn(size, (Kind::BFloat16, self.gpu.device()))
    }

    /// The model's own choice, and with `sweep` every tile.
    fn candidates(&self, plans: &[Plan]) -> Vec<Option<Plan>> {
        let all = plans.iter().filter(|_| self.sweep).map(|&plan| Some(plan));
        [None].into_iter().chain(all).collect()
    }

    fn forward(&self) {
        println!("\nforward/dgrad, M {M}: TFLOP/s (tile width) | cuBLASLt | ratio | bf16 error / rounding");
        let mut ratios = Vec::new();
        for (n, k) in SHAPES {
            let a = quantise::rows(&self.random(&[M, k]), ScaleRule::Amax);
            let (b, _) = quantise::weights(&self.random(&[n, k]), ScaleRule::Amax);
            let exact = a.dequantise(Kind::Double).matmul(&b.dequantise(Kind::Double).tr());
            let rounding = relative_error(&exact.to_kind(Kind::BFloat16), &exact);
            let error = relative_error(&gemm_fp8::forward(&a, &b, Options::default()), &exact) / rounding;
            drop(exact);
            let tera = 2.0 * (M * n * k) as f64 / 1e9;
            let (bt, sa, sb) = (b.values.tr(), a.scales.tr(), b.scales.tr());
            let none = None::<&Tensor>;
            let rival = || drop(a.values.internal_scaled_mm(&bt, &sa, &sb, none, none, Kind::BFloat16, false));
            let plans: Vec<Option<Plan>> = self.candidates(&FORWARD_PLANS);
            let ours = |plan| drop(gemm_fp8::forward(&a, &b, Options { plan, ..Options::default() }));
            let tried: Vec<Box<dyn Fn()>> =
                plans.iter().map(|&plan| Box::new(move || ours(plan)) as Box<dyn Fn()>).collect();
            let all: Vec<&dyn Fn()> = tried.iter().map(|work| &**work).chain([&rival as &dyn Fn()]).collect();
            let speeds: Vec<f64> = self.race(&all).into_iter().map(|time| tera / time).collect();
            let rival = speeds[plans.len()];
            println!("{n:>6} x {k:<6} {:>6.0} | {rival:>6.0} | {:.3} | {error:.3}", speeds[0], speeds[0] / rival);
            show_candidates(&plans, &speeds, rival);
            ratios.push(speeds[0] / rival);
        }
        let mean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
        println!("geometric mean of the ratios {mean:.3}");
    }

    fn wgrad(&self) {
        println!("\nwgrad, {M} rows, FP32 +=: TFLOP/s | cuBLASLt, BF16 = | FP32 error");
        let mut all_speeds = Vec::new();
        for (n, k) in SHAPES {
            let dy = quantise::columns(&self.random(&[M, n]), None, ScaleRule::Amax);
            let x = quantise::columns(&self.random(&[M, k]), None, ScaleRule::Amax);
            let exact = dy.dequantise(Kind::Double).matmul(&x.dequantise(Kind::Double).tr());
            let mut gradient = Tensor::zeros([n, k], (Kind::Float, self.gpu.device()));
            gemm_fp8::wgrad(&dy, &x, M, &mut gradient, Write::Accumulate, Options::default());
            let error = relative_error(&gradient, &exact);
            drop(exact);
            let tera = 2.0 * (M * n * k) as f64 / 1e9;
            let plans = self.candidates(&WGRAD_PLANS);
            let ours = |plan, write| {
                let options = Options { plan, ..Options::default() };
                gemm_fp8::wgrad(&dy, &x, M, &mut gradient.shallow_clone(), write, options);
            };
            // The same product in BF16, without a gradient to add to.
            let (xt, sa) = (x.values.tr(), dy.scales.tr());
            let none = None::<&Tensor>;
            let rival = || dy.values.f_internal_scaled_mm(&xt, &sa, &x.scales, none, none, Kind::BFloat16, false);
            if let Err(why) = rival() {
                println!("cuBLASLt does not take it: {}", why.to_string().lines().next().unwrap_or_default());
            }
            let (assign, rival) = (|| ours(None, Write::Assign), || drop(rival()));
            let add = |plan| Box::new(move || ours(plan, Write::Accumulate)) as Box<dyn Fn()>;
            let tried: Vec<Box<dyn Fn()>> = plans.iter().map(|&plan| add(plan)).collect();
            let all: Vec<&dyn Fn()> = tried.iter().map(|work| &**work).chain([&assign as &dyn Fn(), &rival]).collect();
            let speeds: Vec<f64> = self.race(&all).into_iter().map(|time| tera / time).collect();
            let (assigned, rival) = (speeds[plans.len()], speeds[plans.len() + 1]);
            println!("{n:>6} x {k:<6} {:>6.0} (assigned {assigned:.0}) | {rival:.0} | {error:.2e}", speeds[0]);
            show_candidates(&plans, &speeds, rival);
            all_speeds.push(speeds[0]);
        }
        println!(
            "geometric mean {:.0}",
            (all_speeds.iter().map(|r| r.ln()).sum::<f64>() / all_speeds.len() as f64).exp()
        );
    }

    fn grouped(&self) {
        println!("\ngrouped, uniform and Zipf rows: TFLOP/s forward; wgrad (FP32 +=), and of its floor (FP32 =)");
        let copy = self.copy_bandwidth(i64::MAX);
        for (experts, rows_each, n, k) in GROUPED {
            let rows = experts * rows_each;
            let (x, dy) = (self.random(&[rows, k]), self.random(&[rows, n]));
            let a = quantise::rows(&x, ScaleRule::Amax);
            let (b, _) = quantise::weights(&self.random(&[experts, n, k]), ScaleRule::Amax);
            let gradient = Tensor::zeros([experts, n, k], (Kind::Float, self.gpu.device()));
            let harmonic: f64 = (1..=experts).map(|i| 1.0 / i as f64).sum();
            let zipf: Vec<i64> = (1..=experts).map(|i| (rows as f64 / harmonic / i as f64) as i64).collect();
            for (name, counts) in [("uniform", vec![rows_each; experts as usize]), ("Zipf", zipf)] {
                let tera = 2.0 * (counts.iter().sum::<i64>() * n * k) as f64 / 1e9;
                let floor_ms = counts.iter().map(|&count| floor_ms([count, n, k], copy)).sum::<f64>();
                let counts = self.counts(&counts);
                let (forward_plans, wgrad_plans) = (self.candidates(&FORWARD_PLANS), self.candidates(&WGRAD_PLANS));
                let forward = |plan| {
                    drop(gemm_grouped::forward(&a, &b, &counts, Options { plan, ..Options::default() }));
                };
                let by_column = |x: &Tensor| quantise::columns(x, Some(&counts), ScaleRule::Amax);
                let (qdy, qx) = (by_column(&dy), by_column(&x));
                let wgrad = |plan, write| {
                    let options = Options { plan, ..Options::default() };
                    gemm_grouped::wgrad(&qdy, &qx, (&counts, 0..experts), &mut gradient.shallow_clone(), write, options)
                };
                let forwards = self.race_all(&forward_plans, &forward);
                let wgrads = self.race_all(&wgrad_plans, &|plan| wgrad(plan, Write::Accumulate));
                let assigning: Vec<_> = wgrad_plans.iter().copied().filter(|plan| plan.is_none_or(|plan| plan.takes(Write::Assign))).collect();
                let assigns = self.race_all(&assigning, &|plan| wgrad(plan, Write::Assign));
                let [forwards, wgrads, assigns] =
                    [forwards, wgrads, assigns].map(|times| times.iter().map(|t| tera / t).collect::<Vec<_>>());
                let of_floor = wgrads[0] * floor_ms / tera;
                println!(
                    "{experts:>3} x {rows_each:<5} {n}x{k} {name:<8} {:.0}; {:.0}, {of_floor:.2} (assigned {:.0})",
                    forwards[0], wgrads[0], assigns[0]
                );
                show_candidates(&forward_plans, &forwards, forwards[0]);
                show_candidates(&wgrad_plans, &wgrads, wgrads[0]);
                show_candidates(&assigning, &assigns, assigns[0]);
            }
        }
    }

    fn race_all(&self, plans: &[Option<Plan>], work: &dyn Fn(Option<Plan>)) -> Vec<f64> {
        let works: Vec<_> = plans.iter().map(|&plan| move || work(plan)).collect();
        self.race(&works.iter().map(|work| work as &dyn Fn()).collect::<Vec<_>>())
    }

    fn counts(&self, counts: &[i64]) -> Tensor {
        Tensor::from_slice(counts).to_kind(Kind::Int).to_device(self.gpu.device())
    }
}

/// Least time of an expert's weight gradient: its products at 900 TFLOP/s, or its bytes at 85 % of the copy's speed (TB/s).
fn floor_ms([rows, n, k]: [i64; 3], copy: f64) -> f64 {
    let bytes = if rows > 0 { 8 * n * k + rows * (n + k) } else { 0 };
    (2.0 * (rows * n * k) as f64 / 900e9).max(bytes as f64 / (0.85e9 * copy))
}

fn show_candidates(plans: &[Option<Plan>], speeds: &[f64], rival: f64) {
    let mut sorted: Vec<_> = plans.iter().zip(speeds).filter_map(|(plan, speed)| Some(((*plan)?, speed))).collect();
    sorted.sort_by(|a, b| b.1.total_cmp(a.1));
    for (Plan { subtiles, width, along_m, reload }, speed) in sorted {
        let (shared, reload) = (if along_m { "b" } else { "a" }, if reload { "r" } else { "" });
        print!("  {}x{width}{shared}{reload}: {speed:.0} {:.2}", 128 * subtiles, speed / rival);
    }
    if plans.len() > 1 {
        println!();
    }
}

fn main() {
    let kernel_cache = std::env::temp_dir().join("tiefsee-bench-kernels");
    let options = device::Options { local_rank: 0, torch_cuda: None, nvrtc_folder: None, kernel_cache, spared_sms: 0 };
    let gpu = match device::open(&options).expect("a GPU that is there must be usable") {
        Found::Gpu(gpu) => gpu,
        Found::Cpu(why) => return println!("skipped: {why}"),
    };
    println!("{}, {} multiprocessors, {:?}", gpu.name(), gpu.num_sms(), gpu.memory().expect("the device works"));
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| wanted.iter().any(|w| w == name);
    let all = !["forward", "wgrad", "grouped", "passes", "router", "attention"].into_iter().any(has);
    let large = Tensor::rand([1 << 28], (Kind::Float, gpu.device()));
    let bench = Bench { gpu, large, sweep: has("sweep"), warm: has("warm") };
    println!("products timed after a second of {}", if bench.warm { "the same" } else { "rest" });
    let run = |name: &str, table: fn(&Bench)| {
        if all || has(name) {
            table(&bench);
        }
    };
    run("forward", Bench::forward);
    run("wgrad", Bench::wgrad);
    run("grouped", Bench::grouped);
    run("passes", Bench::passes);
    run("router", Bench::router);
    run("attention", Bench::attention);
}
