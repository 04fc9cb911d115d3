//! Which hosts there are for the next start, which are left out of it, and which are out of reach now.
use crate::args::Args;
use crate::environment::{Environment, Slurm, host_name, secret};
use crate::heartbeat::{Heartbeats, VARIABLE};
use crate::layout::{Layout, Starter, listed, starter};
use crate::rendezvous::Rendezvous;
use crate::wire::Secret;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Failures after which a host is left out.
const TOO_MANY: usize = 2;
/// With enough nodes at the rendezvous but not all: how long the rest is waited for.
const LAST_CALL: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(100);

pub struct Hosts {
    source: Source,
    /// Those within the restarts' window.
    failures: BTreeMap<String, Vec<Instant>>,
    left_out: Vec<String>,
    heartbeats: Option<Heartbeats>,
    /// The job whose nodes they are, where srun starts the ranks.
    job: Option<Slurm>,
}

enum Source {
    /// Empty: this one, or those that mpirun finds in SLURM's allocation.
    Listed(Vec<String>),
    Rendezvous {
        own: String,
        others: Rendezvous,
    },
}

/// The silence that counts as a loss.
pub fn silence(args: &Args) -> Duration {
    if args.heartbeat > 0.0 { Duration::from_secs_f64(args.heartbeat) } else { Duration::MAX }
}

/// The file's, or the environment's.
pub fn shared_secret(args: &Args) -> Result<Secret> {
    match &args.secret_file {
        Some(path) => Secret::read(path),
        None => Secret::new(secret().context("a rendezvous needs a secret: --secret-file FILE, or the variable TIEFSEE_SECRET")?.as_bytes()).context("TIEFSEE_SECRET"),
    }
}

impl Hosts {
    pub fn open(args: &Args, environment: &Environment) -> Result<Self> {
        let source = match &args.rdzv {
            Some(address) => {
                let (own, nodes) = (host_name(), args.nnodes.expect("--rdzv requires --nnodes").most);
                let others = Rendezvous::listen(address, shared_secret(args)?, &own, nodes, silence(args))?;
                Source::Rendezvous { own, others }
            }
            None => Source::Listed(listed(args, environment)?),
        };
        // SLURM's own daemons watch what srun starts.
        let beats = args.heartbeat > 0.0 && starter(args, environment) == Starter::Mpirun && matches!(&source, Source::Listed(hosts) if hosts.len() > 1);
        let heartbeats = beats.then(|| Heartbeats::listen(args.interface.as_deref(), silence(args))).transpose()?;
        let job = environment.slurm.clone().filter(|_| starter(args, environment) == Starter::Srun);
        Ok(Hosts { source, failures: BTreeMap::new(), left_out: Vec::new(), heartbeats, job })
    }

    /// The hosts for a start, in order. At a rendezvous it waits for them; None: `stop` said so meanwhile.
    pub fn gather(&self, args: &Args, mut stop: impl FnMut() -> bool) -> Result<Option<Vec<String>>> {
        let usable = |hosts: Vec<String>| -> Vec<String> { hosts.into_iter().filter(|host| !self.left_out.contains(host)).collect() };
        let (own, others) = match &self.source {
            Source::Listed(hosts) => {
                let least = args.nnodes.map_or(hosts.len(), |nodes| nodes.least);
                return still_there(usable(hosts.clone()), &self.job.as_ref().map(Slurm::hosts_now).unwrap_or_default(), least).map(Some);
            }
            Source::Rendezvous { own, others } => (own, others),
        };
        let nodes = args.nnodes.expect("--rdzv requires --nnodes");
        let (start, mut enough_since) = (Instant::now(), None);
        loop {
            let here = usable([vec![own.clone()], others.names()].concat());
            enough_since = enough_since.or(Some(Instant::now())).filter(|_| here.len() >= nodes.least);
            let all = here.len() >= nodes.most - self.left_out.len().min(nodes.most - nodes.least);
            if all || enough_since.is_some_and(|since: Instant| since.elapsed() > LAST_CALL) {
                others.forget_lost();
                return Ok(Some(here));
            }
            if stop() || others.stops() > 0 {
                return Ok(None);
            }
            let waited = start.elapsed().as_secs_f64();
            anyhow::ensure!(args.start_limit == 0.0 || waited < args.start_limit, "only {} of {} node(s) came to the rendezvous within {waited:.0} s", here.len(), nodes.least);
            std::thread::sleep(TICK);
        }
    }

