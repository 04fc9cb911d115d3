//! The memory-bound passes: microseconds, and shares of the bandwidth of two copies of the same run, timed alike: a large
//! one, and one of as many bytes as the pass. Bytes are what a pass must move: each input once, each output once.
use crate::Bench;
use kernels::fp8::ScaleRule;
use kernels::ops::adamw::{AdamW, Fp8, Outputs, State, Step};
use kernels::ops::quantise::{self, Want};
use kernels::ops::{cross_entropy, gradient_norm, rms_norm, swiglu, unpermute};
use tch::{Kind, Tensor};

const T: i64 = 4096;
const RULE: ScaleRule = ScaleRule::Amax;
/// V3's routes of a token, and its experts on one of eight ranks.
const ROUTES: i64 = 8;
const EXPERTS: i64 = 32;

/// Calls in a row, each with outputs of its own; inputs rotate. Together they are far larger than the L2 cache.
const CALLS: usize = 12;
const SETS: usize = 3;

impl Bench {
    /// Median milliseconds of a call among others like it. The host runs ahead while the device reads a large tensor.
    fn steady<T>(&self, work: impl Fn(usize) -> T) -> f64 {
        let mut times: Vec<f32> = (0..9)
            .map(|_| {
                let _ = self.large.sum(Kind::Float);
                let mut kept = Vec::new();
                let run = || kept.extend((0..CALLS).map(|call| work(call % SETS)));
                self.gpu.time_ms(run).expect("the device works") / CALLS as f32
            })
            .collect();
        times.sort_by(f32::total_cmp);
        f64::from(times[times.len() / 2])
    }

    fn show(&self, name: &str, bytes: i64, copy: f64, time: f64) {
        let (speed, alike) = (bytes as f64 / time / 1e9, self.copy_bandwidth(bytes));
        println!("{name:<58} {:>8.1} us  {speed:>5.2} TB/s  {:.2}  {:.2}", time * 1e3, speed / copy, speed / alike);
    }

    fn sets(&self, size: &[i64]) -> [Tensor; SETS] {
        [(); SETS].map(|()| self.random(size))
    }

    /// TB/s of copies that read and write `bytes` together, at most 2 GiB.
    pub fn copy_bandwidth(&self, bytes: i64) -> f64 {
        let floats = (bytes / 8).min(1 << 28);
        let places = (1 << 28) / floats;
        let copy = |i: usize| {
            let from = self.large.narrow(0, i as i64 % places * floats, floats);
            let mut to = from.empty_like();
            to.copy_(&from);
            to
        };
        8.0 * floats as f64 / self.steady(copy) / 1e9
    }

    pub fn passes(&self) {
        let copy = self.copy_bandwidth(i64::MAX);
        println!("\nmemory-bound passes: of a large copy ({copy:.2} TB/s, read + write), and of a copy of as many bytes");
        for c in [2048, 7168, 16384] {
            let (x, n) = (self.sets(&[T, c]), T * c);
            let time = self.steady(|i| quantise::rows(&x[i], RULE));
            self.show(&format!("quantise {T}x{c} rows"), 3 * n, copy, time);
            let time = self.steady(|i| quantise::columns(&x[i], None, RULE));
            self.show(&format!("quantise {T}x{c} columns"), 3 * n, copy, time);
            let time = self.steady(|i| quantise::rows_and_columns(&x[i], None, RULE));
            self.show(&format!("quantise {T}x{c} both"), 4 * n, copy, time);
            let time = self.steady(|i| quantise::weights(&x[i], RULE));
            self.show(&format!("quantise {T}x{c} weights and transpose"), 4 * n, copy, time);
        }
        self.norm_and_swiglu(copy);
        self.routed(copy);
        self.optimizer(copy);
        let logits = self.sets(&[T, 129280]);
        let targets = Tensor::randint_low(0, 129280, [T], (Kind::Int64, self.gpu.device()));
        let time = self
            .steady(|i| cross_entropy::forward(logits[i].shallow_clone(), &targets, &mut logits[i].shallow_clone()));
        self.show(&format!("cross-entropy {T}x129280, gradient in place"), 4 * T * 129280, copy, time);
    }

