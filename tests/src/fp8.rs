//! `precision = "fp8"`: the numerics of report §3.3 through the layers, emulated on the CPU as the kernels' references
//! are. Each layer against its formula over dequantised operands, a run against BF16's, FP8 on the wire.
use crate::layouts::{Found, Layout, find, run};
use crate::support::{Run, assert_close, distance, random, row_counts, small};
use kernels::Precision;
use kernels::fp8::{ScaleRule, quantise_blocks, quantise_columns, quantise_rows};
use kernels::ops::quantise::Want;
use model::linear::{Linear, LinearWork};
use model::operand::Operand;
use model::experts::{Experts, Routed};
use model::mla::{Mla, MlaGrad, MlaIn, Positions};
use model::mlp::{Mlp, MlpGrad};
use model::params::{Init, Role};
use model::{ExpertShare, Grads, Layer, ModelConfig, ParamTable, Recompute, Sentinel, Weights};
use parallel::comm::local::run_local;
use parallel::dispatch::{Packed, Rows};
use std::rc::Rc;
use tch::{Device, Kind, Tensor};
use trainer::coordinator::StopSignal;
use trainer::run::{Start, train};

const WIDTHS: [i64; 3] = [70, 160, 48]; // T, I, O: no whole tiles

/// Products of dequantised operands in f64.
#[test]
fn a_linear_s_three_products_are_those_of_its_quantised_operands() {
    let [t, i, o] = WIDTHS;
    let mut table = ParamTable::default();
    let weight = table.add("w", &[o, i], Init::Normal { std: 0.5 }, Role::Matrix);
    let w = Weights::initial(Rc::new(table), Precision::Fp8, 3, Device::Cpu);
    let (x, dy) = (random(1, &[t, i]).to_kind(Kind::BFloat16), random(2, &[t, o]).to_kind(Kind::BFloat16));
    let layer = Linear { weight };
    let (y, saved) = layer.forward(&w, Operand::new(&w, x.shallow_clone(), Want::BOTH, &[weight]));
    let (dx, work) = layer.backward_input(&w, dy.shallow_clone(), saved);
    let mut complete = Vec::new();
    let mut grads = Grads::new(&w, [weight, weight], &mut complete);
    layer.backward_weight(LinearWork { dy: work.dy.share(), x: work.x.share() }, &mut grads);
    layer.backward_weight(work, &mut grads); // a second micro-batch
    grads.finish();

    let rule = ScaleRule::Amax;
    let (wide, blocks) = (Kind::Double, quantise_blocks(w.get(weight), rule).dequantise(Kind::Double));
    let rows = |x: &Tensor| quantise_rows(x, rule).dequantise(wide);
    let columns = |x: &Tensor| quantise_columns(x, &[t], rule).dequantise(wide);
    // BF16 results are rounded once; FP32 sums of 128 products differ from f64's in their last bits.
    assert_close("y", &y, &rows(&x).matmul(&blocks.tr()), 3e-3);
    assert_close("dx", &dx, &rows(&dy).matmul(&blocks), 3e-3);
    let once = columns(&dy).matmul(&columns(&x).tr());
    assert_close("dw", &complete[0].1, &(once * 2.0), 1e-6);
    // And they are not what BF16 would have given.
    assert!(distance(&y, &x.to_kind(wide).matmul(&w.get(weight).to_kind(wide).tr())) > 1e-2);
}

#[test]
fn a_linear_that_fell_back_computes_as_in_bf16() {
    let [t, i, o] = WIDTHS;
    let (x, dy) = (random(1, &[t, i]).to_kind(Kind::BFloat16), random(2, &[t, o]).to_kind(Kind::BFloat16));
    let made = |precision: Precision, fallen_back: bool| {
        let mut table = ParamTable::default();
        let weight = table.add("w", &[o, i], Init::Normal { std: 0.5 }, Role::Matrix);
        let mut w = Weights::initial(Rc::new(table), precision, 3, Device::Cpu);
        w.sentinel = Rc::new(Sentinel::new(if fallen_back { vec![weight] } else { Vec::new() }, None));
        let layer = Linear { weight };
        let (y, saved) = layer.forward(&w, Operand::new(&w, x.shallow_clone(), Want::BOTH, &[weight]));
        let (dx, work) = layer.backward_input(&w, dy.shallow_clone(), saved);
        let mut complete = Vec::new();
        let mut grads = Grads::new(&w, [weight], &mut complete);
        layer.backward_weight(work, &mut grads);
        grads.finish();
        [y, dx, complete.remove(0).1]
    };
    let (bf16, fallen, fp8) = (made(Precision::Bf16, false), made(Precision::Fp8, true), made(Precision::Fp8, false));
    for (index, what) in ["y", "dx", "dw"].into_iter().enumerate() {
        assert!(fallen[index].equal(&bf16[index]), "{what}");
        assert!(!fp8[index].equal(&bf16[index]), "{what}");
    }
}

