//! ZeRO-1 (Rajbhandari et al., SC 2020): the ranks that hold a parameter alike share out its rows. Each keeps masters and
//! moments of its own rows alone, gets their gradient summed by a reduce-scatter, and gives their new values to the
//! others by an all-gather. Gradients start in buckets while the rest of the backward runs; weights land lazily, under
//! the next forward.
//!
//! Invariant: buckets and their order are a function of the parameter table and the group's size, so every rank of a
//! group starts the same transfers in the same order.
//!
//! Legend: N ranks of a group; a row is one index of dim 0; a block is 128 rows, or one expert.
mod layout;
mod reduction;

pub use layout::{Share, shares};
pub use reduction::{Arriving, Reduction};

use layout::{Layout, Run, cut, share_out};
use model::params::{ParamSpec, Role};
use model::{ParamId, ParamTable, Weights};
use parallel::comm::{Comm, CommError};
use parallel::mesh::Groups;
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// A bucket is closed at about so much gradient.
pub const BUCKET_BYTES: usize = 32 << 20;

/// The ranks that hold parameters of this role alike.
pub fn holders(groups: &Groups, role: Role) -> &Comm {
    match role {
        Role::Experts => &groups.expert_data,
        Role::Embedding => &groups.embedding,
        Role::Matrix | Role::Norm | Role::Gate | Role::Bias => &groups.data,
    }
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
    device: Device,
}

/// Where a gradient goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    Untrained,
    /// No other rank holds it: it is its own shard.
    Alone,
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
    /// The checksums of every rank's runs, [N, most runs of a rank], as they came with the newest weights.
    sums: RefCell<Option<Tensor>>,
}

impl Zero {
    /// Collective: every rank of a group must have declared the group's parameters in the same order.
    pub fn new(groups: &Groups, weights: &Weights, bucket_bytes: usize) -> Result<Zero, CommError> {
        let table = &*weights.table;
        let mut lanes: Vec<Lane> = Vec::new();
        let mut members: Vec<Vec<ParamId>> = Vec::new();
        let mut routes = vec![Route::Untrained; table.specs().len()];
        let mut shards = Vec::new();
        for id in table.completed().into_iter().filter(|&id| table.spec(id).trained()) {
            let comm = holders(groups, table.spec(id).role);
            if comm.size() == 1 {
                routes[id.0] = Route::Alone;
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
            for ids in cut(table, members.into_iter(), lane.comm.size(), (bucket_bytes / bytes_each) as i64) {
                ids.iter().for_each(|id| routes[id.0] = Route::Bucket(buckets.len()));
                buckets.push(Rc::new(Bucket::new(weights, (index, &lane.comm), ids)));
            }
            lane.buckets = first..buckets.len();
        }
        shards.extend(buckets.iter().flat_map(|bucket| bucket.reduce.owned(bucket.rank).map(|run| run.shard)));
        shards.sort_by_key(|shard| shard.id);
        let (table, device) = (weights.table.clone(), weights.device());
        let zero = Zero { shards, lanes, buckets, routes, table, device };
        zero.agree()?;
        Ok(zero)
    }

    /// Every rank of a group cuts the same parameters in the same way: sums of others' would be numbers, too.
    fn agree(&self) -> Result<(), CommError> {
        let post = |lane: &Lane| lane.comm.all_gather(vec![Tensor::from_slice(&[self.fingerprint(lane)]).to_device(self.device)]);
        let posted: Vec<_> = self.lanes.iter().map(post).collect::<Result<_, _>>()?;
        for (lane, posted) in self.lanes.iter().zip(posted) {
            let all = Vec::<i64>::try_from(&posted.wait()?[0]).expect("i64 fingerprints");
            let rank = lane.comm.rank();
            if let Some(peer) = all.iter().position(|&other| other != all[rank]) {
                let ids = self.buckets[lane.buckets.clone()].iter().map(|bucket| bucket.ids.len()).sum::<usize>();
                let mine = format!("the optimizer over {ids} parameters in {} buckets", lane.buckets.len());
                return Err(CommError::Disagree { rank, peer, mine, theirs: "it over others, or in another order".into() });
            }
        }
        Ok(())
    }

    fn fingerprint(&self, lane: &Lane) -> i64 {
        let mut hasher = blake3::Hasher::new();
        for bucket in &self.buckets[lane.buckets.clone()] {
            for spec in bucket.ids.iter().map(|&id| self.table.spec(id)) {
                hasher.update(format!("{} {:?} {} {}\n", spec.name, spec.shape, spec.start, spec.total).as_bytes());
            }
            hasher.update(format!("{}\n", bucket.reduce.width).as_bytes());
        }
        i64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("eight bytes"))
    }

