//! Second stage: one unit of documents to one shard. Units are independent: a shard and its
//! statistics are written whole, and a restart repeats only units without statistics.

use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::durable;
use super::spill::{Unit, Units};
use super::transform::Transform;
use crate::format::index::IndexWriter;
use crate::format::manifest::Stream;
use crate::format::shard::{RowGroupInfo, ShardWriter};
use crate::{DataError, Split};

/// Documents encoded side by side before they are written: bounds the tokens held.
const BATCH: usize = 4096;

/// One shard to make.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub split: Split,
    pub shard: u32,
    pub unit: u32,
    pub part: Part,
}

/// Which documents of the unit. `First` and `ButFirst` serve a corpus so small that all keys fell to one side of the
/// held-out threshold: the first document goes to the other split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    All,
    First,
    ButFirst,
}

impl Part {
    /// Out of a unit of so many documents.
    pub fn of(self, documents: usize) -> Range<usize> {
        match self {
            Part::All => 0..documents,
            Part::First => 0..1,
            Part::ButFirst => 1..documents,
        }
    }
}

/// What a finished shard reports.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct ShardDone {
    pub file_bytes: u64,
    pub documents: u64,
    /// Those of which a lossy tokenizer left nothing.
    #[serde(default)]
    pub empty: u64,
    pub duplicates: u64,
    pub tokens: u64,
    /// Every document's ids gave it back.
    #[serde(default)]
    strict: bool,
    #[serde(skip)]
    num_groups: u64,
    /// In the statistics file only: of all shards they would not fit memory.
    row_groups: Vec<StoredGroup>,
    /// (id, how often), ascending; only of held-out shards.
    pub counts: Vec<(u32, u64)>,
}

/// `RowGroupInfo` in the statistics file.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct StoredGroup(u64, u32, u64, u64, String);

/// Where and how shards are written.
pub(super) struct Encoder<'a> {
    pub transform: Transform<'a>,
    pub parts: &'a [PathBuf],
    /// Finished shards.
    pub out: &'a Path,
    /// Statistics of finished shards.
    pub done: &'a Path,
    pub row_group_tokens: u64,
}

