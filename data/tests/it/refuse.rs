//! What `prepare` refuses, what it then leaves, and what it takes over once that is mended.

use std::fs;
use std::path::{Path, PathBuf};

use data::{DataError, PrepareArgs, prepare};

use crate::columns::parquet_of;
use crate::corpus;
use crate::prepare::folder_bytes;

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
    fs::write(input.join("c.jsonl"), "{\"text\": \"\"}\n{\"text\": null}\n").unwrap();
    let error = refused(&|_| {});
    assert!(matches!(error, DataError::NoText { files: 3, .. }) && error.to_string().contains("left out: 2 documents without text"), "{error}");
    for (name, change) in [
        ("--held-out", (|args| args.held_out = 1.5) as fn(&mut PrepareArgs)),
        ("--vocab", |args| args.vocab = Some(100)),
        ("--vocab", |args| args.vocab = None),
        ("--fim-rate", |args| args.fim_rate = f64::NAN),
        ("--row-group-tokens", |args| args.row_group_tokens = 0),
        ("--threads", |args| args.threads = 1025),
    ] {
        let error = refused(&change);
        assert!(matches!(&error, DataError::BadOption { option, .. } if *option == name), "{error}");
    }
    assert_eq!(refused(&|args| args.threads = usize::MAX).to_string(), format!("--threads = {}: must lie in 0 to 1024", usize::MAX));
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
        assert!(error.to_string().contains("must end in a name"), "an empty folder too: {error}");
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
fn a_link_in_place_of_out_or_of_the_work_folder_is_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = some_text(folder.path(), 20);
    let real = folder.path().join("real");
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, &args.out).unwrap();
    let error = prepare(&args).unwrap_err();
    assert!(matches!(&error, DataError::BadOption { option: "--out", .. }) && error.to_string().contains("is a link"), "{error}");
    assert!(!work(&args).exists());
    args.out = folder.path().join("other");
    std::os::unix::fs::symlink(&real, work(&args)).unwrap();
    let said = prepare(&args).unwrap_err().to_string();
    assert!(said.contains("other.partial: is needed for the work, but is a link"), "{said}");
    assert_eq!(fs::read_dir(&real).unwrap().count(), 0);
    args.out = real;
    prepare(&args).unwrap();
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

/// Text, and JSONL whose first file holds `lines`.
fn with_lines(folder: &Path, lines: &[u8]) -> PrepareArgs {
    let args = some_text(folder, 30);
    fs::write(args.inputs[0].join("a.jsonl"), lines).unwrap();
    args
}

#[test]
fn lines_without_text_are_left_out_up_to_a_share_that_can_be_raised() {
    let folder = tempfile::tempdir().unwrap();
    let mut lines = b"\xef\xbb\xbf{\"text\": \"after a mark\"}\n\n{\"text\": null}\n{\"text\": \"\"}\n".to_vec();
    for bad in [&b"{\"text\": \"\\ud800\"}"[..], b"{\"text\": \"\xff\"}", b"{\"txt\": 1}", b"{\"text\": 1}", b"{\"text\": \"cut"] {
        lines.extend_from_slice(bad);
        lines.push(b'\n');
    }
    (0..492).for_each(|i| lines.extend_from_slice(format!("{{\"text\": \"line {i}\"}}\n").as_bytes()));
    let mut args = with_lines(folder.path(), &lines);
    let error = prepare(&args).unwrap_err();
    assert!(matches!(&error, DataError::BadInput { path, .. } if path.ends_with("a.jsonl")), "{error}");
    let said = error.to_string();
    assert!(said.contains("line 5: ") && said.contains("5 of 500 lines") && said.contains("--max-bad 0.001"), "{said}");
    args.max_bad = 0.0099;
    prepare(&args).unwrap_err();
    // The share itself is not above it; what was read is taken over.
    args.max_bad = 0.01;
    let summary = prepare(&args).unwrap();
    assert_eq!((summary.bad_lines, summary.empty_documents, summary.documents + summary.duplicates), (5, 2, 493 + 30));
    let lines = format!("{}\n", "{\"body\": \"text\"}\n".repeat(2000));
    let mut args = with_lines(&folder.path().join("wrong-column"), lines.as_bytes());
    fs::write(args.inputs[0].join("b.parquet"), "PAR1").unwrap();
    args.threads = 1;
    let said = prepare(&args).unwrap_err().to_string();
    assert!(said.contains("a.jsonl: line 1: has no \"text\"; 2000 of 2000"), "known before the next file is read: {said}");
}

