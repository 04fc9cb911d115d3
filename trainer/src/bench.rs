//! `tiefsee bench`: training steps on random tokens, timed, without a corpus or a run directory; ranks are threads.
//! Prints JSON: step time, bytes that all ranks sent in a step by axis, the share of time spent on communication, peak
//! memory of the process, and bytes of MoE dispatch beside their formula.
use anyhow::{Context, Result};
use clap::Parser;
use meter::{Meter, Meters, metered};
use model::MicroBatch;
use parallel::comm::local::run_local;
use parallel::dispatch::bytes::{count_bytes, row_bytes, rows_sent};
use parallel::dispatch::{Plan as DispatchPlan, Rows};
use parallel::mesh::Mesh;
use serde_json::json;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Instant;
use tch::{Device, Kind, Tensor};
use trainer::RunConfig;
use trainer::phase::{Moment, Plan};
use trainer::step::Trainer;

mod gpu;
mod meter;
mod overlap;

/// Steps before those that are timed.
const WARM: usize = 2;
const AXES: [&str; 6] = ["world", "pipe", "data", "embedding", "expert_data", "expert"];

#[derive(Parser)]
pub struct Args {
    #[arg(long)]
    config: PathBuf,
    #[arg(long = "set")]
    set: Vec<String>,
    /// Timed steps, after two that are not.
    #[arg(long, default_value_t = 8)]
    steps: usize,
    /// Ranks, laid out as [parallel] says; each a thread with run.threads of its own.
    #[arg(long, default_value_t = 1)]
    ranks: usize,
    /// Instead: how much of the transfers of a paired step is hidden under its computation.
    #[arg(long)]
    overlap: bool,
    /// Instead: one rank on a GPU, with its memory.
    #[arg(long)]
    gpu: bool,
    /// With --gpu: write a Chrome trace of one step here.
    #[arg(long, requires = "gpu")]
    trace: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<()> {
    let config = RunConfig::load(&args.config, &args.set)?;
    if args.overlap {
        return overlap::run(args, &config);
    }
    if args.gpu {
        return gpu::run(args, &config);
    }
    let mesh = config.mesh(&vec![0; args.ranks])?;
    let ranks = run_local(args.ranks, |world| one_rank(&config, &mesh, world, args.steps));
    let ranks = ranks.into_iter().collect::<Result<Vec<Measured>>>()?;
    let steps = args.steps as f64;
    let mut times = ranks[0].times.clone();
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let moment = plan.at(0).expect("a config has a phase");
    let axis = |index: usize| {
        let sum = |f: fn(&Axis) -> f64| ranks.iter().map(|rank| f(&rank.axes[index])).sum::<f64>() / steps;
        let share = sum(|axis| axis.seconds) * steps / ranks.iter().flat_map(|rank| &rank.times).sum::<f64>();
        (
            AXES[index].to_string(),
            json!({"inside": sum(|axis| axis.inside as f64), "between": sum(|axis| axis.between as f64), "share": share}),
        )
    };
    let axes: serde_json::Map<_, _> = (0..AXES.len()).map(axis).collect();
    let share: f64 = axes.values().map(|axis| axis["share"].as_f64().expect("a number")).sum();
    let total = |f: fn(&Measured) -> [u64; 2]| ranks.iter().map(f).fold([0, 0], |a, b| [a[0] + b[0], a[1] + b[1]]);
    let (counted, formula) = (total(|rank| rank.dispatch), total(|rank| rank.formula));
    println!(
        "{}",
        json!({
            "tokens_per_s": (moment.batch * moment.phase.sequence_length) as f64 / median, "step_ms": median * 1e3,
            "loss": ranks[0].loss, "threads": ranks[0].threads, "ranks": args.ranks,
            "pp": mesh.pp, "dp": mesh.dp, "ep": mesh.ep, "schedule": mesh.schedule.to_string(), "nodes": mesh.nodes.last().map_or(0, |last| last + 1),
            "axes": axes, "share": share, "peak_bytes": peak_bytes()?,
            "dispatch": {"inside": counted[0], "between": counted[1]}, "formula": {"inside": formula[0], "between": formula[1]},
        })
    );
    Ok(())
}

/// One rank's timed steps.
struct Measured {
    times: Vec<f64>,
    loss: f64,
    threads: i32,
    /// As AXES.
    axes: Vec<Axis>,
    /// Of one layer and micro-batch, inside nodes and between: bytes sent, and what the formula says.
    dispatch: [u64; 2],
    formula: [u64; 2],
}

#[derive(Clone, Copy)]
struct Axis {
    inside: u64,
    between: u64,
    seconds: f64,
}

impl Axis {
    fn now(meter: &Meter) -> Axis {
        Axis { inside: meter.traffic.inside_bytes(), between: meter.traffic.between_bytes(), seconds: meter.seconds.get() }
    }

