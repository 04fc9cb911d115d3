//! The reference, in torch's own operations; also on a GPU for what the kernel does not take.
use super::{Routed, Rule};
use tch::{Kind, Tensor};

pub(super) fn forward(logits: &Tensor, bias: Option<&Tensor>, sequences: i64, rule: &Rule) -> Routed {
    let scores = if rule.softmax { logits.softmax(-1, logits.kind()) } else { logits.sigmoid() };
    let routes = choose(&scores, bias, rule);
    let chosen = scores.gather(1, &routes, false);
    let weights = if rule.renormalise { &chosen / (chosen.sum_dim_intlist(&[1i64][..], true, None) + 1e-20) } else { chosen } * rule.factor;
    let chosen_by = routes.flatten(0, -1);
    // bincount would make the host wait for a GPU.
    let counts = Tensor::zeros([rule.experts], (Kind::Int64, routes.device())).scatter_add(0, &chosen_by, &chosen_by.ones_like());
    let positions = scores.size()[0] / sequences;
    let best = scores.topk(rule.top_k, 1, true, false).1.view([sequences, positions * rule.top_k]);
    let ones = Tensor::ones(best.size(), (scores.kind(), scores.device()));
    let top = Tensor::zeros([sequences, rule.experts], (scores.kind(), scores.device())).scatter_add(1, &best, &ones);
    let normalised = &scores / scores.sum_dim_intlist(&[1i64][..], true, None);
    let share = normalised.view([sequences, positions, rule.experts]).mean_dim(&[1i64][..], false, None);
    Routed { scores, routes, weights, counts, top, share }
}

/// The K experts of each token, of at most `top_groups` groups: chosen by biased score.
fn choose(scores: &Tensor, bias: Option<&Tensor>, rule: &Rule) -> Tensor {
    let biased = bias.map_or_else(|| scores.shallow_clone(), |bias| scores + bias);
    if rule.top_groups == rule.groups {
        return biased.topk(rule.top_k, 1, true, true).1;
    }
    let grouped = biased.view([-1, rule.groups, rule.experts / rule.groups]); // [T, G, E/G]
    let group_scores = match rule.softmax {
        false => grouped.topk(2, 2, true, false).0.sum_dim_intlist(&[2i64][..], false, None),
        true => grouped.amax(&[2i64][..], false),
    };
    let open = group_scores.topk(rule.top_groups, 1, true, false).1; // [T, M]
    let closed = group_scores.ones_like().scatter_value(1, &open, 0.0).to_kind(Kind::Bool).unsqueeze(2);
    let masked = grouped.masked_fill(&closed, f64::NEG_INFINITY).view([-1, rule.experts]);
    masked.topk(rule.top_k, 1, true, true).1
}

pub(super) fn backward(dweights: &Tensor, scores: &Tensor, routes: &Tensor, balance: &Tensor, rule: &Rule) -> Tensor {
    let dweights = dweights.to_kind(scores.kind()) * rule.factor;
    let dchosen = if rule.renormalise {
        let chosen = scores.gather(1, routes, false);
        let sum = chosen.sum_dim_intlist(&[1i64][..], true, None) + 1e-20;
        // w = g / Σg: dg = (dw − Σ dw·w) / Σg
        let projection = (&dweights * &chosen).sum_dim_intlist(&[1i64][..], true, None) / &sum;
        (dweights - projection) / sum
    } else {
        dweights
    };
    // The share is s / Σs: ds = (c − Σ c·s/Σs) / Σs.
    let sequences = balance.size()[0];
    let sums = scores.sum_dim_intlist(&[1i64][..], true, None);
    let c = balance.unsqueeze(1).expand([-1, scores.size()[0] / sequences, -1], false).reshape([-1, rule.experts]);
    let mean = (&c * scores).sum_dim_intlist(&[1i64][..], true, None) / &sums;
    let dscores = ((c - mean) / sums).scatter_add(1, routes, &dchosen);
    match rule.softmax {
        false => dscores * (scores * (1.0 - scores)),
        true => Tensor::internal_softmax_backward_data(&dscores, scores, -1, scores.kind()),
    }
}
