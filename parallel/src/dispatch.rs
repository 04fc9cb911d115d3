//! MoE dispatch and combine over the ranks that share the experts (report §3.2.2). A token travels once to each rank
//! that holds an expert of its; there its rows are sorted by expert; what the experts make of it is summed on their
//! rank and comes back as one row. The backward of dispatch is combine, the backward of combine is dispatch, over
//! the same plan.
//!
//! Every transfer is posted at once and unpacked by its `wait`; the caller computes something else in between.
//!
//! Invariant: sums are gathers over fixed places, never scattered additions, so they have one order.
//!
//! Legend: T tokens, K experts a token, N ranks, E experts, S rows sent, V rows received, R rows at the local experts,
//! D width.
use crate::comm::{Comm, CommError, Pending};
use tch::{Kind, Tensor};

/// Where every (token, choice) goes; made once a MoE layer and micro-batch.
pub struct Plan {
    experts: Comm,
    /// The token of each sent row, [S], by destination, then token.
    sent_token: Tensor,
    /// The sent row of (token, rank), [T, N]; S where none goes.
    sent_row: Tensor,
    /// The sent row and slot of each (token, choice), flat in [S · K], as [T · K].
    choice_place: Tensor,
    send: Vec<i64>,
    recv: Vec<i64>,
    /// The flat (received row, slot) of each local row, [R], by expert, then source rank, then token.
    pair: Tensor,
    /// The received row of each local row, [R].
    received_row: Tensor,
    /// The local row of each (received row, slot), [V · K]; R where that slot's expert is elsewhere.
    local_row: Tensor,
    counts: Vec<i64>,
    top_k: i64,
}

/// What arrives at the local experts.
pub struct Dispatched {
    pub rows: Tensor,    // [R, D], sorted by expert
    pub weights: Tensor, // [R]
}

/// The gradients of what was dispatched.
pub struct DispatchGrad {
    pub x: Tensor,       // [T, D]
    pub weights: Tensor, // [T, K]
}

impl Plan {
    /// routes [T, K] i64, the expert of each choice. Collective over `experts`.
    pub fn new(routes: &Tensor, num_experts: i64, experts: &Comm) -> Result<Self, CommError> {
        let (ranks, top_k, device) = (experts.size() as i64, routes.size()[1], routes.device());
        assert_eq!(num_experts % ranks, 0, "experts are shared out evenly");
        let (num_tokens, local) = (routes.size()[0], num_experts / ranks);
        let destination = routes.divide_scalar_mode(local, "floor"); // [T, K]
        let wanted = Tensor::zeros([num_tokens, ranks], (Kind::Int64, device)).scatter_value(1, &destination, 1);
        let places = wanted.tr().nonzero(); // [S, 2]: rank, token
        let (sent_rank, sent_token) = (places.select(1, 0), places.select(1, 1).contiguous());
        let num_sent = sent_token.size()[0];
        let sent_row = Tensor::full([num_tokens * ranks], num_sent, (Kind::Int64, device))
            .scatter(0, &(&sent_token * ranks + &sent_rank), &arange(num_sent, &sent_token))
            .view([num_tokens, ranks]);
        let choice_place = (sent_row.gather(1, &destination, false) * top_k + arange(top_k, routes).unsqueeze(0)).flatten(0, -1);

        // The expert of each slot as its own rank counts them; −1: the slot's expert is on another rank.
        let slots = routes.index_select(0, &sent_token) - sent_rank.unsqueeze(1) * local; // [S, K]
        let elsewhere = slots.lt(0).logical_or(&slots.ge(local));
        let slots = slots.masked_fill(&elsewhere, -1);
        let send = Vec::<i64>::try_from(wanted.sum_dim_intlist(&[0i64][..], false, Kind::Int64)).expect("i64 counts");
        let told: Vec<Vec<i64>> = send.iter().map(|&count| vec![count]).collect();
        let recv: Vec<i64> = experts.exchange_counts(&told)?.into_iter().map(|counts| counts[0]).collect();
        let [slots] = arrived(experts.all_to_all(vec![slots], &send, &recv)?)?;
        let slots = slots.flatten(0, -1); // [V · K]

        let here = slots.ge(0).nonzero().squeeze_dim(1); // flat (row, slot) pairs of local experts
        let expert = slots.index_select(0, &here);
        // Stable: rows of one expert stay in the order of source rank and token.
        let pair = here.index_select(0, &expert.argsort_stable(true, 0, false));
        let num_rows = pair.size()[0];
        let local_row = Tensor::full_like(&slots, num_rows).scatter(0, &pair, &arange(num_rows, &pair));
        let counts = Vec::<i64>::try_from(expert.bincount(None::<&Tensor>, local)).expect("i64 counts");
        let received_row = pair.divide_scalar_mode(top_k, "floor");
        Ok(Plan { experts: experts.clone(), sent_token, sent_row, choice_place, send, recv, pair, received_row, local_row, counts, top_k })
    }

