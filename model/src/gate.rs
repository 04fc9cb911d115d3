//! The router (report §2.1.2): which experts a token goes to and with what weight, the load that causes, and the
//! sequence-wise balance loss. Never below FP32.
//!
//! Legend: B sequences, S positions, T = B·S, D hidden size, E experts, G groups, K experts a token.
use crate::config::Scoring;
use crate::params::{Init, Role};
use crate::saved::{PUT_OFF, See};
use crate::{Grads, Layer, ModelConfig, ParamId, ParamTable, Weights};
use kernels::ops::gate::{self, Routed, Rule};
use kernels::ops::wide_linear;
use tch::Tensor;

#[derive(Debug)]
pub struct Gate {
    weight: ParamId,       // [E, D]
    bias: Option<ParamId>, // [E]; sigmoid scoring only
    rule: Rule,
}

pub struct GateIn {
    pub x: Tensor, // [T, D]
    pub sequences: i64,
    /// α / (sequences of the global batch).
    pub balance_scale: f64,
}

pub struct GateOut {
    pub routes: Tensor,  // [T, K] i64
    pub weights: Tensor, // [T, K]
    pub counts: Tensor,  // [E] i64, how many tokens each expert got
    pub balance: Tensor, // Σ over sequences of Σ_i f_i · P_i, without α
}

pub struct GateGrad {
    pub dweights: Tensor, // [T, K]
    /// The input again, which its maker kept or made again.
    pub x: Tensor,
}

pub struct GateSaved {
    scores: Tensor, // [T, E]
    routes: Tensor,
    /// balance_scale · f_i / S of each sequence, [B, E].
    balance: Tensor,
}

impl GateSaved {
    pub(crate) fn each(&self, see: See) {
        [&self.scores, &self.routes, &self.balance].into_iter().for_each(|tensor| see("routes", tensor));
    }
}

pub struct GateWork {
    dlogits: Tensor,
    x: Tensor, // as it came
}

impl GateWork {
    pub(crate) fn each(&self, see: See) {
        [&self.dlogits, &self.x].into_iter().for_each(|tensor| see(PUT_OFF, tensor));
    }
}

impl Gate {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, prefix: &str) -> Self {
        let (experts, std) = (config.n_routed_experts, config.initializer_range);
        let weight = table.add(format!("{prefix}.weight"), &[experts, config.hidden_size], Init::Normal { std }, Role::Gate);
        let bias = config.has_bias().then(|| table.add(format!("{prefix}.e_score_correction_bias"), &[experts], Init::Zeros, Role::Bias));
        let rule = Rule {
            softmax: config.scoring_func == Scoring::Softmax,
            experts,
            top_k: config.num_experts_per_tok,
            groups: config.n_group,
            top_groups: config.topk_group,
            renormalise: config.norm_topk_prob,
            factor: config.routed_scaling_factor,
        };
        Gate { weight, bias, rule }
    }

    pub fn experts(&self) -> i64 {
        self.rule.experts
    }

    pub fn bias(&self) -> Option<ParamId> {
        self.bias
    }

    /// `Layer::forward`; `with_routes` gets them as soon as they are chosen: all else is made under what it starts.
    pub fn forward_then<R>(&self, w: &Weights, input: GateIn, with_routes: impl FnOnce(&Tensor) -> R) -> (GateOut, GateSaved, R) {
        let (weight, GateIn { x, sequences, balance_scale }) = (w.get(self.weight), input);
        w.gemms.count(weight.kind());
        let logits = wide_linear::forward(&x, weight); // [T, E]
        let Routed { scores, routes, weights, counts, top, share } = gate::forward(&logits, self.bias.map(|bias| w.get(bias)), sequences, &self.rule);
        let then = with_routes(&routes);
        // f_i of each sequence and Σ_i f_i·P_i over them (report eq. 17–20): f counts the top-K of the unbiased scores.
        let positions = (scores.size()[0] / sequences) as f64;
        let f = top * (self.rule.experts as f64 / (self.rule.top_k as f64 * positions));
        let balance = (&f * share).sum(scores.kind());
        let saved = GateSaved { scores, routes: routes.shallow_clone(), balance: f * (balance_scale / positions) };
        (GateOut { routes, weights, counts, balance }, saved, then)
    }
}

impl Layer for Gate {
    type In = GateIn;
    type Out = GateOut;
    type DOut = GateGrad;
    type DIn = Tensor; // [T, D]
    type Saved = GateSaved;
    type WeightWork = GateWork;

    fn forward(&self, w: &Weights, input: GateIn) -> (GateOut, GateSaved) {
        let (out, saved, ()) = self.forward_then(w, input, |_| ());
        (out, saved)
    }

    fn backward_input(&self, w: &Weights, GateGrad { dweights, x }: GateGrad, saved: GateSaved) -> (Tensor, GateWork) {
        let dlogits = gate::backward(&dweights, &saved.scores, &saved.routes, &saved.balance, &self.rule);
        let weight = w.get(self.weight);
        w.gemms.count(dlogits.kind());
        let dx = wide_linear::backward_input(&dlogits, weight, x.kind());
        (dx, GateWork { dlogits, x })
    }

    fn backward_weight(&self, work: GateWork, grads: &mut Grads) {
        let GateWork { dlogits, x } = work;
        let add = |gradient: &mut Tensor, fresh| wide_linear::backward_weight(&dlogits, &x, gradient, fresh);
        grads.accumulate_product(self.weight, dlogits.kind(), add);
    }
}