fn layout(more: &'static [&'static str]) -> Layout {
    (1, 1, 1, "1f1b", 4, more)
}

/// The forward of a layout is one rank's: FP8 rows are quantised one by one. Wgrad's tiles of 128 rows hold other rows.
#[test]
fn a_layout_differs_from_one_rank_by_the_rounding_of_its_weight_gradients() {
    let one = of("fp8", layout(&[]));
    for other in [(1, 2, 2, "paired", 2, &[][..]), (2, 2, 2, "dualpipe", 1, &[]), (1, 4, 4, "1f1b", 2, &["parallel.ranks_per_node=2"])] {
        let found = of("fp8", other);
        assert_eq!(found.losses.len(), one.losses.len(), "{other:?}");
        for (a, b) in found.losses.iter().zip(&one.losses) {
            assert!((a - b).abs() <= 1e-6 * b.abs(), "{other:?}: losses {:?}, on one rank {:?}", found.losses, one.losses);
        }
        for (name, gradient) in &found.gradients {
            let apart = distance(gradient, &one.gradients[name]);
            assert!(apart < 0.06, "{other:?}: the gradient of {name} is {apart} from one rank's");
        }
    }
}

fn of(precision: &str, layout: Layout) -> Found {
    find(&run("fp8", precision, layout), layout)
}

/// Of a layer in `precision`: outputs, gradients of inputs, then of weights by name.
fn through<L: Layer>(
    precision: Precision, table: ParamTable, layer: &L, (input, out): (impl Fn(&Weights) -> L::In, impl Fn(L::Out) -> Tensor),
    (dout, dinput): (impl Fn(&Weights) -> L::DOut, impl Fn(L::DIn) -> Vec<Tensor>),
) -> Vec<(String, Tensor)> {
    let w = Weights::initial(Rc::new(table), precision, 9, Device::Cpu);
    let (y, saved) = layer.forward(&w, input(&w));
    let mut complete = Vec::new();
    let mut grads = Grads::new(&w, w.table.ids(), &mut complete);
    let (dx, work) = layer.backward_input(&w, dout(&w), saved);
    layer.backward_weight(work, &mut grads);
    grads.finish();
    let mut all = vec![("output".to_string(), out(y))];
    all.extend(dinput(dx).into_iter().enumerate().map(|(i, dx)| (format!("gradient of input {i}"), dx)));
    all.extend(complete.into_iter().map(|(id, gradient)| (w.table.spec(id).name.clone(), gradient)));
    all
}

/// FP8's noise is some per cent a product; a wrong scale, layout or weight of a row is not small.
fn assert_noise(name: &str, fp8: Vec<(String, Tensor)>, exact: Vec<(String, Tensor)>) {
    assert_eq!(fp8.len(), exact.len(), "{name}");
    for ((what, a), (same, b)) in fp8.iter().zip(&exact) {
        assert_eq!(what, same, "{name}");
        let apart = distance(a, b);
        assert!((1e-3..0.12).contains(&apart), "{name}, {what}: {apart} from f64's");
    }
}

