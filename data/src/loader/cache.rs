//! Checked row groups, the recent ones kept. Each is read once however many ask for it at the
//! same time. Invariant: what is kept stays within the byte limit, or is a single row group.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OnceCell, Semaphore};

use super::LoaderOptions;
use super::source::OpenSource;
use crate::DataError;
use crate::format::index::Record;
use crate::format::shard::RowGroup;

type Key = (u32, u64);
type Cell = Arc<OnceCell<Arc<RowGroup>>>;

pub(crate) struct Cache {
    limit_bytes: u64,
    verify: bool,
    kept: Mutex<Kept>,
    prefetches: Arc<Semaphore>,
    /// Of one row group.
    prefetch_limit: Duration,
}

#[derive(Default)]
struct Kept {
    groups: HashMap<Key, Entry>,
    bytes: u64,
    clock: u64,
}

struct Entry {
    cell: Cell,
    bytes: u64,
    last_used: u64,
}

impl Cache {
    pub fn new(options: &LoaderOptions) -> Cache {
        let LoaderOptions { prefetch_depth, cache_bytes: limit_bytes, verify, retry, .. } = *options;
        let prefetches = Arc::new(Semaphore::new(prefetch_depth.max(1)));
        Cache { limit_bytes, verify, kept: Mutex::default(), prefetches, prefetch_limit: retry.timeout }
    }

    /// The tokens of `range` of the source's stream, and the positions among them where a document
    /// begins.
    pub async fn cut(
        &self, source: &OpenSource, number: u32, range: Range<u64>,
    ) -> Result<(Vec<u32>, Vec<u32>), DataError> {
        let mut tokens = Vec::with_capacity((range.end - range.start) as usize);
        let mut starts = Vec::new();
        let (mut at, mut record) = source.index.find(source.store(), range.start).await?;
        loop {
            let group = self.get(source, (number, at), &record).await?;
            let end = record.first_token + record.info.tokens;
            let from = (range.start.max(record.first_token) - record.first_token) as usize;
            let to = (range.end.min(end) - record.first_token) as usize;
            let base = tokens.len();
            let first = group.starts.partition_point(|start| (*start as usize) < from);
            let inside = group.starts[first..].iter().take_while(|start| (**start as usize) < to);
            starts.extend(inside.map(|start| (*start as usize - from + base) as u32));
            group.copy(from..to, &mut tokens);
            source.check_ids(&tokens[base..], &record)?;
            if range.end <= end {
                return Ok((tokens, starts));
            }
            at += 1;
            record = source.index.record(source.store(), at).await?;
        }
    }

    /// Starts reading the row groups of `range`; waits while too many are under way.
    pub async fn prefetch(
        self: &Arc<Self>, source: &Arc<OpenSource>, number: u32, range: Range<u64>,
    ) -> Result<(), DataError> {
        let (mut at, mut record) = source.index.find(source.store(), range.start).await?;
        loop {
            let end = record.first_token + record.info.tokens;
            if !self.is_kept((number, at)) {
                let permit = self.prefetches.clone().acquire_owned().await.expect("never closed");
                let (cache, source, record) = (self.clone(), source.clone(), record.clone());
                tokio::spawn(async move {
                    // `read` asks again and reports what went wrong. It waits for a prefetch under way: one that is repeated for
                    // as long as patience lasts would cost it that twice.
                    let _ = tokio::time::timeout(cache.prefetch_limit, cache.get(&source, (number, at), &record)).await;
                    drop(permit);
                });
            }
            if range.end <= end {
                return Ok(());
            }
            at += 1;
            record = source.index.record(source.store(), at).await?;
        }
    }

    async fn get(&self, source: &OpenSource, key: Key, record: &Record) -> Result<Arc<RowGroup>, DataError> {
        let cell = self.cell(key, record);
        let group = cell.get_or_try_init(|| async { source.fetch(record, self.verify).await.map(Arc::new) }).await;
        if group.is_err() {
            self.forget(key);
        }
        group.cloned()
    }

    fn is_kept(&self, key: Key) -> bool {
        self.kept.lock().expect("no holder of this lock panics").groups.contains_key(&key)
    }

    fn cell(&self, key: Key, record: &Record) -> Cell {
        let mut kept = self.kept.lock().expect("no holder of this lock panics");
        kept.clock += 1;
        let now = kept.clock;
        if let Some(entry) = kept.groups.get_mut(&key) {
            entry.last_used = now;
            return entry.cell.clone();
        }
        let bytes = record.info.tokens * 4 + u64::from(record.info.documents) * 4;
        while kept.bytes + bytes > self.limit_bytes && !kept.groups.is_empty() {
            kept.drop_oldest();
        }
        let cell = Cell::default();
        kept.groups.insert(key, Entry { cell: cell.clone(), bytes, last_used: now });
        kept.bytes += bytes;
        cell
    }

    /// Keeps nothing of what was read so far.
    pub fn empty(&self) {
        *self.kept.lock().expect("no holder of this lock panics") = Kept::default();
    }

    fn forget(&self, key: Key) {
        self.kept.lock().expect("no holder of this lock panics").remove(key);
    }
}

impl Kept {
    fn drop_oldest(&mut self) {
        let oldest = self.groups.iter().min_by_key(|(_, entry)| entry.last_used).map(|(key, _)| *key);
        self.remove(oldest.expect("called with something kept"));
    }

    fn remove(&mut self, key: Key) {
        if let Some(entry) = self.groups.remove(&key) {
            self.bytes -= entry.bytes;
        }
    }
}
