//! What a location names: a local folder or file, or an object store's URL (`s3://bucket/prefix`,
//! `gs://bucket/prefix`; `file:///folder` is a local folder).
//!
//! Credentials, region and endpoint come from the environment, under the names that AWS's and
//! Google's own tools use (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT`, `GOOGLE_SERVICE_ACCOUNT`, …), read here
//! and nowhere else. Invariant: repeating a request is `Store`'s work alone.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey as S3};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey as Google};
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
    /// `lacks`: the variables that name credentials, where none of them is set and so the machine is asked for a role's.
    Remote { store: Arc<dyn ObjectStore>, prefix: StorePath, lacks: Option<&'static str> },
}

const S3_VARIABLES: &str = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE, \
    AWS_CONTAINER_CREDENTIALS_RELATIVE_URI, AWS_SKIP_SIGNATURE=true for a public bucket; ~/.aws is not read";
const GOOGLE_VARIABLES: &str =
    "GOOGLE_SERVICE_ACCOUNT, GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SKIP_SIGNATURE=true for a public bucket";

impl Location {
    /// Nothing is asked of the store yet.
    pub fn parse(location: &Path) -> Result<Location, DataError> {
        if !is_url(location) {
            return Ok(Location::Local(location.to_owned()));
        }
        let text = location.to_str().expect("a URL is text");
        let bad = |reason: String| DataError::BadUrl { url: location.to_owned(), reason };
        let url = Url::parse(text).map_err(|e| bad(e.to_string()))?;
        // They end a path, and what is before them may be there too.
        if url.query().is_some() || url.fragment().is_some() {
            return Err(bad("holds a ? or a #, which is no part of a URL's path; written %3F and %23 they are".into()));
        }
        let unknown = || bad(format!("no store is known for {:?}; known are s3://, gs:// and file://", url.scheme()));
        let known = ["s3", "gs", "file"].contains(&url.scheme()) && (url.has_host() || url.scheme() == "file");
        let (scheme, prefix) = ObjectStoreScheme::parse(&url).map_err(|e| if known { bad(e.to_string()) } else { unknown() })?;
        // TLS needs one implementation of its ciphers a process; whoever was first, any will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let retry = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let (store, lacks): (Arc<dyn ObjectStore>, _) = match scheme {
            ObjectStoreScheme::Local => {
                let path = url
                    .to_file_path()
                    .map_err(|()| bad("is not a local path: file:///folder has three strokes".into()))?;
                return Ok(Location::Local(path));
            }
            ObjectStoreScheme::AmazonS3 => {
                let builder = AmazonS3Builder::from_env().with_url(text).with_retry(retry);
                let lacks = lacks_s3(&builder);
                (Arc::new(builder.build().map_err(|e| bad(e.to_string()))?), lacks)
            }
            ObjectStoreScheme::GoogleCloudStorage => {
                let builder = GoogleCloudStorageBuilder::from_env().with_url(text).with_retry(retry);
                let lacks = lacks_google(&builder);
                (Arc::new(builder.build().map_err(|e| bad(e.to_string()))?), lacks)
            }
            _ => return Err(unknown()),
        };
        Ok(Location::Remote { store, prefix, lacks })
    }
}

/// As `AmazonS3Builder::build` chooses: of what goes by pairs, half is nothing.
fn lacks_s3(builder: &AmazonS3Builder) -> Option<&'static str> {
    let has = |keys: &[S3]| keys.iter().all(|key| builder.get_config_value(key).is_some());
    let any = has(&[S3::AccessKeyId])
        || has(&[S3::SecretAccessKey])
        || has(&[S3::WebIdentityTokenFile, S3::RoleArn])
        || has(&[S3::ContainerCredentialsRelativeUri])
        || has(&[S3::ContainerCredentialsFullUri, S3::ContainerAuthorizationTokenFile])
        || builder.get_config_value(&S3::SkipSignature).is_some_and(|skip| skip != "false");
    (!any).then_some(S3_VARIABLES)
}

