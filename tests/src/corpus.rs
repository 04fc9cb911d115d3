//! A corpus in an object store: trained on and prepared from as if it were local, through failures and stalls.
use crate::s3::{Faults, Server};
use crate::support::{Run, corpus, root, scratch, tiefsee};
use data::{Loader, LoaderOptions, OrderSpec, Source, Split, Store};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

/// A folder for `name` whose bucket `bucket` holds the shared corpus under `corpus/`.
fn bucket_with_corpus(name: &str) -> PathBuf {
    let folder = scratch().join(name);
    copy_folder(corpus(), &folder.join("bucket/corpus"));
    folder
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
    }
}

fn finish(mut command: Command, expected: i32) -> Output {
    let output = command.output().expect("tiefsee starts");
    assert_eq!(output.status.code(), Some(expected), "{}", text(&output));
    output
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_bucket_serves_a_whole_run() {
    let local = Run::new("store-local", &[]);
    finish(tiefsee(&local.train_args()), 0);
    for (name, faults) in [("sound", Faults::default()), ("failing", Faults { failing: 20, stalling: 0 })] {
        let server = Server::start(&bucket_with_corpus(&format!("store-{name}")), true, faults);
        let run = Run::new(&format!("store-{name}"), &["data.mixture.0.path=s3://bucket/corpus"]);
        let start = |args: &[String], expected| {
            let mut command = tiefsee(args);
            // Not where the run's URL would be a folder's relative name.
            command.current_dir(scratch());
            server.s3(&mut command, server.secret());
            finish(command, expected)
        };
        // Stopped before the phase edge, and resumed from the run directory alone.
        let mut first = run.train_args();
        first.extend(["--set".into(), "run.stop_after=12".into()]);
        start(&first, 75);
        start(&["resume".into(), run.dir().display().to_string()], 0);
        assert_eq!(run.series("loss"), local.series("loss"), "{name}");
        assert_eq!(run.samples(), local.samples());
        let (hit, served) = server.requests();
        println!("{name}: {served} requests, {hit} of them failed");
        assert!(served > 20 && (hit > served / 10) == (faults.failing > 0), "{hit} of {served} requests failed");
    }
}

#[test]
fn a_store_that_refuses_or_does_not_hold_the_corpus_says_so() {
    let server = Server::start(&bucket_with_corpus("store-refusing"), true, Faults::default());
    for (url, secret, parts) in [
        ("s3://bucket/corpus", "another-secret", ["s3://bucket/corpus/manifest.json", "refuses"]),
        ("s3://bucket/elsewhere", server.secret(), ["s3://bucket/elsewhere/manifest.json", "missing"]),
        ("ftp://bucket/corpus", server.secret(), ["ftp://bucket/corpus", "s3://, gs:// and file://"]),
    ] {
        let run = Run::new("store-refused", &[&format!("data.mixture.0.path={url}")]);
        let mut command = tiefsee(&run.train_args());
        server.s3(&mut command, secret);
        let said = text(&finish(command, 1));
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
        assert!(!run.dir().exists(), "nothing is written before the corpus is open");
    }
}

/// Every kind of input in one folder.
fn write_inputs(folder: &Path) {
    let mut texts = Vec::new();
    for name in ["loader/mod.rs", "prepare/mod.rs", "order/mod.rs", "store/mod.rs", "prepare/bpe.rs", "format/index.rs"] {
        texts.push(fs::read_to_string(root().join("data/src").join(name)).expect("a source"));
    }
    let line = |(i, text): (usize, &str)| format!("{}\n", serde_json::json!({"text": format!("{i}: {text}\n")}));
    let lines: String = texts.iter().flat_map(|text| text.lines()).enumerate().map(line).collect();
    fs::create_dir_all(folder.join("deep/er")).expect("a folder");
    for (name, text) in ["a.txt", "deep/b with space.md", "deep/er/c.rs", "deep/~odd #1 [x] 100%.txt"].iter().zip(&texts) {
        fs::write(folder.join(name), text).expect("written");
    }
    fs::write(folder.join("d.jsonl"), &lines).expect("written");
    let mut packed = flate2::write::GzEncoder::new(fs::File::create(folder.join("deep/e.jsonl.gz")).expect("a file"), flate2::Compression::fast());
    packed.write_all(lines.replace("let", "LET").as_bytes()).expect("written");
    packed.finish().expect("written");
    fs::write(folder.join("f.parquet"), parquet_of(&lines.lines().map(|line| line.replace("self", "SELF")).collect::<Vec<_>>())).expect("written");
    fs::write(folder.join("picture.png"), "no text").expect("written");
}

/// Large enough for several row groups, with a column besides.
fn parquet_of(texts: &[String]) -> Vec<u8> {
    use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
    use parquet::arrow::ArrowWriter;
    use parquet::file::properties::WriterProperties;
    let numbers: ArrayRef = std::sync::Arc::new(Int64Array::from_iter_values(0..texts.len() as i64));
    let column: ArrayRef = std::sync::Arc::new(StringArray::from_iter_values(texts));
    let batch = RecordBatch::try_from_iter([("dump", numbers), ("text", column)]).expect("two columns");
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(500)).build();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).expect("a writer");
    writer.write(&batch).expect("written");
    writer.into_inner().expect("written")
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry"));
    entries.map(|entry| (entry.file_name().into_string().expect("text"), fs::read(entry.path()).expect("bytes"))).collect()
}

