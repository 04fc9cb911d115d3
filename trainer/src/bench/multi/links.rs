//! The links between a host's GPUs: dispatch's rows in FP8 and combine's in BF16, every rank to every other one.
use super::{WARM, median, slowest, timed, together};
use anyhow::Result;
use kernels::fp8::ScaleRule;
use kernels::ops::{quantise, unpermute};
use parallel::comm::{Communicator, barrier};
use serde_json::{Value, json};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

const ROUNDS: usize = 30;
/// Exchanges in a row.
const CHAIN: usize = 16;
/// A rank's tokens, and V3's width: each token goes to every peer.
const ROWS: i64 = 4096;
const WIDTH: i64 = 7168;

/// Everyone sends everyone `ROWS` rows: one exchange from a GPU with nothing to do, and its host's posting with it; one posted
/// while the GPU was busy, as in a step; several in a row; and beside GEMMs.
pub fn links(world: &dyn Communicator, control: &dyn Communicator, on: Device) -> Result<Value> {
    let peers = world.size() as i64 - 1;
    let counts: Vec<i64> = (0..world.size()).map(|rank| if rank == world.rank() { 0 } else { ROWS }).collect();
    let mut found = json!({});
    for (name, bytes) in [("fp8", WIDTH), ("bf16", 2 * WIDTH)] {
        let rows = Tensor::randint(255, [peers * ROWS, bytes], (Kind::Uint8, on));
        let exchange = || world.all_to_all(vec![rows.shallow_clone()], &counts, &counts);
        let over = || -> Result<()> {
            exchange()?.wait()?;
            Ok(())
        };
        let alone = timed(control, on, ROUNDS, over)?;
        let queued = queued(control, on, world, &over)?;
        let chain = timed(control, on, ROUNDS, || (0..CHAIN).try_for_each(|_| over()))? / CHAIN as f64;
        let each_way = (peers * ROWS * bytes) as f64;
        found[name] = json!({ "alone_us": alone * 1e3, "queued_us": queued * 1e3, "chain_us": chain * 1e3, "gb_per_s": each_way / (alone * 1e6), "chain_gb_per_s": each_way / (chain * 1e6) });
        let gemm = Gemm::lasting((1.5 * chain).max(0.3), control, on)?;
        let beside = || -> Result<()> {
            let under_way = exchange()?;
            gemm.run();
            drop(under_way.wait()?);
            Ok(())
        };
        let (hidden, gemm_ms) = hidden(control, on, &gemm, (&over, &beside))?;
        (found[name]["hidden"], found[name]["gemm_us"]) = (json!(hidden), json!(gemm_ms * 1e3));
    }
    parts(&mut found, world, control, on)?;
    Ok(found)
}

/// Milliseconds of one exchange that the hosts have posted while their GPUs were busy: from where all GPUs are free, which a
/// message of a byte to each tells them, until the slowest has everything.
fn queued(control: &dyn Communicator, on: Device, world: &dyn Communicator, over: &dyn Fn() -> Result<()>) -> Result<f64> {
    let busy = Gemm::lasting(1.0, control, on)?;
    let byte = Tensor::zeros([world.size() as i64, 1], (Kind::Uint8, on));
    let ones = vec![1; world.size()];
    let gpu = kernels::device::gpu(on);
    let mut times = Vec::new();
    for _ in 0..WARM + ROUNDS {
        gpu.synchronize()?;
        barrier(control)?;
        busy.run();
        world.all_to_all(vec![byte.shallow_clone()], &ones, &ones)?.wait()?;
        let mut outcome = Ok(());
        let ms = gpu.time_ms(|| outcome = over())?;
        outcome?;
        times.push(slowest(control, f64::from(ms))?);
    }
    Ok(median(times[WARM..].to_vec()))
}

/// The share of exchanges that GEMMs hide: 1 − (GEMMs and exchanges together − GEMMs alone) ÷ exchanges alone, each GEMM longer
/// than the exchange that it is to hide. A GPU's clock drifts by more than that difference, so every round takes all three, in
/// turn, and the median is of the rounds' own shares. And milliseconds of a GEMM.
fn hidden(
    control: &dyn Communicator,
    on: Device,
    gemm: &Gemm,
    (over, beside): (&dyn Fn() -> Result<()>, &dyn Fn() -> Result<()>),
) -> Result<(f64, f64)> {
    // One GEMM before all: under it the hosts post the first exchange.
    let row = |work: &dyn Fn() -> Result<()>| {
        together(control, on, || {
            gemm.run();
            (0..CHAIN).try_for_each(|_| work())
        })
    };
    let alone = || -> Result<()> {
        gemm.run();
        Ok(())
    };
    let (mut shares, mut gemms) = (Vec::new(), Vec::new());
    for round in 0..WARM + ROUNDS {
        let (before, both, after) = (row(&alone)?, row(beside)?, row(&alone)?);
        let exchanges = together(control, on, || (0..CHAIN).try_for_each(|_| over()))?;
        if round >= WARM {
            shares.push(1.0 - (both - (before + after) / 2.0) / exchanges);
            gemms.push((before + after) / 2.0 / (CHAIN + 1) as f64);
        }
    }
    Ok((median(shares), median(gemms)))
}

/// A product of BF16 matrices.
struct Gemm {
    a: Tensor,
    b: Tensor,
}

impl Gemm {
    /// About `ms` long on the slowest rank.
    fn lasting(ms: f64, control: &dyn Communicator, on: Device) -> Result<Gemm> {
        const SIDE: i64 = 4096;
        let of = |depth: i64| Gemm {
            a: Tensor::randn([SIDE, depth], (Kind::BFloat16, on)),
            b: Tensor::randn([depth, SIDE], (Kind::BFloat16, on)),
        };
        let probe = of(SIDE);
        let one = timed(control, on, 10, || {
            (0..CHAIN).for_each(|_| probe.run());
            Ok(())
        })? / CHAIN as f64;
        Ok(of(((SIDE as f64 * ms / one / 256.0).ceil() as i64 * 256).max(256)))
    }

    fn run(&self) {
        drop(self.a.matmul(&self.b));
    }
}

/// What stands around an exchange: quantising, the same by destination, the sum of what came back, and the counts that go before.
fn parts(found: &mut Value, world: &dyn Communicator, control: &dyn Communicator, on: Device) -> Result<()> {
    let x = Tensor::randn([ROWS, WIDTH], (Kind::BFloat16, on));
    let index = Tensor::randperm(ROWS, (Kind::Int64, on)).to_kind(Kind::Int).view([ROWS, 1]);
    let us = |work: &mut dyn FnMut()| -> Result<f64> {
        let ms = timed(control, on, ROUNDS, || {
            work();
            Ok(())
        })?;
        Ok(ms * 1e3)
    };
    found["quantise_us"] = json!(us(&mut || drop(quantise::rows(&x, ScaleRule::PowerOfTwo)))?);
    found["pack_us"] = json!(us(&mut || drop(quantise::pack(&x, &index, ROWS)))?);
    found["sum_us"] = json!(us(&mut || drop(unpermute::forward(&x, &index, &[])))?);
    let lists = vec![vec![1_i64; 64]; world.size()];
    let mut times = Vec::new();
    for _ in 0..200 {
        let start = Instant::now();
        world.exchange_counts(&lists)?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    found["counts_us"] = json!(slowest(control, median(times))?);
    Ok(())
}
