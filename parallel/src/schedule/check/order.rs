//! What can be said of one rank's list by itself.

use super::super::{Action, Chunk, Payload};
use super::{Violation, slot};
use std::collections::VecDeque;

/// The messages that a computation needs. The first stage makes its own inputs, the last its own gradients.
pub(super) fn inputs(action: &Action, rank: usize, num_ranks: usize) -> impl Iterator<Item = (Payload, Chunk)> + use<> {
    let activation = |c: Chunk| (c.stage(rank, num_ranks) > 0).then_some((Payload::Activation, c));
    let gradient = |c: Chunk| (c.stage(rank, num_ranks) + 1 < num_ranks).then_some((Payload::Gradient, c));
    let both = match *action {
        Action::Forward(c) => [activation(c), None],
        Action::Backward(c) | Action::BackwardInput(c) => [None, gradient(c)],
        Action::Pair { forward, backward } => [activation(forward), gradient(backward)],
        Action::BackwardWeight(_) | Action::Exchange(_) => [None, None],
    };
    both.into_iter().flatten()
}

/// The first micro-batch that an action speaks of and for which `is_wrong`.
fn find_chunk(action: &Action, is_wrong: impl Fn(&Chunk) -> bool) -> Option<Chunk> {
    match action {
        Action::Forward(c) | Action::Backward(c) | Action::BackwardInput(c) | Action::BackwardWeight(c) => Some(*c).filter(is_wrong),
        Action::Pair { forward, backward } => [*forward, *backward].into_iter().find(is_wrong),
        Action::Exchange(e) => e.sends.iter().chain(&e.recvs).map(|m| m.chunk).find(is_wrong),
    }
}

pub(super) fn name(action: &Action) -> String {
    match action {
        Action::Forward(c) => format!("F{}", c.micro_batch),
        Action::Backward(c) => format!("B{}", c.micro_batch),
        Action::BackwardInput(c) => format!("Bi{}", c.micro_batch),
        Action::BackwardWeight(c) => format!("W{}", c.micro_batch),
        Action::Pair { forward, backward } => format!("F{}&B{}", forward.micro_batch, backward.micro_batch),
        Action::Exchange(e) => format!("exchange of {} sends and {} receives", e.sends.len(), e.recvs.len()),
    }
}

/// Where a micro-batch stands on this rank.
#[derive(Clone, Copy, PartialEq)]
enum Progress {
    Forward,
    BackwardInput,
    Done,
}

struct Walk {
    rank: usize,
    num_ranks: usize,
    num_micro_batches: usize,
    /// By direction and micro-batch.
    progress: Vec<Option<Progress>>,
    weights: VecDeque<Chunk>,
    /// By `slot`.
    received: Vec<bool>,
    sent: Vec<bool>,
    in_flight: usize,
    peak: usize,
}

/// Walks through rank `rank`'s list; returns its peak of micro-batches in flight.
pub(super) fn check_rank(lists: &[Vec<Action>], rank: usize, num_micro_batches: usize) -> Result<usize, Violation> {
    let mut walk = Walk {
        rank,
        num_ranks: lists.len(),
        num_micro_batches,
        progress: vec![None; 2 * num_micro_batches],
        weights: VecDeque::new(),
        received: vec![false; 4 * num_micro_batches],
        sent: vec![false; 4 * num_micro_batches],
        in_flight: 0,
        peak: 0,
    };
    let violation = |position: usize, action: String, reason: String| Violation::Order { rank, position, action, reason };
    for (position, action) in lists[rank].iter().enumerate() {
        walk.step(action).map_err(|reason| violation(position, name(action), reason))?;
    }
    walk.end(num_micro_batches).map_err(|reason| violation(lists[rank].len(), "the end".into(), reason))?;
    Ok(walk.peak)
}

impl Walk {
    fn step(&mut self, action: &Action) -> Result<(), String> {
        if let Some(chunk) = find_chunk(action, |c| c.direction > 1 || c.micro_batch >= self.num_micro_batches) {
            return Err(format!("{chunk:?} is none of this step's {} micro-batches", self.num_micro_batches));
        }
        for input in inputs(action, self.rank, self.num_ranks) {
            if !self.received[slot(input, self.num_micro_batches)] {
                return Err(format!("{input:?} has not been received"));
            }
        }
        match *action {
            Action::Forward(c) => self.forward(c),
            Action::Backward(c) => self.backward(c, Progress::Done),
            Action::BackwardInput(c) => self.backward(c, Progress::BackwardInput),
            Action::BackwardWeight(c) => self.weight(c),
            Action::Pair { forward, backward } => {
                // Both hold their activations while it runs.
                self.forward(forward)?;
                if forward == backward { Err("a micro-batch paired with itself".into()) } else { self.backward(backward, Progress::Done) }
            }
            Action::Exchange(ref exchange) => {
                for m in &exchange.sends {
                    self.check_send(m.payload, m.chunk, m.peer)?;
                }
                for m in &exchange.recvs {
                    self.check_receive(m.payload, m.chunk, m.peer)?;
                }
                Ok(())
            }
        }
    }

