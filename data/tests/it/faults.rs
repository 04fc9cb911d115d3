//! Damaged, missing, swapped and failing files: an error that names the file, never a wrong sample.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use data::{DataError, Loader, Split};

use crate::corpus::{self, options, spec};

fn read_all(path: &Path) -> Result<(), DataError> {
    let loader = Loader::open(spec(&[(path, 1.0)], 64, Split::Train), options())?;
    let indices: Vec<u64> = (0..loader.num_samples()).collect();
    loader.prefetch(&indices);
    loader.read(&indices).map(|_| ())
}

#[test]
fn damaged_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 1, 60);
    read_all(&path).unwrap();
    let other = corpus::prepared(folder.path(), 2, 60);
    let shard = path.join("train-00000.parquet");
    let whole = fs::read(&shard).unwrap();
    let check = |bytes: Option<&[u8]>, file: &str, expected: &dyn Fn(&DataError) -> bool| {
        let file = path.join(file);
        let before = fs::read(&file).unwrap();
        match bytes {
            Some(bytes) => fs::write(&file, bytes).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        let error = read_all(&path).unwrap_err();
        assert!(expected(&error), "{error}");
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(error.to_string().contains(name), "{error} does not name {name}");
        fs::write(&file, before).unwrap();
    };
    let name = "train-00000.parquet";
    for at in [10, whole.len() / 3, whole.len() / 2] {
        let mut flipped = whole.clone();
        flipped[at] ^= 4;
        check(Some(&flipped), name, &|e| matches!(e, DataError::Checksum { .. }));
    }
    for length in [0, 100, whole.len() / 2, whole.len() - 1] {
        check(Some(&whole[..length]), name, &|e| matches!(e, DataError::WrongLength { expected, .. } if *expected > 0));
    }
    check(None, name, &|e| matches!(e, DataError::MissingFile { .. }));
    let swapped = fs::read(other.join(name)).unwrap();
    check(Some(&swapped), name, &|e| matches!(e, DataError::WrongLength { .. } | DataError::Checksum { .. }));
    let mut same_length = swapped.clone();
    same_length.resize(whole.len(), 0);
    check(Some(&same_length), name, &|e| matches!(e, DataError::Checksum { .. }));
    for at in [3, 40, 70, 200] {
        let mut index = fs::read(path.join("train.index")).unwrap();
        index[at] ^= 1;
        check(Some(&index), "train.index", &|e| matches!(e, DataError::Checksum { .. } | DataError::Manifest { .. }));
    }
    check(Some(b"{\"format\": 1}"), "manifest.json", &|e| matches!(e, DataError::Manifest { .. }));
    read_all(&path).unwrap();
}

#[test]
fn a_token_outside_the_vocabulary_names_file_and_id() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 3, 60);
    let manifest = path.join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    assert!(text.contains("\"vocab_size\": 400"));
    fs::write(&manifest, text.replace("\"vocab_size\": 400", "\"vocab_size\": 300")).unwrap();
    let error = read_all(&path).unwrap_err();
    assert!(matches!(&error, DataError::TokenOutOfRange { id: 300.., vocab_size: 300, .. }), "{error}");
    assert!(error.to_string().contains("train-00000.parquet"), "{error}");
}

#[test]
fn a_url_or_a_missing_folder_is_a_clear_error() {
    let open = |path: &str| Loader::open(spec(&[(Path::new(path), 1.0)], 8, Split::Train), options()).map(|_| ());
    let error = open("ftp://host/corpus").unwrap_err();
    assert!(matches!(error, DataError::BadUrl { .. }) && error.to_string().contains("s3://"), "{error}");
    let error = data::prepare(&corpus::args(Path::new("s3://bucket/in"), Path::new("s3://bucket/out"))).unwrap_err();
    assert!(matches!(error, DataError::BadOption { option: "--out", .. }), "{error}");
    let error = open("no/such/folder").unwrap_err();
    assert!(matches!(error, DataError::Io { .. }) && error.to_string().contains("no/such/folder"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("manifest.json");
    fs::write(&file, "{}").unwrap();
    let error = open(file.to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("manifest.json: is no folder"), "{error}");
    fs::remove_file(file).unwrap();
    let error = open(folder.path().to_str().unwrap()).unwrap_err();
    assert!(matches!(error, DataError::MissingFile { .. }) && error.to_string().contains("manifest.json"), "{error}");
}

#[test]
fn too_short_a_corpus_says_how_short() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 4, 10);
    let error = Loader::open(spec(&[(&path, 1.0)], 1 << 20, Split::Train), options()).map(|_| ()).unwrap_err();
    assert!(matches!(error, DataError::TooFewTokens { needed: 1_048_577, .. }), "{error}");
}

