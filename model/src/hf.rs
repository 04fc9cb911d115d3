//! The released layout: which of its tensors make up one of ours. Ours pack a SwiGLU's gate and up, and all
//! experts of a layer, in one tensor; the MTP module repeats the embedding and the head.
use crate::config::{ModelConfig, Scoring};
use crate::params::ParamSpec;
use kernels::ops::rope::RopeScaling;
use serde::de::Error;
use serde_json::{Value, json};

/// A released tensor as a part of ours: `expert` picks dim 0, then `rows` a range of the matrix's rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    pub name: String,
    pub expert: Option<i64>,
    pub rows: Option<(i64, i64)>,
}

/// The released tensors that one of ours consists of.
pub fn pieces(spec: &ParamSpec) -> Vec<Piece> {
    let whole = |name: String, expert| Piece { name, expert, rows: None };
    let halves = |prefix: &str, expert, rows: i64| {
        let half = |name: &str, start| Piece { name: format!("{prefix}.{name}.weight"), expert, rows: Some((start, rows / 2)) };
        [half("gate_proj", 0), half("up_proj", rows / 2)]
    };
    if let Some(prefix) = spec.name.strip_suffix(".mlp.experts.gate_up_proj.weight") {
        return (0..spec.shape[0]).flat_map(|e| halves(&format!("{prefix}.mlp.experts.{e}"), Some(e), spec.shape[1])).collect();
    }
    if let Some(prefix) = spec.name.strip_suffix(".mlp.experts.down_proj.weight") {
        return (0..spec.shape[0]).map(|e| whole(format!("{prefix}.mlp.experts.{e}.down_proj.weight"), Some(e))).collect();
    }
    match spec.name.strip_suffix(".gate_up_proj.weight") {
        Some(prefix) => halves(prefix, None, spec.shape[0]).to_vec(),
        None => vec![whole(spec.name.clone(), None)],
    }
}

/// Released names that repeat one of our tensors: (name, ours).
pub fn copies(config: &ModelConfig) -> Vec<(String, &'static str)> {
    if config.num_nextn_predict_layers == 0 {
        return Vec::new();
    }
    let prefix = format!("model.layers.{}", config.num_hidden_layers);
    vec![(format!("{prefix}.embed_tokens.weight"), "model.embed_tokens.weight"), (format!("{prefix}.shared_head.head.weight"), "lm_head.weight")]
}

/// config.json as transformers reads it.
pub fn config_json(config: &ModelConfig, torch_dtype: &str) -> Value {
    let sigmoid = config.scoring_func == Scoring::Sigmoid;
    let (architecture, model_type) = if sigmoid { ("DeepseekV3ForCausalLM", "deepseek_v3") } else { ("DeepseekV2ForCausalLM", "deepseek_v2") };
    let topk_method = match (sigmoid, config.n_group) {
        (true, _) => "noaux_tc",
        (false, 1) => "greedy",
        (false, _) => "group_limited_greedy",
    };
    let mut value = serde_json::to_value(config).expect("a config is JSON");
    let keys = value.as_object_mut().expect("an object");
    for (key, extra) in [
        ("architectures", json!([architecture])),
        ("model_type", json!(model_type)),
        ("topk_method", json!(topk_method)),
        ("dtype", json!(torch_dtype)),
        ("torch_dtype", json!(torch_dtype)),
        ("attention_dropout", json!(0.0)),
        ("q_lora_rank", json!(config.q_lora_rank)),
        ("num_key_value_heads", json!(config.num_attention_heads)),
        ("head_dim", json!(config.qk_rope_head_dim)),
        ("hidden_act", json!("silu")),
        ("moe_layer_freq", json!(1)),
        ("attention_bias", json!(false)),
        ("tie_word_embeddings", json!(false)),
        ("rope_interleave", json!(true)),
        ("use_cache", json!(true)),
    ] {
        keys.insert(key.into(), extra);
    }
    match keys.get_mut("rope_scaling") {
        Some(scaling) => {
            // Older transformers take the factor from what this is divided by the original length.
            let scaled = scaling["factor"].as_f64().unwrap_or(1.0) * scaling["original_max_position_embeddings"].as_f64().unwrap_or(0.0);
            let longest = config.max_position_embeddings.max(scaled.round() as i64);
            scaling["type"] = json!("yarn");
            scaling["rope_type"] = json!("yarn");
            // transformers divides the two itself, but takes a 0 for absent.
            if let Some(yarn) = config.rope_scaling.as_ref().filter(|yarn| yarn.mscale == 0.0 || yarn.mscale_all_dim == 0.0) {
                scaling["attention_factor"] = json!(yarn.table_scale());
            }
            keys.insert("max_position_embeddings".into(), json!(longest));
        }
        None => {
            keys.insert("rope_scaling".into(), Value::Null);
        }
    }
    value
}

