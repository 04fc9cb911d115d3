//! Save and load of a state of so many bytes on one rank, beside raw fsynced writes and cold raw reads of as many on the same
//! disk: bench_checkpoint DIR [GB]. Prints JSON, a round for each line that it reads. Caches are dropped before each
//! measurement where that is allowed.
//!
//! A save is timed twice: alone, to its end, and under a step (products of matrices, on every core), for what it costs the
//! thread that trains: `stall_s`, in which that thread does nothing, and `slowed_s`, by which its step takes longer in all.
use anyhow::{Context, Result, ensure};
use memmap2::{Advice, MmapMut};
use model::ModelConfig;
use parallel::comm::local::solo;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
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
    let dir = PathBuf::from(args.next().context("bench_checkpoint DIR [GB]")?);
    let gb: f64 = args.next().map_or(Ok(2.0), |text| text.parse())?;
    let count = (gb * 1e9 / (4 * SHAPE[0] * SHAPE[1]) as f64).ceil() as usize;
    let tensors: Vec<Tensor> = (0..count).map(|_| Tensor::rand(SHAPE, (Kind::Float, Device::Cpu))).collect();
    std::fs::create_dir_all(&dir)?;
    let mut saver = Saver::new(&dir, Retention { last: usize::MAX, every: 0 });
    let step = Step::new();
    for line in std::io::stdin().lines() {
        line?;
        println!("{}", round(&dir, &tensors, &mut saver, &step)?);
    }
    Ok(std::fs::remove_dir_all(&dir)?)
}

fn round(dir: &Path, tensors: &[Tensor], saver: &mut Saver, step: &Step) -> Result<serde_json::Value> {
    let (raw, checkpoints) = (dir.join("raw"), dir.join("checkpoints"));
    let bytes = tensors.iter().map(|tensor| 4 * tensor.numel()).sum();
    let cached = Raw::Cached.seconds(&raw, bytes)?;
    let direct = Raw::Direct.seconds(&raw, bytes)?;
    let large = Raw::Large.seconds(&raw, bytes)?;
    let model: ModelConfig = toml::from_str(include_str!("../../configs/model/tiny.toml"))?;
    let head = |step| Manifest { step, ..Manifest::imported(model.clone(), kernels::Precision::F32) };
    let parts = || tensors.iter().enumerate().map(|(index, tensor)| part(index, tensor)).collect::<Vec<_>>();
    let save = timed(|| {
        saver.begin(&*solo(), head(1), parts())?;
        end(saver)
    })?;
    std::fs::remove_dir_all(&checkpoints)?;
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
    end(saver)?;
    let target: Vec<Tensor> = tensors.iter().map(|tensor| tensor.zeros_like()).collect();
    let load = timed(|| load(dir, &target))?;
    ensure!(tensors.iter().zip(&target).all(|(a, b)| a.equal(b)), "what was loaded is not what was saved");
    std::fs::remove_dir_all(&checkpoints)?;
    Ok(serde_json::json!({
        "bytes": bytes,
        "cached_write_s": cached.0, "direct_write_s": direct.0, "large_write_s": large.0,
        "cached_read_s": cached.1, "direct_read_s": direct.1, "large_read_s": large.1,
        "save_s": save, "load_s": load, "stall_s": (begun + held_up).as_secs_f64(), "slowed_s": slowed,
    }))
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

/// How plain programs write so many bytes, `dd` for one, from memory that is there.
#[derive(Clone, Copy)]
enum Raw {
    /// Through the page cache.
    Cached,
    /// Past it.
    Direct,
    /// Past it, in large pages: about what the disk can do.
    Large,
}

impl Raw {
    fn open(self, options: &mut OpenOptions, path: &Path) -> Result<File> {
        Ok(options.custom_flags(if matches!(self, Raw::Cached) { 0 } else { libc::O_DIRECT }).open(path)?)
    }

    /// Of a size that disks are fastest with; tensors divide into it.
    fn memory(self) -> Result<MmapMut> {
        let mut memory = MmapMut::map_anon(4 << 20)?;
        memory.advise(if matches!(self, Raw::Large) { Advice::HugePage } else { Advice::NoHugePage })?;
        memory.fill(1);
        Ok(memory)
    }

    /// (seconds of a fsynced write, of a cold read)
    fn seconds(self, path: &Path, bytes: usize) -> Result<(f64, f64)> {
        let mut memory = self.memory()?;
        let times = bytes / memory.len();
        let write = timed(|| {
            let mut file = self.open(OpenOptions::new().write(true).create(true).truncate(true), path)?;
            (0..times).try_for_each(|_| file.write_all(&memory))?;
            Ok(file.sync_all()?)
        })?;
        let read = timed(|| {
            let mut file = self.open(OpenOptions::new().read(true), path)?;
            Ok((0..times).try_for_each(|_| file.read_exact(&mut memory))?)
        })?;
        std::fs::remove_file(path)?;
        Ok((write, read))
    }
}

/// As a resume does: what is needed is read while every byte is checked.
fn load(dir: &Path, target: &[Tensor]) -> Result<()> {
    let mut fill = |reader: &mut Reader| -> Result<()> {
        target.iter().enumerate().try_for_each(|(index, tensor)| reader.fill(&format!("weight/{index}"), &SHAPE, 0, tensor))?;
        reader.read()
    };
    let found = load_newest(&*solo(), dir, None, &mut fill)?;
    ensure!(found.newest.is_some(), "no whole checkpoint: {:?}", found.notes);
    Ok(())
}
