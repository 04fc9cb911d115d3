//! The router (report §2.1.2): which experts a token goes to and with what weight, the load that causes, and the
//! sequence-wise balance loss. Never below FP32.
//!
//! Legend: B sequences, S positions, T = B·S, D hidden size, E experts, G groups, K experts a token.
use crate::config::Scoring;
use crate::params::{Init, Role};
use crate::saved::See;
use crate::{Grads, Layer, ModelConfig, ParamId, ParamTable, Weights};
use kernels::ops::linear;
use tch::{Kind, Tensor};

#[derive(Debug)]
pub struct Gate {
    weight: ParamId,       // [E, D]
    bias: Option<ParamId>, // [E]; sigmoid scoring only
    scoring: Scoring,
    experts: i64,
    top_k: i64,
    groups: i64,
    top_groups: i64,
    renormalise: bool,
    factor: f64,
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
    x: Tensor,
}

impl Gate {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, prefix: &str) -> Self {
        let (experts, std) = (config.n_routed_experts, config.initializer_range);
        let weight = table.add(format!("{prefix}.weight"), &[experts, config.hidden_size], Init::Normal { std }, Role::Gate);
        let bias = config.has_bias().then(|| table.add(format!("{prefix}.e_score_correction_bias"), &[experts], Init::Zeros, Role::Bias));
        Gate {
            weight,
            bias,
            scoring: config.scoring_func,
            experts,
            top_k: config.num_experts_per_tok,
            groups: config.n_group,
            top_groups: config.topk_group,
            renormalise: config.norm_topk_prob,
            factor: config.routed_scaling_factor,
        }
    }

    pub fn experts(&self) -> i64 {
        self.experts
    }

    pub fn bias(&self) -> Option<ParamId> {
        self.bias
    }

    /// The K experts of each token, at most `top_groups` groups: chosen by biased score.
    fn choose(&self, w: &Weights, scores: &Tensor) -> Tensor {
        let biased = match self.bias {
            Some(bias) => scores + w.get(bias),
            None => scores.shallow_clone(),
        };
        if self.top_groups == self.groups {
            return biased.topk(self.top_k, 1, true, true).1;
        }
        let grouped = biased.view([-1, self.groups, self.experts / self.groups]); // [T, G, E/G]
        let group_scores = match self.scoring {
            Scoring::Sigmoid => grouped.topk(2, 2, true, false).0.sum_dim_intlist(&[2i64][..], false, None),
            Scoring::Softmax => grouped.amax(&[2i64][..], false),
        };
        let open = group_scores.topk(self.top_groups, 1, true, false).1; // [T, M]
        let closed = group_scores.ones_like().scatter_value(1, &open, 0.0).to_kind(Kind::Bool).unsqueeze(2);
        let masked = grouped.masked_fill(&closed, f64::NEG_INFINITY).view([-1, self.experts]);
        masked.topk(self.top_k, 1, true, true).1
    }

    /// f_i of each sequence [B, E] and Σ_i f_i·P_i over them (report eq. 17–20): f counts the top-K of the unbiased scores.
    fn balance(&self, scores: &Tensor, sequences: i64) -> (Tensor, Tensor) {
        let positions = scores.size()[0] / sequences;
        let top = scores.topk(self.top_k, 1, true, false).1.view([sequences, positions * self.top_k]);
        let ones = Tensor::ones(top.size(), (scores.kind(), scores.device()));
        let counts = Tensor::zeros([sequences, self.experts], (scores.kind(), scores.device())).scatter_add(1, &top, &ones);
        let f = counts * (self.experts as f64 / (self.top_k * positions) as f64);
        let normalised = scores / scores.sum_dim_intlist(&[1i64][..], true, None);
        let p = normalised.view([sequences, positions, self.experts]).mean_dim(&[1i64][..], false, None);
        let total = (&f * p).sum(scores.kind());
        (f / positions as f64, total)
    }

    /// `Layer::forward`; `with_routes` gets them as soon as they are chosen: all else is made under what it starts.
    pub fn forward_then<R>(&self, w: &Weights, input: GateIn, with_routes: impl FnOnce(&Tensor) -> R) -> (GateOut, GateSaved, R) {
        let (weight, GateIn { x, sequences, balance_scale }) = (w.get(self.weight), input);
        let x = x.to_kind(weight.kind());
        w.gemms.count(x.kind());
        let logits = linear::forward(&x, weight); // [T, E]
        let scores = match self.scoring {
            Scoring::Sigmoid => logits.sigmoid(),
            Scoring::Softmax => logits.softmax(-1, logits.kind()),
        };
        let routes = self.choose(w, &scores);
        let then = with_routes(&routes);
        let chosen = scores.gather(1, &routes, false);
        let weights = if self.renormalise { &chosen / (chosen.sum_dim_intlist(&[1i64][..], true, None) + 1e-20) } else { chosen } * self.factor;
        let chosen_by = routes.flatten(0, -1);
        // bincount would make the host wait for a GPU.
        let counts = Tensor::zeros([self.experts], (Kind::Int64, routes.device())).scatter_add(0, &chosen_by, &chosen_by.ones_like());
        let (f, balance) = self.balance(&scores, sequences);
        let saved = GateSaved { scores, routes: routes.shallow_clone(), balance: f * balance_scale };
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
        let scores = saved.scores;
        let dweights = dweights.to_kind(scores.kind()) * self.factor;
        let dchosen = if self.renormalise {
            let chosen = scores.gather(1, &saved.routes, false);
            let sum = chosen.sum_dim_intlist(&[1i64][..], true, None) + 1e-20;
            // w = g / Σg: dg = (dw − Σ dw·w) / Σg
            let projection = (&dweights * &chosen).sum_dim_intlist(&[1i64][..], true, None) / &sum;
            (dweights - projection) / sum
        } else {
            dweights
        };
        // Balance: P is the mean of s / Σs, so ds = (c − Σ c·s/Σs) / Σs with c = balance_scale · f / S.
        let sequences = saved.balance.size()[0];
        let sums = scores.sum_dim_intlist(&[1i64][..], true, None);
        let c = saved.balance.unsqueeze(1).expand([-1, scores.size()[0] / sequences, -1], false).reshape([-1, self.experts]);
        let mean = (&c * &scores).sum_dim_intlist(&[1i64][..], true, None) / &sums;
        let dscores = ((c - mean) / sums).scatter_add(1, &saved.routes, &dchosen);
        let dlogits = match self.scoring {
            Scoring::Sigmoid => dscores * (&scores * (1.0 - &scores)),
            Scoring::Softmax => Tensor::internal_softmax_backward_data(&dscores, &scores, -1, scores.kind()),
        };
        let weight = w.get(self.weight);
        w.gemms.count(dlogits.kind());
        let dx = linear::backward_input(&dlogits, weight).to_kind(x.kind());
        (dx, GateWork { dlogits, x: x.to_kind(weight.kind()) })
    }

    fn backward_weight(&self, work: GateWork, grads: &mut Grads) {
        grads.add_product(self.weight, &work.dlogits, &work.x);
    }
}
