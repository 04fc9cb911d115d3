//! The `tiefsee-launch` command; see `tiefsee-launch --help`.
use clap::Parser;
use launch::args::Args;
use launch::guard::{GUARD, TIED, guard, tied};
use launch::outcome::USAGE;
use launch::supervise;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some(GUARD) if args.len() > 2 => ExitCode::from(guard(&args[1..])),
        Some(TIED) if args.len() > 2 => ExitCode::from(tied(&args[1..])),
        _ => match supervise::run(Args::parse()) {
            Ok(code) => ExitCode::from(code),
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::from(USAGE)
            }
        },
    }
}
