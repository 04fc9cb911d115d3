//! Samples by global index: `read` is a pure function of (spec, index), on any rank, in any order.
//!
//! A sample of L+1 tokens is cut out of the token stream of its source, across row groups where it
//! falls so. Row groups come through `cache`, which reads, checks and decodes each once and keeps
//! the recent ones; `prefetch` fills it in the background. Nothing is scanned at start: opening
//! reads a manifest and an index head a source. Invariant: a sample is right or an error, never
//! wrong.

mod cache;
mod files;
mod source;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use crate::format::Split;
use crate::order::{Begun, Order, OrderKey, Place};
use crate::runtime::Background;
use crate::store::Retry;
use crate::{DataError, Store};
use cache::Cache;
pub use files::Listings;
use source::OpenSource;

/// One prepared corpus and its share of the mixture.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Folder that `prepare` wrote, or its URL in an object store.
    pub path: PathBuf,
    /// Relative to the other sources' weights.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// Everything that the order of samples depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct OrderSpec {
    pub sources: Vec<Source>,
    /// L.
    pub sequence_length: usize,
    pub seed: u64,
    /// A phase that changes L or the mixture has a number, and an order, of its own.
    pub phase: u64,
    pub split: Split,
}

/// How to read; none of it changes what is read, but for `extra_tokens`.
#[derive(Clone, Debug)]
pub struct LoaderOptions {
    /// Row groups that `prefetch` reads at once.
    pub prefetch_depth: usize,
    /// Decoded row groups kept, in bytes. A source of a mixture works within about 20 MiB.
    pub cache_bytes: u64,
    pub retry: Retry,
    /// Compare each row group with its XXH3 before it is decoded.
    pub verify: bool,
    /// Tokens of a sample beyond L+1, for targets further ahead.
    pub extra_tokens: usize,
}

impl Default for LoaderOptions {
    fn default() -> LoaderOptions {
        LoaderOptions {
            prefetch_depth: 4,
            cache_bytes: 256 << 20,
            retry: Retry::default(),
            verify: true,
            extra_tokens: 0,
        }
    }
}

/// L+1 consecutive tokens of one source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    pub tokens: Vec<u32>,
    /// Positions in `tokens` where a document begins, ascending. Position 0 is among them only if
    /// one begins there; else the sample starts inside a document.
    pub document_starts: Vec<u32>,
    pub source: u32,
    /// The global index it was asked for by.
    pub index: u64,
}

/// What a run wants to know of a source that it reads.
pub struct SourceFacts<'a> {
    pub path: &'a Path,
    pub weight: f64,
    /// BLAKE3 of its manifest, and so of every token.
    pub manifest: String,
    pub train_tokens: u64,
}

/// See the module head.
pub struct Loader {
    /// Without the sources left out.
    spec: OrderSpec,
    order: Order,
    sources: Vec<Arc<OpenSource>>,
    left_out: Vec<PathBuf>,
    cache: Arc<Cache>,
    runtime: Background,
    options: LoaderOptions,
    fingerprint: OnceLock<String>,
}

/// Samples cut at once by `read`; bounds the row groups in flight.
const READ_AT_ONCE: usize = 4;

impl Loader {
    /// Opens the sources' manifests and checks them against each other and the spec.
    pub fn open(spec: OrderSpec, options: LoaderOptions) -> Result<Loader, DataError> {
        let stores = spec.sources.iter().map(|source| Store::open(&source.path, options.retry));
        let stores = stores.collect::<Result<Vec<_>, _>>()?;
        Loader::open_stores(spec, options, stores)
    }

