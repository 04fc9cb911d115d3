//! `tiefsee plan`: what a model needs, what a run asks of each rank, and what a pipeline schedule does, before anything runs.
use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use parallel::mesh::Mesh;
use parallel::schedule::{Schedule, Times, timeline};
use std::path::{Path, PathBuf};
use trainer::RunConfig;
use trainer::estimate::{Need, needs};
use trainer::phase::Plan;
use trainer::run::{check_validation, prove_schedules};

#[derive(Parser)]
pub struct Args {
    /// A file of model keys.
    model: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Check what of a run needs no corpus, and foretell its steps and each rank's memory.
    Run {
        config: PathBuf,
        #[arg(long)]
        ranks: usize,
        /// 0: all ranks on one.
        #[arg(long, default_value_t = 8)]
        ranks_per_node: usize,
        /// Rows at a rank's experts over an even share.
        #[arg(long, default_value_t = 1.0)]
        load: f64,
        /// Of a run that has seen so many: what is to come alone must fit, as in a resume.
        #[arg(long, default_value_t = 0)]
        from_tokens: u64,
        /// GiB that a rank has; needing more is an error.
        #[arg(long)]
        gib: Option<f64>,
        /// As of `train`.
        #[arg(long = "set", value_name = "section.key=value")]
        set: Vec<String>,
    },
    /// Print a run's config as it will be: every key, defaults filled; what is absent and has no default as a comment.
    Config {
        config: PathBuf,
        /// As of `train`.
        #[arg(long = "set", value_name = "section.key=value")]
        set: Vec<String>,
    },
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
        (_, Some(Command::Run { config, ranks, ranks_per_node, load, from_tokens, gib, set })) => {
            ensure!(ranks <= 1 << 20, "--ranks {ranks}: at most {}", 1 << 20);
            ensure!((1.0..=1e3).contains(&load), "--load {load}: must be from 1 to 1000");
            let config = RunConfig::load(&config, &set)?;
            let config = if from_tokens == 0 { config.begins()? } else { config };
            let end = Plan::new(&config.phase, &config.data.mixture).total_tokens();
            ensure!(from_tokens < end, "--from-tokens {from_tokens}: nothing is to come, the run ends after {end} tokens");
            let per_node = if ranks_per_node == 0 { ranks } else { ranks_per_node };
            let mesh = config.layout(&(0..ranks).map(|rank| rank / per_node).collect::<Vec<_>>())?;
            a_run(&config, &mesh, from_tokens, (load, gib))
        }
        (_, Some(Command::Config { config, set })) => {
            print!("{}", every_key(&RunConfig::load(&config, &set)?)?);
            Ok(())
        }
        (Some(path), None) => model(&path),
        (None, None) => bail!("plan needs a file of model keys, `run`, `config` or `schedule`; see tiefsee plan --help"),
    }
}

