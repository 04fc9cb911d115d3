//! Breaks schedules at random. The checker must catch each break, or the broken list must be an equivalent one:
//! run over real threads it then gives the same result, bit for bit, within the same memory and bubble.

use super::*;
use crate::comm::counted::{Traffic, counted};
use crate::comm::local::run_local;
use crate::comm::{CommError, TensorSpec};
use crate::schedule::run::{Parcel, Stages, run};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// Deterministic: a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }
}

/// A stage whose "activations" are hashes: any wrong, missing or doubled input changes everything after it.
struct Hashing {
    rank: usize,
    num_ranks: usize,
    inputs: HashMap<Chunk, i64>,
    queue: VecDeque<(Chunk, i64)>,
    rest: Option<(Chunk, i64)>,
    /// The weights' gradients, one entry a micro-batch.
    weights: Vec<(Chunk, i64)>,
    /// Results so far, each of eight bytes, and what of all was sent.
    made: u64,
    traffic: Rc<Traffic>,
    /// Rests that were asked for before all results were on their way.
    early: usize,
}

fn mix(a: i64, b: i64) -> i64 {
    (a ^ b.rotate_left(17)).wrapping_mul(-7046029254386353131).rotate_left(29)
}

fn parcel(value: i64) -> Parcel {
    Some(vec![Tensor::from_slice(&[value])])
}

fn value(parcel: Parcel, absent: i64) -> i64 {
    parcel.map_or(absent, |tensors| tensors[0].int64_value(&[0]))
}

impl Hashing {
    fn new(rank: usize, num_ranks: usize, traffic: Rc<Traffic>) -> Self {
        Hashing { rank, num_ranks, inputs: HashMap::new(), queue: VecDeque::new(), rest: None, weights: Vec::new(), made: 0, traffic, early: 0 }
    }
    fn make(&mut self, value: i64) -> Parcel {
        self.made += 1;
        parcel(value)
    }
    fn stage(&self, chunk: Chunk) -> i64 {
        chunk.stage(self.rank, self.num_ranks) as i64
    }
}

impl Stages for Hashing {
    type Error = CommError;

    fn specs(&self, _: Chunk, _: Payload) -> Vec<TensorSpec> {
        vec![TensorSpec { shape: vec![1], kind: Kind::Int64, device: Device::Cpu }]
    }
    fn forward(&mut self, chunk: Chunk, input: Parcel) -> Result<Parcel, CommError> {
        let x = value(input, chunk.micro_batch as i64 + 1);
        self.inputs.insert(chunk, x);
        let last = self.stage(chunk) + 1 == self.num_ranks as i64;
        Ok(if last { None } else { self.make(mix(x, self.stage(chunk))) })
    }
    fn backward(&mut self, chunk: Chunk, gradient: Parcel, split: bool) -> Result<Parcel, CommError> {
        let dy = value(gradient, 99);
        let x = self.inputs.remove(&chunk).expect("its forward has run");
        self.queue.push_back((chunk, mix(dy, x)));
        if !split {
            self.rest = self.queue.pop_back();
        }
        Ok(if self.stage(chunk) == 0 { None } else { self.make(mix(dy, x.wrapping_add(self.stage(chunk)))) })
    }
    fn backward_weight(&mut self, _: Chunk) -> Result<(), CommError> {
        self.weights.push(self.queue.pop_front().expect("a backward was split"));
        Ok(())
    }
    fn pair(&mut self, forward: (Chunk, Parcel), backward: (Chunk, Parcel)) -> Result<(Parcel, Parcel), CommError> {
        Ok((self.forward(forward.0, forward.1)?, self.backward(backward.0, backward.1, false)?))
    }
    fn rest(&mut self) -> Result<(), CommError> {
        if let Some(rest) = self.rest.take() {
            self.weights.push(rest);
            self.early += usize::from(self.traffic.inside_bytes() != 8 * self.made);
        }
        Ok(())
    }
}

