//! Which files and lines `prepare` reads, and that it says what it leaves out.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;

use data::{DataError, PrepareArgs, PrepareSummary, Split, prepare};

use crate::columns::parquet_of;
use crate::corpus;
use crate::prepare::{documents, folder_bytes};

fn text(summary: &PrepareSummary) -> HashSet<String> {
    [Split::Train, Split::HeldOut].iter().flat_map(|split| documents(&summary.out, *split)).collect()
}

/// (reason, files, bytes, the largest), by reason.
fn left_out(summary: &PrepareSummary) -> Vec<(&str, u64, u64, &str)> {
    summary.left_out.iter().map(|(reason, some)| (reason.as_str(), some.files, some.bytes, some.largest.as_str())).collect()
}

#[test]
fn what_is_not_read_is_counted_by_reason() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    corpus::write_corpus(&input, 50, 20);
    let large = "large ".repeat(600_000);
    for (name, bytes) in [("a.csv", "one"), ("b/c.csv", "twotwo"), ("empty.txt", ""), ("odd.txt", "a\0"), ("large.txt", &large), ("huge.md", &large[..9000])] {
        fs::create_dir_all(input.join("b")).unwrap();
        fs::write(input.join(name), bytes).unwrap();
    }
    symlink("nowhere.txt", input.join("dead.txt")).unwrap();
    let mut args = corpus::args(&input, &folder.path().join("out"));
    // 3.6 MB of text: nothing is too large unless one says so.
    let summary = prepare(&args).unwrap();
    assert!(text(&summary).contains(&large));
    let few = [
        ("empty", 1, 0, "empty.txt"),
        ("links that cannot be followed", 1, 0, "dead.txt"),
        ("not UTF-8 text", 1, 2, "odd.txt"),
        ("of an extension that --extensions does not name", 2, 9, "b/c.csv"),
    ];
    assert_eq!(left_out(&summary), few);
    assert!(summary.to_string().contains("left out: 2 of an extension that --extensions does not name, 0.0 MB, the largest is b/c.csv\n"), "{summary}");
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(summary.out.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["prepare"]["left_out"]["empty"]["files"], 1);
    args.out = folder.path().join("small");
    args.max_file_bytes = Some(8999);
    let summary = prepare(&args).unwrap();
    assert!(!text(&summary).contains(&large));
    let large = ("larger than --max-file-bytes", 2, 3_600_000 + 9000, "large.txt");
    assert_eq!(left_out(&summary), [few[0], large, few[1], few[2], few[3]]);
}

#[test]
fn extensions_are_the_same_in_capitals() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    fs::create_dir(&input).unwrap();
    for (name, text) in [("A.JSONL", "{\"text\": \"one\"}\n{\"text\": \"two\"}\n"), ("b.TXT", "three"), ("c.txt", "four"), ("D.md", "five")] {
        fs::write(input.join(name), text).unwrap();
    }
    let mut args = corpus::args(&input, &folder.path().join("out"));
    args.extensions = [".JSONL", "TXT"].map(String::from).to_vec();
    assert_eq!(text(&prepare(&args).unwrap()), ["one", "two", "three", "four"].map(String::from).into());
}

