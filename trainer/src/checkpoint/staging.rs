//! Host memory of this rank's own, and a copy of its state in it that is made under the next step: nothing of the state
//! changes while gradients are computed, so another thread may read it then (`Trainer::beside`).
use crate::state::StatePart;
use anyhow::{Context, Result};
use std::sync::mpsc::{Receiver, Sender, channel};
use tch::{Device, Tensor};

/// Kept from one save to the next: fresh memory costs more than the copy.
#[derive(Default)]
pub(super) struct Staging {
    buffers: Vec<Option<Tensor>>,
}

/// A copy to be made before the state changes, and whom it is for.
pub(super) struct Copying {
    pieces: Vec<Piece>,
    to: Sender<Piece>,
}

pub(super) enum Piece {
    Copied(StatePart),
    /// Still the state's own tensor, and memory for its copy where there is some.
    Live(StatePart, Option<Tensor>),
}

impl Piece {
    fn part(&self) -> &StatePart {
        match self {
            Piece::Copied(part) | Piece::Live(part, _) => part,
        }
    }
}

impl Staging {
    /// What is on a GPU is copied when it returns; the rest is for `Copying`. What arrives is to come back through `give_back`.
    pub fn begin(&mut self, parts: Vec<StatePart>) -> (Copying, Arriving) {
        let mut buffers = std::mem::take(&mut self.buffers).into_iter();
        let piece = |part: StatePart| {
            let fits = |buffer: &Tensor| buffer.size() == part.tensor.size() && buffer.kind() == part.tensor.kind();
            let buffer = buffers.next().flatten().filter(fits);
            if part.tensor.device().is_cuda() { Piece::Copied(copy(part, buffer)) } else { Piece::Live(part, buffer) }
        };
        let (to, from) = channel();
        (Copying { pieces: parts.into_iter().map(piece).collect(), to }, Arriving { from, here: Vec::new() })
    }

    pub fn give_back(&mut self, pieces: Vec<Piece>) {
        let buffer = |piece| match piece {
            Piece::Copied(part) => Some(part.tensor),
            Piece::Live(_, buffer) => buffer,
        };
        self.buffers = pieces.into_iter().map(buffer).collect();
    }
}

impl Copying {
    /// The state as it is now, in host memory: to be read by the rank's own thread alone.
    pub fn now(&self) -> impl Iterator<Item = &StatePart> {
        self.pieces.iter().map(Piece::part)
    }

    /// Gives each part to `Arriving` as soon as its copy is made.
    pub fn copy(self) {
        for piece in self.pieces {
            let part = match piece {
                Piece::Copied(part) => part,
                Piece::Live(part, buffer) => copy(part, buffer),
            };
            let _ = self.to.send(Piece::Copied(part)); // where the write has failed nobody takes it
        }
    }

    /// Gives the state itself: for one who changes nothing of it before everything is written.
    pub fn lend(self) {
        self.pieces.into_iter().for_each(|piece| drop(self.to.send(piece)));
    }
}

/// The parts of a copy for the thread that writes them: it goes on while the next ones are made.
pub(super) struct Arriving {
    from: Receiver<Piece>,
    pub here: Vec<Piece>,
}

impl Arriving {
    pub fn tensor(&mut self, index: usize) -> Result<Tensor> {
        while self.here.len() <= index {
            self.here.push(self.from.recv().context("nobody made the copy of the state")?);
        }
        Ok(self.here[index].part().tensor.shallow_clone())
    }
}

/// Complete when it returns. New memory is pinned where the tensor is on a GPU: its copy engine writes there at the bus's speed.
fn copy(part: StatePart, buffer: Option<Tensor>) -> StatePart {
    let mut buffer = buffer.unwrap_or_else(|| {
        let host = Tensor::empty(part.tensor.size(), (part.tensor.kind(), Device::Cpu));
        if part.tensor.device().is_cuda() { host.pin_memory(part.tensor.device()) } else { host }
    });
    buffer.copy_(&part.tensor);
    StatePart { tensor: buffer, ..part }
}