/// Every rank's weight gradients, sorted by micro-batch, and rests that were asked for too early.
fn ran(lists: &[Vec<Action>]) -> (Vec<Vec<(Chunk, i64)>>, Vec<usize>) {
    let ranks = run_local(lists.len(), |pipe| {
        let (pipe, traffic) = counted(pipe, &vec![0; lists.len()]);
        let mut stages = Hashing::new(pipe.rank(), pipe.size(), traffic);
        run(&lists[pipe.rank()], &*pipe, &mut stages).expect("runs to its end");
        assert!(stages.queue.is_empty() && stages.inputs.is_empty());
        stages.weights.sort_unstable();
        (stages.weights, stages.early)
    });
    ranks.into_iter().unzip()
}

fn results(lists: &[Vec<Action>]) -> Vec<Vec<(Chunk, i64)>> {
    ran(lists).0
}

#[test]
fn every_schedule_computes_what_one_rank_does() {
    for (num_ranks, num_micro_batches) in [(1, 5), (2, 8), (3, 7), (4, 8), (6, 12)] {
        for schedule in Schedule::ALL.into_iter().filter(|s| s.validate(num_ranks, num_micro_batches).is_ok()) {
            let (lists, _) = schedule.proven(num_ranks, num_micro_batches).unwrap();
            let (all, early) = ran(&lists);
            assert!(early.iter().all(|&early| early == 0), "{schedule} {num_ranks} {num_micro_batches}: the rest does not hide its results' way, {early:?}");
            // The chain of stages, one micro-batch after the other.
            for micro_batch in 0..num_micro_batches {
                let mut xs = vec![micro_batch as i64 + 1];
                xs.extend((0..num_ranks as i64 - 1).scan(xs[0], |x, stage| {
                    *x = mix(*x, stage);
                    Some(*x)
                }));
                let mut dy = 99;
                for stage in (0..num_ranks).rev() {
                    let expected = mix(dy, xs[stage]);
                    let chunk = all[0].iter().map(|(c, _)| *c).find(|c| c.micro_batch == micro_batch).expect("every micro-batch");
                    let rank = if chunk.direction == 0 { stage } else { num_ranks - 1 - stage };
                    assert!(all[rank].contains(&(chunk, expected)), "{schedule} {num_ranks} {num_micro_batches}: {chunk:?} at stage {stage}");
                    dy = mix(dy, xs[stage].wrapping_add(stage as i64));
                }
            }
        }
    }
}

fn computed(action: &mut Action, second: bool) -> Option<&mut Chunk> {
    match action {
        Action::Forward(c) | Action::Backward(c) | Action::BackwardInput(c) | Action::BackwardWeight(c) => Some(c),
        Action::Pair { forward, backward } => Some(if second { backward } else { forward }),
        Action::Exchange(_) => None,
    }
}

/// One small break of a list; may turn out to change nothing.
fn mutate(list: &mut Vec<Action>, random: &mut Random) {
    let at = random.below(list.len());
    let other = random.below(list.len());
    match random.below(8) {
        0 => list.swap(at, other),
        1 if at + 1 < list.len() => list.swap(at, at + 1),
        2 => drop(list.remove(at)),
        3 => list.insert(other, list[at].clone()),
        4 | 5 => {
            let (second, up, turn) = (random.below(2) == 0, random.below(2) == 0, random.below(4) == 0);
            if let Some(chunk) = computed(&mut list[at], second) {
                match (turn, up) {
                    (true, _) => chunk.direction = 1 - chunk.direction,
                    (_, true) => chunk.micro_batch += 1,
                    _ => chunk.micro_batch = chunk.micro_batch.saturating_sub(1),
                }
            } else {
                mutate_exchange(list, at, random);
            }
        }
        6 => match list[at] {
            Action::Backward(c) => list[at] = Action::BackwardInput(c),
            Action::BackwardInput(c) => list[at] = Action::Backward(c),
            Action::Pair { forward, backward } => drop(list.splice(at..=at, [Action::Backward(backward), Action::Forward(forward)])),
            _ => list.swap(at, other),
        },
        _ => {
            if let Some(at) = (at..list.len()).find(|&i| matches!(list[i], Action::Exchange(_))) {
                mutate_exchange(list, at, random);
            }
        }
    }
}

