//! One opened source: its manifest and index, and row groups read from it. Invariant: what
//! `fetch` returns has the length, the checksum and the counts that the index and the manifest promise.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::format::Split;
use crate::format::index::{Index, Record};
use crate::format::manifest::{FORMAT, MANIFEST_FILE, Manifest, TOKENIZER_FILE};
use crate::format::shard::{RowGroup, decode_row_group};
use crate::{DataError, Store};
use twox_hash::XxHash3_128;

pub(crate) struct OpenSource {
    store: Store,
    path: PathBuf,
    split: Split,
    pub manifest: Manifest,
    pub manifest_hash: blake3::Hash,
    pub tokenizer_path: PathBuf,
    pub index: Index,
}

impl OpenSource {
    pub async fn open(store: Store, path: PathBuf, split: Split) -> Result<OpenSource, DataError> {
        let bytes = store.read_all(MANIFEST_FILE).await?;
        let bad = |reason: String| DataError::Manifest { path: path.join(MANIFEST_FILE), reason };
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        if !(1..=1 << 31).contains(&manifest.vocab_size) {
            return Err(bad(format!("vocab_size {}: must lie in 1 to 2^31", manifest.vocab_size)));
        }
        if manifest.format != FORMAT {
            return Err(bad(format!("format {:?} where this build reads {FORMAT:?}", manifest.format)));
        }
        let stream = manifest.stream(split);
        let index = Index::open(&store, split.index_file(), &stream.index_blake3).await?;
        if (index.num_tokens(), index.num_groups()) != (stream.tokens, stream.row_groups) {
            let (tokens, groups) = (index.num_tokens(), index.num_groups());
            return Err(bad(format!(
                "{} tokens in {} row groups where the index has {tokens} in {groups}",
                stream.tokens, stream.row_groups
            )));
        }
        let tokenizer_path = path.join(TOKENIZER_FILE);
        let manifest_hash = blake3::hash(&bytes);
        Ok(OpenSource { store, path, split, manifest, manifest_hash, tokenizer_path, index })
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Samples of L+1+extra tokens at a distance of L.
    pub fn num_samples(&self, length: usize, extra: usize) -> Result<u64, DataError> {
        let (tokens, needed) = (self.index.num_tokens(), (length + 1 + extra) as u64);
        match tokens.checked_sub(needed) {
            Some(rest) => Ok(rest / length as u64 + 1),
            None => {
                let (path, split) = (self.path.clone(), self.split.name());
                Err(DataError::TooFewTokens { path, split, tokens, needed })
            }
        }
    }

    /// Tokens after the last sample's own; the stream's first token is nobody's target.
    pub fn unused_tokens(&self, length: usize, extra: usize) -> u64 {
        let samples = self.num_samples(length, extra).unwrap_or(0);
        self.index.num_tokens().saturating_sub(samples * length as u64 + 1)
    }

    /// Reads, checks and decodes one row group.
    pub async fn fetch(&self, record: &Record, verify: bool) -> Result<RowGroup, DataError> {
        let file = self.split.shard_file(record.shard);
        let path = self.store.display(&file);
        let part = format!("row group {}", record.row_group);
        let info = &record.info;
        let (bytes, size) = self.store.read_sized(&file, info.offset..info.offset + info.bytes).await?;
        let expected = self.index.shard_length(record.shard);
        if size != expected {
            return Err(DataError::WrongLength { path, found: size, expected });
        }
        if verify {
            let found = XxHash3_128::oneshot(&bytes);
            if found != info.xxh3 {
                let (found, expected) = (format!("{found:032x}"), format!("{:032x}", info.xxh3));
                return Err(DataError::Checksum { path, part, found, expected });
            }
        }
        decode_row_group(bytes, info, &path, &part)
    }

    /// Whether the vocabulary has all `tokens`, which come from the row group of `record`. Asked of a sample just
    /// copied, which the cache still holds, rather than of a row group.
    pub fn check_ids(&self, tokens: &[u32], record: &Record) -> Result<(), DataError> {
        // The top bit of `last - id` is set if id > last, and of id itself if the difference wrapped: two operations
        // that every x86-64 does on four tokens at once, where it has no maximum of unsigned numbers.
        let (vocab_size, last) = (self.manifest.vocab_size, self.manifest.vocab_size.wrapping_sub(1));
        if tokens.iter().fold(0, |bits, id| bits | id | last.wrapping_sub(*id)) >> 31 == 0 {
            return Ok(());
        }
        let id = tokens.iter().copied().max().unwrap_or(0);
        let path = self.store.display(&self.split.shard_file(record.shard));
        Err(DataError::TokenOutOfRange { path, part: format!("row group {}", record.row_group), id, vocab_size })
    }
}

/// Sources of one run must speak one vocabulary, and end documents alike.
pub(crate) fn check_alike(sources: &[Arc<OpenSource>]) -> Result<(), DataError> {
    let Some(first) = sources.first() else {
        return Err(DataError::bad_option("sources", "[]", "a run needs at least one source"));
    };
    type Of = fn(&Manifest) -> String;
    let shared: [(&str, Of); 2] = [
        ("tokenizer", |manifest| manifest.tokenizer_blake3.clone()),
        ("end token", |manifest| manifest.end_token.to_string()),
    ];
    for source in sources {
        for (what, of) in shared {
            let [(path, found), (first, expected)] = [source, first].map(|it| (it.path.clone(), of(&it.manifest)));
            if found != expected {
                return Err(DataError::SourcesDiffer { what, path, found, first, expected });
            }
        }
    }
    Ok(())
}
