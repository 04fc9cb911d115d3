//! ZeRO-1 (Rajbhandari et al., SC 2020): the ranks that hold a parameter alike share out its rows. Each keeps masters and
//! moments of its own rows alone, gets their gradient summed by a reduce-scatter, and gives their new values to the
//! others by an all-gather. Gradients start in buckets while the rest of the backward runs; weights land lazily, under
//! the next forward.
//!
//! Invariant: buckets and their order are a function of the parameter table and the group's size, so every rank of a
//! group starts the same transfers in the same order.
//!
//! Legend: N ranks of a group; a row is one index of dim 0; a block is 128 rows, or one expert.
use kernels::ops::adamw;
use model::params::{ParamSpec, Role};
use model::{GradSink, ParamId, ParamTable, Weights};
use parallel::comm::{Comm, CommError, Pending};
use parallel::mesh::Groups;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// A bucket is closed at about so much gradient.
pub const BUCKET_BYTES: usize = 32 << 20;

/// A shard starts and ends at whole blocks, so that the optimizer's pass over it can write 128 × 128 scales.
const BLOCK_ROWS: i64 = 128;

/// The ranks that hold parameters of this role alike.
pub fn holders(groups: &Groups, role: Role) -> &Comm {
    match role {
        Role::Experts => &groups.expert_data,
        Role::Embedding => &groups.embedding,
        Role::Matrix | Role::Norm | Role::Gate | Role::Bias => &groups.data,
    }
}

/// Σ x² over tensors that no other rank has a part of.
pub fn sum_of_squares(gradients: &[Tensor]) -> f64 {
    gradients.iter().map(adamw::sum_of_squares).sum()
}

/// Rows of a parameter that this rank updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    pub id: ParamId,
    /// First row in this rank's tensor, which itself may start further down in the logical one.
    pub start: i64,
    pub rows: i64,
}

impl Shard {
    /// An alias of its rows.
    pub fn of(&self, tensor: &Tensor) -> Tensor {
        tensor.narrow(0, self.start, self.rows)
    }

    /// Its own place in the logical tensor, of `spec`'s part.
    pub fn spec(&self, spec: &ParamSpec) -> ParamSpec {
        let mut own = ParamSpec { start: spec.start + self.start, ..spec.clone() };
        own.shape[0] = self.rows;
        own
    }
}

/// How this rank's parameters are reduced, updated and gathered.
pub struct Zero {
    shards: Vec<Shard>,
    lanes: Vec<Lane>,
    /// Lane by lane, each in the order in which a backward completes its parameters.
    buckets: Vec<Rc<Bucket>>,
    /// Of every parameter.
    routes: Vec<Route>,
    table: Rc<ParamTable>,
    kind: Kind,
    device: Device,
}

/// Where a gradient goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    Untrained,
    /// No other rank holds it: it is its own shard, of this index.
    Alone(usize),
    Bucket(usize),
}

/// The buckets of one communicator: they start one after the other.
struct Lane {
    comm: Comm,
    buckets: Range<usize>,
}

struct Bucket {
    lane: usize,
    /// This rank in its group.
    rank: usize,
    ids: Vec<ParamId>,
    /// Of the gradients.
    reduce: Layout,
    /// Of the weights, a buffer for each kind that the layers compute with.
    gather: Vec<(Kind, Layout)>,
}

/// Rows of one parameter in a rank's piece of a flat buffer.
#[derive(Clone, Debug)]
struct Run {
    owner: usize,
    shard: Shard,
    /// First element in the piece.
    offset: i64,
    numel: i64,
}

/// A flat buffer [N, width]: row r holds rank r's runs one after the other, then zeros.
#[derive(Debug)]
struct Layout {
    ranks: usize,
    width: i64,
    runs: Vec<Run>,
}

impl Layout {
    /// `runs` in order; their offsets are set here.
    fn new(ranks: usize, runs: impl Iterator<Item = Run>) -> Layout {
        let mut used = vec![0; ranks];
        let mut place = |mut run: Run| {
            run.offset = used[run.owner];
            used[run.owner] += run.numel;
            run
        };
        let runs = runs.map(&mut place).collect();
        Layout { ranks, width: used.into_iter().max().unwrap_or(0), runs }
    }

    fn owned(&self, rank: usize) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(move |run| run.owner == rank)
    }
}

impl Run {
    /// Its elements, flat, in the piece of the rank that owns it.
    fn within(&self, piece: &Tensor) -> Tensor {
        piece.view(-1).narrow(0, self.offset, self.numel)
    }
}

