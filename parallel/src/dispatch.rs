//! MoE dispatch and combine: rows sorted by expert, and their sums back by token. The backward of dispatch is
//! combine, the backward of combine is dispatch, over the same plan.
//!
//! Legend: T tokens, K experts a token, R = T·K rows, D width, E experts.
use crate::comm::{CommError, Communicator};
use tch::{Kind, Tensor};

/// Where every (token, choice) goes; made once a MoE layer and micro-batch.
pub struct Plan {
    /// Which token each row is of, [R].
    token: Tensor,
    /// Which (token, choice) each row is, [R].
    choice: Tensor,
    /// Which row each (token, choice) is, [T·K].
    row: Tensor,
    counts: Vec<i64>,
    top_k: i64,
}

impl Plan {
    /// routes [T, K] i64, the expert of each choice.
    pub fn new(routes: &Tensor, num_experts: i64, experts: &dyn Communicator) -> Result<Self, CommError> {
        if experts.size() != 1 {
            let reason = format!("experts spread over {} ranks; only ep = 1 is built", experts.size());
            return Err(CommError::Unsupported { op: "dispatch", reason });
        }
        let top_k = routes.size()[1];
        let flat = routes.flatten(0, -1);
        // Stable: rows of one expert stay in token order, so sums do not depend on the sort.
        let choice = flat.argsort_stable(true, 0, false);
        let token = choice.divide_scalar_mode(top_k, "floor");
        let row = choice.empty_like().scatter(0, &choice, &Tensor::arange(choice.size()[0], (Kind::Int64, choice.device())));
        // The one planned host wait of a MoE layer: the experts' row counts.
        let counts = Vec::<i64>::try_from(flat.bincount(None::<&Tensor>, num_experts)).expect("i64 counts");
        Ok(Plan { token, choice, row, counts, top_k })
    }

    /// Rows of each local expert.
    pub fn counts(&self) -> &[i64] {
        &self.counts
    }

    /// x [T, D] → rows [R, D], sorted by expert.
    pub fn dispatch(&self, x: &Tensor) -> Result<Tensor, CommError> {
        Ok(x.index_select(0, &self.token))
    }

    /// weights [T, K] → [R].
    pub fn dispatch_weights(&self, weights: &Tensor) -> Result<Tensor, CommError> {
        Ok(weights.flatten(0, -1).index_select(0, &self.choice))
    }

    /// rows [R, D] → the sum of each token's K rows, [T, D], taken in at least FP32.
    pub fn combine(&self, rows: &Tensor) -> Result<Tensor, CommError> {
        let by_token = rows.index_select(0, &self.row).view([-1, self.top_k, rows.size()[1]]);
        let wide = if rows.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        Ok(by_token.sum_dim_intlist(&[1i64][..], false, wide).to_kind(rows.kind()))
    }

    /// [R] → [T, K].
    pub fn combine_weights(&self, rows: &Tensor) -> Result<Tensor, CommError> {
        Ok(rows.index_select(0, &self.row).view([-1, self.top_k]))
    }
}
