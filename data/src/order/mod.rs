//! The global order of samples: a pure function of (sources, L, seed, phase, index), in constant
//! memory. Nothing here reads a file.
//!
//! **Mixture.** Block k holds round(w·B·(k+1)) − round(w·B·k) samples of a source of weight w; which
//! place in the block belongs to which source is drawn anew for each block. Rounding a source at a
//! time keeps each share exact to half a sample at block ends; a block is therefore B samples long
//! up to half a sample a source. A source's own samples stay in its order, so its epochs do not
//! run into each other.
//! **Within a source.** Its k-th drawn sample belongs to epoch k / n; the epoch permutes windows of
//! C consecutive samples, then the samples inside a window; the short last window stays last. So
//! a reader stays within a few row groups for C samples, and the documents, which lie in shuffled
//! order already, are mixed further.
//! **Held-out**: stream order, one source after the other, one pass.

mod feistel;

use crate::{DataError, Split};
use feistel::{derive, permute};

/// Samples of a mixture block, B. Finding a place looks at the places before it in the block.
const BLOCK: u64 = 128;
/// Tokens of a window; C is this over L. 16 MiB of tokens: what a rank must hold of each source.
const WINDOW_TOKENS: u64 = 1 << 22;
/// Weights become fractions of 2³², so that shares are integer arithmetic, alike on every machine.
const ONE: u64 = 1 << 32;

/// Which sample of which source an index names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    pub source: u32,
    /// How often the source had been gone through before.
    pub epoch: u64,
    /// Sample j of the source: its tokens begin at j·L.
    pub sample: u64,
}

/// See the module head.
#[derive(Clone, Debug)]
pub struct Order {
    split: Split,
    seed: u64,
    phase: u64,
    /// C, samples of a window.
    window: u64,
    block: u64,
    sources: Vec<Share>,
}

#[derive(Clone, Copy, Debug)]
struct Share {
    num_samples: u64,
    /// Weight as a fraction of `ONE`; all sum to `ONE`.
    weight: u64,
}

/// What an order is made of, beside the sources.
#[derive(Clone, Copy, Debug)]
pub struct OrderKey {
    pub sequence_length: usize,
    pub seed: u64,
    pub phase: u64,
    pub split: Split,
}

impl Order {
    /// `sources`: (samples of one epoch, weight). Weights are relative and must be positive.
    pub fn new(key: OrderKey, sources: &[(u64, f64)]) -> Result<Order, DataError> {
        let window = (WINDOW_TOKENS / key.sequence_length as u64).max(1);
        Order::with_window(key, sources, window, BLOCK)
    }

    /// The same with C and B by hand: for tests, whose corpora are small.
    #[doc(hidden)]
    pub fn with_window(key: OrderKey, sources: &[(u64, f64)], window: u64, block: u64) -> Result<Order, DataError> {
        let weights = fractions(sources)?;
        let share = |(&(num_samples, _), weight)| Share { num_samples, weight };
        let sources: Vec<Share> = sources.iter().zip(weights).map(share).collect();
        assert!(window > 0 && block > 0 && sources.iter().all(|s| s.num_samples > 0), "{sources:?}");
        Ok(Order { split: key.split, seed: key.seed, phase: key.phase, window, block, sources })
    }

    /// Samples of one epoch of every source together.
    pub fn num_samples(&self) -> u64 {
        self.sources.iter().map(|s| s.num_samples).sum()
    }

    /// The sample at `index`. Training never ends; the held-out split does.
    pub fn locate(&self, index: u64) -> Result<Place, DataError> {
        match self.split {
            Split::Train => Ok(self.locate_mixed(index)),
            Split::HeldOut => self.locate_in_sequence(index),
        }
    }