impl Zero {
    /// Makes no collective call. Every rank of a group must have declared the group's parameters in the same order.
    pub fn new(groups: &Groups, weights: &Weights, bucket_bytes: usize) -> Zero {
        let table = &*weights.table;
        let mut lanes: Vec<Lane> = Vec::new();
        let mut members: Vec<Vec<ParamId>> = Vec::new();
        let mut routes = vec![Route::Untrained; table.specs().len()];
        let mut shards = Vec::new();
        for id in table.ids().filter(|&id| table.spec(id).trained()) {
            let comm = holders(groups, table.spec(id).role);
            if comm.size() == 1 {
                routes[id.0] = Route::Alone(0);
                shards.push(Shard { id, start: 0, rows: table.spec(id).shape[0] });
                continue;
            }
            // One order for each communicator, whatever roles share it.
            match lanes.iter().position(|lane| Rc::ptr_eq(&lane.comm, comm)) {
                Some(lane) => members[lane].push(id),
                None => {
                    lanes.push(Lane { comm: comm.clone(), buckets: 0..0 });
                    members.push(vec![id]);
                }
            }
        }
        let mut buckets: Vec<Rc<Bucket>> = Vec::new();
        let bytes_each = weights.precision.master().elt_size_in_bytes();
        for (index, (lane, members)) in lanes.iter_mut().zip(members).enumerate() {
            let first = buckets.len();
            for ids in cut(table, members.into_iter().rev(), lane.comm.size(), (bucket_bytes / bytes_each) as i64) {
                ids.iter().for_each(|id| routes[id.0] = Route::Bucket(buckets.len()));
                buckets.push(Rc::new(Bucket::new(weights, (index, &lane.comm), ids)));
            }
            lane.buckets = first..buckets.len();
        }
        shards.extend(buckets.iter().flat_map(|bucket| bucket.reduce.owned(bucket.rank).map(|run| run.shard)));
        shards.sort_by_key(|shard| shard.id);
        for (index, shard) in
            shards.iter().enumerate().filter(|(_, shard)| matches!(routes[shard.id.0], Route::Alone(_))).collect::<Vec<_>>()
        {
            routes[shard.id.0] = Route::Alone(index);
        }
        Zero { shards, lanes, buckets, routes, table: weights.table.clone(), kind: weights.precision.master(), device: weights.device() }
    }

    /// What this rank owns, in the order of its parameter table; at most one shard a parameter.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The reduction of one step's gradients.
    pub fn begin(&self) -> Reduction<'_> {
        Reduction {
            zero: self,
            whole: BTreeMap::new(),
            filling: self.buckets.iter().map(|bucket| Filling { buffer: None, missing: bucket.ids.len(), sum: None }).collect(),
            next: self.lanes.iter().map(|lane| lane.buckets.start).collect(),
            error: None,
        }
    }

    /// Sends the new values of this rank's rows, which the optimizer has written into `weights`, and announces those of the
    /// others: they land when `weights.ready` asks for them. In the order in which a forward does.
    pub fn gather(&self, weights: &mut Weights) -> Result<(), CommError> {
        let mut forward: Vec<&Rc<Bucket>> = self.buckets.iter().collect();
        forward.sort_by_key(|bucket| bucket.ids.iter().min().copied());
        for bucket in forward {
            let mine = bucket.gather.iter().map(|(kind, layout)| bucket.pack(weights, *kind, layout)).collect();
            let arriving = self.lanes[bucket.lane].comm.all_gather(mine)?;
            let (ids, bucket) = (bucket.ids.clone(), bucket.clone());
            weights.expect(ids, move |weights| {
                let arrived = arriving.wait()?;
                bucket.gather.iter().zip(arrived).for_each(|((_, layout), whole)| bucket.unpack(layout, &whole, weights));
                Ok(())
            });
        }
        Ok(())
    }
}

