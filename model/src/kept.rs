//! What forward will keep of a micro-batch for backward, from shapes alone: the parts and bytes of `saved::bytes`.
//!
//! Legend: B sequences, L positions, T = B·L, D hidden size, K experts a token, V rows that arrive from all ranks, R rows at
//! the local experts, X local experts.
use crate::saved::{EXPERTS_ROWS, LOGITS, PROBABILITIES, PUT_OFF};
use crate::{ModelConfig, Recompute, StagePart};
use kernels::Precision;
use kernels::fp8::{TILE, padded_rows, round_up};
use kernels::ops::attention;
use std::collections::BTreeMap;

/// How a stage runs.
#[derive(Clone, Copy, Debug)]
pub struct How {
    pub precision: Precision,
    pub recompute: Recompute,
    /// B and L of a micro-batch.
    pub sequences: i64,
    pub length: i64,
    /// Ranks that share out the experts.
    pub ep: i64,
    /// The fused attention, which GPUs have, keeps its output; the reference keeps probabilities, too.
    pub on_gpu: bool,
    /// Attention stays within documents: there the fused one takes those of any length, and the reference keeps no more than
    /// of sequences that are one document.
    pub documents: bool,
    /// Rows at this rank's experts over an even share.
    pub load: f64,
}

impl How {
    fn loaded(&self, rows: f64) -> i64 {
        (rows * self.load).ceil() as i64
    }
}

pub type Parts = BTreeMap<&'static str, i64>;

/// Bytes by part that the stage keeps of one micro-batch.
pub fn kept(config: &ModelConfig, part: &StagePart, how: How) -> Parts {
    let mut sums = Sums { config, how, parts: Parts::new() };
    let (tokens, inner, d) = (how.sequences * how.length, how.sequences * (how.length - 1), config.hidden_size);
    if part.first {
        sums.add("tokens", 8 * tokens);
    }
    part.layers.clone().for_each(|layer| sums.block(config.is_moe(layer), how.length));
    if part.last {
        sums.norm("norms' inputs", tokens, d);
        sums.head(tokens);
        if config.num_nextn_predict_layers == 1 {
            sums.add("tokens", 8 * inner);
            (0..3).for_each(|_| sums.norm("norms' inputs", inner, d));
            if how.sequences == 1 {
                sums.own("head's input", -tokens, d); // its first positions are one of these inputs: no copy
            }
            sums.own("MTP's projection", inner, 2 * d);
            sums.block(true, how.length - 1);
            sums.head(inner);
        }
    }
    sums.parts
}

/// Bytes of what a split backward of one micro-batch puts off (`flow::Work`), without the heads', which it does not.
pub fn put_off(config: &ModelConfig, part: &StagePart, how: How) -> i64 {
    let mut sums = Sums { config, how, parts: Parts::new() };
    let (tokens, inner, d) = (how.sequences * how.length, how.sequences * (how.length - 1), config.hidden_size);
    let embedding = |sums: &mut Sums, tokens: i64| {
        sums.add(PUT_OFF, 8 * tokens);
        sums.own(PUT_OFF, tokens, d);
    };
    part.layers.clone().for_each(|layer| sums.block_put_off(config.is_moe(layer), tokens));
    if part.first {
        embedding(&mut sums, tokens);
    }
    if part.last {
        sums.vectors(&[d]);
        if config.num_nextn_predict_layers == 1 {
            sums.vectors(&[d, d]);
            sums.own(PUT_OFF, inner, 3 * d);
            sums.block_put_off(true, inner);
            embedding(&mut sums, inner);
        }
    }
    sums.parts.values().sum()
}

