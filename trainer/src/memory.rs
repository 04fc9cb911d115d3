//! What a rank's memory on a GPU goes to.
use crate::estimate::weight_bytes;
use crate::step::Trainer;
use anyhow::Result;
use kernels::{device, shim};
use serde::Serialize;
use std::rc::Rc;
use tch::{Device, Tensor};

/// Bytes; also TensorBoard's tags below `memory/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryReport {
    /// What the layers compute with, and in FP8 runs its blocks.
    pub weights: i64,
    /// A gradient of every parameter, as they are at most at one time.
    pub gradients: i64,
    /// Masters, where they are not the weights themselves, and moments.
    pub optimizer: i64,
    /// The rest of the peak: what forward keeps for backward, and what lives between two operations.
    pub activations: i64,
    /// Most that torch had given out at one time.
    pub peak: i64,
    /// What ranks of this host write transfers into, beside torch's memory.
    pub buffers: i64,
    /// What torch holds of the device's memory, what nobody holds, and all there is.
    pub reserved: i64,
    pub free: i64,
    pub total: i64,
}

fn bytes(tensor: &Tensor) -> i64 {
    tensor.numel() as i64 * tensor.kind().elt_size_in_bytes() as i64
}

impl Trainer {
    /// After a step; None on a CPU.
    pub fn memory(&self) -> Result<Option<MemoryReport>> {
        let on = self.weights.device();
        let Device::Cuda(_) = on else { return Ok(None) };
        let held = shim::memory(on)?;
        let master = self.weights.precision.master().elt_size_in_bytes() as i64;
        // All blocks are there in a backward; an update leaves those of weights that ranks share to the next step.
        let weights = self.weights.table.specs().iter().map(|spec| weight_bytes(self.weights.precision, spec)).sum::<i64>();
        let gradients: i64 = self.weights.table.specs().iter().filter(|spec| spec.trained()).map(|spec| spec.numel() * master).sum();
        let own = |slot: &crate::optimizer::Slot| match slot.master.kind() == self.weights.get(slot.shard.id).kind() {
            true => 0,
            false => bytes(&slot.master),
        };
        let optimizer: i64 = self.optimizer.slots.iter().map(|slot| own(slot) + bytes(&slot.first) + bytes(&slot.second)).sum();
        let activations = (held.peak - weights - gradients - optimizer).max(0);
        let g = &self.groups;
        let mut axes = vec![&g.world, &g.pipe, &g.embedding, &g.data, &g.expert_data, &g.expert.all];
        axes.dedup_by(|a, b| Rc::ptr_eq(a, b));
        let buffers = axes.iter().map(|axis| axis.buffer_bytes() as i64).sum::<i64>() + g.expert.hop_buffer_bytes() as i64;
        let of_device = device::gpu(on).memory()?;
        let [free, total] = [of_device.free_bytes, of_device.total_bytes].map(|bytes| bytes as i64);
        Ok(Some(MemoryReport { weights, gradients, optimizer, activations, peak: held.peak, buffers, reserved: held.reserved, free, total }))
    }
}

impl std::fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let gib = |bytes: i64| bytes as f64 / (1u64 << 30) as f64;
        write!(
            f,
            "memory (GiB): weights {:.2}, gradients {:.2}, optimizer {:.2}, activations {:.2}; peak {:.2}, held {:.2} and {:.2} for transfers of {:.1}",
            gib(self.weights),
            gib(self.gradients),
            gib(self.optimizer),
            gib(self.activations),
            gib(self.peak),
            gib(self.reserved),
            gib(self.buffers),
            gib(self.total)
        )
    }
}
