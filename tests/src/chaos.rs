//! Kills at random times, of ranks, hosts and launchers, also in the middle of a save: the run that survives them is the
//! undisturbed run, bit for bit. `scripts/chaos.sh` runs it long.
use crate::launching::{Hosts, Started, processes, rank_pid, signal, wait};
use crate::support::{Run, scratch};
use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

const KILLS: u64 = 5;
/// Between kills on the average: more than a checkpoint's distance, so that the run gets on.
const STEPS_A_KILL: u64 = 5;
/// Far above what a step takes on a busy machine.
const LONGEST_STEP: Duration = Duration::from_secs(2);
const RANKS: u64 = 4;
/// The first phase's steps in configs/run/tiny.toml, and a step's tokens in the second.
const FIRST_STEPS: u64 = 18;
const STEP_TOKENS: u64 = 360;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    Rank,
    RankInASave,
    RankAtTheStart,
    Host,
    Launcher,
}

/// Numbers of a seed (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}

struct Chaos {
    hosts: Hosts,
    run: Run,
    launcher: Started,
    launchers: usize,
    random: Random,
    killed: BTreeMap<Victim, u64>,
    /// Kills that left a half checkpoint.
    in_a_save: u64,
}

fn launch(hosts: &Hosts, run: &Run, number: usize) -> Started {
    let command = hosts.supervised("--nproc-per-node 2 --auto-resume --max-restarts 100000 --back-off 0 --heartbeat 5");
    Started::train(command, run, &format!("launcher-{number}"))
}

/// Lines of rank 0's log: its steps, since there is no validation.
fn steps(run: &Run) -> u64 {
    fs::read(run.dir().join("log/rank-0.jsonl")).map_or(0, |bytes| bytes.iter().filter(|&&byte| byte == b'\n').count() as u64)
}

fn half_checkpoint(run: &Run) -> bool {
    let Ok(entries) = fs::read_dir(run.dir().join("checkpoints")) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().ends_with(".partial"))
}

impl Chaos {
    /// The rank's process, once there is one other than `before`.
    fn pid(&self, rank: usize, before: u32) -> u32 {
        let mut found = None;
        wait(&format!("rank {rank}"), || {
            found = rank_pid(&self.run, rank).filter(|pid| *pid != before);
            found.is_some()
        });
        found.expect("just seen")
    }

    fn kill(&mut self, victim: Victim) {
        let rank = self.random.below(RANKS) as usize;
        match victim {
            Victim::Rank => signal(self.pid(rank, 0), "KILL"),
            Victim::RankAtTheStart => {
                let first = self.pid(rank, 0);
                signal(first, "KILL");
                let second = self.pid(rank, first);
                signal(second, "KILL");
            }
            Victim::RankInASave => {
                let pid = self.pid(rank, 0);
                let start = Instant::now();
                // A poll's own pace, for a save is short; a run that is starting again has none for a while.
                while !half_checkpoint(&self.run) && start.elapsed() < Duration::from_secs(30) {
                    std::thread::sleep(Duration::from_micros(200));
                }
                signal(pid, "KILL");
                std::thread::sleep(Duration::from_millis(100));
                self.in_a_save += u64::from(half_checkpoint(&self.run));
            }
            Victim::Host => {
                let host = format!("h{}", 1 + self.random.below(2));
                self.hosts.order("crash", &host);
            }
            Victim::Launcher => self.launcher.signal("KILL"),
        }
        *self.killed.entry(victim).or_default() += 1;
        // Whoever watches a launcher (SLURM, a person) starts it again.
        if victim == Victim::Launcher {
            wait("the launcher's end", || self.launcher.ended().is_some());
        }
        std::thread::sleep(Duration::from_millis(300));
        if self.launcher.ended().is_some() {
            self.launchers += 1;
            self.launcher = launch(&self.hosts, &self.run, self.launchers);
        }
    }
}

#[test]
fn a_run_survives_kills_of_ranks_hosts_and_launchers_bit_for_bit() {
    let Some(hosts) = Hosts::up(2) else { return };
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (kills, seed) = (number("CHAOS_KILLS", KILLS), number("CHAOS_SEED", 1));
    let total = FIRST_STEPS + kills * STEPS_A_KILL;
    let tokens = format!("phase.1.tokens={}", (total - FIRST_STEPS) * STEP_TOKENS);
    let set = [tokens.as_str(), "parallel.pp=2", "parallel.ep=2", "checkpoint.every=3", "validation.every=0", "model.vocab_size=3000"];

    let whole = Run::new("chaos-undisturbed", &set);
    let mut undisturbed = launch(&hosts, &whole, 0);
    assert_eq!(undisturbed.code_within(LONGEST_STEP * total as u32), 0, "{}", undisturbed.said());
    assert_eq!(steps(&whole), total);

    let mut run = Run::new("chaos", &set);
    if std::env::var("CHAOS_SECOND_TIER").is_ok() {
        let copies = scratch().join("chaos-copies");
        fs::create_dir_all(&copies).expect("a folder");
        run.add(&format!("checkpoint.second_tier={{every=1,dir=\"{}\"}}", copies.display()));
    }
    let launcher = launch(&hosts, &run, 1);
    let mut chaos = Chaos { hosts, run, launcher, launchers: 1, random: Random(seed), killed: BTreeMap::new(), in_a_save: 0 };
    let start = Instant::now();
    for kill in 0..kills {
        let at = kill * STEPS_A_KILL + 1 + chaos.random.below(STEPS_A_KILL);
        wait(&format!("step {at}"), || steps(&chaos.run) >= at);
        // The first of each kind in turn, so that a short run has them all.
        let kinds = [Victim::RankInASave, Victim::Launcher, Victim::Host, Victim::Rank, Victim::RankAtTheStart];
        let victim = kinds[if kill < 5 { kill as usize } else { chaos.random.below(5) as usize }];
        println!("kill {} at step {}: {victim:?}", kill + 1, steps(&chaos.run));
        chaos.kill(victim);
    }
    let Chaos { run, mut launcher, launchers, killed, in_a_save, .. } = chaos;
    assert_eq!(launcher.code_within(LONGEST_STEP * total as u32), 0, "{}", launcher.said());
    wait("the end of every process", || processes(&run).is_empty());
    println!("{kills} kills in {:.0} s: {killed:?}, {in_a_save} of them left half a checkpoint; {launchers} launchers", start.elapsed().as_secs_f64());
    assert_eq!(run.samples(), whole.samples(), "samples were lost or repeated");
    for key in ["step", "loss", "mtp_loss", "balance_loss", "grad_norm"] {
        assert_eq!(run.series(key), whole.series(key), "{key} is not the undisturbed run's");
    }
    let (survived, undisturbed) = (run.state(), whole.state());
    assert_eq!(survived.keys().collect::<Vec<_>>(), undisturbed.keys().collect::<Vec<_>>());
    assert!(survived.iter().all(|(name, tensor)| tensor.equal(&undisturbed[name])), "weights or moments are not the undisturbed run's");
}
