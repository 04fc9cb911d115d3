//! How many ranks there are, on which hosts, and what starts them. A pure function of arguments, environment and the hosts
//! that are left out.
use crate::args::{Args, Launcher, Ranks};
use crate::environment::Environment;
use anyhow::{Context, Result, bail, ensure};
use std::net::{IpAddr, UdpSocket};
use std::path::Path;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// In rank order; empty where mpirun or SLURM knows them by itself.
    pub hosts: Vec<String>,
    pub nodes: usize,
    pub ranks_per_node: usize,
    pub starter: Starter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    Mpirun,
    Srun,
}

/// Hosts named on the command line, in order, or else SLURM's, where srun starts the ranks: mpirun knows these by itself.
pub fn listed(args: &Args, environment: &Environment) -> Result<Vec<String>> {
    ensure!(args.hosts.iter().all(|host| !host.trim().is_empty()), "--hosts {}: a name is empty", args.hosts.join(","));
    match (&args.hostfile, &environment.slurm) {
        (Some(path), _) => {
            let hosts = hosts_of(&read(path)?);
            ensure!(!hosts.is_empty(), "--hostfile {}: names no host", path.display());
            Ok(hosts)
        }
        (None, _) if let Some(twice) = named_twice(&args.hosts) => bail!("--hosts {}: {twice} is named twice", args.hosts.join(",")),
        (None, Some(slurm)) if args.hosts.is_empty() && starter(args, environment) == Starter::Srun => Ok(slurm.hosts.clone()),
        (None, _) => Ok(args.hosts.clone()),
    }
}

pub fn starter(args: &Args, environment: &Environment) -> Starter {
    let here = args.standalone || !args.hosts.is_empty() || args.hostfile.is_some() || args.rdzv.is_some();
    match args.launcher {
        Launcher::Mpirun => Starter::Mpirun,
        Launcher::Srun => Starter::Srun,
        Launcher::Auto if !here && environment.slurm.as_ref().is_some_and(|slurm| slurm.pmix) => Starter::Srun,
        Launcher::Auto => Starter::Mpirun,
    }
}

/// How many ranks each host takes by the hostfile's word, if it says so.
pub fn slots(args: &Args) -> Result<Option<usize>> {
    let Some(path) = &args.hostfile else { return Ok(None) };
    slots_of(&read(path)?, args.nproc_per_node == Ranks::Auto).with_context(|| format!("--hostfile {}", path.display()))
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read --hostfile {}", path.display()))
}

/// The first that is another name of one before it.
fn named_twice(hosts: &[String]) -> Option<&String> {
    hosts.iter().enumerate().find_map(|(at, host)| hosts[..at].iter().any(|before| same_host(before, host)).then_some(host))
}

/// Names of a hostfile, each once, without comments and options.
fn hosts_of(text: &str) -> Vec<String> {
    let mut hosts: Vec<String> = Vec::new();
    for (host, _) in hosts_with_options(text) {
        if place(host, hosts.iter().map(String::as_str)).is_none() {
            hosts.push(host.to_string());
        }
    }
    hosts
}

/// Which of `hosts` this one is, by its very name first: a batch system's file names each for every core.
fn place<'a>(host: &str, hosts: impl Iterator<Item = &'a str> + Clone) -> Option<usize> {
    hosts.clone().position(|other| other == host).or_else(|| hosts.clone().position(|other| same_host(other, host)))
}

fn hosts_with_options(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| {
        let line = line.split('#').next()?.trim();
        (!line.is_empty()).then(|| line.split_once(char::is_whitespace).unwrap_or((line, "")))
    })
}

