//! The mpirun or srun command line of a run. A pure function of the arguments and the environment.
use crate::args::{Args, Launcher, Ranks};
use crate::environment::Environment;
use crate::guard::TIED;
use anyhow::{Result, bail, ensure};
use std::path::Path;

/// How many ranks, where, and started by what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub nodes: usize,
    pub ranks_per_node: usize,
    pub starter: Starter,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Starter {
    Mpirun,
    Srun,
}

impl Layout {
    pub fn new(args: &Args, environment: &Environment) -> Result<Self> {
        let slurm = environment.slurm.as_ref().filter(|_| !args.standalone);
        let listed = match &args.hostfile {
            Some(path) => hosts_of(&std::fs::read_to_string(path).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?),
            None => args.hosts.clone(),
        };
        let most = match (slurm, listed.len()) {
            _ if args.standalone => 1,
            (Some(slurm), 0) => slurm.nodes,
            (_, hosts) => hosts.max(1),
        };
        let nodes = args.nnodes.unwrap_or(most);
        ensure!(nodes >= 1, "--nnodes must be 1 or more");
        ensure!(nodes <= most, "--nnodes {nodes}, but there are {most} host(s): name them with --hosts or --hostfile, or start inside a SLURM allocation");
        let ranks_per_node = match args.nproc_per_node {
            Ranks::Number(number) => number,
            Ranks::Cpu => environment.cores,
            Ranks::Gpu if environment.gpus == 0 => bail!("--nproc-per-node gpu, but this host has no GPU"),
            Ranks::Gpu => environment.gpus,
            Ranks::Auto => slurm.and_then(|slurm| slurm.tasks_per_node).unwrap_or(environment.gpus.max(1)),
        };
        let starter = match args.launcher {
            Launcher::Mpirun => Starter::Mpirun,
            Launcher::Srun => Starter::Srun,
            Launcher::Auto if listed.is_empty() && slurm.is_some_and(|slurm| slurm.pmix) => Starter::Srun,
            Launcher::Auto => Starter::Mpirun,
        };
        ensure!(starter == Starter::Mpirun || environment.slurm.is_some(), "--launcher srun works only inside a SLURM allocation");
        Ok(Layout { nodes, ranks_per_node, starter })
    }

    pub fn ranks(&self) -> usize {
        self.nodes * self.ranks_per_node
    }
}

/// Names of a hostfile, without comments and options.
fn hosts_of(text: &str) -> Vec<String> {
    text.lines().filter_map(|line| line.split('#').next()?.split_whitespace().next().map(str::to_string)).collect()
}

/// What the ranks run: `tiefsee` by its full path, and this executable, which ties it to its parent.
pub struct Ranked<'a> {
    pub own: &'a Path,
    pub program: &'a Path,
    pub command: &'a [String],
}

pub fn command_line(args: &Args, environment: &Environment, layout: &Layout, ranked: &Ranked) -> Vec<String> {
    let mut line = match layout.starter {
        Starter::Mpirun => mpirun(args, environment, layout),
        Starter::Srun => srun(args, environment, layout),
    };
    line.extend(args.passed.iter().cloned());
    if layout.starter == Starter::Mpirun {
        // A rank whose mpirun or orted is killed would wait in a collective for ever. SLURM's own daemon tends its tasks.
        line.extend([ranked.own.display().to_string(), TIED.to_string(), "KILL".to_string()]);
    }
    line.push(ranked.program.display().to_string());
    line.extend(ranked.command.iter().cloned());
    line
}

