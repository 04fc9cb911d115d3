//! An S3-compatible server on loopback (`s3s-fs`, over a folder whose folders are buckets), which can be told to
//! fail or to stall.
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use object_store::aws::AmazonS3Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const KEY: (&str, &str) = ("a-key", "a-secret");

/// Of a hundred requests, how many are answered with 503 and how many never.
#[derive(Clone, Copy, Default)]
pub struct Faults {
    pub failing: u64,
    pub stalling: u64,
}

/// Serves until it is dropped.
pub struct Server {
    endpoint: String,
    /// Failed or stalled on purpose.
    hit: Arc<AtomicU64>,
    served: Arc<AtomicU64>,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    /// `signed`: requests must be signed with the right key.
    pub fn start(root: &Path, signed: bool, faults: Faults) -> Server {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).expect("a folder"));
        if signed {
            builder.set_auth(SimpleAuth::from_single(KEY.0, KEY.1));
        }
        let service = builder.build();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let (hit, served): (Arc<AtomicU64>, Arc<AtomicU64>) = Default::default();
        let counters = (hit.clone(), served.clone());
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (service, (hit, served)) = (service.clone(), counters.clone());
                let answer = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                    let number = served.fetch_add(1, Ordering::Relaxed);
                    // A multiplicative hash: evenly spread, the same every time.
                    let lot = (number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % 100;
                    let (fails, stalls) = (lot < faults.failing, lot >= 100 - faults.stalling);
                    hit.fetch_add(u64::from(fails || stalls), Ordering::Relaxed);
                    let service = service.clone();
                    async move {
                        match (fails, stalls) {
                            (false, false) => service.call(request.map(s3s::Body::from)).await,
                            (_, true) => std::future::pending().await,
                            (true, _) => {
                                let mut refused = s3s::HttpResponse::new(s3s::Body::from("slow down".to_string()));
                                *refused.status_mut() = hyper::StatusCode::SERVICE_UNAVAILABLE;
                                Ok(refused)
                            }
                        }
                    }
                });
                tokio::spawn(async move { Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), answer).await.map_err(|_| ()) });
            }
        });
        Server { endpoint, hit, served, _runtime: runtime }
    }

    /// (failed or stalled on purpose, all requests)
    pub fn requests(&self) -> (u64, u64) {
        (self.hit.load(Ordering::Relaxed), self.served.load(Ordering::Relaxed))
    }

    /// What a process needs in its environment to reach the server by `s3://`; `secret` as S3 would have it.
    pub fn s3(&self, command: &mut Command, secret: &str) {
        command.envs([("AWS_ENDPOINT", self.endpoint.as_str()), ("AWS_ALLOW_HTTP", "true")]);
        command.envs([("AWS_ACCESS_KEY_ID", KEY.0), ("AWS_SECRET_ACCESS_KEY", secret)]);
    }

    /// The same by `gs://`: reading, Google's XML interface and S3's are alike.
    pub fn gs(&self, command: &mut Command) {
        command.envs([("GOOGLE_BASE_URL", self.endpoint.as_str()), ("GOOGLE_SKIP_SIGNATURE", "true"), ("GOOGLE_ALLOW_HTTP", "true")]);
    }

    pub fn secret(&self) -> &'static str {
        KEY.1
    }

    /// A client of this process for `bucket`.
    pub fn client(&self, bucket: &str) -> Arc<dyn object_store::ObjectStore> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = AmazonS3Builder::new().with_endpoint(&self.endpoint).with_allow_http(true).with_bucket_name(bucket);
        let retry = object_store::RetryConfig { max_retries: 0, retry_timeout: Duration::from_secs(30), ..Default::default() };
        Arc::new(builder.with_access_key_id(KEY.0).with_secret_access_key(KEY.1).with_retry(retry).build().expect("a client"))
    }
}
