//! The encoder alone on the texts of some parquet files (column `text`), one JSON object:
//!
//!     bench_encode speed   TOKENIZER.json FOLDER    tokens per core-second, one thread, everything in memory
//!     bench_encode compare TOKENIZER.json FOLDER    every document's ids and text against Hugging Face's
//!                                                   `tokenizers`, on all threads; exit code 1 at a difference
//!
//! `cargo run --release -p data --example bench_encode -- …`; the short form is `tests/it/tokenizer.rs`.

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow::array::AsArray;
use data::{DataError, Tokenizer, open_tokenizer};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use rayon::prelude::*;

fn main() -> Result<ExitCode, DataError> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [mode, tokenizer, folder] = args.as_slice() else { panic!("speed|compare TOKENIZER.json FOLDER") };
    let fast = open_tokenizer(tokenizer)?;
    assert!(fast.is_fast(), "the fast encoder refused this tokenizer");
    let texts = texts(Path::new(folder));
    match mode.as_str() {
        "speed" => speed(&fast, &texts),
        _ => compare(&fast, &open_tokenizer(tokenizer)?.into_reference()?, &texts),
    }
}

fn texts(folder: &Path) -> Vec<String> {
    let mut files: Vec<_> = std::fs::read_dir(folder).expect("cannot list").map(|entry| entry.expect("an entry").path()).collect();
    files.sort();
    let mut texts = Vec::new();
    for file in files {
        let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(&file).expect("cannot open")).expect("not parquet");
        let mask = ProjectionMask::columns(builder.parquet_schema(), ["text"]);
        for batch in builder.with_projection(mask).build().expect("cannot read") {
            let batch = batch.expect("cannot read");
            texts.extend(batch.column(0).as_string::<i32>().iter().flatten().map(String::from));
        }
    }
    texts
}

fn speed(tokenizer: &Tokenizer, texts: &[String]) -> Result<ExitCode, DataError> {
    let start = cpu_seconds();
    let mut tokens = 0;
    for text in texts {
        tokens += tokenizer.encode_document(text)?.len();
    }
    let cpu = cpu_seconds() - start;
    let bytes: usize = texts.iter().map(String::len).sum();
    println!(
        "{}",
        serde_json::json!({
            "documents": texts.len(), "bytes": bytes, "tokens": tokens, "cpu_s": cpu,
            "mtokens_per_cpu_s": tokens as f64 / cpu / 1e6,
        })
    );
    Ok(ExitCode::SUCCESS)
}

fn compare(fast: &Tokenizer, reference: &Tokenizer, texts: &[String]) -> Result<ExitCode, DataError> {
    let (bytes, tokens, wrong) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let cjk = AtomicU64::new(0);
    texts.par_iter().enumerate().try_for_each(|(number, text)| {
        let ids = fast.encode_document(text)?;
        bytes.fetch_add(text.len() as u64, Ordering::Relaxed);
        tokens.fetch_add(ids.len() as u64, Ordering::Relaxed);
        let ideographs = text.chars().filter(|c| matches!(c, '\u{3040}'..='\u{30ff}' | '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7a3}'));
        cjk.fetch_add(3 * ideographs.count() as u64, Ordering::Relaxed);
        let same = ids == reference.encode_document(text)? && fast.encode(text)? == reference.encode(text)?;
        if !same || fast.decode(&ids)? != *text {
            wrong.fetch_add(1, Ordering::Relaxed);
            eprintln!("document {number} differs: {:?}…", text.chars().take(80).collect::<String>());
        }
        Ok::<_, DataError>(())
    })?;
    let [bytes, cjk, tokens, wrong] = [bytes, cjk, tokens, wrong].map(AtomicU64::into_inner);
    println!(
        "{}",
        serde_json::json!({
            "documents": texts.len(), "bytes": bytes, "cjk_bytes": cjk, "tokens": tokens, "documents_that_differ": wrong,
        })
    );
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// User and system time of this process; the clock of /proc ticks a hundred times a second.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}
