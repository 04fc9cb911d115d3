//! One step's gradients on their way to their owners: each bucket starts as soon as it is full and its turn has come.
use super::{Bucket, Lane, Route, Run, Zero};
use kernels::ops::gradient_norm::{Parts, Squares};
use model::{GradSink, ParamId};
use parallel::comm::{Comm, CommError, Pending};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use tch::Tensor;

/// Dropping one that was not finished waits for what it started.
pub struct Reduction<'a> {
    zero: &'a Zero,
    /// Gradients of parameters that no other rank holds, by shard.
    whole: BTreeMap<usize, Tensor>,
    /// Of every bucket.
    pub(super) filling: Vec<Filling>,
    /// Of every lane, its next bucket to start.
    next: Vec<usize>,
    error: Option<CommError>,
    late: bool,
}

/// Gradients on their way to this rank, to be summed when all have started: not before, as under DualPipe what another rank
/// makes of one may hang on a backward that is this rank's to come.
pub struct Arriving {
    /// Of parameters that no other rank holds, by shard.
    whole: BTreeMap<usize, Tensor>,
    /// Of every bucket, the shard of each of this rank's runs, and its parts.
    buckets: Vec<(Vec<usize>, Pending<Vec<Parts>>)>,
}

pub(super) struct Filling {
    /// Until the bucket's transfer starts.
    gradients: BTreeMap<ParamId, Tensor>,
    /// Gradients still to come.
    missing: usize,
    pub(super) arriving: Option<Pending<Vec<Parts>>>,
}

impl GradSink for Reduction<'_> {
    /// The other owners' rows, if the bucket starts with them: while they travel, this rank's own are made, which nobody reads
    /// before all are summed.
    fn leaving(&self, id: ParamId) -> Vec<Range<i64>> {
        let Route::Bucket(index) = self.zero.routes[id.0] else { return Vec::new() };
        let bucket = &self.zero.buckets[index];
        if self.late || self.filling[index].missing > 1 || self.next[bucket.lane] < index {
            return Vec::new();
        }
        let mut all: Vec<Range<i64>> = Vec::new();
        for Run { shard, .. } in bucket.reduce.runs.iter().filter(|run| run.shard.id == id && run.owner != bucket.rank) {
            match all.last_mut().filter(|rows| rows.end == shard.start) {
                Some(rows) => rows.end += shard.rows,
                None => all.push(shard.start..shard.start + shard.rows),
            }
        }
        all
    }

    fn complete(&mut self, id: ParamId, gradient: Tensor) {
        match self.zero.routes[id.0] {
            Route::Untrained => panic!("parameter {id:?} is not trained"),
            Route::Alone => drop(self.whole.insert(self.zero.index(id), gradient)),
            Route::Bucket(index) => {
                let filling = &mut self.filling[index];
                assert!(filling.missing > 0, "a gradient of {id:?} came after its bucket was full");
                filling.missing -= 1;
                filling.gradients.insert(id, gradient);
                if !self.late {
                    self.start(self.zero.buckets[index].lane);
                }
            }
        }
    }
}

impl Reduction<'_> {
    pub(super) fn new(zero: &Zero, late: bool) -> Reduction<'_> {
        Reduction {
            zero,
            whole: BTreeMap::new(),
            filling: zero.buckets.iter().map(|bucket| Filling { gradients: BTreeMap::new(), missing: bucket.ids.len(), arriving: None }).collect(),
            next: zero.lanes.iter().map(|lane| lane.buckets.start).collect(),
            error: None,
            late,
        }
    }

    /// Starts the lane's full buckets, up to the first that is not.
    fn start(&mut self, lane: usize) {
        let Lane { comm, buckets } = &self.zero.lanes[lane];
        while self.next[lane] < buckets.end && self.filling[self.next[lane]].missing == 0 && self.error.is_none() {
            let filling = &mut self.filling[self.next[lane]];
            match to_owners(&self.zero.buckets[self.next[lane]], comm, std::mem::take(&mut filling.gradients)) {
                Ok(arriving) => filling.arriving = Some(arriving),
                Err(error) => self.error = Some(error),
            }
            self.next[lane] += 1;
        }
    }

    /// Once every parameter's gradient is complete.
    pub fn finish(mut self) -> Result<Arriving, CommError> {
        (0..self.next.len()).for_each(|lane| self.start(lane));
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let started = |(bucket, filling): (&Rc<Bucket>, Filling)| {
            assert_eq!(filling.missing, 0, "gradients of a bucket of {:?} never came", bucket.ids);
            let shards = bucket.reduce.owned(bucket.rank).map(|run| self.zero.index(run.shard.id)).collect();
            (shards, filling.arriving.expect("a full bucket was started"))
        };
        let filling = std::mem::take(&mut self.filling);
        let buckets = self.zero.buckets.iter().zip(filling).map(started).collect();
        Ok(Arriving { whole: std::mem::take(&mut self.whole), buckets })
    }
}

impl Arriving {
    /// The summed gradient of each of `Zero::shards`, in their order, and Σ x² over them, [] f64 where they are. Those that
    /// came first are summed while others come.
    pub fn sum(self) -> Result<(Vec<Tensor>, Tensor), CommError> {
        let mut squares = Squares::default();
        self.whole.values().for_each(|gradient| squares.take(gradient));
        let mut sums = self.whole;
        for (shards, arriving) in self.buckets {
            for (shard, parts) in shards.into_iter().zip(arriving.wait()?) {
                sums.insert(shard, squares.add_and_take(parts));
            }
        }
        Ok((sums.into_values().collect(), squares.total()))
    }
}

/// Each run of rows goes from where it is to its owner, who gets a place for every other rank's.
fn to_owners(bucket: &Bucket, comm: &Comm, gradients: BTreeMap<ParamId, Tensor>) -> Result<Pending<Vec<Parts>>, CommError> {
    let (rank, size) = (comm.rank(), comm.size());
    let sends = bucket.reduce.runs.iter().filter(|run| run.owner != rank).map(|run| (run.owner, run.shard.of(&gradients[&run.shard.id])));
    let own = bucket.reduce.owned(rank).map(|run| {
        let own = run.shard.of(&gradients[&run.shard.id]);
        let (kind, device) = (own.kind(), own.device());
        Parts::of(own, (rank, size), |shape| comm.room(shape, kind, device))
    });
    let own: Vec<Parts> = own.collect::<Result<_, _>>()?;
    let others = (0..size).filter(|&peer| peer != rank).enumerate();
    let places = others.flat_map(|(other, peer)| own.iter().map(move |parts| (peer, parts.place(other)))).collect();
    Ok(comm.exchange_into(sends.collect(), places)?.map(|()| Ok(own)))
}
