//! Object stores that fail and stall: a right sample after retries, or an error that names the file.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use data::{DataError, Loader, LoaderOptions, Split, Store};
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path as StorePath;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

use crate::corpus::{self, Random, options, spec};

/// A folder whose requests fail or stall in a seeded pattern.
#[derive(Debug)]
struct Faulty {
    inner: LocalFileSystem,
    requests: AtomicU64,
    /// The next so many requests fail.
    outage: AtomicU64,
    /// Of a hundred requests.
    failing: u64,
    stalling: u64,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "faulty")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn get_opts(&self, location: &StorePath, options: GetOptions) -> Result<GetResult> {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        if self.outage.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            return Err(Error::Generic { store: "faulty", source: "connection refused".into() });
        }
        let lot = Random(number).below(100);
        if lot < self.failing {
            return Err(Error::Generic { store: "faulty", source: "503 slow down".into() });
        }
        if lot < self.failing + self.stalling {
            tokio::time::sleep(Duration::from_secs(3600)).await;
        }
        self.inner.get_opts(location, options).await
    }

    async fn put_opts(&self, _: &StorePath, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        unimplemented!("the loader only reads")
    }

    async fn put_multipart_opts(&self, _: &StorePath, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        unimplemented!("the loader only reads")
    }

    fn delete_stream(&self, _: BoxStream<'static, Result<StorePath>>) -> BoxStream<'static, Result<StorePath>> {
        unimplemented!("the loader only reads")
    }

    fn list(&self, _: Option<&StorePath>) -> BoxStream<'static, Result<ObjectMeta>> {
        unimplemented!("the loader does not list")
    }

    async fn list_with_delimiter(&self, _: Option<&StorePath>) -> Result<ListResult> {
        unimplemented!("the loader does not list")
    }

    async fn copy_opts(&self, _: &StorePath, _: &StorePath, _: CopyOptions) -> Result<()> {
        unimplemented!("the loader only reads")
    }
}

fn faulty(path: &Path, failing: u64, stalling: u64) -> Arc<Faulty> {
    let inner = LocalFileSystem::new_with_prefix(path).unwrap();
    Arc::new(Faulty { inner, requests: AtomicU64::new(0), outage: AtomicU64::new(0), failing, stalling })
}

fn open_on(store: &Arc<Faulty>, path: &Path, options: LoaderOptions) -> std::result::Result<Loader, DataError> {
    let store = Store::from_parts(store.clone(), "", PathBuf::from("faulty://corpus"), options.retry);
    Loader::open_stores(spec(&[(path, 1.0)], 48, Split::Train), options, vec![store])
}

fn open(path: &Path, failing: u64, stalling: u64, options: LoaderOptions) -> std::result::Result<Loader, DataError> {
    open_on(&faulty(path, failing, stalling), path, options)
}

/// A cache of about one row group, so that there are many requests.
fn patient() -> LoaderOptions {
    let mut options = options();
    options.retry.patience = Duration::from_secs(60);
    options.retry.timeout = Duration::from_millis(100);
    options.cache_bytes = 6000;
    options
}

#[test]
fn failures_and_stalls_are_ridden_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 1, 60);
    let sound = Loader::open(spec(&[(&path, 1.0)], 48, Split::Train), options()).unwrap();
    let indices: Vec<u64> = (0..sound.num_samples().min(300)).collect();
    let expected = sound.read(&indices).unwrap();
    for (failing, stalling) in [(20, 0), (0, 5), (20, 5)] {
        let loader = open(&path, failing, stalling, patient()).unwrap();
        for (some, right) in indices.chunks(40).zip(expected.chunks(40)) {
            loader.prefetch(some);
            assert_eq!(loader.read(some).unwrap(), right);
        }
    }
}

#[test]
fn a_dead_store_is_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 2, 30);
    for (failing, stalling, reason) in [(100, 0, "503"), (0, 100, "no answer")] {
        let mut options = options();
        (options.retry.patience, options.retry.timeout) = (Duration::from_millis(50), Duration::from_millis(20));
        let error = open(&path, failing, stalling, options).map(|_| ()).unwrap_err();
        let DataError::Store { attempts: 2.., waited, .. } = error else { panic!("{error}") };
        // The last attempt is made when patience ends, and may stall.
        assert!(waited >= Duration::from_millis(50) && waited < Duration::from_secs(5), "{waited:?}");
        let text = error.to_string();
        assert!(text.contains("manifest.json") && text.contains(reason), "{text}");
    }
}

