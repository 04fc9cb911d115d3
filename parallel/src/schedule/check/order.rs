//! What can be said of one rank's list by itself.

use super::super::{Action, Chunk, Payload};
use super::Violation;
use std::collections::{HashMap, HashSet, VecDeque};

/// The messages that a computation needs. The first stage makes its own inputs, the last its own gradients.
pub(super) fn inputs(action: &Action, rank: usize, num_ranks: usize) -> Vec<(Payload, Chunk)> {
    let activation = |c: Chunk| (c.stage(rank, num_ranks) > 0).then_some((Payload::Activation, c));
    let gradient = |c: Chunk| (c.stage(rank, num_ranks) + 1 < num_ranks).then_some((Payload::Gradient, c));
    match *action {
        Action::Forward(c) => activation(c).into_iter().collect(),
        Action::Backward(c) | Action::BackwardInput(c) => gradient(c).into_iter().collect(),
        Action::Pair { forward, backward } => activation(forward).into_iter().chain(gradient(backward)).collect(),
        Action::BackwardWeight(_) | Action::Exchange(_) => Vec::new(),
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
    progress: HashMap<Chunk, Progress>,
    weights: VecDeque<Chunk>,
    received: HashSet<(Payload, Chunk)>,
    sent: HashSet<(Payload, Chunk)>,
    in_flight: usize,
    peak: usize,
}

/// Walks through rank `rank`'s list; returns its peak of micro-batches in flight.
pub(super) fn check_rank(lists: &[Vec<Action>], rank: usize, num_micro_batches: usize) -> Result<usize, Violation> {
    let mut walk = Walk {
        rank,
        num_ranks: lists.len(),
        progress: HashMap::new(),
        weights: VecDeque::new(),
        received: HashSet::new(),
        sent: HashSet::new(),
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
        for input in inputs(action, self.rank, self.num_ranks) {
            if !self.received.contains(&input) {
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

    fn forward(&mut self, chunk: Chunk) -> Result<(), String> {
        if self.progress.insert(chunk, Progress::Forward).is_some() {
            return Err("this forward has been run before".into());
        }
        self.in_flight += 1;
        self.peak = self.peak.max(self.in_flight);
        Ok(())
    }

    fn backward(&mut self, chunk: Chunk, to: Progress) -> Result<(), String> {
        if self.progress.insert(chunk, to) != Some(Progress::Forward) {
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
        self.progress.insert(chunk, Progress::Done);
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
        let made = match (payload, self.progress.get(&chunk)) {
            (Payload::Activation, progress) => progress.is_some(),
            (Payload::Gradient, progress) => matches!(progress, Some(Progress::BackwardInput | Progress::Done)),
        };
        if !made {
            return Err(format!("{payload:?} {} is sent before it is made", chunk.micro_batch));
        }
        if self.sent.insert((payload, chunk)) { Ok(()) } else { Err(format!("{payload:?} {} is sent twice", chunk.micro_batch)) }
    }

    fn check_receive(&mut self, payload: Payload, chunk: Chunk, peer: usize) -> Result<(), String> {
        if self.neighbour(payload, chunk, false) != Some(peer) {
            return Err(format!("{payload:?} {} does not come from rank {peer}", chunk.micro_batch));
        }
        if self.received.insert((payload, chunk)) { Ok(()) } else { Err(format!("{payload:?} {} is received twice", chunk.micro_batch)) }
    }

    /// Every micro-batch came through once, in one direction, and everything made was sent.
    fn end(&self, num_micro_batches: usize) -> Result<(), String> {
        if let Some((chunk, _)) = self.progress.iter().find(|(_, p)| **p != Progress::Done) {
            return Err(format!("micro-batch {} is not finished", chunk.micro_batch));
        }
        let mut seen: Vec<usize> = self.progress.keys().map(|c| c.micro_batch).collect();
        seen.sort_unstable();
        if seen != (0..num_micro_batches).collect::<Vec<_>>() {
            return Err(format!("{} micro-batches came through, not each of {num_micro_batches} once", seen.len()));
        }
        let num_sends: usize = self.progress.keys().map(|&c| self.num_messages(c, true)).sum();
        let num_receives: usize = self.progress.keys().map(|&c| self.num_messages(c, false)).sum();
        if (self.sent.len(), self.received.len()) != (num_sends, num_receives) {
            return Err(format!("{} sends and {} receives, not {num_sends} and {num_receives}", self.sent.len(), self.received.len()));
        }
        Ok(())
    }

    fn num_messages(&self, chunk: Chunk, sent: bool) -> usize {
        [Payload::Activation, Payload::Gradient].iter().filter(|&&payload| self.neighbour(payload, chunk, sent).is_some()).count()
    }
}