    fn since(self, before: Axis) -> Axis {
        Axis { inside: self.inside - before.inside, between: self.between - before.between, seconds: self.seconds - before.seconds }
    }
}

fn one_rank(config: &RunConfig, mesh: &Mesh, world: parallel::comm::Comm, steps: usize) -> Result<Measured> {
    if config.run.threads > 0 {
        tch::set_num_threads(config.run.threads as i32); // of this thread
    }
    let (world, meters) = metered(world, &mesh.nodes);
    let mut trainer = Trainer::new(config, mesh, world)?;
    let groups = &trainer.groups;
    let axes = [&groups.world, &groups.pipe, &groups.data, &groups.embedding, &groups.expert_data, &groups.expert.all]
        .map(|group| meters.of(group));
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let moment = plan.at(0).expect("a config has a phase");
    let (mut times, mut loss, mut before) = (Vec::new(), 0.0, Vec::new());
    for step in 0..steps + WARM {
        let batch = batch(&trainer, &moment, step as i64);
        if step == WARM {
            before = axes.iter().map(|meter| Axis::now(meter)).collect();
        }
        let start = Instant::now();
        loss = trainer.step(&moment, &batch, false)?.loss;
        times.push(start.elapsed().as_secs_f64());
    }
    let axes = axes.iter().zip(before).map(|(meter, before)| Axis::now(meter).since(before)).collect();
    let tokens = (moment.phase.micro_batch * moment.phase.sequence_length) as i64;
    let (dispatch, formula) = dispatch_bytes(&trainer, &meters, tokens)?;
    Ok(Measured { times: times.split_off(WARM), loss, threads: tch::get_num_threads(), axes, dispatch, formula })
}

/// This pipe's micro-batches of a step.
fn batch(trainer: &Trainer, moment: &Moment, step: i64) -> Vec<MicroBatch> {
    let (length, micro) = (moment.phase.sequence_length as i64, moment.phase.micro_batch as i64);
    let place = trainer.mesh.place(trainer.groups.world.rank());
    let count = moment.batch as i64 / micro / trainer.mesh.dp as i64;
    let tokens = |index: i64| {
        let index = place.dp as i64 * count + index;
        let value = |i: i64| (i * 7919 + step * 104_729 + index * 1_299_709) % trainer.config.vocab_size;
        let values: Vec<i64> = (0..micro * (length + 1)).map(value).collect();
        MicroBatch { tokens: Tensor::from_slice(&values).view([micro, length + 1]).to_device(trainer.weights.device()) }
    };
    (0..count).map(tokens).collect()
}

/// Random routes of `tokens` through this run's expert group: plan, dispatch, combine and both backwards.
/// ([inside, between] of the bytes that this rank sent, the same by the formula)
fn dispatch_bytes(trainer: &Trainer, meters: &Meters, tokens: i64) -> Result<([u64; 2], [u64; 2])> {
    let (config, group) = (&trainer.config, &trainer.groups.expert);
    let nodes = trainer.mesh.expert_nodes(trainer.groups.world.rank());
    let (experts, top_k, width) = (config.n_routed_experts, config.num_experts_per_tok, config.hidden_size);
    let (rank, ranks) = (group.all.rank(), group.all.size());
    let routes = |rank: usize| {
        let scores = (Tensor::arange(tokens * experts, (Kind::Double, Device::Cpu)) + rank as f64 * 17.0).sin() * 1000.0;
        (&scores - scores.floor()).view([tokens, experts]).topk(top_k, 1, true, true).1
    };
    let listed = |rank: usize| routes(rank).chunk(tokens, 0).iter().map(|row| Vec::<i64>::try_from(row.view([-1])).expect("i64")).collect();
    let rows = rows_sent(&(0..ranks).map(listed).collect::<Vec<Vec<Vec<i64>>>>(), experts, &nodes)[rank];
    let (kind, master) = (trainer.weights.precision.compute(), trainer.weights.precision.master());
    let row = row_bytes(group.wire(), width, kind, top_k, master);
    let peers = |inside: bool| (0..ranks).filter(|&r| r != rank && (nodes[r] == nodes[rank]) == inside).count() as u64;
    let formula = |outward: u64, inward: u64, peers: u64| {
        outward * (row.dispatch + row.combine_backward)
            + inward * (row.combine + row.dispatch_backward)
            + peers * count_bytes(experts, &nodes)
    };
    let formula =
        [formula(rows.outward.inside, rows.inward.inside, peers(true)), formula(rows.outward.between, rows.inward.between, peers(false))];

    let meter: Rc<Meter> = meters.of(&group.all);
    let before = Axis::now(&meter);
    let plan = DispatchPlan::new(&routes(rank), experts, group)?;
    let x = Tensor::ones([tokens, width], (kind, Device::Cpu));
    let sent = plan.dispatch(&x, &Tensor::ones([tokens, top_k], (master, Device::Cpu)))?.wait()?;
    let rows = sent.rows.into_tensor();
    let _ = plan.combine(&rows)?.wait()?;
    let _ = plan.combine_backward(&x)?.wait().map(Rows::into_tensor)?;
    plan.dispatch_backward(&rows, &sent.weights)?.wait()?;
    let sent = Axis::now(&meter).since(before);
    Ok(([sent.inside, sent.between], formula))
}

/// The most memory that this process had resident.
fn peak_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("/proc/self/status has no VmHWM")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? << 10)
}
