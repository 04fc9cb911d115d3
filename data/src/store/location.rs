//! What a location names: a local folder or file, or an object store's URL (`s3://bucket/prefix`,
//! `gs://bucket/prefix`; `file:///folder` is a local folder).
//!
//! Credentials, region and endpoint come from the environment, under the names that AWS's and
//! Google's own tools use (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT`, `GOOGLE_SERVICE_ACCOUNT`, …), read here
//! and nowhere else. Invariant: repeating a request is `Store`'s work alone.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::aws::AmazonS3Builder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path as StorePath;
use object_store::{ObjectStore, ObjectStoreScheme, RetryConfig};
use reqwest::Url;

use crate::DataError;

/// Whether `location` is a URL: it must then be handed on as it is, not made absolute.
pub fn is_url(location: &Path) -> bool {
    location.to_str().is_some_and(|text| text.contains("://"))
}

pub(crate) enum Location {
    Local(PathBuf),
    Remote { store: Arc<dyn ObjectStore>, prefix: StorePath },
}

impl Location {
    /// Nothing is asked of the store yet.
    pub fn parse(location: &Path) -> Result<Location, DataError> {
        if !is_url(location) {
            return Ok(Location::Local(location.to_owned()));
        }
        let text = location.to_str().expect("a URL is text");
        let bad = |reason: String| DataError::BadUrl { url: location.to_owned(), reason };
        let url = Url::parse(text).map_err(|e| bad(e.to_string()))?;
        let unknown = || bad(format!("no store is known for {:?}; known are s3://, gs:// and file://", url.scheme()));
        let (scheme, prefix) = ObjectStoreScheme::parse(&url).map_err(|_| unknown())?;
        // TLS needs one implementation of its ciphers a process; whoever was first, any will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let store: Arc<dyn ObjectStore> = match scheme {
            ObjectStoreScheme::Local => {
                let path = url
                    .to_file_path()
                    .map_err(|()| bad("is not a local path: file:///folder has three strokes".into()))?;
                return Ok(Location::Local(path));
            }
            ObjectStoreScheme::AmazonS3 => {
                let builder = AmazonS3Builder::from_env().with_url(text).with_retry(retry);
                Arc::new(builder.build().map_err(|e| bad(e.to_string()))?)
            }
            ObjectStoreScheme::GoogleCloudStorage => {
                let builder = GoogleCloudStorageBuilder::from_env().with_url(text).with_retry(retry);
                Arc::new(builder.build().map_err(|e| bad(e.to_string()))?)
            }
            _ => return Err(unknown()),
        };
        Ok(Location::Remote { store, prefix })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, String> {
        match Location::parse(Path::new(text)) {
            Ok(Location::Local(path)) => Ok(path.display().to_string()),
            Ok(Location::Remote { store, prefix }) => Ok(format!("{store} {prefix}")),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn paths_stay_paths_and_urls_name_their_store() {
        assert_eq!(parse("corpus/a b"), Ok("corpus/a b".into()));
        assert_eq!(parse("file:///corpus/a"), Ok("/corpus/a".into()));
        assert_eq!(parse("s3://bucket/deep/prefix/"), Ok("AmazonS3(bucket) deep/prefix".into()));
        assert_eq!(parse("gs://bucket/corpus"), Ok("GoogleCloudStorage(bucket) corpus".into()));
        for (url, part) in
            [("ftp://host/x", "\"ftp\""), ("az://host/x", "\"az\""), ("https://host/x", "s3://"), ("s3://", "s3://")]
        {
            let error = parse(url).unwrap_err();
            assert!(error.starts_with(url) && error.contains(part), "{error}");
        }
    }
}
