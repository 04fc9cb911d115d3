//! What a micro-batch costs: its GEMMs by the precision of their operands, and the bytes it keeps for backward.
use crate::support::{Run, tokens};
use model::{GradSink, Grads, MicroBatch, ParamId, Sentinel};
use model::saved::{LOGITS, PROBABILITIES, bytes};
use model::stage::StageIn;
use parallel::comm::local::solo;
use parallel::mesh::Mesh;
use parallel::schedule::Chunk;
use parallel::schedule::run::Stages;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use tch::Tensor;
use trainer::phase::Plan;
use trainer::pipeline::Pipeline;
use trainer::step::Trainer;

/// A trainer, and micro-batches for its first step.
fn trainer(name: &str, set: &[&str], length: i64) -> (Trainer, Plan, impl Fn(u64) -> MicroBatch + use<>) {
    let config = Run::new(name, set).config();
    let (plan, vocab) = (Plan::new(&config.phase, &config.data.mixture), config.model.vocab_size);
    let batch = move |seed| MicroBatch::new(tokens(seed, &[1, length + 1], vocab));
    (Trainer::new(&config, &Mesh::single(), solo()).expect("a trainer"), plan, batch)
}

const WIDTHS: [&str; 4] = ["model.kv_lora_rank=16", "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=16", "model.v_head_dim=16"];

#[test]
fn gemms_are_three_a_linear_and_one_more_where_it_is_made_again() {
    for up_projection in [false, true] {
        let recompute = format!("recompute.mla_up_projection={up_projection}");
        let (mut trainer, plan, batch) = trainer("gemms", &[&WIDTHS[..], &["run.precision=fp8", &recompute, "recompute.rms_norm=true"]].concat(), 32);
        let moment = plan.at(0).expect("a phase");
        let context = trainer.context(&moment, 2);
        drop(trainer.gradients(&context, &[batch(1), batch(2)]).expect("gradients"));
        let counted = trainer.weights.gemms.take();

        let config = &trainer.config;
        let mtp = config.num_nextn_predict_layers as u64;
        let dense = config.first_k_dense_replace as u64;
        let moe = config.num_hidden_layers as u64 - dense + mtp;
        let linears = 7 * (dense + moe); // five of attention, two of an MLP: a MoE layer's is the shared expert
        let again = if up_projection { 2 * (dense + moe) } else { 0 };
        let (heads, projections, grouped) = (1 + mtp, mtp, 2 * moe);
        let expected = [("bf16", 3 * (heads + projections)), ("fp32", 3 * moe), ("fp8", 3 * (linears + grouped) + again)];
        let expected: BTreeMap<&str, u64> = expected.into_iter().map(|(kind, count)| (kind, 2 * count)).collect();
        assert_eq!(counted, expected, "up-projections made again: {up_projection}");
        println!("up-projections made again: {up_projection}: {counted:?} in two micro-batches");
    }
}

#[test]
fn a_linear_that_fell_back_is_in_bf16_in_all_three_of_its_gemms() {
    let (mut trainer, plan, batch) = trainer("fell-back", &[&WIDTHS[..], &["run.precision=fp8"]].concat(), 32);
    let moment = plan.at(0).expect("a phase");
    let context = trainer.context(&moment, 1);
    let mut counted = |names: &[&str]| {
        let ids = names.iter().map(|name| trainer.weights.table.find(name).expect("a linear")).collect();
        trainer.weights.sentinel = Rc::new(Sentinel::new(ids, None));
        drop(trainer.gradients(&context, &[batch(1)]).expect("gradients"));
        trainer.weights.gemms.take()
    };
    let none = counted(&[]);
    let two = counted(&["model.layers.1.self_attn.q_a_proj.weight", "model.layers.1.mlp.experts.down_proj.weight"]);
    assert_eq!((two["bf16"], two["fp8"], two["fp32"]), (none["bf16"] + 6, none["fp8"] - 6, none["fp32"]));
}

