//! Silent corruption: bits that change in memory or on the way without anybody's doing. AdamW leaves a checksum with every
//! shard that it writes. Before the next update every rank compares the weights it has computed with against their
//! owners' sums, its masters and moments against its own; a micro-batch may be computed twice and compared.
//!
//! Invariant: one reduced number tells every rank whether any of them found anything, so all take the same branch.
mod probe;
mod step;

pub use probe::{BACKWARD, FORWARD, Probe};

use crate::optimizer::Slot;
use crate::zero::{Shard, Zero};
use kernels::ops::checksum::checksums;
use model::params::Role;
use model::{ParamId, Weights};
use parallel::comm::{CommError, Communicator, gather_bytes};
use serde::{Deserialize, Serialize};
use std::fmt;
use tch::{Kind, Tensor};

/// `[checks]` of a run's config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ChecksSection {
    /// Weights, masters and moments against the checksums that AdamW left, at every step.
    pub memory: bool,
    /// Every so many steps a random micro-batch is computed twice and compared bit for bit; 0: never.
    pub recompute_every: u64,
}

impl Default for ChecksSection {
    fn default() -> Self {
        ChecksSection { memory: true, recompute_every: 0 }
    }
}

/// What was found wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// What layers compute with: it can be made again from the master.
    Weight,
    /// A master, a moment or an expert's bias: there is no other on this rank.
    Master,
    FirstMoment,
    SecondMoment,
    Bias,
    /// Nothing in memory: the same computation of the same input gave two results.
    Computation,
    /// Nothing in memory: a gradient came to what none comes to.
    Gradient,
    /// Nothing here: what came from another rank was not the same twice.
    Received,
}

impl Place {
    /// A copy of the whole state of this very step is needed.
    pub fn lost(self) -> bool {
        matches!(self, Place::Master | Place::FirstMoment | Place::SecondMoment | Place::Bias)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub rank: usize,
    pub place: Place,
    /// The tensor and its rows here, or the micro-batch.
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { rank, place, what } = self;
        match place {
            Place::Weight => write!(f, "rank {rank}: the weight {what} is not what AdamW wrote"),
            Place::Master => write!(f, "rank {rank}: the master of {what} changed since AdamW wrote it"),
            Place::FirstMoment => write!(f, "rank {rank}: the first moment of {what} changed since AdamW wrote it"),
            Place::SecondMoment => write!(f, "rank {rank}: the second moment of {what} changed since AdamW wrote it"),
            Place::Bias => write!(f, "rank {rank}: the expert bias {what} changed since it was set"),
            Place::Computation | Place::Gradient | Place::Received => write!(f, "rank {rank}: {what}"),
        }
    }
}

/// Checksums that AdamW leaves of one shard, [] i64 each.
#[derive(Debug)]
pub struct Sums {
    /// Of the rows that layers compute with.
    pub weight: Tensor,
    /// Master, first and second moment: [3].
    state: Tensor,
}

impl Sums {
    pub fn of(slot: &Slot, weights: &Weights) -> Sums {
        let rows = slot.shard.of(weights.get(slot.shard.id));
        let alias = rows.kind() == slot.master.kind();
        let mut tensors = vec![slot.master.shallow_clone(), slot.first.shallow_clone(), slot.second.shallow_clone()];
        if !alias {
            tensors.push(rows);
        }
        let all = checksums(&tensors);
        Sums { weight: all.get(if alias { 0 } else { 3 }), state: all.narrow(0, 0, 3) }
    }
}

/// One tensor with the sum that it should have.
struct Item {
    place: Place,
    id: ParamId,
    /// First row and rows in this rank's part.
    rows: (i64, i64),
    tensor: Tensor,
    expected: Tensor,
}

#[derive(Default)]
pub struct Checks {
    pub config: ChecksSection,
    /// Of the expert biases, in the table's order.
    biases: Option<Tensor>,
    items: Vec<Item>,
    /// Of each item: its sum is another. [n] bool
    wrong: Option<Tensor>,
    /// What a computation made twice came to.
    pub(crate) twice: Vec<Finding>,
}

impl Checks {
    pub fn new(config: ChecksSection) -> Checks {
        Checks { config, ..Checks::default() }
    }

