//! The model against two independent ones: Hugging Face transformers' own DeepSeek-V3 and -V2, loaded from our
//! export, and a plain torch model in f64 that also has MTP and the sequence-wise balance loss.
use crate::support::{assert_close, distance, random, root, scratch, small, tokens};
use kernels::Precision;
use kernels::ops::rope::RopeScaling;
use model::config::{ModelConfig, Scoring};
use model::hf::pieces;
use model::mla::Positions;
use model::params::Role;
use model::stage::StageIn;
use model::{ExpertShare, Grads, MicroBatch, ParamId, ParamTable, Recompute, Stage, StepContext, Weights};
use parallel::comm::local::solo;
use parallel::dispatch::ExpertGroup;
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};
use trainer::checkpoint::hf::{Format, Values};
use trainer::checkpoint::{self, Manifest};
use trainer::state::StatePart;

/// Below this lead of a chosen expert over the next, rounding may choose another: such a seed tests nothing.
const MARGIN: f64 = 1e-5;
const SEQUENCES: i64 = 2;

pub struct Subject {
    pub config: ModelConfig,
    pub stage: Stage,
    pub weights: Weights,
    pub tokens: Tensor, // [B, L + 1]
}

impl Subject {
    /// Random weights, norms and biases included.
    pub fn new(config: &ModelConfig, precision: Precision, seed: u64, length: i64) -> Self {
        Self::in_share(ExpertShare::default(), config, precision, seed, length)
    }

    fn in_share(share: ExpertShare, config: &ModelConfig, precision: Precision, seed: u64, length: i64) -> Self {
        config.validate().expect("a valid config");
        let mut table = ParamTable::new(share, Recompute::default());
        let stage = Stage::whole(&mut table, config);
        let mut weights = Weights::initial(Rc::new(table), precision, seed, Device::Cpu);
        let table = weights.table.clone();
        for (index, id) in table.ids().enumerate() {
            let noise = random(seed + 1000 + index as u64, &table.spec(id).shape);
            match table.spec(id).role {
                Role::Norm => weights.set(id, &(noise * 0.2 + 1.0)),
                Role::Bias => weights.set(id, &(noise * 0.05)),
                _ => {}
            }
        }
        Subject { config: config.clone(), stage, weights, tokens: tokens(seed, &[SEQUENCES, length + 1], config.vocab_size) }
    }

    pub fn context(&self, mtp_weight: f64, balance_weight: f64) -> StepContext {
        let length = self.tokens.size()[1] - 1;
        let options = (self.weights.precision.master(), Device::Cpu);
        StepContext {
            main_targets: SEQUENCES * length,
            mtp_targets: SEQUENCES * (length - 1),
            sequences: SEQUENCES,
            mtp_weight,
            balance_weight,
            positions: Positions::new(&self.config, self.config.rope_scaling.as_ref(), length, options),
            experts: ExpertGroup::flat(solo()),
        }
    }

    /// Through the real path: a checkpoint, then export-hf.
    pub fn export(&self, name: &str) -> PathBuf {
        let table = &self.weights.table;
        let part = |id| {
            let spec = table.spec(id);
            StatePart { name: format!("weight/{}", spec.name), tensor: self.weights.get(id).shallow_clone(), start: 0, total: spec.total }
        };
        let tensors = table.ids().map(part).collect();
        let manifest = Manifest::imported(self.config.clone(), self.weights.precision);
        let path = checkpoint::save(&*solo(), &scratch().join("oracle").join(name), manifest, tensors).expect("a checkpoint");
        let out = scratch().join("oracle").join(format!("{name}-hf"));
        checkpoint::hf::export(&path, &out, Format::Plain(self.weights.precision.compute()), Values::Newest).expect("an export");
        out
    }

    /// main, mtp, balance (means, unweighted) and every gradient under its released name.
    fn run(&mut self, step: &StepContext) -> ([f64; 3], HashMap<String, Tensor>) {
        let micro_batch = MicroBatch::new(self.tokens.shallow_clone());
        let (_, stats, saved) = self.stage.forward(step, &mut self.weights, &micro_batch, StageIn::Tokens).expect("forward");
        let mut complete: Vec<(ParamId, Tensor)> = Vec::new();
        let mut grads = Grads::new(&self.weights, self.stage.uses.iter().copied(), &mut complete);
        let mut make = |work| self.stage.backward_weight(work, &mut grads);
        let (_, rest) = self.stage.backward(&self.weights, None, saved, &mut make).expect("backward");
        rest.into_iter().for_each(make);
        grads.finish();
        self.completes_in_order(&complete);
        let mean = |sum: &Tensor, count: i64| sum.double_value(&[]) / count as f64;
        let losses = [mean(&stats.main, step.main_targets), mean(&stats.mtp, step.mtp_targets), mean(&stats.balance, step.sequences)];
        let mut named = HashMap::new();
        for (id, gradient) in complete {
            for piece in pieces(self.weights.table.spec(id)) {
                let part = piece.expert.map_or_else(|| gradient.shallow_clone(), |expert| gradient.select(0, expert));
                named.insert(piece.name, piece.rows.map_or_else(|| part.shallow_clone(), |(start, rows)| part.narrow(0, start, rows)));
            }
        }
        (losses, named)
    }