/// V3's widths, an eighth of each.
const EIGHTH: [&str; 16] = [
    "model.hidden_size=896",
    "model.intermediate_size=2304",
    "model.moe_intermediate_size=256",
    "model.num_attention_heads=16",
    "model.q_lora_rank=192",
    "model.kv_lora_rank=64",
    "model.qk_nope_head_dim=128",
    "model.qk_rope_head_dim=64",
    "model.v_head_dim=128",
    "model.n_routed_experts=8",
    "model.num_experts_per_tok=8",
    "model.n_group=1",
    "model.topk_group=1",
    "model.num_nextn_predict_layers=0",
    "phase.0.sequence_length=128",
    "phase.0.mtp_weight=0",
];

#[test]
fn fp8_keeps_at_most_three_fifths_of_what_bf16_keeps() {
    let kept = |precision: &str, again: bool| {
        let (precision, again) = (format!("run.precision={precision}"), again.to_string());
        let recompute = [format!("recompute.rms_norm={again}"), format!("recompute.mla_up_projection={again}")];
        let set = [&EIGHTH[..], &[&precision, &recompute[0], &recompute[1]]].concat();
        let (mut trainer, plan, batch) = trainer("kept", &set, 128);
        let context = trainer.context(&plan.at(0).expect("a phase"), 1);
        let (.., saved) = trainer.stages.direction(0).forward(&context, &mut trainer.weights, &batch(1), StageIn::Tokens).expect("a forward");
        let mut parts = bytes(&saved);
        // On a GPU attention keeps its output instead of the probabilities: the reference keeps both.
        parts.retain(|part, _| ![LOGITS, PROBABILITIES].contains(part));
        parts
    };
    for (again, limit) in [(true, 0.6), (false, 0.75)] {
        let (fp8, bf16) = (kept("fp8", again), kept("bf16", again));
        println!("norms and up-projections made again: {again}; bytes a token of three layers");
        for (part, bytes) in &bf16 {
            println!("  {part:<28} BF16 {:>7}  FP8 {:>7}", bytes / 128, fp8[part] / 128);
        }
        let share = fp8.values().sum::<i64>() as f64 / bf16.values().sum::<i64>() as f64;
        println!("  FP8 keeps {:.1} % of BF16's", share * 100.0);
        assert!(share <= limit, "FP8 keeps {share:.3} of what BF16 keeps: {fp8:?} and {bf16:?}");
    }
}

/// Sees when gradients are complete.
struct Completed(Rc<RefCell<Vec<ParamId>>>);

impl GradSink for Completed {
    fn complete(&mut self, id: ParamId, _: Tensor) {
        self.0.borrow_mut().push(id);
    }
}

#[test]
fn a_split_backward_puts_off_everything_but_the_logits() {
    let (mut trainer, plan, batch) = trainer("split", &[], 32);
    let context = trainer.context(&plan.at(0).expect("a phase"), 1);
    let completed = Rc::new(RefCell::new(Vec::new()));
    let (mut sink, one, chunk) = (Completed(completed.clone()), [batch(1)], Chunk { direction: 0, micro_batch: 0 });
    let mut grads = Grads::new(&trainer.weights, trainer.stages.direction(0).uses.clone(), &mut sink);
    let table = trainer.weights.table.clone();
    let names = || completed.borrow().iter().map(|&id| table.spec(id).name.clone()).collect::<Vec<_>>();
    let mut pipeline = Pipeline::new(&context, &trainer.stages, &mut trainer.weights, Some(&mut grads), &one, &trainer.config);
    pipeline.forward(chunk, None).expect("a forward");
    pipeline.backward(chunk, None, true).expect("an input's gradient");
    assert!(names().is_empty(), "the result goes first");
    pipeline.rest().expect("what follows the result");
    // Main head and MTP's share a weight, and MTP's last norm lies between.
    assert_eq!(names(), ["lm_head.weight", "model.layers.3.shared_head.norm.weight"]);
    pipeline.backward_weight(chunk).expect("weights' gradients");
    drop(pipeline);
    grads.finish();
    assert_eq!(names().len(), table.specs().iter().filter(|spec| spec.trained()).count());
}
