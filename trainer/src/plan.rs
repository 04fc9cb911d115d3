//! `tiefsee plan`: what a model needs, and what a pipeline schedule does, before anything runs.
use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use parallel::schedule::{Schedule, Times, timeline};
use std::path::{Path, PathBuf};

#[derive(Parser)]
pub struct Args {
    /// A file of model keys.
    model: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Prove a schedule and print its bubble beside the others'.
    Schedule {
        /// Ranks of the pipe.
        #[arg(long)]
        pp: usize,
        /// Of one step of one pipe.
        #[arg(long)]
        micro_batches: usize,
        #[arg(long, value_enum)]
        schedule: Name,
        /// Draw its timeline there.
        #[arg(long)]
        svg: Option<PathBuf>,
        /// Measured times, in any one unit: forward, whole backward, its weights' part, an overlapped pair, a transfer.
        #[arg(long, value_delimiter = ',', value_name = "F,B,W,PAIR,TRANSFER")]
        times: Option<Vec<f64>>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Name {
    Gpipe,
    #[value(name = "1f1b")]
    OneFOneB,
    Zb1p,
    Dualpipe,
    Paired,
}

impl From<Name> for Schedule {
    fn from(name: Name) -> Self {
        match name {
            Name::Gpipe => Schedule::GPipe,
            Name::OneFOneB => Schedule::OneFOneB,
            Name::Zb1p => Schedule::Zb1p,
            Name::Dualpipe => Schedule::DualPipe,
            Name::Paired => Schedule::Paired,
        }
    }
}

pub fn run(args: Args) -> Result<()> {
    match (args.model, args.command) {
        (_, Some(Command::Schedule { pp, micro_batches, schedule: name, svg, times })) => {
            let times = times.as_deref().map_or(Ok(Times::UNIT), measured)?;
            schedule(name.into(), pp, micro_batches, svg.as_deref(), &times)
        }
        (Some(path), None) => model(&path),
        (None, None) => bail!("plan needs a file of model keys, or `schedule`; see tiefsee plan --help"),
    }
}

fn measured(values: &[f64]) -> Result<Times> {
    let &[forward, backward, weight, pair, transfer] = values else { bail!("--times takes five numbers, got {}", values.len()) };
    ensure!(values.iter().all(|time| time.is_finite() && *time >= 0.0), "--times {values:?}: must not be negative");
    ensure!(weight <= backward, "--times {values:?}: the weights' part is more than the whole backward");
    Ok(Times { forward, backward, weight, pair, transfer })
}

fn schedule(chosen: Schedule, pp: usize, micro_batches: usize, svg: Option<&Path>, times: &Times) -> Result<()> {
    chosen.validate(pp, micro_batches)?;
    println!("{:>9} | bubble | formula | of the step | most in flight", "schedule");
    for schedule in Schedule::ALL.into_iter().filter(|schedule| schedule.validate(pp, micro_batches).is_ok()) {
        let (lists, _) = schedule.proven(pp, micro_batches)?;
        let report = parallel::schedule::check(&lists, micro_batches, times)?;
        let (bubble, formula) = (report.worst_bubble(), schedule.bubble(pp, times));
        let in_flight = report.in_flight.iter().max().copied().unwrap_or(0);
        println!("{schedule:>9} | {bubble:>6.1} | {formula:>7.1} | {:>10.1}% | {in_flight}", 100.0 * bubble / report.makespan);
        if let Some(path) = svg.filter(|_| schedule == chosen) {
            std::fs::write(path, timeline(schedule, &report, times)).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}

fn model(path: &Path) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let model: model::ModelConfig = toml::from_str(&text).with_context(|| path.display().to_string())?;
    if let Err(error) = model.validate() {
        bail!("{}: {error}", path.display());
    }
    let count = model.count();
    println!("main parameters      {:>16}", count.main);
    println!("active without embed {:>16}", count.active);
    println!("MTP's own            {:>16}", count.mtp);
    println!("full state (8 B each){:>13.2} GB", (count.main + count.mtp) as f64 * 8.0 / 1e9);
    Ok(())
}
