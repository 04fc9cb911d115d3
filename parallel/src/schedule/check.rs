//! Proves a schedule before it runs. First each list by itself (`order.rs`): every forward before its backward
//! before its weights' work, the queue of weights' work never empty, every message received before it is used
//! and made before it is sent. Then all together, as the strictest machine would run them: a send ends only when
//! it is received (buffers would hide real hangs), and each rank has one stream for exchanges, in order.
//! Out come deadlocks, sends that meet the wrong receive, the bubble of every rank and its peak of activations.

mod order;

use super::{Action, Exchange, Message, Payload, Schedule, ScheduleError};

/// How long each kind of work takes, in any one unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    pub forward: f64,
    /// The whole backward.
    pub backward: f64,
    /// Its part for the weights; the input's part is `backward − weight`.
    pub weight: f64,
    /// A forward and a whole backward, overlapped.
    pub pair: f64,
    /// One exchange, once both sides are there.
    pub transfer: f64,
}

impl Times {
    pub const UNIT: Times = Times { forward: 1.0, backward: 2.0, weight: 1.0, pair: 3.0, transfer: 0.0 };

    pub(super) fn of(&self, action: &Action) -> f64 {
        match action {
            Action::Forward(_) => self.forward,
            Action::Backward(_) => self.backward,
            Action::BackwardInput(_) => self.backward - self.weight,
            Action::BackwardWeight(_) => self.weight,
            Action::Pair { .. } => self.pair,
            Action::Exchange(_) => self.transfer,
        }
    }
}

/// One computation in time.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// A computation, never an exchange.
    pub action: Action,
    pub start: f64,
    pub end: f64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// When the last rank is done.
    pub makespan: f64,
    /// Per rank: makespan less its own work.
    pub bubble: Vec<f64>,
    /// Per rank: most micro-batches whose activations are held at once.
    pub in_flight: Vec<usize>,
    /// Per rank, in order of time.
    pub spans: Vec<Vec<Span>>,
}

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Violation {
    #[error(transparent)]
    Size(ScheduleError),
    #[error("rank {rank}, action {position} ({action}): {reason}")]
    Order { rank: usize, position: usize, action: String, reason: String },
    #[error("message {number} from rank {from} to rank {to}: {sent:?} is sent, {expected:?} expected")]
    Mismatch { from: usize, to: usize, number: usize, sent: (Payload, super::Chunk), expected: (Payload, super::Chunk) },
    #[error("{num_sent} messages go from rank {from} to rank {to}, {num_expected} are expected")]
    Unmatched { from: usize, to: usize, num_sent: usize, num_expected: usize },
    #[error("deadlock: {}", .waiting.join("; "))]
    Deadlock { waiting: Vec<String> },
    #[error("rank {rank} holds {in_flight} micro-batches, {bound} are allowed")]
    Memory { rank: usize, in_flight: usize, bound: usize },
    #[error("rank {rank} idles for {bubble}, the formula says {formula}")]
    Bubble { rank: usize, bubble: f64, formula: f64 },
}

/// Checks all ranks' lists (`lists[r]` is rank r's) for a step of `num_micro_batches`.
/// Errors: the first thing found wrong. Memory and bubble are reported; `Report::within` judges them.
pub fn check(lists: &[Vec<Action>], num_micro_batches: usize, times: &Times) -> Result<Report, Violation> {
    let in_flight: Result<Vec<usize>, _> = (0..lists.len()).map(|rank| order::check_rank(lists, rank, num_micro_batches)).collect();
    let in_flight = in_flight?;
    check_messages(lists)?;
    let spans = Machine::new(lists, num_micro_batches, times).run()?;
    let makespan = spans.iter().flatten().map(|s| s.end).fold(0.0, f64::max);
    let bubble = spans.iter().map(|s| makespan - s.iter().map(|s| times.of(&s.action)).sum::<f64>()).collect();
    Ok(Report { makespan, bubble, in_flight, spans })
}

impl Report {
    /// Holds the report of a run at unit times against the schedule's bounds.
    pub fn within(&self, schedule: Schedule, num_ranks: usize, num_micro_batches: usize) -> Result<(), Violation> {
        for (rank, &in_flight) in self.in_flight.iter().enumerate() {
            let bound = schedule.max_in_flight(rank, num_ranks, num_micro_batches);
            if in_flight > bound {
                return Err(Violation::Memory { rank, in_flight, bound });
            }
        }
        let formula = schedule.bubble(num_ranks, &Times::UNIT);
        for (rank, &bubble) in self.bubble.iter().enumerate() {
            if bubble != formula && schedule.bubble_is_exact(num_ranks, num_micro_batches) {
                return Err(Violation::Bubble { rank, bubble, formula });
            }
        }
        Ok(())
    }