    /// Rows of each local expert.
    pub fn counts(&self) -> &[i64] {
        &self.counts
    }

    /// Forward: x [T, D] and weights [T, K] → the rows and weights at the local experts, in one transfer.
    pub fn dispatch(&self, x: &Tensor, weights: &Tensor) -> Result<Pending<Dispatched>, CommError> {
        let parts = vec![x.index_select(0, &self.sent_token), weights.index_select(0, &self.sent_token)];
        let sent = self.experts.all_to_all(parts, &self.send, &self.recv)?;
        let (received_row, pair) = (self.received_row.shallow_clone(), self.pair.shallow_clone());
        Ok(Pending::running(move || {
            let [rows, weights] = arrived(sent)?;
            Ok(Dispatched { rows: rows.index_select(0, &received_row), weights: weights.flatten(0, -1).index_select(0, &pair) })
        }))
    }

    /// Forward: rows [R, D] → the sum of each token's rows, [T, D]; each sum is taken in at least FP32.
    pub fn combine(&self, rows: &Tensor) -> Result<Pending<Tensor>, CommError> {
        let back = self.experts.all_to_all(vec![self.sum_received(rows)], &self.recv, &self.send)?;
        let sent_row = self.sent_row.shallow_clone();
        Ok(Pending::running(move || {
            let [back] = arrived(back)?; // [S, D]
            Ok(sum_places(&back, &sent_row))
        }))
    }

    /// The backward of `combine`: dy [T, D] → the gradient of its rows, [R, D].
    pub fn combine_backward(&self, dy: &Tensor) -> Result<Pending<Tensor>, CommError> {
        let sent = self.experts.all_to_all(vec![dy.index_select(0, &self.sent_token)], &self.send, &self.recv)?;
        let received_row = self.received_row.shallow_clone();
        Ok(Pending::running(move || {
            let [rows] = arrived(sent)?;
            Ok(rows.index_select(0, &received_row))
        }))
    }

    /// The backward of `dispatch`: the gradients of its rows [R, D] and weights [R] → those of x and weights.
    pub fn dispatch_backward(&self, drows: &Tensor, dweights: &Tensor) -> Result<Pending<DispatchGrad>, CommError> {
        let slots = with_zero(dweights).index_select(0, &self.local_row).view([-1, self.top_k]); // [V, K]
        let back = self.experts.all_to_all(vec![self.sum_received(drows), slots], &self.recv, &self.send)?;
        let (sent_row, choice_place, top_k) = (self.sent_row.shallow_clone(), self.choice_place.shallow_clone(), self.top_k);
        Ok(Pending::running(move || {
            let [back, slots] = arrived(back)?; // [S, D], [S, K]
            let weights = slots.flatten(0, -1).index_select(0, &choice_place).view([-1, top_k]);
            Ok(DispatchGrad { x: sum_places(&back, &sent_row), weights })
        }))
    }

    /// rows [R, D] → one a received row, [V, D].
    fn sum_received(&self, rows: &Tensor) -> Tensor {
        sum_places(rows, &self.local_row.view([-1, self.top_k]))
    }
}

