//! `prepare` from the command line, with the summary, CPU seconds and peak memory as JSON on the last line:
//! `cargo run --release -p data --example bench_prepare -- PATH… --out DIR --vocab 8192`.

use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: data::PrepareArgs,
}

fn main() -> std::process::ExitCode {
    match data::prepare(&Cli::parse().args) {
        Ok(summary) => {
            let mut figures = serde_json::to_value(&summary).expect("plain structs serialise");
            let (cpu, tokens) = (cpu_seconds(), summary.train_tokens + summary.held_out_tokens);
            figures["cpu_s"] = cpu.into();
            figures["mtokens_per_cpu_s"] = (tokens as f64 / cpu / 1e6).into();
            figures["peak_mb"] = peak_mb().into();
            println!("{figures}");
            std::process::ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// User and system time of this process; the clock of /proc ticks a hundred times a second.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks = after_name.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}

fn peak_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kb = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kb.unwrap_or(0.0) / 1e3
}