/// A config in full. A key that is absent and has no default is a comment where it would stand.
fn every_key(config: &RunConfig) -> Result<String> {
    const YARN: &str = "rope_scaling = { factor = 40.0, original_max_position_embeddings = 4096 }";
    let (mut phases, mut text) = (config.phase.iter(), String::new());
    for line in config.to_toml()?.lines() {
        let absent = match line {
            "[run]" => vec![
                (config.run.stop_after.is_none(), "stop_after = 1000 # absent: to the end of the phases".to_string()),
                (config.run.init_from.is_none(), "init_from = \"CHECKPOINT\" # absent: the seed's weights".into()),
            ],
            "[faults]" => vec![(config.faults.random.is_none(), "random = { seed = 1, count = 1, first = 1, last = 100, kinds = [\"kill\"] } # absent: none".into())],
            "[[phase]]" => {
                let phase = phases.next().expect("a table for each");
                vec![(phase.rope_scaling.is_none(), format!("{YARN} # absent: the model's")), (phase.mixture.is_none(), "mixture = [{ path = \"CORPUS\" }] # absent: data.mixture".into())]
            }
            "[model]" => vec![
                (config.model.q_lora_rank.is_none(), "q_lora_rank = 1536 # absent: queries have no latent".into()),
                (config.model.rope_scaling.is_none(), format!("{YARN} # absent: RoPE as it is")),
            ],
            _ => Vec::new(),
        };
        text += &format!("{line}\n");
        absent.iter().filter(|(absent, _)| *absent).for_each(|(_, words)| text += &format!("# {words}\n"));
    }
    Ok(text)
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

fn a_run(config: &RunConfig, mesh: &Mesh, tokens: u64, (load, room): (f64, Option<f64>)) -> Result<()> {
    let notes = prove_schedules(config, mesh, tokens)?;
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let nodes = mesh.nodes.last().map_or(1, |last| last + 1);
    println!("{} ranks on {nodes} node(s): pp {}, dp {}, ep {}, {}", mesh.world_size(), mesh.pp, mesh.dp, mesh.ep, mesh.schedule);
    let (mut steps, mut to_read) = (0, 0);
    for (moment, count) in plan.stretches(tokens) {
        (steps, to_read) = (steps + count, to_read + moment.batch * moment.phase.sequence_length * count);
    }
    println!("{steps} steps, {to_read} tokens");
    println!("\n{:>6} {:>9} {:>18} {:>8} {:>7} {:>20}", "phase", "steps", "tokens", "length", "batch", "micro-batches a pipe");
    for (number, phase) in config.phase.iter().enumerate() {
        let of_phase = |(moment, steps): (trainer::phase::Moment, u64)| std::ptr::eq(moment.phase, plan.phase(number)).then_some((moment.batch, steps));
        let stretches: Vec<(u64, u64)> = plan.stretches(tokens).filter_map(of_phase).collect();
        let (Some((first, _)), Some((last, _))) = (stretches.first(), stretches.last()) else { continue };
        let steps: u64 = stretches.iter().map(|(_, steps)| steps).sum();
        let span = |of: &dyn Fn(u64) -> u64| if first == last { of(*first).to_string() } else { format!("{}–{}", of(*first), of(*last)) };
        let micro_batches = span(&|batch| batch / (phase.micro_batch * mesh.dp as u64));
        println!("{number:>6} {steps:>9} {:>18} {:>8} {:>7} {micro_batches:>20}", phase.tokens, phase.sequence_length, span(&|batch| batch));
    }
    notes.iter().for_each(|note| println!("{note}"));
    if let Err(error) = check_validation(config, mesh, None) {
        println!("it will not start: {error}"); // but where the held-out split has fewer
    }
    let needs = needs(config, mesh, load, tokens)?;
    let most = memory(&needs, load);
    let host = needs.iter().map(|need| need.host).max().unwrap_or(0) as f64 / (1u64 << 30) as f64;
    let a_node = mesh.world_size().div_ceil(nodes) as f64 * host;
    let averages = if config.ema.decay > 0.0 { " and its averages three times" } else { "" };
    println!("on its host {host:.2} GiB a rank, {a_node:.2} a node: its masters and moments once, for checkpoints{averages}; beside it: the program, data on the way, a second tier's copies, and that memory for a GPU's copies comes in powers of two");
    ensure!(room.is_none_or(|room| most <= room), "a rank needs {most:.2} GiB and more, --gib is {}", room.unwrap_or(0.0));
    Ok(())
}

/// Prints it; the most that a rank needs, in GiB.
fn memory(needs: &[Need], load: f64) -> f64 {
    let gib = |bytes: i64| bytes as f64 / (1u64 << 30) as f64;
    println!("\nGiB of a rank by its place in the pipe; kept: for backward, of so many micro-batches, + of so many whose weights' gradients\nare put off, and of that the logits");
    println!("{:>6} {:>14} {:>10} {:>8} {:>9} {:>9} {:>8} {:>7} {:>9} {:>8}", "place", "layers", "parameters", "weights", "gradients", "optimizer", "kept", "logits", "of", "in all");
    for (place, need) in needs.iter().enumerate() {
        let layers: Vec<String> = need.layers.iter().map(|layers| if layers.is_empty() { "none".into() } else { format!("{}–{}", layers.start, layers.end - 1) }).collect();
        println!(
            "{place:>6} {:>14} {:>9.2}B {:>8.2} {:>9.2} {:>9.2} {:>8.2} {:>7.2} {:>9} {:>8.2}",
            layers.join(", "),
            need.parameters as f64 / 1e9,
            gib(need.weights),
            gib(need.gradients),
            gib(need.optimizer),
            gib(need.activations.bytes),
            gib(need.activations.logits),
            format!("{} + {}", need.activations.in_flight, need.activations.put_off),
            gib(need.most())
        );
    }
    let most = gib(needs.iter().map(Need::most).max().unwrap_or(0));
    let routes = if load == 1.0 { "even routes".to_string() } else { format!("{load} times an even share of rows at its experts") };
    println!("most {most:.2} GiB, with {routes}; beside it: what lives between two operations, the allocator's gaps, NCCL's and the peers' buffers");
    most
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
    let gb = |bytes: f64| (count.main + count.mtp) as f64 * bytes / 1e9;
    println!("masters and moments  {:>13.2} GB with moments = \"bf16\", {:.2} GB with \"f32\"", gb(8.0), gb(12.0));
    Ok(())
}
