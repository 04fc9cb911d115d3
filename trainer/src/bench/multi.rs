//! `mpirun … tiefsee bench --multi-gpu`: what several GPUs of one host make of it. The links between them, as dispatch and
//! combine use them at V3's widths, the parts of a pipeline's stage, and the step of a layout. Rank 0 prints JSON;
//! scripts/bench.sh multi-gpu puts the table together.
mod links;
mod stage;

use super::{Args, batch};
use crate::environment;
use anyhow::{Context, Result, ensure};
use kernels::{device, shim};
use model::MicroBatch;
use parallel::comm::local::solo;
use parallel::comm::mpi::MpiWorld;
use parallel::comm::nccl::Hold;
use parallel::comm::{Comm, Communicator, Reduce, barrier};
use serde_json::{Value, json};
use std::time::Instant;
use tch::{Device, Kind, Tensor};
use trainer::RunConfig;
use trainer::coordinator::nodes;
use trainer::device::connect;
use trainer::phase::{Moment, Plan};
use trainer::step::Trainer;

/// Rounds before those that are timed.
const WARM: usize = 4;
/// Steps that even out the use of experts, and their γ, whatever the config's, of which the last stays: of one micro-batch;
/// fewer through a pipeline, which takes no fewer than its own.
const BALANCING: [(usize, f64); 3] = [(24, 3e-3), (12, 1e-3), (12, 3e-4)];
const THROUGH_A_PIPE: usize = 6;
/// Steps of a trace: what follows an update is in the second.
const TRACED: usize = 2;

pub fn run(args: &Args, config: &RunConfig) -> Result<()> {
    let mpi = if environment::launched_by_mpi() { Some(MpiWorld::init()?) } else { None };
    let control: Comm = mpi.as_ref().map_or_else(solo, MpiWorld::comm);
    tch::set_num_threads(1);
    let ranks = if args.alone { solo() } else { control.clone() };
    let mesh = config.mesh(&nodes(&*ranks)?)?;
    let world = connect(config, &mesh, ranks, &Hold::default())?;
    let on = trainer::device::open(config, &*control)?;
    ensure!(on.is_cuda(), "bench --multi-gpu: run.device = \"cpu\"; --set run.device=cuda");
    let seen = tch::Cuda::device_count();
    ensure!(!args.alone || seen == 1, "bench --multi-gpu --alone: a rank sees {seen} GPUs, not one: CUDA_VISIBLE_DEVICES");
    let mut found = match (args.links, args.stage) {
        (true, _) => links::links(&*world, &*control, on)?,
        (_, true) => stage::stage(config, (&mesh, world.clone()), &*control)?,
        _ => steps(args, config, (&mesh, world.clone()), &*control)?,
    };
    found["device"] = json!(device::gpu(on).name());
    found["ranks"] = json!(world.size());
    found["transport"] = json!(config.parallel.transport);
    if control.rank() == 0 {
        println!("{found}");
    }
    barrier(&*control)?;
    Ok(())
}