/// Rows that reach one rank for each of its own tokens, V/T: one for every rank that holds an expert of the token's.
fn arriving(config: &ModelConfig, ep: i64) -> f64 {
    let groups = if config.n_group > 1 && ep % config.n_group == 0 { config.n_group } else { 1 };
    let open = if groups > 1 { config.topk_group } else { 1 }; // groups that a token may choose in
    let (candidates, local, chosen) = (config.n_routed_experts / groups * open, config.n_routed_experts / ep, config.num_experts_per_tok);
    let none: f64 = (0..chosen).map(|i| (candidates - local - i).max(0) as f64 / (candidates - i) as f64).product();
    ep as f64 * (open as f64 / groups as f64) * (1.0 - none)
}

struct Sums<'a> {
    config: &'a ModelConfig,
    how: How,
    parts: Parts,
}

impl Sums<'_> {
    fn add(&mut self, part: &'static str, bytes: i64) {
        *self.parts.entry(part).or_default() += bytes;
    }

    fn fp8(&self) -> bool {
        self.how.precision == Precision::Fp8
    }

    /// Of an element of the run's own kind.
    fn element(&self) -> i64 {
        self.how.precision.compute().elt_size_in_bytes() as i64
    }

    /// Of one that is never below FP32.
    fn wide(&self) -> i64 {
        self.how.precision.master().elt_size_in_bytes() as i64
    }

    fn own(&mut self, part: &'static str, rows: i64, width: i64) {
        self.add(part, rows * width * self.element());
    }

    /// In FP8 with a scale for each 1×128 tile, else as it is.
    fn rows(&mut self, part: &'static str, rows: i64, width: i64) {
        match self.fp8() {
            true => self.add(part, rows * width + 4 * tiles(width) * round_up(rows, 4)),
            false => self.own(part, rows, width),
        }
    }

    /// What Wgrad reads of rows in so many groups.
    fn for_weight(&mut self, part: &'static str, rows: i64, width: i64, groups: i64) {
        let padded = padded_rows(rows, groups);
        match self.fp8() {
            true => self.add(part, padded * width + 4 * padded / TILE * round_up(width, 4)),
            false => self.own(part, rows, width),
        }
    }

    fn norm(&mut self, part: &'static str, rows: i64, width: i64) {
        self.own(part, rows, width);
        self.add(part, rows * self.wide());
    }

    fn head(&mut self, targets: i64) {
        self.own("head's input", targets, self.config.hidden_size);
        self.own(LOGITS, targets, self.config.vocab_size);
    }

    fn block(&mut self, moe: bool, length: i64) {
        let (config, how) = (self.config, self.how);
        let (tokens, d) = (how.sequences * length, config.hidden_size);
        (0..2).for_each(|_| self.norm("norms' inputs", tokens, d));
        if !how.recompute.rms_norm {
            self.for_weight("norms' outputs", tokens, d, 1);
            match moe {
                true => self.own("norms' outputs", tokens, d), // as the gate reads it
                false => self.for_weight("norms' outputs", tokens, d, 1),
            }
        }
        self.attention(tokens, length);
        match moe {
            true => self.moe(tokens),
            false => self.activation("dense gate and up", tokens, config.intermediate_size, 1),
        }
    }

    fn attention(&mut self, tokens: i64, length: i64) {
        let (config, Recompute { rms_norm, mla_up_projection, .. }) = (self.config, self.how.recompute);
        let (heads, head, value) = (config.num_attention_heads, config.qk_head_dim(), config.v_head_dim);
        for width in config.q_lora_rank.into_iter().chain([config.kv_lora_rank]) {
            self.norm("latents", tokens, width);
            if !rms_norm {
                self.for_weight("latents", tokens, width, 1);
                if mla_up_projection && self.fp8() {
                    self.rows("latents", tokens, width);
                }
            }
        }
        self.own("latents", tokens, config.qk_rope_head_dim);
        if config.q_lora_rank.is_none() || !mla_up_projection {
            self.own("queries, keys and values", tokens, heads * head);
        }
        if !mla_up_projection {
            self.own("queries, keys and values", tokens, heads * (head + value));
        }
        self.own("attention's output", tokens, heads * value);
        let longest = if self.how.documents { attention::lengthened(length) } else { length };
        let fused = attention::fused(self.how.precision.compute(), (head, value), longest);
        match self.how.on_gpu && fused {
            true => self.add("attention's output", 4 * tokens * heads), // the logarithms of the sums
            false => self.own(PROBABILITIES, tokens, heads * length),
        }
    }

    /// Of SwiGLU: its input, by rows, and its output for the down-projection's Wgrad.
    fn activation(&mut self, part: &'static str, rows: i64, width: i64, groups: i64) {
        (0..2).for_each(|_| self.rows(part, rows, width));
        if !self.how.recompute.swiglu {
            self.for_weight(part, rows, width, groups);
        }
    }

    /// Gradients of norms' weights.
    fn vectors(&mut self, widths: &[i64]) {
        self.add(PUT_OFF, widths.iter().sum::<i64>() * self.wide());
    }

    /// Both sides of the weights' gradients of linears, each a width.
    fn sides(&mut self, rows: i64, widths: &[i64], groups: i64) {
        widths.iter().for_each(|&width| self.for_weight(PUT_OFF, rows, width, groups));
    }

    fn block_put_off(&mut self, moe: bool, tokens: i64) {
        let (config, how) = (self.config, self.how);
        let (d, heads, kv, value) = (config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.v_head_dim);
        let queries = heads * config.qk_head_dim();
        self.vectors(&[d, d, kv]);
        // Queries and the latent read the same.
        self.sides(tokens, &[d, kv + config.qk_rope_head_dim, heads * (config.qk_nope_head_dim + value), kv, d, heads * value], 1);
        match config.q_lora_rank {
            None => self.sides(tokens, &[queries], 1),
            Some(latent) => {
                self.vectors(&[latent]);
                self.sides(tokens, &[latent, queries, latent], 1);
            }
        }
        if !moe {
            return self.sides(tokens, &[2 * config.intermediate_size, d, d, config.intermediate_size], 1);
        }
        let (width, local) = (config.moe_intermediate_size, config.n_routed_experts / how.ep);
        self.add(PUT_OFF, tokens * config.n_routed_experts * self.wide() + 4 * local);
        self.own(PUT_OFF, tokens, d); // as the gate reads it
        let rows = tokens * config.num_experts_per_tok;
        let rows = if how.ep == 1 { rows } else { how.loaded(rows as f64) };
        self.sides(rows, &[2 * width, d, d, width], local);
        if config.n_shared_experts > 0 {
            let width = config.n_shared_experts * width;
            self.sides(tokens, &[2 * width, d, d, width], 1);
        }
    }

    fn moe(&mut self, tokens: i64) {
        let (config, how) = (self.config, self.how);
        let (experts, chosen) = (config.n_routed_experts, config.num_experts_per_tok);
        let (choices, local) = (tokens * chosen, experts / how.ep);
        let arrived = if how.ep == 1 { tokens } else { how.loaded(tokens as f64 * arriving(config, how.ep)) };
        let rows = if how.ep == 1 { choices } else { how.loaded(choices as f64) };
        self.add("routes", (tokens + how.sequences) * experts * self.wide() + 8 * choices);
        self.add("routes", 4 * (rows + arrived * chosen)); // the places of the local rows
        if how.ep > 1 {
            self.add("routes", 4 * (arrived * (1 + chosen) + tokens * how.ep)); // and of those sent
        }
        match self.fp8() {
            true => self.add(EXPERTS_ROWS, arrived * (config.hidden_size + 4 * tiles(config.hidden_size))),
            false => self.own(EXPERTS_ROWS, rows, config.hidden_size),
        }
        self.add(EXPERTS_ROWS, 4 * local + rows * self.wide());
        self.activation("experts' gate and up", rows, config.moe_intermediate_size, local);
        if config.n_shared_experts > 0 {
            self.activation("shared experts' gate and up", tokens, config.n_shared_experts * config.moe_intermediate_size, 1);
        }
    }
}

fn tiles(width: i64) -> i64 {
    (width + TILE - 1) / TILE
}
