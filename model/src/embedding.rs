//! Token embedding.   Legend: T tokens, V vocabulary, D hidden size.
use crate::saved::{PUT_OFF, See};
use crate::{Grads, Layer, ParamId, Weights};
use kernels::ops::embedding;
use tch::Tensor;

#[derive(Debug)]
pub struct Embedding {
    pub weight: ParamId, // [V, D]
}

pub struct EmbeddingWork {
    tokens: Tensor,
    dy: Tensor,
}

impl EmbeddingWork {
    pub(crate) fn each(&self, see: See) {
        [&self.tokens, &self.dy].into_iter().for_each(|tensor| see(PUT_OFF, tensor));
    }
}

impl Layer for Embedding {
    type In = Tensor; // [T] i64
    type Out = Tensor; // [T, D]
    type DOut = Tensor;
    type DIn = ();
    type Saved = Tensor; // tokens
    type WeightWork = EmbeddingWork;

    fn forward(&self, w: &Weights, tokens: Tensor) -> (Tensor, Tensor) {
        (w.get(self.weight).index_select(0, &tokens), tokens)
    }
    fn backward_input(&self, _: &Weights, dy: Tensor, tokens: Tensor) -> ((), EmbeddingWork) {
        ((), EmbeddingWork { tokens, dy })
    }
    fn backward_weight(&self, work: EmbeddingWork, grads: &mut Grads) {
        grads.accumulate(self.weight, |gradient, fresh| {
            if fresh {
                let _ = gradient.zero_();
            }
            embedding::backward(gradient, &work.tokens, &work.dy);
        });
    }
}
