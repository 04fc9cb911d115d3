//! What `prepare` makes out of folders, JSONL and parquet, and what it refuses.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::path::Path;

use data::{DataError, Loader, Split, decode_document, open_tokenizer, prepare};

use crate::columns::parquet_of;
use crate::corpus::{self, options, spec};

/// All ids of a split, put together from samples, and the end token.
fn stream(path: &Path, split: Split) -> (Vec<u32>, u32) {
    let mut spec = spec(&[(path, 1.0)], 1, split);
    spec.sequence_length = 1;
    let loader = Loader::open(spec, options()).unwrap();
    let n = loader.num_samples();
    let mut stream = vec![0; n as usize + 1];
    let indices: Vec<u64> = (0..n).collect();
    for sample in loader.read(&indices).unwrap() {
        let at = loader.locate(sample.index).unwrap().sample as usize;
        stream[at..at + 2].copy_from_slice(&sample.tokens);
    }
    assert_eq!(stream.last(), Some(&loader.end_token()), "a stream ends with an end token");
    (stream, loader.end_token())
}

/// All documents of a split as text.
pub fn documents(path: &Path, split: Split) -> Vec<String> {
    let tokenizer = open_tokenizer(path.join("tokenizer.json")).unwrap();
    let (stream, end) = stream(path, split);
    let parts = stream.split_inclusive(|id| *id == end);
    parts.map(|ids| decode_document(&tokenizer, ids, end).unwrap()).collect()
}

pub fn folder_bytes(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()).collect();
    files.sort_by_key(|file| file.file_name());
    files.iter().map(|f| (f.file_name().into_string().unwrap(), fs::read(f.path()).unwrap())).collect()
}

#[test]
fn every_document_decodes_byte_for_byte_once() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    let mut texts = corpus::write_corpus(&input, 1, 150);
    // A copy of every third under another name, a binary file, an empty one, one of no interest.
    for (i, text) in texts.iter().enumerate().step_by(3) {
        fs::write(input.join(format!("copy-{i}.txt")), text).unwrap();
    }
    fs::write(input.join("binary.txt"), b"text\0\xff").unwrap();
    fs::write(input.join("empty.txt"), b"").unwrap();
    fs::write(input.join("image.png"), b"\x89PNG").unwrap();
    let distinct: HashSet<_> = texts.drain(..).collect();
    for (name, fim_rate, split_rate) in [("plain", 0.0, 0.0), ("changed", 0.5, 0.5)] {
        let mut args = corpus::args(&input, &folder.path().join(name));
        (args.fim_rate, args.split_rate) = (fim_rate, split_rate);
        let summary = prepare(&args).unwrap();
        let [train, held_out] = [Split::Train, Split::HeldOut].map(|split| documents(&summary.out, split));
        assert_eq!(summary.documents as usize, train.len() + held_out.len());
        assert_eq!((summary.duplicates, summary.skipped_files), (50 + 150 - distinct.len() as u64, 1));
        assert!(held_out.len() > 3 && held_out.len() < 40, "{} of 150 held out", held_out.len());
        let found: HashSet<_> = train.iter().chain(&held_out).cloned().collect();
        assert_eq!(found.len(), train.len() + held_out.len(), "no document twice");
        assert_eq!(found, distinct);
    }
}

#[test]
fn the_bytes_do_not_depend_on_threads_or_on_where_the_corpus_lies() {
    let folder = tempfile::tempdir().unwrap();
    let mut made = Vec::new();
    for (place, threads) in [("a", 1), ("b/deeper", 2), ("c", 5)] {
        let input = folder.path().join(place).join("in");
        corpus::write_corpus(&input, 2, 90);
        let mut args = corpus::args(&input, &folder.path().join(place).join("out"));
        (args.threads, args.fim_rate, args.split_rate) = (threads, 0.3, 0.3);
        made.push(folder_bytes(&prepare(&args).unwrap().out));
    }
    assert!(made[0].iter().any(|(name, bytes)| name == "train-00000.parquet" && bytes.len() > 10_000));
    assert!(made[0] == made[1] && made[0] == made[2]);
    let mut args = corpus::args(&folder.path().join("a/in"), &folder.path().join("other-seed"));
    args.seed = 1;
    let other = folder_bytes(&prepare(&args).unwrap().out);
    assert!(made[0] != other);
}

#[test]
fn text_jsonl_and_parquet_of_the_same_documents_give_the_same_shards() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text");
    let texts = corpus::write_corpus(&text, 3, 60);
    let lines: String = texts.iter().map(|t| format!("{}\n", serde_json::json!({"id": 1, "text": t}))).collect();
    let write = |name: &str, bytes: &[u8]| {
        let input = folder.path().join(name);
        fs::create_dir_all(&input).unwrap();
        fs::write(input.join(format!("x.{name}")), bytes).unwrap();
    };
    write("jsonl", lines.as_bytes());
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(lines.as_bytes()).unwrap();
    write("jsonl.gz", &gzip.finish().unwrap());
    write("jsonl.zst", &zstd::encode_all(lines.as_bytes(), 1).unwrap());
    write("parquet", &parquet_of(&texts));
    let mut made = Vec::new();
    for name in ["text", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"] {
        let summary = prepare(&corpus::args(&folder.path().join(name), &folder.path().join(format!("out-{name}"))));
        let files = folder_bytes(&summary.unwrap().out);
        made.push(files.into_iter().filter(|(name, _)| name != "manifest.json").collect::<Vec<_>>());
    }
    assert!(made.iter().all(|files| *files == made[0]));
}

