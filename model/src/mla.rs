//! Multi-head latent attention (report §2.1.1), the training form: every head gets its own keys and values from
//! the latent, and one rotary key is shared by all heads.
//!
//! Legend: B sequences, S positions, T = B·S, D hidden size, H heads, N no-position width, R rotary width,
//! Dv value width, Lq / Lkv latent widths.
use crate::linear::{Linear, LinearWork};
use crate::norm::{NormSaved, RmsNorm};
use crate::operand::Operand;
use crate::saved::{PROBABILITIES, PUT_OFF, See};
use crate::{Grads, Layer, ModelConfig, ParamId, ParamTable, Recompute, Weights};
use kernels::Precision;
use kernels::fp8::ScaleRule;
use kernels::ops::mla_heads::{self, Widths};
use kernels::ops::quantise::{self, Want};
use kernels::ops::{attention, rope::RopeTable};
use std::rc::Rc;
use tch::Tensor;

#[derive(Debug)]
pub struct Mla {
    query: Query,
    kv_a: Linear, // [Lkv + R, D]
    kv_norm: RmsNorm,
    kv_b: Linear, // [H (N + Dv), Lkv]
    out: Linear,  // [D, H Dv]
    heads: i64,
    nope: i64,
    rotary: i64,
    value: i64,
    latent: i64,
    recompute: Recompute,
}

#[derive(Debug)]
enum Query {
    Direct(Linear), // [H (N + R), D]
    Latent { a: Linear, norm: RmsNorm, b: Linear },
}

/// The latents' norms have the released code's eps whatever rms_norm_eps says.
const LATENT_EPS: f64 = 1e-6;

/// Positions 0..S of every sequence, and the softmax scale that goes with the table.
#[derive(Clone)]
pub struct Positions {
    pub table: Rc<RopeTable>,
    pub softmax_scale: f64,
    /// As `MicroBatch` has them.
    pub documents: Option<Rc<Vec<Vec<i64>>>>,
}

pub struct MlaIn {
    pub x: Operand, // [T, D]
    pub sequences: i64,
    pub positions: Positions,
}

pub struct MlaGrad {
    pub dy: Tensor, // [T, D]
    /// The input again, which its maker kept or made again.
    pub x: Operand,
}

/// What is None is made again in backward.
pub struct MlaSaved {
    query: QuerySaved,
    kv_norm: NormSaved,
    kv_latent: Option<Operand>,   // normed, [T, Lkv]
    rotary_key: Tensor,           // [T, R]
    kv: Option<(Tensor, Tensor)>, // [B, H, S, N + R] and [B, H, S, Dv]
    attention: attention::Saved,
    /// [T, H Dv], in FP8 runs rounded to E5M6. None: attention's own output has it.
    context: Option<Tensor>,
    sequences: i64,
    positions: Positions,
}

enum QuerySaved {
    Direct { q: Tensor }, // [B, H, S, N + R]
    Latent { norm: NormSaved, latent: Option<Operand>, q: Option<Tensor> },
}

impl MlaSaved {
    pub(crate) fn each(&self, see: See) {
        let q = match &self.query {
            QuerySaved::Direct { q } => Some(q),
            QuerySaved::Latent { norm, latent, q } => {
                norm.each("latents", see);
                latent.iter().for_each(|latent| latent.each("latents", see));
                q.as_ref()
            }
        };
        self.kv_norm.each("latents", see);
        self.kv_latent.iter().for_each(|latent| latent.each("latents", see));
        see("latents", &self.rotary_key);
        q.into_iter().chain(self.kv.iter().flat_map(|(k, v)| [k, v])).for_each(|tensor| see("queries, keys and values", tensor));
        each_of_attention(&self.attention, see);
        self.context.iter().for_each(|context| see("attention's output", context));
    }
}

pub struct MlaWork {
    query: QueryWork,
    kv_a: LinearWork,
    kv_norm: Tensor,
    kv_b: LinearWork,
    out: LinearWork,
}

