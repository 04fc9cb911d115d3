//! FP8 GEMMs at V3's shapes beside cuBLASLt's block-scaled FP8 (through torch) in the same run; correctness first.
//!
//! `bench_gpu [forward] [wgrad] [grouped] [passes] [sweep]`: which tables; `sweep` times every tile.
use kernels::device::{self, Found, Gpu};
use kernels::fp8::{ScaleRule, relative_error};
use kernels::ops::gemm_fp8::{self, FORWARD_PLANS, Options, Plan, WGRAD_PLANS, Write};
use kernels::ops::{gemm_grouped, quantise};
use tch::{Kind, Tensor};

mod passes;

const M: i64 = 4096;
const SHAPES: [(i64, i64); 6] = [(2176, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)];
const GROUPED: [(i64, i64, i64, i64); 4] =
    [(4, 8192, 4096, 7168), (4, 8192, 7168, 2048), (8, 4096, 4096, 7168), (32, 1024, 4096, 7168)];

struct Bench {
    gpu: &'static Gpu,
    /// Larger than the L2 cache: cleared before each call, so that no operand is found there.
    flush: Tensor,
    /// 1 GiB to read while the host runs ahead.
    large: Tensor,
    sweep: bool,
}

impl Bench {
    /// Median milliseconds of one call of each, taken in turns: clocks and heat are the same for all.
    fn race<const N: usize>(&self, works: [&dyn Fn(); N]) -> [f64; N] {
        let mut times = [const { Vec::new() }; N];
        for round in 0..23 {
            for (work, times) in works.iter().zip(&mut times) {
                let _ = self.flush.shallow_clone().zero_();
                let time = self.gpu.time_ms(work).expect("the device works");
                if round >= 2 {
                    times.push(time);
                }
            }
        }
        times.map(|mut times| {
            times.sort_by(f32::total_cmp);
            f64::from(times[times.len() / 2])
        })
    }

    fn time(&self, work: impl Fn()) -> f64 {
        self.race([&work])[0]
    }