/// The fewest of all hosts; the same for all where they are to be the ranks of each. A host takes as many as it is named times, where
/// one is named more than once.
fn slots_of(text: &str, same: bool) -> Result<Option<usize>> {
    let mut all: Vec<(&str, Option<usize>, usize)> = Vec::new();
    for (host, options) in hosts_with_options(text) {
        // Blanks around the sign are allowed.
        let options = options.split_whitespace().collect::<Vec<_>>().join(" ").replace(" =", "=").replace("= ", "=");
        let given = options.split(' ').find_map(|option| option.strip_prefix("slots="));
        let number = |given: &str| given.parse().ok().filter(|&slots| slots > 0).with_context(|| format!("host {host}: slots={given} is no number from 1"));
        let slots = given.map(number).transpose()?;
        match place(host, all.iter().map(|(other, ..)| *other)) {
            Some(at) => {
                ensure!(slots.is_none() && all[at].1.is_none(), "host {host} is named twice, and with slots=");
                all[at].2 += 1;
            }
            None => all.push((host, slots, 1)),
        }
    }
    let repeated = all.iter().any(|(.., times)| *times > 1);
    let counted: Vec<(&str, Option<usize>)> = all.iter().map(|(host, slots, times)| (*host, slots.or(repeated.then_some(*times)))).collect();
    let Some((other, expected)) = counted.first() else { return Ok(None) };
    let shown = |slots: &Option<usize>| slots.map_or("no slots".to_string(), |slots| format!("slots={slots}"));
    for (host, slots) in &counted {
        ensure!(slots == expected || !same, "host {host} has {}, but host {other} has {}: ranks are as many on each host", shown(slots), shown(expected));
    }
    Ok(counted.iter().filter_map(|(_, slots)| *slots).min())
}

impl Layout {
    /// Over the first of `hosts`; empty: this host, or SLURM's allocation.
    pub fn new(args: &Args, environment: &Environment, hosts: &[String]) -> Result<Self> {
        let slurm = environment.slurm.as_ref().filter(|_| !args.standalone);
        let most = match (slurm, hosts.len()) {
            _ if args.standalone => 1,
            (Some(slurm), 0) => slurm.nodes,
            (_, hosts) => hosts.max(1),
        };
        let nodes = args.nnodes.map_or(most, |nodes| nodes.most.min(most));
        let least = args.nnodes.map_or(1, |nodes| nodes.least);
        ensure!(nodes >= least, "--nnodes {least}, but there are {most} host(s): name them with --hosts or --hostfile, or start inside a SLURM allocation");
        let ranks_per_node = match args.nproc_per_node {
            Ranks::Number(number) => number,
            Ranks::Cpu => environment.cores,
            Ranks::Gpu if environment.gpus == 0 => {
                bail!("--nproc-per-node gpu, but this host has no GPU")
            }
            Ranks::Gpu => environment.gpus,
            Ranks::Auto => match args.slots.or(slurm.and_then(|slurm| slurm.tasks_per_node)) {
                // Slots may count cores.
                Some(ranks) if args.slots.is_some() && environment.gpus > 0 => ranks.min(environment.gpus),
                Some(ranks) => ranks,
                None => environment.gpus.max(1),
            },
        };
        if let (Some(slots), Some(file)) = (args.slots, &args.hostfile) {
            ensure!(ranks_per_node <= slots, "--nproc-per-node: {ranks_per_node} ranks on each host, but --hostfile {} has slots={slots}", file.display());
        }
        let starter = starter(args, environment);
        ensure!(starter == Starter::Mpirun || environment.slurm.is_some(), "--launcher srun works only inside a SLURM allocation");
        let passed = |word: &str| args.passed.iter().any(|option| option == word);
        // mpirun starts its daemons on the job's other nodes by srun, unless it is told of another way (plm). With --overlap a step needs
        // no cores of its own.
        let elsewhere = || hosts.iter().any(|host| !is_own(host, &environment.host)) || hosts.is_empty() && slurm.is_some_and(|slurm| slurm.nodes > 1);
        let (by, way, waits) = match starter {
            Starter::Srun => ("srun", "--pass=--overlap", !passed("--overlap")),
            Starter::Mpirun => ("mpirun's own srun", "SLURM_OVERLAP=1", args.rdzv.is_none() && !passed("plm") && !environment.plm && elsewhere()),
        };
        ensure!(
            !waits || environment.slurm.as_ref().is_none_or(|slurm| !slurm.in_step),
            "this shell is a step of its job (srun --pty, by SLURM_STEP_ID), and {by} would wait for the cores that it holds: --standalone for this host alone, {way} if it holds none, or start from salloc or sbatch"
        );
        let mut hosts: Vec<String> = hosts.iter().take(nodes).cloned().collect();
        // mpirun numbers the ranks of its own host first, wherever that is named.
        if let (Starter::Mpirun, Some(own)) = (starter, hosts.iter().position(|host| is_own(host, &environment.host))) {
            hosts[..=own].rotate_right(1);
        }
        Ok(Layout { hosts, nodes, ranks_per_node, starter })
    }

