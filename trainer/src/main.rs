//! The `tiefsee` command.
mod bench;
mod environment;
mod plan;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand, ValueEnum};
use parallel::comm::{Comm, CommError, Communicator};
use parallel::comm::local::solo;
use parallel::comm::mpi::MpiWorld;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tch::Kind;
use trainer::checkpoint::Retention;
use trainer::checkpoint::hf::{Format, Values};
use trainer::coordinator::{Shared, StopSignal, all_or_none, sharing_cores};
use trainer::run::{GaveUp, Start, StateLost, resolved, train};
use trainer::{RunConfig, checkpoint};

/// As clap has it: the command line, or the config that it names, is wrong.
const EXIT_USAGE: u8 = 2;
/// Stopped on request, with a checkpoint: resume me (EX_TEMPFAIL).
const EXIT_STOPPED: u8 = 75;
/// What this world held is damaged: start it again, from its newest whole checkpoint.
const EXIT_STATE_LOST: u8 = 76;
/// Too many steps in a row were skipped: another start would skip them again.
const EXIT_GAVE_UP: u8 = 77;

const EXIT_CODES: &str = "\
Exit codes:
  0   the run is finished
  1   an error, which is printed
  2   the command line, or the config by itself, is wrong
  75  stopped on request or by run.stop_after, with a checkpoint: resume it
  76  what the ranks held in memory was damaged: resume it, from the checkpoint before
  77  too many steps in a row were skipped, or all: a resume would skip them again";

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
    #[command(after_help = format!("Example: mpirun -n 2 tiefsee train --config configs/run/quickstart.toml --set run.dir=runs/a\n\n{EXIT_CODES}"))]
    Train {
        #[arg(long)]
        config: PathBuf,
        /// Override a key; may be repeated. A phase's keys are phase.0.lr and so on.
        #[arg(long = "set", value_name = "section.key=value")]
        set: Vec<String>,
    },
    /// Go on from a run's newest whole checkpoint, on any number of ranks its batches divide by.
    #[command(after_help = format!("Example: mpirun -n 2 tiefsee resume runs/a\n\n{EXIT_CODES}"))]
    Resume {
        run_dir: PathBuf,
        /// Checkpoint and stop once so many steps are done in all.
        #[arg(long)]
        stop_after: Option<u64>,
    },
    /// Look into a checkpoint, check it, or exchange it with Hugging Face transformers.
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Parameters of a model; steps and each rank's memory of a run, from its config alone; or a pipeline schedule, proven and drawn.
    #[command(
        args_conflicts_with_subcommands = true,
        after_help = "Examples: tiefsee plan configs/model/v3-671b.toml\n          tiefsee plan run configs/run/v3-671b.toml --ranks 2048\n          tiefsee plan schedule --pp 16 --micro-batches 120 --schedule dualpipe --svg out.svg"
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
    /// Read every byte and check it against the manifest: of one checkpoint, or of all that a run has.
    #[command(after_help = "Examples: tiefsee checkpoint verify runs/a/checkpoints/step-00001000\n          tiefsee checkpoint verify runs/a")]
    Verify { checkpoint: PathBuf },
    /// Write a checkpoint again with another number of files. A resume needs none of it: it reads any checkpoint on any layout.
    #[command(
        after_help = "Example: tiefsee checkpoint reshard runs/a/checkpoints/step-00001000 resharded/step-00001000 --files 64"
    )]
    Reshard {
        checkpoint: PathBuf,
        /// The new checkpoint; must not exist.
        out: PathBuf,
        #[arg(long)]
        files: usize,
    },
    /// Remove a run's old checkpoints. Counts none among the newest that lacks a file or a part of one; what is in the files, verify reads.
    #[command(after_help = "Example: tiefsee checkpoint prune runs/a --keep-last 2 --keep-every 10000 --dry-run")]
    Prune {
        run_dir: PathBuf,
        /// The newest so many stay.
        #[arg(long)]
        keep_last: usize,
        /// And those of steps that are multiples of this; 0: none besides.
        #[arg(long, default_value_t = 0)]
        keep_every: u64,
        /// Say what would go, and remove nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Write a folder that transformers loads as it is.
    #[command(
        name = "export-hf",
        after_help = "Example: tiefsee checkpoint export-hf runs/a/checkpoints/step-00001000 exported --dtype fp8"
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
    /// As DeepSeek releases its weights: E4M3 with `weight_scale_inv` for each 128 × 128 block, the rest BF16.
    Fp8,
    Bf16,
    F32,
    /// Of transformers, load it with experts_implementation="eager".
    F64,
}