/// The slowest rank's.
fn slowest(control: &dyn Communicator, mine: f64) -> Result<f64> {
    Ok(control.all_reduce(vec![Tensor::from_slice(&[mine])], Reduce::Max)?.wait()?[0].double_value(&[0]))
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Milliseconds of the slowest rank for what `work` puts on the null stream, begun by all ranks together.
fn together(control: &dyn Communicator, on: Device, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let gpu = device::gpu(on);
    gpu.synchronize()?;
    barrier(control)?;
    let mut outcome = Ok(());
    let ms = gpu.time_ms(|| outcome = work())?;
    outcome?;
    slowest(control, f64::from(ms))
}

/// Their median over rounds.
fn timed(control: &dyn Communicator, on: Device, rounds: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let times = (0..WARM + rounds).map(|_| together(control, on, &mut work)).collect::<Result<Vec<f64>>>()?;
    Ok(median(times[WARM..].to_vec()))
}

/// A layout's step: forward and backward alone, and all of it.
fn steps(args: &Args, config: &RunConfig, (mesh, world): (&parallel::mesh::Mesh, Comm), control: &dyn Communicator) -> Result<Value> {
    let mut trainer = Trainer::new(config, mesh, world)?;
    let on = trainer.weights.device();
    let gpu = device::gpu(on);
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let configured = plan.at(0).context("a config has a phase")?;
    let (mut gradients, mut whole, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    let clock = |work: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
        gpu.synchronize()?;
        barrier(control)?;
        let start = Instant::now();
        work()?;
        gpu.synchronize()?;
        slowest(control, start.elapsed().as_secs_f64() * 1e3)
    };
    // Experts are used evenly first, on one GPU as on several: else all wait for the rank that has most rows.
    let mut phase = configured.phase.clone();
    for (count, speed) in BALANCING {
        phase.bias_speed = speed;
        let moment = Moment { phase: &phase, ..configured };
        for step in 0..if mesh.pp == 1 { count } else { count / THROUGH_A_PIPE } {
            let batch = sequences(args, &trainer, &moment, step);
            trainer.step(&moment, if mesh.pp == 1 { &batch[..1] } else { &batch }, false)?;
        }
    }
    let moment = Moment { phase: &phase, ..configured };
    for step in 0..args.steps + WARM {
        let batch = sequences(args, &trainer, &moment, step);
        whole.push(clock(&mut || {
            losses.push(trainer.step(&moment, &batch, false)?.loss);
            Ok(())
        })?);
    }
    // Everything has been opened and allocated by now.
    for step in 0..args.steps + 1 {
        let batch = sequences(args, &trainer, &moment, step);
        let context = trainer.context(&moment, moment.batch);
        gradients.push(clock(&mut || {
            drop(trainer.gradients(&context, &batch)?);
            Ok(())
        })?);
    }
    let (context, last) = (trainer.context(&moment, moment.batch), sequences(args, &trainer, &moment, 0));
    let computed = trainer.gradients(&context, &last)?;
    let busiest = busiest(&trainer.total(&context, &last, computed, false)?.counts, mesh.ep as i64);
    let memory = trainer.memory()?.context("it is a GPU")?;
    if let Some(path) = &args.trace {
        let batches = (0..TRACED).map(|step| sequences(args, &trainer, &moment, step)).collect::<Vec<_>>();
        let path = path.with_extension(format!("{}.json", control.rank()));
        barrier(control)?;
        shim::profile(&path, || -> Result<()> {
            for batch in &batches {
                trainer.step(&moment, batch, false)?;
            }
            Ok(gpu.synchronize()?)
        })??;
    }
    let tokens = moment.batch * moment.phase.sequence_length;
    Ok(json!({
        "pp": mesh.pp, "dp": mesh.dp, "ep": mesh.ep, "schedule": mesh.schedule.to_string(), "nodes": mesh.nodes.last().map_or(0, |last| last + 1),
        "precision": config.run.precision, "tokens": tokens, "losses": losses, "memory": memory, "busiest_rank": busiest,
        "fwd_bwd_ms": median(gradients.split_off(1)), "step_ms": median(whole.split_off(WARM)),
    }))
}

/// Of a step: one sequence of this rank's own for all of its micro-batches, or new ones each time.
fn sequences(args: &Args, trainer: &Trainer, moment: &Moment, step: usize) -> Vec<MicroBatch> {
    if args.new_sequences {
        return batch(trainer, moment, step as i64);
    }
    let found = batch(trainer, moment, 0);
    found.iter().map(|_| found[0].share()).collect()
}

/// counts [layers, E] → rows at the rank of `ep` that has most of them, against an even share; the mean over layers.
fn busiest(counts: &Tensor, ep: i64) -> f64 {
    if counts.numel() == 0 {
        return 1.0;
    }
    let of_rank = counts.view([counts.size()[0], ep, -1]).sum_dim_intlist(&[2i64][..], false, Kind::Double);
    let share = of_rank.amax([1], false) / of_rank.mean_dim(&[1i64][..], false, Kind::Double);
    share.mean(Kind::Double).double_value(&[])
}
