//! Where a corpus or an input lies, read by ranges: a local folder or an object store, all through
//! the `object_store` crate.
//!
//! Invariant: a request is repeated, with growing pauses, after a failure or a stall, until it has failed for
//! `Retry::patience`; what is certain not to mend (a missing file, a file of another length, no permission) is
//! not repeated.

mod local;
mod location;

use std::error::Error;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path as StorePath;
use object_store::{GetOptions, GetRange, GetResult, GetResultPayload, ObjectMeta, ObjectStore, ObjectStoreExt};

use crate::DataError;
use crate::runtime::Background;
pub(crate) use location::Location;
pub use location::is_url;

/// How patiently a request is repeated.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// A request is given up once it has failed for so long; the attempt that is under way then is waited for.
    pub patience: Duration,
    /// Pause after the first failure; doubles each time, up to 30 s.
    pub first_pause: Duration,
    /// An attempt that has not been answered by then counts as failed.
    pub timeout: Duration,
}

/// Stores that restart, or slow down whom they will, need minutes. A run's own error, which names the file, should still
/// come before the launcher calls the run hung (`--hang-floor`).
pub const PATIENCE: Duration = Duration::from_secs(240);

impl Default for Retry {
    fn default() -> Retry {
        Retry { patience: PATIENCE, first_pause: Duration::from_millis(100), timeout: Duration::from_secs(30) }
    }
}

const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl Retry {
    /// Of the doubled pause between half and all: who failed together does not come back together.
    fn pause(&self, failures: u32) -> Duration {
        let doubled = self.first_pause.saturating_mul(1 << (failures - 1).min(16)).min(LONGEST_PAUSE);
        // Under keys that the system drew for this process: ranks of other hosts may have its number.
        let lot = RandomState::new().hash_one(failures) as f64 / u64::MAX as f64;
        doubled.mul_f64((1.0 + lot) / 2.0)
    }
}

/// Of one request, in a row.
struct Failures {
    count: u32,
    since: Instant,
}

impl Failures {
    fn none() -> Failures {
        Failures { count: 0, since: Instant::now() }
    }
}

/// A folder of a store.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    prefix: StorePath,
    shown: PathBuf,
    local: bool,
    /// As a location has it.
    lacks: Option<&'static str>,
    retry: Retry,
    buffers: local::Buffers,
}

impl Store {
    /// `location`: a folder, or the URL of one (see `location`). Of an object store nothing is asked yet.
    pub fn open(location: &Path, retry: Retry) -> Result<Store, DataError> {
        let shown = location.to_owned();
        match Location::parse(location)? {
            Location::Remote { store, prefix, lacks } => Ok(Store { lacks, ..Store::new(store, prefix, shown, retry) }),
            Location::Local(path) => {
                let folder = path.canonicalize().map_err(DataError::io(location, "open"))?;
                if !folder.is_dir() {
                    return Err(DataError::BadInput { path: shown, reason: "is no folder: a corpus is the one that holds manifest.json".into() });
                }
                let inner = LocalFileSystem::new_with_prefix(&folder)
                    .map_err(|e| DataError::BadInput { path: shown.clone(), reason: e.to_string() })?;
                Ok(Store { local: true, ..Store::new(Arc::new(inner), StorePath::default(), shown, retry) })
            }
        }
    }

    fn new(inner: Arc<dyn ObjectStore>, prefix: StorePath, shown: PathBuf, retry: Retry) -> Store {
        Store { inner, prefix, shown, local: false, lacks: None, retry, buffers: local::Buffers::default() }
    }

    /// Any store, as `shown` in messages: for tests, whose stores fail on purpose.
    #[doc(hidden)]
    pub fn from_parts(inner: Arc<dyn ObjectStore>, prefix: &str, shown: PathBuf, retry: Retry) -> Store {
        Store::new(inner, StorePath::from(prefix), shown, retry)
    }

    /// A file of this folder, for messages; "" is the location itself.
    pub fn display(&self, file: &str) -> PathBuf {
        if file.is_empty() { self.shown.clone() } else { self.shown.join(file) }
    }

    /// The length of a file in bytes.
    pub async fn size(&self, file: &str) -> Result<u64, DataError> {
        Ok(self.get(file, Some(0..0)).await?.1.size)
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
        let (bytes, meta) = self.get(file, Some(range.clone())).await?;
        if bytes.len() as u64 != wanted {
            return Err(DataError::WrongLength { path: self.display(file), found: meta.size, expected: range.end });
        }
        Ok((bytes, meta.size))
    }

    /// The files below this folder, at any depth, as (name relative to the folder, length in bytes).
    /// If the location is itself an object, that one alone, under the name "".
    pub async fn list(&self) -> Result<Vec<(String, u64)>, DataError> {
        Ok(self.list_versions().await?.into_iter().map(|(name, bytes, _)| (name, bytes)).collect())
    }

