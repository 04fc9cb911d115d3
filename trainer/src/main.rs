//! The `tiefsee` command.
mod bench;
mod environment;
mod plan;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use parallel::comm::Comm;
use parallel::comm::local::solo;
use parallel::comm::mpi::MpiWorld;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tch::Kind;
use trainer::checkpoint::hf::Values;
use trainer::coordinator::StopSignal;
use trainer::run::{Start, StateLost, resolved, train};
use trainer::{RunConfig, checkpoint};

/// Stopped on request, with a checkpoint: resume me (EX_TEMPFAIL).
const EXIT_STOPPED: u8 = 75;
/// What this world held is damaged: start it again, from its newest whole checkpoint.
const EXIT_STATE_LOST: u8 = 76;

#[derive(Parser)]
#[command(name = "tiefsee", version, about = "Pre-trains DeepSeek-V3-class models.")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Text to a corpus of tokenised parquet shards.
    #[command(after_help = "Example: tiefsee prepare src docs --out corpus/mine --vocab 8192")]
    Prepare(data::PrepareArgs),
    /// Start a run.
    #[command(after_help = "Example: mpirun -n 2 tiefsee train --config configs/run/quickstart.toml --set run.dir=runs/a")]
    Train {
        #[arg(long)]
        config: PathBuf,
        /// Override a key; may be repeated. A phase's keys are phase.0.lr and so on.
        #[arg(long = "set", value_name = "section.key=value")]
        set: Vec<String>,
    },
    /// Go on from a run's newest whole checkpoint, on any number of ranks its batches divide by.
    #[command(after_help = "Example: mpirun -n 2 tiefsee resume runs/a")]
    Resume {
        run_dir: PathBuf,
        /// Checkpoint and stop once so many steps are done in all.
        #[arg(long)]
        stop_after: Option<u64>,
    },
    /// Look into a checkpoint, check it, or exchange it with Hugging Face transformers.
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Parameters and memory of a model, from its config alone; or a pipeline schedule, proven and drawn.
    #[command(
        args_conflicts_with_subcommands = true,
        after_help = "Examples: tiefsee plan configs/model/v3-671b.toml\n          tiefsee plan schedule --pp 16 --micro-batches 120 --schedule dualpipe --svg out.svg"
    )]
    Plan(plan::Args),
    /// Time training steps on random tokens; prints JSON. See scripts/bench.sh.
    #[command(hide = true)]
    Bench(bench::Args),
}

#[derive(Subcommand)]
enum CheckpointCommand {
    /// Print what a checkpoint holds.
    Show { checkpoint: PathBuf },
    /// Read every byte and check it against the manifest.
    #[command(after_help = "Example: tiefsee checkpoint verify runs/a/checkpoints/step-00001000")]
    Verify { checkpoint: PathBuf },
    /// Write a folder that transformers loads as it is.
    #[command(
        name = "export-hf",
        after_help = "Example: tiefsee checkpoint export-hf runs/a/checkpoints/step-00001000 exported --dtype bf16"
    )]
    ExportHf {
        checkpoint: PathBuf,
        out: PathBuf,
        #[arg(long, value_enum, default_value = "bf16")]
        dtype: Dtype,
        /// The moving average of the weights instead of the newest ones.
        #[arg(long)]
        ema: bool,
    },
    /// The inverse: weights for run.init_from, written as RUN_DIR/checkpoints/step-00000000.
    #[command(name = "import-hf", after_help = "Example: tiefsee checkpoint import-hf exported runs/imported")]
    ImportHf { folder: PathBuf, run_dir: PathBuf },
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    Bf16,
    F32,
    F64,
}

fn main() -> ExitCode {
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).with_ansi(colours).init();
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Prepare(args) => {
            data::prepare(&args)?;
        }
        Command::Train { config, set } => return in_world(|| RunConfig::load(&config, &set), Start::Fresh),
        Command::Resume { run_dir, stop_after } => return in_world(|| load_resolved(&run_dir, stop_after), Start::Resume),
        Command::Checkpoint(command) => checkpoint_command(command)?,
        Command::Plan(args) => plan::run(args)?,
        Command::Bench(args) => bench::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn load_resolved(run_dir: &Path, stop_after: Option<u64>) -> Result<RunConfig> {
    let mut config = RunConfig::load(&resolved(run_dir), &[]).with_context(|| format!("{} is not a run directory", run_dir.display()))?;
    // A run directory may have been moved since.
    config.run.dir = std::path::absolute(run_dir)?;
    config.run.stop_after = stop_after;
    Ok(config)
}

