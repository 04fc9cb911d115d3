//! One step's gradients on their way to their owners: each bucket starts as soon as it is full and its turn has come.
use super::{Lane, Route, Zero};
use model::{GradSink, ParamId};
use parallel::comm::{CommError, Pending};
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
    /// [N, width], from the first gradient until its transfer starts.
    buffer: Option<Tensor>,
    /// Gradients still to come.
    missing: usize,
    pub(super) sum: Option<Pending<Vec<Tensor>>>,
}

impl GradSink for Reduction<'_> {
    fn complete(&mut self, id: ParamId, gradient: Tensor) {
        match self.zero.routes[id.0] {
            Route::Untrained => panic!("parameter {id:?} is not trained"),
            Route::Alone => drop(self.whole.insert(self.zero.index(id), gradient)),
            Route::Bucket(index) => {
                self.fill(index, id, &gradient);
                drop(gradient);
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
            filling: zero.buckets.iter().map(|bucket| Filling { buffer: None, missing: bucket.ids.len(), sum: None }).collect(),
            next: zero.lanes.iter().map(|lane| lane.buckets.start).collect(),
            error: None,
        }
    }

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
                let shape = run.shard.spec(self.zero.table.spec(run.shard.id)).shape;
                sums.insert(self.zero.index(run.shard.id), run.within(&piece).view(&shape[..]));
            }
        }
        assert_eq!(sums.len(), self.zero.shards.len(), "every shard has a gradient");
        Ok(sums.into_values().collect())
    }
}
