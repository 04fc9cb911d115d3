//! The auxiliary-loss-free balance: a router pushed off balance comes back, and the counts are right to the token.
use crate::support::{random, small};
use kernels::Precision;
use model::config::ModelConfig;
use model::gate::{Gate, GateIn};
use model::{Layer, ParamTable, Weights};
use std::rc::Rc;
use tch::{Device, Tensor};
use trainer::balance;

const TOKENS: i64 = 8 * 256; // 512 tokens an expert at K = 2

fn gate(config: &ModelConfig) -> (Gate, Weights) {
    let mut table = ParamTable::default();
    let gate = Gate::new(&mut table, config, "g");
    (gate, Weights::initial(Rc::new(table), Precision::F64, 3, Device::Cpu))
}

#[test]
fn a_router_pushed_off_balance_comes_back_within_the_time_its_speed_allows() {
    let (offset, speed) = (0.2, 0.005);
    let config = ModelConfig { n_group: 1, topk_group: 1, num_experts_per_tok: 2, ..small() };
    let (gate, mut weights) = gate(&config);
    let bias = gate.bias().expect("a sigmoid gate has one");
    // Two experts pushed up by o: nearly every token goes there at first.
    weights.set(bias, &Tensor::from_slice(&[offset, offset, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]));
    let mut first_load = 0.0;
    let steps = (offset / speed) as i64 + 50;
    for step in 0..steps {
        let x = random(step as u64, &[TOKENS, config.hidden_size]);
        let (out, _) = gate.forward(&weights, GateIn { x, sequences: 1, balance_scale: 0.0 });
        let counts = out.counts.unsqueeze(0);
        if step == 0 {
            first_load = balance::extremes(&counts).0;
        }
        balance::update(&mut weights, &[Some(bias)], &counts, speed);
    }
    let x = random(10_000, &[TOKENS, config.hidden_size]);
    let (out, _) = gate.forward(&weights, GateIn { x, sequences: 1, balance_scale: 0.0 });
    let load = balance::extremes(&out.counts.unsqueeze(0)).0;
    assert!(first_load > 2.0, "the push shows at first: {first_load}");
    assert!(load < 1.3, "max/mean load after {steps} steps is {load}");
}

#[test]
fn counts_equal_a_recount_of_the_routes() {
    let config = small();
    let (gate, weights) = gate(&config);
    let x = random(1, &[500, config.hidden_size]);
    let (out, _) = gate.forward(&weights, GateIn { x, sequences: 5, balance_scale: 0.0 });
    let mut recount = vec![0i64; config.n_routed_experts as usize];
    for expert in Vec::<i64>::try_from(out.routes.flatten(0, -1)).expect("routes") {
        recount[expert as usize] += 1;
    }
    assert_eq!(Vec::<i64>::try_from(&out.counts).expect("counts"), recount);
    assert_eq!(recount.iter().sum::<i64>(), 500 * config.num_experts_per_tok);
}

#[test]
fn the_update_is_the_sign_of_the_integer_difference() {
    let config = small();
    let (gate, mut weights) = gate(&config);
    let bias = gate.bias().expect("a sigmoid gate has one");
    // Mean 10⁹: one token more or less must still show (it would not in f32).
    let billion = 1_000_000_000i64;
    let counts = Tensor::from_slice(&[billion + 1, billion - 1, billion, billion, billion, billion, billion, billion]);
    balance::update(&mut weights, &[Some(bias)], &counts.unsqueeze(0), 0.5);
    assert_eq!(Vec::<f64>::try_from(weights.get(bias)).expect("a bias"), [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn a_skipped_step_moves_nothing() {
    use crate::support::Run;
    use model::MicroBatch;
    use parallel::comm::local::solo;
    use parallel::mesh::Mesh;
    use trainer::guard::Reason;
    use trainer::phase::Plan;
    use trainer::step::Trainer;
    let config = Run::new("skipped", &["ema.decay=0.5", "guard.window=1"]).config();
    let mut trainer = Trainer::new(&config, &Mesh::single(), solo()).expect("a trainer");
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let moment = plan.at(500).expect("inside");
    let batch = |seed| vec![MicroBatch::new(crate::support::tokens(seed, &[moment.batch as i64, 33], config.model.vocab_size))];
    let before: Vec<Tensor> = trainer.state().iter().map(|part| part.tensor.copy()).collect();
    let good = trainer.step(&moment, &batch(1), false).expect("a step");
    assert!(good.applied() && trainer.state().iter().zip(&before).all(|(part, before)| !part.tensor.equal(before) || part.name.starts_with("second/") || part.name.contains("bias") || part.name.contains("norm")));

    let head = trainer.weights.table.find("lm_head.weight").expect("a head");
    let healthy = trainer.weights.get(head).copy();
    // Not a number, and a loss far above the one before.
    for factor in [f64::NAN, 1000.0] {
        trainer.weights.set(head, &(&healthy * factor));
        trainer.seal().expect("alone"); // meant: no corruption
        let before: Vec<(String, Tensor)> = trainer.state().into_iter().map(|part| (part.name, part.tensor.copy())).collect();
        let bad = trainer.step(&moment, &batch(2), false).expect("a step");
        match factor.is_nan() {
            true => assert!(matches!(bad.skipped, Some(Reason::NotFinite { .. }))),
            false => assert!(matches!(bad.skipped, Some(Reason::Spike { what: "loss", .. }))),
        }
        assert_eq!(trainer.optimizer.updates, 1);
        for (part, (name, before)) in trainer.state().iter().zip(&before) {
            if name != "weight/lm_head.weight" {
                assert!(part.tensor.equal(before), "{name} moved in a skipped step");
            }
        }
        trainer.weights.set(head, &healthy);
        trainer.seal().expect("alone");
    }
    assert!(trainer.step(&moment, &batch(3), false).expect("a step").applied());
}
