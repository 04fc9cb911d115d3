//! `tiefsee bench`: training steps on random tokens, timed, without a corpus or a run directory; ranks are threads.
//! Prints JSON: step time, bytes that all ranks sent in a step by axis, the share of time spent on communication, peak
//! memory of the process, and bytes of a step's MoE dispatch beside what the formula says of its routes.
use anyhow::{Context as _, Result};
use clap::Parser;
use meter::{Meter, Meters, metered};
use model::MicroBatch;
use parallel::comm::local::run_local;
use parallel::dispatch::bytes::{count_bytes, row_bytes, rows_sent};
use parallel::mesh::Mesh;
use serde_json::json;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tch::Tensor;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use trainer::RunConfig;
use trainer::phase::{Moment, Plan};
use trainer::step::Trainer;

mod gpu;
mod meter;
mod multi;
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
    /// Instead: one rank a GPU, under mpirun.
    #[arg(long)]
    multi_gpu: bool,
    /// With --multi-gpu: not steps but the links between the GPUs.
    #[arg(long, requires = "multi_gpu")]
    links: bool,
    /// With --multi-gpu: not steps but the parts of a pipeline's stage, which is the whole model.
    #[arg(long, requires = "multi_gpu", conflicts_with = "links")]
    stage: bool,
    /// With --multi-gpu: new sequences at each step, which use the experts unevenly; else a rank has one, and its routes are even.
    #[arg(long, requires = "multi_gpu", conflicts_with_all = ["links", "stage"])]
    new_sequences: bool,
    /// With --multi-gpu: every rank trains by itself, on the one GPU that it sees, while the others do: what a layout is compared
    /// with, since GPUs of a host share its power and its air.
    #[arg(long, requires = "multi_gpu", conflicts_with_all = ["links", "stage"])]
    alone: bool,
    /// On GPUs: write a Chrome trace of one step here.
    #[arg(long)]
    trace: Option<PathBuf>,
}

pub fn run(args: &Args) -> Result<()> {
    let config = RunConfig::load(&args.config, &args.set)?;
    if args.overlap {
        return overlap::run(args, &config);
    }
    if args.multi_gpu {
        return multi::run(args, &config);
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
    /// Of a step, to experts and back, inside nodes and between: bytes sent, and what the formula says of its routes.
    dispatch: [u64; 2],
    formula: [u64; 2],
}

#[derive(Clone, Copy, Default)]
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
    let axes = [&groups.world, &groups.pipe, &groups.data, &groups.embedding, &groups.expert_data, &groups.expert.all];
    let first = |index: usize| axes[..index].iter().all(|other| !Rc::ptr_eq(other, axes[index])); // one communicator counts once
    let axes: Vec<Option<Rc<Meter>>> = (0..axes.len()).map(|index| first(index).then(|| meters.of(axes[index]))).collect();
    let now = || axes.iter().map(|meter| meter.as_ref().map_or(Axis::default(), |meter| Axis::now(meter))).collect::<Vec<_>>();
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let moment = plan.at(0).expect("a config has a phase");
    let (mut times, mut loss, mut before) = (Vec::new(), 0.0, Vec::new());
    for step in 0..steps + WARM {
        let batch = batch(&trainer, &moment, step as i64);
        if step == WARM {
            before = now();
        }
        let start = Instant::now();
        loss = trainer.step(&moment, &batch, false)?.loss;
        times.push(start.elapsed().as_secs_f64());
    }
    let axes = now().into_iter().zip(before).map(|(now, before)| now.since(before)).collect();
    let (dispatch, formula) = dispatch_bytes(&mut trainer, &meters, &moment)?;
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
        MicroBatch::new(Tensor::from_slice(&values).view([micro, length + 1]).to_device(trainer.weights.device()))
    };
    (0..count).map(tokens).collect()
}

/// One more step, whose routes are recorded: [inside, between] of the bytes that this rank sent to experts and back, and the
/// same by the formula.
fn dispatch_bytes(trainer: &mut Trainer, meters: &Meters, moment: &Moment) -> Result<([u64; 2], [u64; 2])> {
    let (meter, batch): (Rc<Meter>, _) = (meters.of(&trainer.groups.expert.all), batch(trainer, moment, 0));
    let (before, routes) = (Axis::now(&meter), Routes::default());
    tracing::subscriber::with_default(tracing_subscriber::registry().with(routes.clone()), || trainer.step(moment, &batch, false))?;
    let sent = Axis::now(&meter).since(before);

    let (config, group) = (&trainer.config, &trainer.groups.expert);
    let nodes = trainer.mesh.expert_nodes(trainer.groups.world.rank());
    let (experts, rank) = (config.n_routed_experts, group.all.rank());
    let (kind, master) = (trainer.weights.precision.compute(), trainer.weights.precision.master());
    let row = row_bytes(group.wire(), config.hidden_size, kind, config.num_experts_per_tok, master);
    let peers = |inside: bool| (0..nodes.len()).filter(|&r| r != rank && (nodes[r] == nodes[rank]) == inside).count() as u64;
    let mut formula = [0, 0];
    for mine in routes.0.lock().expect("one thread").iter() {
        let all = group.all.all_gather(vec![Tensor::from_slice(mine)])?.wait()?;
        let all = Vec::<i64>::try_from(&all[0]).expect("i64 routes");
        let tokens = |routes: &[i64]| routes.chunks(config.num_experts_per_tok as usize).map(<[i64]>::to_vec).collect();
        let rows = rows_sent(&all.chunks(mine.len()).map(tokens).collect::<Vec<_>>(), experts, &nodes)[rank];
        for (place, outward, inward) in [(0, rows.outward.inside, rows.inward.inside), (1, rows.outward.between, rows.inward.between)] {
            formula[place] += outward * (row.dispatch + row.combine_backward)
                + inward * (row.combine + row.dispatch_backward)
                + peers(place == 0) * count_bytes(experts, &nodes);
        }
    }
    Ok(([sent.inside, sent.between], formula))
}

/// The experts of every token, [T · K], of each MoE layer and micro-batch of a step in the order of the program.
#[derive(Clone, Default)]
struct Routes(Arc<Mutex<Vec<Vec<i64>>>>);

impl<S: tracing::Subscriber> Layer<S> for Routes {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        struct Text(String);
        impl Visit for Text {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                if field.name() == "routes" {
                    self.0 = format!("{value:?}");
                }
            }
        }
        if event.metadata().target() == "routes" {
            let mut text = Text(String::new());
            event.record(&mut text);
            self.0.lock().expect("one thread").push(serde_json::from_str(&text.0).expect("a list of numbers"));
        }
    }
}

/// The most memory that this process had resident.
fn peak_bytes() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("/proc/self/status has no VmHWM")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? << 10)
}