/// One rank of a run. Every failure ends the whole world: a peer that waits for this rank would wait for ever.
fn in_world(config: impl FnOnce() -> Result<RunConfig>, start: Start) -> Result<ExitCode> {
    let mpi = if environment::launched_by_mpi() { Some(MpiWorld::init()?) } else { None };
    let world: Comm = mpi.as_ref().map_or_else(solo, MpiWorld::comm);
    let rank = world.rank();
    abort_on_panic(rank);
    let outcome = config().and_then(|config| {
        tch::set_num_threads(threads(&config));
        train(&config, world.clone(), start, &StopSignal::listen()?)
    });
    match outcome {
        Ok(outcome) if outcome.summary.finished => Ok(ExitCode::SUCCESS),
        Ok(_) => Ok(ExitCode::from(EXIT_STOPPED)),
        Err(error) => {
            let text = format!("{error:#}");
            // "rank N: …" was another rank's failure, which it prints itself; a lost state is every rank's.
            let (lost, others) = (error.is::<StateLost>(), text.starts_with("rank "));
            if rank == 0 || !lost && !others {
                eprintln!("error (rank {rank}): {text}");
            }
            if let Some(mpi) = mpi {
                std::thread::sleep(std::time::Duration::from_millis(300)); // let every rank print its reason
                mpi.abort(if lost { EXIT_STATE_LOST.into() } else { 1 });
            }
            Ok(ExitCode::from(if lost { EXIT_STATE_LOST } else { 1 }))
        }
    }
}

/// A panic on one rank of several must end them all.
fn abort_on_panic(rank: usize) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        eprintln!("rank {rank} panicked");
        print(info);
        std::process::abort();
    }));
}

fn threads(config: &RunConfig) -> i32 {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let shared = (cores / environment::ranks_here()).max(1);
    if config.run.threads > 0 { config.run.threads as i32 } else { shared as i32 }
}

fn checkpoint_command(command: CheckpointCommand) -> Result<()> {
    match command {
        CheckpointCommand::Show { checkpoint } => {
            let manifest = checkpoint::verify(&checkpoint)?;
            let bytes: u64 = manifest.files.iter().map(|file| file.bytes).sum();
            println!("{}: step {}, {} tokens, {} updates", checkpoint.display(), manifest.step, manifest.tokens, manifest.updates);
            println!(
                "{:?}, written by {} rank(s); next sample {} of order {}",
                manifest.precision, manifest.mesh.world, manifest.cursor.next, manifest.cursor.order
            );
            println!("{} tensors in {} file(s), {:.1} MB", manifest.tensors.len(), manifest.files.len(), bytes as f64 / 1e6);
            for (name, tensor) in &manifest.tensors {
                println!("  {:<6} {:?} {name}", tensor.dtype, tensor.shape);
            }
        }
        CheckpointCommand::Verify { checkpoint } => {
            let manifest = checkpoint::verify(&checkpoint)?;
            println!(
                "{}: whole ({} files, {} tensors, step {})",
                checkpoint.display(),
                manifest.files.len(),
                manifest.tensors.len(),
                manifest.step
            );
        }
        CheckpointCommand::ExportHf { checkpoint, out, dtype, ema } => {
            let kind = match dtype {
                Dtype::Bf16 => Kind::BFloat16,
                Dtype::F32 => Kind::Float,
                Dtype::F64 => Kind::Double,
            };
            let values = if ema { Values::Averaged } else { Values::Newest };
            checkpoint::hf::export(&checkpoint, &out, kind, values)?;
            println!("{}", out.display());
        }
        CheckpointCommand::ImportHf { folder, run_dir } => println!("{}", checkpoint::hf::import(&folder, &run_dir, &solo())?.display()),
    }
    Ok(())
}
