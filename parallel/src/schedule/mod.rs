//! Pipeline schedules: what each rank does in a step, as a pure function of (rank, ranks, micro-batches).
//! DeepSeek-V3 §3.2.1 (DualPipe); GPipe; 1F1B (PipeDream-Flush); ZB1P (Zero Bubble's H1). `check.rs` proves a
//! schedule before it runs: no deadlock, order, memory and bubble.
//!
//! Meaning of a list: computations run in order on one stream, exchanges in order on another. An exchange is
//! posted where it stands (its sends are results of computations before it) and is waited on by the computation
//! that needs one of its messages, the rest at the end of the step. All schedules take the micro-batches of a
//! direction in order, forward and backward, so gradients add in the same order under all but DualPipe.
//!
//! Legend: P ranks of the pipe, M micro-batches of a step; direction 0 runs up the ranks (stage = rank),
//! direction 1 down (stage = P − 1 − rank).

mod build;
mod check;
mod dual_pipe;
mod one_way;
pub mod run;
mod svg;

pub use check::{Report, Span, Times, Violation, check};
pub use svg::timeline;

use serde::{Deserialize, Serialize};
use std::fmt;

/// One micro-batch on its way through the pipe. With two directions the first half of the step's micro-batches
/// goes up (direction 0), the second half down (direction 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Chunk {
    pub direction: usize,
    /// Index among the step's micro-batches of this pipe, 0..M.
    pub micro_batch: usize,
}

