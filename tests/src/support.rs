//! What the tests share: tolerances, small configs, random tensors.
use model::config::{ModelConfig, Scoring};
use tch::{Device, Kind, Tensor};

/// ‖a − b‖ / ‖b‖, with 0/0 = 0.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size(), "shapes differ");
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let (difference, norm) = ((&a - &b).norm().double_value(&[]), b.norm().double_value(&[]));
    if difference == 0.0 { 0.0 } else { difference / norm }
}

#[track_caller]
pub fn assert_close(name: &str, a: &Tensor, b: &Tensor, limit: f64) {
    let distance = distance(a, b);
    assert!(distance < limit, "{name}: {distance:.3e} is not below {limit:.0e}");
}

/// Normal numbers of a seed, without torch's process-wide generator.
pub fn random(seed: u64, shape: &[i64]) -> Tensor {
    let spec = model::params::ParamSpec { name: format!("random {seed}"), shape: shape.to_vec(), init: model::params::Init::Normal { std: 1.0 }, role: model::params::Role::Matrix };
    spec.initial(seed, Kind::Double)
}

/// `count` token ids below `vocab`.
pub fn tokens(seed: u64, shape: &[i64], vocab: i64) -> Tensor {
    (random(seed, shape) * 1000.0).abs().to_kind(Kind::Int64).remainder(vocab)
}

/// The smallest V3-shaped model: every kind of layer, no two widths alike.
pub fn small() -> ModelConfig {
    ModelConfig {
        vocab_size: 61,
        hidden_size: 24,
        intermediate_size: 40,
        moe_intermediate_size: 12,
        num_hidden_layers: 3,
        first_k_dense_replace: 1,
        num_attention_heads: 3,
        n_routed_experts: 8,
        n_shared_experts: 1,
        num_experts_per_tok: 3,
        n_group: 4,
        topk_group: 2,
        scoring_func: Scoring::Sigmoid,
        norm_topk_prob: true,
        routed_scaling_factor: 2.5,
        q_lora_rank: Some(14),
        kv_lora_rank: 10,
        qk_nope_head_dim: 8,
        qk_rope_head_dim: 4,
        v_head_dim: 6,
        rms_norm_eps: 1e-6,
        rope_theta: 10000.0,
        max_position_embeddings: 64,
        rope_scaling: None,
        num_nextn_predict_layers: 1,
        initializer_range: 0.2,
    }
}

pub const F64: (Kind, Device) = (Kind::Double, Device::Cpu);