    /// What this rank owns, in the order of its parameter table; at most one shard a parameter.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    fn index(&self, id: ParamId) -> usize {
        self.shards.binary_search_by_key(&id, |shard| shard.id).expect("this rank owns some of it")
    }

    /// The reduction of one step's gradients. `late`: none leaves before all are complete. So where ranks of a group do not run the
    /// same stages: one's host may wait for another's, which would wait for the first one's results.
    pub fn begin(&self, late: bool) -> Reduction<'_> {
        Reduction::new(self, late)
    }

    /// Every run of rows that this rank computes with, its own and the others'.
    pub fn held(&self) -> Vec<Shard> {
        let alone = self.shards.iter().filter(|shard| self.routes[shard.id.0] == Route::Alone).copied();
        alone.chain(self.buckets.iter().flat_map(|bucket| bucket.reduce.runs.iter().map(|run| run.shard))).collect()
    }

    /// The others' rows that have landed, each with the checksum that its owner sent along: [] i64.
    pub fn received(&self) -> Vec<(Shard, Tensor)> {
        let of = |bucket: &Rc<Bucket>| match &*bucket.sums.borrow() {
            Some(sums) => bucket.others().map(|(run, place)| (run.shard, sums.get(run.owner as i64).get(place))).collect(),
            None => Vec::new(),
        };
        self.buckets.iter().flat_map(of).collect()
    }

    /// Of `shards`, by index, what is updated and then gathered together, in the order in which a forward reads them; last
    /// what no other rank holds, under whose update the others' rows travel.
    pub fn turns(&self) -> Vec<Turn> {
        let mut forward: Vec<&Rc<Bucket>> = self.buckets.iter().collect();
        forward.sort_by_key(|bucket| bucket.ids.iter().min().copied());
        let of = |bucket: &Rc<Bucket>| bucket.reduce.owned(bucket.rank).map(|run| self.index(run.shard.id)).collect();
        let mut turns: Vec<Turn> = forward.into_iter().map(|bucket| Turn { shards: of(bucket), bucket: Some(bucket.clone()) }).collect();
        let alone = (0..self.shards.len()).filter(|&index| self.routes[self.shards[index].id.0] == Route::Alone).collect();
        turns.push(Turn { shards: alone, bucket: None });
        turns
    }

    /// Sends the new values of a turn's rows, which the optimizer has written into `weights`, and announces those of the
    /// others: they land when `weights.ready` asks for them. `sums`: the checksum of each of the turn's shards, to go with them.
    pub fn gather(&self, turn: &Turn, weights: &mut Weights, sums: Option<Vec<&Tensor>>) -> Result<(), CommError> {
        let Some(bucket) = &turn.bucket else { return Ok(()) };
        let comm = &self.lanes[bucket.lane].comm;
        let sums = sums.map(|sums| bucket.pack_sums(&sums, self.device));
        if comm.lands_in_place() {
            return bucket.gather_in_place(weights, comm, sums);
        }
        let mut mine: Vec<Tensor> = bucket.gather.iter().map(|(kind, layout)| bucket.pack(weights, *kind, layout)).collect();
        mine.extend(sums);
        let arriving = comm.all_gather(mine)?;
        let (ids, bucket) = (bucket.ids.clone(), bucket.clone());
        weights.expect(ids, move |weights| {
            let mut arrived = arriving.wait()?;
            bucket.sums.replace(arrived.split_off(bucket.gather.len()).pop());
            bucket.gather.iter().zip(arrived).for_each(|((_, layout), whole)| bucket.unpack(layout, &whole, weights));
            Ok(())
        });
        Ok(())
    }
}

/// Some shards, and how the others get to know them.
pub struct Turn {
    pub shards: Vec<usize>,
    bucket: Option<Rc<Bucket>>,
}

impl Turn {
    /// Nobody else gets to know them.
    pub fn stays(&self) -> bool {
        self.bucket.is_none()
    }
}

