//! Multi-token prediction, depth 1 (report §2.2): from the hidden state of position t and the embedding of token
//! t + 1, predict token t + 2. Embedding and head are the main model's; the projection reads
//! [enorm(embedding); hnorm(hidden)], the order of the released weights.
//!
//! Legend: B sequences, L positions of the main model, T' = B·(L − 1), D hidden size.
use crate::block::Block;
use crate::embedding::{Embedding, EmbeddingWork};
use crate::head::{HeadIn, HeadSaved, LmHead};
use crate::linear::{Linear, LinearWork};
use crate::norm::{NormSaved, RmsNorm};
use crate::operand::Operand;
use crate::saved::{PUT_OFF, See};
use crate::{Grads, Layer, ModelConfig, ParamId, ParamTable, Weights};
use tch::Tensor;

#[derive(Debug)]
pub struct Mtp {
    embedding: Embedding,
    embedding_norm: RmsNorm,
    hidden_norm: RmsNorm,
    /// Never in FP8.
    projection: Linear, // [D, 2D]
    pub block: Block,
    norm: RmsNorm,
    head: LmHead,
}

/// What the module keeps of the way into its block, and out of it to the loss.
pub struct MtpInSaved {
    tokens: Tensor,
    embedding_norm: NormSaved,
    hidden_norm: NormSaved,
    joined: Operand,
}

pub struct MtpOutSaved {
    norm: NormSaved,
    head: HeadSaved,
}

impl MtpInSaved {
    pub(crate) fn each(&self, see: See) {
        see("tokens", &self.tokens);
        self.embedding_norm.each("norms' inputs", see);
        self.hidden_norm.each("norms' inputs", see);
        self.joined.each("MTP's projection", see);
    }
}

impl MtpOutSaved {
    pub(crate) fn each(&self, see: See) {
        self.norm.each("norms' inputs", see);
        self.head.each(see);
    }
}

pub struct MtpInWork {
    embedding_norm: Tensor,
    hidden_norm: Tensor,
    projection: LinearWork,
}

impl MtpInWork {
    pub(crate) fn each(&self, see: See) {
        [&self.embedding_norm, &self.hidden_norm].into_iter().for_each(|norm| see(PUT_OFF, norm));
        self.projection.each(see);
    }
}

pub struct MtpOutWork {
    norm: Tensor,
    head: HeadSaved,
}

impl MtpOutWork {
    pub(crate) fn each(&self, see: See) {
        see(PUT_OFF, &self.norm);
        self.head.each(see);
    }
}

impl Mtp {
    /// The main model's.
    pub fn embedding(&self) -> &Embedding {
        &self.embedding
    }

    /// The last of its parameters.
    pub fn last(&self) -> ParamId {
        self.norm.weight
    }

    pub fn new(table: &mut ParamTable, config: &ModelConfig, head: ParamId) -> Self {
        let (d, eps) = (config.hidden_size, config.rms_norm_eps);
        let prefix = format!("model.layers.{}", config.num_hidden_layers);
        let norm = |table: &mut ParamTable, name: &str| RmsNorm { weight: table.norm(format!("{prefix}.{name}.weight"), d), eps };
        Mtp {
            embedding: Embedding { weight: table.embedding(config) },
            embedding_norm: norm(table, "enorm"),
            hidden_norm: norm(table, "hnorm"),
            projection: Linear { weight: table.matrix(format!("{prefix}.eh_proj.weight"), &[d, 2 * d], config) },
            block: Block::new(table, config, &prefix, true),
            norm: norm(table, "shared_head.norm"),
            head: LmHead { weight: table.share(head) },
        }
    }

    /// hidden: the main model's after its final norm (what the released weights were trained on), the first L − 1
    /// positions of every sequence [T', D]; next: token t + 1 [T'] → the block's input [T', D].
    pub fn forward_in(&self, w: &Weights, hidden: Tensor, next: Tensor) -> (Tensor, MtpInSaved) {
        let (embedded, tokens) = self.embedding.forward(w, next);
        let (embedded, embedding_norm) = self.embedding_norm.forward(w, embedded);
        let (hidden, hidden_norm) = self.hidden_norm.forward(w, hidden);
        let (h, joined) = self.projection.forward(w, Operand::Own(Tensor::cat(&[embedded, hidden], 1))); // [T', D]
        (h, MtpInSaved { tokens, embedding_norm, hidden_norm, joined })
    }

    /// The block's output, token t + 2 [T'] and λ / (MTP targets of the global batch) → Σ of the losses.
    pub fn forward_out(&self, w: &Weights, h: Tensor, targets: Tensor, scale: f64) -> (Tensor, MtpOutSaved) {
        let (hidden, norm) = self.norm.forward(w, h);
        let (loss, head) = self.head.forward(w, HeadIn { hidden, targets, scale });
        (loss, MtpOutSaved { norm, head })
    }

    /// The gradient of the block's output.
    pub fn backward_out(&self, w: &Weights, saved: MtpOutSaved) -> (Tensor, MtpOutWork) {
        let (dh, head) = self.head.backward_input(w, (), saved.head);
        let (dh, norm) = self.norm.backward_input(w, dh, saved.norm);
        (dh, MtpOutWork { norm, head })
    }

    /// The gradient of the block's input → that of `hidden`, and the weights', the embedding's apart.
    pub fn backward_in(&self, w: &Weights, dh: Tensor, saved: MtpInSaved) -> (Tensor, MtpInWork, EmbeddingWork) {
        let (djoined, projection) = self.projection.backward_input(w, dh, saved.joined);
        let halves = djoined.chunk(2, 1);
        let (dhidden, hidden_norm) = self.hidden_norm.backward_input(w, halves[1].contiguous(), saved.hidden_norm);
        let (dembedded, embedding_norm) = self.embedding_norm.backward_input(w, halves[0].contiguous(), saved.embedding_norm);
        let ((), embedding) = self.embedding.backward_input(w, dembedded, saved.tokens);
        (dhidden, MtpInWork { embedding_norm, hidden_norm, projection }, embedding)
    }

    pub fn backward_out_weight(&self, work: MtpOutWork, grads: &mut Grads) {
        self.head.backward_weight(work.head, grads);
        self.norm.backward_weight(work.norm, grads);
    }

    pub fn backward_in_weight(&self, work: MtpInWork, grads: &mut Grads) {
        self.projection.backward_weight(work.projection, grads);
        self.hidden_norm.backward_weight(work.hidden_norm, grads);
        self.embedding_norm.backward_weight(work.embedding_norm, grads);
    }
}
