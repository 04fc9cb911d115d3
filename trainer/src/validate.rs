//! Held-out loss: the same first samples every time, shared out over the data-parallel ranks.
use crate::phase::Moment;
use crate::run::micro_batches;
use crate::step::Trainer;
use anyhow::Result;
use data::Loader;
use parallel::comm::Reduce;
use tch::Tensor;

/// Micro-batches of a pipe until `done` hears how many there are by now: a long validation is no hang.
const PART: usize = 32;

/// Mean main loss a token over the first `sequences` held-out samples; collective.
pub fn held_out_loss(trainer: &mut Trainer, loader: &Loader, moment: &Moment, sequences: u64, mut done: impl FnMut(usize)) -> Result<f64> {
    let (rank, ranks) = (trainer.mesh.place(trainer.groups.world.rank()).dp as u64, trainer.mesh.dp as u64);
    let sequences = sequences.min(loader.num_samples());
    let mine: Vec<u64> = (sequences * rank / ranks..sequences * (rank + 1) / ranks).collect();
    let samples = loader.read(&mine)?;
    let batches = micro_batches(&samples, moment.phase.micro_batch as usize, trainer.weights.device(), trainer.document_boundaries);
    let (first, rest) = batches.split_at(PART.min(batches.len()));
    let mut sum = trainer.loss_only(moment, first)?;
    for (part, batches) in rest.chunks(PART).enumerate() {
        done((part + 1) * PART);
        sum += trainer.loss_only(moment, batches)?;
    }
    let total = trainer.groups.world.all_reduce(vec![Tensor::from_slice(&[sum])], Reduce::Sum)?.wait()?;
    Ok(total[0].double_value(&[0]) / (sequences * moment.phase.sequence_length) as f64)
}
