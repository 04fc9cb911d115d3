//! Every layer's backward against torch autograd in f64, through one `check_layer`. The references are written
//! from the formulas, not from the layers.
use crate::support::{F64, assert_close, random, row_counts, small, tokens};
use kernels::Precision;
use kernels::ops::rope::{RopeScaling, RopeTable};
use model::config::{ModelConfig, Scoring};
use model::embedding::Embedding;
use model::experts::{Experts, Routed, RoutedGrad};
use model::gate::{Gate, GateGrad, GateIn};
use model::head::{HeadIn, LmHead};
use model::linear::Linear;
use model::mla::{Mla, MlaGrad, MlaIn, Positions};
use model::mlp::{Mlp, MlpGrad};
use model::norm::RmsNorm;
use model::operand::Operand;
use model::params::{Init, Role};
use model::{ExpertShare, Grads, Layer, ParamId, ParamTable, Recompute, Weights};
use parallel::dispatch::Rows;
use std::collections::HashMap;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

type Named = HashMap<String, Tensor>;

/// A layer, how its structs are made of plain tensors, and what it should compute.
struct Case<'a, L: Layer> {
    layer: L,
    table: ParamTable,
    inputs: Vec<Tensor>,
    input: &'a dyn Fn(Vec<Tensor>) -> L::In,
    outputs: &'a dyn Fn(L::Out) -> Vec<Tensor>,
    doutputs: &'a dyn Fn(Vec<Tensor>) -> L::DOut,
    dinputs: &'a dyn Fn(L::DIn) -> Vec<Tensor>,
    /// The outputs, then terms whose gradient is 1 (losses that the layer adds by itself).
    reference: &'a dyn Fn(&[Tensor], &Named) -> Vec<Tensor>,
}

fn check_layer<L: Layer>(case: Case<L>) {
    let table = Rc::new(case.table);
    let weights = Weights::initial(table.clone(), Precision::F64, 5, Device::Cpu);
    let (out, saved) = case.layer.forward(&weights, (case.input)(case.inputs.iter().map(Tensor::copy).collect()));
    let outputs = (case.outputs)(out);

    let leaf = |t: &Tensor| t.copy().set_requires_grad(t.kind() == Kind::Double);
    let inputs: Vec<Tensor> = case.inputs.iter().map(leaf).collect();
    let named: Named = table.ids().map(|id| (table.spec(id).name.clone(), leaf(weights.get(id)))).collect();
    let expected = (case.reference)(&inputs, &named);
    assert!(expected.len() >= outputs.len(), "the reference gives every output");
    let douts: Vec<Tensor> = outputs.iter().enumerate().map(|(i, out)| random(100 + i as u64, &out.size())).collect();
    let mut total = Tensor::zeros([], F64);
    for (i, expected) in expected.iter().enumerate() {
        match (outputs.get(i), douts.get(i)) {
            (Some(out), Some(dout)) => {
                assert_close(&format!("output {i}"), out, &expected.detach(), 1e-12);
                total += (expected * dout).sum(Kind::Double);
            }
            _ => total += expected.sum(Kind::Double),
        }
    }
    total.backward();

    let mut complete: Vec<(ParamId, Tensor)> = Vec::new();
    let mut grads = Grads::new(&weights, table.ids().filter(|&id| table.spec(id).trained()), &mut complete);
    let (dins, work) = case.layer.backward_input(&weights, (case.doutputs)(douts), saved);
    case.layer.backward_weight(work, &mut grads);
    let float_inputs = inputs.iter().filter(|input| input.kind() == Kind::Double);
    let dins = (case.dinputs)(dins);
    assert_eq!(dins.len(), float_inputs.clone().count(), "a gradient for every input");
    for (i, (din, input)) in dins.iter().zip(float_inputs).enumerate() {
        assert_close(&format!("gradient of input {i}"), din, &input.grad(), 1e-9);
    }
    grads.finish();
    for (id, gradient) in complete {
        let name = &table.spec(id).name;
        let expected = &named[name].grad();
        assert!(expected.defined(), "{name} has no reference gradient");
        assert!(expected.norm().double_value(&[]) > 0.0, "{name}: the reference gradient is zero, so this checks nothing");
        assert_close(&format!("gradient of {name}"), &gradient, expected, 1e-9);
    }
}

fn one(t: Tensor) -> Vec<Tensor> {
    vec![t]
}
fn only(mut t: Vec<Tensor>) -> Tensor {
    t.pop().expect("one tensor")
}

fn own(x: Vec<Tensor>) -> Operand {
    Operand::Own(only(x))
}