    /// Buckets of gradients leave in the order that the table foretells: one that is out of it holds up all behind it.
    fn completes_in_order(&self, complete: &[(ParamId, Tensor)]) {
        let table = &self.weights.table;
        let name = |id: ParamId| table.spec(id).name.clone();
        let foretold = table.completed().into_iter().filter(|&id| table.spec(id).trained());
        assert_eq!(complete.iter().map(|(id, _)| name(*id)).collect::<Vec<_>>(), foretold.map(name).collect::<Vec<_>>());
    }
}

/// Runs tests/oracle/`script` in the test venv and reads what it wrote.
pub fn oracle(script: &str, export: &Path, input: &Tensor, arguments: &[&str]) -> HashMap<String, Tensor> {
    let python = root().join(".deps/venv/bin/python");
    assert!(python.exists(), "the test venv is not there; scripts/test.sh makes it");
    let (input_path, output_path) = (export.with_extension("in.safetensors"), export.with_extension("out.safetensors"));
    Tensor::write_safetensors(&[("tokens", input)], &input_path).expect("the tokens");
    let output = Command::new(python)
        .arg(root().join("tests/oracle").join(script))
        .args([export, &input_path, &output_path])
        .args(arguments)
        .env("OMP_NUM_THREADS", "1")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .expect("python starts");
    assert!(output.status.success(), "{script}: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let bytes = std::fs::read(&output_path).expect("its output");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let kind = |view: &safetensors::tensor::TensorView| match view.dtype() {
        safetensors::Dtype::F64 => Kind::Double,
        safetensors::Dtype::F32 => Kind::Float,
        safetensors::Dtype::I64 => Kind::Int64,
        other => panic!("{script} wrote {other:?}"),
    };
    let tensor = |view: safetensors::tensor::TensorView| {
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        Tensor::from_data_size(view.data(), &shape, kind(&view))
    };
    file.tensors().into_iter().map(|(name, view)| (name.to_string(), tensor(view))).collect()
}

/// No token is so near to another expert that rounding could send it there.
pub fn routes_clearly(found: &HashMap<String, Tensor>) -> bool {
    found["routing_margin"].double_value(&[]) > MARGIN
}

fn check_margin(name: &str, found: &HashMap<String, Tensor>) {
    assert!(routes_clearly(found), "{name}: the routing margin is {:.1e}: choose another seed", found["routing_margin"].double_value(&[]));
}

fn compare_gradients(name: &str, ours: &HashMap<String, Tensor>, theirs: &HashMap<String, Tensor>, limit: f64) {
    for (parameter, gradient) in ours {
        let expected = theirs.get(parameter).unwrap_or_else(|| panic!("{name}: the oracle has no gradient of {parameter}"));
        assert_close(&format!("{name}: gradient of {parameter}"), gradient, expected, limit);
    }
    let parameters = theirs.keys().filter(|key| key.starts_with("model.") || key.starts_with("lm_head."));
    assert_eq!(parameters.count(), ours.len(), "{name}: gradients of every parameter");
}

fn yarn(mscale: f64) -> Option<RopeScaling> {
    Some(RopeScaling { factor: 4.0, original_max_position_embeddings: 16, beta_fast: 32.0, beta_slow: 1.0, mscale, mscale_all_dim: mscale })
}

fn v3() -> ModelConfig {
    ModelConfig { num_nextn_predict_layers: 0, ..small() }
}

fn v2() -> ModelConfig {
    ModelConfig { scoring_func: Scoring::Softmax, norm_topk_prob: false, routed_scaling_factor: 1.0, n_shared_experts: 2, ..v3() }
}