    /// As `list`, and what tells a file's versions apart.
    pub async fn list_versions(&self) -> Result<Vec<(String, u64, String)>, DataError> {
        let mut found: Vec<ObjectMeta> = Vec::new();
        let (mut failures, mut most) = (Failures::none(), 0);
        loop {
            match self.list_on(&mut found).await {
                Ok(()) => break,
                Err(Failure::Final(error)) => return Err(error),
                // A failure in a long listing costs a page, not the listing.
                Err(Failure::Passing(reason)) => {
                    if found.len() > most {
                        (failures, most) = (Failures::none(), found.len());
                    }
                    self.pause("", &mut failures, reason).await?;
                }
            }
        }
        let name = |meta: &ObjectMeta| {
            let parts = meta.location.prefix_match(&self.prefix)?;
            Some(parts.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/"))
        };
        // What bears the folder's own name is the empty object that some tools mark a folder with.
        let files = found.iter().filter_map(|meta| Some((name(meta).filter(|name| !name.is_empty())?, meta.size, version(meta))));
        let files: Vec<_> = files.collect();
        if !files.is_empty() {
            return Ok(files);
        }
        let (_, meta) = self.get("", Some(0..0)).await?;
        Ok(vec![(String::new(), meta.size, version(&meta))])
    }

    /// Appends what the store lists after the last of `found`. A local folder, listed in no order, begins anew.
    async fn list_on(&self, found: &mut Vec<ObjectMeta>) -> Result<(), Failure> {
        if self.local {
            found.clear();
        }
        let mut listing = match found.last() {
            Some(last) => self.inner.list_with_offset(Some(&self.prefix), &last.location),
            None => self.inner.list(Some(&self.prefix)),
        };
        loop {
            match tokio::time::timeout(self.retry.timeout, listing.try_next()).await {
                Ok(Ok(Some(meta))) => found.push(meta),
                Ok(Ok(None)) => return Ok(()),
                Ok(Err(error)) => return Err(self.judge("", error)),
                Err(_) => return Err(self.stalled()),
            }
        }
    }

    async fn get(&self, file: &str, range: Option<Range<u64>>) -> Result<(Bytes, ObjectMeta), DataError> {
        let mut failures = Failures::none();
        loop {
            let answer = tokio::time::timeout(self.retry.timeout, self.attempt(file, range.clone())).await;
            match answer.unwrap_or_else(|_| Err(self.stalled())) {
                Ok(answer) => return Ok(answer),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(reason)) => self.pause(file, &mut failures, reason).await?,
            }
        }
    }

    /// Waits before the next attempt, or gives up.
    async fn pause(&self, file: &str, failures: &mut Failures, reason: String) -> Result<(), DataError> {
        failures.count += 1;
        let (path, attempts, waited) = (self.display(file), failures.count, failures.since.elapsed());
        let left = self.retry.patience.saturating_sub(waited);
        if left.is_zero() {
            return Err(DataError::Store { path, attempts, waited, reason });
        }
        // Said at once, and then ever more rarely: ranks are many.
        if attempts.is_power_of_two() {
            tracing::warn!(file = %path.display(), attempts, %reason, "a request fails and is repeated for up to {:.0} s more", left.as_secs_f64());
        }
        // The last attempt is made when the time is up.
        tokio::time::sleep(self.retry.pause(attempts).min(left)).await;
        Ok(())
    }

    async fn attempt(&self, file: &str, range: Option<Range<u64>>) -> Result<(Bytes, ObjectMeta), Failure> {
        // Stores answer no empty range; of one, only the file's length is wanted.
        let head = range.as_ref().is_some_and(Range::is_empty);
        let bounds = range.clone().filter(|_| !head).map(GetRange::Bounded);
        let options = GetOptions { range: bounds, head, ..GetOptions::default() };
        match self.inner.get_opts(&self.path(file), options).await {
            Ok(answer) => {
                let meta = answer.meta.clone();
                let bytes = if head { Ok(Bytes::new()) } else { self.payload(answer).await };
                Ok((bytes.map_err(|e| self.judge(file, e))?, meta))
            }
            Err(error) => Err(self.explain(file, range, error).await),
        }
    }

    async fn payload(&self, answer: GetResult) -> object_store::Result<Bytes> {
        let GetResult { payload: GetResultPayload::File(mut file, path), range, .. } = answer else {
            return answer.bytes().await;
        };
        let buffers = self.buffers.clone();
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let failed = |error| object_store::Error::Generic { store: "local", source: named(error).into() };
        tokio::task::spawn_blocking(move || buffers.read(&mut file, range)).await?.map_err(failed)
    }

    /// A range past the end is answered with an error of no particular kind: look at the length.
    async fn explain(&self, file: &str, range: Option<Range<u64>>, error: object_store::Error) -> Failure {
        let failure = self.judge(file, error);
        if let (Failure::Passing(_), Some(range)) = (&failure, range)
            && let Ok(meta) = self.inner.head(&self.path(file)).await
            && meta.size < range.end
        {
            let path = self.display(file);
            return Failure::Final(DataError::WrongLength { path, found: meta.size, expected: range.end });
        }
        failure
    }