#[test]
fn linear() {
    let mut table = ParamTable::default();
    let weight = table.add("w", &[7, 5], Init::Normal { std: 1.0 }, Role::Matrix);
    check_layer(Case {
        layer: Linear { weight },
        table,
        inputs: vec![random(1, &[11, 5])],
        input: &own,
        outputs: &one,
        doutputs: &only,
        dinputs: &one,
        reference: &|x, p| vec![Tensor::einsum("ti,oi->to", &[&x[0], &p["w"]], None::<&[i64]>)],
    });
}

#[test]
fn rms_norm() {
    let mut table = ParamTable::default();
    let weight = table.add("w", &[9], Init::Normal { std: 1.0 }, Role::Norm);
    check_layer(Case {
        layer: RmsNorm { weight, eps: 1e-3 },
        table,
        inputs: vec![random(1, &[6, 9])],
        input: &only,
        outputs: &one,
        doutputs: &only,
        dinputs: &one,
        reference: &|x, p| vec![&x[0] / ((&x[0] * &x[0]).sum_dim_intlist(&[1i64][..], true, None) / 9.0 + 1e-3).sqrt() * &p["w"]],
    });
}

#[test]
fn embedding() {
    let mut table = ParamTable::default();
    let weight = table.add("w", &[10, 4], Init::Normal { std: 1.0 }, Role::Matrix);
    check_layer(Case {
        layer: Embedding { weight },
        table,
        inputs: vec![tokens(3, &[25], 10)], // more tokens than rows: some repeat
        input: &only,
        outputs: &one,
        doutputs: &only,
        dinputs: &|()| vec![],
        reference: &|x, p| vec![x[0].one_hot(10).to_kind(Kind::Double).matmul(&p["w"])],
    });
}

#[test]
fn head_with_cross_entropy() {
    let mut table = ParamTable::default();
    let weight = table.add("w", &[13, 5], Init::Normal { std: 1.0 }, Role::Matrix);
    let targets = tokens(4, &[8], 13);
    check_layer(Case {
        layer: LmHead { weight },
        table,
        inputs: vec![random(1, &[8, 5])],
        input: &|x| HeadIn { hidden: only(x), targets: targets.shallow_clone(), scale: 0.37 },
        outputs: &|_| vec![],
        doutputs: &|_| (),
        dinputs: &one,
        reference: &|x, p| {
            let logits = x[0].matmul(&p["w"].tr());
            let chosen = (&logits * targets.one_hot(13)).sum_dim_intlist(&[1i64][..], false, None);
            vec![(logits.exp().sum_dim_intlist(&[1i64][..], false, None).log() - chosen).sum(Kind::Double) * 0.37]
        },
    });
}

fn silu(x: &Tensor) -> Tensor {
    x / ((-x).exp() + 1.0)
}

#[test]
fn dense_mlp() {
    let config = small();
    for swiglu in [false, true] {
        let mut table = ParamTable::new(ExpertShare::default(), Recompute { swiglu, ..Recompute::default() });
        let layer = Mlp::new(&mut table, &config, "m", 10);
        let x = random(1, &[7, config.hidden_size]);
        check_layer(Case {
            layer,
            table,
            inputs: vec![x.copy()],
            input: &own,
            outputs: &one,
            doutputs: &|dy| MlpGrad { dy: only(dy), x: Operand::Own(x.copy()) },
            dinputs: &one,
            reference: &|x, p| {
                let (gate, up) = (p["m.gate_up_proj.weight"].narrow(0, 0, 10), p["m.gate_up_proj.weight"].narrow(0, 10, 10));
                let hidden = silu(&x[0].matmul(&gate.tr())) * x[0].matmul(&up.tr());
                vec![hidden.matmul(&p["m.down_proj.weight"].tr())]
            },
        });
    }
}

