//! Opening and searching a 14.8T-token source whose index is made up (the data is not there), and
//! the same at 1/10, 1/100 and 1/1000 of its size. One JSON object a line.
//! `cargo run --release -p data --example bench_index -- FOLDER`

use std::path::Path;
use std::time::Instant;

use data::format::index::{Index, IndexWriter};
use data::format::manifest::{FORMAT, MANIFEST_FILE, Manifest, Recipe, Stream};
use data::format::shard::RowGroupInfo;
use data::{DataError, Loader, LoaderOptions, OrderSpec, Retry, Source, Split, Store};

const GROUP_TOKENS: u64 = 1_480_000;
const GROUPS_PER_SHARD: u64 = 500;

fn main() -> Result<(), DataError> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "bench-index".into());
    for num_groups in [10_000u64, 100_000, 1_000_000, 10_000_000] {
        let folder = Path::new(&folder).join(num_groups.to_string());
        synthesise(&folder, num_groups)?;
        measure(&folder, num_groups)?;
        std::fs::remove_dir_all(&folder).expect("the folder was just made");
    }
    Ok(())
}

fn synthesise(folder: &Path, num_groups: u64) -> Result<(), DataError> {
    std::fs::create_dir_all(folder).expect("cannot make the folder");
    let write = |split: Split, groups: u64| {
        let path = folder.join(split.index_file());
        let lengths = vec![GROUPS_PER_SHARD * GROUP_TOKENS * 4; groups.div_ceil(GROUPS_PER_SHARD) as usize];
        let mut writer = IndexWriter::create(&path, groups, &lengths)?;
        for group in 0..groups {
            // Row groups end where a document does, so no two are alike.
            let tokens = GROUP_TOKENS - 500 + group * 7919 % 1000;
            let (shard, place) = ((group / GROUPS_PER_SHARD) as u32, group % GROUPS_PER_SHARD);
            let xxh3 = u128::from(group);
            let info = RowGroupInfo { tokens, documents: 1400, offset: 4 + place * tokens * 4, bytes: tokens * 4, xxh3 };
            writer.push(shard, place as u32, &info)?;
        }
        let (root, tokens, documents) = writer.finish()?;
        let index_blake3 = blake3::Hash::from(root).to_string();
        Ok::<_, DataError>(Stream { tokens, documents, shards: lengths.len() as u64, row_groups: groups, index_blake3 })
    };
    let recipe = Recipe {
        seed: 0, held_out: 0.0, fim_rate: 0.0, split_rate: 0.0, files: 0, skipped_files: 0, text_bytes: 0, duplicates: 0, empty_documents: 0, bad_lines: 0,
        left_out: Default::default(),
    };
    let manifest = Manifest {
        format: FORMAT.into(),
        vocab_size: 129_280,
        end_token: 1,
        tokenizer_blake3: String::new(),
        train: write(Split::Train, num_groups)?,
        held_out: write(Split::HeldOut, 1)?,
        prepare: recipe,
        unigram_entropy: 0.0,
    };
    let text = serde_json::to_string(&manifest).expect("plain structs serialise");
    std::fs::write(folder.join(MANIFEST_FILE), text).expect("cannot write the manifest");
    Ok(())
}

fn measure(folder: &Path, num_groups: u64) -> Result<(), DataError> {
    let start = Instant::now();
    let source = Source { path: folder.to_owned(), weight: 1.0 };
    let spec = OrderSpec { sources: vec![source], sequence_length: 4096, seed: 1, phase: 0, split: Split::Train };
    let loader = Loader::open(spec, LoaderOptions::default())?;
    let open_ms = start.elapsed().as_secs_f64() * 1e3;
    let n = loader.num_samples();
    let start = Instant::now();
    let mut sum = 0;
    for i in 0..10_000 {
        sum ^= loader.locate(i * (n / 10_000))?.sample;
    }
    let locate_us = start.elapsed().as_secs_f64() * 1e6 / 1e4;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("cannot start tokio");
    let (tokens, seeks_ms) = runtime.block_on(async {
        let store = Store::open(folder, Retry::default())?;
        let manifest: Manifest = serde_json::from_slice(&store.read_all(MANIFEST_FILE).await?).expect("just written");
        let index = Index::open(&store, Split::Train.index_file(), &manifest.train.index_blake3).await?;
        let tokens = index.num_tokens();
        let mut seeks_ms = Vec::new();
        for i in 0..1000u64 {
            // Far apart, so that almost every one reads a block of its own.
            let token = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % tokens;
            let start = Instant::now();
            let (_, record) = index.find(&store, token).await?;
            seeks_ms.push(start.elapsed().as_secs_f64() * 1e3);
            assert!((record.first_token..record.first_token + record.info.tokens).contains(&token));
        }
        seeks_ms.sort_by(f64::total_cmp);
        Ok::<_, DataError>((tokens, seeks_ms))
    })?;
    println!(
        "{}",
        serde_json::json!({
            "row_groups": num_groups, "tokens": tokens, "samples": n, "open_ms": open_ms,
            "locate_us": locate_us, "seek_ms_median": seeks_ms[500], "seek_ms_max": seeks_ms[999],
            "resident_mb": resident_mb(), "check": sum & 1,
        })
    );
    Ok(())
}

fn resident_mb() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<f64>().ok());
    pages.unwrap_or(0.0) * 4096.0 / 1e6
}
