//! `tiefsee bench --gpu`: one rank's step on a GPU: forward and backward alone, the whole step, what memory goes to, and a
//! trace of one step for the table of kernels (benches/gpu_step.py).
use super::batch;
use anyhow::{Context, Result, ensure};
use kernels::{device, shim};
use model::saved::{LOGITS, bytes};
use model::stage::StageIn;
use model::{ExpertShare, ParamTable, Recompute, Stage};
use parallel::comm::local::solo;
use parallel::mesh::Mesh;
use serde_json::json;
use std::time::Instant;
use tch::{Kind, Tensor};
use trainer::RunConfig;
use trainer::config::DeviceChoice;
use trainer::phase::Plan;
use trainer::step::Trainer;

/// Steps before those that are timed: cuBLAS loads a kernel when a shape first asks for it, and experts' shapes vary.
const WARM: usize = 16;

pub fn run(args: &super::Args, config: &RunConfig) -> Result<()> {
    ensure!(config.run.device == DeviceChoice::Cuda, "bench --gpu: run.device = \"cpu\"; --set run.device=cuda");
    let mut trainer = Trainer::new(config, &Mesh::single(), solo())?;
    let on = trainer.weights.device();
    let gpu = device::gpu(on);
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let moment = plan.at(0).context("a config has a phase")?;
    let (mut gradients, mut steps) = (Vec::new(), Vec::new());
    let mut loss = 0.0;
    for step in 0..args.steps + WARM {
        let batch = batch(&trainer, &moment, step as i64);
        gpu.synchronize()?;
        let start = Instant::now();
        loss = trainer.step(&moment, &batch, false)?.loss;
        gpu.synchronize()?;
        steps.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let memory = trainer.memory()?.context("it is a GPU")?;
    for step in 0..args.steps + WARM {
        let batch = batch(&trainer, &moment, step as i64);
        let context = trainer.context(&moment, moment.batch);
        gpu.synchronize()?;
        let start = Instant::now();
        drop(trainer.gradients(&context, &batch)?);
        gpu.synchronize()?;
        gradients.push(start.elapsed().as_secs_f64() * 1e3);
    }
    trainer.weights.gemms.take();
    let context = trainer.context(&moment, moment.batch);
    drop(trainer.gradients(&context, &batch(&trainer, &moment, 0)[..1])?);
    let gemms = trainer.weights.gemms.take();
    let reports = Recompute { rms_norm: true, mla_up_projection: true, swiglu: true };
    let kept = [kept(&mut trainer, &moment, config.recompute)?, kept(&mut trainer, &moment, reports)?];
    if let Some(path) = &args.trace {
        let batch = batch(&trainer, &moment, 1);
        shim::profile(path, || -> Result<()> {
            trainer.step(&moment, &batch, false)?;
            Ok(gpu.synchronize()?)
        })??;
    }
    let copy = copy_bandwidth(gpu)?;
    let floor = optimizer_bytes(&trainer) as f64 / copy * 1e3;
    println!(
        "{}",
        json!({
            "device": gpu.name(), "precision": config.run.precision, "parameters": trainer.weights.table.numel(), "loss": loss,
            "tokens": moment.batch * moment.phase.sequence_length, "fwd_bwd_ms": median(gradients), "step_ms": median(steps),
            "memory": memory, "kept": kept, "gemms": gemms,
            "copy_tb_per_s": copy / 1e12, "optimizer_floor_ms": floor,
        })
    );
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.drain(..WARM);
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// What one micro-batch's forward keeps for its backward where these things are made again, by part and as torch's allocator
/// has it; the gradient of the logits left out.
fn kept(trainer: &mut Trainer, moment: &trainer::phase::Moment, recompute: Recompute) -> Result<serde_json::Value> {
    let on = trainer.weights.device();
    // The same parameters, whatever is made again.
    let stage = Stage::whole(&mut ParamTable::new(ExpertShare::default(), recompute), &trainer.config);
    let batch = batch(trainer, moment, 0).remove(0);
    let context = trainer.context(moment, moment.batch);
    device::gpu(on).synchronize()?;
    let before = shim::memory(on)?.allocated;
    let (_, stats, saved) = stage.forward(&context, &mut trainer.weights, &batch, StageIn::Tokens)?;
    let after = shim::memory(on)?.allocated;
    let mut parts = bytes(&saved);
    drop((stats, saved));
    let logits = parts.remove(LOGITS).unwrap_or_default();
    Ok(json!({"recompute": recompute, "bytes": after - before - logits, "parts": parts}))
}

/// Bytes a second that a large copy reads and writes.
fn copy_bandwidth(gpu: &device::Gpu) -> Result<f64> {
    let options = (Kind::Float, gpu.device());
    let (from, mut to) = (Tensor::rand([1 << 28], options), Tensor::empty([1 << 28], options));
    let mut times = Vec::new();
    for _ in 0..WARM + 9 {
        times.push(f64::from(gpu.time_ms(|| to.copy_(&from))?));
    }
    Ok((8u64 << 28) as f64 / (median(times) / 1e3))
}

/// What an update and the norm before it must move: gradients twice, masters and moments both ways, the weights.
fn optimizer_bytes(trainer: &Trainer) -> i64 {
    let slots = trainer.optimizer.slots.iter().map(|slot| {
        let (master, moment) = (slot.master.kind().elt_size_in_bytes() as i64, slot.first.kind().elt_size_in_bytes() as i64);
        slot.master.numel() as i64 * (2 * master + 2 * master + 4 * moment)
    });
    slots.sum::<i64>() + trainer.weights.bytes()
}
