//! Writes one rank's list. Counts the micro-batches of each direction and knows which ends of the pipe neither
//! receive nor send, so that the schedules read like their drawings.

use super::{Action, Chunk, Exchange, Message, Payload};
use std::collections::VecDeque;

pub(super) struct Builder {
    rank: usize,
    num_ranks: usize,
    /// First micro-batch of each direction.
    first: [usize; 2],
    actions: Vec<Action>,
    /// Messages that the next commit posts.
    next: Exchange,
    count: [Counts; 2],
    weights: VecDeque<Chunk>,
}

/// Of one direction, so far.
#[derive(Default)]
struct Counts {
    forwards: usize,
    backwards: usize,
    forwards_received: usize,
    backwards_received: usize,
    forwards_sent: usize,
    backwards_sent: usize,
}

fn take(counter: &mut usize) -> usize {
    *counter += 1;
    *counter - 1
}

impl Builder {
    /// Direction 1 starts at micro-batch `first_down`.
    pub fn new(rank: usize, num_ranks: usize, first_down: usize) -> Self {
        Builder {
            rank,
            num_ranks,
            first: [0, first_down],
            actions: Vec::new(),
            next: Exchange::default(),
            count: Default::default(),
            weights: VecDeque::new(),
        }
    }

    fn chunk(&self, direction: usize, index: usize) -> Chunk {
        Chunk { direction, micro_batch: self.first[direction] + index }
    }

    fn stage(&self, direction: usize) -> usize {
        self.chunk(direction, 0).stage(self.rank, self.num_ranks)
    }

    /// The rank with the stage before (`up` false) or after this one in a direction.
    fn peer(&self, direction: usize, up: bool) -> usize {
        if (direction == 0) == up { self.rank + 1 } else { self.rank - 1 }
    }

    pub fn receive_forward(&mut self, direction: usize) {
        if self.stage(direction) > 0 {
            let index = take(&mut self.count[direction].forwards_received);
            let (peer, chunk) = (self.peer(direction, false), self.chunk(direction, index));
            self.next.recvs.push(Message { peer, chunk, payload: Payload::Activation });
        }
    }

    pub fn receive_backward(&mut self, direction: usize) {
        if self.stage(direction) + 1 < self.num_ranks {
            let index = take(&mut self.count[direction].backwards_received);
            let (peer, chunk) = (self.peer(direction, true), self.chunk(direction, index));
            self.next.recvs.push(Message { peer, chunk, payload: Payload::Gradient });
        }
    }

    pub fn send_forward(&mut self, direction: usize) {
        if self.stage(direction) + 1 < self.num_ranks {
            let index = take(&mut self.count[direction].forwards_sent);
            let (peer, chunk) = (self.peer(direction, true), self.chunk(direction, index));
            self.next.sends.push(Message { peer, chunk, payload: Payload::Activation });
        }
    }

    pub fn send_backward(&mut self, direction: usize) {
        if self.stage(direction) > 0 {
            let index = take(&mut self.count[direction].backwards_sent);
            let (peer, chunk) = (self.peer(direction, false), self.chunk(direction, index));
            self.next.sends.push(Message { peer, chunk, payload: Payload::Gradient });
        }
    }

    /// Posts what has gathered.
    pub fn commit(&mut self) {
        let exchange = std::mem::take(&mut self.next);
        if !(exchange.sends.is_empty() && exchange.recvs.is_empty()) {
            self.actions.push(Action::Exchange(exchange));
        }
    }

    pub fn forward(&mut self, direction: usize) {
        self.commit();
        let index = take(&mut self.count[direction].forwards);
        self.actions.push(Action::Forward(self.chunk(direction, index)));
    }

    pub fn backward(&mut self, direction: usize, split: bool) {
        self.commit();
        let index = take(&mut self.count[direction].backwards);
        let chunk = self.chunk(direction, index);
        self.actions.push(if split { Action::BackwardInput(chunk) } else { Action::Backward(chunk) });
        if split {
            self.weights.push_back(chunk);
        }
    }

    /// The weights' work that waits longest. Right behind its own backward, of a first stage, whose result goes nowhere, it makes
    /// that a whole one: gradients then complete all the way, and travel under what comes after them.
    pub fn weight(&mut self) {
        self.commit();
        let chunk = self.weights.pop_front().expect("a backward was split before");
        match self.actions.last_mut() {
            Some(last) if *last == Action::BackwardInput(chunk) => *last = Action::Backward(chunk),
            _ => self.actions.push(Action::BackwardWeight(chunk)),
        }
    }

    pub fn pair(&mut self, forward: usize, backward: usize) {
        self.commit();
        let (f, b) = (take(&mut self.count[forward].forwards), take(&mut self.count[backward].backwards));
        self.actions.push(Action::Pair { forward: self.chunk(forward, f), backward: self.chunk(backward, b) });
    }

    pub fn finish(mut self) -> Vec<Action> {
        self.commit();
        assert!(self.weights.is_empty(), "weight gradients left over");
        self.actions
    }
}