#[test]
fn what_a_tokenizer_lacks_is_said_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let made = corpus::prepared(folder.path(), 42, 30).join("tokenizer.json");
    let whole: serde_json::Value = serde_json::from_slice(&fs::read(made).unwrap()).unwrap();
    let mut args = with_lines(&folder.path().join("x"), b"not read, or it would be the error\n");
    let (given, mut bare) = (folder.path().join("t.json"), whole.clone());
    fs::write(&given, "{}").unwrap();
    let refused = |change: &dyn Fn(&mut PrepareArgs), part: &str| {
        let mut args = args.clone();
        change(&mut args);
        let error = prepare(&args).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert!(!work(&args).exists(), "{error}");
        error
    };
    let error = refused(&|args| args.end_token = Some("<eos>".into()), "<｜end▁of▁sentence｜>");
    assert!(matches!(error, DataError::BadOption { option: "--end-token", .. }), "{error}");
    let use_it = |args: &mut PrepareArgs| (args.vocab, args.tokenizer) = (None, Some(given.clone()));
    let error = refused(&use_it, "t.json");
    assert!(matches!(error, DataError::Tokenizer { .. }), "{error}");
    fs::write(&given, r#"{"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["</s>", 0.0]]}}"#).unwrap();
    refused(&use_it, "Unigram; BPE, WordPiece and WordLevel are read");
    for id in [1 << 24, u64::MAX] {
        let mut far = whole.clone();
        far["added_tokens"][2]["id"] = id.into();
        fs::write(&given, far.to_string()).unwrap();
        refused(&use_it, &format!("has a token with id {id}, the limit is 16777215"));
    }
    bare["added_tokens"] = serde_json::json!([]);
    let vocab = bare["model"]["vocab"].as_object_mut().unwrap();
    vocab.retain(|token, _| !token.starts_with("<｜"));
    vocab.insert("</s>".into(), 0.into());
    fs::write(&given, bare.to_string()).unwrap();
    refused(&|args| (use_it(args), args.end_token = Some("<eos>".into())).1, "\"<eos>\"");
    let error = refused(&|args| (use_it(args), args.fim_rate = 0.5).1, "fim▁begin");
    assert!(matches!(error, DataError::BadOption { option: "--fim-rate", .. }), "{error}");
    let mut apart = whole.clone();
    apart["model"]["vocab"].as_object_mut().unwrap().retain(|token, _| token.starts_with("<｜") || !token.contains(['Ċ', 'č']));
    apart["model"]["merges"] = serde_json::json!([]);
    fs::write(&given, apart.to_string()).unwrap();
    let error = refused(&|args| (use_it(args), args.split_rate = 0.5).1, "t.json");
    assert!(matches!(error, DataError::BadOption { option: "--split-rate", .. }), "{error}");
    fs::write(&given, bare.to_string()).unwrap();
    let mut none = bare.clone();
    none["model"]["vocab"].as_object_mut().unwrap().remove("</s>");
    fs::write(&given, none.to_string()).unwrap();
    refused(&use_it, "no end-of-document token");
    // Sound, it comes as far as the bad line.
    fs::write(&given, whole.to_string()).unwrap();
    use_it(&mut args);
    assert!(prepare(&args).unwrap_err().to_string().contains("a.jsonl: line 1"));
}

