//! Runs one rank's list of a schedule.
//! Invariant: an exchange is posted where it stands and waited on by the first computation that needs one of its
//! messages, so a transfer runs under every computation in between; all are waited on at the end. What a computation puts off
//! until its results are on their way (`rest`) is made after the exchanges that follow it.

use super::{Action, Chunk, Exchange, Payload};
use crate::comm::{CommError, Communicator, Pending, TensorSpec};
use std::collections::HashMap;
use tch::Tensor;

/// What travels between two stages for one micro-batch: an activation or the gradient of one, in as many tensors
/// as the stages like. `None` at the ends of the pipe.
pub type Parcel = Option<Vec<Tensor>>;

/// This rank's stages, one a direction. What a forward must keep for its backward stays inside.
pub trait Stages {
    type Error: From<CommError>;

    /// The tensors of a message that this rank will receive.
    fn specs(&self, chunk: Chunk, payload: Payload) -> Vec<TensorSpec>;

    /// `input` is `None` on the first stage; returns `None` on the last (the loss stays inside).
    fn forward(&mut self, chunk: Chunk, input: Parcel) -> Result<Parcel, Self::Error>;

    /// `gradient` of this stage's output, `None` on the last stage; returns that of its input, `None` on the first.
    /// With `split` the weights' work is queued for `backward_weight`, else done, the last of it in `rest`.
    fn backward(&mut self, chunk: Chunk, gradient: Parcel, split: bool) -> Result<Parcel, Self::Error>;

    /// The weights' work at the head of the queue, which is `chunk`'s.
    fn backward_weight(&mut self, chunk: Chunk) -> Result<(), Self::Error>;

    /// A forward and another micro-batch's whole backward, each under the other's transfers.
    /// Returns (output of the forward, gradient of the backward's input).
    fn pair(&mut self, forward: (Chunk, Parcel), backward: (Chunk, Parcel)) -> Result<(Parcel, Parcel), Self::Error>;

    /// What the computation before has put off until its results are on their way: it hides that.
    fn rest(&mut self) -> Result<(), Self::Error>;
}

type Key = (Payload, Chunk);

struct Posted {
    pending: Pending<Vec<Tensor>>,
    /// What it brings, in order, and in how many tensors.
    brings: Vec<(Key, usize)>,
}

struct Runner<'a> {
    pipe: &'a dyn Communicator,
    posted: Vec<Posted>,
    /// Received and not yet used; made and not yet sent.
    arrived: HashMap<Key, Vec<Tensor>>,
    made: HashMap<Key, Vec<Tensor>>,
}

/// Runs `actions`, which the checker has proven, with `stages` over the ranks of `pipe`.
/// Errors: the stages' own, or a failed exchange.
pub fn run<S: Stages>(actions: &[Action], pipe: &dyn Communicator, stages: &mut S) -> Result<(), S::Error> {
    let mut runner = Runner { pipe, posted: Vec::new(), arrived: HashMap::new(), made: HashMap::new() };
    for action in actions {
        if !matches!(action, Action::Exchange(_)) {
            stages.rest()?;
        }
        match *action {
            Action::Forward(chunk) => {
                let input = runner.input(Payload::Activation, chunk)?;
                runner.keep(Payload::Activation, chunk, stages.forward(chunk, input)?);
            }
            Action::Backward(chunk) | Action::BackwardInput(chunk) => {
                let gradient = runner.input(Payload::Gradient, chunk)?;
                let split = matches!(action, Action::BackwardInput(_));
                runner.keep(Payload::Gradient, chunk, stages.backward(chunk, gradient, split)?);
            }
            Action::BackwardWeight(chunk) => stages.backward_weight(chunk)?,
            Action::Pair { forward, backward } => {
                let input = runner.input(Payload::Activation, forward)?;
                let gradient = runner.input(Payload::Gradient, backward)?;
                let (output, d_input) = stages.pair((forward, input), (backward, gradient))?;
                runner.keep(Payload::Activation, forward, output);
                runner.keep(Payload::Gradient, backward, d_input);
            }
            Action::Exchange(ref exchange) => runner.post(exchange, stages)?,
        }
    }
    stages.rest()?;
    while !runner.posted.is_empty() {
        runner.land(0)?;
    }
    assert!(runner.arrived.is_empty() && runner.made.is_empty(), "messages left over: the list was not a proven one");
    Ok(())
}

impl Runner<'_> {
    /// The message that a computation needs, waited for if it is still under way; `None` at an end of the pipe.
    fn input(&mut self, payload: Payload, chunk: Chunk) -> Result<Parcel, CommError> {
        let key = (payload, chunk);
        if let Some(index) = self.posted.iter().position(|p| p.brings.iter().any(|(k, _)| *k == key)) {
            // Exchanges end in order on the stream that carries them: those before it are over, too.
            for _ in 0..=index {
                self.land(0)?;
            }
        }
        Ok(self.arrived.remove(&key))
    }

    fn land(&mut self, index: usize) -> Result<(), CommError> {
        let Posted { pending, brings } = self.posted.remove(index);
        let mut tensors = pending.wait()?.into_iter();
        for (key, num_tensors) in brings {
            self.arrived.insert(key, tensors.by_ref().take(num_tensors).collect());
        }
        Ok(())
    }

    fn keep(&mut self, payload: Payload, chunk: Chunk, parcel: Parcel) {
        if let Some(tensors) = parcel {
            self.made.insert((payload, chunk), tensors);
        }
    }

    fn post<S: Stages>(&mut self, exchange: &Exchange, stages: &S) -> Result<(), S::Error> {
        let mut sends = Vec::new();
        for message in &exchange.sends {
            let tensors = self.made.remove(&(message.payload, message.chunk)).expect("made before it is sent");
            sends.extend(tensors.into_iter().map(|tensor| (message.peer, tensor)));
        }
        let (mut recvs, mut brings) = (Vec::new(), Vec::new());
        for message in &exchange.recvs {
            let specs = stages.specs(message.chunk, message.payload);
            brings.push(((message.payload, message.chunk), specs.len()));
            recvs.extend(specs.into_iter().map(|spec| (message.peer, spec)));
        }
        let pending = self.pipe.exchange(sends, recvs)?;
        self.posted.push(Posted { pending, brings });
        Ok(())
    }
}
