//! Whether a corpus's packed samples decode back to the documents it was made of, byte for byte, each once, fill-in-the-middle
//! undone. The samples are read in training order, put together to the stream, and cut at end tokens. Prints JSON; exit code
//! 1 at a difference.
//! `cargo run --release -p data --example check_corpus -- CORPUS TEXT [LENGTH]`; TEXT: a folder of parquet, column `text`.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use arrow::array::AsArray;
use data::{DataError, Loader, LoaderOptions, OrderSpec, Source, Split, decode_document, open_tokenizer};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use rayon::prelude::*;

fn main() -> Result<ExitCode, DataError> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [corpus, text, length @ ..] = args.as_slice() else { panic!("CORPUS TEXT [LENGTH]") };
    let length = length.first().map_or(4096, |length| length.parse().expect("a number of tokens"));
    let expected = documents(Path::new(text));
    let tokenizer = open_tokenizer(Path::new(corpus).join("tokenizer.json"))?;
    let fim = tokenizer.fim_tokens();
    let (mut found, mut again, mut turned, mut samples) = (HashSet::new(), 0u64, 0u64, 0);
    for split in [Split::Train, Split::HeldOut] {
        let (stream, end, read) = stream(Path::new(corpus), split, length)?;
        samples += read;
        let documents: Vec<&[u32]> = stream.split_inclusive(|id| *id == end).collect();
        turned += documents.iter().filter(|ids| fim.is_some_and(|fim| ids[0] == fim.begin)).count() as u64;
        let hashes = documents.par_iter().map(|ids| decode_document(&tokenizer, ids, end).map(|text| blake3::hash(text.as_bytes())));
        for hash in hashes.collect::<Result<Vec<_>, _>>()? {
            again += u64::from(!found.insert(hash));
        }
    }
    let (lost, foreign) = (expected.difference(&found).count(), found.difference(&expected).count());
    println!(
        "{}",
        serde_json::json!({
            "samples": samples, "sequence_length": length, "documents": found.len(), "fill_in_the_middle": turned,
            "lost": lost, "twice": again, "foreign": foreign,
        })
    );
    Ok(if lost == 0 && again == 0 && foreign == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The token stream out of the samples of one epoch, its end token, and the number of samples.
fn stream(corpus: &Path, split: Split, length: usize) -> Result<(Vec<u32>, u32, u64), DataError> {
    let open = |sequence_length| {
        let sources = vec![Source { path: PathBuf::from(corpus), weight: 1.0 }];
        Loader::open(OrderSpec { sources, sequence_length, seed: 1, phase: 0, split }, LoaderOptions::default())
    };
    let loader = open(length)?;
    let (samples, unused) = (loader.num_samples(), loader.unused_tokens()[0]);
    let mut stream = vec![u32::MAX; (samples * length as u64 + 1 + unused) as usize];
    for first in (0..samples).step_by(64) {
        for sample in loader.read(&(first..samples.min(first + 64)).collect::<Vec<_>>())? {
            let at = loader.locate(sample.index)?.sample as usize * length;
            stream[at..at + length + 1].copy_from_slice(&sample.tokens);
        }
    }
    // The rest that fills no sample: as samples of one token, which the order leaves in the last window.
    let (single, rest) = (open(1)?, samples * length as u64..samples * length as u64 + unused);
    let last = (0..single.num_samples()).rev().filter(|i| single.locate(*i).is_ok_and(|place| rest.contains(&place.sample)));
    for sample in single.read(&last.take(unused as usize).collect::<Vec<_>>())? {
        stream[single.locate(sample.index)?.sample as usize + 1] = sample.tokens[1];
    }
    Ok((stream, loader.end_token(), samples))
}

fn documents(folder: &Path) -> HashSet<blake3::Hash> {
    let mut hashes = HashSet::new();
    for file in std::fs::read_dir(folder).expect("cannot list").map(|entry| entry.expect("an entry").path()) {
        let builder = ParquetRecordBatchReaderBuilder::try_new(File::open(&file).expect("cannot open")).expect("not parquet");
        let mask = ProjectionMask::columns(builder.parquet_schema(), ["text"]);
        for batch in builder.with_projection(mask).build().expect("cannot read") {
            let batch = batch.expect("cannot read");
            hashes.extend(batch.column(0).as_string::<i32>().iter().flatten().map(|text| blake3::hash(text.as_bytes())));
        }
    }
    hashes
}