/// Attention from its definition: each head by itself, pairs turned by complex numbers.
fn mla_reference(config: &ModelConfig, x: &Tensor, p: &Named, sequences: i64, positions: &Positions) -> Tensor {
    let (nope, rotary, value, latent) = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank);
    let weight = |name: &str| &p[&format!("a.{name}.weight")];
    let norm = |x: &Tensor, name: &str| x / ((x * x).mean_dim(&[-1i64][..], true, None) + config.rms_norm_eps).sqrt() * weight(name);
    let length = x.size()[0] / sequences;
    let turn = |x: &Tensor| {
        let angle = Tensor::complex(&positions.table.cos, &positions.table.sin).narrow(0, 0, length);
        let pairs = x.contiguous().view([length, rotary / 2, 2]);
        Tensor::view_as_real(&(Tensor::complex(&pairs.select(2, 0), &pairs.select(2, 1)) * angle)).reshape([length, rotary])
    };
    let mut sequences_out = Vec::new();
    for sequence in 0..sequences {
        let x = x.narrow(0, sequence * length, length);
        let q = match config.q_lora_rank {
            Some(_) => norm(&x.matmul(&weight("q_a_proj").tr()), "q_a_layernorm").matmul(&weight("q_b_proj").tr()),
            None => x.matmul(&weight("q_proj").tr()),
        };
        let compressed = x.matmul(&weight("kv_a_proj_with_mqa").tr());
        let key = turn(&compressed.narrow(1, latent, rotary));
        let kv = norm(&compressed.narrow(1, 0, latent), "kv_a_layernorm").matmul(&weight("kv_b_proj").tr());
        let mut heads = Vec::new();
        for head in 0..config.num_attention_heads {
            let q = q.narrow(1, head * (nope + rotary), nope + rotary);
            let kv = kv.narrow(1, head * (nope + value), nope + value);
            let scores = q.narrow(1, 0, nope).matmul(&kv.narrow(1, 0, nope).tr()) + turn(&q.narrow(1, nope, rotary)).matmul(&key.tr());
            let weights = (scores * positions.softmax_scale).exp().tril(0);
            heads.push((&weights / weights.sum_dim_intlist(&[1i64][..], true, None)).matmul(&kv.narrow(1, nope, value)));
        }
        sequences_out.push(Tensor::cat(&heads, 1).matmul(&weight("o_proj").tr()));
    }
    Tensor::cat(&sequences_out, 0)
}

fn check_mla(config: ModelConfig, recompute: Recompute) {
    let mut table = ParamTable::new(ExpertShare::default(), recompute);
    let x = random(1, &[10, config.hidden_size]);
    let layer = Mla::new(&mut table, &config, "a");
    let positions = Positions::new(&config, config.rope_scaling.as_ref(), 5, F64);
    check_layer(Case {
        layer,
        table,
        inputs: vec![x.copy()],
        input: &|x| MlaIn { x: own(x), sequences: 2, positions: positions.clone() },
        outputs: &one,
        doutputs: &|dy| MlaGrad { dy: only(dy), x: Operand::Own(x.copy()) },
        dinputs: &one,
        reference: &|x, p| vec![mla_reference(&config, &x[0], p, 2, &positions)],
    });
}

#[test]
fn mla_with_and_without_a_query_latent_and_yarn() {
    let yarn = RopeScaling { factor: 4.0, original_max_position_embeddings: 16, beta_fast: 32.0, beta_slow: 1.0, mscale: 1.0, mscale_all_dim: 0.7 };
    for (rms_norm, mla_up_projection) in [(false, false), (false, true), (true, false), (true, true)] {
        let recompute = Recompute { rms_norm, mla_up_projection, ..Recompute::default() };
        check_mla(small(), recompute);
        check_mla(ModelConfig { q_lora_rank: None, ..small() }, recompute);
        check_mla(ModelConfig { rope_scaling: Some(yarn.clone()), ..small() }, recompute);
    }
}

#[test]
fn experts_with_empty_and_full_ones() {
    let config = small();
    for (counts, swiglu) in [(vec![3, 0, 5, 1], true), (vec![0, 0, 9, 0], true), (vec![3, 0, 5, 1], false)] {
        let mut table = ParamTable::new(ExpertShare::default(), Recompute { swiglu, ..Recompute::default() });
        let layer = Experts::new(&mut table, &ModelConfig { n_routed_experts: 4, ..config.clone() }, "e");
        // A matrix that no row meets has no gradient to check, so only the first case checks every matrix.
        let width = config.moe_intermediate_size;
        check_layer(Case {
            layer,
            table,
            inputs: vec![random(1, &[9, config.hidden_size]), random(2, &[9])],
            input: &|mut x| {
                let weights = x.pop().expect("weights");
                Routed { counts: row_counts(&counts), weights, rows: Rows::Own(only(x)) }
            },
            outputs: &one,
            doutputs: &|dy| Rows::Own(only(dy)),
            dinputs: &|RoutedGrad { rows, weights }| vec![rows, weights],
            reference: &|x, p| {
                let expert_of: Vec<i64> = counts.iter().enumerate().flat_map(|(e, &n)| vec![e as i64; n as usize]).collect();
                let row = |(r, &e): (usize, &i64)| {
                    let up = p["e.gate_up_proj.weight"].select(0, e).matmul(&x[0].select(0, r as i64));
                    let hidden = silu(&up.narrow(0, 0, width)) * up.narrow(0, width, width);
                    p["e.down_proj.weight"].select(0, e).matmul(&hidden) * x[1].select(0, r as i64)
                };
                vec![Tensor::stack(&expert_of.iter().enumerate().map(row).collect::<Vec<_>>(), 0)]
            },
        });
    }
}

