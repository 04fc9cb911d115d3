//! Held-out loss: the same first samples every time, shared out over the data-parallel ranks.
use crate::phase::Moment;
use crate::run::micro_batches;
use crate::step::Trainer;
use anyhow::Result;
use data::Loader;
use parallel::comm::Reduce;
use tch::Tensor;

/// Mean main loss a token over the first `sequences` held-out samples; collective.
pub fn held_out_loss(trainer: &mut Trainer, loader: &Loader, moment: &Moment, sequences: u64) -> Result<f64> {
    let (rank, ranks) = (trainer.mesh.place(trainer.groups.world.rank()).dp as u64, trainer.mesh.dp as u64);
    let sequences = sequences.min(loader.num_samples());
    let mine: Vec<u64> = (sequences * rank / ranks..sequences * (rank + 1) / ranks).collect();
    let samples = loader.read(&mine)?;
    let batches = micro_batches(&samples, moment.phase.micro_batch as usize, trainer.weights.device(), trainer.document_boundaries);
    let sum = trainer.loss_only(moment, &batches)?;
    let total = trainer.groups.world.all_reduce(vec![Tensor::from_slice(&[sum])], Reduce::Sum)?.wait()?;
    Ok(total[0].double_value(&[0]) / (sequences * moment.phase.sequence_length) as f64)
}