/// Waits for a transfer of `N` tensors.
fn arrived<const N: usize>(sent: Pending<Vec<Tensor>>) -> Result<[Tensor; N], CommError> {
    Ok(sent.wait()?.try_into().expect("as many tensors come as went"))
}

fn arange(count: i64, like: &Tensor) -> Tensor {
    Tensor::arange(count, (Kind::Int64, like.device()))
}

/// One more row, of zeros: what an index of "nowhere" finds.
fn with_zero(rows: &Tensor) -> Tensor {
    let mut shape = rows.size();
    shape[0] = 1;
    Tensor::cat(&[rows, &Tensor::zeros(&shape, (rows.kind(), rows.device()))], 0)
}

/// rows [R, D], places [M, P] (R: nowhere) → the sum over P of the rows there, [M, D].
fn sum_places(rows: &Tensor, places: &Tensor) -> Tensor {
    let (count, each, width) = (places.size()[0], places.size()[1], rows.size()[1]);
    let wide = if rows.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let picked = with_zero(rows).index_select(0, &places.flatten(0, -1)).view([count, each, width]);
    picked.sum_dim_intlist(&[1i64][..], false, wide).to_kind(rows.kind())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::local::run_local;
    use tch::Device;

    /// The first `top_k` of routes where rank r's tokens go to few experts and some experts get none.
    fn routes(rank: i64, tokens: i64, top_k: i64) -> Tensor {
        let token = Tensor::arange(tokens, (Kind::Int64, Device::Cpu)) + rank * 13;
        Tensor::stack(&[(&token * 5).remainder(8), (&token * 5 + 3).remainder(8), (&token + 6).remainder(2)], 1).narrow(1, 0, top_k)
    }

    #[test]
    fn a_token_comes_back_as_the_sum_over_its_experts_whatever_the_number_of_ranks() {
        for (ranks, top_k) in [(1usize, 3), (2, 3), (4, 3), (1, 1), (4, 1)] {
            run_local(ranks, |experts| {
                let tokens = if experts.rank() == 1 { 0 } else { 9 }; // one rank has none
                let routes = routes(experts.rank() as i64, tokens, top_k);
                let plan = Plan::new(&routes, 8, &experts).unwrap();
                let x = Tensor::arange(tokens * 2, (Kind::Double, Device::Cpu)).view([tokens, 2]) + experts.rank() as f64 * 100.0;
                let weights = routes.to_kind(Kind::Double) * 0.5 + 1.0;
                let Dispatched { rows, weights: row_weights } = plan.dispatch(&x, &weights).unwrap().wait().unwrap();
                assert_eq!(rows.size()[0], plan.counts().iter().sum::<i64>());
                // Expert e multiplies by e + 1; which expert a row is at follows from the counts alone.
                let first = experts.rank() as i64 * 8 / ranks as i64;
                let factors: Vec<f64> =
                    plan.counts().iter().enumerate().flat_map(|(e, &n)| vec![(first + e as i64 + 1) as f64; n as usize]).collect();
                let factors = Tensor::from_slice(&factors);
                let weighted = &rows * (&factors * &row_weights).unsqueeze(1);
                let y = plan.combine(&weighted).unwrap().wait().unwrap();
                let expected = &x * ((routes.to_kind(Kind::Double) + 1.0) * &weights).sum_dim_intlist(&[1i64][..], true, Kind::Double);
                assert!(y.equal(&expected), "{y:?} {expected:?}");
                // What rides back with a row arrives at the choice it was made for.
                let back = plan.dispatch_backward(&weighted, &factors).unwrap().wait().unwrap();
                assert!(back.weights.equal(&(routes.to_kind(Kind::Double) + 1.0)));
                // The backward of a sum is a copy; its backward is the sum again.
                assert!(back.x.equal(&y) && plan.combine_backward(&x).unwrap().wait().unwrap().equal(&rows));
            });
        }
    }
}
