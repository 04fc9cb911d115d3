//! The router behind its logits (report §2.1.2): scores, which experts a token goes to and with what weight, and what the
//! sequence-wise balance loss counts. One pass each way on a GPU for sigmoid scores in FP32.
//!
//! Legend: B sequences of S tokens, T = B·S, E experts in G groups, K experts a token.
use crate::device;
use crate::jit::Source;
use crate::launch::{Launch, Shape};
use tch::{Kind, Tensor};

mod cpu;

const TEXT: &str = include_str!("gate.cu");
const WARPS: i64 = 8;
/// Tokens of a block.
const TOKENS: i64 = 32;
/// A lane holds every 32nd expert's score.
const MOST_EXPERTS: i64 = 512;

/// How experts are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// Scores are a softmax over the experts, else sigmoids.
    pub softmax: bool,
    pub experts: i64,
    pub top_k: i64,
    /// Experts come in groups, of which a token's are in at most so many.
    pub groups: i64,
    pub top_groups: i64,
    /// Weights are divided by their sum, then multiplied by the factor.
    pub renormalise: bool,
    pub factor: f64,
}

pub struct Routed {
    pub scores: Tensor,  // [T, E]
    pub routes: Tensor,  // [T, K] i64
    pub weights: Tensor, // [T, K]
    /// Routes to each expert, [E] i64.
    pub counts: Tensor,
    /// How often each expert is among a sequence's K best scores without bias, [B, E] in the scores' kind.
    pub top: Tensor,
    /// Mean over a sequence of score / Σ of the token's scores, [B, E].
    pub share: Tensor,
}

impl Rule {
    fn source(&self) -> Source {
        let of = |value: i64| value.to_string();
        let defines = vec![
            ("EXPERTS", of(self.experts)),
            ("TOP_K", of(self.top_k)),
            ("GROUPS", of(self.groups)),
            ("TOP_GROUPS", of(self.top_groups)),
            ("RENORMALISE", of(self.renormalise.into())),
        ];
        Source { name: "gate", text: TEXT.to_string(), defines }
    }

    /// Is there one pass each way for these? Else it is torch's own operations.
    pub fn on_gpu(&self, logits: &Tensor) -> bool {
        let open = self.experts / self.groups * self.top_groups;
        let fits = self.experts <= MOST_EXPERTS && self.top_k <= 32.min(open) && self.groups <= 32 && self.experts % self.groups == 0;
        logits.device().is_cuda() && logits.kind() == Kind::Float && !self.softmax && fits
    }
}

/// Three variants, for a test that compiles them: V3's, few experts without groups, and as many as there may be.
pub fn sources() -> Vec<(Source, &'static str)> {
    let v3 = Rule { softmax: false, experts: 256, top_k: 8, groups: 8, top_groups: 4, renormalise: true, factor: 2.5 };
    let small = Rule { experts: 12, top_k: 3, groups: 1, top_groups: 1, renormalise: false, ..v3 };
    let many = Rule { experts: MOST_EXPERTS, groups: 16, ..v3 };
    [v3, small, many].into_iter().map(|rule| (rule.source(), "forward")).collect()
}

fn launch(logits: &Tensor, entry: &'static str, rule: &Rule, grid: [usize; 2], arguments: impl FnOnce(Launch<'_>) -> Launch<'_>) {
    let gpu = device::gpu(logits.device());
    let kernel = gpu.kernel(&format!("gate {rule:?}"), entry, || rule.source()).expect("our own kernels compile and load");
    assert!(grid[1] < 1 << 16, "{} sequences: a grid has no more than 65535", grid[1]);
    if grid[0] * grid[1] > 0 {
        arguments(Launch::new(gpu, &kernel)).run(Shape { grid, block: 32 * WARPS as usize, shared_bytes: 0 });
    }
}

/// logits [T, E], bias [E] of each expert or none.
pub fn forward(logits: &Tensor, bias: Option<&Tensor>, sequences: i64, rule: &Rule) -> Routed {
    let (t, e) = logits.size2().expect("logits are [T, E]");
    assert_eq!(e, rule.experts, "a logit for every expert");
    if !rule.on_gpu(logits) {
        return cpu::forward(logits, bias, sequences, rule);
    }
    let on = logits.device();
    let (empty, zeros) = (|shape: &[i64], kind| Tensor::empty(shape, (kind, on)), |shape: &[i64], kind| Tensor::zeros(shape, (kind, on)));
    let no_bias = bias.is_none().then(|| zeros(&[e], Kind::Float));
    let bias = bias.or(no_bias.as_ref()).expect("one of them");
    let (positions, blocks) = (t / sequences, (t / sequences + TOKENS - 1) / TOKENS);
    let (scores, weights) = (empty(&[t, e], Kind::Float), empty(&[t, rule.top_k], Kind::Float));
    let (routes, counts) = (empty(&[t, rule.top_k], Kind::Int64), zeros(&[e], Kind::Int64));
    let (top, parts) = (zeros(&[sequences, e], Kind::Int), empty(&[sequences, blocks, e], Kind::Float));
    launch(logits, "forward", rule, [blocks as usize, sequences as usize], |launch| {
        let launch = launch.tensor(&logits.contiguous(), Kind::Float).tensor(bias, Kind::Float).tensor(&scores, Kind::Float);
        let launch = launch.tensor(&routes, Kind::Int64).tensor(&weights, Kind::Float).tensor(&counts, Kind::Int64);
        launch.tensor(&top, Kind::Int).tensor(&parts, Kind::Float).int(positions).float(rule.factor as f32)
    });
    let share = parts.sum_dim_intlist(&[1i64][..], false, None) / positions as f64;
    Routed { scores, routes, weights, counts, top: top.to_kind(Kind::Float), share }
}

/// dweights [T, K]; balance [B, E]: the gradient of the sum over a sequence of each expert's share → dlogits [T, E].
pub fn backward(dweights: &Tensor, scores: &Tensor, routes: &Tensor, balance: &Tensor, rule: &Rule) -> Tensor {
    if !rule.on_gpu(scores) {
        return cpu::backward(dweights, scores, routes, balance, rule);
    }
    let (t, sequences) = (scores.size()[0], balance.size()[0]);
    let dlogits = scores.empty_like();
    let dweights = dweights.to_kind(Kind::Float).contiguous();
    launch(scores, "backward", rule, [((t + WARPS - 1) / WARPS) as usize, 1], |launch| {
        let launch = launch.tensor(scores, Kind::Float).tensor(routes, Kind::Int64).tensor(&dweights, Kind::Float);
        launch.tensor(&balance.contiguous(), Kind::Float).tensor(&dlogits, Kind::Float).int(t / sequences).int(t).float(rule.factor as f32)
    });
    dlogits
}
