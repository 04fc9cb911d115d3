//! The ranks that share the experts of a stage, and how many rows go where between them.
//!
//! Legend: N ranks on M nodes of L (N = M · L, rank = node · L + index), E experts, E/N a rank.
use super::wire::Wire;
use crate::comm::{Comm, CommError};
use cudarc::driver::CudaEvent;
use kernels::ops::routes;
use tch::{Device, Kind, Tensor};

/// Ranks that share out experts, and the way a row takes between them: in one hop, or first to the node, once,
/// whatever the number of ranks there that want it, and then to the ranks (report §3.2.2).
#[derive(Clone)]
pub struct ExpertGroup {
    pub all: Comm,
    pub(super) wire: Wire,
    hops: Vec<Comm>,
    ranks_per_node: usize,
}

impl ExpertGroup {
    /// `nodes`: the node of each rank of `all`. Collective. Rows go by the node where there are several nodes with
    /// equally many neighbouring ranks, more than one; else straight to the ranks.
    pub fn new(all: Comm, nodes: &[usize]) -> Result<Self, CommError> {
        assert_eq!(nodes.len(), all.size(), "a node for every rank");
        let ranks_per_node = ranks_per_node(nodes);
        if ranks_per_node == 1 {
            return Ok(Self::flat(all));
        }
        // Ranks with the same index on their nodes, then those of this node.
        let hops = vec![all.split(all.rank() % ranks_per_node, all.rank())?, all.split(all.rank() / ranks_per_node, all.rank())?];
        Ok(ExpertGroup { all, wire: Wire::Own, hops, ranks_per_node })
    }

    /// Every rank is reached in one hop.
    pub fn flat(all: Comm) -> Self {
        let hops = if all.size() == 1 { Vec::new() } else { vec![all.clone()] };
        ExpertGroup { all, wire: Wire::Own, hops, ranks_per_node: 1 }
    }

    /// What rows are between the ranks; `Wire::Own` unless said.
    pub fn with_wire(self, wire: Wire) -> Self {
        ExpertGroup { wire, ..self }
    }

    pub fn wire(&self) -> Wire {
        self.wire
    }

    /// The groups that a row crosses, outermost first; none for a group of one.
    pub(super) fn hops(&self) -> &[Comm] {
        &self.hops
    }

    /// Is a row at its rank sooner than the host has posted it? All are of one host, and it is one copy.
    pub fn near(&self) -> bool {
        self.ranks_per_node == 1 && self.hops.iter().all(|hop| hop.lands_in_place())
    }

    /// As `Communicator::buffer_bytes`, of the groups that a row crosses beside `all`.
    pub fn hop_buffer_bytes(&self) -> usize {
        if self.ranks_per_node == 1 { 0 } else { self.hops.iter().map(|hop| hop.buffer_bytes()).sum() }
    }

    /// Ranks that a row reaches through one copy to their node; 1: every rank gets its own.
    pub fn ranks_per_node(&self) -> usize {
        self.ranks_per_node
    }
}

/// Of even nodes; 1 where they are uneven or only one.
pub(super) fn ranks_per_node(nodes: &[usize]) -> usize {
    let length = nodes.iter().take_while(|&&node| node == nodes[0]).count();
    let mut seen = Vec::new();
    let even = nodes.len().is_multiple_of(length)
        && nodes.chunks(length).all(|chunk| {
            let new = !seen.contains(&chunk[0]);
            seen.push(chunk[0]);
            new && chunk.iter().all(|&node| node == chunk[0])
        });
    if even && length < nodes.len() { length } else { 1 }
}

/// How many rows go where. Integers from end to end.
#[derive(Debug, PartialEq)]
pub(super) struct Counts {
    /// Rows of each local expert, [E/N].
    pub experts: Vec<i64>,
    /// Rows to and from each rank, of each hop.
    pub send: Vec<Vec<i64>>,
    pub recv: Vec<Vec<i64>>,
}

/// This rank's own counts on their way to the host. What is put on the GPU meanwhile hides that way, and the host's
/// agreeing with the others.
pub(super) struct Counting {
    /// Rows of each expert, tokens to each rank, tokens to each node.
    mine: Tensor,
    /// On a GPU: when they are on the host.
    there: Option<CudaEvent>,
}

impl Counting {
    pub fn start(routes: &Tensor, num_experts: i64, group: &ExpertGroup) -> Self {
        let (ranks, per_node) = (group.all.size(), group.ranks_per_node);
        let mine = routes::count(routes, num_experts, ranks as i64, (ranks / per_node) as i64);
        if !mine.device().is_cuda() {
            return Counting { mine, there: None };
        }
        let stream = kernels::device::gpu(mine.device()).default_stream();
        // Into pinned memory, without a wait.
        let mine = mine.to_device_(Device::Cpu, Kind::Int64, true, false);
        Counting { mine, there: Some(stream.record_event(None).expect("an event on a live stream")) }
    }
}

