//! Ids of the fast encoder against those of Hugging Face's `tokenizers` on every text file of some
//! folders, in parallel: the long form of `tests/it/tokenizer.rs`. Exit code 1 at a difference.
//! `cargo run --release -p data --example compare_tokenizer -- TOKENIZER.json MEGABYTES FOLDER…`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use data::{DataError, open_tokenizer};
use rayon::prelude::*;

fn main() -> Result<ExitCode, DataError> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [tokenizer, megabytes, folders @ ..] = args.as_slice() else {
        panic!("TOKENIZER.json MEGABYTES FOLDER…");
    };
    let fast = open_tokenizer(tokenizer)?;
    let reference = open_tokenizer(tokenizer)?.into_reference()?;
    assert!(fast.is_fast(), "nothing to compare: the fast encoder refused this tokenizer");
    let (mut texts, mut left) = (Vec::new(), megabytes.parse::<usize>().expect("a number of megabytes") * 1_000_000);
    for folder in folders {
        // An even share of what is left to each folder, so that no kind of text is missing.
        let mut share = left / (folders.len() - folders.iter().position(|f| f == folder).unwrap_or(0));
        let before = share;
        gather(Path::new(folder), &mut texts, &mut share);
        left -= before - share;
    }
    let (bytes, tokens, wrong) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    texts.par_iter().try_for_each(|(path, text)| {
        let ids = fast.encode_document(text)?;
        bytes.fetch_add(text.len() as u64, Ordering::Relaxed);
        tokens.fetch_add(ids.len() as u64, Ordering::Relaxed);
        let same = ids == reference.encode_document(text)? && fast.encode(text)? == reference.encode(text)?;
        if !same || fast.decode(&ids)? != *text {
            wrong.fetch_add(1, Ordering::Relaxed);
            eprintln!("{}: differs", path.display());
        }
        Ok::<_, DataError>(())
    })?;
    let [bytes, tokens, wrong] = [bytes, tokens, wrong].map(AtomicU64::into_inner);
    println!("{}", serde_json::json!({"files": texts.len(), "bytes": bytes, "tokens": tokens, "files_that_differ": wrong}));
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn gather(folder: &Path, texts: &mut Vec<(PathBuf, String)>, left: &mut usize) {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
    entries.sort();
    for path in entries {
        if *left == 0 {
            return;
        }
        if path.is_dir() && !path.is_symlink() {
            gather(&path, texts, left);
        } else if let Ok(text) = std::fs::read_to_string(&path)
            && !text.is_empty()
            && text.len() < 4_000_000
        {
            *left = left.saturating_sub(text.len());
            texts.push((path, text));
        }
    }
}