/// Parameters → buckets of at least `elements`, and of a block for every rank: else some would never own any.
fn cut(table: &ParamTable, ids: impl Iterator<Item = ParamId>, ranks: usize, elements: i64) -> Vec<Vec<ParamId>> {
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
fn blocks(spec: &ParamSpec) -> Vec<(i64, i64, i64)> {
    let rows = spec.shape[0];
    let (step, row) = (if spec.role == Role::Experts { 1 } else { BLOCK_ROWS }, spec.numel() / rows.max(1));
    (0..rows).step_by(step as usize).map(|start| (start, step.min(rows - start), step.min(rows - start) * row)).collect()
}

/// The owner of every block of so many elements: contiguous runs in rank order, the largest as small as it can be.
fn owners(blocks: &[i64], ranks: usize) -> Vec<usize> {
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

impl Bucket {
    fn new(weights: &Weights, (lane, comm): (usize, &Comm), ids: Vec<ParamId>) -> Bucket {
        let table = &weights.table;
        let cut: Vec<(ParamId, (i64, i64, i64))> =
            ids.iter().flat_map(|&id| blocks(table.spec(id)).into_iter().map(move |block| (id, block))).collect();
        let owners = owners(&cut.iter().map(|(_, (.., numel))| *numel).collect::<Vec<_>>(), comm.size());
        let mut runs: Vec<Run> = Vec::new();
        for ((id, (start, rows, numel)), owner) in cut.into_iter().zip(owners) {
            match runs.last_mut().filter(|run| run.shard.id == id && run.owner == owner) {
                Some(run) => (run.shard.rows, run.numel) = (run.shard.rows + rows, run.numel + numel),
                None => runs.push(Run { owner, shard: Shard { id, start, rows }, offset: 0, numel }),
            }
        }
        let kind = |run: &Run| weights.get(run.shard.id).kind();
        let mut kinds: Vec<Kind> = Vec::new();
        runs.iter().map(kind).for_each(|kind| {
            if !kinds.contains(&kind) {
                kinds.push(kind)
            }
        });
        let of_kind = |wanted: Kind| Layout::new(comm.size(), runs.iter().filter(move |run| kind(run) == wanted).cloned());
        let gather = kinds.into_iter().map(|kind| (kind, of_kind(kind))).collect();
        Bucket { lane, rank: comm.rank(), ids, gather, reduce: Layout::new(comm.size(), runs.iter().cloned()) }
    }

    /// This rank's rows, [1, width].
    fn pack(&self, weights: &Weights, kind: Kind, layout: &Layout) -> Tensor {
        let piece = Tensor::zeros([1, layout.width], (kind, weights.device()));
        for run in layout.owned(self.rank) {
            run.within(&piece).copy_(&run.shard.of(weights.get(run.shard.id)).view(-1));
        }
        piece
    }

    /// The others' rows of `whole` [N, width] into the weights.
    fn unpack(&self, layout: &Layout, whole: &Tensor, weights: &mut Weights) {
        for run in layout.runs.iter().filter(|run| run.owner != self.rank) {
            run.shard.of(weights.get(run.shard.id)).view(-1).copy_(&run.within(&whole.get(run.owner as i64)));
        }
    }
}

/// A step's gradients on their way to their owners. Dropping one that was not finished waits for what it started.
pub struct Reduction<'a> {
    zero: &'a Zero,
    /// Gradients of parameters that no other rank holds, by shard.
    whole: BTreeMap<usize, Tensor>,
    /// Of every bucket.
    filling: Vec<Filling>,
    /// Of every lane, its next bucket to start.
    next: Vec<usize>,
    error: Option<CommError>,
}

struct Filling {
    /// [N, width], from the first gradient until its transfer starts.
    buffer: Option<Tensor>,
    /// Gradients still to come.
    missing: usize,
    sum: Option<Pending<Vec<Tensor>>>,
}

impl GradSink for Reduction<'_> {
    fn complete(&mut self, id: ParamId, gradient: Tensor) {
        match self.zero.routes[id.0] {
            Route::Untrained => panic!("parameter {id:?} is not trained"),
            Route::Alone(shard) => drop(self.whole.insert(shard, gradient)),
            Route::Bucket(index) => {
                self.fill(index, id, &gradient);
                drop(gradient);
                self.start(self.zero.buckets[index].lane);
            }
        }
    }
}

impl Reduction<'_> {
    fn fill(&mut self, index: usize, id: ParamId, gradient: &Tensor) {
        let (layout, filling) = (&self.zero.buckets[index].reduce, &mut self.filling[index]);
        assert!(filling.missing > 0, "a gradient of {id:?} came after its bucket was full");
        filling.missing -= 1;
        let options = (self.zero.kind, self.zero.device);
        let buffer = filling.buffer.get_or_insert_with(|| Tensor::zeros([layout.ranks as i64, layout.width], options));
        for run in layout.runs.iter().filter(|run| run.shard.id == id) {
            let rows = run.shard.of(gradient);
            run.within(&buffer.get(run.owner as i64)).view(&rows.size()[..]).copy_(&rows);
        }
    }

    /// Starts the lane's full buckets, up to the first that is not.
    fn start(&mut self, lane: usize) {
        let Lane { comm, buckets } = &self.zero.lanes[lane];
        while self.next[lane] < buckets.end && self.filling[self.next[lane]].missing == 0 && self.error.is_none() {
            let filling = &mut self.filling[self.next[lane]];
            let buffer = filling.buffer.take().expect("a full bucket has a buffer");
            match comm.reduce_scatter(vec![buffer]) {
                Ok(sum) => filling.sum = Some(sum),
                Err(error) => self.error = Some(error),
            }
            self.next[lane] += 1;
        }
    }

    /// The summed gradient of each of `Zero::shards`, in their order, once every parameter's is complete.
    pub fn finish(mut self) -> Result<Vec<Tensor>, CommError> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let mut sums = std::mem::take(&mut self.whole);
        for (bucket, filling) in self.zero.buckets.iter().zip(self.filling) {
            assert_eq!(filling.missing, 0, "gradients of a bucket of {:?} never came", bucket.ids);
            let piece = filling.sum.expect("a full bucket was started").wait()?.remove(0);
            for run in bucket.reduce.owned(bucket.rank) {
                let index = self.zero.shards.binary_search_by_key(&run.shard.id, |shard| shard.id).expect("an owned run is a shard");
                let shape = run.shard.spec(self.zero.table.spec(run.shard.id)).shape;
                sums.insert(index, run.within(&piece).view(&shape[..]));
            }
        }
        assert_eq!(sums.len(), self.zero.shards.len(), "every shard has a gradient");
        Ok(sums.into_values().collect())
    }
}

#[cfg(test)]
mod tests;
