//! `manifest.json`: the small file that makes a folder a corpus. It is renamed into place last, so
//! a folder without it is unfinished.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Split;

pub const MANIFEST_FILE: &str = "manifest.json";
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Changes whenever a reader of the old layout would misread the new one.
pub const FORMAT: &str = "tiefsee-corpus-2";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: String,
    pub vocab_size: u32,
    /// The token that follows each document.
    pub end_token: u32,
    /// BLAKE3 of tokenizer.json.
    pub tokenizer_blake3: String,
    pub train: Stream,
    pub held_out: Stream,
    pub prepare: Recipe,
    /// Nats per token of the held-out split under its own unigram distribution.
    pub unigram_entropy: f64,
}

/// One split's token stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stream {
    pub tokens: u64,
    pub documents: u64,
    pub shards: u64,
    pub row_groups: u64,
    /// BLAKE3 of the index's head, which holds the hashes of the rest.
    pub index_blake3: String,
}

/// How the corpus was made, for people; the loader does not read it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    pub seed: u64,
    pub held_out: f64,
    pub fim_rate: f64,
    pub split_rate: f64,
    pub files: u64,
    pub skipped_files: u64,
    pub text_bytes: u64,
    pub duplicates: u64,
    /// Without text, or of which a lossy tokenizer left nothing.
    #[serde(default)]
    pub empty_documents: u64,
    /// Of JSONL's lines and parquet's rows, those that gave no text.
    #[serde(default)]
    pub bad_lines: u64,
    /// Files that were not read, by reason.
    #[serde(default)]
    pub left_out: BTreeMap<String, LeftOut>,
}

/// Files that were left out for one reason.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeftOut {
    pub files: u64,
    pub bytes: u64,
    /// Below the input it was found under.
    pub largest: String,
    pub largest_bytes: u64,
}

impl Manifest {
    pub fn stream(&self, split: Split) -> &Stream {
        match split {
            Split::Train => &self.train,
            Split::HeldOut => &self.held_out,
        }
    }
}