impl Encoder<'_> {
    /// Makes one shard, unless an earlier run has.
    pub fn run(&self, job: Job) -> Result<ShardDone, DataError> {
        let mut done = self.read_or_make(job)?;
        done.num_groups = done.row_groups.len() as u64;
        done.row_groups = Vec::new();
        Ok(done)
    }

    fn read_or_make(&self, job: Job) -> Result<ShardDone, DataError> {
        let done_file = self.done_file(job.split, job.shard);
        let strict = self.transform.strict;
        // Of an earlier run, but not one that did not look.
        if let Some(done) = durable::read_json::<ShardDone>(&done_file)?.filter(|done| done.strict || !strict) {
            return Ok(done);
        }
        let unit = Unit::load(self.parts, job.unit)?;
        let documents = job.part.of(unit.len());
        let duplicates = if job.part == Part::First { 0 } else { unit.duplicates };
        let mut done = ShardDone { duplicates, strict, ..ShardDone::default() };
        if !documents.is_empty() {
            self.write_shard(job, &unit, documents, &mut done)?;
        }
        durable::write_json(&done_file, &done)?;
        Ok(done)
    }

    fn write_shard(
        &self, job: Job, unit: &Unit, documents: Range<usize>, done: &mut ShardDone,
    ) -> Result<(), DataError> {
        let path = self.out.join(job.split.shard_file(job.shard));
        let mut counts: Vec<u64> = Vec::new();
        durable::write(&path, |file| {
            let failed = |e: parquet::errors::ParquetError| DataError::io(&path, "write")(std::io::Error::other(e));
            let mut writer = ShardWriter::new(file, self.row_group_tokens).map_err(failed)?;
            for start in documents.clone().step_by(BATCH) {
                let batch = start..(start + BATCH).min(documents.end);
                let encoded = batch.into_par_iter().map(|i| {
                    let (key, text) = unit.document(i);
                    self.transform.encode(key, text)
                });
                for document in encoded.collect::<Result<Vec<_>, _>>()? {
                    let Some(document) = document else {
                        done.empty += 1;
                        continue;
                    };
                    done.documents += 1;
                    if job.split == Split::HeldOut {
                        count(&document, &mut counts);
                    }
                    writer.push(document).map_err(failed)?;
                }
            }
            let (file, groups, bytes) = writer.finish().map_err(failed)?;
            file.flush().map_err(DataError::io(&path, "write"))?;
            done.tokens = groups.iter().map(|group| group.tokens).sum();
            done.row_groups = groups.iter().map(StoredGroup::new).collect();
            done.file_bytes = bytes;
            Ok(())
        })?;
        done.counts = (0..).zip(counts).filter(|(_, count)| *count > 0).collect();
        Ok(())
    }

    fn done_file(&self, split: Split, shard: u32) -> PathBuf {
        self.done.join(format!("{}-{shard:05}.json", split.name()))
    }

    /// Writes the index of a split out of its shards' statistics.
    pub fn write_index(&self, split: Split, shards: &[ShardDone]) -> Result<Stream, DataError> {
        let path = self.out.join(split.index_file());
        let aside = path.with_added_extension("tmp");
        let lengths: Vec<u64> = shards.iter().map(|shard| shard.file_bytes).collect();
        let num_groups = shards.iter().map(|shard| shard.num_groups).sum();
        let mut writer = IndexWriter::create(&aside, num_groups, &lengths)?;
        for number in 0..shards.len() as u32 {
            let done: Option<ShardDone> = durable::read_json(&self.done_file(split, number))?;
            let done = done.expect("a shard that is made has its statistics");
            for (row_group, stored) in (0..).zip(&done.row_groups) {
                writer.push(number, row_group, &stored.info(&path)?)?;
            }
        }
        let (root, tokens, documents) = writer.finish()?;
        durable::rename(&aside, &path)?;
        let index_blake3 = blake3::Hash::from(root).to_hex().to_string();
        Ok(Stream { tokens, documents, shards: shards.len() as u64, row_groups: num_groups, index_blake3 })
    }
}

impl StoredGroup {
    fn new(info: &RowGroupInfo) -> StoredGroup {
        StoredGroup(info.tokens, info.documents, info.offset, info.bytes, format!("{:032x}", info.xxh3))
    }

    fn info(&self, path: &Path) -> Result<RowGroupInfo, DataError> {
        let StoredGroup(tokens, documents, offset, bytes, xxh3) = self;
        let bad = |e: std::num::ParseIntError| DataError::Manifest { path: path.to_owned(), reason: e.to_string() };
        let xxh3 = u128::from_str_radix(xxh3, 16).map_err(bad)?;
        Ok(RowGroupInfo { tokens: *tokens, documents: *documents, offset: *offset, bytes: *bytes, xxh3 })
    }
}

fn count(document: &[u8], counts: &mut Vec<u64>) {
    for word in document.as_chunks::<4>().0 {
        let id = u32::from_le_bytes(*word) as usize;
        if id >= counts.len() {
            counts.resize(id + 1, 0);
        }
        counts[id] += 1;
    }
}

/// The shards that a partition needs: one a unit, and one more where the first document of `lender` has to serve the
/// other split.
pub(super) fn jobs(units: Units, lender: Option<u32>) -> Vec<Job> {
    let of_unit = |unit: u32| {
        let (split, shard) = units.place(unit);
        let part = if Some(unit) == lender { Part::ButFirst } else { Part::All };
        Job { split, shard, unit, part }
    };
    let lent = |unit| {
        let (split, shard) = match units.place(unit).0 {
            Split::Train => (Split::HeldOut, units.held_out),
            Split::HeldOut => (Split::Train, units.train),
        };
        Job { split, shard, unit, part: Part::First }
    };
    (0..units.count()).map(of_unit).chain(lender.map(lent)).collect()
}
