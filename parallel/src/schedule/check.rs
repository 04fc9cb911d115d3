//! Proves a schedule before it runs. First each list by itself (`order.rs`): every forward before its backward
//! before its weights' work, the queue of weights' work never empty, every message received before it is used
//! and made before it is sent. Then all together, as the strictest machine would run them: a send ends only when
//! it is received (buffers would hide real hangs), and each rank has one stream for exchanges, in order.
//! Out come deadlocks, sends that meet the wrong receive, the bubble of every rank and its peak of activations.

mod order;

use super::{Action, Exchange, Message, Payload, Schedule, ScheduleError};
use std::collections::{HashMap, VecDeque};

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
    let spans = Machine::new(lists, times).run()?;
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
    let mut pairs: HashMap<(usize, usize), (Queue, Queue)> = HashMap::new();
    for (rank, list) in lists.iter().enumerate() {
        for exchange in exchanges(list) {
            for m in &exchange.sends {
                pairs.entry((rank, m.peer)).or_default().0.push((m.payload, m.chunk));
            }
            for m in &exchange.recvs {
                pairs.entry((m.peer, rank)).or_default().1.push((m.payload, m.chunk));
            }
        }
    }
    for ((from, to), (sent, expected)) in pairs {
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
    /// When each received message was there.
    arrived: HashMap<(Payload, super::Chunk), f64>,
    spans: Vec<Span>,
}

struct Open {
    since: f64,
    sends: VecDeque<Message>,
    recvs: VecDeque<Message>,
    over: f64,
}

impl<'a> Machine<'a> {
    fn new(lists: &'a [Vec<Action>], times: &'a Times) -> Self {
        let rank = |list: &'a Vec<Action>| Rank {
            list,
            compute: 0,
            exchange: 0,
            num_before: 0,
            compute_free: 0.0,
            exchange_free: 0.0,
            open: None,
            arrived: HashMap::new(),
            spans: Vec::new(),
        };
        Machine { times, ranks: lists.iter().map(rank).collect() }
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
            match r.arrived.get(&input) {
                Some(&at) => start = start.max(at),
                None => return false,
            }
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
        let (sends, recvs) = (exchange.sends.iter().copied().collect(), exchange.recvs.iter().copied().collect());
        r.open = Some(Open { since, sends, recvs, over: since });
        true
    }

    /// Moves whatever both sides have open; ends the exchange when nothing is left of it.
    fn transfer(&mut self, rank: usize) -> bool {
        let mut moved = false;
        for peer in 0..self.ranks.len() {
            moved |= self.meet(rank, peer) | self.meet(peer, rank);
        }
        let r = &mut self.ranks[rank];
        if r.open.as_ref().is_some_and(|o| o.sends.is_empty() && o.recvs.is_empty()) {
            let open = r.open.take().expect("just seen");
            let Action::Exchange(exchange) = &r.list[r.exchange] else { unreachable!("open exchanges are exchanges") };
            for m in &exchange.recvs {
                r.arrived.insert((m.payload, m.chunk), open.over);
            }
            r.exchange_free = open.over;
            r.exchange += 1;
            moved = true;
        }
        moved
    }

    /// One message from `from` to `to`, if both have it open.
    fn meet(&mut self, from: usize, to: usize) -> bool {
        let sends = |o: &Open| o.sends.iter().position(|m| m.peer == to);
        let recvs = |o: &Open| o.recvs.iter().position(|m| m.peer == from);
        let Some((s, sent_since)) = self.ranks[from].open.as_ref().and_then(|o| Some((sends(o)?, o.since))) else { return false };
        let Some((r, received_since)) = self.ranks[to].open.as_ref().and_then(|o| Some((recvs(o)?, o.since))) else { return false };
        let over = sent_since.max(received_since) + self.times.transfer;
        for (rank, index, is_send) in [(from, s, true), (to, r, false)] {
            let open = self.ranks[rank].open.as_mut().expect("just seen");
            if is_send { open.sends.remove(index) } else { open.recvs.remove(index) };
            open.over = open.over.max(over);
        }
        true
    }
}

impl Rank<'_> {
    /// What this rank is stuck at, if it is.
    fn waiting(&self, rank: usize) -> Option<String> {
        let mut compute = self.list[self.compute.min(self.list.len())..].iter().filter(|a| !matches!(a, Action::Exchange(_)));
        let stuck: Vec<String> = compute.next().map(order::name).into_iter().chain(self.open.as_ref().map(|o| {
            let sends = o.sends.iter().map(|m| format!("send of {:?} {} to {}", m.payload, m.chunk.micro_batch, m.peer));
            let recvs = o.recvs.iter().map(|m| format!("receive of {:?} {} from {}", m.payload, m.chunk.micro_batch, m.peer));
            sends.chain(recvs).collect::<Vec<_>>().join(", ")
        })).collect();
        (!stuck.is_empty()).then(|| format!("rank {rank} at {}", stuck.join(" and ")))
    }
}