/// Open MPI 4.1 as it was proven: what is not said here is its default.
fn mpirun(args: &Args, environment: &Environment, layout: &Layout) -> Vec<String> {
    let mut line = words(&["mpirun"]);
    let mut add = |more: &[&str]| line.extend(words(more));
    if environment.root {
        add(&["--allow-run-as-root"]);
    }
    add(&["-np", &layout.ranks().to_string(), "--tag-output"]);
    let slurm = environment.slurm.is_some() && !args.standalone;
    let alone = args.hosts.is_empty() && args.hostfile.is_none() && !slurm;
    let many = layout.ranks_per_node > environment.cores || layout.ranks_per_node == environment.cores && alone;
    let ranks = layout.ranks_per_node;
    if alone {
        // Nor look for an allocation, nor for another network than the loopback.
        add(&["--host", &format!("localhost:{ranks}"), "--mca", "ras", "^slurm", "--mca", "plm", "^slurm"]);
        add(&["--mca", "oob_tcp_if_include", "lo", "--mca", "btl_tcp_if_include", "lo"]);
    } else if !args.hosts.is_empty() {
        let hosts: Vec<String> = args.hosts.iter().take(layout.nodes).map(|host| format!("{host}:{ranks}")).collect();
        add(&["--host", &hosts.join(",")]);
    } else if let Some(hostfile) = &args.hostfile {
        add(&["--hostfile", &hostfile.display().to_string()]);
    }
    let (map, bind) = placement(ranks, environment.numa_nodes, many);
    add(&["--map-by", &map, "--bind-to", bind]);
    if many {
        // A rank that spins for a message keeps its peer from sending it: 10 to 1000 times slower without this.
        add(&["--mca", "mpi_yield_when_idle", "1"]);
    }
    // By default a lost link is noticed after minutes; so in 3 s + 3 × 1 s, and mpirun ends with 205.
    add(&["--mca", "oob_tcp_keepalive_time", "3", "--mca", "oob_tcp_keepalive_intvl", "1", "--mca", "oob_tcp_keepalive_probes", "3"]);
    // Ranks are forked by mpirun's and orted's main thread: a parent-death signal is tied to the thread.
    add(&["--mca", "odls_base_num_threads", "0"]);
    if let Some(interface) = &args.interface {
        add(&["--mca", "oob_tcp_if_include", interface, "--mca", "btl_tcp_if_include", interface]);
    }
    if let Some(agent) = &args.rsh_agent {
        add(&["--mca", "plm_rsh_agent", agent]);
    }
    if !alone {
        environment.exported.iter().for_each(|name| add(&["-x", name]));
    }
    line
}

/// Ranks that share a host evenly between its NUMA nodes stay on theirs (and near its GPUs); others are not bound, for a
/// rank has many threads.
fn placement(ranks: usize, numa_nodes: usize, many: bool) -> (String, &'static str) {
    if many {
        (format!("ppr:{ranks}:node:OVERSUBSCRIBE"), "none")
    } else if numa_nodes > 1 && ranks.is_multiple_of(numa_nodes) {
        (format!("ppr:{}:numa", ranks / numa_nodes), "numa")
    } else {
        (format!("ppr:{ranks}:node"), "none")
    }
}

fn srun(args: &Args, environment: &Environment, layout: &Layout) -> Vec<String> {
    let mut line = words(&["srun", "--mpi=pmix", "--label", "--unbuffered"]);
    // Without it a dead rank leaves its peers hanging.
    line.push("--kill-on-bad-exit=1".to_string());
    line.push(format!("--nodes={}", layout.nodes));
    line.push(format!("--ntasks={}", layout.ranks()));
    line.push(format!("--ntasks-per-node={}", layout.ranks_per_node));
    if layout.ranks_per_node > environment.cores {
        line.extend(words(&["--overcommit", "--cpu-bind=none"]));
    }
    if !args.hosts.is_empty() {
        line.push(format!("--nodelist={}", args.hosts.join(",")));
    }
    line
}

/// Settings that mpirun has no option for but srun's ranks need, as variables.
pub fn variables(environment: &Environment, layout: &Layout) -> Vec<(&'static str, &'static str)> {
    match layout.starter {
        Starter::Srun if layout.ranks_per_node >= environment.cores => vec![("OMPI_MCA_mpi_yield_when_idle", "1")],
        _ => Vec::new(),
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| word.to_string()).collect()
}

