//! `mpirun … tiefsee bench --multi-gpu`: what several GPUs of one host make of it. The links between them, as dispatch and
//! combine use them at V3's widths, and the step of a layout. Rank 0 prints JSON; scripts/bench.sh multi-gpu puts the
//! table together.
use super::{Args, batch};
use crate::environment;
use anyhow::{Context, Result, ensure};
use kernels::fp8::ScaleRule;
use kernels::ops::{quantise, unpermute};
use kernels::{device, shim};
use parallel::comm::local::solo;
use parallel::comm::mpi::MpiWorld;
use parallel::comm::{Comm, Communicator, Reduce, barrier};
use serde_json::{Value, json};
use std::time::Instant;
use tch::{Device, Kind, Tensor};
use trainer::RunConfig;
use trainer::coordinator::nodes;
use trainer::device::connect;
use trainer::phase::Plan;
use trainer::step::Trainer;

/// Rounds before those that are timed, and those.
const WARM: usize = 4;
const ROUNDS: usize = 30;
/// A rank's tokens, and V3's width: each token goes to every peer.
const ROWS: i64 = 4096;
const WIDTH: i64 = 7168;

pub fn run(args: &Args, config: &RunConfig) -> Result<()> {
    let mpi = if environment::launched_by_mpi() { Some(MpiWorld::init()?) } else { None };
    let control: Comm = mpi.as_ref().map_or_else(solo, MpiWorld::comm);
    tch::set_num_threads(1);
    let mesh = config.mesh(&nodes(&*control)?)?;
    let world = connect(config, &mesh, control.clone())?;
    let on = trainer::device::open(config, &*control)?;
    ensure!(on.is_cuda(), "bench --multi-gpu: run.device = \"cpu\"; --set run.device=cuda");
    let mut found = match args.links {
        true => links(&*world, &*control, on)?,
        false => steps(args, config, (&mesh, world.clone()), &*control)?,
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

/// Medians over rounds that all ranks begin together, of the slowest rank.
fn timed(control: &dyn Communicator, on: Device, rounds: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let gpu = device::gpu(on);
    let mut times = Vec::new();
    for round in 0..WARM + rounds {
        gpu.synchronize()?;
        barrier(control)?;
        let mut outcome = Ok(());
        let ms = gpu.time_ms(|| outcome = work())?;
        outcome?;
        if round >= WARM {
            times.push(slowest(control, f64::from(ms))?);
        }
    }
    Ok(median(times))
}

/// Everyone sends everyone `ROWS` rows, as bytes: one exchange alone, several in a row, and beside GEMMs.
fn links(world: &dyn Communicator, control: &dyn Communicator, on: Device) -> Result<Value> {
    const CHAIN: usize = 8;
    let peers = world.size() as i64 - 1;
    let counts: Vec<i64> = (0..world.size()).map(|rank| if rank == world.rank() { 0 } else { ROWS }).collect();
    let exchange = |rows: &Tensor| world.all_to_all(vec![rows.shallow_clone()], &counts, &counts);
    let over = |rows: &Tensor| -> Result<()> {
        exchange(rows)?.wait()?;
        Ok(())
    };
    let (a, b) = (Tensor::randn([8192, 8192], (Kind::BFloat16, on)), Tensor::randn([8192, 8192], (Kind::BFloat16, on)));
    let mut found = json!({});
    for (name, bytes) in [("fp8", WIDTH), ("bf16", 2 * WIDTH)] {
        let rows = Tensor::randint(255, [peers * ROWS, bytes], (Kind::Uint8, on));
        let alone = timed(control, on, ROUNDS, || over(&rows))?;
        let chain = timed(control, on, ROUNDS, || (0..CHAIN).try_for_each(|_| over(&rows)))? / CHAIN as f64;
        let gemms = timed(control, on, ROUNDS, || {
            (0..CHAIN).for_each(|_| drop(a.matmul(&b)));
            Ok(())
        })?;
        let both = timed(control, on, ROUNDS, || {
            for _ in 0..CHAIN {
                let under_way = exchange(&rows)?;
                drop(a.matmul(&b));
                drop(under_way.wait()?);
            }
            Ok(())
        })?;
        let each_way = (peers * ROWS * bytes) as f64;
        found[name] = json!({
            "alone_us": alone * 1e3, "chain_us": chain * 1e3, "gb_per_s": each_way / (alone * 1e6), "gemm_us": gemms / CHAIN as f64 * 1e3,
            "hidden": 1.0 - (both - gemms) / (chain * CHAIN as f64),
        });
    }
    let x = Tensor::randn([ROWS, WIDTH], (Kind::BFloat16, on));
    let order = Tensor::randperm(ROWS, (Kind::Int64, on));
    let index = order.to_kind(Kind::Int).view([ROWS, 1]);
    let us = |work: &mut dyn FnMut()| -> Result<f64> {
        let ms = timed(control, on, ROUNDS, || {
            work();
            Ok(())
        })?;
        Ok(ms * 1e3)
    };
    found["quantise_us"] = json!(us(&mut || drop(quantise::rows(&x, ScaleRule::PowerOfTwo)))?);
    let packed = quantise::rows(&x, ScaleRule::PowerOfTwo).values.view_dtype(Kind::Uint8);
    found["pack_us"] = json!(us(&mut || drop(packed.index_select(0, &order)))?);
    found["sum_us"] = json!(us(&mut || drop(unpermute::forward(&x, &index, None, None)))?);
    let lists = vec![vec![1_i64; 64]; world.size()];
    let mut times = Vec::new();
    for _ in 0..200 {
        let start = Instant::now();
        world.exchange_counts(&lists)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    found["counts_us"] = json!(slowest(control, median(times))?);
    Ok(found)
}

/// A layout's step: forward and backward alone, and all of it.
fn steps(args: &Args, config: &RunConfig, (mesh, world): (&parallel::mesh::Mesh, Comm), control: &dyn Communicator) -> Result<Value> {
    let mut trainer = Trainer::new(config, mesh, world)?;
    let on = trainer.weights.device();
    let gpu = device::gpu(on);
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let moment = plan.at(0).context("a config has a phase")?;
    let (mut gradients, mut whole, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    let clock = |work: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
        gpu.synchronize()?;
        barrier(control)?;
        let start = Instant::now();
        work()?;
        gpu.synchronize()?;
        slowest(control, start.elapsed().as_secs_f64() * 1e3)
    };
    for step in 0..args.steps + WARM {
        let batch = batch(&trainer, &moment, step as i64);
        whole.push(clock(&mut || {
            losses.push(trainer.step(&moment, &batch, false)?.loss);
            Ok(())
        })?);
    }
    for step in 0..args.steps + WARM {
        let batch = batch(&trainer, &moment, step as i64);
        let context = trainer.context(&moment, moment.batch);
        gradients.push(clock(&mut || {
            drop(trainer.gradients(&context, &batch, false)?);
            Ok(())
        })?);
    }
    let memory = trainer.memory()?.context("it is a GPU")?;
    if let Some(path) = &args.trace {
        let batch = batch(&trainer, &moment, 1);
        let path = path.with_extension(format!("{}.json", control.rank()));
        barrier(control)?;
        shim::profile(&path, || -> Result<()> {
            trainer.step(&moment, &batch, false)?;
            Ok(gpu.synchronize()?)
        })??;
    }
    let tokens = moment.batch * moment.phase.sequence_length;
    Ok(json!({
        "pp": mesh.pp, "dp": mesh.dp, "ep": mesh.ep, "schedule": mesh.schedule.to_string(), "nodes": mesh.nodes.last().map_or(0, |last| last + 1),
        "precision": config.run.precision, "tokens": tokens, "losses": losses, "memory": memory,
        "fwd_bwd_ms": median(gradients.split_off(WARM)), "step_ms": median(whole.split_off(WARM)),
    }))
}
