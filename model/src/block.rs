//! One transformer block: h = x + attention(norm(x)); y = h + feed-forward(norm(h)). A block with experts runs in
//! three segments a direction, with a transfer under way between them (`moe.rs`).
//!
//! Legend: T tokens, D hidden size.
use crate::experts::ExpertsWork;
use crate::flow::Other;
use crate::mla::{Mla, MlaGrad, MlaIn, MlaSaved, MlaWork, Positions};
use crate::mlp::{Mlp, MlpGrad, MlpWork};
use crate::moe::{Load, Moe, MoeBackCombining, MoeBackDispatched, MoeCombining, MoeDispatched, MoeSaved, MoeWork, UnderWay};
use crate::norm::{NormSaved, RmsNorm};
use crate::operand::Operand;
use crate::params::Role;
use crate::saved::{PUT_OFF, See};
use crate::swiglu::SwigluSaved;
use crate::{Grads, Layer, ModelConfig, ParamId, ParamTable, Recompute, Weights};
use kernels::ops::quantise::Want;
use parallel::comm::CommError;
use parallel::dispatch::ExpertGroup;
use std::ops::Range;
use tch::Tensor;

#[derive(Debug)]
pub struct Block {
    attention_norm: RmsNorm,
    attention: Mla,
    ffn_norm: RmsNorm,
    pub ffn: Ffn,
    recompute: Recompute,
    /// Its parameters' ids, in the order in which they are read: up to the feed-forward's norm, up to the routed experts, all.
    params: [Range<usize>; 3],
}

/// What of a block's weights is read at a time.
#[derive(Clone, Copy)]
pub enum Part {
    Attention,
    /// All but the routed experts.
    Ffn,
    Experts,
}

#[derive(Debug)]
pub enum Ffn {
    Dense(Mlp),
    Moe(Moe),
}

/// What a block needs beside its input.
pub struct BlockContext {
    pub sequences: i64,
    pub positions: Positions,
    pub balance_scale: f64,
    /// The ranks that share the experts.
    pub experts: ExpertGroup,
}

pub struct BlockSaved {
    before: BeforeFfn,
    ffn: FfnSaved,
}

/// What the block keeps of its way to the feed-forward.
pub struct BeforeFfn {
    attention_norm: NormSaved,
    /// The norms' outputs; None: made again.
    attention_in: Option<Operand>,
    attention: MlaSaved,
    ffn_norm: NormSaved,
    ffn_in: Option<Operand>,
}

impl BlockSaved {
    pub(crate) fn each(&self, see: See) {
        let BeforeFfn { attention_norm, attention_in, attention, ffn_norm, ffn_in } = &self.before;
        attention_norm.each("norms' inputs", see);
        ffn_norm.each("norms' inputs", see);
        attention_in.iter().chain(ffn_in).for_each(|input| input.each("norms' outputs", see));
        attention.each(see);
        match &self.ffn {
            FfnSaved::Dense(dense) => dense.each("dense gate and up", see),
            FfnSaved::Moe(moe) => moe.each(see),
        }
    }
}

enum FfnSaved {
    Dense(SwigluSaved),
    Moe(Box<MoeSaved>),
}

/// A direction of a block up to its first transfer: a dense block is over then.
pub enum Started<Done, Sent> {
    Done(Done),
    Sent(Sent),
}

pub struct BlockSent<S> {
    h: Tensor, // forward: the residual stream; backward: its gradient
    before: BeforeFfn,
    moe: Box<S>,
}

impl<S: UnderWay> UnderWay for BlockSent<S> {
    fn onward(&mut self) -> Result<bool, CommError> {
        self.moe.onward()
    }
}

/// A block's backward between the feed-forward and the attention.
pub struct BlockMiddle {
    h: Tensor, // the residual stream's gradient
    attention_norm: NormSaved,
    attention_in: Option<Operand>,
    attention: MlaSaved,
}

/// The feed-forward's weights, but the routed experts', and its norm's.
pub struct FfnWork {
    norm: Tensor,
    kind: FfnWorkOf,
}

enum FfnWorkOf {
    Dense(Box<MlpWork>),
    Moe(Box<MoeWork>),
}

pub struct AttentionWork {
    norm: Tensor,
    attention: MlaWork,
}

impl FfnWork {
    pub(crate) fn each(&self, see: See) {
        see(PUT_OFF, &self.norm);
        match &self.kind {
            FfnWorkOf::Dense(linears) => linears.iter().for_each(|linear| linear.each(see)),
            FfnWorkOf::Moe(moe) => moe.each(see),
        }
    }
}

impl AttentionWork {
    pub(crate) fn each(&self, see: See) {
        see(PUT_OFF, &self.norm);
        self.attention.each(see);
    }
}

pub type BlockOut = (Tensor, Option<Load>, BlockSaved);