#[test]
fn missing_and_cut_shards_are_named_without_a_sample_being_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 5, 60);
    let check = || {
        let loader = Loader::open(spec(&[(&path, 1.0)], 8, Split::Train), options()).unwrap();
        loader.check_files(&mut data::Listings::default())
    };
    assert_eq!(check().unwrap(), Vec::<String>::new());
    let shard = path.join("train-00000.parquet");
    let whole = fs::read(&shard).unwrap();
    fs::write(&shard, &whole[..whole.len() - 1]).unwrap();
    let error = check().unwrap_err().to_string();
    let words = format!("train-00000.parquet is {} bytes long instead of {}", whole.len() - 1, whole.len());
    assert!(error.contains(&words) && error.contains("out-5"), "{error}");
    fs::remove_file(&shard).unwrap();
    let error = check().unwrap_err().to_string();
    assert!(error.contains("1 of 1 train shards") && error.contains("train-00000.parquet is missing"), "{error}");
}

#[test]
fn a_shard_that_chance_left_without_a_document_is_not_missed() {
    let folder = tempfile::tempdir().unwrap();
    let mut met = 0;
    for seed in 0..12 {
        let path = corpus::prepared(folder.path(), seed, 20);
        let Ok(loader) = Loader::open(spec(&[(&path, 1.0)], 8, Split::HeldOut), options()) else { continue };
        met += (0..2).any(|shard| !path.join(Split::HeldOut.shard_file(shard)).exists()) as u64;
        assert_eq!(loader.check_files(&mut data::Listings::default()).unwrap(), Vec::<String>::new());
    }
    assert!(met > 0, "no corpus had such a shard");
}

#[test]
fn what_was_read_is_kept_until_it_is_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 7, 60);
    let loader = Loader::open(spec(&[(&path, 1.0)], 64, Split::Train), options()).unwrap();
    let first = loader.read(&[0, 1]).unwrap();
    fs::remove_file(path.join("train-00000.parquet")).unwrap();
    assert_eq!(loader.read(&[0, 1]).unwrap(), first);
    loader.forget();
    let error = loader.read(&[0, 1]).unwrap_err().to_string();
    assert!(error.contains("train-00000.parquet"), "{error}");
}

#[test]
fn a_file_system_that_hangs_ends_with_an_error_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    // To open it waits for a writer, who never comes.
    assert!(Command::new("mkfifo").arg(folder.path().join("manifest.json")).status().unwrap().success());
    let (path, mut options) = (folder.path().to_owned(), options());
    options.retry.timeout = Duration::from_millis(100);
    let (say, said) = mpsc::channel();
    std::thread::spawn(move || say.send(Loader::open(spec(&[(&path, 1.0)], 8, Split::Train), options).map(|_| ())));
    let error = said.recv_timeout(Duration::from_secs(60)).expect("opening ends").unwrap_err();
    assert!(matches!(error, DataError::Store { .. }) && error.to_string().contains("manifest.json"), "{error}");
}

#[test]
fn sources_that_end_documents_differently_are_not_mixed() {
    let folder = tempfile::tempdir().unwrap();
    let first = corpus::prepared(folder.path(), 8, 60);
    let mut args = corpus::args(&folder.path().join("in-8"), &folder.path().join("padded"));
    args.end_token = Some("<｜▁pad▁｜>".into());
    let second = data::prepare(&args).unwrap().out;
    let error = Loader::open(spec(&[(&first, 1.0), (&second, 1.0)], 8, Split::Train), options()).map(|_| ()).unwrap_err();
    let said = error.to_string();
    assert!(said.contains("end token") && said.contains("padded has 2") && said.contains("out-8 has 1"), "{said}");
}