fn check_hf(name: &str, config: ModelConfig, seed: u64, length: i64) {
    let mut subject = Subject::new(&config, Precision::F32, seed, length);
    let theirs = oracle("hf.py", &subject.export(name), &subject.tokens, &[]);
    check_margin(name, &theirs);
    let step = subject.context(0.0, 0.0);
    let logits = subject.stage.logits(&step, &mut subject.weights, &MicroBatch::new(subject.tokens.shallow_clone())).expect("logits");
    assert_close(&format!("{name}: logits"), &logits, &theirs["logits"].view([-1, config.vocab_size]), 1e-5);
    let ([main, _, _], gradients) = subject.run(&step);
    let expected = theirs["loss"].double_value(&[]);
    assert!((main - expected).abs() <= 1e-6 * expected, "{name}: loss {main}, transformers' {expected}");
    compare_gradients(name, &gradients, &theirs, 1e-4);
}

#[test]
fn deepseek_v3_of_transformers() {
    check_hf("v3", v3(), 11, 23);
    check_hf("v3-yarn", ModelConfig { rope_scaling: yarn(1.0), first_k_dense_replace: 0, ..v3() }, 12, 37);
    let plain = ModelConfig { q_lora_rank: None, n_group: 1, topk_group: 1, first_k_dense_replace: 0, ..v3() };
    check_hf("v3-direct-ungrouped", plain.clone(), 13, 17);
    check_hf("v3-direct-ungrouped-yarn", ModelConfig { rope_scaling: yarn(1.0), first_k_dense_replace: 1, ..plain }, 24, 19);
}

#[test]
fn one_expert_a_token() {
    // Not renormalised: a weight of one would leave the gate without a gradient.
    check_hf("v3-top-1", ModelConfig { num_experts_per_tok: 1, norm_topk_prob: false, ..v3() }, 41, 23);
}

#[test]
fn deepseek_v2_of_transformers() {
    let greedy = ModelConfig { q_lora_rank: None, n_group: 1, topk_group: 1, rope_scaling: yarn(0.707), ..v2() };
    check_hf("v2-greedy-yarn", greedy, 15, 21);
    check_hf("v2-grouped", v2(), 16, 13);
}

#[test]
fn mtp_and_the_sequence_wise_balance_loss() {
    for (name, config, seed) in [("mtp", small(), 21), ("mtp-direct", ModelConfig { vocab_size: 150, q_lora_rank: None, rope_scaling: yarn(1.0), ..small() }, 22)] {
        let mut subject = Subject::new(&config, Precision::F64, seed, 15);
        let theirs = oracle("mtp.py", &subject.export(name), &subject.tokens, &["--lambda", "0.3", "--alpha", "0.05"]);
        check_margin(name, &theirs);
        let (losses, gradients) = subject.run(&subject.context(0.3, 0.05));
        for (loss, key) in losses.into_iter().zip(["loss.main", "loss.mtp", "loss.balance"]) {
            let expected = theirs[key].double_value(&[]);
            assert!((loss - expected).abs() < 1e-12 * expected.abs(), "{name}: {key} is {loss}, the oracle's {expected}");
        }
        compare_gradients(name, &gradients, &theirs, 1e-9);
    }
}

#[test]
fn gradients_of_experts_that_stay_are_the_last_and_the_same() {
    for (dense, vocab_size) in [(0, 40), (1, 40), (1, 4000)] {
        let config = ModelConfig { first_k_dense_replace: dense, vocab_size, ..small() };
        let [mut first, mut last] = [false, true].map(|stays| Subject::in_share(ExpertShare { stays, ..Default::default() }, &config, Precision::F64, 23, 15));
        let name = |subject: &Subject| subject.weights.table.spec(*subject.weights.table.completed().last().expect("some")).name.clone();
        assert_eq!(name(&first), "model.layers.0.input_layernorm.weight");
        assert_eq!(name(&last), format!("model.layers.{dense}.mlp.experts.gate_up_proj.weight"));
        // `run` holds the backward to the table's order.
        let context = first.context(0.3, 0.05);
        let ((losses, gradients), (same, theirs)) = (first.run(&context), last.run(&context));
        assert_eq!(losses, same);
        assert_eq!(gradients.len(), theirs.len());
        gradients.iter().for_each(|(name, gradient)| assert!(gradient.equal(&theirs[name]), "{name}"));
    }
}

#[test]
fn import_is_the_inverse_of_export() {
    let subject = Subject::new(&small(), Precision::F32, 31, 8);
    let exported = subject.export("round");
    let run_dir = scratch().join("oracle/imported");
    let imported = checkpoint::hf::import(&exported, &run_dir).expect("an import");
    let (manifest, tensors) = checkpoint::load(&imported, |_| true).expect("a checkpoint");
    assert_eq!(manifest.model, subject.config);
    let table = &subject.weights.table;
    assert_eq!(tensors.len(), table.specs().len());
    for id in table.ids() {
        let name = &table.spec(id).name;
        assert_eq!(distance(&tensors[&format!("weight/{name}")], subject.weights.get(id)), 0.0, "{name}");
    }
}