/// Routes are piecewise constant, so the reference takes them from plain sorting and differentiates the rest.
fn gate_reference(config: &ModelConfig, x: &Tensor, p: &Named, sequences: i64, balance_scale: f64) -> Vec<Tensor> {
    let (experts, k) = (config.n_routed_experts, config.num_experts_per_tok);
    let logits = x.matmul(&p["g.weight"].tr());
    let scores = match config.scoring_func {
        Scoring::Sigmoid => ((-&logits).exp() + 1.0).reciprocal(),
        Scoring::Softmax => logits.exp() / logits.exp().sum_dim_intlist(&[1i64][..], true, None),
    };
    let plain = Vec::<Vec<f64>>::try_from(scores.detach()).expect("a matrix");
    let (mut weights, mut balance) = (Vec::new(), Tensor::zeros([], F64));
    let best = |values: &[(f64, i64)], n: usize| {
        let mut sorted = values.to_vec();
        sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
        sorted[..n].iter().map(|&(_, i)| i).collect::<Vec<i64>>()
    };
    let size = (experts / config.n_group) as usize;
    for (t, row) in plain.iter().enumerate() {
        let group_score = |g: usize| {
            let mut group = row[g * size..(g + 1) * size].to_vec();
            group.sort_by(|a, b| b.total_cmp(a));
            if config.scoring_func == Scoring::Sigmoid { group[0] + group[1] } else { group[0] }
        };
        let groups: Vec<(f64, i64)> = (0..config.n_group).map(|g| (group_score(g as usize), g)).collect();
        let open = best(&groups, config.topk_group as usize);
        let candidates: Vec<(f64, i64)> = (0..experts).filter(|e| open.contains(&(e / size as i64))).map(|e| (row[e as usize], e)).collect();
        let chosen = scores.select(0, t as i64).index_select(0, &Tensor::from_slice(&best(&candidates, k as usize)));
        let chosen = if config.norm_topk_prob { &chosen / chosen.sum(Kind::Double) } else { chosen };
        weights.push(chosen * config.routed_scaling_factor);
    }
    let length = plain.len() / sequences as usize;
    for rows in 0..sequences as usize {
        let mut f = vec![0.0; experts as usize];
        for row in &plain[rows * length..(rows + 1) * length] {
            let all: Vec<(f64, i64)> = row.iter().copied().zip(0..).collect();
            best(&all, k as usize).iter().for_each(|&e| f[e as usize] += experts as f64 / (k as f64 * length as f64));
        }
        let s = scores.narrow(0, (rows * length) as i64, length as i64);
        let share = (&s / s.sum_dim_intlist(&[1i64][..], true, None)).mean_dim(&[0i64][..], false, None);
        balance += (share * Tensor::from_slice(&f)).sum(Kind::Double);
    }
    vec![Tensor::stack(&weights, 0), balance * balance_scale]
}

fn check_gate(config: ModelConfig) {
    let mut table = ParamTable::default();
    let layer = Gate::new(&mut table, &config, "g");
    let x = random(1, &[12, config.hidden_size]);
    check_layer(Case {
        layer,
        table,
        inputs: vec![x.copy()],
        input: &|x| GateIn { x: only(x), sequences: 2, balance_scale: 0.3 },
        outputs: &|out| vec![out.weights],
        doutputs: &|dweights| GateGrad { dweights: only(dweights), x: x.copy() },
        dinputs: &one,
        reference: &|x, p| gate_reference(&config, &x[0], p, 2, 0.3),
    });
}

#[test]
fn gate_sigmoid_and_softmax_grouped_and_not() {
    check_gate(small());
    check_gate(ModelConfig { n_group: 1, topk_group: 1, ..small() });
    let softmax = ModelConfig { scoring_func: Scoring::Softmax, norm_topk_prob: false, routed_scaling_factor: 1.0, ..small() };
    check_gate(softmax.clone());
    check_gate(ModelConfig { n_group: 1, topk_group: 1, ..softmax });
}

#[test]
fn yarn_frequencies_are_interpolated_only_where_they_are_slow() {
    let yarn = RopeScaling { factor: 40.0, original_max_position_embeddings: 4096, beta_fast: 32.0, beta_slow: 1.0, mscale: 1.0, mscale_all_dim: 1.0 };
    let angle = |scaling: Option<&RopeScaling>, pair: i64| {
        let table = RopeTable::new(2, 64, 10000.0, scaling, F64);
        table.sin.double_value(&[1, pair]).atan2(table.cos.double_value(&[1, pair]))
    };
    assert!((angle(None, 0) - angle(Some(&yarn), 0)).abs() < 1e-15);
    assert!((angle(None, 31) / angle(Some(&yarn), 31) - 40.0).abs() < 1e-9);
    assert_eq!(yarn.table_scale(), 1.0);
    assert!((yarn.softmax_scale() - (0.1 * 40f64.ln() + 1.0).powi(2)).abs() < 1e-12);
}