#[test]
fn a_tokenizer_that_changes_text_is_refused_unless_that_is_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = with_lines(&folder.path().join("x"), "{\"text\": \"abc\"}\n{\"text\": \"ab漢字かなc\"}\n".as_bytes());
    let tokenizer = |normalizer: serde_json::Value, decoder: serde_json::Value, unknown: &[&str]| {
        let letters = ["</s>", "a", "b", "c", " ", "漢", "x"].iter().filter(|letter| !unknown.contains(letter));
        let vocab: serde_json::Map<_, _> = letters.enumerate().map(|(id, letter)| (letter.to_string(), id.into())).collect();
        let json = serde_json::json!({"version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": null, "decoder": decoder,
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": null, "fuse_unk": false, "byte_fallback": false}});
        let path = folder.path().join("t.json");
        fs::write(&path, json.to_string()).unwrap();
        path
    };
    let fused = serde_json::json!({"type": "Fuse"});
    (args.vocab, args.tokenizer) = (None, Some(tokenizer(().into(), fused.clone(), &[])));
    args.inputs = vec![args.inputs[0].join("a.jsonl")];
    let error = prepare(&args).unwrap_err();
    assert!(matches!(&error, DataError::Tokenizer { path, .. } if path.ends_with("t.json")), "{error}");
    let said = error.to_string();
    assert!(said.contains("a.jsonl: line 2: \"字かなc\" at byte 5 becomes \"c\"") && said.contains("--lossy-tokenizer"), "{said}");
    // The same command with the option, or with another tokenizer, goes on.
    args.lossy_tokenizer = true;
    assert_eq!(prepare(&args).unwrap().documents, 2);
    // A document of which nothing is left is as one without text, and so is the only one to train on.
    fs::write(&args.inputs[0], "{\"text\": \"abc\"}\n{\"text\": \"漢字かな\"}\n{\"text\": \"cab\"}\n").unwrap();
    args.out = folder.path().join("gone");
    args.tokenizer = Some(tokenizer(().into(), fused.clone(), &["漢"]));
    let summary = prepare(&args).unwrap();
    assert_eq!((summary.documents, summary.empty_documents), (2, 1));
    fs::write(&args.inputs[0], "{\"text\": \"漢字かな\"}\n").unwrap();
    args.out = folder.path().join("all-gone");
    let said = prepare(&args).unwrap_err().to_string();
    assert!(said.contains("t.json") && said.contains("no token for any of the 1 documents to train on"), "{said}");
    // A normalizer changes text on purpose.
    fs::write(&args.inputs[0], "{\"text\": \"abcABC\"}\n").unwrap();
    args.out = folder.path().join("lower");
    args.tokenizer = Some(tokenizer(serde_json::json!({"type": "Lowercase"}), fused, &[]));
    args.lossy_tokenizer = false;
    let said = prepare(&args).unwrap_err().to_string();
    assert!(said.contains("line 1: \"ABC\" at byte 3 becomes \"abc\""), "{said}");
    args.lossy_tokenizer = true;
    prepare(&args).unwrap();
}

#[test]
fn a_tokenizer_that_changes_a_late_document_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let made = corpus::prepared(folder.path(), 43, 60).join("tokenizer.json");
    let whole: serde_json::Value = serde_json::from_slice(&fs::read(made).unwrap()).unwrap();
    let refused = |name: &str, json: &serde_json::Value, late: &dyn Fn(usize) -> &'static str| {
        let (given, input) = (folder.path().join(format!("{name}.json")), folder.path().join(format!("{name}.jsonl")));
        fs::write(&given, json.to_string()).unwrap();
        fs::write(&input, (0..1000).map(|i| format!("{{\"text\": \"document {i} {}\"}}\n", late(i))).collect::<String>()).unwrap();
        let mut args = corpus::args(&input, &folder.path().join(format!("out-{name}")));
        (args.vocab, args.tokenizer) = (None, Some(given));
        let error = prepare(&args).unwrap_err();
        assert!(matches!(&error, DataError::Tokenizer { path, .. } if path.ends_with(format!("{name}.json"))), "{error}");
        args.lossy_tokenizer = true;
        assert_eq!(prepare(&args).unwrap().documents, 1000);
        error.to_string()
    };
    // Of one that normalizes every document is looked at.
    let mut lower = whole.clone();
    lower["normalizer"] = serde_json::json!({"type": "Lowercase"});
    let said = refused("lower", &lower, &|i| if i == 700 { "LATE" } else { "early" });
    assert!(said.contains("document 700 ") && said.contains("\"LATE\"") && said.contains("becomes \"late\"; --lossy-tokenizer"), "{said}");
    // Of one that knows no line break, too.
    let mut lacking = whole.clone();
    lacking["model"]["vocab"].as_object_mut().unwrap().retain(|token, _| !token.contains('Ċ'));
    lacking["model"]["merges"] = serde_json::json!([]);
    let said = refused("lacking", &lacking, &|i| if i == 900 { "x\\ny" } else { "early" });
    assert!(said.contains("\"\\ny\"") && said.contains("becomes \"y\""), "{said}");
    // Of others, which should change nothing, some.
    let mut cut = whole.clone();
    let removed = serde_json::json!({"type": "Split", "pattern": {"String": "Z"}, "behavior": "Removed", "invert": false});
    cut["pre_tokenizer"]["pretokenizers"].as_array_mut().unwrap().insert(0, removed);
    let said = refused("cut", &cut, &|i| if i >= 64 { "xZy" } else { "early" });
    assert!(said.contains("becomes \"y\""), "{said}");
}