    /// The expert biases have their values for the next step.
    pub fn set_biases(&mut self, weights: &Weights) {
        if self.config.memory {
            self.biases = Some(checksums(&biases(weights).iter().map(|&id| weights.get(id).shallow_clone()).collect::<Vec<_>>()));
        }
    }

    /// How much is wrong on this rank: [1] f64, on the weights' device. Everything on its way has landed.
    pub fn inspect(&mut self, weights: &Weights, zero: &Zero, slots: &[Slot]) -> Tensor {
        let twice = Tensor::full([1], self.twice.len() as f64, (Kind::Double, weights.device()));
        if !self.config.memory {
            return twice;
        }
        self.items = self.collect(weights, zero, slots);
        if self.items.is_empty() {
            return twice;
        }
        let tensors: Vec<Tensor> = self.items.iter().map(|item| item.tensor.shallow_clone()).collect();
        let expected = Tensor::stack(&self.items.iter().map(|item| &item.expected).collect::<Vec<_>>(), 0);
        let wrong = checksums(&tensors).ne_tensor(&expected);
        let count = wrong.sum(Kind::Double).view(1) + twice;
        self.wrong = Some(wrong);
        count
    }

    fn collect(&self, weights: &Weights, zero: &Zero, slots: &[Slot]) -> Vec<Item> {
        let mut items = Vec::new();
        let weight = |shard: Shard, expected: Tensor| Item {
            place: Place::Weight,
            id: shard.id,
            rows: (shard.start, shard.rows),
            tensor: shard.of(weights.get(shard.id)),
            expected,
        };
        for slot in slots {
            let (Some(sums), shard) = (&slot.sums, slot.shard) else { continue };
            let places = [(Place::Master, &slot.master), (Place::FirstMoment, &slot.first), (Place::SecondMoment, &slot.second)];
            for (index, (place, tensor)) in places.into_iter().enumerate() {
                items.push(Item {
                    place,
                    id: shard.id,
                    rows: (shard.start, shard.rows),
                    tensor: tensor.shallow_clone(),
                    expected: sums.state.get(index as i64),
                });
            }
            // Where they are one tensor, the master's word counts.
            if weights.get(shard.id).kind() != slot.master.kind() {
                items.push(weight(shard, sums.weight.shallow_clone()));
            }
        }
        items.extend(zero.received().into_iter().map(|(shard, expected)| weight(shard, expected)));
        if let Some(sums) = &self.biases {
            for (index, id) in biases(weights).into_iter().enumerate() {
                let tensor = weights.get(id).shallow_clone();
                items.push(Item { place: Place::Bias, id, rows: (0, tensor.size()[0]), tensor, expected: sums.get(index as i64) });
            }
        }
        items
    }

    /// What every rank has found, once `inspect` has said that there is something: collective over `world`.
    pub fn findings(&mut self, weights: &Weights, world: &dyn Communicator) -> Result<Vec<Finding>, CommError> {
        let mut mine = std::mem::take(&mut self.twice);
        if let Some(wrong) = self.wrong.take() {
            let wrong = Vec::<bool>::try_from(&wrong).expect("bools");
            for (item, _) in self.items.iter().zip(wrong).filter(|(_, wrong)| *wrong) {
                let spec = weights.table.spec(item.id);
                let (first, rows) = (spec.start + item.rows.0, item.rows.1);
                let what =
                    if rows == spec.total { spec.name.clone() } else { format!("{} (rows {first} to {})", spec.name, first + rows - 1) };
                mine.push(Finding { rank: world.rank(), place: item.place, what });
            }
        }
        let all = gather_bytes(world, &serde_json::to_vec(&mine).expect("plain values"))?;
        let read = |bytes: &Vec<u8>| serde_json::from_slice::<Vec<Finding>>(bytes).expect("another rank's findings");
        let mut all: Vec<Finding> = all.iter().flat_map(read).collect();
        // Who got other input could not give the same result.
        if all.iter().any(|finding| finding.place == Place::Computation) {
            all.retain(|finding| finding.place != Place::Received);
        }
        Ok(all)
    }
}

fn biases(weights: &Weights) -> Vec<ParamId> {
    weights.table.ids().filter(|&id| weights.table.spec(id).role == Role::Bias).collect()
}