/// As `GoogleCloudStorageBuilder::build` chooses, which also looks for what `gcloud auth application-default login` leaves.
fn lacks_google(builder: &GoogleCloudStorageBuilder) -> Option<&'static str> {
    let keys = [Google::ServiceAccount, Google::ServiceAccountKey, Google::ApplicationCredentials, Google::BearerToken];
    let left = std::env::home_dir().is_some_and(|home| home.join(".config/gcloud/application_default_credentials.json").exists());
    let any = left
        || keys.iter().any(|key| builder.get_config_value(key).is_some())
        || builder.get_config_value(&Google::SkipSignature).is_some_and(|skip| skip != "false");
    (!any).then_some(GOOGLE_VARIABLES)
}

/// Whether a request that failed was one to the machine, for a role's credentials.
pub(super) fn asked_machine(reason: &str) -> bool {
    ["/latest/api/token", "/latest/meta-data/iam/", "/computeMetadata/"].iter().any(|path| reason.contains(path))
}

/// Whether the answer to it was that there are none; `object_store` tells the status in words alone. Of those that a client
/// brings about, a timeout and too many requests pass.
pub(super) fn denied(reason: &str) -> bool {
    let status = reason.split_once("non-2xx status code: ").and_then(|(_, status)| status.get(..3));
    status.is_some_and(|status| status.starts_with('4') && !["408", "429"].contains(&status))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, String> {
        match Location::parse(Path::new(text)) {
            Ok(Location::Local(path)) => Ok(path.display().to_string()),
            Ok(Location::Remote { store, prefix, .. }) => Ok(format!("{store} {prefix}")),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn paths_stay_paths_and_urls_name_their_store() {
        assert_eq!(parse("corpus/a b"), Ok("corpus/a b".into()));
        assert_eq!(parse("file:///corpus/a"), Ok("/corpus/a".into()));
        assert_eq!(parse("s3://bucket/deep/prefix/"), Ok("AmazonS3(bucket) deep/prefix".into()));
        assert_eq!(parse("gs://bucket/corpus"), Ok("GoogleCloudStorage(bucket) corpus".into()));
        assert_eq!(parse("file:///corpus/a%23b%3Fc"), Ok("/corpus/a#b?c".into()));
        for (url, part) in [
            ("ftp://host/x", "\"ftp\""), ("az://host/x", "\"az\""), ("https://host/x", "s3://"), ("s3://", "s3://"),
            ("s3://bucket/corpus#2", "%23"), ("gs://bucket/corpus?2", "%3F"), ("file:///corpus/a#b", "%23"), ("s3://bucket/a//b", "empty"),
        ] {
            let error = parse(url).unwrap_err();
            assert!(error.starts_with(url) && error.contains(part), "{error}");
        }
    }

    #[test]
    fn credentials_are_lacking_where_none_is_whole() {
        let lacks = |keys: &[(S3, &str)]| {
            let builder = keys.iter().fold(AmazonS3Builder::new(), |builder, (key, value)| builder.with_config(*key, *value));
            lacks_s3(&builder).is_some()
        };
        assert!(lacks(&[]) && lacks(&[(S3::Region, "eu-west-1"), (S3::RoleArn, "arn")]));
        assert!(lacks(&[(S3::ContainerCredentialsFullUri, "http://127.0.0.1/")]) && lacks(&[(S3::SkipSignature, "false")]));
        let some: [&[(S3, &str)]; 5] = [
            &[(S3::AccessKeyId, "a"), (S3::SecretAccessKey, "b")],
            &[(S3::WebIdentityTokenFile, "a"), (S3::RoleArn, "b")],
            &[(S3::ContainerCredentialsRelativeUri, "/a")],
            &[(S3::ContainerCredentialsFullUri, "http://127.0.0.1/"), (S3::ContainerAuthorizationTokenFile, "b")],
            &[(S3::SkipSignature, "true")],
        ];
        assert!(!some.iter().any(|keys| lacks(keys)));
        for key in [Google::ServiceAccount, Google::ServiceAccountKey, Google::ApplicationCredentials, Google::BearerToken] {
            assert_eq!(lacks_google(&GoogleCloudStorageBuilder::new().with_config(key, "a")), None);
        }
    }
}
