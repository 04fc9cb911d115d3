//! `prepare` from the command line, with the summary as JSON on the last line:
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
            println!("{}", serde_json::to_string(&summary).expect("plain structs serialise"));
            std::process::ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