#[test]
fn shards_made_before_an_input_was_mended_are_made_again() {
    let folder = tempfile::tempdir().unwrap();
    let (input, tokenizer) = (folder.path().join("a.jsonl"), folder.path().join("t.json"));
    let vocab = serde_json::json!({"</s>": 0, "a": 1, "b": 2, "c": 3});
    let model = serde_json::json!({"type": "BPE", "vocab": vocab, "merges": []});
    let pieces = serde_json::json!({"type": "Whitespace"});
    let json = serde_json::json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": pieces, "decoder": {"type": "Fuse"}, "model": model});
    fs::write(&tokenizer, json.to_string()).unwrap();
    let lines = |count: usize, last: &str| -> String {
        let text = |i: usize| if i == count { last.into() } else { format!("{i:07b}").replace('0', "a").replace('1', "b") };
        (0..=count).map(|i| format!("{{\"text\": \"{}\"}}\n", text(i))).collect()
    };
    let mut args = corpus::args(&input, &folder.path().join("out"));
    (args.vocab, args.tokenizer) = (None, Some(tokenizer));
    // The held-out shards come first; the document without a token lies behind them, and behind those tried first.
    (args.threads, args.held_out) = (1, 0.5);
    fs::write(&input, lines(80, "漢")).unwrap();
    let said = prepare(&args).unwrap_err().to_string();
    assert!(said.contains("\"漢\""), "{said}");
    assert!(fs::read_dir(work(&args).join("done")).unwrap().count() > 0, "a shard was made");
    fs::write(&input, lines(120, "c")).unwrap();
    let summary = prepare(&args).unwrap();
    assert_eq!(summary.documents, 121);
    let mut fresh = args.clone();
    fresh.out = folder.path().join("fresh");
    prepare(&fresh).unwrap();
    assert!(folder_bytes(&args.out) == folder_bytes(&fresh.out));
}

#[test]
fn a_strict_prepare_takes_over_no_shard_of_a_lossy_one() {
    let folder = tempfile::tempdir().unwrap();
    let made = corpus::prepared(folder.path(), 44, 60).join("tokenizer.json");
    let mut lower: serde_json::Value = serde_json::from_slice(&fs::read(made).unwrap()).unwrap();
    lower["normalizer"] = serde_json::json!({"type": "Lowercase"});
    let (input, tokenizer) = (folder.path().join("lines"), folder.path().join("lower.json"));
    fs::create_dir_all(&input).unwrap();
    fs::write(&tokenizer, lower.to_string()).unwrap();
    let mut args = corpus::args(&input, &folder.path().join("out"));
    (args.vocab, args.tokenizer, args.lossy_tokenizer) = (None, Some(tokenizer), true);
    // Behind the documents that are looked at as they are read. Nothing can be read of the file at first, later all; it looks alike.
    let texts: Vec<String> = (0..100).map(|i| format!("document {i} {}", if i == 90 { "LATE" } else { "early" })).collect();
    let (whole, path) = (parquet_of(&texts), input.join("a.parquet"));
    fs::write(&path, vec![0; whole.len()]).unwrap();
    let written = fs::metadata(&path).unwrap().modified().unwrap();
    prepare(&args).unwrap_err();
    fs::write(&path, whole).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(written).unwrap();
    // Stopped behind the shards.
    let in_the_way = work(&args).join("out/train.index.tmp");
    fs::create_dir_all(&in_the_way).unwrap();
    let said = prepare(&args).unwrap_err().to_string();
    assert!(said.contains("train.index.tmp"), "{said}");
    fs::remove_dir(&in_the_way).unwrap();
    args.lossy_tokenizer = false;
    let said = prepare(&args).unwrap_err().to_string();
    assert!(said.contains("\"LATE\"") && said.contains("becomes \"late\""), "{said}");
    args.lossy_tokenizer = true;
    assert_eq!(prepare(&args).unwrap().documents, 100);
}

