//! The shape of a model. Keys are DeepSeek's own, so a released config.json reads like ours.
use kernels::ops::rope::RopeScaling;
use serde::{Deserialize, Serialize};
use std::fmt::Display;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scoring {
    /// V3: choose by biased score, weigh by unbiased score; a group's score is the sum of its two best.
    Sigmoid,
    /// The 16B sibling: no bias; a group's score is its best expert.
    Softmax,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    pub vocab_size: i64,
    pub hidden_size: i64,
    /// Of the dense blocks.
    pub intermediate_size: i64,
    /// Of one expert.
    pub moe_intermediate_size: i64,
    pub num_hidden_layers: i64,
    /// The first so many blocks are dense.
    pub first_k_dense_replace: i64,
    pub num_attention_heads: i64,
    pub n_routed_experts: i64,
    pub n_shared_experts: i64,
    pub num_experts_per_tok: i64,
    #[serde(default = "one")]
    pub n_group: i64,
    #[serde(default = "one")]
    pub topk_group: i64,
    #[serde(default = "sigmoid")]
    pub scoring_func: Scoring,
    /// Weights of a token's experts sum to one; not with softmax scoring.
    #[serde(default = "yes")]
    pub norm_topk_prob: bool,
    #[serde(default = "unit")]
    pub routed_scaling_factor: f64,
    /// Absent: queries are projected straight from the hidden state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub q_lora_rank: Option<i64>,
    pub kv_lora_rank: i64,
    pub qk_nope_head_dim: i64,
    pub qk_rope_head_dim: i64,
    pub v_head_dim: i64,
    #[serde(default = "eps")]
    pub rms_norm_eps: f64,
    #[serde(default = "theta")]
    pub rope_theta: f64,
    /// Longest sequence the run may ask for.
    pub max_position_embeddings: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Depth of multi-token prediction: 0 or 1.
    #[serde(default)]
    pub num_nextn_predict_layers: i64,
    #[serde(default = "std")]
    pub initializer_range: f64,
}

fn one() -> i64 {
    1
}
fn unit() -> f64 {
    1.0
}
fn sigmoid() -> Scoring {
    Scoring::Sigmoid
}
fn yes() -> bool {
    true
}
fn eps() -> f64 {
    1e-6
}
fn theta() -> f64 {
    10000.0
}
fn std() -> f64 {
    0.006
}

#[derive(Debug, thiserror::Error, PartialEq)]
#[error("model.{key} = {value}: {limit}")]
pub struct ConfigError {
    pub key: String,
    pub value: String,
    pub limit: String,
}

fn check(ok: bool, key: &str, value: impl Display, limit: &str) -> Result<(), ConfigError> {
    if ok { Ok(()) } else { Err(ConfigError { key: key.into(), value: value.to_string(), limit: limit.into() }) }
}

/// Parameters counted from the fields alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterCount {
    /// All but the MTP module's own, expert biases included.
    pub main: i64,
    /// What one token's forward touches, without the embedding.
    pub active: i64,
    /// The MTP module's own (its embedding and head are the main ones).
    pub mtp: i64,
}

/// Of any size, of depth and of experts: more would be a slip, and whoever looks at each of them one by one comes to an end.
const MOST: i64 = 1 << 24;
const MOST_LAYERS: i64 = 1 << 12;
const MOST_EXPERTS: i64 = 1 << 16;
/// Their bytes, some for each, must stay numbers.
const MOST_PARAMETERS: i128 = 1 << 53;

impl ModelConfig {
    pub fn qk_head_dim(&self) -> i64 {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }
    pub fn is_moe(&self, layer: i64) -> bool {
        layer >= self.first_k_dense_replace
    }
    pub fn has_bias(&self) -> bool {
        self.scoring_func == Scoring::Sigmoid
    }

