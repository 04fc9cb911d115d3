//! Reading packed samples of 4096 + 1 tokens in training order, on one thread and with everything
//! verified: tokens per CPU-second, resume in mid-corpus, memory. One JSON object.
//! `cargo run --release -p data --example bench_read -- CORPUS [EPOCHS]`

use std::path::PathBuf;
use std::time::Instant;

use data::{DataError, Loader, LoaderOptions, OrderSpec, Source, Split};

const LENGTH: usize = 4096;
const BATCH: u64 = 8;

fn main() -> Result<(), DataError> {
    let mut args = std::env::args().skip(1);
    let path = PathBuf::from(args.next().expect("name a prepared corpus"));
    let epochs: u64 = args.next().map_or(3, |epochs| epochs.parse().expect("a number of epochs"));
    let source = Source { path, weight: 1.0 };
    let spec = OrderSpec { sources: vec![source], sequence_length: LENGTH, seed: 1, phase: 0, split: Split::Train };
    // Small enough that a second epoch reads again what the first has read.
    let options = LoaderOptions { cache_bytes: 40 << 20, ..LoaderOptions::default() };
    let loader = Loader::open(spec.clone(), options.clone())?;
    let total = loader.num_samples() * epochs;
    let (cpu, wall) = (cpu_seconds(), Instant::now());
    let (mut check, mut private, mut middle) = (0u64, 0.0f64, Vec::new());
    for start in (0..total).step_by(BATCH as usize) {
        let indices: Vec<u64> = (start..(start + BATCH).min(total)).collect();
        for sample in loader.read(&indices)? {
            check = check.wrapping_mul(31).wrapping_add(u64::from(sample.tokens[LENGTH / 2]));
            if sample.index == total / 2 {
                middle = sample.tokens;
            }
        }
        if start % (BATCH * 16) == 0 {
            private = private.max(private_mb());
        }
    }
    let (cpu, wall) = (cpu_seconds() - cpu, wall.elapsed().as_secs_f64());
    let tokens = total * LENGTH as u64;
    let start = Instant::now();
    let resumed = Loader::open(spec, options)?;
    let same = resumed.read(&[total / 2])?[0].tokens == middle;
    let resume_ms = start.elapsed().as_secs_f64() * 1e3;
    println!(
        "{}",
        serde_json::json!({
            "tokens": tokens, "cpu_s": cpu, "wall_s": wall, "mtokens_per_cpu_s": tokens as f64 / cpu / 1e6,
            "resume_ms": resume_ms, "same_after_resume": same, "private_mb": private, "check": check,
        })
    );
    Ok(())
}

/// User and system time of this process; the clock of /proc ticks a hundred times a second.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}

/// Memory that is not a map's.
fn private_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kb = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kb.unwrap_or(0.0) / 1e3
}
