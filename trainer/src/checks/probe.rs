//! One micro-batch on its way through this rank, in checksums: what came in and what went out, forward and backward.
use super::{Finding, Place};
use crate::faults::flip_any;
use kernels::ops::checksum::checksums;
use parallel::schedule::Chunk;
use parallel::schedule::run::Parcel;
use std::collections::BTreeMap;
use tch::Tensor;

/// Follows one chunk of a step.
pub struct Probe {
    pub chunk: Chunk,
    /// A bit of the forward's output is flipped, for a test.
    pub flip: bool,
    given: BTreeMap<&'static str, Vec<i64>>,
    seen: Vec<Seen>,
}

/// The checksums of what a direction took and gave.
#[derive(PartialEq)]
struct Seen {
    what: &'static str,
    given: Vec<i64>,
    made: Vec<i64>,
}

pub const FORWARD: &str = "forward";
pub const BACKWARD: &str = "backward";

impl Probe {
    pub fn new(chunk: Chunk) -> Probe {
        Probe { chunk, flip: false, given: BTreeMap::new(), seen: Vec::new() }
    }

    pub fn came(&mut self, what: &'static str, parcel: &Parcel) {
        let tensors: Vec<&Tensor> = parcel.iter().flatten().collect();
        self.given.insert(what, sums(&tensors));
    }

    pub fn went(&mut self, what: &'static str, made: &[&Tensor]) {
        if let (true, FORWARD, Some(tensor)) = (self.flip, what, made.first()) {
            flip_any(tensor, self.chunk.micro_batch as u64);
        }
        let given = self.given.remove(what).expect("something came before it went");
        self.seen.push(Seen { what, given, made: sums(made) });
    }

    /// What differs from the first time, told by `rank`.
    pub fn compare(&self, again: &Probe, rank: usize, micro_batch: usize) -> Vec<Finding> {
        assert_eq!(self.seen.len(), again.seen.len(), "the same way through the rank");
        let pairs = self.seen.iter().zip(&again.seen).filter(|(first, second)| first != second);
        let finding = |(first, second): (&Seen, &Seen)| match first.given == second.given {
            true => Finding {
                rank,
                place: Place::Computation,
                what: format!("the {} pass of micro-batch {micro_batch}, computed twice, is not the same twice", first.what),
            },
            false => Finding {
                rank,
                place: Place::Received,
                what: format!("what the {} pass of micro-batch {micro_batch} starts from came in two versions", first.what),
            },
        };
        pairs.map(finding).collect()
    }
}

fn sums(tensors: &[&Tensor]) -> Vec<i64> {
    let whole: Vec<Tensor> = tensors.iter().map(|tensor| tensor.contiguous()).collect();
    Vec::<i64>::try_from(&checksums(&whole)).expect("i64 sums")
}