/// For a shell.
pub fn quoted(line: &[String]) -> String {
    let plain = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_=./:,@+%".contains(&byte));
    let quote = |word: &String| if plain(word) { word.clone() } else { format!("'{}'", word.replace('\'', r"'\''")) };
    line.iter().map(quote).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::Slurm;
    use clap::Parser;

    fn line(options: &str, environment: &Environment) -> Result<String> {
        let args = Args::parse_from(format!("tiefsee-launch {options} -- resume a").split_whitespace());
        let layout = Layout::new(&args, environment)?;
        let command = ["resume".to_string(), "a".to_string()];
        Ok(quoted(&command_line(&args, environment, &layout, &Ranked { own: Path::new("L"), program: Path::new("tiefsee"), command: &command })))
    }

    fn machine(cores: usize) -> Environment {
        Environment { cores, numa_nodes: 1, ..Environment::default() }
    }

    #[test]
    fn few_cores_yield_and_bind_nobody() {
        let crowded = line("--standalone --nproc-per-node 4", &machine(2)).expect("a line");
        assert!(crowded.contains("mpi_yield_when_idle 1") && crowded.contains("--map-by ppr:4:node:OVERSUBSCRIBE --bind-to none"), "{crowded}");
        assert!(crowded.contains("--host localhost:4") && crowded.ends_with("L @tied KILL tiefsee resume a"), "{crowded}");
        let roomy = line("--standalone --nproc-per-node 4", &machine(64)).expect("a line");
        assert!(!roomy.contains("yield") && !roomy.contains("OVERSUBSCRIBE"), "{roomy}");
        let numa = line("--nproc-per-node 8", &Environment { numa_nodes: 2, ..machine(64) }).expect("a line");
        assert!(numa.contains("--map-by ppr:4:numa --bind-to numa"), "{numa}");
    }

    #[test]
    fn hosts_are_counted() {
        let two = line("--hosts a,b --nproc-per-node 2 --interface eth1", &machine(8)).expect("a line");
        assert!(two.contains("-np 4") && two.contains("--host a:2,b:2") && two.contains("oob_tcp_keepalive_time 3") && two.contains("btl_tcp_if_include eth1"), "{two}");
        let refused = line("--nnodes 3 --hosts a,b", &machine(8)).expect_err("too many").to_string();
        assert!(refused.contains("--nnodes 3") && refused.contains("2 host(s)"), "{refused}");
        assert!(line("--nproc-per-node gpu", &machine(8)).is_err());
        assert_eq!(hosts_of("# all\nn1 slots=8\n\nn2 # spare\n"), ["n1", "n2"]);
    }

    #[test]
    fn an_allocation_is_found_by_itself() {
        let slurm = |pmix| Environment { slurm: Some(Slurm { nodes: 2, tasks_per_node: Some(4), pmix, ..Slurm::default() }), ..machine(8) };
        let srun = line("", &slurm(true)).expect("a line");
        assert!(srun.starts_with("srun --mpi=pmix") && srun.contains("--kill-on-bad-exit=1") && srun.contains("--ntasks=8"), "{srun}");
        assert!(srun.ends_with("--ntasks-per-node=4 tiefsee resume a"), "{srun}");
        let mpirun = line("", &slurm(false)).expect("a line");
        assert!(mpirun.starts_with("mpirun -np 8") && !mpirun.contains("localhost"), "{mpirun}");
        assert!(line("--standalone", &slurm(true)).expect("a line").starts_with("mpirun -np 1"));
        assert!(line("--launcher srun", &machine(8)).is_err());
    }

    #[test]
    fn a_printed_line_can_be_pasted() {
        assert_eq!(quoted(&["a b".to_string(), "it's".to_string(), "^slurm".to_string(), String::new()]), r"'a b' 'it'\''s' '^slurm' ''");
    }
}
