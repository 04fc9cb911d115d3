//! Input files that lie in an object store, for threads that may wait: blocks of a file are asked for as
//! they are read. Invariants: a failure of the store is never taken for the end of a file or for bad input; whoever
//! reads asks `failure` first. A list of files holds no bytes of them, or a long one would in the end hold all it lists.

use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, Length};

use crate::runtime::Background;
use crate::{DataError, Retry, Store};

/// A request's size: large enough that its latency hardly counts.
const BLOCK_BYTES: u64 = 8 << 20;

/// A prefix of a store, or one object of it.
pub(super) struct RemoteFolder {
    store: Store,
    runtime: Background,
}

impl RemoteFolder {
    pub fn open(location: &Path) -> Result<RemoteFolder, DataError> {
        Ok(RemoteFolder { store: Store::open(location, Retry::default())?, runtime: Background::start(1, "tiefsee-inputs")? })
    }

    /// As `Store::list_versions`.
    pub fn list(&self) -> Result<Vec<(String, u64, String)>, DataError> {
        self.runtime.block_on(self.store.list_versions())
    }
}

/// One file, as its folder lists it.
#[derive(Clone)]
pub(super) struct RemoteFile {
    folder: Arc<RemoteFolder>,
    name: Arc<str>,
    length: u64,
}

impl RemoteFile {
    /// `name` and `length` as the folder lists them.
    pub fn new(folder: Arc<RemoteFolder>, name: &str, length: u64) -> RemoteFile {
        RemoteFile { folder, name: name.into(), length }
    }

    /// Nothing is asked of the store yet.
    pub fn open(&self) -> OpenFile {
        OpenFile { file: self.clone(), state: Arc::default() }
    }
}

/// A file while it is read: the block last read is kept as long as any clone of this.
#[derive(Clone)]
pub(super) struct OpenFile {
    file: RemoteFile,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// First byte and bytes.
    block: (u64, Bytes),
    failure: Option<DataError>,
}

impl OpenFile {
    /// What the store answered last instead of bytes, if it did.
    pub fn failure(&self) -> Option<DataError> {
        self.state.lock().expect("no holder of this lock panics").failure.take()
    }

    /// Up to `most` bytes at `at`, at least one unless the file ends there.
    fn some(&self, at: u64, most: usize) -> io::Result<Bytes> {
        let RemoteFile { folder, name, length } = &self.file;
        let mut state = self.state.lock().expect("no holder of this lock panics");
        let (start, block) = &state.block;
        if at < *start || at >= *start + block.len() as u64 {
            let range = at.min(*length)..(at + BLOCK_BYTES).min(*length);
            if range.is_empty() {
                return Ok(Bytes::new());
            }
            match folder.runtime.block_on(folder.store.read(name, range)) {
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

impl Length for OpenFile {
    fn len(&self) -> u64 {
        self.file.length
    }
}

impl ChunkReader for OpenFile {
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
    file: OpenFile,
    at: u64,
}

impl RemoteReader {
    pub fn new(file: OpenFile) -> RemoteReader {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use object_store::memory::InMemory;
    use object_store::path::Path as StorePath;
    use object_store::throttle::{ThrottleConfig, ThrottledStore};
    use object_store::{ObjectStore, ObjectStoreExt};

    use super::*;
    use crate::prepare::documents;
    use crate::prepare::inputs::{InputFile, Kind, Packing};

    /// A file's bytes; how many hold them is counted.
    struct Counted(Arc<Vec<u8>>);

    impl AsRef<[u8]> for Counted {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    fn folder(inner: Arc<dyn ObjectStore>, retry: Retry) -> Arc<RemoteFolder> {
        let runtime = Background::start(1, "inputs").unwrap();
        let store = Store::from_parts(inner, "", "s3://bucket".into(), retry);
        Arc::new(RemoteFolder { store, runtime })
    }

    fn file(folder: &Arc<RemoteFolder>, name: &str, bytes: u64, kind: Kind) -> InputFile {
        let remote = Some(RemoteFile::new(folder.clone(), name, bytes));
        InputFile { path: format!("s3://bucket/{name}").into(), remote, name: name.into(), bytes, version: String::new(), kind, limit: None }
    }

    #[test]
    fn a_list_holds_nothing_of_a_file_that_is_read() {
        let inner: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let folder = folder(inner.clone(), Retry::default());
        let content = Arc::new(b"{\"text\": \"one\"}\n{\"text\": \"two\"}\n".to_vec());
        let (bytes, key) = (content.len() as u64, StorePath::from("a.jsonl"));
        folder.runtime.block_on(inner.put(&key, Bytes::from_owner(Counted(content.clone())).into())).unwrap();
        let file = file(&folder, "a.jsonl", bytes, Kind::Jsonl(Packing::Plain));
        let mut texts = Vec::new();
        let mut each = |_: u64, text: &str| {
            texts.push(text.to_owned());
            Ok(())
        };
        documents::read(&file, "text", &mut each).unwrap();
        assert_eq!(texts, ["one", "two"]);
        assert_eq!(Arc::strong_count(&content), 2, "the store has it");
        folder.runtime.block_on(inner.delete(&key)).unwrap();
        assert_eq!(Arc::strong_count(&content), 1, "nobody else");
    }

    /// A block takes half a second, the whole file two.
    #[test]
    fn a_text_whose_whole_takes_longer_than_a_request_may_is_read() {
        let slow = ThrottleConfig { wait_get_per_byte: Duration::from_nanos(60), ..ThrottleConfig::default() };
        let (inner, text) = (ThrottledStore::new(InMemory::new(), slow), "漢字かな".repeat(39 << 16) + "end");
        let retry = Retry { patience: Duration::from_secs(20), first_pause: Duration::from_millis(1), timeout: Duration::from_secs(1) };
        let (inner, key): (Arc<dyn ObjectStore>, _) = (Arc::new(inner), StorePath::from("a.txt"));
        let folder = folder(inner.clone(), retry);
        folder.runtime.block_on(inner.put(&key, text.clone().into())).unwrap();
        let mut whole = false;
        let mut each = |_: u64, read: &str| {
            whole = read == text;
            Ok(())
        };
        documents::read(&file(&folder, "a.txt", text.len() as u64, Kind::Text), "text", &mut each).unwrap();
        assert!(whole);
    }
}