    /// A start begins: earlier signs of life no longer count. Variables for mpirun.
    pub fn begin(&self, attempt: usize) -> Option<(String, String)> {
        let heartbeats = self.heartbeats.as_ref()?;
        heartbeats.begin(attempt);
        Some((VARIABLE.to_string(), heartbeats.told(attempt)))
    }

    /// A host of this start that is out of reach: its name, and what is known.
    pub fn lost(&self, layout: &Layout, now: Instant) -> Option<(String, String)> {
        if let Source::Rendezvous { others, .. } = &self.source {
            let host = others.lost().filter(|host| layout.hosts.contains(host))?;
            let words = format!("host {host} is lost: its launcher is gone or out of reach");
            return Some((host, words));
        }
        let (rank, quiet) = self.heartbeats.as_ref()?.silent(now)?;
        let host = layout.host_of(rank)?.to_string();
        let words = format!("host {host} (ranks {rank} to {}) is lost: no sign of life for {:.0} s", rank + layout.ranks_per_node - 1, quiet.as_secs_f64());
        Some((host, words))
    }

    /// One more failure of a host, which is left out after some; at once where no start can have it (`down`). What follows from it,
    /// in words.
    pub fn blame(&mut self, (host, down): (&str, bool), args: &Args, now: Instant) -> Option<String> {
        let all = match &self.source {
            Source::Listed(listed) => listed.clone(),
            // Node 0 cannot leave itself out.
            Source::Rendezvous { own, .. } if host == own => return None,
            // The blamed one may be gone by now.
            Source::Rendezvous { own, others } => [vec![own.clone(), host.to_string()], others.names()].concat(),
        };
        let failures = self.failures.entry(host.to_string()).or_default();
        failures.push(now);
        failures.retain(|then| (now - *then).as_secs_f64() <= args.restart_window);
        let failures = if down { failures.len().max(TOO_MANY) } else { failures.len() };
        let usable = |name: &&String| !self.left_out.contains(name);
        if failures < TOO_MANY || !all.iter().filter(usable).any(|name| name == host) {
            return None;
        }
        let how = if down { "cannot be used".to_string() } else { format!("failed {failures} times") };
        let left = all.iter().filter(usable).filter(|name| *name != host).count();
        let least = args.nnodes.map_or(all.len(), |nodes| nodes.least);
        if left < least {
            return (failures == TOO_MANY).then(|| format!("host {host} {how}, but is kept: {least} host(s) are asked for, and {left} would be left"));
        }
        self.left_out.push(host.to_string());
        Some(format!("host {host} {how} and is left out from here on; {left} host(s) are left"))
    }

    /// Where mpirun's agents find us.
    pub fn socket(&self) -> Option<PathBuf> {
        match &self.source {
            Source::Rendezvous { others, .. } => Some(others.socket()),
            Source::Listed(_) => None,
        }
    }

    /// Requests to stop from other nodes.
    pub fn stops(&self) -> usize {
        match &self.source {
            Source::Rendezvous { others, .. } => others.stops(),
            Source::Listed(_) => 0,
        }
    }

    pub fn over(&self, code: u8) {
        if let Source::Rendezvous { others, .. } = &self.source {
            others.over(code);
        }
    }
}

