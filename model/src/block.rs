//! One transformer block: h = x + attention(norm(x)); y = h + feed-forward(norm(h)).
//!
//! Legend: T tokens, D hidden size.
use crate::linear::LinearWork;
use crate::mla::{Mla, MlaIn, MlaSaved, MlaWork, Positions};
use crate::mlp::{Mlp, MlpSaved};
use crate::moe::{Load, Moe, MoeSaved, MoeWork};
use crate::norm::{NormSaved, RmsNorm};
use crate::{Grads, Layer, ModelConfig, ParamTable, Weights};
use parallel::comm::{Comm, CommError};
use tch::Tensor;

#[derive(Debug)]
pub struct Block {
    attention_norm: RmsNorm,
    attention: Mla,
    ffn_norm: RmsNorm,
    pub ffn: Ffn,
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
    pub experts: Comm,
}

pub struct BlockSaved {
    attention_norm: NormSaved,
    attention: MlaSaved,
    ffn_norm: NormSaved,
    ffn: FfnSaved,
}

enum FfnSaved {
    Dense(MlpSaved),
    Moe(Box<MoeSaved>),
}

pub struct BlockWork {
    attention_norm: Tensor,
    attention: MlaWork,
    ffn_norm: Tensor,
    ffn: FfnWork,
}

enum FfnWork {
    Dense([LinearWork; 2]),
    Moe(Box<MoeWork>),
}

impl Block {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, prefix: &str, moe: bool) -> Self {
        let eps = config.rms_norm_eps;
        let attention_norm = RmsNorm { weight: table.norm(format!("{prefix}.input_layernorm.weight"), config.hidden_size), eps };
        let attention = Mla::new(table, config, &format!("{prefix}.self_attn"));
        let ffn_norm = RmsNorm { weight: table.norm(format!("{prefix}.post_attention_layernorm.weight"), config.hidden_size), eps };
        let prefix = format!("{prefix}.mlp");
        let ffn = if moe { Ffn::Moe(Moe::new(table, config, &prefix)) } else { Ffn::Dense(Mlp::new(table, config, &prefix, config.intermediate_size)) };
        Block { attention_norm, attention, ffn_norm, ffn }
    }

    /// x [T, D] → y [T, D]; the load where the block has a router.
    pub fn forward(&self, w: &Weights, x: Tensor, context: &BlockContext) -> Result<(Tensor, Option<Load>, BlockSaved), CommError> {
        let (normed, attention_norm) = self.attention_norm.forward(w, x.shallow_clone());
        let attention_in = MlaIn { x: normed, sequences: context.sequences, positions: context.positions.clone() };
        let (attended, attention) = self.attention.forward(w, attention_in);
        let h = x + attended;
        let (normed, ffn_norm) = self.ffn_norm.forward(w, h.shallow_clone());
        let (out, load, ffn) = match &self.ffn {
            Ffn::Dense(mlp) => {
                let (out, saved) = mlp.forward(w, normed);
                (out, None, FfnSaved::Dense(saved))
            }
            Ffn::Moe(moe) => {
                let (out, load, saved) = moe.forward(w, normed, context)?;
                (out, Some(load), FfnSaved::Moe(Box::new(saved)))
            }
        };
        Ok((h + out, load, BlockSaved { attention_norm, attention, ffn_norm, ffn }))
    }

    pub fn backward_input(&self, w: &Weights, dy: Tensor, saved: BlockSaved) -> Result<(Tensor, BlockWork), CommError> {
        let (dnormed, ffn) = match (&self.ffn, saved.ffn) {
            (Ffn::Dense(mlp), FfnSaved::Dense(saved)) => {
                let (dx, work) = mlp.backward_input(w, dy.shallow_clone(), saved);
                (dx, FfnWork::Dense(work))
            }
            (Ffn::Moe(moe), FfnSaved::Moe(saved)) => {
                let (dx, work) = moe.backward_input(w, dy.shallow_clone(), *saved)?;
                (dx, FfnWork::Moe(Box::new(work)))
            }
            _ => unreachable!("forward saved the other form"),
        };
        let (dh, ffn_norm) = self.ffn_norm.backward_input(w, dnormed, saved.ffn_norm);
        let dh = dy + dh;
        let (dnormed, attention) = self.attention.backward_input(w, dh.shallow_clone(), saved.attention);
        let (dx, attention_norm) = self.attention_norm.backward_input(w, dnormed, saved.attention_norm);
        Ok((dh + dx, BlockWork { attention_norm, attention, ffn_norm, ffn }))
    }

    pub fn backward_weight(&self, work: BlockWork, grads: &mut Grads) {
        match (&self.ffn, work.ffn) {
            (Ffn::Dense(mlp), FfnWork::Dense(work)) => mlp.backward_weight(work, grads),
            (Ffn::Moe(moe), FfnWork::Moe(work)) => moe.backward_weight(*work, grads),
            _ => unreachable!("backward_input made the other form"),
        }
        self.ffn_norm.backward_weight(work.ffn_norm, grads);
        self.attention.backward_weight(work.attention, grads);
        self.attention_norm.backward_weight(work.attention_norm, grads);
    }
}