fn main() -> ExitCode {
    // Job scripts of other systems ask for one.
    let fewer_queues = environment::queues().filter(|value| value != "32");
    kernels::device::many_queues();
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).with_ansi(colours).init();
    let cli = Cli::parse();
    if let Some(value) = fewer_queues.filter(|_| matches!(cli.command, Command::Train { .. } | Command::Resume { .. }) && environment::is_first_rank()) {
        tracing::warn!("{} is {value} in the environment: set to 32, as a stream that waits for a peer must not stand before another's work", kernels::device::QUEUES);
    }
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    if !matches!(command, Command::Train { .. } | Command::Resume { .. }) {
        end_with_the_reader();
    }
    match command {
        Command::Prepare(args) => {
            data::prepare(&args)?;
        }
        Command::Train { config, set } => return in_world(|| RunConfig::load(&config, &set)?.begins(), Start::Fresh),
        Command::Resume { run_dir, stop_after } => return in_world(|| load_resolved(&run_dir, stop_after), Start::Resume),
        Command::Checkpoint(command) => checkpoint_command(command)?,
        Command::Plan(args) => plan::run(args)?,
        Command::Bench(args) => bench::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn load_resolved(run_dir: &Path, stop_after: Option<u64>) -> Result<RunConfig> {
    let path = resolved(run_dir);
    let mut config = RunConfig::load(&path, &[]).with_context(|| match path.exists() {
        true => format!("the config of {}", run_dir.display()),
        false => format!("{} is not a run directory", run_dir.display()),
    })?;
    // A run directory may have been moved since.
    config.run.dir = std::path::absolute(run_dir)?;
    config.run.stop_after = stop_after;
    Ok(config)
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct BadConfig(String);

/// One rank of a run. Every failure ends the whole world: a peer that waits for this rank would wait for ever.
fn in_world(config: impl FnOnce() -> Result<RunConfig>, start: Start) -> Result<ExitCode> {
    let stop = StopSignal::listen()?; // MPI's start takes its time, and a signal before it would end the process
    let mpi = if environment::launched_by_mpi() { Some(MpiWorld::init()?) } else { None };
    let world: Comm = mpi.as_ref().map_or_else(solo, MpiWorld::comm);
    let rank = world.rank();
    abort_on_panic(rank);
    // Every rank reads the same config, and one of them says what is wrong with it.
    let config = all_or_none(&*world, config()).map_err(|error| match start {
        // One host may lack the file system of the run.
        Start::Resume if error.root_cause().is::<std::io::Error>() || error.is::<Shared>() => error,
        _ => BadConfig(format!("{error:#}")).into(),
    });
    let outcome = config.and_then(|config| {
        tch::set_num_threads(threads(&config, &*world)?);
        train(&config, world.clone(), start, &stop)
    });
    match outcome {
        Ok(outcome) if outcome.summary.finished => Ok(ExitCode::SUCCESS),
        Ok(_) => Ok(ExitCode::from(EXIT_STOPPED)),
        Err(error) => {
            let text = format!("{error:#}");
            let code = exit_code(&error);
            // What has a code of its own is every rank's, too.
            if rank == 0 || code == 1 && !error.is::<Shared>() {
                say(&format!("error ({}): {text}", teller(&error, rank)));
            }
            if let Some(mpi) = mpi {
                std::thread::sleep(std::time::Duration::from_millis(300)); // let every rank print its reason
                mpi.abort(code.into());
            }
            Ok(ExitCode::from(code))
        }
    }
}

/// Whose the error is, for the launcher, who blames that rank's host: a transfer fails where another rank has failed.
fn teller(error: &anyhow::Error, rank: usize) -> String {
    if error.is::<Shared>() {
        "all ranks".to_string()
    } else if error.is::<CommError>() {
        format!("told by rank {rank}")
    } else {
        format!("rank {rank}")
    }
}

/// On stderr, which may be a file on a full disk. In one piece: whoever starts the ranks may label each write.
fn say(text: &str) {
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

fn exit_code(error: &anyhow::Error) -> u8 {
    if error.is::<BadConfig>() {
        EXIT_USAGE
    } else if error.is::<StateLost>() {
        EXIT_STATE_LOST
    } else if error.is::<GaveUp>() {
        EXIT_GAVE_UP
    } else {
        1
    }
}

/// A panic on one rank of several must end them all.
fn abort_on_panic(rank: usize) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        say(&format!("rank {rank} panicked"));
        print(info);
        std::process::abort();
    }));
}