impl Counts {
    /// The one time that the host waits for a MoE layer and micro-batch: everyone tells everyone what it will send,
    /// also what its node will have to pass on.
    pub fn exchange(counting: Counting, num_experts: i64, group: &ExpertGroup) -> Result<Self, CommError> {
        let ranks = group.all.size();
        counting.there.iter().for_each(|event| event.synchronize().expect("the GPU counts"));
        let mine = Vec::<i64>::try_from(counting.mine).expect("i64 counts");
        let (rows, tokens) = mine.split_at(num_experts as usize);
        let (to_rank, to_node) = tokens.split_at(ranks);
        let told = group.all.exchange_counts(&told(rows, to_rank, to_node))?;
        Ok(Self::from_told(&told, to_node, group.all.rank()))
    }

    /// `told[s]`: what rank s told `rank`; `to_node` [M]: the rows that this rank sends to each node.
    fn from_told(told: &[Vec<i64>], to_node: &[i64], rank: usize) -> Self {
        let (nodes, per_node) = (to_node.len(), told.len() / to_node.len());
        let (local, index) = (told[0].len() - per_node - 1, rank % per_node);
        let experts = (0..local).map(|expert| told.iter().map(|list| list[expert]).sum()).collect();
        // Rows come from the ranks with the same index; `through` passes on to `to` what it got from those with its own.
        let first = (0..nodes).map(|node| told[node * per_node + index][local + per_node]).collect();
        let passed = |through: usize, to: usize| (0..nodes).map(|node| told[node * per_node + through][local + to]).sum();
        let send = vec![to_node.to_vec(), (0..per_node).map(|to| passed(index, to)).collect()];
        let recv = vec![first, (0..per_node).map(|through| passed(through, index)).collect()];
        Counts { experts, send, recv }
    }
}

/// rows [E]; tokens to each rank [N] and to each node [M] → for each rank: the rows of its experts, the tokens to each
/// rank of its node, the tokens to its node, [E/N + L + 1].
fn told(rows: &[i64], to_rank: &[i64], to_node: &[i64]) -> Vec<Vec<i64>> {
    let (local, per_node) = (rows.len() / to_rank.len(), to_rank.len() / to_node.len());
    let of = |rank: usize| {
        let node = rank / per_node;
        [&rows[rank * local..][..local], &to_rank[node * per_node..][..per_node], &to_node[node..][..1]].concat()
    };
    (0..to_rank.len()).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::local::run_local;

    #[test]
    fn rows_go_by_the_node_where_nodes_are_even() {
        for (nodes, per_node) in [
            (&[0usize][..], 1),
            (&[0, 0, 0, 0], 1), // one node
            (&[0, 1, 2, 3], 1),
            (&[3, 3, 5, 5], 2),
            (&[0, 0, 1], 1),          // uneven
            (&[0, 0, 1, 1, 0, 0], 1), // a node in two places
            (&[0, 0, 0, 1, 1, 1], 3),
        ] {
            assert_eq!(ranks_per_node(nodes), per_node, "{nodes:?}");
        }
    }

    #[test]
    fn counts_of_thousand_millions_are_exact() {
        // 2 nodes of 2 ranks, 2 experts each; odd numbers near 10⁹ that f32 cannot hold. Rank s tells rows and tokens
        // that need not belong to any real routes: only their way is asked for.
        const BASE: i64 = 1_000_000_001;
        let rows = |s: i64| (0..8).map(|e| BASE + 100 * s + e).collect::<Vec<_>>();
        let to_rank = |s: i64| (0..4).map(|d| BASE + 10_000 * s + 10 * d).collect::<Vec<_>>();
        let to_node = |s: i64| (0..2).map(|n| 2 * BASE + 1_000 * s + n).collect::<Vec<_>>();
        run_local(4, |all| {
            let rank = all.rank() as i64;
            let told = all.exchange_counts(&told(&rows(rank), &to_rank(rank), &to_node(rank))).unwrap();
            let counts = Counts::from_told(&told, &to_node(rank), rank as usize);
            let (node, index) = (rank / 2, rank % 2);
            assert_eq!(counts.experts, [0, 1].map(|e| 4 * BASE + 600 + 4 * (2 * rank + e)));
            assert_eq!(counts.send[0], to_node(rank));
            assert_eq!(counts.recv[0], [index, index + 2].map(|s| to_node(s)[node as usize]));
            let of = |through: i64, to: i64| [through, through + 2].map(|s| to_rank(s)[(node * 2 + to) as usize]).iter().sum::<i64>();
            assert_eq!(counts.send[1], [0, 1].map(|to| of(index, to)));
            assert_eq!(counts.recv[1], [0, 1].map(|through| of(through, index)));
        });
    }
}
