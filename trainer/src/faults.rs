//! `[faults]` of a run's config, off by default: things that go wrong on purpose, at a given rank and step, to see what the
//! run makes of them. Each happens once in the life of a run directory: log/faults.jsonl remembers it over restarts.
mod memory;

pub use memory::flip_any;

use anyhow::{Context, Result, ensure};
use parallel::comm::{Communicator, TensorSpec};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tch::{Device, Kind};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FaultsSection {
    pub inject: Vec<Fault>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub random: Option<RandomFaults>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    pub kind: FaultKind,
    pub rank: usize,
    /// As the log counts: the first is 1.
    pub step: u64,
    /// Of a slow rank: added to each of so many steps.
    #[serde(default = "slow_ms")]
    pub ms: u64,
    #[serde(default = "slow_steps")]
    pub steps: u64,
}

/// `count` faults of these kinds on any ranks, each at a step of its own from `first` to `last`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandomFaults {
    pub seed: u64,
    pub count: u64,
    pub first: u64,
    pub last: u64,
    pub kinds: Vec<FaultKind>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// SIGKILL to itself before the step.
    Kill,
    /// The rank stops for ever before the step.
    Hang,
    /// It fails before the step, alone.
    Fail,
    /// It works `ms` longer in each of `steps` steps.
    Slow,
    /// It waits for a message that never comes.
    LostMessage,
    /// One element of its share of the summed gradients.
    Nan,
    /// Its share of the summed gradients, times 200.
    Spike,
    /// The top bit of an exponent in its share of the summed gradients.
    FlipGradient,
    /// A bit of a weight between the update and its use.
    FlipWeight,
    /// A bit of a master or a moment between two updates.
    FlipMaster,
    /// A bit of what its stage makes of the micro-batch that `checks.recompute_every` looks at.
    FlipActivation,
    /// The next checkpoint's share of this rank finds no room.
    FullDisk,
}

fn slow_ms() -> u64 {
    1000
}

fn slow_steps() -> u64 {
    100
}

impl FaultsSection {
    pub fn validate(&self) -> Result<()> {
        for (index, fault) in self.inject.iter().enumerate() {
            ensure!(fault.step >= 1, "faults.inject.{index}: step = 0: the first step is 1");
        }
        if let Some(RandomFaults { count, first, last, kinds, .. }) = &self.random {
            ensure!(*first >= 1 && first <= last, "faults.random: steps {first} to {last} are none; the first step is 1");
            ensure!(
                *count <= last - first + 1,
                "faults.random.count = {count}: there are only {} steps from {first} to {last}",
                last - first + 1
            );
            ensure!(!kinds.is_empty(), "faults.random.kinds = []: must name at least one kind");
        }
        Ok(())
    }

    /// May this kind happen?
    pub fn has(&self, kind: FaultKind) -> bool {
        self.inject.iter().any(|fault| fault.kind == kind) || self.random.as_ref().is_some_and(|random| random.kinds.contains(&kind))
    }

    /// All of a world's faults; a function of the section and the number of ranks.
    pub fn plan(&self, ranks: usize) -> Result<Vec<Fault>> {
        for (index, Fault { rank, kind, .. }) in self.inject.iter().enumerate() {
            ensure!(*kind != FaultKind::LostMessage || ranks > 1, "faults.inject.{index}: a lost-message needs two ranks");
            ensure!(*rank < ranks, "faults.inject.{index}: rank = {rank}: the world has ranks 0 to {}", ranks - 1);
        }
        let mut all = self.inject.clone();
        if let Some(random) = &self.random {
            let mut dice = Dice(random.seed);
            let mut steps = BTreeSet::new();
            while (steps.len() as u64) < random.count {
                steps.insert(random.first + dice.below(random.last - random.first + 1));
            }
            all.extend(steps.into_iter().map(|step| Fault {
                kind: random.kinds[dice.below(random.kinds.len() as u64) as usize],
                rank: dice.below(ranks as u64) as usize,
                step,
                ms: slow_ms(),
                steps: slow_steps(),
            }));
        }
        Ok(all)
    }
}

