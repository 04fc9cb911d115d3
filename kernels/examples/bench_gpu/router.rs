//! The router's three products with FP32 weights: as BF16 parts, beside cuBLAS in FP32 with the copies in FP32 that it needs.
use crate::Bench;
use kernels::ops::{linear, wide_linear};
use tch::{Kind, Tensor};

const T: i64 = 4096;
const WIDTH: i64 = 7168;

impl Bench {
    pub fn router(&self) {
        println!("\nrouter, {T} tokens of {WIDTH}: us of BF16 parts | FP32 and its copies | ratio");
        for experts in [16, 256] {
            let (x, wide) = (self.random(&[T, WIDTH]), (Kind::Float, self.gpu.device()));
            let (weight, dlogits) = (Tensor::randn([experts, WIDTH], wide), Tensor::randn([T, experts], wide));
            let into = || Tensor::empty([experts, WIDTH], wide);
            let show = |name: &str, ours: &dyn Fn(), plain: &dyn Fn()| {
                let [ours, plain]: [f64; 2] = self.race(&[ours, plain]).try_into().expect("two");
                println!("{experts:>4} experts, {name:<9}{:>8.1} | {:>8.1} | {:.2}", ours * 1e3, plain * 1e3, plain / ours);
            };
            let wide_x = || x.to_kind(Kind::Float);
            show("logits", &|| drop(wide_linear::forward(&x, &weight)), &|| drop(linear::forward(&wide_x(), &weight)));
            let plain = || drop(linear::backward_input(&dlogits, &weight).to_kind(Kind::BFloat16));
            show("dx", &|| drop(wide_linear::backward_input(&dlogits, &weight, Kind::BFloat16)), &plain);
            let plain = || drop(linear::weight_gradient(&dlogits, &wide_x()));
            show("gradient", &|| wide_linear::backward_weight(&dlogits, &x, &mut into(), true), &plain);
        }
    }
}