impl Block {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, prefix: &str, moe: bool) -> Self {
        let (eps, first) = (config.rms_norm_eps, table.specs().len());
        let attention_norm = RmsNorm { weight: table.norm(format!("{prefix}.input_layernorm.weight"), config.hidden_size), eps };
        let attention = Mla::new(table, config, &format!("{prefix}.self_attn"));
        let ffn_norm = RmsNorm { weight: table.norm(format!("{prefix}.post_attention_layernorm.weight"), config.hidden_size), eps };
        let prefix = format!("{prefix}.mlp");
        let ffn = if moe { Ffn::Moe(Moe::new(table, config, &prefix)) } else { Ffn::Dense(Mlp::new(table, config, &prefix, config.intermediate_size)) };
        let (middle, end) = (ffn_norm.weight.0, table.specs().len());
        let experts = (middle..end).find(|&id| table.specs()[id].role == Role::Experts).unwrap_or(end);
        Block { attention_norm, attention, ffn_norm, ffn, recompute: table.recompute, params: [first..middle, middle..experts, experts..end] }
    }

    pub fn holds(&self, part: Part, id: ParamId) -> bool {
        self.params[part as usize].contains(&id.0)
    }

    /// Has experts, which may be elsewhere.
    pub fn sends(&self) -> bool {
        matches!(self.ffn, Ffn::Moe(_))
    }

    fn moe(&self) -> &Moe {
        let Ffn::Moe(moe) = &self.ffn else { panic!("a dense block sends nothing") };
        moe
    }

    /// x [T, D], up to the feed-forward.
    pub fn forward_attention(&self, w: &Weights, x: Tensor, context: &BlockContext) -> BeforeFfn {
        let (attention_norm, input) = self.attention_norm.begin(w, x.shallow_clone(), self.recompute.normed(), &self.attention.readers());
        let attention_in = self.kept(&input);
        let mla_in = MlaIn { x: input, sequences: context.sequences, positions: context.positions.clone() };
        let (attended, attention) = self.attention.forward(w, mla_in);
        let ffn_norm = self.ffn_norm.statistics_of_sum(&x, &attended);
        BeforeFfn { attention_norm, attention_in, attention, ffn_norm, ffn_in: None }
    }

    /// y [T, D], or rows to go to the experts.
    pub fn forward_ffn(&self, w: &Weights, mut before: BeforeFfn, context: &BlockContext) -> Started<BlockOut, BlockSent<MoeDispatched>> {
        let h = before.ffn_norm.x().shallow_clone();
        match &self.ffn {
            Ffn::Dense(mlp) => {
                let input = self.ffn_norm.operand(w, &before.ffn_norm, self.recompute.normed(), &[mlp.gate_up.weight]);
                before.ffn_in = self.kept(&input);
                let (out, saved) = mlp.forward(w, input);
                Started::Done((h + out, None, BlockSaved { before, ffn: FfnSaved::Dense(saved) }))
            }
            Ffn::Moe(moe) => {
                // The gate reads it as it is, also in FP8 runs.
                let normed = self.ffn_norm.normed(w, &before.ffn_norm);
                before.ffn_in = (!self.recompute.rms_norm).then(|| Operand::Own(normed.shallow_clone()));
                Started::Sent(BlockSent { h, before, moe: Box::new(moe.dispatch(w, normed, context)) })
            }
        }
    }

    /// What is kept of a norm's output.
    fn kept(&self, input: &Operand) -> Option<Operand> {
        (!self.recompute.rms_norm).then(|| input.share().for_weight())
    }

    /// As `Moe::send`.
    pub fn forward_send(&self, w: &Weights, sent: &mut BlockSent<MoeDispatched>) -> Result<(), CommError> {
        self.moe().send(w, &mut sent.moe)
    }

    /// As `Moe::onward`.
    pub fn forward_onward(&self, w: &Weights, sent: &mut BlockSent<MoeDispatched>) -> Result<bool, CommError> {
        self.moe().onward(w, &mut sent.moe)
    }

    pub fn forward_experts(&self, w: &Weights, sent: BlockSent<MoeDispatched>, other: Other) -> Result<BlockSent<MoeCombining>, CommError> {
        Ok(BlockSent { h: sent.h, before: sent.before, moe: Box::new(self.moe().compute(w, *sent.moe, other)?) })
    }

    pub fn forward_end(&self, sent: BlockSent<MoeCombining>) -> Result<BlockOut, CommError> {
        let (y, load, saved) = self.moe().combine(*sent.moe, &sent.h)?;
        Ok((y, Some(load), BlockSaved { before: sent.before, ffn: FfnSaved::Moe(Box::new(saved)) }))
    }

    /// dy [T, D] → the feed-forward's input gradient, or gradients on their way to the experts.
    pub fn backward_input(&self, w: &Weights, dy: Tensor, saved: BlockSaved) -> Result<Started<(BlockMiddle, FfnWork), BlockSent<MoeBackDispatched>>, CommError> {
        let BlockSaved { mut before, ffn } = saved;
        let ffn_in = before.ffn_in.take();
        Ok(match (&self.ffn, ffn) {
            (Ffn::Dense(mlp), FfnSaved::Dense(ffn)) => {
                let x = ffn_in.unwrap_or_else(|| self.ffn_norm.operand(w, &before.ffn_norm, Want::COLUMNS, &[mlp.gate_up.weight]));
                let (dnormed, work) = mlp.backward_input(w, MlpGrad { dy: dy.shallow_clone(), x }, ffn);
                Started::Done(self.backward_middle(w, dy, dnormed, before, FfnWorkOf::Dense(Box::new(work))))
            }
            (Ffn::Moe(moe), FfnSaved::Moe(ffn)) => {
                let x = match ffn_in {
                    Some(Operand::Own(x)) => x,
                    _ => self.ffn_norm.normed(w, &before.ffn_norm),
                };
                let moe = Box::new(moe.backward_dispatch(w, x, dy.shallow_clone(), *ffn)?);
                Started::Sent(BlockSent { h: dy, before, moe })
            }
            _ => unreachable!("forward saved the other form"),
        })
    }

    pub fn backward_experts(&self, w: &Weights, sent: BlockSent<MoeBackDispatched>) -> Result<(BlockSent<MoeBackCombining>, ExpertsWork), CommError> {
        let (moe, work) = self.moe().backward_compute(w, *sent.moe)?;
        Ok((BlockSent { h: sent.h, before: sent.before, moe: Box::new(moe) }, work))
    }

    pub fn backward_shared(&self, w: &Weights, sent: &mut BlockSent<MoeBackCombining>) {
        self.moe().backward_shared(w, &mut sent.moe);
    }

    pub fn backward_end(&self, w: &Weights, sent: BlockSent<MoeBackCombining>) -> Result<(BlockMiddle, FfnWork), CommError> {
        let (dnormed, work) = self.moe().backward_combine(w, *sent.moe)?;
        Ok(self.backward_middle(w, sent.h, dnormed, sent.before, FfnWorkOf::Moe(Box::new(work))))
    }

    fn backward_middle(&self, w: &Weights, dy: Tensor, dnormed: Tensor, before: BeforeFfn, kind: FfnWorkOf) -> (BlockMiddle, FfnWork) {
        let BeforeFfn { attention_norm, attention_in, attention, ffn_norm, .. } = before;
        let (dh, norm) = self.ffn_norm.backward_residual(w, dnormed, ffn_norm, &dy);
        (BlockMiddle { h: dh, attention_norm, attention_in, attention }, FfnWork { norm, kind })
    }

    /// To the block's input gradient, [T, D].
    pub fn backward_attention(&self, w: &Weights, middle: BlockMiddle) -> (Tensor, AttentionWork) {
        let BlockMiddle { h: dh, attention_norm, attention_in, attention } = middle;
        let again = || self.attention_norm.operand(w, &attention_norm, Want::COLUMNS, &self.attention.readers());
        let x = attention_in.unwrap_or_else(again);
        let (dnormed, attention) = self.attention.backward_input(w, MlaGrad { dy: dh.shallow_clone(), x }, attention);
        let (dx, norm) = self.attention_norm.backward_residual(w, dnormed, attention_norm, &dh);
        (dx, AttentionWork { norm, attention })
    }

    pub fn backward_experts_weight(&self, work: ExpertsWork, grads: &mut Grads) {
        self.moe().backward_experts(work, grads);
    }

    pub fn backward_ffn_weight(&self, work: FfnWork, grads: &mut Grads) {
        match (&self.ffn, work.kind) {
            (Ffn::Dense(mlp), FfnWorkOf::Dense(work)) => mlp.backward_weight(*work, grads),
            (Ffn::Moe(moe), FfnWorkOf::Moe(work)) => moe.backward_weight(*work, grads),
            _ => unreachable!("backward_input made the other form"),
        }
        self.ffn_norm.backward_weight(work.norm, grads);
    }

    pub fn backward_attention_weight(&self, work: AttentionWork, grads: &mut Grads) {
        self.attention.backward_weight(work.attention, grads);
        self.attention_norm.backward_weight(work.norm, grads);
    }

    pub(crate) fn first(&self) -> ParamId {
        ParamId(self.params[Part::Attention as usize].start)
    }

    pub(crate) fn experts(&self) -> impl Iterator<Item = ParamId> + use<> {
        self.params[Part::Experts as usize].clone().map(ParamId)
    }

    /// Of a first block: the last of its parameters whose gradient comes after the block's input gradient (`flow::Backward`);
    /// `ffn`: a dense feed-forward's do, as those of one with experts always do.
    pub fn last_held(&self, ffn: bool) -> ParamId {
        let part = if ffn || self.sends() { Part::Ffn } else { Part::Attention };
        ParamId(self.params[part as usize].end - 1)
    }

    /// Elements of a dense feed-forward and its norm, or of what a block with experts has beside them.
    pub fn ffn_elements(&self, table: &ParamTable) -> i64 {
        self.params[Part::Ffn as usize].clone().map(|id| table.spec(ParamId(id)).numel()).sum()
    }
}