    /// What a start says of itself.
    pub fn remarks(&self, args: &Args, environment: &Environment) -> Vec<String> {
        let slurm = environment.slurm.as_ref().filter(|_| !args.standalone);
        let crowded = slurm.filter(|slurm| slurm.cpus_of_a_rank(self.ranks_per_node) == Some(0)).and_then(|slurm| slurm.cpus_on_node);
        let crowded = crowded.map(|cores| format!("{} ranks on each host share {cores} core(s), all that SLURM gave this job there: ask for --ntasks-per-node and --cpus-per-task", self.ranks_per_node));
        self.idle_gpus(args, environment).into_iter().chain(crowded).collect()
    }

    /// Of --nproc-per-node auto, where SLURM's word or a hostfile's leaves GPUs without a rank: what to do about it.
    fn idle_gpus(&self, args: &Args, environment: &Environment) -> Option<String> {
        let (ranks, gpus) = (self.ranks_per_node, environment.gpus);
        let whose = if args.slots.is_some() { "the hostfile's slots" } else { "SLURM's --ntasks-per-node" };
        let idle = args.nproc_per_node == Ranks::Auto && ranks < gpus;
        idle.then(|| format!("{whose}: {ranks} rank(s) on each host, of whose {gpus} GPUs {} stay idle: a rank works on one; ask for {gpus}", gpus - ranks))
    }

    pub fn ranks(&self) -> usize {
        self.nodes * self.ranks_per_node
    }

    /// Where a rank runs, if the hosts are known by name.
    pub fn host_of(&self, rank: usize) -> Option<&str> {
        self.hosts.get(rank / self.ranks_per_node).map(String::as_str)
    }

    /// Whether rank 0, which writes a run's summary, is known to run on this host, `own`.
    pub fn begins_at(&self, own: &str) -> bool {
        let alone = self.nodes == 1 && self.starter == Starter::Mpirun;
        self.hosts.first().map_or(alone, |first| is_own(first, own))
    }

    /// The name that we have for a host which calls itself `name`: with or without its domain.
    pub fn known(&self, name: &str) -> String {
        let exact = self.hosts.iter().find(|host| *host == name);
        exact.or_else(|| self.hosts.iter().find(|host| same_host(host, name))).map_or_else(|| name.to_string(), String::clone)
    }
}

/// By name, one of the two perhaps without its domain.
fn same_host(a: &str, b: &str) -> bool {
    let name = |text: &str| text.parse::<IpAddr>().is_err();
    let short = |long: &str, name: &str| long.split_once('.').is_some_and(|(first, _)| first == name);
    a == b || name(a) && name(b) && (short(a, b) || short(b, a))
}

