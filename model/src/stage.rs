//! What the pipeline calls: embedding, blocks, head and MTP of one pipeline stage. A stage communicates (expert
//! parallelism), so it can fail.
//!
//! Legend: B sequences, L positions, T = B·L, D hidden size, E experts.
use crate::block::{Block, BlockContext, Ffn, Started};
use crate::embedding::Embedding;
use crate::flow::{alone, Backward, Forward, StageResult, StageSaved, StageWork, Work};
use crate::head::LmHead;
use crate::mla::Positions;
use crate::moe::Load;
use crate::mtp::Mtp;
use crate::norm::RmsNorm;
use crate::{Layer, ModelConfig, ParamId, ParamTable, Weights};
use kernels::ops::linear;
use kernels::ops::rope::{RopeScaling, RopeTable};
use parallel::comm::CommError;
use parallel::dispatch::ExpertGroup;
use std::ops::Range;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// One micro-batch of packed samples.
pub struct MicroBatch {
    pub tokens: Tensor, // [B, L + 1] i64
    /// The lengths of each sequence's documents, in order, where attention is not to cross their boundaries.
    pub documents: Option<Rc<Vec<Vec<i64>>>>,
}

impl MicroBatch {
    /// Attention goes over whole sequences.
    pub fn new(tokens: Tensor) -> Self {
        MicroBatch { tokens, documents: None }
    }
    /// The same again.
    pub fn share(&self) -> Self {
        MicroBatch { tokens: self.tokens.shallow_clone(), documents: self.documents.clone() }
    }
    /// B
    pub fn sequences(&self) -> i64 {
        self.tokens.size()[0]
    }
    /// L
    pub fn length(&self) -> i64 {
        self.tokens.size()[1] - 1
    }
    /// [T]
    pub(crate) fn inputs(&self) -> Tensor {
        self.tokens.narrow(1, 0, self.length()).flatten(0, -1)
    }
    /// [T]
    pub(crate) fn targets(&self) -> Tensor {
        self.tokens.narrow(1, 1, self.length()).flatten(0, -1)
    }
    /// The tokens `by` after the first L − 1 positions of every sequence, [B·(L − 1)].
    pub(crate) fn shifted(&self, by: i64) -> Tensor {
        self.tokens.narrow(1, by, self.length() - 1).flatten(0, -1)
    }
    /// The first L − 1 positions of every sequence: [T, D] → [B·(L − 1), D].
    pub(crate) fn inner(&self, hidden: &Tensor) -> Tensor {
        let (sequences, length) = (self.sequences(), self.length());
        hidden.view([sequences, length, -1]).narrow(1, 0, length - 1).reshape([sequences * (length - 1), -1])
    }
}

/// What every micro-batch of a step shares. Means are over the global batch, so the counts are global.
#[derive(Clone)]
pub struct StepContext {
    pub main_targets: i64,
    pub mtp_targets: i64,
    pub sequences: i64,
    /// λ
    pub mtp_weight: f64,
    /// α
    pub balance_weight: f64,
    pub positions: Positions,
    pub experts: ExpertGroup,
}

impl StepContext {
    pub(crate) fn block_context(&self, mb: &MicroBatch) -> BlockContext {
        BlockContext {
            sequences: mb.sequences(),
            positions: Positions { documents: mb.documents.clone(), ..self.positions.clone() },
            balance_scale: self.balance_weight / self.sequences as f64,
            experts: self.experts.clone(),
        }
    }
}

/// From the forward only. Sums over this rank's tokens; the caller adds micro-batches and ranks.
pub struct StageStats {
    pub main: Tensor,
    pub mtp: Tensor,
    /// Σ over sequences and MoE layers of Σ f·P, without α.
    pub balance: Tensor,
    /// [MoE layers of the stage, E] i64, in the order of `Stage::biases`.
    pub expert_counts: Tensor,
}

pub enum StageIn {
    Tokens,
    Hidden(Tensor), // [T, D]
}

pub enum StageOut {
    Hidden(Tensor), // [T, D]
    Loss,           // its sums are in the stats
}

#[derive(Debug)]
pub struct Stage {
    pub(crate) embedding: Option<Embedding>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) last: Option<Last>,
    /// The gradients of a first dense feed-forward are made while the embedding's travels, which is larger; else their own way
    /// is the longer one and hidden by the attention's backward.
    pub(crate) ffn_hides_embedding: bool,
    /// The block whose experts' gradients, which stay here, are made last of all: so they hide the way of those before them,
    /// which nothing else does once the stage's results are out.
    pub(crate) experts_last: Option<usize>,
    /// The parameters that a micro-batch's backward contributes to, as often as it does.
    pub uses: Vec<ParamId>,
}

#[derive(Debug)]
pub(crate) struct Last {
    pub norm: RmsNorm,
    pub head: LmHead,
    pub mtp: Option<Mtp>,
}

/// Which part of the model a stage is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagePart {
    pub layers: Range<i64>,
    /// Has the embedding.
    pub first: bool,
    /// Has the final norm, the head and MTP.
    pub last: bool,
}

impl StagePart {
    pub fn whole(config: &ModelConfig) -> Self {
        StagePart { layers: 0..config.num_hidden_layers, first: true, last: true }
    }
}

impl Positions {
    /// `scaling` is the phase's, which may differ from the config's.
    pub fn new(config: &ModelConfig, scaling: Option<&RopeScaling>, length: i64, options: (Kind, Device)) -> Self {
        let table = RopeTable::new(length, config.qk_rope_head_dim, config.rope_theta, scaling, options);
        let softmax_scale = scaling.map_or(1.0, RopeScaling::softmax_scale) / (config.qk_head_dim() as f64).sqrt();
        Positions { table: Rc::new(table), softmax_scale, documents: None }
    }
}