/// Those of the job's nodes that it has `now`, if SLURM tells: a start that names another is refused whole.
fn still_there(hosts: Vec<String>, now: &[String], least: usize) -> Result<Vec<String>> {
    let here: Vec<String> = hosts.iter().filter(|host| now.is_empty() || now.contains(host)).cloned().collect();
    anyhow::ensure!(now.is_empty() || here.len() >= least, "SLURM has taken nodes from this job: {least} are asked for, and of {} it has {}", hosts.join(", "), here.join(", "));
    Ok(here)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn hosts(options: &str) -> (Args, Hosts) {
        let mut args = Args::parse_from(format!("tiefsee-launch --heartbeat 0 {options} -- resume a").split_whitespace());
        // A port that is free.
        args.rdzv = args.rdzv.map(|_| "127.0.0.1:0".to_string());
        let hosts = Hosts::open(&args, &Environment::default()).expect("hosts");
        (args, hosts)
    }

    #[test]
    fn a_host_that_failed_twice_is_left_out_as_long_as_enough_remain() {
        let (args, mut hosts) = hosts("--hosts a,b,c --nnodes 2");
        let now = Instant::now();
        let mut blame = |host: &str| hosts.blame((host, false), &args, now);
        assert_eq!(blame("b"), None);
        assert!(blame("b").expect("words").contains("left out"));
        assert_eq!(blame("c"), None);
        assert!(blame("c").expect("words").contains("is kept: 2 host(s)"));
        assert_eq!((blame("elsewhere"), blame("elsewhere")), (None, None), "a name that nobody gave");
        assert_eq!(hosts.gather(&args, || false).expect("hosts").expect("not stopped"), ["a", "c"]);
    }

    #[test]
    fn a_host_of_an_allocation_is_named_and_left_out() {
        let args = Args::parse_from("tiefsee-launch --nnodes 2 -- resume a".split(' '));
        let slurm = Slurm { nodes: 3, hosts: ["a", "b", "c"].map(String::from).into(), tasks_per_node: Some(4), pmix: true, ..Slurm::default() };
        let environment = Environment { cores: 8, slurm: Some(slurm), ..Environment::default() };
        let mut hosts = Hosts::open(&args, &environment).expect("hosts");
        let mut start = |blamed: &str| {
            let layout = Layout::new(&args, &environment, &hosts.gather(&args, || false).expect("hosts").expect("not stopped")).expect("a layout");
            assert_eq!(layout.starter, Starter::Srun);
            hosts.blame((blamed, false), &args, Instant::now());
            layout.host_of(4).map(str::to_string)
        };
        assert_eq!([start("b"), start("b"), start("b")].map(|host| host.expect("a name")), ["b", "b", "c"]);
        assert!(hosts.heartbeats.is_none(), "nobody would beat");
    }

    #[test]
    fn a_node_that_slurm_has_taken_is_not_asked_for() {
        let names = |list: &str| -> Vec<String> { list.split_whitespace().map(str::to_string).collect() };
        let here = |now: &str, least| still_there(names("a b c"), &names(now), least).map_err(|error| error.to_string());
        assert_eq!(here("a c", 2), Ok(names("a c")));
        assert_eq!(here("", 3), Ok(names("a b c")), "it does not tell");
        assert_eq!(here("a c", 3), Err("SLURM has taken nodes from this job: 3 are asked for, and of a, b, c it has a, c".to_string()));
    }

    #[test]
    fn a_host_that_is_down_is_left_out_at_once() {
        let (args, mut hosts) = hosts("--hosts a,b,c --nnodes 2");
        assert!(hosts.blame(("b", true), &args, Instant::now()).expect("words").contains("host b cannot be used and is left out"));
        assert_eq!(hosts.gather(&args, || false).expect("hosts").expect("not stopped"), ["a", "c"]);
    }

    #[test]
    fn a_failure_is_forgotten_with_the_window() {
        let (args, mut hosts) = hosts("--hosts a,b,c --nnodes 2 --restart-window 60");
        let now = Instant::now();
        assert_eq!(hosts.blame(("b", false), &args, now), None);
        assert_eq!(hosts.blame(("b", false), &args, now + Duration::from_secs(61)), None);
        assert!(hosts.blame(("b", false), &args, now + Duration::from_secs(62)).is_some());
    }

    #[test]
    fn a_node_at_a_rendezvous_is_left_out_only_where_it_is_not_needed() {
        let secret = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(secret.path(), "0123456789abcdef").expect("written");
        for (nodes, words) in [("2", "is kept: 2 host(s) are asked for, and 1 would be left"), ("1:2", "left out from here on; 1 host(s) are left")] {
            let (args, mut hosts) = hosts(&format!("--rdzv 127.0.0.1:1 --node-rank 0 --nnodes {nodes} --secret-file {}", secret.path().display()));
            let now = Instant::now();
            assert_eq!(hosts.blame(("b", false), &args, now), None);
            let said = hosts.blame(("b", false), &args, now).expect("words");
            assert!(said.contains(words), "{said}");
        }
    }
}
