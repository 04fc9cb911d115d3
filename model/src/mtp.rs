//! Multi-token prediction, depth 1 (report §2.2): from the hidden state of position t and the embedding of token
//! t + 1, predict token t + 2. Embedding and head are the main model's; the projection reads
//! [enorm(embedding); hnorm(hidden)], the order of the released weights.
//!
//! Legend: B sequences, L positions of the main model, T' = B·(L − 1), D hidden size.
use crate::block::{Block, BlockContext, BlockSaved, BlockWork};
use crate::embedding::{Embedding, EmbeddingWork};
use crate::head::{HeadIn, HeadSaved, LmHead};
use crate::linear::{Linear, LinearWork};
use crate::moe::Load;
use crate::norm::{NormSaved, RmsNorm};
use crate::{Grads, Layer, ModelConfig, ParamId, ParamTable, Weights};
use parallel::comm::CommError;
use tch::Tensor;

#[derive(Debug)]
pub struct Mtp {
    embedding: Embedding,
    embedding_norm: RmsNorm,
    hidden_norm: RmsNorm,
    projection: Linear, // [D, 2D]
    pub block: Block,
    norm: RmsNorm,
    head: LmHead,
}

pub struct MtpIn {
    /// The main model's hidden state after its final norm (what the released weights were trained on), the first
    /// L − 1 positions of every sequence, [T', D].
    pub hidden: Tensor,
    pub next: Tensor,    // [T'] i64, token t + 1
    pub targets: Tensor, // [T'] i64, token t + 2
    /// λ / (MTP targets of the global batch).
    pub scale: f64,
}

pub struct MtpSaved {
    tokens: Tensor,
    embedding_norm: NormSaved,
    hidden_norm: NormSaved,
    joined: Tensor,
    block: BlockSaved,
    norm: NormSaved,
    head: HeadSaved,
}

pub struct MtpWork {
    embedding: EmbeddingWork,
    embedding_norm: Tensor,
    hidden_norm: Tensor,
    projection: LinearWork,
    block: BlockWork,
    norm: Tensor,
    head: HeadSaved,
}

impl Mtp {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, embedding: ParamId, head: ParamId) -> Self {
        let (d, eps) = (config.hidden_size, config.rms_norm_eps);
        let prefix = format!("model.layers.{}", config.num_hidden_layers);
        let norm = |table: &mut ParamTable, name: &str| RmsNorm { weight: table.norm(format!("{prefix}.{name}.weight"), d), eps };
        Mtp {
            embedding: Embedding { weight: embedding },
            embedding_norm: norm(table, "enorm"),
            hidden_norm: norm(table, "hnorm"),
            projection: Linear { weight: table.matrix(format!("{prefix}.eh_proj.weight"), &[d, 2 * d], config) },
            block: Block::new(table, config, &prefix, true),
            norm: norm(table, "shared_head.norm"),
            head: LmHead { weight: head },
        }
    }

    /// Σ of the losses, and the router's load.
    pub fn forward(&self, w: &Weights, x: MtpIn, context: &BlockContext) -> Result<(Tensor, Option<Load>, MtpSaved), CommError> {
        let (embedded, tokens) = self.embedding.forward(w, x.next);
        let (embedded, embedding_norm) = self.embedding_norm.forward(w, embedded);
        let (hidden, hidden_norm) = self.hidden_norm.forward(w, x.hidden);
        let (h, joined) = self.projection.forward(w, Tensor::cat(&[embedded, hidden], 1)); // [T', D]
        let (h, load, block) = self.block.forward(w, h, context)?;
        let (h, norm) = self.norm.forward(w, h);
        let (loss, head) = self.head.forward(w, HeadIn { hidden: h, targets: x.targets, scale: x.scale });
        Ok((loss, load, MtpSaved { tokens, embedding_norm, hidden_norm, joined, block, norm, head }))
    }

    /// The gradient of `hidden`, [T', D].
    pub fn backward_input(&self, w: &Weights, s: MtpSaved) -> Result<(Tensor, MtpWork), CommError> {
        let (dh, head) = self.head.backward_input(w, (), s.head);
        let (dh, norm) = self.norm.backward_input(w, dh, s.norm);
        let (dh, block) = self.block.backward_input(w, dh, s.block)?;
        let (djoined, projection) = self.projection.backward_input(w, dh, s.joined);
        let halves = djoined.chunk(2, 1);
        let (dhidden, hidden_norm) = self.hidden_norm.backward_input(w, halves[1].contiguous(), s.hidden_norm);
        let (dembedded, embedding_norm) = self.embedding_norm.backward_input(w, halves[0].contiguous(), s.embedding_norm);
        let ((), embedding) = self.embedding.backward_input(w, dembedded, s.tokens);
        Ok((dhidden, MtpWork { embedding, embedding_norm, hidden_norm, projection, block, norm, head }))
    }

    pub fn backward_weight(&self, work: MtpWork, grads: &mut Grads) {
        self.head.backward_weight(work.head, grads);
        self.norm.backward_weight(work.norm, grads);
        self.block.backward_weight(work.block, grads);
        self.projection.backward_weight(work.projection, grads);
        self.hidden_norm.backward_weight(work.hidden_norm, grads);
        self.embedding_norm.backward_weight(work.embedding_norm, grads);
        self.embedding.backward_weight(work.embedding, grads);
    }
}