enum QueryWork {
    Direct(LinearWork),
    Latent { a: LinearWork, norm: Tensor, b: LinearWork },
}

impl MlaWork {
    pub(crate) fn each(&self, see: See) {
        see(PUT_OFF, &self.kv_norm);
        [&self.kv_a, &self.kv_b, &self.out].into_iter().for_each(|linear| linear.each(see));
        match &self.query {
            QueryWork::Direct(linear) => linear.each(see),
            QueryWork::Latent { a, norm, b } => {
                see(PUT_OFF, norm);
                [a, b].into_iter().for_each(|linear| linear.each(see));
            }
        }
    }
}

impl Mla {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, prefix: &str) -> Self {
        let (d, heads, latent, eps) = (config.hidden_size, config.num_attention_heads, config.kv_lora_rank, LATENT_EPS);
        let queries = heads * config.qk_head_dim();
        let query = match config.q_lora_rank {
            None => Query::Direct(Linear { weight: table.matrix(format!("{prefix}.q_proj.weight"), &[queries, d], config) }),
            Some(rank) => Query::Latent {
                a: Linear { weight: table.matrix(format!("{prefix}.q_a_proj.weight"), &[rank, d], config) },
                norm: RmsNorm { weight: table.norm(format!("{prefix}.q_a_layernorm.weight"), rank), eps },
                b: Linear { weight: table.matrix(format!("{prefix}.q_b_proj.weight"), &[queries, rank], config) },
            },
        };
        let kv_a = table.matrix(format!("{prefix}.kv_a_proj_with_mqa.weight"), &[latent + config.qk_rope_head_dim, d], config);
        let kv_norm = table.norm(format!("{prefix}.kv_a_layernorm.weight"), latent);
        let kv_b = table.matrix(format!("{prefix}.kv_b_proj.weight"), &[heads * (config.qk_nope_head_dim + config.v_head_dim), latent], config);
        let out = table.matrix(format!("{prefix}.o_proj.weight"), &[d, heads * config.v_head_dim], config);
        Mla {
            query,
            kv_a: Linear { weight: kv_a },
            kv_norm: RmsNorm { weight: kv_norm, eps },
            kv_b: Linear { weight: kv_b },
            out: Linear { weight: out },
            heads,
            nope: config.qk_nope_head_dim,
            rotary: config.qk_rope_head_dim,
            value: config.v_head_dim,
            latent,
            recompute: table.recompute,
        }
    }

    /// Of its input.
    pub fn readers(&self) -> [ParamId; 2] {
        let (Query::Direct(query) | Query::Latent { a: query, .. }) = &self.query;
        [query.weight, self.kv_a.weight]
    }

    fn widths(&self) -> Widths {
        Widths { heads: self.heads, nope: self.nope, rotary: self.rotary, value: self.value }
    }

    /// x · Wᵀ [T, H (N + R)] → [B, H, S, N + R], the last R rotated.
    fn queries(&self, w: &Weights, linear: &Linear, x: &Operand, sequences: i64, positions: &Positions) -> Tensor {
        mla_heads::queries(x.forward(w, linear.weight), sequences, &positions.table, self.widths())
    }

    /// The latent [T, Lkv] and the shared rotary key [T, R] → k [B, H, S, N + R], v [B, H, S, Dv].
    fn keys_and_values(&self, w: &Weights, latent: &Operand, rotary_key: &Tensor, sequences: i64, positions: &Positions) -> (Tensor, Tensor) {
        mla_heads::keys_and_values(&latent.forward(w, self.kv_b.weight), rotary_key, sequences, &positions.table, self.widths())
    }

    /// [B, H, S, Dv] → [T, H Dv].
    fn tokens(&self, context: &Tensor) -> Tensor {
        context.transpose(1, 2).reshape([-1, self.heads * self.value])
    }

    /// A latent as backward reads it: for Wgrad and, where the up-projection is made again, for Fprop.
    fn latent_again(&self, w: &Weights, norm: &RmsNorm, reader: &Linear, saved: &NormSaved, kept: Option<Operand>) -> Operand {
        let want = if self.recompute.mla_up_projection { Want::BOTH } else { Want::COLUMNS };
        kept.unwrap_or_else(|| norm.operand(w, saved, want, &[reader.weight]))
    }

    /// [T, H Dv]; scales are powers of two, so that quantising it again by columns loses nothing more (report §3.3.3).
    fn out_in(&self, w: &Weights, context: Tensor, want: Want) -> Operand {
        Operand::with_rule(w, context, want, ScaleRule::PowerOfTwo, &[self.out.weight])
    }

    fn keep_latent(&self, latent: Operand) -> Option<Operand> {
        match (self.recompute.rms_norm, self.recompute.mla_up_projection) {
            (true, _) => None,
            (false, true) => Some(latent),
            (false, false) => Some(latent.for_weight()),
        }
    }
}

