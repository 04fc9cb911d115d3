//! What a plan must send, from the routes alone: the formula that counted bytes are held against.
//!
//! Legend: N ranks of L a node, E experts, K experts a token, D width.
use super::group::ranks_per_node;
use super::wire::Wire;
use kernels::fp8::TILE;
use tch::Kind;

/// Sent by one rank: to other ranks of its node, and to other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    pub inside: u64,
    pub between: u64,
}

/// Rows that a rank sends towards the experts, and those that it sends back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowsSent {
    pub outward: Sent,
    pub inward: Sent,
}

/// `routes[s]`: the experts of each token of rank s; `nodes`: the node of each rank → the rows that each rank sends.
/// A token costs one row for each other node that holds an expert of its, and on every such node, its own too, one
/// row for each rank that holds one, but the rank with the sender's index, which has it already. Where nodes are
/// uneven: one row for each other rank.
pub fn rows_sent(routes: &[Vec<Vec<i64>>], num_experts: i64, nodes: &[usize]) -> Vec<RowsSent> {
    let (ranks, per_node) = (nodes.len(), ranks_per_node(nodes));
    let mut rows = vec![RowsSent::default(); ranks];
    let mut moved = |from: usize, to: usize| {
        let inside = nodes[from] == nodes[to];
        let count = |sent: &mut Sent| *(if inside { &mut sent.inside } else { &mut sent.between }) += u64::from(from != to);
        count(&mut rows[from].outward);
        count(&mut rows[to].inward);
    };
    for (home, tokens) in routes.iter().enumerate() {
        for experts in tokens {
            let holds = |rank: usize| experts.iter().any(|&expert| (expert * ranks as i64 / num_experts) as usize == rank);
            for first in (0..ranks).step_by(per_node) {
                let (through, members) = (first + home % per_node, first..first + per_node);
                if members.clone().any(holds) {
                    moved(home, through);
                    members.filter(|&rank| holds(rank)).for_each(|rank| moved(through, rank));
                }
            }
        }
    }
    rows
}

/// Bytes that a rank tells each other rank while a plan is made: rows of each of its experts, tokens for each rank
/// of its node, tokens for its node.
pub fn count_bytes(num_experts: i64, nodes: &[usize]) -> u64 {
    8 * (num_experts as u64 / nodes.len() as u64 + ranks_per_node(nodes) as u64 + 1)
}

/// Bytes of one row of each transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowBytes {
    /// The row, the weights of its choices, and its slots in 32 bits each.
    pub dispatch: u64,
    pub combine: u64,
    pub combine_backward: u64,
    /// The row and the gradients of its weights.
    pub dispatch_backward: u64,
}

/// Rows of `width` in `kind`, `top_k` weights in `weights`.
pub fn row_bytes(wire: Wire, width: i64, kind: Kind, top_k: i64, weights: Kind) -> RowBytes {
    let own = width as u64 * kind.elt_size_in_bytes() as u64;
    let weights = top_k as u64 * weights.elt_size_in_bytes() as u64;
    let outward = match wire {
        Wire::Own => own,
        Wire::Fp8 => width as u64 + (width as u64).div_ceil(TILE as u64) * 4,
    };
    RowBytes { dispatch: outward + weights + top_k as u64 * 4, combine: own, combine_backward: outward, dispatch_backward: own + weights }
}
