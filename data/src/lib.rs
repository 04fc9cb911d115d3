//! Text to tokenised parquet shards, and shards to batches of samples. A leaf: it knows nothing of
//! models or devices.
//!
//!     prepare    documents → shuffled, de-duplicated, tokenised shards with an index and a manifest
//!     format     what lies on disk
//!     order      sample index → (source, epoch, sample): a pure function, nothing read
//!     loader     sample index → tokens: ranged reads, prefetched, checked
//!     store      local folders and object stores: ranged reads with retries
//!     tokenizer  Hugging Face tokenizer.json, encoded fast
//!
//! Invariant: what sample i holds depends on the sources' manifests and the order's spec only: not on
//! the number of ranks, not on what was read before.

mod error;
pub mod format;
pub mod loader;
pub mod order;
pub mod prepare;
mod runtime;
mod store;
mod tokenizer;

pub use error::DataError;
pub use format::Split;
pub use loader::{Listings, Loader, LoaderOptions, OrderSpec, Sample, Source, SourceFacts};
pub use order::Begun;
pub use prepare::{MOST_THREADS, PrepareArgs, PrepareSummary, decode_document, prepare};
pub use store::{PATIENCE, Retry, Store, fetch, is_url};
pub use tokenizer::{FimTokens, Tokenizer, open_tokenizer};