    /// Errors name the key, its value and the limit it broke.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_reals()?;
        for (key, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("v_head_dim", self.v_head_dim),
            ("n_group", self.n_group),
            ("max_position_embeddings", self.max_position_embeddings),
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1)),
        ] {
            check((1..=MOST).contains(&value), key, value, &format!("must be from 1 to {MOST}"))?;
        }
        check((1..=MOST_LAYERS).contains(&self.num_hidden_layers), "num_hidden_layers", self.num_hidden_layers, &format!("must be from 1 to {MOST_LAYERS}"))?;
        for (key, value) in [("n_routed_experts", self.n_routed_experts), ("n_shared_experts", self.n_shared_experts)] {
            check((0..=MOST_EXPERTS).contains(&value), key, value, &format!("must be from 0 to {MOST_EXPERTS}"))?;
        }
        let rope = self.qk_rope_head_dim;
        check((2..=MOST).contains(&rope) && rope % 2 == 0, "qk_rope_head_dim", rope, &format!("must be even, from 2 to {MOST}"))?;
        check((0..=1).contains(&self.num_nextn_predict_layers), "num_nextn_predict_layers", self.num_nextn_predict_layers, "must be 0 or 1")?;
        check(self.first_k_dense_replace >= 0, "first_k_dense_replace", self.first_k_dense_replace, "must not be negative")?;
        let [main, _, mtp] = self.counted();
        let parameters = format!("with the other sizes makes a model of {} parameters, at most {MOST_PARAMETERS}", main + mtp);
        check(main + mtp <= MOST_PARAMETERS, "hidden_size", self.hidden_size, &parameters)?;
        if self.first_k_dense_replace >= self.num_hidden_layers && self.num_nextn_predict_layers == 0 {
            return Ok(()); // a dense model has no experts to check
        }
        let experts = self.n_routed_experts;
        check(experts > 0, "n_routed_experts", experts, "must be positive")?;
        check(experts % self.n_group == 0, "n_group", self.n_group, &format!("must divide n_routed_experts = {experts}"))?;
        check((1..=self.n_group).contains(&self.topk_group), "topk_group", self.topk_group, &format!("must be between 1 and n_group = {}", self.n_group))?;
        let open = experts / self.n_group * self.topk_group;
        check((1..=open).contains(&self.num_experts_per_tok), "num_experts_per_tok", self.num_experts_per_tok, &format!("must be between 1 and the {open} experts of topk_group groups"))?;
        let renormalised = self.scoring_func == Scoring::Softmax && self.norm_topk_prob;
        check(!renormalised, "norm_topk_prob", self.norm_topk_prob, "must be false with softmax scoring: transformers' DeepSeek-V2 does not renormalise")?;
        let group_size = experts / self.n_group;
        check(self.scoring_func == Scoring::Softmax || group_size >= 2 || self.n_group == 1, "n_group", self.n_group, "sigmoid scoring sums a group's two best experts, so a group needs two")
    }

    fn validate_reals(&self) -> Result<(), ConfigError> {
        for (key, value) in [("rms_norm_eps", self.rms_norm_eps), ("routed_scaling_factor", self.routed_scaling_factor), ("initializer_range", self.initializer_range)] {
            check(value > 0.0 && value.is_finite(), key, value, "must be positive")?;
        }
        // YaRN divides by its logarithm.
        check(self.rope_theta > 1.0 && self.rope_theta.is_finite(), "rope_theta", self.rope_theta, "must be above 1")?;
        let Some(scaling) = &self.rope_scaling else { return Ok(()) };
        scaling.validate().map_err(|(key, value, limit)| ConfigError { key: format!("rope_scaling.{key}"), value: value.to_string(), limit })
    }

    /// A row of FP8 is a multiple of 16 bytes, and a weight is read along both its sides.
    pub fn validate_fp8(&self) -> Result<(), ConfigError> {
        for (key, value) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("q_lora_rank", self.q_lora_rank.unwrap_or(0)),
            ("kv_lora_rank", self.kv_lora_rank),
            ("qk_nope_head_dim", self.qk_nope_head_dim),
            ("qk_rope_head_dim", self.qk_rope_head_dim),
            ("v_head_dim", self.v_head_dim),
        ] {
            check(value % 16 == 0, key, value, "must be a multiple of 16 where run.precision = \"fp8\"")?;
        }
        Ok(())
    }

    /// What transformers asks of a config beside, though its own DeepSeek-V2 needs it no more than this model does.
    pub fn validate_export(&self) -> Result<(), ConfigError> {
        let heads = self.num_attention_heads;
        let fits = self.scoring_func == Scoring::Sigmoid || self.hidden_size % heads == 0;
        let limit = format!("must be a multiple of num_attention_heads = {heads} with softmax scoring: transformers takes no other config of DeepSeek-V2");
        check(fits, "hidden_size", self.hidden_size, &limit)
    }

    // In 128 bits, in which no product of sizes that are within their limits is too large.
    fn attention_parameters(&self) -> i128 {
        let [d, heads, qk_head, kv_rank] = [self.hidden_size, self.num_attention_heads, self.qk_head_dim(), self.kv_lora_rank].map(i128::from);
        let [nope, rope, v_head] = [self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim].map(i128::from);
        let query = match self.q_lora_rank.map(i128::from) {
            Some(rank) => d * rank + rank + rank * heads * qk_head,
            None => d * heads * qk_head,
        };
        query + d * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + v_head) + heads * v_head * d
    }

    /// (all, active) parameters of one block.
    fn block_parameters(&self, moe: bool) -> (i128, i128) {
        let [d, width, expert_width] = [self.hidden_size, self.intermediate_size, self.moe_intermediate_size].map(i128::from);
        let [routed, shared, chosen] = [self.n_routed_experts, self.n_shared_experts, self.num_experts_per_tok].map(i128::from);
        let rest = self.attention_parameters() + 2 * d;
        if !moe {
            let all = rest + 3 * d * width;
            return (all, all);
        }
        let expert = 3 * d * expert_width;
        let bias = if self.has_bias() { routed } else { 0 };
        let rest = rest + d * routed + shared * expert + bias;
        (rest + routed * expert, rest + chosen * expert)
    }

    /// As `ParameterCount`, of any config whose sizes are within their limits.
    fn counted(&self) -> [i128; 3] {
        let [d, vocab] = [self.hidden_size, self.vocab_size].map(i128::from);
        let (mut main, mut active) = (2 * vocab * d + d, vocab * d + d);
        for layer in 0..self.num_hidden_layers {
            let block = self.block_parameters(self.is_moe(layer));
            (main, active) = (main + block.0, active + block.1);
        }
        let mtp = if self.num_nextn_predict_layers == 1 { self.block_parameters(true).0 + 2 * d * d + 3 * d } else { 0 };
        [main, active, mtp]
    }

    /// Of a config that `validate` has passed.
    pub fn count(&self) -> ParameterCount {
        let [main, active, mtp] = self.counted().map(|count| i64::try_from(count).expect("validate has a limit"));
        ParameterCount { main, active, mtp }
    }
}
