//! Save and load of a state of so many bytes on one rank, beside raw fsynced writes and cold raw reads of as many on the same
//! disk: bench_checkpoint DIR [GB] [ROUNDS]. Prints JSON. Caches are dropped before each measurement where that is allowed.
//!
//! A save is timed twice: alone, to its end, and under a step (products of matrices, on every core), for what it costs the
//! thread that trains: `stall_s`, in which that thread does nothing, and `slowed_s`, by which its step takes longer in all.
use anyhow::{Context, Result, ensure};
use model::ModelConfig;
use parallel::comm::local::solo;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use trainer::checkpoint::{Manifest, Reader, Retention, Saver, load_newest};
use trainer::state::StatePart;
use trainer::step::run_beside;

/// Rows and columns of each tensor of the state, FP32.
const SHAPE: [i64; 2] = [4096, 1024];
/// About what a step takes.
const STEP: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().context("bench_checkpoint DIR [GB] [ROUNDS]")?);
    let gb: f64 = args.next().map_or(Ok(2.0), |text| text.parse())?;
    let rounds: usize = args.next().map_or(Ok(3), |text| text.parse())?;
    let bytes_each = (SHAPE[0] * SHAPE[1] * 4) as f64;
    let tensors: Vec<Tensor> =
        (0..(gb * 1e9 / bytes_each).ceil() as usize).map(|_| Tensor::rand(SHAPE, (Kind::Float, Device::Cpu))).collect();
    let bytes = bytes_each * tensors.len() as f64;
    std::fs::create_dir_all(&dir)?;
    let model: ModelConfig = toml::from_str(include_str!("../../configs/model/tiny.toml"))?;
    let mut saver = Saver::new(&dir, Retention { last: 1, every: 0 });
    let step = Step::new();
    let mut measured = Vec::new();
    for round in 0..rounds {
        let raw_write = timed(|| raw_write(&dir.join("raw"), &tensors))?;
        let raw_read = timed(|| raw_read(&dir.join("raw"), &tensors))?;
        std::fs::remove_file(dir.join("raw"))?;
        let head = |save| Manifest { step: 2 * round as u64 + save, ..Manifest::imported(model.clone(), kernels::Precision::F32) };
        let parts = || tensors.iter().enumerate().map(|(index, tensor)| part(index, tensor)).collect::<Vec<_>>();
        let save = timed(|| {
            saver.begin(&*solo(), head(1), parts())?;
            end(&mut saver)
        })?;
        let undisturbed = timed(|| {
            step.run();
            Ok(())
        })?;
        drop_caches();
        let start = Instant::now();
        saver.begin(&*solo(), head(2), parts())?;
        let begun = start.elapsed();
        let ((), held_up) = run_beside(saver.take_copy().into_iter().collect(), || step.run());
        let slowed = start.elapsed().as_secs_f64() - undisturbed;
        end(&mut saver)?;
        let target: Vec<Tensor> = tensors.iter().map(|tensor| tensor.zeros_like()).collect();
        let load = timed(|| load(&dir, &target))?;
        ensure!(tensors.iter().zip(&target).all(|(a, b)| a.equal(b)), "what was loaded is not what was saved");
        measured.push(serde_json::json!({
            "raw_write_s": raw_write, "raw_read_s": raw_read, "save_s": save, "load_s": load,
            "stall_s": (begun + held_up).as_secs_f64(), "slowed_s": slowed,
        }));
    }
    std::fs::remove_dir_all(&dir)?;
    println!("{}", serde_json::json!({"bytes": bytes, "rounds": measured}));
    Ok(())
}

fn part(index: usize, tensor: &Tensor) -> StatePart {
    StatePart { name: format!("weight/{index}"), tensor: tensor.shallow_clone(), start: 0, total: SHAPE[0] }
}

fn end(saver: &mut Saver) -> Result<()> {
    let ended = saver.wait(&*solo())?.context("a save was under way")?;
    ensure!(ended.outcome.is_ok(), "{ended:?}");
    Ok(())
}

/// Stands for a step's forward and backward: they only read the state.
struct Step {
    matrix: Tensor,
    products: usize,
}

impl Step {
    fn new() -> Step {
        let mut step = Step { matrix: Tensor::rand([1024, 1024], (Kind::Float, Device::Cpu)), products: 10 };
        step.run(); // the first one is slow
        let start = Instant::now();
        step.run();
        step.products = (10.0 * STEP.as_secs_f64() / start.elapsed().as_secs_f64()).ceil() as usize;
        step
    }

    fn run(&self) {
        (0..self.products).for_each(|_| drop(self.matrix.matmul(&self.matrix)));
    }
}

fn timed(run: impl FnOnce() -> Result<()>) -> Result<f64> {
    drop_caches();
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64())
}

/// What the disk owes is written, and what it holds is not in memory any more.
fn drop_caches() {
    let _ = std::process::Command::new("sync").status();
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
}

fn raw_write(path: &Path, tensors: &[Tensor]) -> Result<()> {
    let mut file = File::create(path)?;
    for tensor in tensors {
        file.write_all(kernels::shim::bytes(tensor).context("it lies in a row")?)?;
    }
    Ok(file.sync_all()?)
}

fn raw_read(path: &Path, tensors: &[Tensor]) -> Result<()> {
    let mut file = File::open(path)?;
    let mut bytes = vec![0; tensors[0].numel() * 4];
    tensors.iter().try_for_each(|_| Ok(file.read_exact(&mut bytes)?))
}

/// As a resume does: what is needed is read while every byte is checked.
fn load(dir: &Path, target: &[Tensor]) -> Result<()> {
    let mut fill = |reader: &mut Reader| -> Result<()> {
        target.iter().enumerate().try_for_each(|(index, tensor)| reader.fill(&format!("weight/{index}"), &SHAPE, 0, tensor))
    };
    let (found, notes) = load_newest(&*solo(), dir, None, &mut fill)?;
    ensure!(found.is_some(), "no whole checkpoint: {notes:?}");
    Ok(())
}