#[test]
fn every_layer_of_fp8_products_is_near_the_one_in_f64() {
    let config = ModelConfig { hidden_size: 160, intermediate_size: 96, moe_intermediate_size: 48, n_routed_experts: 4, ..wide() };
    for swiglu in [true, false] {
        let recompute = Recompute { swiglu, rms_norm: swiglu, mla_up_projection: swiglu };
        let table = || ParamTable::new(ExpertShare::default(), recompute);
        // Values that BF16 holds, so that only FP8 differs.
        let value = |seed, shape: &[i64]| random(seed, shape).to_kind(Kind::BFloat16);
        let (x, dy) = (value(1, &[140, 160]), value(2, &[140, 160]));
        let dense = |precision: Precision| {
            let mut table = table();
            let layer = Mlp::new(&mut table, &config, "m", config.intermediate_size);
            let x = |w: &Weights| Operand::new(w, x.to_kind(precision.compute()), Want::BOTH, &[]);
            let dout = |w: &Weights| MlpGrad { dy: dy.to_kind(precision.compute()), x: x(w) };
            through(precision, table, &layer, (x, |y| y), (dout, |dx| vec![dx]))
        };
        assert_noise("mlp", dense(Precision::Fp8), dense(Precision::F64));

        let counts = [3, 0, 130, 7];
        let weights = random(3, &[140]).abs();
        let experts = |precision: Precision| {
            let mut table = table();
            let layer = Experts::new(&mut table, &config, "e");
            let arrived = |x: &Tensor| match precision {
                Precision::Fp8 => Rows::Fp8(Packed::new(x, &Tensor::arange(x.size()[0], (Kind::Int64, Device::Cpu)))),
                _ => Rows::Own(x.to_kind(precision.compute())),
            };
            let routed = |_: &Weights| Routed { rows: arrived(&x), counts: row_counts(&counts), weights: weights.to_kind(precision.master()) };
            through(precision, table, &layer, (routed, |y| y), (|_: &Weights| arrived(&dy), |d| vec![d.rows, d.weights]))
        };
        assert_noise("experts", experts(Precision::Fp8), experts(Precision::F64));

        let attention = |precision: Precision| {
            let mut table = table();
            let layer = Mla::new(&mut table, &config, "a");
            let positions = Positions::new(&config, None, 70, (precision.master(), Device::Cpu));
            let x = |w: &Weights| Operand::new(w, x.to_kind(precision.compute()), Want::BOTH, &[]);
            let input = |w: &Weights| MlaIn { x: x(w), sequences: 2, positions: positions.clone() };
            let dout = |w: &Weights| MlaGrad { dy: dy.to_kind(precision.compute()), x: x(w) };
            through(precision, table, &layer, (input, |y| y), (dout, |dx| vec![dx]))
        };
        assert_noise("mla", attention(Precision::Fp8), attention(Precision::F64));
    }
}

/// `small` with widths that FP8 takes.
fn wide() -> ModelConfig {
    let widths = ModelConfig { q_lora_rank: Some(64), kv_lora_rank: 48, qk_nope_head_dim: 32, qk_rope_head_dim: 16, v_head_dim: 32, ..small() };
    ModelConfig { initializer_range: 0.08, ..widths }
}

#[test]
fn a_run_in_fp8_learns_as_one_in_bf16() {
    let trained = |precision: &str| {
        let set = ["phase.0.lr=3e-3", "phase.0.batch=8", "phase.0.tokens=10240", "phase.1.tokens=360"].map(String::from);
        let sizes = SIZES.iter().map(|set| set.to_string());
        let set: Vec<String> = set.into_iter().chain(sizes).chain([format!("run.precision={precision}")]).collect();
        let run = Run::new(&format!("learns-{precision}"), &set.iter().map(String::as_str).collect::<Vec<_>>());
        run_local(1, |world| train(&run.config(), world, Start::Fresh, &StopSignal::default()).map(|_| ()).expect("the run"));
        let losses = run.series("loss");
        (losses[0], losses[losses.len() - 10..].iter().sum::<f64>() / 10.0)
    };
    let ((first, fp8), (_, bf16)) = (trained("fp8"), trained("bf16"));
    assert!(fp8 < first - 0.5, "the loss went from {first} to {fp8}");
    assert!((fp8 / bf16 - 1.0).abs() < 0.01, "loss in FP8 {fp8}, in BF16 {bf16}");
}

const SIZES: &[&str] = &["model.kv_lora_rank=16", "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=16", "model.v_head_dim=16"];