/// This host: by its name, or by an address that it has.
fn is_own(host: &str, own: &str) -> bool {
    same_host(host, own) || host.parse::<IpAddr>().is_ok_and(|address| UdpSocket::bind((address, 0)).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::Slurm;
    use clap::Parser;

    fn layout(options: &str, hosts: &[&str]) -> Result<Layout> {
        let args = Args::parse_from(format!("tiefsee-launch {options} -- resume a").split_whitespace());
        let hosts: Vec<String> = hosts.iter().map(|host| host.to_string()).collect();
        Layout::new(&args, &Environment { cores: 8, numa_nodes: 1, ..Environment::default() }, &hosts)
    }

    #[test]
    fn hosts_are_counted() {
        let refused = layout("--nnodes 3", &["a", "b"]).expect_err("too few").to_string();
        assert!(refused.contains("--nnodes 3") && refused.contains("2 host(s)"), "{refused}");
        assert!(layout("--nproc-per-node gpu", &[]).is_err());
        assert_eq!(hosts_of("# all\nn1 slots=8\n\nn2 # spare\n"), ["n1", "n2"]);
        let spare = layout("--nnodes 2 --nproc-per-node 2", &["a", "b", "c"]).expect("one is spare");
        assert_eq!((spare.ranks(), spare.host_of(3)), (4, Some("b")));
        assert_eq!(layout("--nnodes 1:4", &["a", "b"]).expect("enough").nodes, 2);
        assert!(layout("--nnodes 3:4", &["a", "b"]).is_err());
    }

    #[test]
    fn a_host_without_a_name_or_named_twice_is_refused() {
        let said = |options: &str| {
            let args = Args::parse_from(["tiefsee-launch"].into_iter().chain(options.split(' ')).chain(["--", "resume", "a"]));
            listed(&args, &Environment::default()).map_err(|error| error.to_string())
        };
        assert_eq!(said("--hosts a,,b").expect_err("a hole"), "--hosts a,,b: a name is empty");
        assert_eq!(said("--hosts a,b").expect("two"), ["a", "b"]);
        for (hosts, twice) in [("a,b,a", "a"), ("a.site,b,a", "a"), ("10.0.0.1,10.0.0.1", "10.0.0.1")] {
            assert_eq!(said(&format!("--hosts {hosts}")), Err(format!("--hosts {hosts}: {twice} is named twice")));
        }
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(&file, "# none yet\n").expect("written");
        let error = said(&format!("--hostfile {}", file.path().display())).expect_err("no host");
        assert!(error.ends_with(": names no host"), "{error}");
    }

    #[test]
    fn slots_of_a_hostfile_count() {
        for text in ["n1 slots=8\nn2 slots=8 # spare\n", "# all\n\n n1\tmax_slots=9 slots = 8\nn2 slots =8"] {
            assert_eq!(slots_of(text, true).expect("equal ones"), Some(8), "{text}");
        }
        assert_eq!(slots_of("n1\nn2 max_slots=9\n", true).expect("none"), None);
        assert_eq!(["n1 slots=8\nn2 slots=4\nn3", "n1\nn2 slots=4\nn3 slots=5"].map(|text| slots_of(text, false).expect("unequal")), [Some(4); 2]);
        let refused = |text: &str| slots_of(text, true).expect_err("refused").to_string();
        assert_eq!(refused("n1 slots=8\nn2 slots=4"), "host n2 has slots=4, but host n1 has slots=8: ranks are as many on each host");
        assert_eq!(refused("n1 slots=8\nn2"), "host n2 has no slots, but host n1 has slots=8: ranks are as many on each host");
        assert_eq!(refused("n1 slots=0"), "host n1: slots=0 is no number from 1");
        assert_eq!(refused("n1 slots=many"), "host n1: slots=many is no number from 1");
        let ranks = |options: &str, gpus: usize| {
            let args = Args::parse_from(format!("tiefsee-launch --hostfile F {options} -- resume a").split_whitespace());
            let hosts = ["n1", "n2"].map(str::to_string);
            let layout = Layout::new(&Args { slots: Some(4), ..args }, &Environment { cores: 8, gpus, numa_nodes: 1, ..Environment::default() }, &hosts);
            layout.map(|layout| layout.ranks_per_node).map_err(|error| error.to_string())
        };
        assert_eq!(["", "--nproc-per-node 4", "--nproc-per-node 2"].map(|options| ranks(options, 8)), [Ok(4), Ok(4), Ok(2)]);
        assert_eq!([0, 2].map(|gpus| ranks("", gpus)), [Ok(4), Ok(2)], "of slots that count cores each GPU has one");
        assert_eq!(ranks("--nproc-per-node gpu", 8), Err("--nproc-per-node: 8 ranks on each host, but --hostfile F has slots=4".to_string()));
    }

    /// As in $PBS_NODEFILE and machinefiles, where each core has a line.
    #[test]
    fn a_host_that_a_file_repeats_is_one_of_so_many_slots() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let placed = |text: &str, options: &str, gpus: usize| {
            std::fs::write(&file, text).expect("written");
            let line = format!("tiefsee-launch --hostfile {} {options} -- resume a", file.path().display());
            let mut args = Args::parse_from(line.split_whitespace());
            let environment = Environment { cores: 8, gpus, numa_nodes: 1, ..Environment::default() };
            args.slots = slots(&args)?;
            Layout::new(&args, &environment, &listed(&args, &environment)?).map(|layout| (layout.hosts.join(","), layout.ranks_per_node))
        };
        let hosts = |names: &str, ranks| (names.to_string(), ranks);
        for text in ["n1\nn1\nn2\nn2\n", "n1\nn2 # again\nn1\nn2", "n1.site\nn1\nn2\nn2.site"] {
            let named = if text.contains("site") { "n1.site,n2" } else { "n1,n2" };
            assert_eq!([0, 1, 4].map(|gpus| placed(text, "", gpus).expect("two hosts")), [2, 1, 2].map(|ranks| hosts(named, ranks)), "{text}");
            assert_eq!(placed(text, "--nproc-per-node 1", 0).expect("two hosts"), hosts(named, 1), "{text}");
        }
        assert_eq!(placed("n1\nn2", "", 0).expect("once each says nothing of slots"), hosts("n1,n2", 1));
        assert_eq!(placed("n1\nn1\nn2", "--nproc-per-node 1", 0).expect("one is enough"), hosts("n1,n2", 1));
        let refused = |text: &str, options: &str| format!("{:#}", placed(text, options, 0).expect_err("refused"));
        assert!(refused("n1\nn1\nn2", "").ends_with("host n2 has slots=1, but host n1 has slots=2: ranks are as many on each host"));
        assert!(refused("n1\nn1\nn2\nn2", "--nproc-per-node 3").ends_with("has slots=2"));
        assert!(refused("n1 slots=8\nn1", "").ends_with("host n1 is named twice, and with slots="));
    }

    #[test]
    fn gpus_that_slurm_or_a_hostfile_leaves_idle_are_told_of() {
        let told = |options: &str, (tasks, slots): (Option<usize>, Option<usize>), gpus| {
            let args = Args::parse_from(format!("tiefsee-launch {options} -- resume a").split_whitespace());
            let (args, slurm) = (Args { slots, ..args }, Slurm { nodes: 2, tasks_per_node: tasks, pmix: true, ..Slurm::default() });
            let environment = Environment { cores: 8, gpus, numa_nodes: 1, slurm: Some(slurm), ..Environment::default() };
            let layout = Layout::new(&args, &environment, &args.hosts).expect("a layout");
            (layout.ranks_per_node, layout.remarks(&args, &environment).pop())
        };
        let words = |whose: &str| Some(format!("{whose}: 1 rank(s) on each host, of whose 8 GPUs 7 stay idle: a rank works on one; ask for 8"));
        assert_eq!(told("", (Some(1), None), 8), (1, words("SLURM's --ntasks-per-node")));
        assert_eq!(told("", (Some(8), Some(1)), 8), (1, words("the hostfile's slots")));
        // As train.sbatch asks, where its caller says nothing of tasks.
        assert_eq!([8, 1, 0].map(|gpus| told("", (None, None), gpus)), [(8, None), (1, None), (1, None)]);
        assert_eq!(told("", (Some(8), None), 8), (8, None));
        assert_eq!(["--nproc-per-node 2", "--nproc-per-node gpu", "--standalone"].map(|options| told(options, (Some(1), None), 8)), [(2, None), (8, None), (8, None)]);
        assert_eq!(told("", (Some(4), None), 0), (4, None));
    }

    #[test]
    fn ranks_that_share_a_core_are_told_of() {
        let told = |ranks: usize, tasks: Option<usize>, cores| {
            let args = Args::parse_from(format!("tiefsee-launch --nproc-per-node {ranks} -- resume a").split_whitespace());
            let slurm = Slurm { nodes: 2, tasks, cpus_per_task: Some(1), cpus_on_node: Some(cores), pmix: true, ..Slurm::default() };
            let environment = Environment { cores: 8, numa_nodes: 1, slurm: Some(slurm), ..Environment::default() };
            Layout::new(&args, &environment, &args.hosts).expect("a layout").remarks(&args, &environment)
        };
        let words = "8 ranks on each host share 1 core(s), all that SLURM gave this job there: ask for --ntasks-per-node and --cpus-per-task";
        assert_eq!(told(8, Some(1), 1), [words]);
        assert_eq!([told(8, Some(1), 8), told(8, Some(8), 8), told(1, None, 1)], [const { Vec::<String>::new() }; 3]);
        let exceeded = |tasks_per_node, tasks| Slurm { tasks_per_node, tasks, ..Slurm::default() }.is_exceeded_by(4);
        assert_eq!([(None, None), (None, Some(3)), (None, Some(4)), (Some(4), None)].map(|(asked, had)| exceeded(asked, had)), [true, true, false, false]);
    }

    #[test]
    fn no_step_is_started_inside_a_step() {
        let started = |in_step, options: &str| {
            let slurm = Slurm { nodes: 2, pmix: true, in_step, ..Slurm::default() };
            let environment = Environment { cores: 8, numa_nodes: 1, slurm: Some(slurm), ..Environment::default() };
            let args = Args::parse_from(format!("tiefsee-launch {options} -- resume a").split_whitespace());
            Layout::new(&args, &environment, &args.hosts).map(|layout| (layout.starter, layout.nodes)).map_err(|error| error.to_string())
        };
        let refused = started(true, "").expect_err("it would wait");
        assert!(refused.contains("--standalone") && refused.contains("salloc or sbatch"), "{refused}");
        assert!(started(true, "--launcher srun").is_err());
        assert_eq!(started(true, "--standalone"), Ok((Starter::Mpirun, 1)));
        assert_eq!(started(true, "--pass=--overlap"), Ok((Starter::Srun, 2)));
        assert_eq!(started(false, ""), Ok((Starter::Srun, 2)), "a batch script");
        for options in ["--launcher mpirun", "--launcher mpirun --pass=--overlap", "--hosts n1,n2"] {
            let refused = started(true, options).expect_err("its srun would wait");
            assert!(refused.contains("mpirun's own srun") && refused.contains("SLURM_OVERLAP=1"), "{refused}");
            assert!(started(false, options).is_ok());
        }
        assert_eq!(started(true, "--hosts 127.0.0.1"), Ok((Starter::Mpirun, 1)));
        let by_rsh = Environment { plm: true, slurm: Some(Slurm { nodes: 2, in_step: true, ..Slurm::default() }), ..Environment::default() };
        let args = Args::parse_from("tiefsee-launch --hosts n1,n2 -- resume a".split_whitespace());
        Layout::new(&args, &by_rsh, &args.hosts).expect("the environment names another way");
        assert_eq!(started(true, "--launcher mpirun --pass=--mca --pass=plm --pass=rsh"), Ok((Starter::Mpirun, 2)));
        assert_eq!(started(true, "--rdzv n1:29400 --node-rank 0 --nnodes 2"), Ok((Starter::Mpirun, 2)), "its daemons go another way");
    }

    #[test]
    fn a_host_is_known_by_its_short_name() {
        let layout = layout("", &["a.site", "b"]).expect("a layout");
        assert_eq!([layout.known("a"), layout.known("b.site"), layout.known("c")], ["a.site", "b", "c"]);
    }

    #[test]
    fn addresses_and_domains_are_no_short_names() {
        let layout = layout("", &["10.9.0.1", "10.9.0.2", "n.left", "n.right"]).expect("a layout");
        assert_eq!(["10.9.0.2", "n.right", "10.9.0.3"].map(|name| layout.known(name)), ["10.9.0.2", "n.right", "10.9.0.3"]);
    }

    #[test]
    fn the_host_of_mpirun_has_the_first_ranks() {
        let environment = Environment { cores: 8, numa_nodes: 1, host: "n2.site".into(), ..Environment::default() };
        let hosts = |hosts: &[&str]| {
            let args = Args::parse_from(["tiefsee-launch", "--", "resume", "a"]);
            Layout::new(&args, &environment, &hosts.iter().map(|host| host.to_string()).collect::<Vec<_>>()).expect("a layout").hosts
        };
        assert_eq!(hosts(&["n3", "n1", "n2", "n4"]), ["n2", "n3", "n1", "n4"]);
        assert_eq!(hosts(&["192.0.2.7", "127.0.0.1"]), ["127.0.0.1", "192.0.2.7"]);
        assert_eq!(hosts(&["n3", "n1"]), ["n3", "n1"]);
        assert_eq!(["n3", "n3.site", "n1"].map(|own| layout("", &["n3", "n1"]).expect("a layout").begins_at(own)), [true, true, false]);
        assert!(layout("", &[]).expect("a layout").begins_at("n2"), "it alone");
    }
}
