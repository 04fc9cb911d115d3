//! Object stores that fail and stall: a right sample after retries, or an error that names the file.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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

fn open(path: &Path, failing: u64, stalling: u64, options: LoaderOptions) -> std::result::Result<Loader, DataError> {
    let inner = LocalFileSystem::new_with_prefix(path).unwrap();
    let store = Arc::new(Faulty { inner, requests: AtomicU64::new(0), failing, stalling });
    let store = Store::from_parts(store, "", PathBuf::from("faulty://corpus"), options.retry);
    Loader::open_stores(spec(&[(path, 1.0)], 48, Split::Train), options, vec![store])
}

/// A cache of about one row group, so that there are many requests.
fn patient() -> LoaderOptions {
    let mut options = options();
    options.retry.attempts = 12;
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
        options.retry.timeout = Duration::from_millis(20);
        let error = open(&path, failing, stalling, options).map(|_| ()).unwrap_err();
        assert!(matches!(error, DataError::Store { attempts: 2, .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("manifest.json") && text.contains(reason), "{text}");
    }
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