/// What Python's json.loads takes, and json.dumps writes, of fields besides.
#[test]
fn a_field_that_nobody_reads_costs_no_text() {
    let folder = tempfile::tempdir().unwrap();
    let deep = format!("{}1{}", "[".repeat(900), "]".repeat(900));
    let others = ["NaN", "[-Infinity, Infinity]", "1e999", "-1e999", r#""\ud800""#, r#"{"\udc00": 1}"#, &deep, r#""\\\"NaN""#];
    let mut lines: Vec<String> = others.iter().enumerate().flat_map(|(i, other)| {
        let text = format!(r#""text": "NaN, \"Infinity\" \\ {i}""#);
        [format!(r#"{{"score": {other}, {text}}}"#), format!(r#"{{{text}, "score": {other}}}"#)]
    }).collect();
    lines.push(r#"{"\ud800": 1, "text": "first", "text": "last"}"#.into());
    let input = folder.path().join("in.jsonl");
    fs::write(&input, lines.join("\n")).unwrap();
    let summary = prepare(&corpus::args(&input, &folder.path().join("out"))).unwrap();
    let texts = (0..others.len()).map(|i| format!(r#"NaN, "Infinity" \ {i}"#)).chain(["last".to_string()]);
    assert_eq!((summary.bad_lines, text(&summary)), (0, texts.collect()));
}

/// A snapshot of a hub: the files are links into a folder of blobs.
#[test]
fn links_are_followed_and_circles_end() {
    let folder = tempfile::tempdir().unwrap();
    let [blobs, input] = ["blobs", "in"].map(|name| folder.path().join(name));
    let texts = corpus::write_corpus(&blobs, 51, 30);
    fs::create_dir_all(input.join("real")).unwrap();
    for i in 0..15 {
        symlink(blobs.join(format!("part-{}/{i}.txt", i % 7)), input.join(format!("{i}.txt"))).unwrap();
    }
    symlink(&blobs, input.join("a-folder")).unwrap();
    // Into itself, and two ways to one folder.
    symlink("..", input.join("real/up")).unwrap();
    symlink(&input, blobs.join("back")).unwrap();
    symlink("real", input.join("again")).unwrap();
    fs::write(input.join("real/x.txt"), "in a real folder").unwrap();
    let summary = prepare(&corpus::args(&input, &folder.path().join("out"))).unwrap();
    assert_eq!(text(&summary), texts.into_iter().chain(["in a real folder".to_string()]).collect());
    assert_eq!((summary.files, summary.left_out.len()), (15 + 30 + 1, 0));
}

#[test]
fn inputs_that_overlap_list_each_file_once() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    let texts = corpus::write_corpus(&input, 55, 30);
    symlink(&input, folder.path().join("link")).unwrap();
    let ways = ["in/part-1", "in", "in/part-2/../part-2", "link/part-3", "in/part-4/4.txt"].map(|way| folder.path().join(way));
    let bytes: u64 = texts.iter().map(|text| text.len() as u64).sum();
    let mut made = Vec::new();
    for (name, inputs) in [("there", ways.to_vec()), ("back", ways.iter().rev().cloned().collect())] {
        let mut args = corpus::args(&input, &folder.path().join(name));
        args.inputs = inputs;
        let summary = prepare(&args).unwrap();
        assert_eq!((summary.files, summary.text_bytes), (30, bytes));
        made.push(folder_bytes(&summary.out));
    }
    assert!(made[0] == made[1], "in whatever order they are named");
}

#[test]
fn a_corpus_is_no_input_of_another_nor_of_itself() {
    let folder = tempfile::tempdir().unwrap();
    let texts = corpus::write_corpus(folder.path(), 52, 30);
    let mut args = corpus::args(folder.path(), &folder.path().join("first"));
    prepare(&args).unwrap();
    args.out = folder.path().join("second");
    // Interrupted, and gone on with.
    let cut = folder.path().join("z.parquet");
    fs::write(&cut, "PAR1").unwrap();
    prepare(&args).unwrap_err();
    let mut third = args.clone();
    third.out = folder.path().join("third");
    prepare(&third).unwrap_err();
    fs::remove_file(cut).unwrap();
    let summary = prepare(&args).unwrap();
    assert_eq!((summary.files, text(&summary)), (30, texts.into_iter().collect()));
    // The first corpus and the third's work, but not its own.
    assert_eq!(left_out(&summary).iter().map(|(reason, files, ..)| (*reason, *files)).collect::<Vec<_>>(), [("folders that prepare wrote", 2)]);
}

#[test]
fn an_input_that_changed_since_the_interruption_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    corpus::write_corpus(&input, 53, 30);
    let args = corpus::args(&input, &folder.path().join("out"));
    let (cut, changed) = (input.join("z.parquet"), input.join("a.txt"));
    fs::write(&changed, "the first version").unwrap();
    // A group of its own, which is done before the one with the bad file.
    fs::write(input.join("b.txt"), "filler\n".repeat(1_300_000)).unwrap();
    fs::write(&cut, "PAR1").unwrap();
    prepare(&args).unwrap_err();
    // Of the same length.
    fs::write(&changed, "the other version").unwrap();
    fs::remove_file(cut).unwrap();
    let found = text(&prepare(&args).unwrap());
    assert!(found.contains("the other version") && !found.contains("the first version"));
}

#[test]
fn a_path_that_is_not_utf8_is_a_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    let odd = OsStr::from_bytes(b"odd\xff");
    fs::create_dir_all(input.join(odd)).unwrap();
    fs::write(input.join(odd).join("a.txt"), "text").unwrap();
    let args = corpus::args(&input, &folder.path().join("out"));
    let error = prepare(&args).unwrap_err();
    assert!(matches!(&error, DataError::BadInput { path, .. } if path.ends_with("a.txt")) && error.to_string().contains("not UTF-8"), "{error}");
    let refused = |change: &dyn Fn(&mut PrepareArgs), expected: &str| {
        let mut args = args.clone();
        change(&mut args);
        let error = prepare(&args).unwrap_err();
        assert!(matches!(&error, DataError::BadOption { option, .. } if *option == expected), "{error}");
    };
    refused(&|args| args.inputs = vec![input.join(odd)], "PATH");
    refused(&|args| args.out = folder.path().join(odd), "--out");
    refused(&|args| (args.vocab, args.tokenizer) = (None, Some(odd.into())), "--tokenizer");
}

/// First one that would end by itself, were it read.
#[test]
fn what_is_no_regular_file_is_refused_and_not_opened() {
    let folder = tempfile::tempdir().unwrap();
    let [link, socket, pipe] = ["link.txt", "socket.jsonl", "pipe.jsonl"].map(|name| folder.path().join(name));
    symlink("/dev/null", &link).unwrap();
    let _bound = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for input in ["/dev/null".into(), link, socket, pipe, "/dev/zero".into()] {
        let error = prepare(&corpus::args(&input, &folder.path().join("out"))).unwrap_err();
        assert!(matches!(&error, DataError::BadInput { path, .. } if *path == input), "{error}");
        assert!(error.to_string().ends_with(": no regular file; write it to one"), "{error}");
    }
}

#[test]
fn a_document_longer_than_a_page_holds_is_named_with_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    corpus::write_corpus(&input, 54, 10);
    // Nothing but a length: the file is not looked into.
    fs::File::create(input.join("big.txt")).unwrap().set_len((1 << 28) + 1).unwrap();
    let mut args = corpus::args(&input, &folder.path().join("out"));
    let said = prepare(&args).unwrap_err().to_string();
    assert!(said.contains("big.txt: a document of 268435457 bytes, the limit is 268435456; --max-file-bytes"), "{said}");
    assert!(!args.out.with_added_extension("partial").exists(), "said before anything is read");
    let named = PrepareArgs { inputs: vec![input.join("big.txt")], ..args.clone() };
    let said = prepare(&named).unwrap_err().to_string();
    assert!(said.ends_with("the limit is 268435456"), "the option leaves out no file that is named: {said}");
    args.out = folder.path().join("without");
    args.max_file_bytes = Some(1 << 28);
    assert_eq!(prepare(&args).unwrap().left_out["larger than --max-file-bytes"].largest, "big.txt");
}

/// Files written in one order or the other are listed in orders of their own.
#[test]
fn max_bytes_takes_a_part_that_does_not_depend_on_the_listing() {
    let folder = tempfile::tempdir().unwrap();
    let sizes: Vec<usize> = (0..200).map(|i| 100 + i * 7).collect();
    let write = |name: &str, order: &mut dyn Iterator<Item = usize>| {
        let input = folder.path().join(name);
        fs::create_dir_all(&input).unwrap();
        order.for_each(|i| fs::write(input.join(format!("{i}.txt")), &format!("{i} ").repeat(sizes[i])[..sizes[i]]).unwrap());
        input
    };
    let taken = |input: &Path, out: &str, seed| {
        let mut args = corpus::args(input, &folder.path().join(out));
        (args.max_bytes, args.seed) = (Some(40_000), seed);
        let summary = prepare(&args).unwrap();
        let beyond = &summary.left_out["beyond --max-bytes"];
        assert_eq!(summary.files + beyond.files, 200);
        assert_eq!(summary.text_bytes + beyond.bytes, sizes.iter().sum::<usize>() as u64);
        // The last file taken crosses the limit and is whole.
        assert!((40_000..40_000 + 1500).contains(&summary.text_bytes), "{}", summary.text_bytes);
        (text(&summary).into_iter().collect::<BTreeSet<_>>(), folder_bytes(&summary.out))
    };
    let up = taken(&write("up", &mut (0..200)), "out-up", 3);
    let down = taken(&write("down", &mut (0..200).rev()), "out-down", 3);
    assert!(up == down);
    let first: BTreeSet<String> = (0..up.0.len()).map(|i| format!("{i} ").repeat(sizes[i])[..sizes[i]].to_owned()).collect();
    assert_ne!(up.0, first, "not simply the first by name");
    let other = taken(&folder.path().join("up"), "out-other", 4);
    assert_ne!(up.0, other.0, "another seed takes others");
}

#[test]
fn lines_by_any_of_their_names_are_documents() {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (0..40).map(|i| format!("{{\"text\": \"document {i}\"}}\n")).collect();
    // As from a pipe: of unknown length, and looking back further than a reader allows by itself.
    let mut long = zstd::Encoder::new(Vec::new(), 1).unwrap();
    long.long_distance_matching(true).and_then(|()| long.window_log(30)).unwrap();
    std::io::Write::write_all(&mut long, lines.as_bytes()).unwrap();
    for (name, bytes) in [("a.json", lines.clone().into_bytes()), ("b.ndjson", lines.clone().into_bytes()), ("c.jsonl.zst", long.finish().unwrap())] {
        let input = folder.path().join(name);
        fs::write(&input, bytes).unwrap();
        let summary = prepare(&corpus::args(&input, &folder.path().join(format!("out-{name}")))).unwrap();
        assert_eq!((summary.documents, text(&summary).contains("document 39")), (40, true), "{name}");
    }
}

#[test]
fn max_bytes_counts_text_and_not_what_it_is_packed_into() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    fs::create_dir_all(&input).unwrap();
    let mut random = corpus::Random(57);
    for file in 0..10 {
        let lines: String = (0..40).map(|_| format!("{}\n", serde_json::json!({"text": corpus::text(&mut random, 400)}))).collect();
        fs::write(input.join(format!("{file}.jsonl.zst")), zstd::encode_all(lines.as_bytes(), 3).unwrap()).unwrap();
    }
    let packed = fs::metadata(input.join("0.jsonl.zst")).unwrap().len();
    let mut args = corpus::args(&input, &folder.path().join("out"));
    args.max_bytes = Some(6 * packed);
    let summary = prepare(&args).unwrap();
    assert_eq!(summary.files, 2, "a packed file holds about four times its size: {} bytes", summary.text_bytes);
}

#[test]
fn a_byte_order_mark_is_no_text() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    corpus::write_corpus(&input, 58, 10);
    fs::write(input.join("marked.txt"), "\u{feff}a text of an editor").unwrap();
    let found = text(&prepare(&corpus::args(&input, &folder.path().join("out"))).unwrap());
    assert!(found.contains("a text of an editor"));
}

#[test]
fn what_is_said_of_a_corpus_in_the_input_does_not_depend_on_where_that_lies() {
    let folder = tempfile::tempdir().unwrap();
    let made = corpus::prepared(folder.path(), 59, 20);
    let of = |place: &str| {
        let input = folder.path().join(place);
        corpus::write_corpus(&input, 60, 10);
        fs::create_dir_all(input.join("old")).unwrap();
        fs::copy(made.join("manifest.json"), input.join("old/manifest.json")).unwrap();
        let summary = prepare(&corpus::args(&input, &folder.path().join(format!("out-{place}")))).unwrap();
        assert_eq!(left_out(&summary), [("folders that prepare wrote", 1, 0, "old")]);
    };
    of("here");
    of("there");
}

#[test]
fn what_was_read_of_files_that_are_gone_takes_no_room() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    corpus::write_corpus(&input, 61, 10);
    let args = corpus::args(&input, &folder.path().join("out"));
    let (large, cut, whole) = (input.join("y.txt"), input.join("z.parquet"), parquet_of(&["rows".to_string()]));
    // A group of its own, which is done before the one with the bad file.
    fs::write(&large, "filler\n".repeat(1_300_000)).unwrap();
    fs::write(&cut, vec![0; whole.len()]).unwrap();
    let written = fs::metadata(&cut).unwrap().modified().unwrap();
    prepare(&args).unwrap_err();
    let spill = args.out.with_added_extension("partial").join("spill");
    let bytes = || fs::read_dir(&spill).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum::<u64>();
    assert!(bytes() > 9_000_000, "it was read");
    fs::remove_file(large).unwrap();
    prepare(&args).unwrap_err();
    // It can be read now, and looks as before; then a tokenizer's file that is none is in the way.
    fs::write(&cut, whole).unwrap();
    fs::File::options().write(true).open(&cut).unwrap().set_modified(written).unwrap();
    fs::create_dir_all(args.out.with_added_extension("partial").join("out/tokenizer.json")).unwrap();
    let said = prepare(&args).unwrap_err().to_string();
    assert!(said.contains("tokenizer.json"), "{said}");
    assert!(bytes() < 1_000_000, "{} bytes", bytes());
}

