//! The global order of samples: a pure function of (sources, L, seed, phase, index) and of where phases
//! before left the sources, in constant memory. Nothing here reads a file.
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
//! **From phase to phase** a source whose L stays goes on where it was left (`Begun`): the mixture alone is drawn anew.
//! **Held-out**: the same in blocks of one sample, so that few samples keep the shares too; a source's own in stream
//! order, one pass: it ends where the first source does.

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
    begun: Begun,
}

/// Where a source's draws at one L began, and how many of them came before some point. The first two name its
/// permutations, which therefore last over phases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// The phase, and the source's place in its mixture.
    pub order: u64,
    pub source: u64,
    pub drawn: u64,
}

/// One block of the mixture. Its slots before they are shuffled: the first source's, then the second's, …
struct Block {
    number: u64,
    /// Its first index.
    first: u64,
    /// Where each source's slots end.
    ends: Vec<u64>,
    key: u64,
}

impl Block {
    fn source_at(&self, index: u64) -> usize {
        let slot = permute(self.key, self.ends[self.ends.len() - 1], index - self.first);
        self.ends.partition_point(|end| *end <= slot)
    }
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
        let block = match key.split {
            Split::Train => BLOCK,
            Split::HeldOut => 1,
        };
        Order::with_window(key, sources, window, block)
    }

    /// The same with C and B by hand: for tests, whose corpora are small.
    #[doc(hidden)]
    pub fn with_window(key: OrderKey, sources: &[(u64, f64)], window: u64, block: u64) -> Result<Order, DataError> {
        let weights = fractions(sources)?;
        let begun = |source| Begun { order: key.phase, source, drawn: 0 };
        let share = |((&(num_samples, _), weight), source)| Share { num_samples, weight, begun: begun(source) };
        let sources: Vec<Share> = sources.iter().zip(weights).zip(0..).map(share).collect();
        assert!(window > 0 && block > 0 && sources.iter().all(|s| s.num_samples > 0), "{sources:?}");
        Ok(Order { split: key.split, seed: key.seed, phase: key.phase, window, block, sources })
    }

    /// Draws go on from there, one a source; else every source begins in this order.
    pub fn go_on(&mut self, begun: &[Begun]) {
        assert_eq!(begun.len(), self.sources.len(), "one a source");
        self.sources.iter_mut().zip(begun).for_each(|(share, begun)| share.begun = *begun);
    }

    /// Where each source stands before `index`: what a later order goes on from.
    pub fn begun_at(&self, index: u64) -> Vec<Begun> {
        let block = self.block_at(index);
        let mut drawn: Vec<u64> = self.sources.iter().map(|share| self.drawn(share, block.number)).collect();
        (block.first..index).for_each(|before| drawn[block.source_at(before)] += 1);
        self.sources.iter().zip(drawn).map(|(share, here)| Begun { drawn: share.begun.drawn + here, ..share.begun }).collect()
    }

    /// Training: samples of one epoch of every source together. Held-out: all there are.
    pub fn num_samples(&self) -> u64 {
        match self.split {
            Split::Train => self.sources.iter().map(|s| s.num_samples).sum(),
            Split::HeldOut => self.blocks_total(self.whole_blocks()),
        }
    }

    /// The sample at `index`. Training never ends; the held-out split does.
    pub fn locate(&self, index: u64) -> Result<Place, DataError> {
        let limit = self.num_samples();
        if self.split == Split::HeldOut && index >= limit {
            return Err(DataError::SampleOutOfRange { index, limit });
        }
        if let [_] = self.sources[..] {
            return Ok(self.nth_of_source(0, index));
        }
        let block = self.block_at(index);
        let source = block.source_at(index);
        let earlier = (block.first..index).filter(|other| block.source_at(*other) == source).count() as u64;
        Ok(self.nth_of_source(source, self.drawn(&self.sources[source], block.number) + earlier))
    }

    fn block_at(&self, index: u64) -> Block {
        let number = self.block_of(index);
        let mut ends = Vec::with_capacity(self.sources.len());
        for share in &self.sources {
            let here = self.drawn(share, number + 1) - self.drawn(share, number);
            ends.push(ends.last().unwrap_or(&0) + here);
        }
        Block { number, first: self.blocks_total(number), ends, key: derive(&[self.seed, self.phase, 1, number]) }
    }

    /// The k-th sample that this order draws from `source`.
    fn nth_of_source(&self, source: usize, k: u64) -> Place {
        if self.split == Split::HeldOut {
            return Place { source: source as u32, epoch: 0, sample: k };
        }
        let Share { num_samples: n, begun, .. } = self.sources[source];
        let (epoch, i) = ((begun.drawn + k) / n, (begun.drawn + k) % n);
        let key = |kind: u64, window: u64| derive(&[self.seed, begun.order, kind, begun.source, epoch, window]);
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

    /// Blocks that draw no source's sample twice.
    fn whole_blocks(&self) -> u64 {
        // The first block count at which round(w·B·blocks) passes n; the block before it is the one that ends too late.
        let over = |share: &Share| {
            let needed = u128::from(ONE) * u128::from(share.num_samples) + u128::from(ONE / 2);
            needed.div_ceil(u128::from(share.weight) * u128::from(self.block)) as u64
        };
        self.sources.iter().map(over).min().expect("there is a source") - 1
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
