//! What `prepare` refuses, what it then leaves, and what it takes over once that is mended.

use std::fs;
use std::path::{Path, PathBuf};

use data::{DataError, PrepareArgs, prepare};

use crate::corpus;
use crate::prepare::{folder_bytes, parquet_of};

/// A folder of text and the options to prepare it beside itself.
fn some_text(folder: &Path, count: u64) -> PrepareArgs {
    let input = folder.join("in");
    corpus::write_corpus(&input, 41, count);
    corpus::args(&input, &folder.join("out"))
}

fn work(args: &PrepareArgs) -> PathBuf {
    args.out.with_added_extension("partial")
}

#[test]
fn options_and_inputs_without_text_are_clear_errors_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    fs::create_dir_all(&input).unwrap();
    let args = corpus::args(&input, &folder.path().join("out"));
    let refused = |change: &dyn Fn(&mut PrepareArgs)| {
        let mut args = args.clone();
        change(&mut args);
        let error = prepare(&args).unwrap_err();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing half-written is left: {error}");
        error
    };
    fs::write(input.join("a.png"), b"png").unwrap();
    let error = refused(&|_| {});
    assert!(matches!(error, DataError::NoText { files: 1, .. }), "{error}");
    fs::write(input.join("b.txt"), b"\xff\xfe").unwrap();
    let error = refused(&|_| {});
    assert!(matches!(error, DataError::NoText { files: 2, .. }) && error.to_string().contains("in"), "{error}");
    for (name, change) in [
        ("--held-out", (|args| args.held_out = 1.5) as fn(&mut PrepareArgs)),
        ("--vocab", |args| args.vocab = Some(100)),
        ("--vocab", |args| args.vocab = None),
        ("--fim-rate", |args| args.fim_rate = f64::NAN),
        ("--row-group-tokens", |args| args.row_group_tokens = 0),
    ] {
        let error = refused(&change);
        assert!(matches!(&error, DataError::BadOption { option, .. } if *option == name), "{error}");
    }
}

#[test]
fn an_out_without_a_name_or_with_files_in_it_is_refused_and_untouched() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = some_text(folder.path(), 20);
    // Even an input that fails must not take anything with it.
    fs::write(args.inputs[0].join("cut.parquet"), b"PAR1").unwrap();
    let mine = folder.path().join("mine");
    fs::create_dir_all(mine.join("spill")).unwrap();
    for file in ["thesis.txt", "spill/notes"] {
        fs::write(mine.join(file), "mine").unwrap();
    }
    let all = |folder: &Path| (folder_bytes(&folder.join("spill")), fs::read(folder.join("thesis.txt")).unwrap());
    let before = all(&mine);
    for out in [".", "..", "/", "a/.."] {
        args.out = PathBuf::from(out);
        let error = prepare(&args).unwrap_err();
        assert!(matches!(&error, DataError::BadOption { option: "--out", value, .. } if value == out), "{error}");
    }
    args.out = mine.join("..");
    let error = prepare(&args).unwrap_err();
    assert!(matches!(&error, DataError::BadOption { option: "--out", .. }), "{error}");
    args.out = mine.clone();
    let error = prepare(&args).unwrap_err();
    assert!(matches!(&error, DataError::BadOption { option: "--out", .. }) && error.to_string().contains("mine"), "{error}");
    args.out = folder.path().join("file");
    fs::write(&args.out, "mine").unwrap();
    prepare(&args).unwrap_err();
    assert_eq!(fs::read(&args.out).unwrap(), b"mine");
    assert!(before == all(&mine));
    // Someone's folder has the name that the work would have.
    args.out = folder.path().join("out");
    fs::rename(&mine, work(&args)).unwrap();
    let error = prepare(&args).unwrap_err();
    assert!(error.to_string().contains("out.partial") && error.to_string().contains("is not prepare's"), "{error}");
    assert!(before == all(&work(&args)));
}

#[test]
fn only_what_prepare_made_is_removed_and_an_empty_out_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let args = some_text(folder.path(), 20);
    let cut = args.inputs[0].join("cut.parquet");
    fs::write(&cut, b"PAR1").unwrap();
    prepare(&args).unwrap_err();
    fs::write(work(&args).join("notes"), "mine").unwrap();
    fs::remove_file(cut).unwrap();
    fs::create_dir(&args.out).unwrap();
    prepare(&args).unwrap();
    assert!(args.out.join("manifest.json").exists());
    assert_eq!(folder_bytes(&work(&args)), [("notes".to_string(), b"mine".to_vec())]);
}

#[test]
fn a_bad_input_is_named_and_once_it_is_mended_the_work_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = some_text(folder.path(), 300);
    // Several groups, one after the other.
    (args.threads, args.shard_mib) = (1, 1);
    for name in ["a.jsonl", "b.jsonl"] {
        let line = |i: u32| format!("{{\"text\": \"{name} {i} {}\"}}\n", "many words ".repeat(1000));
        fs::write(args.inputs[0].join(name), (0..800).map(line).collect::<String>()).unwrap();
    }
    let (bad, whole) = (args.inputs[0].join("z.parquet"), parquet_of(&["one".to_string(), "two".to_string()]));
    for length in [3, whole.len() / 2, whole.len() - 5] {
        fs::write(&bad, &whole[..length]).unwrap();
        let error = prepare(&args).unwrap_err();
        assert!(matches!(&error, DataError::BadInput { path, .. } if path.ends_with("z.parquet")), "{error}");
    }
    let done = || {
        let spill = fs::read_dir(work(&args).join("spill")).unwrap().map(|entry| entry.unwrap().path());
        let mut spill: Vec<_> = spill.filter(|path| path.extension().is_some()).collect();
        spill.sort();
        spill
    };
    let (before, times) = (done(), |paths: &[PathBuf]| -> Vec<_> {
        paths.iter().map(|path| fs::metadata(path).unwrap().modified().unwrap()).collect()
    });
    assert!(before.len() >= 2, "{before:?}");
    let made = times(&before);
    fs::write(&bad, &whole).unwrap();
    let mut other = args.clone();
    other.text_column = "body".into();
    let error = prepare(&other).unwrap_err();
    assert!(matches!(error, DataError::OtherPrepare { .. }), "{error}");
    other.out = folder.path().join("other");
    let error = prepare(&other).unwrap_err().to_string();
    assert!(error.contains("\"body\""), "{error}");
    // The groups that were read before are not read again.
    fs::write(&bad, &whole[..whole.len() - 5]).unwrap();
    prepare(&args).unwrap_err();
    assert_eq!(done(), before);
    assert_eq!(times(&before), made);
    fs::write(&bad, &whole).unwrap();
    prepare(&args).unwrap();
    assert!(!work(&args).exists());
    let mut fresh = args.clone();
    fresh.out = folder.path().join("fresh");
    prepare(&fresh).unwrap();
    assert!(folder_bytes(&args.out) == folder_bytes(&fresh.out));
}