fn each_of_attention(saved: &attention::Saved, see: See) {
    match saved {
        attention::Saved::Probabilities(probabilities) => see(PROBABILITIES, probabilities),
        attention::Saved::Fused(made) | attention::Saved::FusedDocuments(_, made) => [&made.out, &made.log_sum_exp].into_iter().for_each(|tensor| see("attention's output", tensor)),
        attention::Saved::Documents(list) => list.iter().for_each(|(_, saved)| each_of_attention(saved, see)),
    }
}

/// What the linear after attention keeps of its input (report §3.3.3).
fn rounded(precision: Precision, context: Tensor) -> Tensor {
    if precision == Precision::Fp8 { quantise::round_e5m6(&context) } else { context }
}

impl Layer for Mla {
    type In = MlaIn;
    type Out = Tensor; // [T, D]
    type DOut = MlaGrad;
    type DIn = Tensor;
    type Saved = MlaSaved;
    type WeightWork = MlaWork;

    fn forward(&self, w: &Weights, MlaIn { x, sequences, positions }: MlaIn) -> (Tensor, MlaSaved) {
        let keep = !self.recompute.mla_up_projection;
        let (q, query) = match &self.query {
            Query::Direct(linear) => {
                let q = self.queries(w, linear, &x, sequences, &positions);
                (q.shallow_clone(), QuerySaved::Direct { q })
            }
            Query::Latent { a, norm, b } => {
                let (saved, latent) = norm.begin(w, x.forward(w, a.weight), self.recompute.normed(), &[b.weight]);
                let q = self.queries(w, b, &latent, sequences, &positions);
                let kept = keep.then(|| q.shallow_clone());
                (q, QuerySaved::Latent { norm: saved, latent: self.keep_latent(latent), q: kept })
            }
        };
        let compressed = x.forward(w, self.kv_a.weight); // [T, Lkv + R]
        let parts = compressed.split_with_sizes([self.latent, self.rotary], 1);
        let (kv_norm, latent) = self.kv_norm.begin(w, parts[0].contiguous(), self.recompute.normed(), &[self.kv_b.weight]);
        let rotary_key = parts[1].contiguous();
        let (k, v) = self.keys_and_values(w, &latent, &rotary_key, sequences, &positions);
        let scale = positions.softmax_scale;
        let (context, attention) = match &positions.documents {
            None => attention::forward(&q, &k, &v, scale), // [B, H, S, Dv]
            Some(documents) => attention::forward_within(documents, [&q, &k, &v], scale),
        };
        let context = self.tokens(&context);
        let out_in = self.out_in(w, context.shallow_clone(), Want::ROWS);
        let context = attention.out().is_none().then(|| rounded(w.precision, context));
        let saved = MlaSaved {
            query,
            kv_norm,
            kv_latent: self.keep_latent(latent),
            rotary_key,
            kv: keep.then_some((k, v)),
            attention,
            context,
            sequences,
            positions,
        };
        (out_in.forward(w, self.out.weight), saved)
    }

