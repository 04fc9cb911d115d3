//! The schedules in which every micro-batch enters at rank 0.
//! Each receive is posted in one exchange with the send before it: neighbours then always meet, also when a send
//! ends only once it is received.

use super::build::Builder;
use super::{Action, Chunk};

/// rank 0  F0 F1 F2 . . . B0 B1 B2       all activations in flight at once
/// rank 1     F0 F1 F2 B0 B1 B2
pub(super) fn gpipe(rank: usize, num_ranks: usize, num_micro_batches: usize) -> Vec<Action> {
    let mut list = Builder::new(rank, num_ranks, 0);
    for _ in 0..num_micro_batches {
        forward(&mut list);
    }
    for _ in 0..num_micro_batches {
        backward(&mut list);
    }
    list.finish()
}

/// The way up alone, for a loss without gradients.
pub(super) fn forwards(rank: usize, num_ranks: usize, num_micro_batches: usize) -> Vec<Action> {
    let mut list = Builder::new(rank, num_ranks, 0);
    for _ in 0..num_micro_batches {
        forward(&mut list);
    }
    list.finish()
}

/// rank 0  F0 F1 . . B0 F2 B1 . B2       at most P − rank in flight
/// rank 1     F0 B0 F1 B1 F2 B2
pub(super) fn one_f_one_b(rank: usize, num_ranks: usize, num_micro_batches: usize) -> Vec<Action> {
    let warm_up = (num_ranks - rank - 1).min(num_micro_batches);
    let mut list = Builder::new(rank, num_ranks, 0);
    for _ in 0..warm_up {
        forward(&mut list);
    }
    for _ in warm_up..num_micro_batches {
        forward(&mut list);
        backward(&mut list);
    }
    for _ in 0..warm_up {
        backward(&mut list);
    }
    list.finish()
}

/// Rank r lets the weights' work lag r backwards behind: its neighbour gets the input gradient earlier, and what
/// lags fills the end. P in flight on every rank.
pub(super) fn zb1p(rank: usize, num_ranks: usize, num_micro_batches: usize) -> Vec<Action> {
    let warm_up = (num_ranks - rank).min(num_micro_batches);
    let mut list = Builder::new(rank, num_ranks, 0);
    for _ in 0..warm_up {
        forward(&mut list);
    }
    list.receive_backward(0);
    for done in 0..num_micro_batches {
        list.backward(0, true);
        list.send_backward(0);
        let another = warm_up + done < num_micro_batches;
        // Posted before the weights' work, so that the neighbour does not wait for that.
        if another {
            list.receive_forward(0);
        } else if done + 1 < num_micro_batches {
            list.receive_backward(0);
        }
        if done >= rank {
            list.weight();
        }
        if another {
            list.forward(0);
            list.send_forward(0);
            list.receive_backward(0);
        }
    }
    for _ in 0..rank.min(num_micro_batches) {
        list.weight();
    }
    list.finish()
}

/// F0 [F1&B0] [F2&B1] … B(M−1): hides expert traffic on one rank, two in flight.
pub(super) fn paired(num_micro_batches: usize) -> Vec<Action> {
    let chunk = |micro_batch| Chunk { direction: 0, micro_batch };
    let mut actions = vec![Action::Forward(chunk(0))];
    actions.extend((1..num_micro_batches).map(|i| Action::Pair { forward: chunk(i), backward: chunk(i - 1) }));
    actions.push(Action::Backward(chunk(num_micro_batches - 1)));
    actions
}

fn forward(list: &mut Builder) {
    list.receive_forward(0);
    list.forward(0);
    list.send_forward(0);
}

fn backward(list: &mut Builder) {
    list.receive_backward(0);
    list.backward(0, false);
    list.send_backward(0);
}