    pub fn worst_bubble(&self) -> f64 {
        self.bubble.iter().copied().fold(0.0, f64::max)
    }
}

fn exchanges(list: &[Action]) -> impl Iterator<Item = &Exchange> {
    list.iter().filter_map(|action| if let Action::Exchange(exchange) = action { Some(exchange) } else { None })
}

/// The k-th send from a rank to another must be the k-th receive there.
fn check_messages(lists: &[Vec<Action>]) -> Result<(), Violation> {
    type Queue = Vec<(Payload, super::Chunk)>;
    let num_ranks = lists.len();
    let mut pairs: Vec<(Queue, Queue)> = vec![Default::default(); num_ranks * num_ranks];
    for (rank, list) in lists.iter().enumerate() {
        for exchange in exchanges(list) {
            for m in &exchange.sends {
                pairs[rank * num_ranks + m.peer].0.push((m.payload, m.chunk));
            }
            for m in &exchange.recvs {
                pairs[m.peer * num_ranks + rank].1.push((m.payload, m.chunk));
            }
        }
    }
    for (pair, (sent, expected)) in pairs.into_iter().enumerate() {
        let (from, to) = (pair / num_ranks, pair % num_ranks);
        if let Some(number) = sent.iter().zip(&expected).position(|(s, e)| s != e) {
            return Err(Violation::Mismatch { from, to, number, sent: sent[number], expected: expected[number] });
        }
        if sent.len() != expected.len() {
            return Err(Violation::Unmatched { from, to, num_sent: sent.len(), num_expected: expected.len() });
        }
    }
    Ok(())
}

/// All ranks at work. Times are known as soon as what they depend on is known, so no clock is needed: the ranks
/// are advanced in turn until none moves.
struct Machine<'a> {
    times: &'a Times,
    num_micro_batches: usize,
    ranks: Vec<Rank<'a>>,
}

struct Rank<'a> {
    list: &'a [Action],
    /// Position of the next computation and of the exchange that is open or next on the other stream.
    compute: usize,
    exchange: usize,
    /// Computations that stand before `exchange`.
    num_before: usize,
    compute_free: f64,
    exchange_free: f64,
    /// The exchange at `exchange`, once posted and all before it is over.
    open: Option<Open>,
    /// When each received message was there, by `slot`; NaN: not yet.
    arrived: Vec<f64>,
    spans: Vec<Span>,
}

#[derive(Clone, Copy)]
struct Open {
    since: f64,
    /// Bit i: message i is still to come.
    sends: u64,
    recvs: u64,
    over: f64,
}

/// Where a message of a step of `num_micro_batches` is kept.
fn slot((payload, chunk): (Payload, super::Chunk), num_micro_batches: usize) -> usize {
    (2 * chunk.direction + (payload == Payload::Gradient) as usize) * num_micro_batches + chunk.micro_batch
}

/// The first message still to come that `peer` is the other side of.
fn first_with(messages: &[Message], left: u64, peer: usize) -> Option<usize> {
    messages.iter().enumerate().position(|(i, m)| left >> i & 1 == 1 && m.peer == peer)
}

