//! What the pipeline calls: embedding, blocks, head and MTP of one pipeline stage. A stage communicates (expert
//! parallelism), so it can fail.
//!
//! Legend: B sequences, L positions, T = B·L, D hidden size, E experts.
use crate::block::{Block, BlockContext, BlockSaved, BlockWork, Ffn};
use crate::embedding::{Embedding, EmbeddingWork};
use crate::head::{HeadIn, HeadSaved, LmHead};
use crate::mla::Positions;
use crate::moe::Load;
use crate::mtp::{Mtp, MtpIn, MtpSaved, MtpWork};
use crate::norm::{NormSaved, RmsNorm};
use crate::{Grads, Layer, ModelConfig, ParamId, ParamTable, Weights};
use kernels::ops::linear;
use kernels::ops::rope::{RopeScaling, RopeTable};
use parallel::comm::{Comm, CommError};
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// One micro-batch of packed samples.
pub struct MicroBatch {
    pub tokens: Tensor, // [B, L + 1] i64
}

impl MicroBatch {
    /// B
    pub fn sequences(&self) -> i64 {
        self.tokens.size()[0]
    }
    /// L
    pub fn length(&self) -> i64 {
        self.tokens.size()[1] - 1
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
    pub experts: Comm,
}

impl StepContext {
    fn block_context(&self, mb: &MicroBatch) -> BlockContext {
        BlockContext {
            sequences: mb.sequences(),
            positions: self.positions.clone(),
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
    embedding: Option<Embedding>,
    blocks: Vec<Block>,
    last: Option<Last>,
}

#[derive(Debug)]
struct Last {
    norm: RmsNorm,
    head: LmHead,
    mtp: Option<Mtp>,
}

/// What the blocks leave.
struct Trunk {
    hidden: Tensor,
    tokens: Option<Tensor>,
    blocks: Vec<BlockSaved>,
}

pub struct StageSaved {
    tokens: Option<Tensor>,
    blocks: Vec<BlockSaved>,
    last: Option<LastSaved>,
}

struct LastSaved {
    norm: NormSaved,
    head: HeadSaved,
    mtp: Option<MtpSaved>,
    sequences: i64,
}

/// The weight gradients of one micro-batch, still to be made.
pub struct StageWork {
    embedding: Option<EmbeddingWork>,
    blocks: Vec<BlockWork>,
    last: Option<(Tensor, HeadSaved, Option<MtpWork>)>,
}

impl Positions {
    /// `scaling` is the phase's, which may differ from the config's.
    pub fn new(config: &ModelConfig, scaling: Option<&RopeScaling>, length: i64, options: (Kind, Device)) -> Self {
        let table = RopeTable::new(length, config.qk_rope_head_dim, config.rope_theta, scaling, options);
        let softmax_scale = scaling.map_or(1.0, RopeScaling::softmax_scale) / (config.qk_head_dim() as f64).sqrt();
        Positions { table: Rc::new(table), softmax_scale }
    }
}

impl Stage {
    /// The whole model as one stage; its parameters are added to `table` in model order.
    pub fn whole(table: &mut ParamTable, config: &ModelConfig) -> Self {
        let shape = [config.vocab_size, config.hidden_size];
        let embedding = table.matrix("model.embed_tokens.weight", &shape, config);
        let blocks = (0..config.num_hidden_layers).map(|layer| Block::new(table, config, &format!("model.layers.{layer}"), config.is_moe(layer))).collect();
        let norm = RmsNorm { weight: table.norm("model.norm.weight", config.hidden_size), eps: config.rms_norm_eps };
        let head = table.matrix("lm_head.weight", &shape, config);
        let mtp = (config.num_nextn_predict_layers == 1).then(|| Mtp::new(table, config, embedding, head));
        Stage { embedding: Some(Embedding { weight: embedding }), blocks, last: Some(Last { norm, head: LmHead { weight: head }, mtp }) }
    }

    /// The expert bias of every MoE layer, in the order of `StageStats::expert_counts`; None with softmax scoring.
    pub fn biases(&self) -> Vec<Option<ParamId>> {
        let mtp = self.last.iter().filter_map(|last| last.mtp.as_ref()).map(|mtp| &mtp.block);
        let moe = |block: &Block| if let Ffn::Moe(moe) = &block.ffn { Some(moe.gate.bias()) } else { None };
        self.blocks.iter().chain(mtp).filter_map(moe).collect()
    }

    /// Embedding and blocks: the hidden state before the final norm.
    fn trunk(&self, w: &Weights, mb: &MicroBatch, x: StageIn, context: &BlockContext, stats: &mut Sums) -> Result<Trunk, CommError> {
        let (mut hidden, tokens) = match (&self.embedding, x) {
            (Some(embedding), StageIn::Tokens) => {
                let (h, tokens) = embedding.forward(w, mb.tokens.narrow(1, 0, mb.length()).flatten(0, -1));
                (h, Some(tokens))
            }
            (None, StageIn::Hidden(hidden)) => (hidden, None),
            _ => panic!("the first stage takes tokens, every other one a hidden state"),
        };
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (y, load, saved) = block.forward(w, hidden, context)?;
            hidden = y;
            stats.add(load);
            blocks.push(saved);
        }
        Ok(Trunk { hidden, tokens, blocks })
    }

    /// The main head's logits [T, V], for evaluation; a last stage that is also the first.
    pub fn logits(&self, step: &StepContext, w: &Weights, mb: &MicroBatch) -> Result<Tensor, CommError> {
        let last = self.last.as_ref().expect("only the last stage has a head");
        let trunk = self.trunk(w, mb, StageIn::Tokens, &step.block_context(mb), &mut Sums::new(w))?;
        let (h, _) = last.norm.forward(w, trunk.hidden);
        Ok(linear::forward(&h, w.get(last.head.weight)))
    }

    pub fn forward(&self, step: &StepContext, w: &Weights, mb: &MicroBatch, x: StageIn) -> Result<(StageOut, StageStats, StageSaved), CommError> {
        let (sequences, length) = (mb.sequences(), mb.length());
        let context = step.block_context(mb);
        let mut stats = Sums::new(w);
        let Trunk { hidden: h, tokens, blocks } = self.trunk(w, mb, x, &context, &mut stats)?;
        let Some(last) = &self.last else {
            return Ok((StageOut::Hidden(h), stats.done(), StageSaved { tokens, blocks, last: None }));
        };
        let (h, norm) = last.norm.forward(w, h);
        let mtp = match &last.mtp {
            Some(mtp) => {
                let inner = h.view([sequences, length, -1]).narrow(1, 0, length - 1).reshape([sequences * (length - 1), -1]);
                let shifted = |by: i64| mb.tokens.narrow(1, by, length - 1).flatten(0, -1);
                let mtp_in = MtpIn { hidden: inner, next: shifted(1), targets: shifted(2), scale: step.mtp_weight / step.mtp_targets as f64 };
                let (loss, load, saved) = mtp.forward(w, mtp_in, &context)?;
                stats.mtp = loss;
                stats.add(load);
                Some(saved)
            }
            None => None,
        };
        let targets = mb.tokens.narrow(1, 1, length).flatten(0, -1);
        let (loss, head) = last.head.forward(w, HeadIn { hidden: h, targets, scale: 1.0 / step.main_targets as f64 });
        stats.main = loss;
        Ok((StageOut::Loss, stats.done(), StageSaved { tokens, blocks, last: Some(LastSaved { norm, head, mtp, sequences }) }))
    }

    /// `dy` is the gradient of `StageOut::Hidden`; the result that of `StageIn::Hidden`.
    pub fn backward_input(&self, w: &Weights, dy: Option<Tensor>, saved: StageSaved) -> Result<(Option<Tensor>, StageWork), CommError> {
        let (mut dh, last) = match (&self.last, saved.last) {
            (Some(last), Some(s)) => {
                let (mut dh, head) = last.head.backward_input(w, (), s.head);
                let mut mtp_work = None;
                if let Some((mtp, saved)) = last.mtp.as_ref().zip(s.mtp) {
                    let (dinner, work) = mtp.backward_input(w, saved)?;
                    let width = dh.size()[1];
                    let per_sequence = dh.view([s.sequences, -1, width]);
                    let mut inner = per_sequence.narrow(1, 0, per_sequence.size()[1] - 1);
                    // dh is this function's own; nothing else holds it yet.
                    let _ = inner.g_add_(&dinner.view([s.sequences, -1, width]));
                    dh = per_sequence.view([-1, width]);
                    mtp_work = Some(work);
                }
                let (dh, norm) = last.norm.backward_input(w, dh, s.norm);
                (dh, Some((norm, head, mtp_work)))
            }
            (None, None) => (dy.expect("a stage before the last gets a gradient"), None),
            _ => unreachable!("forward saved the other form"),
        };
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (block, saved) in self.blocks.iter().zip(saved.blocks).rev() {
            let (dx, work) = block.backward_input(w, dh, saved)?;
            dh = dx;
            blocks.push(work);
        }
        Ok(match (&self.embedding, saved.tokens) {
            (Some(embedding), Some(tokens)) => {
                let ((), embedding) = embedding.backward_input(w, dh, tokens);
                (None, StageWork { embedding: Some(embedding), blocks, last })
            }
            _ => (Some(dh), StageWork { embedding: None, blocks, last }),
        })
    }

    pub fn backward_weight(&self, work: StageWork, grads: &mut Grads) {
        if let Some((last, (norm, head, mtp_work))) = self.last.as_ref().zip(work.last) {
            last.head.backward_weight(head, grads);
            last.norm.backward_weight(norm, grads);
            if let Some((mtp, work)) = last.mtp.as_ref().zip(mtp_work) {
                mtp.backward_weight(work, grads);
            }
        }
        for (block, work) in self.blocks.iter().rev().zip(work.blocks) {
            block.backward_weight(work, grads);
        }
        if let Some((embedding, work)) = self.embedding.as_ref().zip(work.embedding) {
            embedding.backward_weight(work, grads);
        }
    }
}

/// Stats under way.
struct Sums {
    main: Tensor,
    mtp: Tensor,
    balance: Tensor,
    counts: Vec<Tensor>,
}

impl Sums {
    fn new(w: &Weights) -> Self {
        let zero = || Tensor::zeros([], (w.precision.master(), w.device()));
        Sums { main: zero(), mtp: zero(), balance: zero(), counts: Vec::new() }
    }
    fn add(&mut self, load: Option<Load>) {
        if let Some(load) = load {
            self.balance = &self.balance + load.balance;
            self.counts.push(load.counts);
        }
    }
    fn done(self) -> StageStats {
        let expert_counts = if self.counts.is_empty() { Tensor::zeros([0, 0], (Kind::Int64, self.main.device())) } else { Tensor::stack(&self.counts, 0) };
        StageStats { main: self.main, mtp: self.mtp, balance: self.balance, expert_counts }
    }
}