impl Chunk {
    /// The stage that `rank` of `num_ranks` runs it through.
    pub fn stage(&self, rank: usize, num_ranks: usize) -> usize {
        if self.direction == 0 { rank } else { num_ranks - 1 - rank }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Payload {
    /// The output of a stage's forward.
    Activation,
    /// The gradient of a stage's input.
    Gradient,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Message {
    /// Rank within the pipe.
    pub peer: usize,
    pub chunk: Chunk,
    pub payload: Payload,
}

/// Sends and receives posted together; over once all of them are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exchange {
    pub sends: Vec<Message>,
    pub recvs: Vec<Message>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Forward(Chunk),
    /// The whole backward: gradient of the input and of the weights.
    Backward(Chunk),
    /// Gradient of the input only; the weights' work joins the end of the queue.
    BackwardInput(Chunk),
    /// The weights' work at the head of the queue, which must be this chunk's.
    BackwardWeight(Chunk),
    /// Forward of one micro-batch and whole backward of another, each hiding the other's transfers.
    Pair { forward: Chunk, backward: Chunk },
    Exchange(Exchange),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Schedule {
    /// All forwards, then all backwards.
    #[serde(rename = "gpipe")]
    GPipe,
    /// One forward, one backward; on one rank plain gradient accumulation.
    #[serde(rename = "1f1b")]
    OneFOneB,
    /// 1F1B with the weights' gradient split off into the gaps.
    #[serde(rename = "zb1p")]
    Zb1p,
    /// Micro-batches from both ends, forward and backward overlapped.
    #[serde(rename = "dualpipe")]
    DualPipe,
    /// One rank: each forward overlaps the backward before it.
    #[serde(rename = "paired")]
    Paired,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("schedule {schedule} cannot run {num_micro_batches} micro-batches on {num_ranks} pipeline ranks: {reason}")]
pub struct ScheduleError {
    pub schedule: Schedule,
    pub num_ranks: usize,
    pub num_micro_batches: usize,
    pub reason: &'static str,
}

impl Schedule {
    pub const ALL: [Schedule; 5] = [Self::GPipe, Self::OneFOneB, Self::Zb1p, Self::DualPipe, Self::Paired];

    /// What `rank` does in a step of `num_micro_batches` of its pipe of `num_ranks`.
    /// Errors: sizes that the schedule is not made for.
    pub fn actions(self, rank: usize, num_ranks: usize, num_micro_batches: usize) -> Result<Vec<Action>, ScheduleError> {
        self.validate(num_ranks, num_micro_batches)?;
        assert!(rank < num_ranks, "rank {rank} of {num_ranks}");
        Ok(match self {
            Self::GPipe => one_way::gpipe(rank, num_ranks, num_micro_batches),
            Self::OneFOneB => one_way::one_f_one_b(rank, num_ranks, num_micro_batches),
            Self::Zb1p => one_way::zb1p(rank, num_ranks, num_micro_batches),
            Self::DualPipe => dual_pipe::dual_pipe(rank, num_ranks, num_micro_batches),
            Self::Paired => one_way::paired(num_micro_batches),
        })
    }

    /// What a step of so many micro-batches runs: too few for DualPipe (a ramp's first steps) go through one copy of the
    /// stages, as 1F1B. Not as ZB1P: what late stages then put off is more than DualPipe keeps, and DualPipe's two copies
    /// leave no room for it.
    pub fn for_step(self, num_ranks: usize, num_micro_batches: usize) -> Schedule {
        match self {
            Self::DualPipe if self.validate(num_ranks, num_micro_batches).is_err() => Self::OneFOneB,
            schedule => schedule,
        }
    }

    /// What `rank` does to find a loss without gradients; every micro-batch goes up (direction 0).
    pub fn forwards(rank: usize, num_ranks: usize, num_micro_batches: usize) -> Vec<Action> {
        one_way::forwards(rank, num_ranks, num_micro_batches)
    }

    /// All ranks' lists, proven by the checker at unit times.
    pub fn proven(self, num_ranks: usize, num_micro_batches: usize) -> Result<(Vec<Vec<Action>>, Report), Violation> {
        let lists: Result<Vec<_>, _> = (0..num_ranks).map(|rank| self.actions(rank, num_ranks, num_micro_batches)).collect();
        let lists = lists.map_err(Violation::Size)?;
        let report = check(&lists, num_micro_batches, &Times::UNIT)?;
        report.within(self, num_ranks, num_micro_batches)?;
        Ok((lists, report))
    }

    pub fn validate(self, num_ranks: usize, num_micro_batches: usize) -> Result<(), ScheduleError> {
        let refuse = |reason| Err(ScheduleError { schedule: self, num_ranks, num_micro_batches, reason });
        match self {
            _ if num_ranks == 0 || num_micro_batches == 0 => refuse("there must be at least one of each"),
            Self::Paired if num_ranks != 1 => refuse("it is made for one rank"),
            Self::DualPipe if !num_ranks.is_multiple_of(2) => refuse("the number of ranks must be even"),
            Self::DualPipe if !num_micro_batches.is_multiple_of(2) => refuse("the number of micro-batches must be even"),
            Self::DualPipe if num_micro_batches < 2 * num_ranks => refuse("it needs at least two micro-batches a rank"),
            _ => Ok(()),
        }
    }

    /// How many copies of the model the pipe holds: under DualPipe rank r has stages r and P − 1 − r.
    pub fn num_directions(self) -> usize {
        if self == Self::DualPipe { 2 } else { 1 }
    }

    /// The published bubble of every rank, in the unit of `times`. DeepSeek-V3 table 2.
    pub fn bubble(self, num_ranks: usize, times: &Times) -> f64 {
        let Times { forward, backward, weight, pair, .. } = *times;
        let ranks = num_ranks as f64;
        match self {
            Self::GPipe | Self::OneFOneB => (ranks - 1.0) * (forward + backward),
            Self::Zb1p => (ranks - 1.0) * (forward + backward - 2.0 * weight),
            Self::DualPipe => (ranks / 2.0 - 1.0) * (pair + backward - 3.0 * weight),
            Self::Paired => 0.0,
        }
    }

    /// Is the formula exact at unit times for these sizes? (ZB1P with fewer micro-batches than ranks is not.)
    pub fn bubble_is_exact(self, num_ranks: usize, num_micro_batches: usize) -> bool {
        self != Self::Zb1p || num_micro_batches >= num_ranks
    }

    /// Most micro-batches whose activations a rank holds at a time.
    pub fn max_in_flight(self, rank: usize, num_ranks: usize, num_micro_batches: usize) -> usize {
        match self {
            Self::GPipe => num_micro_batches,
            Self::OneFOneB => (num_ranks - rank).min(num_micro_batches),
            Self::Zb1p => num_ranks.min(num_micro_batches),
            Self::DualPipe => num_ranks + 1,
            Self::Paired => 2.min(num_micro_batches),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::GPipe => "gpipe",
            Self::OneFOneB => "1f1b",
            Self::Zb1p => "zb1p",
            Self::DualPipe => "dualpipe",
            Self::Paired => "paired",
        })
    }
}

#[cfg(test)]
mod tests;
