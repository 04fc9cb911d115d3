//! The `tiefsee-launch` command; see `tiefsee-launch --help`.
use clap::Parser;
use launch::args::Args;
use launch::guard::{GUARD, TIED, guard, tied};
use launch::heartbeat::{BEAT, VARIABLE, beat};
use launch::outcome::USAGE;
use launch::rank::{RANK, rank};
use launch::remote::{REACH, REMOTE, reach, remote};
use launch::supervise;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some(GUARD) if args.len() > 2 => ExitCode::from(guard(&args[1..])),
        Some(TIED) if args.len() > 1 => ExitCode::from(tied(&args[1..])),
        Some(RANK) if args.len() > 2 => ExitCode::from(rank(&args[1], &args[2..])),
        Some(BEAT) => match beat(&std::env::var(VARIABLE).unwrap_or_default()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE, // nobody reads what it says
        },
        Some(REACH) if args.len() > 3 => ExitCode::from(reach(&args[1], &args[2..])),
        Some(REMOTE) if args.len() > 3 => ExitCode::from(remote(&args[1], &args[2..])),
        _ => match supervise::run(Args::parse()) {
            Ok(code) => ExitCode::from(code),
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::from(USAGE)
            }
        },
    }
}
