//! Input files that lie in an object store, for threads that may wait: blocks of a file are asked for as
//! they are read. Invariant: a failure of the store is never taken for the end of a file or for bad input;
//! whoever reads asks `failure` first.

use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, Length};

use crate::{DataError, Retry, Store};

/// A request's size: large enough that its latency hardly counts.
const BLOCK_BYTES: u64 = 8 << 20;

/// A prefix of a store, or one object of it.
pub(super) struct RemoteFolder {
    store: Store,
    runtime: tokio::runtime::Runtime,
}

impl RemoteFolder {
    pub fn open(location: &Path) -> Result<RemoteFolder, DataError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("tiefsee-inputs")
            .enable_all()
            .build();
        Ok(RemoteFolder {
            store: Store::open(location, Retry::default())?,
            runtime: runtime.map_err(DataError::io("tokio", "start"))?,
        })
    }

    /// As `Store::list_versions`.
    pub fn list(&self) -> Result<Vec<(String, u64, String)>, DataError> {
        self.runtime.block_on(self.store.list_versions())
    }
}

/// One file, of which the block last read is kept.
#[derive(Clone)]
pub(super) struct RemoteFile {
    folder: Arc<RemoteFolder>,
    name: Arc<str>,
    length: u64,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// First byte and bytes.
    block: (u64, Bytes),
    failure: Option<DataError>,
}

impl RemoteFile {
    /// `name` and `length` as the folder lists them.
    pub fn new(folder: Arc<RemoteFolder>, name: &str, length: u64) -> RemoteFile {
        RemoteFile { folder, name: name.into(), length, state: Arc::default() }
    }

    pub fn read_all(&self) -> Result<Bytes, DataError> {
        self.folder.runtime.block_on(self.folder.store.read_all(&self.name))
    }

    /// What the store answered last instead of bytes, if it did.
    pub fn failure(&self) -> Option<DataError> {
        self.state.lock().expect("no holder of this lock panics").failure.take()
    }

    /// Up to `most` bytes at `at`, at least one unless the file ends there.
    fn some(&self, at: u64, most: usize) -> io::Result<Bytes> {
        let mut state = self.state.lock().expect("no holder of this lock panics");
        let (start, block) = &state.block;
        if at < *start || at >= *start + block.len() as u64 {
            let range = at.min(self.length)..(at + BLOCK_BYTES).min(self.length);
            if range.is_empty() {
                return Ok(Bytes::new());
            }
            match self.folder.runtime.block_on(self.folder.store.read(&self.name, range)) {
                Ok(bytes) => state.block = (at, bytes),
                Err(error) => {
                    let text = error.to_string();
                    state.failure = Some(error);
                    return Err(io::Error::other(text));
                }
            }
        }
        let (start, block) = &state.block;
        let from = (at - start) as usize;
        Ok(block.slice(from..block.len().min(from + most)))
    }
}

impl Length for RemoteFile {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for RemoteFile {
    type T = RemoteReader;

    fn get_read(&self, start: u64) -> ParquetResult<RemoteReader> {
        Ok(RemoteReader { file: self.clone(), at: start })
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let first = self.some(start, length)?;
        if first.len() == length {
            return Ok(first);
        }
        let mut bytes = Vec::with_capacity(length);
        self.get_read(start)?.take(length as u64).read_to_end(&mut bytes)?;
        match bytes.len() == length {
            true => Ok(bytes.into()),
            false => Err(ParquetError::EOF(format!("{} of {length} bytes at {start}", bytes.len()))),
        }
    }
}

/// Reads a file from `at` on.
pub(super) struct RemoteReader {
    file: RemoteFile,
    at: u64,
}

impl RemoteReader {
    pub fn new(file: RemoteFile) -> RemoteReader {
        RemoteReader { file, at: 0 }
    }
}

impl Read for RemoteReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.file.some(self.at, buffer.len())?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }
}
