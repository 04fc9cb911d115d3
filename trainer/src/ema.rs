//! An exponential moving average of the parameters (report §3.2.3), kept in host memory and brought up to date beside the
//! next step: a preview of what the model will be once the learning rate has fallen. Each rank averages its own shards.
//!
//! Invariant: from the copy of an update's masters to the next update nobody changes them; at most one step is under way.
use crate::optimizer::Slot;
use anyhow::{Result, ensure};
use kernels::device::{Arrival, Downloads, gpu};
use kernels::shim::bytes;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::thread::{JoinHandle, spawn};
use tch::{Device, Kind, Tensor};

/// `[ema]` of a run's config.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EmaSection {
    /// average ← decay · average + (1 − decay) · parameter, after each update; 0: no average is kept.
    pub decay: f64,
}

/// A step towards a value that is 0.3 % off is then half a unit in the last place of an average in FP32.
const MOST_DECAY: f64 = 0.99999;

impl EmaSection {
    pub fn validate(&self) -> Result<()> {
        ensure!((0.0..=MOST_DECAY).contains(&self.decay), "ema.decay = {}: must be from 0 (no average) to {MOST_DECAY}, beyond which numbers in FP32 stand still", self.decay);
        Ok(())
    }
}

/// The averages of one rank's shards.
pub struct Ema {
    decay: f64,
    /// None: the thread has them.
    buffers: Option<Buffers>,
    running: Option<JoinHandle<Buffers>>,
    /// From a GPU, beside the next step's forwards and backwards.
    downloads: Option<Downloads>,
    /// The masters', until the next update.
    arrival: Option<Arc<Arrival>>,
}

/// A pair for each shard.
struct Buffers {
    averages: Vec<Host>,
    /// The parameters after the newest update: on the host, where they come from a GPU pinned.
    newest: Vec<Tensor>,
}

/// Numbers of the masters' kind.
enum Host {
    F32(Vec<f32>),
    F64(Vec<f64>),
}

impl Host {
    fn like(tensor: &Tensor) -> Host {
        match tensor.kind() {
            Kind::Float => Host::F32(vec![0.0; tensor.numel()]),
            Kind::Double => Host::F64(vec![0.0; tensor.numel()]),
            other => panic!("masters are not {other:?}"),
        }
    }

    /// Done when it returns, on whatever device the tensor is.
    fn copy_from(&mut self, tensor: &Tensor) {
        match self {
            Host::F32(values) => tensor.copy_data(values, tensor.numel()),
            Host::F64(values) => tensor.copy_data(values, tensor.numel()),
        }
    }

    /// A tensor of its own.
    fn tensor(&self, shape: &[i64]) -> Tensor {
        match self {
            Host::F32(values) => Tensor::from_slice(values).view(shape),
            Host::F64(values) => Tensor::from_slice(values).view(shape),
        }
    }

    /// `newest` is of the same kind and length.
    fn average(&mut self, newest: &Tensor, decay: f64) {
        let newest = bytes(newest).expect("in a row, on the host");
        match self {
            Host::F32(averages) => {
                // One factor alone: two that are rounded do not sum to 1, and the average of a constant would be another.
                let take = (1.0 - decay) as f32;
                averages.iter_mut().zip(newest.as_chunks().0).for_each(|(average, new)| *average += take * (f32::from_ne_bytes(*new) - *average));
            }
            Host::F64(averages) => {
                averages.iter_mut().zip(newest.as_chunks().0).for_each(|(average, new)| *average += (1.0 - decay) * (f64::from_ne_bytes(*new) - *average));
            }
        }
    }
}

impl Ema {
    /// The average starts as the masters are.
    pub fn new(decay: f64, slots: &[Slot]) -> Result<Ema> {
        let on = slots.first().map_or(Device::Cpu, |slot| slot.master.device());
        let newest = |slot: &Slot| {
            let host = Tensor::empty([slot.master.numel() as i64], (slot.master.kind(), Device::Cpu));
            if on.is_cuda() { host.pin_memory(on) } else { host }
        };
        let averages = slots.iter().map(|slot| Host::like(&slot.master)).collect();
        let buffers = Buffers { averages, newest: slots.iter().map(newest).collect() };
        let downloads = on.is_cuda().then(|| Downloads::new(gpu(on))).transpose()?;
        let mut ema = Ema { decay, buffers: Some(buffers), running: None, downloads, arrival: None };
        ema.restart(slots);
        Ok(ema)
    }

    /// Forgets the past: other weights were loaded.
    pub fn restart(&mut self, slots: &[Slot]) {
        self.settled().averages.iter_mut().zip(slots).for_each(|(average, slot)| average.copy_from(&slot.master));
    }

    /// Before an update changes the masters: on a GPU it comes after the copy of what they are.
    pub fn keep_up(&mut self) {
        if let (Some(downloads), Some(arrival)) = (&self.downloads, self.arrival.take()) {
            downloads.hold_back(&arrival).expect("a live GPU");
        }
    }

    /// After an update was applied: takes the masters' values, and averages while the caller goes on. Waits for the averages
    /// of the update before.
    pub fn update(&mut self, slots: &[Slot]) {
        self.settled();
        let mut buffers = self.buffers.take().expect("settled");
        let pairs = slots.iter().map(|slot| &slot.master).zip(&mut buffers.newest);
        match &self.downloads {
            Some(downloads) => self.arrival = Some(Arc::new(downloads.begin(pairs).expect("a live GPU"))),
            None => pairs.for_each(|(master, newest)| newest.copy_(&master.view(-1))),
        }
        let (decay, arrival) = (self.decay, self.arrival.clone());
        self.running = Some(spawn(move || {
            arrival.iter().for_each(|arrival| arrival.wait().expect("the masters' copy from the GPU"));
            buffers.averages.iter_mut().zip(&buffers.newest).for_each(|(average, newest)| average.average(newest, decay));
            buffers
        }));
    }

    /// Of each shard, every update so far counted.
    pub fn averages(&mut self, slots: &[Slot]) -> Vec<Tensor> {
        self.settled().averages.iter().zip(slots).map(|(average, slot)| average.tensor(&slot.master.size())).collect()
    }

    /// A shard's average from a checkpoint.
    pub fn load(&mut self, index: usize, average: &Tensor) {
        self.settled().averages[index].copy_from(average);
    }

    fn settled(&mut self) -> &mut Buffers {
        if let Some(running) = self.running.take() {
            self.buffers = Some(running.join().expect("averaging fails where the GPU does"));
        }
        self.buffers.as_mut().expect("only a running update has them")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_of_a_constant_is_the_constant() {
        for decay in [0.9, 0.999, MOST_DECAY] {
            let (mut average, value) = (Host::F32(vec![3.7; 3]), Tensor::from_slice(&[3.7_f32; 3]));
            (0..10_000).for_each(|_| average.average(&value, decay));
            assert!(matches!(&average, Host::F32(values) if *values == [3.7; 3]), "decay {decay}");
        }
    }
}
