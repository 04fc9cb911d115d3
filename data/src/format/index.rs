//! The index of one split: where each row group of the token stream lies, in a file that is
//! searched in place, so that 10⁷ row groups open as fast as ten.
//!
//!     header   64 bytes    magic, row groups, shards, tokens, documents
//!     shards   8 each      length of each shard file
//!     fences   40 each     first token and BLAKE3 of each block of 1024 records
//!     records  48 each     first token, offset, bytes, documents, shard, row group, XXH3-128
//!
//! All numbers little-endian. Header, shards and fences are the *head*; its BLAKE3 is in the
//! manifest, and each block's in the head. Invariant: first tokens rise strictly.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::shard::RowGroupInfo;
use crate::DataError;
use crate::store::Store;

const MAGIC: &[u8; 8] = b"tfsidx02";
const HEADER_BYTES: u64 = 64;
const SHARD_BYTES: u64 = 8;
const FENCE_BYTES: u64 = 40;
const RECORD_BYTES: u64 = 48;
const BLOCK_RECORDS: u64 = 1024;
/// Decoded blocks kept: 64 × 48 KiB, enough for every source of a mixture to stay on its own.
const CACHED_BLOCKS: usize = 64;

/// One row group of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub first_token: u64,
    pub shard: u32,
    /// Number of the row group inside its shard.
    pub row_group: u32,
    pub info: RowGroupInfo,
}

/// Writes an index whose numbers of row groups and shards are known beforehand.
pub struct IndexWriter<'a> {
    path: &'a Path,
    file: BufWriter<File>,
    shards: Vec<u8>,
    fences: Vec<u8>,
    block: Vec<u8>,
    num_groups: u64,
    written: u64,
    tokens: u64,
    documents: u64,
}

impl<'a> IndexWriter<'a> {
    pub fn create(path: &'a Path, num_groups: u64, shard_lengths: &[u64]) -> Result<IndexWriter<'a>, DataError> {
        let mut file = BufWriter::new(File::create(path).map_err(DataError::io(path, "create"))?);
        let head = Head::bytes(num_groups, shard_lengths.len() as u64);
        file.seek(SeekFrom::Start(head)).map_err(DataError::io(path, "seek in"))?;
        let shards = shard_lengths.iter().flat_map(|length| length.to_le_bytes()).collect();
        let (fences, block) = (Vec::new(), Vec::new());
        Ok(IndexWriter { path, file, shards, fences, block, num_groups, written: 0, tokens: 0, documents: 0 })
    }

    pub fn push(&mut self, shard: u32, row_group: u32, info: &RowGroupInfo) -> Result<(), DataError> {
        if self.block.is_empty() {
            self.fences.extend_from_slice(&self.tokens.to_le_bytes());
        }
        let narrow = u32::try_from(info.bytes).map_err(|_| {
            DataError::bad_option("--row-group-tokens", info.tokens, "a row group must stay below 4 GiB")
        })?;
        self.block.extend_from_slice(&self.tokens.to_le_bytes());
        self.block.extend_from_slice(&info.offset.to_le_bytes());
        for word in [narrow, info.documents, shard, row_group] {
            self.block.extend_from_slice(&word.to_le_bytes());
        }
        self.block.extend_from_slice(&info.xxh3.to_le_bytes());
        self.tokens += info.tokens;
        self.documents += u64::from(info.documents);
        self.written += 1;
        if self.block.len() as u64 == BLOCK_RECORDS * RECORD_BYTES { self.close_block() } else { Ok(()) }
    }

    /// Returns the hash of the head, for the manifest, and the tokens and documents pushed.
    pub fn finish(mut self) -> Result<([u8; 32], u64, u64), DataError> {
        assert_eq!(self.written, self.num_groups, "an index is written with as many row groups as announced");
        self.close_block()?;
        let mut head = Vec::with_capacity(HEADER_BYTES as usize + self.shards.len() + self.fences.len());
        head.extend_from_slice(MAGIC);
        for number in [self.num_groups, self.shards.len() as u64 / SHARD_BYTES, self.tokens, self.documents] {
            head.extend_from_slice(&number.to_le_bytes());
        }
        head.resize(HEADER_BYTES as usize, 0);
        head.extend_from_slice(&self.shards);
        head.extend_from_slice(&self.fences);
        self.file.seek(SeekFrom::Start(0)).map_err(DataError::io(self.path, "seek in"))?;
        self.file.write_all(&head).map_err(DataError::io(self.path, "write"))?;
        let file = self.file.into_inner().map_err(|e| DataError::io(self.path, "write")(e.into_error()))?;
        file.sync_all().map_err(DataError::io(self.path, "sync"))?;
        Ok((*blake3::hash(&head).as_bytes(), self.tokens, self.documents))
    }

    fn close_block(&mut self) -> Result<(), DataError> {
        if !self.block.is_empty() {
            self.fences.extend_from_slice(blake3::hash(&self.block).as_bytes());
            self.file.write_all(&self.block).map_err(DataError::io(self.path, "write"))?;
            self.block.clear();
        }
        Ok(())
    }
}

/// The head of an index, in memory.
struct Head {
    num_groups: u64,
    tokens: u64,
    documents: u64,
    shard_lengths: Vec<u64>,
    fences: Vec<(u64, [u8; 32])>,
}

impl Head {
    fn bytes(num_groups: u64, num_shards: u64) -> u64 {
        HEADER_BYTES + num_shards * SHARD_BYTES + num_groups.div_ceil(BLOCK_RECORDS) * FENCE_BYTES
    }