/// Whoever reads what is printed may have seen enough (`… | head`): the command ends as others do then, without a word. On a
/// full disk it says so.
fn end_with_the_reader() {
    const PIPE: i32 = 128 + 13;
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| match info.payload_as_str().and_then(|text| text.strip_prefix("failed printing to stdout: ")) {
        Some(reason) if reason.contains("Broken pipe") => std::process::exit(PIPE),
        Some(reason) => {
            say(&format!("error: cannot write to stdout: {reason}"));
            std::process::exit(1)
        }
        None => print(info),
    }));
}

/// Collective.
fn threads(config: &RunConfig, world: &dyn Communicator) -> Result<i32> {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let shared = (cores / sharing_cores(world)?).max(1);
    Ok(if config.run.threads > 0 { config.run.threads as i32 } else { shared as i32 })
}

fn checkpoint_command(command: CheckpointCommand) -> Result<()> {
    match command {
        CheckpointCommand::Show { checkpoint } => {
            let manifest = checkpoint::inspect(&checkpoint)?;
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
        CheckpointCommand::Verify { checkpoint } => verify(&checkpoint)?,
        CheckpointCommand::Reshard { checkpoint, out, files } => {
            let done = checkpoint::reshard(&checkpoint, &out, files)?;
            println!("{}: {} files, {:.1} MB of tensors read once", out.display(), done.manifest.files.len(), done.bytes_read as f64 / 1e6);
        }
        CheckpointCommand::Prune { run_dir, keep_last, keep_every, dry_run } => {
            anyhow::ensure!(keep_last >= 1, "--keep-last 0: the newest checkpoint is always kept");
            let done = checkpoint::prune(&run_dir, Retention { last: keep_last, every: keep_every }, dry_run)?;
            done.damaged.iter().for_each(|line| println!("{line}"));
            done.removed.iter().for_each(|path| println!("{} {}", if dry_run { "would remove" } else { "removed" }, path.display()));
            done.kept.iter().for_each(|path| println!("kept {}", path.display()));
        }
        CheckpointCommand::ExportHf { checkpoint, out, dtype, ema } => {
            let format = match dtype {
                Dtype::Fp8 => Format::Fp8,
                Dtype::Bf16 => Format::Plain(Kind::BFloat16),
                Dtype::F32 => Format::Plain(Kind::Float),
                Dtype::F64 => Format::Plain(Kind::Double),
            };
            tch::set_num_threads(1); // every core has a file of its own
            let values = if ema { Values::Averaged } else { Values::Newest };
            let exported = checkpoint::hf::export(&checkpoint, &out, format, values)?;
            println!("{}", out.display());
            exported.no_tokenizer.iter().for_each(|why| println!("no tokenizer: {why}"));
            if exported.uneven > 0 {
                println!("{} matrices have a side above 128 that is no multiple of it: transformers 5.24 dequantises those wrongly, or refuses them", exported.uneven);
            }
        }
        CheckpointCommand::ImportHf { folder, run_dir } => println!("{}", checkpoint::hf::import(&folder, &run_dir)?.display()),
    }
    Ok(())
}

/// One line for each checkpoint; an error if any is damaged.
fn verify(path: &Path) -> Result<()> {
    let of_run = if path.join("manifest.json").exists() { Vec::new() } else { checkpoint::list(path)? };
    let paths = if of_run.is_empty() { vec![path.to_path_buf()] } else { of_run.into_iter().map(|(_, path)| path).collect() };
    let mut damaged = 0;
    for path in &paths {
        match checkpoint::verify(path) {
            Ok(manifest) => {
                let (files, tensors) = (manifest.files.len(), manifest.tensors.len());
                println!("{}: whole ({files} files, {tensors} tensors, step {})", path.display(), manifest.step);
            }
            Err(error) if paths.len() == 1 => return Err(error),
            Err(error) => {
                println!("{}: DAMAGED: {error:#}", path.display());
                damaged += 1;
            }
        }
    }
    anyhow::ensure!(damaged == 0, "{damaged} of {} checkpoints are damaged", paths.len());
    Ok(())
}