#[test]
fn an_outage_is_waited_for_as_long_as_patience_lasts() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 3, 60);
    let store = faulty(&path, 0, 0);
    // Of the first request, with half a second to a second of pauses; and of one amid the samples.
    store.outage.store(10, Ordering::Relaxed);
    let loader = open_on(&store, &path, patient()).unwrap();
    store.outage.store(10, Ordering::Relaxed);
    loader.read(&[0]).unwrap();
    assert_eq!(store.outage.load(Ordering::Relaxed), 0);
    let impatient = LoaderOptions { retry: options().retry, ..patient() };
    store.outage.store(1_000_000, Ordering::Relaxed);
    assert!(matches!(open_on(&store, &path, impatient).map(|_| ()).unwrap_err(), DataError::Store { .. }));
}

#[test]
fn what_cannot_mend_is_not_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let store = faulty(folder.path(), 0, 0);
    let error = open_on(&store, folder.path(), patient()).map(|_| ()).unwrap_err();
    assert!(matches!(error, DataError::MissingFile { .. }), "{error}");
    assert_eq!(store.requests.load(Ordering::Relaxed), 1);
}

#[test]
fn a_read_does_not_wait_for_the_pauses_of_a_prefetch() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 4, 60);
    let (store, mut options) = (faulty(&path, 0, 0), patient());
    options.retry.first_pause = Duration::from_secs(10);
    let loader = open_on(&store, &path, options).unwrap();
    // The index is read with the first; the farthest from it lies in another row group.
    loader.read(&[0]).unwrap();
    let place = |index: u64| loader.locate(index).unwrap().sample;
    let farthest = (0..loader.num_samples()).max_by_key(|index| place(*index).abs_diff(place(0))).unwrap();
    store.outage.store(1, Ordering::Relaxed);
    loader.prefetch(&[farthest]);
    while store.outage.load(Ordering::Relaxed) > 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let start = Instant::now();
    loader.read(&[farthest]).unwrap();
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

/// A bucket with `text/`, the empty object that some tools mark a folder with, which `object_store` lists as `text`.
#[derive(Debug)]
struct Marked(InMemory);

impl fmt::Display for Marked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "marked")
    }
}

#[async_trait]
impl ObjectStore for Marked {
    fn list(&self, prefix: Option<&StorePath>) -> BoxStream<'static, Result<ObjectMeta>> {
        let marker = ObjectMeta {
            location: prefix.expect("a prefix").clone(),
            last_modified: std::time::SystemTime::UNIX_EPOCH.into(),
            size: 0,
            e_tag: None,
            version: None,
        };
        futures::stream::iter([Ok(marker)]).chain(self.0.list(prefix)).boxed()
    }

    async fn get_opts(&self, location: &StorePath, options: GetOptions) -> Result<GetResult> {
        self.0.get_opts(location, options).await
    }

    async fn put_opts(&self, path: &StorePath, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.0.put_opts(path, payload, options).await
    }

    async fn put_multipart_opts(&self, _: &StorePath, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        unimplemented!("put in one part")
    }

    fn delete_stream(&self, _: BoxStream<'static, Result<StorePath>>) -> BoxStream<'static, Result<StorePath>> {
        unimplemented!("nothing is deleted")
    }

    async fn list_with_delimiter(&self, _: Option<&StorePath>) -> Result<ListResult> {
        unimplemented!("listed at any depth")
    }

    async fn copy_opts(&self, _: &StorePath, _: &StorePath, _: CopyOptions) -> Result<()> {
        unimplemented!("nothing is copied")
    }
}

#[tokio::test]
async fn a_listed_name_is_the_key_itself_and_a_folders_mark_is_no_file() {
    let inner = Arc::new(Marked(InMemory::new()));
    let keys = ["a.txt", "b c.txt", "deep/~odd #1 [x] 100%.txt", "deep/%7Eencoded.txt"];
    for key in keys {
        let path = StorePath::parse(format!("text/{key}")).unwrap();
        inner.put_opts(&path, key.as_bytes().to_vec().into(), PutOptions::default()).await.unwrap();
    }
    let store = Store::from_parts(inner, "text", "s3://bucket/text".into(), options().retry);
    let listed = store.list_versions().await.unwrap();
    let mut names: Vec<&str> = listed.iter().map(|(name, ..)| name.as_str()).collect();
    names.sort_unstable();
    let mut expected = keys;
    expected.sort_unstable();
    assert_eq!(names, expected);
    for (name, bytes, version) in &listed {
        assert_eq!(store.read_all(name).await.unwrap(), name.as_bytes());
        assert_eq!((*bytes, version.is_empty()), (name.len() as u64, false));
    }
    let versions: std::collections::HashSet<_> = listed.iter().map(|(.., version)| version).collect();
    assert_eq!(versions.len(), keys.len(), "each put has a tag of its own");
}
