//! One step's gradients on their way to their owners: each bucket starts as soon as it is full and its turn has come.
use super::{Bucket, Lane, Route, Zero};
use model::{GradSink, ParamId};
use parallel::comm::{Comm, CommError, Pending, Reduce, fold};
use std::collections::BTreeMap;
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
}

pub(super) struct Filling {
    /// Until the bucket's transfer starts.
    gradients: BTreeMap<ParamId, Tensor>,
    /// Gradients still to come.
    missing: usize,
    /// Of each of this rank's runs.
    pub(super) sum: Option<Pending<Vec<Tensor>>>,
}

impl GradSink for Reduction<'_> {
    fn complete(&mut self, id: ParamId, gradient: Tensor) {
        match self.zero.routes[id.0] {
            Route::Untrained => panic!("parameter {id:?} is not trained"),
            Route::Alone => drop(self.whole.insert(self.zero.index(id), gradient)),
            Route::Bucket(index) => {
                let filling = &mut self.filling[index];
                assert!(filling.missing > 0, "a gradient of {id:?} came after its bucket was full");
                filling.missing -= 1;
                filling.gradients.insert(id, gradient);
                self.start(self.zero.buckets[index].lane);
            }
        }
    }
}

impl Reduction<'_> {
    pub(super) fn new(zero: &Zero) -> Reduction<'_> {
        Reduction {
            zero,
            whole: BTreeMap::new(),
            filling: zero.buckets.iter().map(|bucket| Filling { gradients: BTreeMap::new(), missing: bucket.ids.len(), sum: None }).collect(),
            next: zero.lanes.iter().map(|lane| lane.buckets.start).collect(),
            error: None,
        }
    }

    /// Starts the lane's full buckets, up to the first that is not.
    fn start(&mut self, lane: usize) {
        let Lane { comm, buckets } = &self.zero.lanes[lane];
        while self.next[lane] < buckets.end && self.filling[self.next[lane]].missing == 0 && self.error.is_none() {
            let filling = &mut self.filling[self.next[lane]];
            match sum_at_owners(&self.zero.buckets[self.next[lane]], comm, std::mem::take(&mut filling.gradients)) {
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
            let runs = filling.sum.expect("a full bucket was started").wait()?;
            for (run, sum) in bucket.reduce.owned(bucket.rank).zip(runs) {
                sums.insert(self.zero.index(run.shard.id), sum);
            }
        }
        assert_eq!(sums.len(), self.zero.shards.len(), "every shard has a gradient");
        Ok(sums.into_values().collect())
    }
}

/// A reduce-scatter without a buffer: each run of rows goes from where it is to its owner, who adds in rank order.
fn sum_at_owners(bucket: &Bucket, comm: &Comm, gradients: BTreeMap<ParamId, Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
    let (rank, size) = (comm.rank(), comm.size());
    let sends = bucket.reduce.runs.iter().filter(|run| run.owner != rank).map(|run| (run.owner, run.shard.of(&gradients[&run.shard.id])));
    let own: Vec<Tensor> = bucket.reduce.owned(rank).map(|run| run.shard.of(&gradients[&run.shard.id])).collect();
    let others = (0..size).filter(|&peer| peer != rank);
    let places: Vec<(usize, Tensor)> = others.flat_map(|peer| own.iter().map(move |run| (peer, run.empty_like()))).collect();
    let received: Vec<Tensor> = places.iter().map(|(_, place)| place.view(-1)).collect();
    let moved = comm.exchange_into(sends.collect(), places)?;
    Ok(moved.map(move |()| {
        let part = |from: usize, index: usize| match from {
            _ if from == rank => own[index].view(-1),
            _ => received[(from - usize::from(from > rank)) * own.len() + index].shallow_clone(),
        };
        let sum = |index: usize| {
            let out = own[index].empty_like();
            fold(&out.view(-1), &(0..size).map(|from| part(from, index)).collect::<Vec<_>>(), Reduce::Sum);
            out
        };
        Ok((0..own.len()).map(sum).collect())
    }))
}
