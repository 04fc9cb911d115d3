//! Where rows lie: parameters cut into buckets, their blocks shared out among the ranks, the runs placed in flat buffers.
use super::Shard;
use model::params::{ParamSpec, Role};
use model::{ParamId, ParamTable};
use tch::Tensor;

/// A shard starts and ends at whole blocks, so that the optimizer's pass over it can write 128 × 128 scales.
pub const BLOCK_ROWS: i64 = 128;

/// Rows of one parameter in a rank's piece of a flat buffer.
#[derive(Clone, Debug)]
pub struct Run {
    pub owner: usize,
    pub shard: Shard,
    /// First element in the piece.
    pub offset: i64,
    pub numel: i64,
}

/// A flat buffer [N, width]: row r holds rank r's runs one after the other, then zeros.
#[derive(Debug)]
pub struct Layout {
    pub ranks: usize,
    pub width: i64,
    pub runs: Vec<Run>,
}

impl Layout {
    /// `runs` in order; their offsets are set here.
    pub fn new(ranks: usize, runs: impl Iterator<Item = Run>) -> Layout {
        let mut used = vec![0; ranks];
        let mut place = |mut run: Run| {
            run.offset = used[run.owner];
            used[run.owner] += run.numel;
            run
        };
        let runs = runs.map(&mut place).collect();
        Layout { ranks, width: used.into_iter().max().unwrap_or(0), runs }
    }

    pub fn owned(&self, rank: usize) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(move |run| run.owner == rank)
    }
}

impl Run {
    /// Its elements, flat, in the piece of the rank that owns it.
    pub fn within(&self, piece: &Tensor) -> Tensor {
        piece.view(-1).narrow(0, self.offset, self.numel)
    }
}

/// Parameters → buckets of at least `elements`, and of a block for every rank: else some would never own any.
pub fn cut(table: &ParamTable, ids: impl Iterator<Item = ParamId>, ranks: usize, elements: i64) -> Vec<Vec<ParamId>> {
    let mut buckets = Vec::new();
    let (mut open, mut held, mut largest) = (Vec::new(), 0, 0);
    for id in ids {
        open.push(id);
        held += table.spec(id).numel();
        largest = largest.max(blocks(table.spec(id)).into_iter().map(|(_, _, numel)| numel).max().unwrap_or(0));
        if held >= elements.max(ranks as i64 * largest) {
            buckets.push(std::mem::take(&mut open));
            (held, largest) = (0, 0);
        }
    }
    if !open.is_empty() {
        buckets.push(open);
    }
    buckets
}

/// (first row, rows, elements) of every block.
pub fn blocks(spec: &ParamSpec) -> Vec<(i64, i64, i64)> {
    let rows = spec.shape[0];
    let (step, row) = (if spec.role == Role::Experts { 1 } else { BLOCK_ROWS }, spec.numel() / rows.max(1));
    (0..rows).step_by(step as usize).map(|start| (start, step.min(rows - start), step.min(rows - start) * row)).collect()
}

/// Every rank's runs of these parameters.
pub fn share_out(table: &ParamTable, ids: &[ParamId], ranks: usize) -> Vec<Run> {
    let cut: Vec<(ParamId, (i64, i64, i64))> =
        ids.iter().flat_map(|&id| blocks(table.spec(id)).into_iter().map(move |block| (id, block))).collect();
    let owners = owners(&cut.iter().map(|(_, (.., numel))| *numel).collect::<Vec<_>>(), ranks);
    let mut runs: Vec<Run> = Vec::new();
    for ((id, (start, rows, numel)), owner) in cut.into_iter().zip(owners) {
        match runs.last_mut().filter(|run| run.shard.id == id && run.owner == owner) {
            Some(run) => (run.shard.rows, run.numel) = (run.shard.rows + rows, run.numel + numel),
            None => runs.push(Run { owner, shard: Shard { id, start, rows }, offset: 0, numel }),
        }
    }
    runs
}

/// The owner of every block of so many elements: contiguous runs in rank order, the largest as small as it can be.
pub fn owners(blocks: &[i64], ranks: usize) -> Vec<usize> {
    let fill = |limit: i64| {
        let (mut rank, mut used) = (0, 0);
        let owner = |&numel: &i64| {
            if used + numel > limit {
                (rank, used) = (rank + 1, 0);
            }
            used += numel;
            rank
        };
        blocks.iter().map(owner).collect::<Vec<usize>>()
    };
    let (mut low, mut high) = (blocks.iter().copied().max().unwrap_or(0), blocks.iter().sum());
    while low < high {
        let middle = (low + high) / 2;
        match fill(middle).last() {
            Some(&last) if last >= ranks => low = middle + 1,
            _ => high = middle,
        }
    }
    fill(low)
}

/// What a rank owns of a group's parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    pub elements: i64,
    /// Bytes.
    pub state: i64,
}

/// As `Zero::new` shares parameters out among `holders` of each role, in buckets of about so many `elements`: for each group what
/// each of its ranks owns, of `bytes` an element.
pub fn shares(table: &ParamTable, holders: impl Fn(Role) -> usize, elements: i64, bytes: impl Fn(&ParamSpec) -> i64) -> Vec<Vec<Share>> {
    // Roles of as many holders share a communicator.
    let mut lanes: Vec<(usize, Vec<ParamId>)> = Vec::new();
    for id in table.completed().into_iter().filter(|&id| table.spec(id).trained()) {
        let ranks = holders(table.spec(id).role);
        match lanes.iter_mut().find(|(of, _)| *of == ranks) {
            Some((_, ids)) => ids.push(id),
            None => lanes.push((ranks, vec![id])),
        }
    }
    let of = |(ranks, ids): (usize, Vec<ParamId>)| {
        let mut shares = vec![Share::default(); ranks];
        for run in cut(table, ids.into_iter(), ranks, elements).iter().flat_map(|bucket| share_out(table, bucket, ranks)) {
            let share = &mut shares[run.owner];
            share.elements += run.numel;
            share.state += run.numel * bytes(table.spec(run.shard.id));
        }
        shares
    };
    lanes.into_iter().map(of).collect()
}
