//! Host memory of this rank's own: a copy of its state, complete before the next step may change it.
use crate::state::StatePart;
use tch::{Device, Tensor};

/// Kept from one save to the next: fresh memory costs more than the copy.
#[derive(Default)]
pub struct Staging {
    buffers: Vec<Tensor>,
}

impl Staging {
    /// Done when it returns, on whatever device the parts are. The result is to come back through `give_back`.
    pub fn copy(&mut self, parts: Vec<StatePart>) -> Vec<StatePart> {
        let mut buffers = std::mem::take(&mut self.buffers).into_iter();
        let copied = |part: StatePart| {
            let fits = |buffer: &Tensor| buffer.size() == part.tensor.size() && buffer.kind() == part.tensor.kind();
            let mut buffer = buffers.next().filter(fits).unwrap_or_else(|| like(&part.tensor));
            buffer.copy_(&part.tensor);
            StatePart { tensor: buffer, ..part }
        };
        parts.into_iter().map(copied).collect()
    }

    pub fn give_back(&mut self, parts: Vec<StatePart>) {
        self.buffers = parts.into_iter().map(|part| part.tensor).collect();
    }
}

/// Pinned where the tensor is on a GPU: its copy engine writes there at the bus's speed.
fn like(tensor: &Tensor) -> Tensor {
    let host = Tensor::empty(tensor.size(), (tensor.kind(), Device::Cpu));
    if tensor.device().is_cuda() { host.pin_memory(tensor.device()) } else { host }
}