impl<'a> Machine<'a> {
    fn new(lists: &'a [Vec<Action>], num_micro_batches: usize, times: &'a Times) -> Self {
        let rank = |list: &'a Vec<Action>| Rank {
            list,
            compute: 0,
            exchange: 0,
            num_before: 0,
            compute_free: 0.0,
            exchange_free: 0.0,
            open: None,
            arrived: vec![f64::NAN; 4 * num_micro_batches],
            spans: Vec::new(),
        };
        Machine { times, num_micro_batches, ranks: lists.iter().map(rank).collect() }
    }

    fn run(mut self) -> Result<Vec<Vec<Span>>, Violation> {
        loop {
            let mut moved = false;
            for rank in 0..self.ranks.len() {
                while self.compute(rank) || self.open(rank) || self.transfer(rank) {
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        let waiting: Vec<String> = self.ranks.iter().enumerate().filter_map(|(rank, r)| r.waiting(rank)).collect();
        if waiting.is_empty() { Ok(self.ranks.into_iter().map(|r| r.spans).collect()) } else { Err(Violation::Deadlock { waiting }) }
    }

    /// Runs the next computation if its inputs are there.
    fn compute(&mut self, rank: usize) -> bool {
        let num_ranks = self.ranks.len();
        let r = &mut self.ranks[rank];
        while matches!(r.list.get(r.compute), Some(Action::Exchange(_))) {
            r.compute += 1;
        }
        let Some(action) = r.list.get(r.compute) else { return false };
        let mut start = r.compute_free;
        for input in order::inputs(action, rank, num_ranks) {
            let at = r.arrived[slot(input, self.num_micro_batches)];
            if at.is_nan() {
                return false;
            }
            start = start.max(at);
        }
        let end = start + self.times.of(action);
        r.spans.push(Span { action: action.clone(), start, end });
        r.compute_free = end;
        r.compute += 1;
        true
    }

    /// Opens the next exchange once the one before is over and the computations before it are done.
    fn open(&mut self, rank: usize) -> bool {
        let r = &mut self.ranks[rank];
        if r.open.is_some() {
            return false;
        }
        while r.list.get(r.exchange).is_some_and(|a| !matches!(a, Action::Exchange(_))) {
            r.exchange += 1;
            r.num_before += 1;
        }
        let Some(Action::Exchange(exchange)) = r.list.get(r.exchange) else { return false };
        let before = match r.num_before {
            0 => 0.0,
            n if n > r.spans.len() => return false,
            n => r.spans[n - 1].end,
        };
        let since = r.exchange_free.max(before);
        let all = |messages: &[Message]| (1 << messages.len()) - 1;
        r.open = Some(Open { since, sends: all(&exchange.sends), recvs: all(&exchange.recvs), over: since });
        true
    }

    /// Moves whatever both sides have open; ends the exchange when nothing is left of it.
    fn transfer(&mut self, rank: usize) -> bool {
        let list = self.ranks[rank].list;
        if self.ranks[rank].open.is_none() {
            return false;
        }
        let Action::Exchange(exchange) = &list[self.ranks[rank].exchange] else { unreachable!("open exchanges are exchanges") };
        let mut moved = false;
        for m in &exchange.sends {
            moved |= self.meet(rank, m.peer);
        }
        for m in &exchange.recvs {
            moved |= self.meet(m.peer, rank);
        }
        let r = &mut self.ranks[rank];
        if let Some(Open { sends: 0, recvs: 0, over, .. }) = r.open {
            for m in &exchange.recvs {
                r.arrived[slot((m.payload, m.chunk), self.num_micro_batches)] = over;
            }
            (r.open, r.exchange_free) = (None, over);
            r.exchange += 1;
            moved = true;
        }
        moved
    }

    /// One message from `from` to `to`, if both have it open.
    fn meet(&mut self, from: usize, to: usize) -> bool {
        let (Some((sending, sender)), Some((receiving, receiver))) = (self.ranks[from].opened(), self.ranks[to].opened()) else { return false };
        let Some(s) = first_with(&sending.sends, sender.sends, to) else { return false };
        let Some(r) = first_with(&receiving.recvs, receiver.recvs, from) else { return false };
        let over = sender.since.max(receiver.since) + self.times.transfer;
        let sender = self.ranks[from].open.as_mut().expect("just seen");
        sender.sends &= !(1 << s);
        sender.over = sender.over.max(over);
        let receiver = self.ranks[to].open.as_mut().expect("just seen");
        receiver.recvs &= !(1 << r);
        receiver.over = receiver.over.max(over);
        true
    }
}

impl<'a> Rank<'a> {
    /// The exchange that is open, and what is left of it.
    fn opened(&self) -> Option<(&'a Exchange, Open)> {
        let Action::Exchange(exchange) = self.list.get(self.exchange)? else { return None };
        Some((exchange, self.open?))
    }

    /// What this rank is stuck at, if it is.
    fn waiting(&self, rank: usize) -> Option<String> {
        let mut compute = self.list[self.compute.min(self.list.len())..].iter().filter(|a| !matches!(a, Action::Exchange(_)));
        let mut stuck: Vec<String> = compute.next().map(order::name).into_iter().collect();
        if let Some((exchange, open)) = self.opened() {
            let left = |messages: &[Message], left: u64| -> Vec<Message> { messages.iter().enumerate().filter(|(i, _)| left >> i & 1 == 1).map(|(_, m)| *m).collect() };
            stuck.extend(left(&exchange.sends, open.sends).iter().map(|m| format!("send of {:?} {} to {}", m.payload, m.chunk.micro_batch, m.peer)));
            stuck.extend(left(&exchange.recvs, open.recvs).iter().map(|m| format!("receive of {:?} {} from {}", m.payload, m.chunk.micro_batch, m.peer)));
        }
        (!stuck.is_empty()).then(|| format!("rank {rank} at {}", stuck.join(" and ")))
    }
}
