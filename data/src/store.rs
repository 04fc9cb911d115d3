//! Where a corpus lies, read by ranges. All reads go through the `object_store` crate, of which only
//! local folders are built in.
//!
//! Invariant: a request is repeated, with growing pauses, after a failure or a stall; what is
//! certain not to mend (a missing file, a file of another length) is not repeated.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use object_store::local::LocalFileSystem;
use object_store::path::Path as StorePath;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt};

use crate::DataError;

/// How often and how patiently a request is repeated.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// Attempts in all, at least one.
    pub attempts: u32,
    /// Pause after the first failure; doubles each time, up to 30 s.
    pub first_pause: Duration,
    /// A request that has not answered by then counts as failed.
    pub timeout: Duration,
}

impl Default for Retry {
    fn default() -> Retry {
        Retry { attempts: 8, first_pause: Duration::from_millis(100), timeout: Duration::from_secs(30) }
    }
}

const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A folder of a store.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    prefix: StorePath,
    shown: PathBuf,
    retry: Retry,
}

impl Store {
    /// `location`: a folder. A URL is an error that says so.
    pub fn open(location: &Path, retry: Retry) -> Result<Store, DataError> {
        let shown = location.to_owned();
        match url_of(location) {
            Some(_) => Err(DataError::NoObjectStore { path: shown }),
            None => {
                let folder = location.canonicalize().map_err(DataError::io(location, "open"))?;
                let inner = LocalFileSystem::new_with_prefix(&folder)
                    .map_err(|e| DataError::BadInput { path: shown.clone(), reason: e.to_string() })?;
                Ok(Store { inner: Arc::new(inner), prefix: StorePath::default(), shown, retry })
            }
        }
    }

    /// Any store, as `shown` in messages: for tests, whose stores fail on purpose.
    #[doc(hidden)]
    pub fn from_parts(inner: Arc<dyn ObjectStore>, prefix: &str, shown: PathBuf, retry: Retry) -> Store {
        Store { inner, prefix: StorePath::from(prefix), shown, retry }
    }

    /// A file of this folder, for messages.
    pub fn display(&self, file: &str) -> PathBuf {
        self.shown.join(file)
    }

    /// A whole, small file.
    pub async fn read_all(&self, file: &str) -> Result<Bytes, DataError> {
        Ok(self.get(file, None).await?.0)
    }

    /// Exactly the bytes of `range`.
    pub async fn read(&self, file: &str, range: Range<u64>) -> Result<Bytes, DataError> {
        Ok(self.read_sized(file, range).await?.0)
    }

    /// The bytes of `range` and the length of the whole file, which costs nothing more to know.
    pub async fn read_sized(&self, file: &str, range: Range<u64>) -> Result<(Bytes, u64), DataError> {
        let wanted = range.end - range.start;
        let (bytes, size) = self.get(file, Some(range.clone())).await?;
        if bytes.len() as u64 != wanted {
            return Err(DataError::WrongLength { path: self.display(file), found: size, expected: range.end });
        }
        Ok((bytes, size))
    }

    async fn get(&self, file: &str, range: Option<Range<u64>>) -> Result<(Bytes, u64), DataError> {
        let mut pause = self.retry.first_pause;
        let mut reason = String::new();
        for attempt in 0..self.retry.attempts.max(1) {
            if attempt > 0 {
                tracing::warn!(file = %self.display(file).display(), attempt, %reason, "repeating a request");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            match tokio::time::timeout(self.retry.timeout, self.attempt(file, range.clone())).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(Failure::Final(error))) => return Err(error),
                Ok(Err(Failure::Passing(error))) => reason = error,
                Err(_) => reason = format!("no answer within {:?}", self.retry.timeout),
            }
        }
        let attempts = self.retry.attempts.max(1);
        Err(DataError::Store { path: self.display(file), attempts, reason })
    }

    async fn attempt(&self, file: &str, range: Option<Range<u64>>) -> Result<(Bytes, u64), Failure> {
        let path = self.prefix.clone().join(file);
        let options = GetOptions { range: range.clone().map(GetRange::Bounded), ..GetOptions::default() };
        match self.inner.get_opts(&path, options).await {
            Ok(answer) => {
                let size = answer.meta.size;
                let bytes = answer.bytes().await.map_err(|e| Failure::Passing(e.to_string()))?;
                Ok((bytes, size))
            }
            Err(object_store::Error::NotFound { .. }) => {
                Err(Failure::Final(DataError::MissingFile { path: self.display(file) }))
            }
            Err(error) => Err(self.explain(file, &path, range, error).await),
        }
    }

    /// A range past the end is answered with an error of no particular kind: look at the length.
    async fn explain(
        &self, file: &str, path: &StorePath, range: Option<Range<u64>>, error: object_store::Error,
    ) -> Failure {
        if let (Some(range), Ok(meta)) = (range, self.inner.head(path).await)
            && meta.size < range.end
        {
            let path = self.display(file);
            return Failure::Final(DataError::WrongLength { path, found: meta.size, expected: range.end });
        }
        Failure::Passing(error.to_string())
    }
}

enum Failure {
    Final(DataError),
    Passing(String),
}

/// The location as text, if it is a URL and not a path.
pub(crate) fn url_of(location: &Path) -> Option<&str> {
    location.to_str().filter(|text| text.contains("://"))
}