#[test]
fn no_text_of_a_document_becomes_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let made = corpus::prepared(folder.path(), 45, 60).join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(made).unwrap()).unwrap();
    // A word of the vocabulary is taken whole, and the end token is one.
    let id = json["model"]["vocab"].as_object().unwrap().len();
    json["model"]["ignore_merges"] = true.into();
    json["model"]["vocab"]["<|endoftext|>"] = id.into();
    json["pre_tokenizer"] = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json["added_tokens"].as_array_mut().unwrap().push(serde_json::json!({"id": id, "content": "<|endoftext|>", "single_word": false,
        "lstrip": false, "rstrip": false, "normalized": false, "special": true}));
    let tokenizer = folder.path().join("whole.json");
    fs::write(&tokenizer, json.to_string()).unwrap();
    for (name, lines, ends) in [("in", "{\"text\": \"a word\"}\n{\"text\": \"see <|endoftext|> here\"}\n", false), ("all", "{\"text\": \"a word\"}\n{\"text\": \"<|endoftext|>\"}\n", true)] {
        let mut args = with_lines(&folder.path().join(name), lines.as_bytes());
        args.inputs = vec![args.inputs[0].join("a.jsonl")];
        (args.vocab, args.tokenizer, args.end_token) = (None, Some(tokenizer.clone()), Some("<|endoftext|>".into()));
        let said = prepare(&args).map_err(|error| error.to_string());
        assert_eq!(said.is_err(), ends, "{said:?}");
        assert!(said.err().is_none_or(|said| said.contains(&format!("makes token {id}, which ends documents or their parts"))), "{name}");
    }
}

/// Such as a mount point on which nothing is mounted.
#[test]
fn an_input_folder_without_a_file_is_an_error_and_costs_no_work_that_was_done() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = some_text(folder.path(), 30);
    let other = folder.path().join("other");
    corpus::write_corpus(&other, 46, 30);
    args.inputs.push(other.clone());
    // A group of its own, which is done before the one with the bad file.
    fs::write(args.inputs[0].join("a.txt"), "filler\n".repeat(1_300_000)).unwrap();
    fs::write(args.inputs[0].join("z.parquet"), b"PAR1").unwrap();
    prepare(&args).unwrap_err();
    let spill = || folder_bytes(&work(&args).join("spill"));
    let before = spill();
    fs::rename(&other, folder.path().join("away")).unwrap();
    fs::create_dir_all(other.join("deep/deeper")).unwrap();
    let error = prepare(&args).unwrap_err();
    assert!(matches!(&error, DataError::BadInput { path, .. } if *path == other) && error.to_string().contains("holds no file"), "{error}");
    assert!(!before.is_empty() && before == spill());
    // One that holds nothing but a link to what another input has is not without.
    std::os::unix::fs::symlink(&args.inputs[0], other.join("link")).unwrap();
    fs::remove_file(args.inputs[0].join("z.parquet")).unwrap();
    assert_eq!(prepare(&args).unwrap().files, 31);
}

#[test]
fn a_file_of_bad_lines_alone_is_left_out_where_the_whole_allows_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = with_lines(folder.path(), "{\"body\": 1}\n".repeat(1500).as_bytes());
    let good: String = (0..6000).map(|i| format!("{{\"text\": \"document {i}\"}}\n")).collect();
    fs::write(args.inputs[0].join("b.jsonl"), good).unwrap();
    // The bad ones come first.
    (args.threads, args.max_bad) = (1, 0.15);
    let said = prepare(&args).unwrap_err().to_string();
    assert!(said.contains("a.jsonl: line 1: ") && said.contains("1500 of 7500 lines"), "{said}");
    args.max_bad = 0.3;
    assert_eq!(prepare(&args).unwrap().bad_lines, 1500);
}