#[test]
fn what_was_read_before_a_tokenizer_turned_out_to_be_lossy_is_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let made = corpus::prepared(folder.path(), 62, 60).join("tokenizer.json");
    let mut lower: serde_json::Value = serde_json::from_slice(&fs::read(made).unwrap()).unwrap();
    lower["normalizer"] = serde_json::json!({"type": "Lowercase"});
    let (input, tokenizer) = (folder.path().join("in"), folder.path().join("lower.json"));
    fs::create_dir(&input).unwrap();
    fs::write(&tokenizer, lower.to_string()).unwrap();
    // A group of its own, which is done before the one with the text that changes.
    fs::write(input.join("a.txt"), "filler\n".repeat(1_300_000)).unwrap();
    fs::write(input.join("b.txt"), "LATE").unwrap();
    let mut args = corpus::args(&input, &folder.path().join("out"));
    (args.vocab, args.tokenizer, args.threads) = (None, Some(tokenizer), 1);
    let said = prepare(&args).unwrap_err().to_string();
    assert!(said.contains("becomes \"late\""), "{said}");
    let work = args.out.with_added_extension("partial");
    let groups = || {
        let names = fs::read_dir(work.join("spill")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".json")).collect::<BTreeSet<_>>()
    };
    let before = groups();
    assert_eq!(before.len(), 1);
    // Stopped behind the inputs.
    fs::create_dir_all(work.join("out/tokenizer.json")).unwrap();
    args.lossy_tokenizer = true;
    let said = prepare(&args).unwrap_err().to_string();
    assert!(said.contains("tokenizer.json"), "{said}");
    assert!(groups().is_superset(&before) && groups().len() == 2);
}