    fn locate_in_sequence(&self, index: u64) -> Result<Place, DataError> {
        let mut rest = index;
        for (source, share) in self.sources.iter().enumerate() {
            if rest < share.num_samples {
                return Ok(Place { source: source as u32, epoch: 0, sample: rest });
            }
            rest -= share.num_samples;
        }
        Err(DataError::SampleOutOfRange { index, limit: self.num_samples() })
    }

    fn locate_mixed(&self, index: u64) -> Place {
        if let [_] = self.sources[..] {
            return self.nth_of_source(0, index);
        }
        let block = self.block_of(index);
        let start = self.blocks_total(block);
        // Slots of the block before they are shuffled: the first source's, then the second's, …
        let mut ends = Vec::with_capacity(self.sources.len());
        for share in &self.sources {
            let here = self.drawn(share, block + 1) - self.drawn(share, block);
            ends.push(ends.last().unwrap_or(&0) + here);
        }
        let length = ends[ends.len() - 1];
        let key = derive(&[self.seed, self.phase, 1, block]);
        let source_at = |place: u64| {
            let slot = permute(key, length, place);
            ends.partition_point(|end| *end <= slot)
        };
        let source = source_at(index - start);
        let earlier = (0..index - start).filter(|place| source_at(*place) == source).count() as u64;
        self.nth_of_source(source, self.drawn(&self.sources[source], block) + earlier)
    }

    /// The k-th sample that is ever drawn from `source`.
    fn nth_of_source(&self, source: usize, k: u64) -> Place {
        let n = self.sources[source].num_samples;
        let (epoch, i) = (k / n, k % n);
        let key = |kind: u64, window: u64| derive(&[self.seed, self.phase, kind, source as u64, epoch, window]);
        let (full, place) = (n / self.window, i / self.window);
        let window = if place < full { permute(key(2, 0), full, place) } else { full };
        let size = self.window.min(n - window * self.window);
        let inside = permute(key(3, window), size, i % self.window);
        Place { source: source as u32, epoch, sample: window * self.window + inside }
    }

    /// Samples drawn from a source in the first `blocks` blocks: round(w·B·blocks).
    fn drawn(&self, share: &Share, blocks: u64) -> u64 {
        let exact = u128::from(share.weight) * u128::from(self.block) * u128::from(blocks);
        ((exact + u128::from(ONE / 2)) / u128::from(ONE)) as u64
    }

    fn blocks_total(&self, blocks: u64) -> u64 {
        self.sources.iter().map(|share| self.drawn(share, blocks)).sum()
    }

    /// The block that holds `index`: index / B, but for the rounding of each source.
    fn block_of(&self, index: u64) -> u64 {
        let mut block = index / self.block;
        while self.blocks_total(block) > index {
            block -= 1;
        }
        while self.blocks_total(block + 1) <= index {
            block += 1;
        }
        block
    }
}

/// Weights as fractions of `ONE` that sum to it; the largest takes what rounding left.
fn fractions(sources: &[(u64, f64)]) -> Result<Vec<u64>, DataError> {
    let bad = |value: String, limit: &str| DataError::bad_option("weight", value, limit);
    if sources.is_empty() {
        return Err(DataError::bad_option("sources", "[]", "a run needs at least one source"));
    }
    if let Some((_, weight)) = sources.iter().find(|(_, w)| !(w.is_finite() && *w > 0.0)) {
        return Err(bad(weight.to_string(), "a weight must be a positive number"));
    }
    let total: f64 = sources.iter().map(|(_, w)| w).sum();
    let mut parts: Vec<u64> = sources.iter().map(|(_, w)| (w / total * ONE as f64).round() as u64).collect();
    let largest = (0..parts.len()).max_by_key(|i| parts[*i]).expect("there is a source");
    let others: u64 = parts.iter().sum::<u64>() - parts[largest];
    parts[largest] = ONE - others;
    match parts.iter().position(|part| *part == 0) {
        Some(i) => Err(bad(sources[i].1.to_string(), "below one in 4 billion of the mixture")),
        None => Ok(parts),
    }
}

#[cfg(test)]
mod tests;