    fn parse(bytes: &[u8], num_groups: u64, num_shards: u64) -> Head {
        let (shards, fences) = bytes[HEADER_BYTES as usize..].split_at((num_shards * SHARD_BYTES) as usize);
        let fence = |f: &[u8]| (u64_at(f, 0), f[8..40].try_into().expect("a fence is 40 bytes"));
        Head {
            num_groups,
            tokens: u64_at(bytes, 24),
            documents: u64_at(bytes, 32),
            shard_lengths: shards.chunks_exact(SHARD_BYTES as usize).map(|s| u64_at(s, 0)).collect(),
            fences: fences.chunks_exact(FENCE_BYTES as usize).map(fence).collect(),
        }
    }
}

type Block = Arc<Vec<Record>>;

/// An open index: the head in memory, blocks of records read as they are asked for.
pub struct Index {
    file: String,
    head: Head,
    recent: Mutex<VecDeque<(u64, Block)>>,
}

impl Index {
    /// Reads and checks the head. `root` is its BLAKE3 in hexadecimal, from the manifest.
    pub async fn open(store: &Store, file: String, root: &str) -> Result<Index, DataError> {
        let header = store.read(&file, 0..HEADER_BYTES).await?;
        let corrupt = |reason: &str| DataError::Manifest { path: store.display(&file), reason: reason.into() };
        if &header[..8] != MAGIC {
            return Err(corrupt("does not begin like an index"));
        }
        let (num_groups, num_shards) = (u64_at(&header, 8), u64_at(&header, 16));
        let head_bytes = Head::bytes(num_groups.min(1 << 40), num_shards.min(1 << 40));
        let head = store.read(&file, 0..head_bytes).await?;
        check(&store.display(&file), "its head", &head, root)?;
        let head = Head::parse(&head, num_groups, num_shards);
        Ok(Index { file, head, recent: Mutex::default() })
    }

    pub fn num_groups(&self) -> u64 {
        self.head.num_groups
    }

    pub fn num_tokens(&self) -> u64 {
        self.head.tokens
    }

    pub fn num_documents(&self) -> u64 {
        self.head.documents
    }

    /// Length in bytes that the file of shard `shard` must have.
    pub fn shard_length(&self, shard: u32) -> u64 {
        self.head.shard_lengths[shard as usize]
    }

    pub fn shard_lengths(&self) -> &[u64] {
        &self.head.shard_lengths
    }

    /// Number of the row group that holds token `token` of the stream, with its record.
    pub async fn find(&self, store: &Store, token: u64) -> Result<(u64, Record), DataError> {
        assert!(token < self.head.tokens, "token {token} of a stream of {}", self.head.tokens);
        let block = self.head.fences.partition_point(|(first, _)| *first <= token) as u64 - 1;
        let records = self.block(store, block).await?;
        let place = records.partition_point(|record| record.first_token <= token) - 1;
        Ok((block * BLOCK_RECORDS + place as u64, records[place].clone()))
    }

    /// The record of row group `group`.
    pub async fn record(&self, store: &Store, group: u64) -> Result<Record, DataError> {
        let records = self.block(store, group / BLOCK_RECORDS).await?;
        Ok(records[(group % BLOCK_RECORDS) as usize].clone())
    }

    async fn block(&self, store: &Store, block: u64) -> Result<Block, DataError> {
        {
            let mut recent = self.recent.lock().expect("no holder of this lock panics");
            if let Some(place) = recent.iter().position(|(number, _)| *number == block) {
                let hit = recent.remove(place).expect("the place was just found");
                recent.push_back(hit.clone());
                return Ok(hit.1);
            }
        }
        let head_bytes = Head::bytes(self.head.num_groups, self.head.shard_lengths.len() as u64);
        let first = block * BLOCK_RECORDS;
        let count = BLOCK_RECORDS.min(self.head.num_groups - first);
        let start = head_bytes + first * RECORD_BYTES;
        let bytes = store.read(&self.file, start..start + count * RECORD_BYTES).await?;
        let (_, hash) = &self.head.fences[block as usize];
        let part = format!("block {block}");
        check(&store.display(&self.file), &part, &bytes, &blake3::Hash::from(*hash).to_hex())?;
        let end = self.head.fences.get(block as usize + 1).map_or(self.head.tokens, |(token, _)| *token);
        let records = Arc::new(parse_block(&bytes, end));
        let mut recent = self.recent.lock().expect("no holder of this lock panics");
        if recent.len() == CACHED_BLOCKS {
            recent.pop_front();
        }
        recent.push_back((block, records.clone()));
        Ok(records)
    }
}

/// `end` is the first token after the block.
fn parse_block(bytes: &[u8], end: u64) -> Vec<Record> {
    let mut records: Vec<Record> = Vec::with_capacity(bytes.len() / RECORD_BYTES as usize);
    let mut next = end;
    for raw in bytes.chunks_exact(RECORD_BYTES as usize).rev() {
        let first_token = u64_at(raw, 0);
        let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().expect("four bytes"));
        let info = RowGroupInfo {
            tokens: next - first_token,
            documents: word(20),
            offset: u64_at(raw, 8),
            bytes: u64::from(word(16)),
            xxh3: u128::from_le_bytes(raw[32..48].try_into().expect("sixteen bytes")),
        };
        records.push(Record { first_token, shard: word(24), row_group: word(28), info });
        next = first_token;
    }
    records.reverse();
    records
}

/// Compares the BLAKE3 of `bytes` with `expected`, in hexadecimal.
fn check(path: &Path, part: &str, bytes: &[u8], expected: &str) -> Result<(), DataError> {
    let found = blake3::hash(bytes).to_hex();
    if found.as_str() == expected {
        return Ok(());
    }
    let (found, expected) = (found.to_string(), expected.to_owned());
    Err(DataError::Checksum { path: path.to_owned(), part: part.to_owned(), found, expected })
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