impl Stage {
    /// Its parameters are added to `table` in model order.
    pub fn new(table: &mut ParamTable, config: &ModelConfig, part: &StagePart) -> Self {
        table.take_uses();
        let embedding = part.first.then(|| Embedding { weight: table.embedding(config) });
        let blocks: Vec<Block> = part.layers.clone().map(|layer| Block::new(table, config, &format!("model.layers.{layer}"), config.is_moe(layer))).collect();
        let mut ffn_hides_embedding = false;
        if let Some((embedding, first)) = embedding.as_ref().zip(blocks.first()) {
            ffn_hides_embedding = table.spec(embedding.weight).numel() > first.ffn_elements(table);
            table.completes_before(embedding.weight, first.last_held(ffn_hides_embedding));
        }
        let experts_last = blocks.iter().position(Block::sends).filter(|_| table.share.stays);
        if let Some(index) = experts_last {
            blocks[index].experts().for_each(|id| table.completes_after(id, blocks[0].first()));
        }
        let last = part.last.then(|| {
            let norm = RmsNorm { weight: table.norm("model.norm.weight", config.hidden_size), eps: config.rms_norm_eps };
            let head = table.matrix("lm_head.weight", &[config.vocab_size, config.hidden_size], config);
            let mtp = (config.num_nextn_predict_layers == 1).then(|| Mtp::new(table, config, head));
            if let Some(mtp) = &mtp {
                table.completes_before(head, mtp.last());
            }
            Last { norm, head: LmHead { weight: head }, mtp }
        });
        let mut uses = table.take_uses();
        uses.retain(|&id| table.spec(id).trained());
        Stage { embedding, blocks, last, ffn_hides_embedding, experts_last, uses }
    }

    pub fn whole(table: &mut ParamTable, config: &ModelConfig) -> Self {
        Stage::new(table, config, &StagePart::whole(config))
    }

    pub fn is_first(&self) -> bool {
        self.embedding.is_some()
    }

    pub fn is_last(&self) -> bool {
        self.last.is_some()
    }

    /// The expert bias of every MoE layer, in the order of `StageStats::expert_counts`; None with softmax scoring.
    pub fn biases(&self) -> Vec<Option<ParamId>> {
        let mtp = self.last.iter().filter_map(|last| last.mtp.as_ref()).map(|mtp| &mtp.block);
        let moe = |block: &Block| if let Ffn::Moe(moe) = &block.ffn { Some(moe.gate.bias()) } else { None };
        self.blocks.iter().chain(mtp).filter_map(moe).collect()
    }

    /// The main head's logits [T, V], for evaluation; a last stage that is also the first.
    pub fn logits(&self, step: &StepContext, w: &mut Weights, mb: &MicroBatch) -> Result<Tensor, CommError> {
        w.ready(|_| true)?;
        let (first, last) = self.embedding.as_ref().zip(self.last.as_ref()).expect("the whole model");
        let (mut h, context) = (first.forward(w, mb.inputs()).0, step.block_context(mb));
        for block in &self.blocks {
            let middle = block.forward_attention(w, h, &context);
            h = match block.forward_ffn(w, middle, &context) {
                Started::Done((y, ..)) => y,
                Started::Sent(mut sent) => {
                    block.forward_send(w, &mut sent)?;
                    block.forward_end(block.forward_experts(w, sent, &mut alone)?)?.0
                }
            };
        }
        let (h, _) = last.norm.forward(w, h);
        Ok(linear::forward(&h, w.get(last.head.weight)))
    }

    pub fn forward(&self, step: &StepContext, w: &mut Weights, mb: &MicroBatch, x: StageIn) -> Result<StageResult, CommError> {
        let mut run = Forward::new(self, step, w, mb, x);
        while run.advance(w, &mut alone)? {}
        Ok(run.finish())
    }

    /// `dy` is the gradient of `StageOut::Hidden`; the result that of `StageIn::Hidden`. `work` takes what the weights'
    /// gradients need, piece by piece; the pieces of the result are to be made once the gradient is on its way.
    pub fn backward(&self, w: &Weights, dy: Option<Tensor>, saved: StageSaved, work: &mut dyn FnMut(Work)) -> Result<(Option<Tensor>, StageWork), CommError> {
        let mut run = Backward::new(self, dy, saved);
        while run.advance(w, work, &mut alone)? {}
        Ok(run.finish())
    }
}

/// Stats under way.
pub(crate) struct Sums {
    pub main: Tensor,
    pub mtp: Tensor,
    balance: Tensor,
    counts: Vec<Tensor>,
}

impl Sums {
    pub fn new(w: &Weights) -> Self {
        let zero = || Tensor::zeros([], (w.precision.master(), w.device()));
        Sums { main: zero(), mtp: zero(), balance: zero(), counts: Vec::new() }
    }
    pub fn add(&mut self, load: Option<Load>) {
        if let Some(load) = load {
            self.balance = &self.balance + load.balance;
            self.counts.push(load.counts);
        }
    }
    pub fn done(self) -> StageStats {
        let expert_counts = if self.counts.is_empty() { Tensor::zeros([0, 0], (Kind::Int64, self.main.device())) } else { Tensor::stack(&self.counts, 0) };
        StageStats { main: self.main, mtp: self.mtp, balance: self.balance, expert_counts }
    }
}