/// The inverse of `config_json`: DeepSeek's keys out of a released config.json, or out of one that transformers 5 has written,
/// which keeps RoPE's under `rope_parameters`. What another model would be is refused, everything else ignored.
pub fn parse_config(value: &Value) -> Result<ModelConfig, serde_json::Error> {
    const KEYS: [&str; 25] = [
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "first_k_dense_replace", "num_attention_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
        "n_group", "topk_group", "scoring_func", "norm_topk_prob", "routed_scaling_factor", "q_lora_rank",
        "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rms_norm_eps", "rope_theta",
        "max_position_embeddings", "num_nextn_predict_layers", "initializer_range",
    ];
    const YARN: [&str; 6] = ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"];
    let pick = |from: &Value, keys: &[&str]| -> serde_json::Map<String, Value> {
        keys.iter().filter_map(|&key| from.get(key).filter(|value| !value.is_null()).map(|value| (key.to_string(), value.clone()))).collect()
    };
    for (key, only) in [("attention_bias", json!(false)), ("rope_interleave", json!(true)), ("tie_word_embeddings", json!(false)), ("moe_layer_freq", json!(1)), ("hidden_act", json!("silu")), ("mlp_bias", json!(false))] {
        if let Some(other) = value.get(key).filter(|&given| !given.is_null() && *given != only) {
            return Err(serde_json::Error::custom(format!("{key} = {other}: only {only} is implemented")));
        }
    }
    let mut ours = pick(value, &KEYS);
    kind_of_model(value, &mut ours)?;
    let rope = ["rope_parameters", "rope_scaling"].iter().find_map(|&key| value.get(key).filter(|rope| rope.is_object()));
    if let Some(theta) = rope.and_then(|rope| rope.get("rope_theta")) {
        ours.insert("rope_theta".into(), theta.clone());
    }
    let kind = rope.and_then(|rope| rope.get("rope_type").or(rope.get("type"))).and_then(Value::as_str).unwrap_or("default");
    if !["default", "yarn"].contains(&kind) {
        return Err(serde_json::Error::custom(format!("rope_type = {kind:?}: only \"yarn\" and \"default\" are implemented")));
    }
    if let Some(scaling) = rope.filter(|_| kind == "yarn") {
        let mut yarn = pick(scaling, &YARN);
        // Released code takes an absent mscale_all_dim as 0; our own configs default to the report's 1.
        yarn.entry("mscale_all_dim").or_insert(json!(0.0));
        let own: RopeScaling = serde_json::from_value(Value::Object(yarn.clone()))?;
        check_rope(scaling, own.table_scale())?;
        ours.insert("rope_scaling".into(), Value::Object(yarn));
    }
    serde_json::from_value(Value::Object(ours))
}

/// What transformers does not write of a class, and what of another class would be read as something else.
fn kind_of_model(value: &Value, ours: &mut serde_json::Map<String, Value>) -> Result<(), serde_json::Error> {
    let missing: Vec<(&str, Value)> = match (value["model_type"].as_str(), value["topk_method"].as_str()) {
        (None, _) => Vec::new(),
        // Kimi K2 is V3's architecture under another name.
        (Some("deepseek_v3" | "kimi_k2"), None | Some("noaux_tc")) => vec![("n_group", json!(8)), ("topk_group", json!(4)), ("routed_scaling_factor", json!(2.5))],
        (Some("deepseek_v2"), method @ (None | Some("greedy" | "group_limited_greedy"))) => {
            if method != Some("group_limited_greedy") {
                // It has groups, and does not look at them.
                ours.extend(["n_group", "topk_group"].map(|key| (key.to_string(), json!(1))));
            }
            vec![("scoring_func", json!("softmax")), ("norm_topk_prob", json!(false))]
        }
        (Some(kind @ ("deepseek_v2" | "deepseek_v3" | "kimi_k2")), Some(method)) => {
            let known = if kind == "deepseek_v2" { "\"greedy\" or \"group_limited_greedy\"" } else { "\"noaux_tc\"" };
            return Err(serde_json::Error::custom(format!("topk_method = {method:?}: only {known} is implemented for {kind}")));
        }
        (Some(other), _) => return Err(serde_json::Error::custom(format!("model_type = {other:?}: only \"deepseek_v3\", \"kimi_k2\" or \"deepseek_v2\" is implemented"))),
    };
    for (key, default) in missing {
        ours.entry(key).or_insert(default);
    }
    match &value["quantization_config"]["weight_block_size"] {
        Value::Null => Ok(()),
        blocks if *blocks == json!([128, 128]) => Ok(()),
        other => Err(serde_json::Error::custom(format!("weight_block_size = {other}: only [128,128] is implemented"))),
    }
}

/// What transformers' YaRN knows besides, where it is not what ours does.
fn check_rope(scaling: &Value, table_scale: f64) -> Result<(), serde_json::Error> {
    if let Some(factor) = scaling.get("attention_factor").and_then(Value::as_f64).filter(|factor| (factor / table_scale - 1.0).abs() > 1e-6) {
        return Err(serde_json::Error::custom(format!("attention_factor = {factor}: only {table_scale}, by mscale and mscale_all_dim, is implemented")));
    }
    match scaling.get("truncate") {
        Some(Value::Bool(false)) => Err(serde_json::Error::custom("truncate = false: only true is implemented")),
        _ => Ok(()),
    }
}