    fn at(&mut self, chunk: Chunk) -> &mut Option<Progress> {
        &mut self.progress[chunk.direction * self.num_micro_batches + chunk.micro_batch]
    }

    fn forward(&mut self, chunk: Chunk) -> Result<(), String> {
        if self.at(chunk).replace(Progress::Forward).is_some() {
            return Err("this forward has been run before".into());
        }
        self.in_flight += 1;
        self.peak = self.peak.max(self.in_flight);
        Ok(())
    }

    fn backward(&mut self, chunk: Chunk, to: Progress) -> Result<(), String> {
        if self.at(chunk).replace(to) != Some(Progress::Forward) {
            return Err("a backward must come once, after its forward".into());
        }
        if to == Progress::Done {
            self.in_flight -= 1;
        } else {
            self.weights.push_back(chunk);
        }
        Ok(())
    }

    fn weight(&mut self, chunk: Chunk) -> Result<(), String> {
        match self.weights.pop_front() {
            None => return Err("no weights' work is queued".into()),
            Some(head) if head != chunk => return Err(format!("the head of the queue is W{}", head.micro_batch)),
            Some(_) => {}
        }
        *self.at(chunk) = Some(Progress::Done);
        self.in_flight -= 1;
        Ok(())
    }

    /// The rank that a message goes to (`sent`) or comes from, if this chunk has such a message here.
    fn neighbour(&self, payload: Payload, chunk: Chunk, sent: bool) -> Option<usize> {
        let stage = chunk.stage(self.rank, self.num_ranks);
        // Activations go to the next stage, gradients to the one before; receives are the mirror image.
        let stage = if (payload == Payload::Activation) == sent { stage + 1 } else { stage.checked_sub(1)? };
        (stage < self.num_ranks).then(|| if chunk.direction == 0 { stage } else { self.num_ranks - 1 - stage })
    }

    fn check_send(&mut self, payload: Payload, chunk: Chunk, peer: usize) -> Result<(), String> {
        if self.neighbour(payload, chunk, true) != Some(peer) {
            return Err(format!("{payload:?} {} does not go to rank {peer}", chunk.micro_batch));
        }
        let made = match (payload, *self.at(chunk)) {
            (Payload::Activation, progress) => progress.is_some(),
            (Payload::Gradient, progress) => matches!(progress, Some(Progress::BackwardInput | Progress::Done)),
        };
        if !made {
            return Err(format!("{payload:?} {} is sent before it is made", chunk.micro_batch));
        }
        let sent = &mut self.sent[slot((payload, chunk), self.num_micro_batches)];
        if !std::mem::replace(sent, true) { Ok(()) } else { Err(format!("{payload:?} {} is sent twice", chunk.micro_batch)) }
    }

    fn check_receive(&mut self, payload: Payload, chunk: Chunk, peer: usize) -> Result<(), String> {
        if self.neighbour(payload, chunk, false) != Some(peer) {
            return Err(format!("{payload:?} {} does not come from rank {peer}", chunk.micro_batch));
        }
        let received = &mut self.received[slot((payload, chunk), self.num_micro_batches)];
        if !std::mem::replace(received, true) { Ok(()) } else { Err(format!("{payload:?} {} is received twice", chunk.micro_batch)) }
    }

    /// Every micro-batch came through once, in one direction, and everything made was sent.
    fn end(&self, num_micro_batches: usize) -> Result<(), String> {
        let (up, down) = self.progress.split_at(num_micro_batches);
        let (mut num_sends, mut num_receives) = (0, 0);
        for micro_batch in 0..num_micro_batches {
            let direction = match (up[micro_batch], down[micro_batch]) {
                (Some(Progress::Done), None) => 0,
                (None, Some(Progress::Done)) => 1,
                (None, None) => return Err(format!("micro-batch {micro_batch} did not come through")),
                (Some(_), Some(_)) => return Err(format!("micro-batch {micro_batch} came through in both directions")),
                _ => return Err(format!("micro-batch {micro_batch} is not finished")),
            };
            let chunk = Chunk { direction, micro_batch };
            num_sends += self.num_messages(chunk, true);
            num_receives += self.num_messages(chunk, false);
        }
        let count = |flags: &[bool]| flags.iter().filter(|&&f| f).count();
        if (count(&self.sent), count(&self.received)) != (num_sends, num_receives) {
            return Err(format!("{} sends and {} receives, not {num_sends} and {num_receives}", count(&self.sent), count(&self.received)));
        }
        Ok(())
    }

    fn num_messages(&self, chunk: Chunk, sent: bool) -> usize {
        [Payload::Activation, Payload::Gradient].iter().filter(|&&payload| self.neighbour(payload, chunk, sent).is_some()).count()
    }
}