    /// The same with the stores given, one a source: for tests, whose stores fail on purpose.
    #[doc(hidden)]
    pub fn open_stores(spec: OrderSpec, options: LoaderOptions, stores: Vec<Store>) -> Result<Loader, DataError> {
        if spec.sequence_length == 0 || spec.sequence_length > 1 << 24 {
            return Err(DataError::bad_option("sequence_length", spec.sequence_length, "must lie in 1 to 2^24"));
        }
        let (mut spec, mut left_out) = (spec, Vec::new());
        let runtime = Background::start(2, "tiefsee-data")?;
        let opened = spec.sources.iter().zip(stores).map(|(source, store)| {
            runtime.block_on(OpenSource::open(store, source.path.clone(), spec.split)).map(Arc::new)
        });
        let mut sources = opened.collect::<Result<Vec<_>, _>>()?;
        source::check_alike(&sources)?;
        let (length, extra) = (spec.sequence_length, options.extra_tokens);
        let holds_a_sample = |source: &Arc<OpenSource>| source.num_samples(length, extra).is_ok();
        if spec.split == Split::HeldOut && sources.iter().any(holds_a_sample) {
            let (kept, left): (Vec<_>, Vec<_>) = sources.into_iter().zip(spec.sources).partition(|(source, _)| holds_a_sample(source));
            (sources, spec.sources) = kept.into_iter().unzip();
            left_out = left.into_iter().map(|(_, spec)| spec.path).collect();
        }
        let samples = sources.iter().map(|source| source.num_samples(length, extra));
        let samples = samples.collect::<Result<Vec<_>, _>>()?;
        let shares: Vec<_> = samples.into_iter().zip(spec.sources.iter().map(|source| source.weight)).collect();
        let OrderSpec { sequence_length, seed, phase, split, .. } = spec;
        let order = Order::new(OrderKey { sequence_length, seed, phase, split }, &shares)?;
        let cache = Arc::new(Cache::new(&options));
        Ok(Loader { spec, order, sources, left_out, cache, runtime, options, fingerprint: OnceLock::new() })
    }

    /// Goes on with each source where phases before left it.
    pub fn go_on(mut self, begun: &[Begun]) -> Loader {
        self.order.go_on(begun);
        Loader { fingerprint: OnceLock::new(), ..self }
    }

    /// Where each source stands before `index`.
    pub fn begun_at(&self, index: u64) -> Vec<Begun> {
        self.order.begun_at(index)
    }

    /// Sources of the held-out split that hold not one sample of it, while others do.
    pub fn left_out(&self) -> &[PathBuf] {
        &self.left_out
    }

