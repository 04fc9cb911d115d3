//! DualPipe: micro-batches enter at both ends, so every rank has forwards of one direction to overlap with
//! backwards of the other, and the two bubbles fill each other. DeepSeek-V3 §3.2.1, figure 5.
//! Written in terms of `near` (the direction whose first stage is on this half of the ranks) and `far`: the two
//! halves then run the same eight loops.

use super::Action;
use super::build::Builder;

pub(super) fn dual_pipe(rank: usize, num_ranks: usize, num_micro_batches: usize) -> Vec<Action> {
    let half = num_ranks / 2;
    // k: distance from the nearer end.
    let k = rank.min(num_ranks - 1 - rank);
    let (near, far) = if rank < half { (0, 1) } else { (1, 0) };
    let mut list = Builder::new(rank, num_ranks, num_micro_batches / 2);
    let middle = k + 1 == half;
    fill(&mut list, near, far, k, half);
    overlap(&mut list, near, far, middle, num_micro_batches / 2 - num_ranks + k + 1);
    drain(&mut list, near, far, k, half);
    list.finish()
}

/// Loops 1 to 3: until a forward and a backward are there to be paired.
fn fill(list: &mut Builder, near: usize, far: usize, k: usize, half: usize) {
    let middle = k + 1 == half;
    // 1: near forwards, on their way to the middle.
    for _ in 0..2 * (half - k - 1) {
        forward(list, near);
    }
    // 2: forwards of both directions. The middle ranks swap theirs with each other, so they send at once what
    // the others hold back until the far forward is done too.
    list.receive_forward(near);
    for i in 0..=k {
        list.forward(near);
        if middle {
            list.send_forward(near);
        }
        list.receive_forward(near);
        list.receive_forward(far);
        list.forward(far);
        if !middle || i < k {
            list.send_forward(far);
        }
        if !middle {
            list.send_forward(near);
        }
    }
    // 3: far backwards begin; their weights' work fills the gap before the next far forward.
    for _ in 0..half - k - 1 {
        list.receive_backward(far);
        list.backward(far, true);
        list.send_backward(far);
        list.receive_forward(far);
        list.weight();
        list.forward(far);
        list.send_forward(far);
    }
}

/// Loop 4, the bulk of the step.
fn overlap(list: &mut Builder, near: usize, far: usize, middle: bool, rounds: usize) {
    for round in 0..rounds {
        if round == 0 && middle {
            // Not overlapped: the backward waits for the other middle rank's forward, which must leave first.
            list.forward(near);
            list.send_forward(far);
            list.receive_backward(far);
            list.backward(far, false);
            list.send_forward(near);
            list.send_backward(far);
        } else {
            if round > 0 {
                list.receive_forward(near);
            }
            pair(list, near, far);
        }
        list.receive_forward(far);
        pair(list, far, near);
    }
}

/// Loops 5 to 8: no near forwards are left, then none at all.
fn drain(list: &mut Builder, near: usize, far: usize, k: usize, half: usize) {
    // 5
    for _ in 0..half - k - 1 {
        backward(list, far, false);
        list.receive_forward(far);
        pair(list, far, near);
    }
    // 6: of 2 (k + 1) backwards the later k + 1 are split, their weights' work fills what follows.
    for i in 0..=k {
        backward(list, far, 2 * i > k);
        backward(list, near, 2 * i + 1 > k);
    }
    // 7
    for _ in 0..half - k - 1 {
        list.weight();
        backward(list, near, true);
    }
    // 8
    for _ in 0..=k {
        list.weight();
    }
}

fn forward(list: &mut Builder, direction: usize) {
    list.receive_forward(direction);
    list.forward(direction);
    list.send_forward(direction);
}

fn backward(list: &mut Builder, direction: usize, split: bool) {
    list.receive_backward(direction);
    list.backward(direction, split);
    list.send_backward(direction);
}

/// The forward's receive is up to the caller: it may have been posted long before.
fn pair(list: &mut Builder, forward: usize, backward: usize) {
    list.receive_backward(backward);
    list.pair(forward, backward);
    list.send_forward(forward);
    list.send_backward(backward);
}