    fn norm_and_swiglu(&self, copy: f64) {
        for d in [1536, 7168] {
            let (x, weight) = (self.sets(&[T, d]), self.random(&[d]));
            let make = rms_norm::Make { want: Want::BOTH, bf16: false, rule: RULE };
            let time = self.steady(|i| rms_norm::add(&x[i], &x[(i + 1) % SETS], 1e-6));
            self.show(&format!("residual sum and statistics {T}x{d}"), 6 * T * d, copy, time);
            let rstd = x.each_ref().map(|x| rms_norm::forward(x, &weight, 1e-6).1);
            let time = self.steady(|i| rms_norm::quantised(&x[i], &rstd[i], &weight, make));
            self.show(&format!("rms norm {T}x{d} both, statistics known"), 4 * T * d, copy, time);
            let time = self.steady(|i| {
                rms_norm::backward_add(&x[i], &x[(i + 1) % SETS], &rstd[i], &weight, Some(&x[(i + 2) % SETS]))
            });
            self.show(&format!("rms norm backward {T}x{d}, residual gradient added"), 8 * T * d, copy, time);
            let with_bf16 = rms_norm::Make { bf16: true, ..make };
            let time = self.steady(|i| rms_norm::quantised(&x[i], &rstd[i], &weight, with_bf16));
            self.show(&format!("rms norm {T}x{d} both and bf16, statistics known"), 6 * T * d, copy, time);
            let time = self.steady(|i| rms_norm::forward_quantised(&x[i], &weight, 1e-6, make));
            self.show(&format!("rms norm {T}x{d} both, with its statistics"), 4 * T * d, copy, time);
            let rows = rms_norm::Make { want: Want::ROWS, ..make };
            let time = self.steady(|i| rms_norm::forward_quantised(&x[i], &weight, 1e-6, rows));
            self.show(&format!("rms norm {T}x{d} rows, with its statistics"), 3 * T * d, copy, time);
            let time = self.steady(|i| rms_norm::forward(&x[i], &weight, 1e-6));
            self.show(&format!("rms norm {T}x{d} bf16, with its statistics"), 4 * T * d, copy, time);
        }
        for (rows, i, experts) in [(T, 18432, 1), (T * ROUTES, 2048, EXPERTS)] {
            let n = rows * i;
            let counts = self.counts(&vec![rows / experts; experts as usize]);
            let weight = Tensor::rand([rows], (Kind::Float, self.gpu.device()));
            let (weight, counts) = (Some(&weight), Some(&counts));
            let (gate_up, dact) = (self.sets(&[rows, 2 * i]), self.sets(&[rows, i]));
            let make = swiglu::Make { want: Want::ROWS, save: true, rule: RULE };
            let time = self.steady(|i| swiglu::quantised(&gate_up[i], weight, counts, make));
            self.show(&format!("swiglu {rows}x{i} rows, gate and up kept"), 7 * n, copy, time);
            let both = swiglu::Make { want: Want::BOTH, save: false, rule: RULE };
            let time = self.steady(|i| swiglu::quantised(&gate_up[i], weight, counts, both));
            self.show(&format!("swiglu {rows}x{i} both"), 6 * n, copy, time);
            let saved = gate_up.each_ref().map(|x| swiglu::quantised(x, weight, counts, make).saved.expect("kept"));
            let make = swiglu::Make { want: Want::BOTH, save: true, rule: RULE };
            let time = self.steady(|i| swiglu::backward_quantised(&dact[i], &saved[i], weight, counts, make));
            self.show(&format!("swiglu backward {rows}x{i} from fp8, all layouts"), 9 * n, copy, time);
        }
    }

    fn routed(&self, copy: f64) {
        let (d, rows) = (7168, T * ROUTES);
        // Every token's rows lie with different experts.
        let index = (Tensor::arange(rows, (Kind::Int64, self.gpu.device())) * 4099).remainder(rows).view([T, ROUTES]);
        let source = Tensor::empty([rows], (Kind::Int64, self.gpu.device()));
        let tokens = Tensor::arange(rows, (Kind::Int64, self.gpu.device())).floor_divide_scalar(ROUTES);
        let source = source.scatter(0, &index.view(-1), &tokens).to_kind(Kind::Int);
        let index = index.to_kind(Kind::Int);
        let counts = self.counts(&vec![rows / EXPERTS; EXPERTS as usize]);
        let x = self.sets(&[T, d]);
        let two = Tensor::stack(&[&Tensor::arange(T, (Kind::Int, x[0].device())), &Tensor::arange_start(T, 2 * T, (Kind::Int, x[0].device()))], 1);
        let time = self.steady(|i| quantise::pack(&x[i], &two, 2 * T));
        self.show(&format!("quantise {T}x{d} packed for two ranks"), 4 * T * d, copy, time);
        // As what is sent to experts has them.
        let rule = ScaleRule::PowerOfTwo;
        let sent = x.each_ref().map(|x| quantise::rows(x, rule));
        let time = self.steady(|i| quantise::columns_of(&sent[i], Some(&source), Some(&counts), rule));
        self.show(&format!("gather fp8 rows {T} x {ROUTES} x {d} and transpose"), (T + rows) * d, copy, time);
        let y = self.sets(&[rows, d]);
        let time = self.steady(|i| unpermute::forward(&y[i], &index, &[&x[i]]));
        self.show(
            &format!("unpermute and sum {T} x {ROUTES} x {d}, shared expert added"),
            (4 * T + 2 * rows) * d,
            copy,
            time,
        );
    }

    fn optimizer(&self, copy: f64) {
        let (r, c) = (16384, 7168);
        let new = |kind| [(); SETS].map(|()| Tensor::rand([r, c], (Kind::Float, self.gpu.device())).to_kind(kind));
        let [masters, gradients] = [(); 2].map(|()| new(Kind::Float));
        let [firsts, seconds, weights] = [(); 3].map(|()| new(Kind::BFloat16));
        let blocks = quantise::empty_weights(&[r, c], self.gpu.device());
        let clip = Tensor::ones([1], (Kind::Float, self.gpu.device()));
        let rule = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        let run = |i: usize, fp8| {
            let [mut master, mut first, mut second] = [&masters[i], &firsts[i], &seconds[i]].map(Tensor::shallow_clone);
            let state = State { master: &mut master, first: &mut first, second: &mut second };
            let at = Step { lr: 1e-4, step: 10, clip: 1.0, decay: true };
            let out = Outputs { weight: Some(&weights[i]), fp8 };
            rule.update_fused(state, &gradients[i], &clip, out, at);
        };
        self.show(&format!("adamw {r}x{c} and bf16"), 22 * r * c, copy, self.steady(|i| run(i, None)));
        let fp8 = Fp8 { plain: &blocks.0, transposed: &blocks.1, rule: RULE };
        self.show(
            &format!("adamw {r}x{c}, bf16, fp8 and transpose"),
            24 * r * c,
            copy,
            self.steady(|i| run(i, Some(fp8))),
        );
        let time = self.steady(|i| gradient_norm::sum_of_squares(&[&gradients[i]]));
        self.show(&format!("gradient norm {r}x{c}"), 4 * r * c, copy, time);
    }
}