#[test]
fn prepare_reads_a_bucket_as_it_reads_a_folder() {
    let folder = scratch().join("store-inputs");
    write_inputs(&folder.join("bucket/text"));
    let prepare = |input: &str, name: &str, server: Option<&Server>| {
        let out = scratch().join(format!("store-inputs-{name}"));
        let mut command = tiefsee(&[["prepare", input, "--out"].map(String::from).to_vec(), vec![out.display().to_string()]].concat());
        command.args(["--vocab", "400", "--held-out", "0.1"]);
        if let Some(server) = server {
            server.s3(&mut command, server.secret());
            server.gs(&mut command);
        }
        finish(command, 0);
        files(&out)
    };
    let local = prepare(&folder.join("bucket/text").display().to_string(), "local", None);
    assert!(local["train-00000.parquet"].len() > 50_000 && local.len() >= 6, "{:?}", local.keys());
    let sound = Server::start(&folder, true, Faults::default());
    assert!(prepare("s3://bucket/text", "s3", Some(&sound)) == local);
    let failing = Server::start(&folder, true, Faults { failing: 20, stalling: 0 });
    assert!(prepare("s3://bucket/text/", "failing", Some(&failing)) == local);
    assert!(failing.requests().0 > 0, "the store failed: {:?}", failing.requests());
    let open = Server::start(&folder, false, Faults::default());
    assert!(prepare("gs://bucket/text", "gs", Some(&open)) == local);
    let (one, alone) = (folder.join("bucket/text/d.jsonl"), prepare("s3://bucket/text/d.jsonl", "one", Some(&sound)));
    assert!(alone == prepare(&one.display().to_string(), "one-local", None));
}

#[test]
fn a_store_that_is_not_there_is_said_at_once_and_given_up_when_patience_ends() {
    let address = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let run = Run::new("store-gone", &["data.mixture.0.path=s3://bucket/corpus", "data.patience=1"]);
    let mut command = tiefsee(&run.train_args());
    command.envs([("AWS_ENDPOINT", format!("http://{address}").as_str()), ("AWS_ALLOW_HTTP", "true")]);
    command.envs([("AWS_ACCESS_KEY_ID", "a-key"), ("AWS_SECRET_ACCESS_KEY", "a-secret")]);
    let said = text(&finish(command, 1));
    let parts = ["repeated for up to 1 s more", "s3://bucket/corpus/manifest.json: ", " attempts in 1.", " s failed, the last with: "];
    assert!(parts.iter().all(|part| said.contains(part)), "{said}");
}

/// A run of a bucket whose environment names no credentials, and a machine that is asked at `metadata`.
fn without_credentials(url: &str, metadata: &str, patience: u64) -> String {
    let run = Run::new("store-nobody", &[&format!("data.mixture.0.path={url}"), &format!("data.patience={patience}")]);
    let mut command = tiefsee(&run.train_args());
    let names = std::env::vars().map(|(name, _)| name).filter(|name| ["AWS_", "GOOGLE_"].iter().any(|begin| name.starts_with(begin)));
    names.for_each(|name| _ = command.env_remove(name));
    command.env("HOME", scratch()).env("AWS_METADATA_ENDPOINT", format!("http://{metadata}"));
    command.envs([("GCE_METADATA_HOST", metadata), ("GCE_METADATA_IP", metadata)]);
    text(&finish(command, 1))
}

#[test]
fn lacking_credentials_are_said_at_once_and_are_final_where_the_machine_has_none() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").to_string();
    let denying = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = denying.local_addr().expect("an address").to_string();
    std::thread::spawn(move || {
        for mut socket in denying.incoming().flatten() {
            let _ = socket.read(&mut [0; 4096]);
            let _ = socket.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
    });
    for (url, variables) in [("s3://bucket/corpus", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"), ("gs://bucket/corpus", "GOOGLE_SERVICE_ACCOUNT")] {
        let said = without_credentials(url, &closed, 1);
        let lines: Vec<&str> = said.lines().filter(|line| line.contains("no credentials in the environment") && line.contains(variables)).collect();
        assert!(lines.len() > 1 && lines[0].contains("is repeated for up to 1 s more"), "{said}");
        assert!(lines.iter().any(|line| line.contains("attempts in 1.")), "{said}");
        let said = without_credentials(url, &address, 20);
        let parts = [variables, "manifest.json: the store refuses it", "404"];
        assert!(parts.iter().all(|part| said.contains(part)) && !said.contains("is repeated"), "{said}");
    }
}

#[test]
fn a_store_that_fails_and_stalls_never_gives_a_wrong_sample() {
    let folder = bucket_with_corpus("store-stalling");
    let spec = OrderSpec { sources: vec![Source { path: corpus().to_owned(), weight: 1.0 }], sequence_length: 64, seed: 3, phase: 0, split: Split::Train };
    let sound = Loader::open(spec.clone(), LoaderOptions::default()).expect("a corpus");
    let indices: Vec<u64> = (0..300).collect();
    let expected = sound.read(&indices).expect("samples");
    let server = Server::start(&folder, true, Faults { failing: 20, stalling: 10 });
    // A cache of one row group: every change of it is a request.
    let mut options = LoaderOptions { cache_bytes: 1, ..LoaderOptions::default() };
    (options.retry.first_pause, options.retry.timeout) = (Duration::from_millis(1), Duration::from_millis(250));
    let store = Store::from_parts(server.client("bucket"), "corpus", "s3://bucket/corpus".into(), options.retry);
    for _ in 0..4 {
        let loader = Loader::open_stores(spec.clone(), options.clone(), vec![store.clone()]).expect("a corpus");
        for (some, right) in indices.chunks(60).zip(expected.chunks(60)) {
            loader.prefetch(some);
            assert_eq!(loader.read(some).expect("samples"), right);
        }
    }
    let (hit, served) = server.requests();
    println!("{served} requests, {hit} of them failed or stalled");
    assert!(hit * 5 > served, "{hit} of {served} requests failed or stalled");
}