    /// In the order of `Sample::source`.
    pub fn sources(&self) -> impl Iterator<Item = SourceFacts<'_>> {
        self.sources.iter().zip(&self.spec.sources).map(|(source, spec)| SourceFacts {
            path: &spec.path,
            weight: spec.weight,
            manifest: source.manifest_hash.to_hex().to_string(),
            train_tokens: source.manifest.train.tokens,
        })
    }

    /// Whether it speaks the vocabulary of `other`: one model learns from both.
    pub fn check_alike(&self, other: &Loader) -> Result<(), DataError> {
        source::check_alike(&[&other.sources[..1], &self.sources].concat())
    }

    pub fn vocab_size(&self) -> u32 {
        self.sources[0].manifest.vocab_size
    }

    /// The token that ends a document.
    pub fn end_token(&self) -> u32 {
        self.sources[0].manifest.end_token
    }

    /// Nats per token of the held-out splits under their own unigram distributions, weighed as the mixture weighs those
    /// sources that have one; None if none has.
    pub fn unigram_entropy(&self) -> Option<f64> {
        let with_text = self.sources.iter().zip(&self.spec.sources).filter(|(source, _)| source.manifest.held_out.tokens > 0);
        let weighed = with_text.map(|(source, spec)| (spec.weight, spec.weight * source.manifest.unigram_entropy));
        let (weights, sum) = weighed.fold((0.0, 0.0), |(weights, sum), (weight, part)| (weights + weight, sum + part));
        (weights > 0.0).then(|| sum / weights)
    }

    /// Of the tokenizer.json that all sources share.
    pub fn tokenizer_blake3(&self) -> &str {
        &self.sources[0].manifest.tokenizer_blake3
    }

    /// Of the first source; all share it.
    pub fn tokenizer_path(&self) -> &Path {
        &self.sources[0].tokenizer_path
    }

    /// BLAKE3 over the manifests, the spec and where the sources begin, paths left out: equal on all ranks, whatever their
    /// mount points, if and only if they will read the same samples.
    pub fn fingerprint(&self) -> String {
        self.fingerprint.get_or_init(|| self.compute_fingerprint()).clone()
    }

    /// Training: samples of one epoch of every source together. Held-out: all there are.
    pub fn num_samples(&self) -> u64 {
        self.order.num_samples()
    }

    /// Tokens at the end of each source that no sample has as a target, being fewer than L.
    pub fn unused_tokens(&self) -> Vec<u64> {
        let length = self.spec.sequence_length;
        let unused = |source: &Arc<OpenSource>| source.unused_tokens(length, self.options.extra_tokens);
        self.sources.iter().map(unused).collect()
    }

    /// Where the sample at `index` comes from.
    pub fn locate(&self, index: u64) -> Result<Place, DataError> {
        self.order.locate(index)
    }

    /// Starts reading what `indices` need, in the background. An error met here is not reported:
    /// `read` meets it again.
    pub fn prefetch(&self, indices: &[u64]) {
        let places = indices.iter().filter_map(|index| self.order.locate(*index).ok());
        let wanted = places.map(|place| {
            let source = self.sources[place.source as usize].clone();
            let start = place.sample * self.spec.sequence_length as u64;
            (source, place.source, start)
        });
        let wanted: Vec<_> = wanted.collect();
        let (cache, tokens) = (self.cache.clone(), self.sample_tokens());
        self.runtime.spawn(async move {
            for (source, number, start) in wanted {
                if cache.prefetch(&source, number, start..start + tokens).await.is_err() {
                    return;
                }
            }
        });
    }

    /// Keeps nothing in memory of what was read so far: of an order that is over.
    pub fn forget(&self) {
        self.cache.empty();
    }

    /// The samples at `indices`, in that order.
    pub fn read(&self, indices: &[u64]) -> Result<Vec<Sample>, DataError> {
        let samples = indices.iter().map(|index| self.read_one(*index));
        self.runtime.block_on(futures::stream::iter(samples).buffered(READ_AT_ONCE).try_collect())
    }

    async fn read_one(&self, index: u64) -> Result<Sample, DataError> {
        let place = self.order.locate(index)?;
        let source = &self.sources[place.source as usize];
        let start = place.sample * self.spec.sequence_length as u64;
        let range = start..start + self.sample_tokens();
        let (tokens, document_starts) = self.cache.cut(source, place.source, range).await?;
        Ok(Sample { tokens, document_starts, source: place.source, index })
    }

    fn sample_tokens(&self) -> u64 {
        (self.spec.sequence_length + 1 + self.options.extra_tokens) as u64
    }

    fn compute_fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("tiefsee data fingerprint 1");
        for (source, spec) in self.sources.iter().zip(&self.spec.sources) {
            hasher.update(source.manifest_hash.as_bytes());
            hasher.update(&spec.weight.to_le_bytes());
        }
        let OrderSpec { sequence_length, seed, phase, split, .. } = &self.spec;
        let numbers = [*sequence_length as u64, *seed, *phase, *split as u64, self.options.extra_tokens as u64];
        for number in numbers {
            hasher.update(&number.to_le_bytes());
        }
        // An order that begins every source itself has the fingerprint that it had before sources could go on.
        let first = |place: u64| Begun { order: *phase, source: place, drawn: 0 };
        let begun = self.order.begun_at(0);
        if !begun.iter().zip(0..).all(|(begun, place)| *begun == first(place)) {
            for number in begun.iter().flat_map(|begun| [begun.order, begun.source, begun.drawn]) {
                hasher.update(&number.to_le_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}