impl Bucket {
    fn new(weights: &Weights, (lane, comm): (usize, &Comm), ids: Vec<ParamId>) -> Bucket {
        let runs = share_out(&weights.table, &ids, comm.size());
        let kind = |run: &Run| weights.get(run.shard.id).kind();
        let mut kinds: Vec<Kind> = Vec::new();
        runs.iter().map(kind).for_each(|kind| {
            if !kinds.contains(&kind) {
                kinds.push(kind)
            }
        });
        let of_kind = |wanted: Kind| Layout::new(comm.size(), runs.iter().filter(move |run| kind(run) == wanted).cloned());
        let gather = kinds.into_iter().map(|kind| (kind, of_kind(kind))).collect();
        Bucket { lane, rank: comm.rank(), ids, gather, reduce: Layout::new(comm.size(), runs.iter().cloned()), sums: RefCell::new(None) }
    }

    /// Rows go from weight to weight: nothing reads the others' until they are asked for.
    fn gather_in_place(self: &Rc<Self>, weights: &mut Weights, comm: &Comm, sums: Option<Tensor>) -> Result<(), CommError> {
        let peers: Vec<usize> = (0..comm.size()).filter(|&peer| peer != self.rank).collect();
        // Its own are written: where all of a weight is its own, so are the blocks.
        let own = self.reduce.owned(self.rank).map(|run| run.shard.of(weights.get(run.shard.id)));
        let mine: Vec<Tensor> = own.chain(sums.as_ref().map(Tensor::shallow_clone)).collect();
        let everyones = |sums: Tensor| -> Result<Tensor, CommError> {
            let all = comm.room(&[comm.size() as i64, sums.size()[1]], sums.kind(), sums.device())?;
            all.narrow(0, self.rank as i64, 1).copy_(&sums);
            Ok(all)
        };
        let all = sums.map(everyones).transpose()?;
        let sends = peers.iter().flat_map(|&peer| mine.iter().map(move |part| (peer, part.shallow_clone()))).collect();
        let mut places = Vec::new();
        for &peer in &peers {
            let sums = all.as_ref().map(|all| all.narrow(0, peer as i64, 1));
            let rows = self.reduce.owned(peer).map(|run| run.shard.of(weights.write(run.shard.id)));
            places.extend(rows.chain(sums).map(|place| (peer, place)));
        }
        let (arriving, bucket) = (comm.exchange_into(sends, places)?, self.clone());
        weights.expect(self.ids.clone(), move |_| {
            arriving.wait()?;
            bucket.sums.replace(all);
            Ok(())
        });
        Ok(())
    }

    /// This rank's rows, [1, width].
    fn pack(&self, weights: &Weights, kind: Kind, layout: &Layout) -> Tensor {
        let piece = Tensor::zeros([1, layout.width], (kind, weights.device()));
        for run in layout.owned(self.rank) {
            run.within(&piece).copy_(&run.shard.of(weights.get(run.shard.id)).view(-1));
        }
        piece
    }

    /// The others' runs, each with its place among its owner's.
    fn others(&self) -> impl Iterator<Item = (&Run, i64)> {
        let mut next = vec![0; self.reduce.ranks];
        let place = move |run: &Run| {
            next[run.owner] += 1;
            next[run.owner] - 1
        };
        let placed: Vec<i64> = self.reduce.runs.iter().map(place).collect();
        self.reduce.runs.iter().zip(placed).filter(|(run, _)| run.owner != self.rank)
    }

    /// The sums of this rank's runs, [1, most runs of a rank].
    fn pack_sums(&self, own: &[&Tensor], device: Device) -> Tensor {
        let most = (0..self.reduce.ranks).map(|rank| self.reduce.owned(rank).count()).max().unwrap_or(0);
        let packed = Tensor::zeros([1, most as i64], (Kind::Int64, device));
        if !own.is_empty() {
            packed.get(0).narrow(0, 0, own.len() as i64).copy_(&Tensor::stack(own, 0));
        }
        packed
    }

    /// The others' rows of `whole` [N, width] into the weights.
    fn unpack(&self, layout: &Layout, whole: &Tensor, weights: &mut Weights) {
        for run in layout.runs.iter().filter(|run| run.owner != self.rank) {
            run.shard.of(weights.write(run.shard.id)).view(-1).copy_(&run.within(&whole.get(run.owner as i64)));
        }
    }
}

#[cfg(test)]
mod tests;