    /// Whether asking again may help.
    fn judge(&self, file: &str, error: object_store::Error) -> Failure {
        use object_store::Error as Kind;
        let path = self.display(file);
        match error {
            Kind::NotFound { .. } => Failure::Final(DataError::MissingFile { path }),
            Kind::PermissionDenied { .. } | Kind::Unauthenticated { .. } | Kind::InvalidPath { .. } => {
                Failure::Final(DataError::Refused { path, reason: error.to_string() })
            }
            error if self.local && forbids(&error) => Failure::Final(DataError::Refused { path, reason: error.to_string() }),
            error => {
                let reason = error.to_string();
                match self.lacks.filter(|_| location::asked_machine(&reason)) {
                    Some(_) if location::denied(&reason) => Failure::Final(DataError::Refused { path, reason: self.lacking(reason) }),
                    Some(_) => Failure::Passing(self.lacking(reason)),
                    None => Failure::Passing(reason),
                }
            }
        }
    }

    /// A container's way to the machine is often one on which no answer comes.
    fn stalled(&self) -> Failure {
        Failure::Passing(self.lacking(format!("no answer within {:?}", self.retry.timeout)))
    }

    /// What may be the matter where the environment has no credentials; a machine with a role needs none there.
    fn lacking(&self, reason: String) -> String {
        match self.lacks {
            Some(variables) => format!("no credentials in the environment ({variables}), so this machine is asked for a role's: {reason}"),
            None => reason,
        }
    }

    fn path(&self, file: &str) -> StorePath {
        // A listed name is the key's own; anything else is encoded into one.
        let name = StorePath::parse(file).unwrap_or_else(|_| StorePath::from(file));
        self.prefix.parts().chain(name.parts()).collect()
    }
}

/// A small file of a location, for callers who may wait; None if there is no such file or folder.
pub fn fetch(location: &Path, file: &str) -> Result<Option<Bytes>, DataError> {
    let runtime = Background::start(1, "tiefsee-fetch")?;
    match runtime.block_on(async { Store::open(location, Retry::default())?.read_all(file).await }) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(DataError::MissingFile { .. }) => Ok(None),
        Err(DataError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn version(meta: &ObjectMeta) -> String {
    meta.e_tag.clone().unwrap_or_else(|| meta.last_modified.to_rfc3339())
}

/// Of a local file system's errors, which `object_store` has no kinds for: a file that may not be read, or lies below another.
fn forbids(error: &(dyn Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |&error| error.source()).filter_map(|error| error.downcast_ref::<io::Error>());
    causes.any(|cause| matches!(cause.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotADirectory))
}

enum Failure {
    Final(DataError),
    Passing(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_no_two_are_alike() {
        let retry = Retry { first_pause: Duration::from_millis(100), ..Retry::default() };
        for (failures, whole) in [(1, 0.1), (2, 0.2), (5, 1.6), (9, 25.6), (10, 30.0), (400, 30.0)] {
            let mut drawn: Vec<f64> = (0..100).map(|_| retry.pause(failures).as_secs_f64()).collect();
            drawn.sort_by(f64::total_cmp);
            drawn.dedup();
            assert!(drawn.len() > 90, "{drawn:?}");
            assert!(drawn[0] >= 0.499 * whole && drawn[0] < 0.6 * whole, "{drawn:?}");
            assert!(drawn[drawn.len() - 1] <= 1.001 * whole && drawn[drawn.len() - 1] > 0.9 * whole, "{drawn:?}");
        }
    }

    #[tokio::test]
    async fn a_local_listing_that_broke_off_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        ["a", "b", "c"].iter().for_each(|name| std::fs::write(folder.path().join(name), name).unwrap());
        let store = Store::open(folder.path(), Retry::default()).unwrap();
        let mut found = vec![store.get("c", Some(0..0)).await.unwrap().1];
        assert!(store.list_on(&mut found).await.is_ok());
        let mut names: Vec<&str> = found.iter().map(|meta| meta.location.as_ref()).collect();
        names.sort_unstable();
        assert_eq!(names, ["a", "b", "c"]);
    }

    #[tokio::test]
    async fn what_a_local_file_system_refuses_is_not_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a"), "no folder").unwrap();
        let retry = Retry { patience: Duration::from_millis(20), first_pause: Duration::from_millis(1), ..Retry::default() };
        let store = Store::open(folder.path(), retry).unwrap();
        let error = store.read_all("a/b").await.unwrap_err();
        assert!(matches!(&error, DataError::Refused { path, .. } if path.ends_with("a/b")), "{error}");
        let of = |kind: io::ErrorKind| object_store::Error::Generic { store: "any", source: Box::new(io::Error::from(kind)) };
        assert!(matches!(store.judge("a", of(io::ErrorKind::PermissionDenied)), Failure::Final(_)));
        assert!(matches!(store.judge("a", of(io::ErrorKind::TimedOut)), Failure::Passing(_)));
    }
}