#[test]
fn fill_in_the_middle_and_splitting_happen_at_their_rates() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    corpus::write_corpus(&input, 4, 400);
    let count = |fim_rate: f64, split_rate: f64, name: &str| {
        let mut args = corpus::args(&input, &folder.path().join(name));
        (args.fim_rate, args.split_rate, args.held_out) = (fim_rate, split_rate, 0.01);
        prepare(&args).unwrap()
    };
    let [plain, fim, split, all] =
        [(0.0, 0.0, "p"), (0.25, 0.0, "f"), (0.0, 0.5, "s"), (0.0, 1.0, "a")].map(|(f, s, n)| count(f, s, n));
    let tokens = |s: &data::PrepareSummary| s.train_tokens + s.held_out_tokens;
    // Three marks a document, and a few tokens more where a cut parts a word.
    let marks = (tokens(&fim) - tokens(&plain)) as f64 / 400.0;
    assert!((0.6..2.5).contains(&marks), "{marks} tokens more a document");
    let (half, whole) = (tokens(&split) - tokens(&plain), tokens(&all) - tokens(&plain));
    assert!(whole > 100, "the corpus has tokens to split: {whole}");
    assert!((half as f64 / whole as f64 - 0.5).abs() < 0.1, "{half} of {whole} split");
}

#[test]
fn punctuation_of_any_script_is_split_from_its_line_breaks() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.jsonl");
    // The last is younger than some tables of Unicode.
    let marks = [".", "。", "！", "…", "€", " 》", "🥰"];
    let texts: Vec<String> = (0..300).map(|i| marks.map(|mark| format!("第{i}句{mark}\n")).concat()).collect();
    fs::write(&input, texts.iter().map(|text| format!("{}\n", serde_json::json!({"text": text}))).collect::<String>()).unwrap();
    let joined = |split_rate: f64, name: &str| {
        let mut args = corpus::args(&input, &folder.path().join(name));
        args.split_rate = split_rate;
        prepare(&args).unwrap();
        let tokenizer = open_tokenizer(args.out.join("tokenizer.json")).unwrap();
        let splits = [Split::Train, Split::HeldOut];
        let found: HashSet<String> = splits.iter().flat_map(|split| documents(&args.out, *split)).collect();
        assert_eq!(found, texts.iter().cloned().collect());
        let words: Vec<String> =
            splits.iter().flat_map(|split| stream(&args.out, *split).0).map(|id| tokenizer.decode(&[id]).unwrap()).collect();
        marks.map(|mark| words.iter().filter(|word| **word == format!("{mark}\n")).count())
    };
    assert_eq!(joined(0.0, "plain"), [300; 7], "each of them is a token");
    assert_eq!(joined(1.0, "split"), [0; 7]);
}

#[test]
fn a_tiny_corpus_still_has_a_held_out_document() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    let texts: HashSet<_> = corpus::write_corpus(&input, 6, 4).into_iter().collect();
    let mut args = corpus::args(&input, &folder.path().join("out"));
    args.held_out = 0.001;
    prepare(&args).unwrap();
    let [train, held_out] = [Split::Train, Split::HeldOut].map(|split| documents(&args.out, split));
    assert_eq!((train.len(), held_out.len()), (3, 1));
    assert_eq!(train.into_iter().chain(held_out).collect::<HashSet<_>>(), texts);
}

#[test]
fn whatever_their_hashes_a_few_documents_train_and_are_held_out() {
    let folder = tempfile::tempdir().unwrap();
    // The last is longer than a shard.
    for (name, count, words) in [("one", 1, 300), ("two", 2, 300), ("three", 3, 300), ("long", 1, 150_000)] {
        let (input, mut random) = (folder.path().join(format!("{name}.jsonl")), corpus::Random(7));
        let texts: HashSet<String> = (0..count).map(|_| corpus::text(&mut random, words)).collect();
        // Each of them twice: what counts is the distinct ones.
        let lines: String = texts.iter().chain(&texts).map(|text| format!("{}\n", serde_json::json!({"text": text}))).collect();
        fs::write(&input, lines).unwrap();
        for seed in 0..8 {
            let mut args = corpus::args(&input, &folder.path().join(format!("{name}-{seed}")));
            (args.seed, args.held_out, args.shard_mib) = (seed, 0.5, 1);
            let summary = prepare(&args).unwrap();
            let tokens = (summary.train_tokens, summary.held_out_tokens);
            assert!(tokens.0 > 0 && (tokens.1 > 0) == (count > 1), "{name} {seed}: {tokens:?} train and held-out tokens");
            let splits = if count > 1 { &[Split::Train, Split::HeldOut][..] } else { &[Split::Train] };
            let found = splits.iter().flat_map(|split| documents(&args.out, *split)).collect::<HashSet<_>>();
            assert!(found == texts, "{name} {seed}");
            assert!(summary.vocab_size > 300, "{name} {seed}: a vocabulary of {}", summary.vocab_size);
            assert_eq!((summary.documents, summary.duplicates), (count, count));
        }
    }
}

#[test]
fn a_finished_corpus_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let out = corpus::prepared(folder.path(), 8, 20);
    let before = folder_bytes(&out);
    let error = prepare(&corpus::args(&folder.path().join("in-8"), &out)).unwrap_err();
    assert!(matches!(error, DataError::OutputExists { .. }), "{error}");
    assert!(before == folder_bytes(&out));
}