fn mutate_exchange(list: &mut Vec<Action>, at: usize, random: &mut Random) {
    let next = (at + 1..list.len()).find(|&i| matches!(list[i], Action::Exchange(_)));
    let Action::Exchange(exchange) = &mut list[at] else { unreachable!("an exchange was picked") };
    if random.below(3) == 0 && !exchange.sends.is_empty() {
        return send_later(list, at, next);
    }
    let messages = if exchange.sends.is_empty() || (random.below(2) == 0 && !exchange.recvs.is_empty()) { &mut exchange.recvs } else { &mut exchange.sends };
    let index = random.below(messages.len());
    match random.below(7) {
        0 => drop(messages.remove(index)),
        1 => messages[index].peer = messages[index].peer.wrapping_add(1) % 4,
        2 => messages[index].chunk.micro_batch += 1,
        3 => messages[index].payload = if messages[index].payload == Payload::Gradient { Payload::Activation } else { Payload::Gradient },
        4 => messages.reverse(),
        5 => {
            let sends = std::mem::take(&mut exchange.sends);
            list.insert(at + random.below(2), Action::Exchange(Exchange { sends, recvs: Vec::new() }));
        }
        _ => {
            let Some(next) = next else { return };
            let Action::Exchange(moved) = list.remove(at) else { unreachable!("an exchange was picked") };
            let Action::Exchange(later) = &mut list[next - 1] else { unreachable!("an exchange was found") };
            later.sends.splice(0..0, moved.sends);
            later.recvs.splice(0..0, moved.recvs);
        }
    }
}

/// Holds the sends of an exchange back until the next one: what hangs on a machine that does not buffer.
fn send_later(list: &mut [Action], at: usize, next: Option<usize>) {
    let Some(next) = next else { return };
    let Action::Exchange(exchange) = &mut list[at] else { unreachable!("an exchange was picked") };
    let sends = std::mem::take(&mut exchange.sends);
    let Action::Exchange(later) = &mut list[next] else { unreachable!("an exchange was found") };
    later.sends.splice(0..0, sends);
}

#[test]
fn every_mutation_is_caught_or_equivalent() {
    const PER_CASE: usize = 300;
    let cases = [
        (Schedule::GPipe, 3, 4),
        (Schedule::OneFOneB, 4, 6),
        (Schedule::Zb1p, 4, 6),
        (Schedule::DualPipe, 4, 8),
        (Schedule::DualPipe, 4, 10),
        (Schedule::DualPipe, 6, 12),
    ];
    let mut random = Random(7);
    let (mut num_caught, mut num_equivalent) = (0, 0);
    let mut kinds: HashMap<String, usize> = HashMap::new();
    for (schedule, num_ranks, num_micro_batches) in cases {
        let (original, _) = schedule.proven(num_ranks, num_micro_batches).unwrap();
        let expected = results(&original);
        let mut done = 0;
        while done < PER_CASE {
            let mut lists = original.clone();
            let rank = random.below(num_ranks);
            mutate(&mut lists[rank], &mut random);
            if lists == original {
                continue;
            }
            done += 1;
            let verdict = check(&lists, num_micro_batches, &Times::UNIT).and_then(|report| report.within(schedule, num_ranks, num_micro_batches));
            if let Err(violation) = verdict {
                num_caught += 1;
                let debug = format!("{violation:?}");
                *kinds.entry(debug.split([' ', '(']).next().expect("a name").to_string()).or_insert(0) += 1;
            } else {
                // Memory and bubble are within bounds: what is left to show is the result.
                assert_eq!(results(&lists), expected, "{schedule}: rank {rank} passed the checker with {:?}", lists[rank]);
                num_equivalent += 1;
            }
        }
    }
    println!("{num_caught} mutations caught {kinds:?}, {num_equivalent} equivalent");
    for kind in ["Order", "Mismatch", "Deadlock", "Memory", "Bubble"] {
        assert!(kinds.contains_key(kind), "no mutation was caught as {kind}: {kinds:?}");
    }
    assert_eq!(num_caught + num_equivalent, PER_CASE * cases.len());
    assert!(num_caught > num_equivalent * 4, "{num_caught} caught, {num_equivalent} equivalent: is the checker awake?");
}
