//! What rank 0 does for all, over the world communicator: gives out the layout, checks that every rank runs the
//! same thing, and (in `checkpoint::save`) commits checkpoints. Stop signals ride in each step's reduced losses.
use anyhow::Result;
use parallel::comm::mpi::bound_to;
use parallel::comm::{Communicator, broadcast_bytes, gather_bytes};
use serde::{Deserialize, Serialize};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Until a SIGINT counts as a second one: `timeout`, for one, sends it to its child and to the child's group.
const AGAIN: Duration = Duration::from_secs(1);

/// Where one rank sits.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Place {
    pub rank: usize,
    pub host: String,
    pub device: String,
    pub threads: usize,
}

pub fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_string()
}

/// Containers on two machines may bear one name: a machine's every start has an id.
fn machine() -> String {
    format!("{} {}", host(), std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default())
}

/// How many ranks share this rank's cores: those of its machine that are bound to the same ones.
pub fn sharing_cores(world: &dyn Communicator) -> Result<usize> {
    let mine = format!("{} {}", machine(), bound_to());
    Ok(gather_bytes(world, mine.as_bytes())?.iter().filter(|theirs| *theirs == mine.as_bytes()).count())
}

/// The node of every rank: hosts, numbered in the order of their first rank.
pub fn nodes(world: &dyn Communicator) -> Result<Vec<usize>> {
    let hosts = gather_bytes(world, machine().as_bytes())?;
    let mut seen: Vec<&Vec<u8>> = Vec::new();
    hosts.iter().for_each(|host| if !seen.contains(&host) { seen.push(host) });
    Ok(hosts.iter().map(|host| seen.iter().position(|known| *known == host).expect("seen above")).collect())
}

/// The layout in one line: ranks by host.
pub fn gather_layout(world: &dyn Communicator, device: &str, threads: usize) -> Result<Vec<Place>> {
    let mine = Place { rank: world.rank(), host: host(), device: device.to_string(), threads };
    gather_bytes(world, &serde_json::to_vec(&mine)?)?.iter().map(|bytes| Ok(serde_json::from_slice(bytes)?)).collect()
}

/// Every rank must show the same facts (binary, config, data …); the error names the first other rank, the fact, and its first other line.
pub fn agree(world: &dyn Communicator, facts: &[(&str, String)]) -> Result<()> {
    let all = gather_bytes(world, &serde_json::to_vec(facts)?)?;
    let mut verdict: Result<(), String> = Ok(());
    let line = |text: &str, at: usize| text.lines().nth(at).unwrap_or("nothing").to_string();
    for (rank, bytes) in all.iter().enumerate() {
        let theirs: Vec<(String, String)> = serde_json::from_slice(bytes)?;
        for ((name, mine), (_, other)) in facts.iter().zip(&theirs) {
            if world.rank() == 0 && mine != other && verdict.is_ok() {
                let at = mine.lines().zip(other.lines()).take_while(|(mine, other)| mine == other).count();
                verdict = Err(format!("rank {rank} has another {name} than rank 0: {} against {}", line(other, at), line(mine, at)));
            }
        }
    }
    let verdict: Result<(), String> = serde_json::from_slice(&broadcast_bytes(world, &serde_json::to_vec(&verdict)?, 0)?)?;
    verdict.map_err(shared)
}

/// An error that every rank gets: one says it for all. Where it is one rank's, its words begin with that rank.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Shared(pub String);

pub fn shared(words: impl Into<String>) -> anyhow::Error {
    Shared(words.into()).into()
}

/// If any rank failed, all fail with the first one's reason: no rank is left waiting in a collective.
pub fn all_or_none<T>(world: &dyn Communicator, mine: Result<T>) -> Result<T> {
    let told = mine.as_ref().err().map(|error| format!("{error:#}"));
    let all = gather_bytes(world, &serde_json::to_vec(&told)?)?;
    for (rank, bytes) in all.iter().enumerate() {
        if let Some(reason) = serde_json::from_slice::<Option<String>>(bytes)? {
            match mine {
                Err(error) if rank == world.rank() => return Err(error),
                _ => return Err(shared(format!("rank {rank}: {reason}"))),
            }
        }
    }
    mine
}

/// Set by SIGTERM, SIGINT or SIGUSR1: checkpoint after this step and stop. A second SIGINT ends the process at once; of the
/// others more come by themselves: SLURM sends TERM at the beginning and at the end of the grace before a pre-emption.
#[derive(Clone, Default)]
pub struct StopSignal(Arc<AtomicBool>);

impl StopSignal {
    pub fn listen() -> Result<Self> {
        let (signal, insisted) = (StopSignal::default(), Arc::new(AtomicBool::new(false)));
        signal_hook::flag::register_conditional_default(SIGINT, insisted.clone())?;
        let mut interrupts = Signals::new([SIGINT])?;
        std::thread::spawn(move || {
            if interrupts.forever().next().is_some() {
                std::thread::sleep(AGAIN);
                insisted.store(true, Ordering::Relaxed);
            }
        });
        for number in [SIGTERM, SIGINT, SIGUSR1] {
            signal_hook::flag::register(number, signal.0.clone())?;
        }
        Ok(signal)
    }
    pub fn raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::agree;
    use parallel::comm::local::run_local;

    #[test]
    fn ranks_that_differ_are_told_by_the_first_and_its_line() {
        let config = |rank: usize| ["[run]\nseed = 7\n", "[run]\nseed = 7\n", "[run]\nseed = 8\n", "[run]\n"][rank].to_string();
        let said = run_local(4, |world| agree(&*world, &[("binary", "same".into()), ("config", config(world.rank()))]).expect_err("they differ").to_string());
        assert_eq!(said, ["rank 2 has another config than rank 0: seed = 8 against seed = 7"; 4]);
        assert!(run_local(2, |world| agree(&*world, &[("config", config(world.rank()))])).iter().all(Result::is_ok));
    }
}