    fn random(&self, size: &[i64]) -> Tensor {
        Tensor::randn(size, (Kind::BFloat16, self.gpu.device()))
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
            let [ours, rival] =
                self.race([&|| drop(gemm_fp8::forward(&a, &b, Options::default())), &rival]).map(|t| tera / t);
            println!("{n:>6} x {k:<6} {ours:>6.0} | {rival:>6.0} | {:.3} | {error:.3}", ours / rival);
            ratios.push(ours / rival);
            if self.sweep {
                let run = |plan: Plan, turns| {
                    let options = Options {
                        plan: Some(Plan { turns: turns && plan.warpgroups == 2, ..plan }),
                        ..Options::default()
                    };
                    drop(gemm_fp8::forward(&a, &b, options));
                };
                for plan in FORWARD_PLANS {
                    let [with, without] = self.race([&|| run(plan, true), &|| run(plan, false)]).map(|t| tera / t);
                    print!("  {}x{}x{}: {with:.0}/{without:.0}", plan.warpgroups, plan.subtiles, plan.width);
                }
                println!();
            }
        }
        let mean = (ratios.iter().map(|r| r.ln()).sum::<f64>() / ratios.len() as f64).exp();
        println!("geometric mean of the ratios {mean:.3}");
    }

    fn wgrad(&self) {
        println!("\nwgrad, {M} rows, FP32 +=: TFLOP/s | FP32 error");
        let mut all = Vec::new();
        for (n, k) in SHAPES {
            let dy = quantise::columns(&self.random(&[M, n]), None, ScaleRule::Amax);
            let x = quantise::columns(&self.random(&[M, k]), None, ScaleRule::Amax);
            let exact = dy.dequantise(Kind::Double).matmul(&x.dequantise(Kind::Double).tr());
            let mut gradient = Tensor::zeros([n, k], (Kind::Float, self.gpu.device()));
            gemm_fp8::wgrad(&dy, &x, M, &mut gradient, Write::Accumulate, Options::default());
            let error = relative_error(&gradient, &exact);
            drop(exact);
            let tera = 2.0 * (M * n * k) as f64 / 1e9;
            let run = |options, write| {
                tera / self.time(|| gemm_fp8::wgrad(&dy, &x, M, &mut gradient.shallow_clone(), write, options))
            };
            let (ours, assigned) = (run(Options::default(), Write::Accumulate), run(Options::default(), Write::Assign));
            println!("{n:>6} x {k:<6} {ours:>6.0} (assigned {assigned:.0}) | {error:.2e}");
            all.push(ours);
            for plan in WGRAD_PLANS.into_iter().filter(|_| self.sweep) {
                let of = |turns| {
                    run(
                        Options {
                            plan: Some(Plan { turns: turns && plan.warpgroups == 2, ..plan }),
                            ..Options::default()
                        },
                        Write::Accumulate,
                    )
                };
                print!("  {}x{}x{}: {:.0}/{:.0}", plan.warpgroups, plan.subtiles, plan.width, of(true), of(false));
            }
            if self.sweep {
                println!();
            }
        }
        println!("geometric mean {:.0}", (all.iter().map(|r| r.ln()).sum::<f64>() / all.len() as f64).exp());
    }

    fn grouped(&self) {
        println!("\ngrouped, uniform and Zipf rows: TFLOP/s forward, wgrad (FP32 +=); Zipf forward, wgrad");
        for (experts, rows_each, n, k) in GROUPED {
            let rows = experts * rows_each;
            let x = self.random(&[rows, k]);
            let a = quantise::rows(&x, ScaleRule::Amax);
            let dy = self.random(&[rows, n]);
            let (b, _) = quantise::weights(&self.random(&[experts, n, k]), ScaleRule::Amax);
            let gradient = Tensor::zeros([experts, n, k], (Kind::Float, self.gpu.device()));
            let harmonic: f64 = (1..=experts).map(|i| 1.0 / i as f64).sum();
            let zipf: Vec<i64> = (1..=experts).map(|i| (rows as f64 / harmonic / i as f64) as i64).collect();
            let mut line = format!("{experts:>3} x {rows_each:<5} {n}x{k}:");
            for counts in [vec![rows_each; experts as usize], zipf] {
                let tera = 2.0 * (counts.iter().sum::<i64>() * n * k) as f64 / 1e9;
                let counts = Tensor::from_slice(&counts).to_kind(Kind::Int).to_device(self.gpu.device());
                let forward = self.time(|| drop(gemm_grouped::forward(&a, &b, &counts, Options::default())));
                let by_column = |x: &Tensor| quantise::columns(x, Some(&counts), ScaleRule::Amax);
                let (qdy, qx) = (by_column(&dy), by_column(&x));
                let wgrad = self.time(|| {
                    let gradient = &mut gradient.shallow_clone();
                    gemm_grouped::wgrad(&qdy, &qx, &counts, gradient, Write::Accumulate, Options::default())
                });
                line += &format!("  {:.0}, {:.0};", tera / forward, tera / wgrad);
            }
            println!("{line}");
        }
    }

    fn counts(&self, counts: &[i64]) -> Tensor {
        Tensor::from_slice(counts).to_kind(Kind::Int).to_device(self.gpu.device())
    }
}

fn main() {
    let kernel_cache = std::env::temp_dir().join("tiefsee-bench-kernels");
    let options = device::Options { index: 0, torch_cuda: None, nvrtc_folder: None, kernel_cache };
    let gpu = match device::open(&options).expect("a GPU that is there must be usable") {
        Found::Gpu(gpu) => gpu,
        Found::Cpu(why) => return println!("skipped: {why}"),
    };
    println!("{}, {} multiprocessors, {:?}", gpu.name(), gpu.num_sms(), gpu.memory().expect("the device works"));
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| wanted.iter().any(|w| w == name);
    let all = !["forward", "wgrad", "grouped", "passes"].into_iter().any(has);
    let flush = Tensor::zeros([256 << 20], (Kind::Uint8, gpu.device()));
    let large = Tensor::rand([1 << 28], (Kind::Float, gpu.device()));
    let bench = Bench { gpu, flush, large, sweep: has("sweep") };
    let run = |name: &str, table: fn(&Bench)| {
        if all || has(name) {
            table(&bench);
        }
    };
    run("forward", Bench::forward);
    run("wgrad", Bench::wgrad);
    run("grouped", Bench::grouped);
    run("passes", Bench::passes);
}
