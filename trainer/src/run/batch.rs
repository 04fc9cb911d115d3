//! The samples of a step, as micro-batches of this rank's pipe.
use super::Run;
use crate::phase::{Moment, Plan};
use anyhow::Result;
use data::Sample;
use model::MicroBatch;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

impl Run<'_> {
    /// This rank's micro-batches of the step that starts at sample `first`; the next step's are asked for.
    pub(super) fn read_batch(&self, plan: &Plan, first: u64) -> Result<Vec<MicroBatch>> {
        let moment = plan.at(self.state.tokens).expect("the caller is inside a phase");
        let documents = self.trainer.document_boundaries;
        if !self.trainer.stages.reads_tokens() && !documents {
            return Ok(self.blank_batch(&moment));
        }
        let loader = self.corpus.loader(moment.order);
        let samples = loader.read(&self.share(first, moment.batch))?;
        let after = self.state.tokens + moment.batch * moment.phase.sequence_length;
        if let Some(next) = plan.at(after).filter(|next| next.order == moment.order) {
            loader.prefetch(&self.share(first + moment.batch, next.batch));
        }
        Ok(micro_batches(&samples, moment.phase.micro_batch as usize, self.trainer.weights.device(), documents))
    }

    /// For the stages between the ends of the pipe, which look at no token: the shapes of the step's micro-batches.
    fn blank_batch(&self, moment: &Moment) -> Vec<MicroBatch> {
        let (size, length) = (moment.phase.micro_batch as i64, moment.phase.sequence_length as i64);
        let count = moment.batch / moment.phase.micro_batch / self.trainer.mesh.dp as u64;
        let blank = Tensor::zeros([1, 1], (tch::Kind::Int64, self.trainer.weights.device())).expand([size, length + 1], false);
        (0..count).map(|_| MicroBatch::new(blank.shallow_clone())).collect()
    }

    /// The samples of a global batch that this rank's pipe takes: the r-th of `dp` equal runs.
    fn share(&self, first: u64, batch: u64) -> Vec<u64> {
        let mesh = &self.trainer.mesh;
        let each = batch / mesh.dp as u64;
        let start = first + each * mesh.place(self.world.rank()).dp as u64;
        (start..start + each).collect()
    }
}

/// Samples → micro-batches of up to `size` sequences.
pub fn micro_batches(samples: &[Sample], size: usize, device: Device, documents: bool) -> Vec<MicroBatch> {
    let batch = |chunk: &[Sample]| {
        let tokens: Vec<i64> = chunk.iter().flat_map(|sample| sample.tokens.iter().map(|&token| token as i64)).collect();
        // The host is not to wait for the update that the GPU may be at.
        let tokens = Tensor::from_slice(&tokens).view([chunk.len() as i64, -1]).to_device_(device, Kind::Int64, true, false);
        MicroBatch { tokens, documents: documents.then(|| Rc::new(chunk.iter().map(document_lengths).collect())) }
    };
    samples.chunks(size).map(batch).collect()
}

/// Of a sample's documents, the first of which may have begun before it.
fn document_lengths(sample: &Sample) -> Vec<i64> {
    let starts = sample.document_starts.iter().map(|&start| i64::from(start)).filter(|&start| start > 0);
    let mut from = 0;
    let ends = starts.chain([sample.tokens.len() as i64]);
    ends.map(|end| end - std::mem::replace(&mut from, end)).collect()
}