    fn backward_input(&self, w: &Weights, MlaGrad { dy, x }: MlaGrad, s: MlaSaved) -> (Tensor, MlaWork) {
        let (sequences, positions, table) = (s.sequences, &s.positions, &s.positions.table);
        let context = s.context.unwrap_or_else(|| rounded(w.precision, self.tokens(&s.attention.out().expect("one of the two is kept"))));
        let out_in = self.out_in(w, context, Want::COLUMNS);
        let (dcontext, out) = self.out.backward_input(w, dy, out_in);
        let dcontext = dcontext.view([sequences, -1, self.heads, self.value]).transpose(1, 2);
        let (q, query) = match (&self.query, s.query) {
            (Query::Direct(_), QuerySaved::Direct { q }) => (q, None),
            (Query::Latent { norm, b, .. }, QuerySaved::Latent { norm: norm_saved, latent, q }) => {
                let latent = self.latent_again(w, norm, b, &norm_saved, latent);
                let q = q.unwrap_or_else(|| self.queries(w, b, &latent, sequences, positions));
                (q, Some((norm_saved, latent)))
            }
            _ => unreachable!("forward saved the other form"),
        };
        let kv_latent = self.latent_again(w, &self.kv_norm, &self.kv_b, &s.kv_norm, s.kv_latent);
        let (k, v) = s.kv.unwrap_or_else(|| self.keys_and_values(w, &kv_latent, &s.rotary_key, sequences, positions));
        let (dq, dk, dv) = attention::backward(&dcontext, &q, &k, &v, &s.attention, positions.softmax_scale);

        let (dkv, drotary) = mla_heads::keys_and_values_backward(&dk, &dv, table, self.widths());
        let (dlatent, kv_b) = self.kv_b.backward_input(w, dkv, kv_latent.for_weight());
        let (dlatent, kv_norm) = self.kv_norm.backward_input(w, dlatent, s.kv_norm);
        let (dx_kv, kv_a) = self.kv_a.backward_input(w, Tensor::cat(&[dlatent, drotary], 1), x.share());

        let dq = mla_heads::queries_backward(dq, table, self.widths());
        let (dx_q, query) = match (&self.query, query) {
            (Query::Latent { a, norm, b }, Some((norm_saved, latent))) => {
                let (dlatent, b) = b.backward_input(w, dq, latent.for_weight());
                let (dlatent, norm) = norm.backward_input(w, dlatent, norm_saved);
                let (dx, a) = a.backward_input(w, dlatent, x);
                (dx, QueryWork::Latent { a, norm, b })
            }
            (Query::Direct(linear), _) => {
                let (dx, work) = linear.backward_input(w, dq, x);
                (dx, QueryWork::Direct(work))
            }
            _ => unreachable!("a latent was made again above"),
        };
        (dx_kv + dx_q, MlaWork { query, kv_a, kv_norm, kv_b, out })
    }

    fn backward_weight(&self, work: MlaWork, grads: &mut Grads) {
        self.out.backward_weight(work.out, grads);
        self.kv_b.backward_weight(work.kv_b, grads);
        self.kv_norm.backward_weight(work.kv_norm, grads);
        self.kv_a.backward_weight(work.kv_a, grads);
        match (&self.query, work.query) {
            (Query::Direct(linear), QueryWork::Direct(work)) => linear.backward_weight(work, grads),
            (Query::Latent { a, norm, b }, QueryWork::Latent { a: a_work, norm: norm_work, b: b_work }) => {
                b.backward_weight(b_work, grads);
                norm.backward_weight(norm_work, grads);
                a.backward_weight(a_work, grads);
            }
            _ => unreachable!("backward_input made the other form"),
        }
    }
}