/// Numbers of a seed (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }
}

/// One rank's faults that have not happened yet.
#[derive(Default)]
pub struct Faults {
    /// With their number among all of the run.
    waiting: Vec<(usize, Fault)>,
    record: PathBuf,
    /// Works so much longer, up to this step.
    slow: Option<(Duration, u64)>,
}

/// A line of log/faults.jsonl.
#[derive(Serialize, Deserialize)]
struct Happened {
    fault: usize,
    kind: FaultKind,
    rank: usize,
    step: u64,
}

impl Faults {
    /// What this rank has still before it.
    pub fn open(section: &FaultsSection, run_dir: &Path, (rank, ranks): (usize, usize)) -> Result<Faults> {
        let record = run_dir.join("log/faults.jsonl");
        let text = std::fs::read_to_string(&record).unwrap_or_default();
        let happened: BTreeSet<usize> = text.lines().filter_map(|line| Some(serde_json::from_str::<Happened>(line).ok()?.fault)).collect();
        let waiting =
            section.plan(ranks)?.into_iter().enumerate().filter(|(number, fault)| fault.rank == rank && !happened.contains(number));
        Ok(Faults { waiting: waiting.collect(), record, slow: None })
    }

    /// The fault of this kind that is due, which from here on has happened.
    fn take(&mut self, kind: FaultKind, due: impl Fn(u64) -> bool) -> Option<Fault> {
        let index = self.waiting.iter().position(|(_, fault)| fault.kind == kind && due(fault.step))?;
        let (number, fault) = self.waiting.remove(index);
        tracing::warn!("fault injected on rank {}: {} at step {}", fault.rank, name(kind), fault.step);
        if let Err(error) = self.remember(number, &fault) {
            panic!("{error:#}: the fault would happen again after a restart");
        }
        Some(fault)
    }

    fn remember(&self, number: usize, fault: &Fault) -> Result<()> {
        let path = &self.record;
        let mut line = serde_json::to_vec(&Happened { fault: number, kind: fault.kind, rank: fault.rank, step: fault.step })?;
        line.push(b'\n');
        let write = || {
            let mut file = OpenOptions::new().create(true).append(true).open(path)?;
            file.write_all(&line)?;
            file.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// Before the step begins: what befalls the process.
    pub fn before_step(&mut self, step: u64, world: &dyn Communicator) -> Result<()> {
        if self.waiting.is_empty() && self.slow.is_none() {
            return Ok(());
        }
        let now = |at: u64| at == step;
        if self.take(FaultKind::Kill, now).is_some() {
            signal_hook::low_level::raise(signal_hook::consts::SIGKILL).expect("a process may kill itself");
        }
        if self.take(FaultKind::Hang, now).is_some() {
            loop {
                std::thread::park();
            }
        }
        ensure!(self.take(FaultKind::Fail, now).is_none(), "faults.inject: a fail before step {step}");
        if self.take(FaultKind::LostMessage, now).is_some() {
            let never = TensorSpec { shape: vec![1], kind: Kind::Double, device: Device::Cpu };
            let _ = world.exchange(vec![], vec![((world.rank() + 1) % world.size(), never)])?.wait()?;
        }
        if let Some(Fault { ms, steps, .. }) = self.take(FaultKind::Slow, now) {
            self.slow = Some((Duration::from_millis(ms), step + steps));
        }
        match self.slow {
            Some((longer, end)) if step < end => std::thread::sleep(longer),
            _ => self.slow = None,
        }
        Ok(())
    }

    /// While the checkpoint after `step` is written.
    pub fn disk(&mut self, step: u64) -> std::io::Result<()> {
        const NO_SPACE: i32 = 28; // ENOSPC
        match self.take(FaultKind::FullDisk, |at| at <= step) {
            Some(_) => Err(std::io::Error::from_raw_os_error(NO_SPACE)),
            None => Ok(()),
        }
    }
}

fn name(kind: FaultKind) -> String {
    serde_json::to_string(&kind).expect("a plain name").trim_matches('"').to_string()
}

#[cfg(test)]
mod tests;
