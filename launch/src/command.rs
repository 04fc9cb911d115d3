//! The mpirun or srun command line of a run. A pure function of the arguments, the environment and the layout.
use crate::args::Args;
use crate::binding::visible_devices;
use crate::environment::Environment;
use crate::heartbeat::VARIABLE;
use crate::layout::{Layout, Starter};
use crate::rank::{RANK, Word};
use crate::remote::{REACH, REMOTE};
use std::path::Path;

/// What the ranks run: `tiefsee` by its full path, and this executable, which ties it to its parent.
pub struct Ranked<'a> {
    pub own: &'a Path,
    /// This executable as mpirun's agent, without blanks: mpirun would take what is behind one for the next word.
    pub agent: &'a Path,
    pub program: &'a Path,
    pub command: &'a [String],
    /// A rendezvous' socket, where hosts are reached over it.
    pub socket: Option<&'a Path>,
    /// After a start that failed.
    pub again: bool,
}

pub fn command_line(args: &Args, environment: &Environment, layout: &Layout, ranked: &Ranked) -> Vec<String> {
    let mut line = match layout.starter {
        Starter::Mpirun => mpirun(args, environment, layout, ranked),
        Starter::Srun => srun(environment, layout, ranked.again),
    };
    line.extend(args.passed.iter().cloned());
    let words = rank_words(args, environment, layout, ranked);
    if !words.is_empty() {
        let words: Vec<&str> = words.iter().map(|word| word.text()).collect();
        line.extend([ranked.own.display().to_string(), RANK.to_string(), words.join(",")]);
    }
    line.push(ranked.program.display().to_string());
    line.extend(ranked.command.iter().cloned());
    line
}

fn rank_words(args: &Args, environment: &Environment, layout: &Layout, ranked: &Ranked) -> Vec<Word> {
    let mpirun = layout.starter == Starter::Mpirun;
    let mut words = Vec::new();
    // SLURM's own daemon tends its tasks.
    if mpirun {
        words.push(Word::Tied);
    }
    if environment.gpus > 0 {
        words.push(Word::Gpu);
    }
    // At a rendezvous the launchers themselves give signs of life.
    if mpirun && beats(args, layout) && ranked.socket.is_none() {
        words.push(Word::Beat);
    }
    words
}

/// Between hosts that are known by name.
pub fn beats(args: &Args, layout: &Layout) -> bool {
    args.heartbeat > 0.0 && layout.hosts.len() > 1
}

/// Open MPI 4.1 and 5.0 as they were proven: what is not said here is their default.
fn mpirun(args: &Args, environment: &Environment, layout: &Layout, ranked: &Ranked) -> Vec<String> {
    let mut line = words(&["mpirun"]);
    let mut add = |more: &[&str]| line.extend(words(more));
    if environment.root {
        add(&["--allow-run-as-root"]);
    }
    add(&["-np", &layout.ranks().to_string(), "--tag-output"]);
    let slurm = environment.slurm.as_ref().filter(|_| !args.standalone);
    let alone = layout.hosts.is_empty() && slurm.is_none();
    let many = layout.ranks_per_node > environment.cores || layout.ranks_per_node == environment.cores && alone;
    let ranks = layout.ranks_per_node;
    if alone {
        // Nor look for an allocation, for ssh, or for another network than the loopback. 5 needs no ssh, and its own connections
        // refuse the loopback.
        add(&["--host", &format!("localhost:{ranks}"), "--mca", "ras", "^slurm", "--mca", "btl_tcp_if_include", "lo"]);
        if environment.mpi_major < 5 {
            add(&["--mca", "plm", "isolated", "--mca", "oob_tcp_if_include", "lo"]);
        }
    } else if !layout.hosts.is_empty() {
        let hosts: Vec<String> = layout.hosts.iter().map(|host| format!("{host}:{ranks}")).collect();
        add(&["--host", &hosts.join(",")]);
    }
    // It takes SLURM's tasks for all the room that there is.
    let beyond = slurm.is_some_and(|slurm| slurm.is_exceeded_by(ranks));
    let (map, bind) = placement(ranks, environment, many || beyond);
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
        add(&["--mca", "btl_tcp_if_include", interface]);
        if environment.mpi_major < 5 || interface != "lo" {
            add(&["--mca", "oob_tcp_if_include", interface]);
        }
    }
    if !layout.hosts.is_empty() {
        line.extend(agent(args, environment, layout, ranked));
    }
    let heartbeat = (beats(args, layout) && ranked.socket.is_none()).then(|| VARIABLE.to_string());
    if !alone {
        environment.exported.iter().chain(&heartbeat).for_each(|name| line.extend(["-x".to_string(), name.clone()]));
    }
    line
}

/// What mpirun starts its daemons on other hosts with.
fn agent(args: &Args, environment: &Environment, layout: &Layout, ranked: &Ranked) -> Vec<String> {
    let own = ranked.agent.display();
    let rsh = if environment.mpi_major < 5 { "rsh" } else { "ssh" };
    let set = |name: &str, value: &str| ["--mca".to_string(), format!("plm_{rsh}_{name}"), value.to_string()];
    match (ranked.socket, &args.rsh_agent) {
        // Each daemon by node 0 alone, and attached: the nodes end what loses its agent.
        (Some(socket), _) => {
            // Attached ones are all there at once, and mpirun expects at most 128.
            let mut line = words(&["--leave-session-attached", "--mca", "ras", "^slurm", "--mca", "plm", rsh]);
            line.extend(set("num_concurrent", &layout.nodes.to_string()));
            line.extend(set("no_tree_spawn", "1"));
            line.extend(set("agent", &format!("{own} {REMOTE} {}", socket.display())));
            line
        }
        (None, given) => {
            // ssh must not ask, nor wait for minutes for a host that is gone.
            let given = given.as_deref().unwrap_or("ssh -x -o BatchMode=yes -o ConnectTimeout=10");
            set("agent", &format!("{own} {REACH} {} {given}", given.split_whitespace().count())).to_vec()
        }
    }
}

/// Ranks that share a host evenly between its NUMA nodes stay on theirs (and near its GPUs); others are not bound, for a
/// rank has many threads. A rank with a GPU binds itself to the cores beside it.
fn placement(ranks: usize, environment: &Environment, many: bool) -> (String, &'static str) {
    let numa_nodes = environment.numa_nodes;
    if environment.gpus > 0 {
        (format!("ppr:{ranks}:node{}", if many { ":OVERSUBSCRIBE" } else { "" }), "none")
    } else if many {
        (format!("ppr:{ranks}:node:OVERSUBSCRIBE"), "none")
    } else if numa_nodes > 1 && ranks.is_multiple_of(numa_nodes) {
        (format!("ppr:{}:numa", ranks / numa_nodes), "numa")
    } else {
        (format!("ppr:{ranks}:node"), "none")
    }
}

fn srun(environment: &Environment, layout: &Layout, again: bool) -> Vec<String> {
    // Not --unbuffered: with it each piece of a line would get a label and an end of its own. Ranks print whole lines.
    let mut line = words(&["srun", "--mpi=pmix", "--label"]);
    // Without it a dead rank leaves its peers hanging.
    line.push("--kill-on-bad-exit=1".to_string());
    line.push(format!("--nodes={}", layout.nodes));
    line.push(format!("--ntasks={}", layout.ranks()));
    line.push(format!("--ntasks-per-node={}", layout.ranks_per_node));
    // A step of the job does not inherit it.
    let cpus = environment.slurm.as_ref().and_then(|slurm| slurm.cpus_of_a_rank(layout.ranks_per_node));
    line.extend(cpus.map(|cpus| format!("--cpus-per-task={}", cpus.max(1))));
    if layout.ranks_per_node > environment.cores || cpus == Some(0) {
        line.extend(words(&["--overcommit", "--cpu-bind=none"]));
    }
    if !layout.hosts.is_empty() {
        line.push(format!("--nodelist={}", layout.hosts.join(",")));
    }
    if again {
        // SLURM leaves the step before its cores, on all its nodes, until it has the dead one of them down. From ranks of it that still
        // live, the run directory's lock protects.
        line.push("--overlap".to_string());
    }
    line
}

/// Settings that mpirun has no option for but srun's ranks need, as variables.
pub fn variables(args: &Args, environment: &Environment, layout: &Layout) -> Vec<(String, String)> {
    if layout.starter == Starter::Mpirun {
        return Vec::new();
    }
    let idle = (layout.ranks_per_node >= environment.cores).then(|| ("OMPI_MCA_mpi_yield_when_idle".to_string(), "1".to_string()));
    let interface = args.interface.clone().map(|interface| ("OMPI_MCA_btl_tcp_if_include".to_string(), interface));
    idle.into_iter().chain(interface).collect()
}

/// For people, a line a rank: where it runs and which GPU is its own, as far as this host can tell.
pub fn places(environment: &Environment, layout: &Layout) -> Vec<String> {
    let place = |rank: usize| {
        let local = rank % layout.ranks_per_node;
        let host = layout.host_of(rank).map_or_else(|| format!("host {}", rank / layout.ranks_per_node), str::to_string);
        let gpu = visible_devices(environment.visible_devices.as_deref(), environment.gpus, local);
        let gpu = gpu.map(|devices| format!(", CUDA_VISIBLE_DEVICES={devices}, on the cores beside its GPU")).unwrap_or_default();
        format!("# rank {rank}: {host}, local rank {local}{gpu}")
    };
    (0..layout.ranks()).map(place).collect()
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| word.to_string()).collect()
}

/// For a shell.
pub fn quoted(line: &[String]) -> String {
    let plain = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_=./:,@+%".contains(&byte));
    let quote = |word: &String| {
        if plain(word) { word.clone() } else { format!("'{}'", word.replace('\'', r"'\''")) }
    };
    line.iter().map(quote).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::Slurm;
    use anyhow::Result;
    use clap::Parser;

    fn line(options: &str, environment: &Environment) -> Result<String> {
        let args = Args::parse_from(format!("tiefsee-launch {options} -- resume a").split_whitespace());
        let layout = Layout::new(&args, environment, &args.hosts)?;
        let command = ["resume".to_string(), "a".to_string()];
        Ok(quoted(&command_line(&args, environment, &layout, &Ranked { own: Path::new("L"), agent: Path::new("L"), program: Path::new("tiefsee"), command: &command, socket: None, again: false })))
    }

    fn machine(cores: usize) -> Environment {
        Environment { cores, numa_nodes: 1, mpi_major: 4, ..Environment::default() }
    }

    #[test]
    fn few_cores_yield_and_bind_nobody() {
        let crowded = line("--standalone --nproc-per-node 4", &machine(2)).expect("a line");
        assert!(crowded.contains("mpi_yield_when_idle 1") && crowded.contains("--map-by ppr:4:node:OVERSUBSCRIBE --bind-to none"), "{crowded}");
        assert!(crowded.contains("--host localhost:4") && crowded.ends_with("L @rank tied tiefsee resume a"), "{crowded}");
        let roomy = line("--standalone --nproc-per-node 4", &machine(64)).expect("a line");
        assert!(!roomy.contains("yield") && !roomy.contains("OVERSUBSCRIBE"), "{roomy}");
        let numa = line("--nproc-per-node 8", &Environment { numa_nodes: 2, ..machine(64) }).expect("a line");
        assert!(numa.contains("--map-by ppr:4:numa --bind-to numa"), "{numa}");
    }

    #[test]
    fn hosts_are_reached_and_heard() {
        let two = line("--hosts a,b --nproc-per-node 2 --interface eth1", &machine(8)).expect("a line");
        assert!(two.contains("-np 4") && two.contains("--host a:2,b:2") && two.contains("oob_tcp_keepalive_time 3") && two.contains("btl_tcp_if_include eth1"), "{two}");
        assert!(two.contains("'L @reach 6 ssh -x -o BatchMode=yes") && two.ends_with("L @rank tied,beat tiefsee resume a"), "{two}");
        assert!(two.contains("-x TIEFSEE_HEARTBEAT") && !line("--hosts a,b --heartbeat 0", &machine(8)).expect("a line").contains("beat"));
    }

    #[test]
    fn all_daemons_of_a_rendezvous_may_start_at_once() {
        let args = Args::parse_from("tiefsee-launch --nproc-per-node 8 -- resume a".split(' '));
        let hosts: Vec<String> = (0..256).map(|host| format!("n{host}")).collect();
        let layout = Layout::new(&args, &machine(64), &hosts).expect("a layout");
        let ranked = Ranked { own: Path::new("L"), agent: Path::new("L"), program: Path::new("tiefsee"), command: &[], socket: Some(Path::new("S")), again: false };
        let line = quoted(&command_line(&args, &machine(64), &layout, &ranked));
        assert!(line.contains("--leave-session-attached --mca ras '^slurm' --mca plm rsh --mca plm_rsh_num_concurrent 256 "), "{line}");
    }

    #[test]
    fn open_mpi_5_has_other_names() {
        let machine = Environment { mpi_major: 5, ..machine(8) };
        let alone = line("--standalone", &machine).expect("a line");
        assert!(!alone.contains("isolated") && !alone.contains("oob_tcp_if_include"), "{alone}");
        let two = line("--hosts a,b", &machine).expect("a line");
        assert!(two.contains("plm_ssh_agent 'L @reach 6 ssh") && !two.contains("plm_rsh"), "{two}");
    }

    #[test]
    fn each_rank_has_its_gpu() {
        let gpus = Environment { gpus: 2, numa_nodes: 2, ..machine(64) };
        let shown = line("--nproc-per-node gpu --hosts a,b", &gpus).expect("a line");
        assert!(shown.contains("--map-by ppr:2:node --bind-to none") && shown.contains("L @rank tied,gpu,beat tiefsee"), "{shown}");
        let args = Args::parse_from("tiefsee-launch --hosts a,b -- resume a".split(' '));
        let layout = Layout::new(&args, &gpus, &args.hosts).expect("a layout");
        assert_eq!(places(&gpus, &layout)[3], "# rank 3: b, local rank 1, CUDA_VISIBLE_DEVICES=1,0, on the cores beside its GPU");
    }

    #[test]
    fn an_allocation_is_found_by_itself() {
        let slurm = |pmix| Environment { slurm: Some(Slurm { nodes: 2, tasks_per_node: Some(4), pmix, ..Slurm::default() }), ..machine(8) };
        let srun = line("", &slurm(true)).expect("a line");
        assert!(srun.starts_with("srun --mpi=pmix") && srun.contains("--kill-on-bad-exit=1") && srun.contains("--ntasks=8"), "{srun}");
        assert!(srun.contains("--label") && !srun.contains("--unbuffered"), "lines come whole: {srun}");
        assert!(srun.ends_with("--ntasks-per-node=4 tiefsee resume a"), "{srun}");
        let args = Args::parse_from("tiefsee-launch --interface 10.0.0.0/24 -- resume a".split(' '));
        let layout = Layout::new(&args, &slurm(true), &[]).expect("a layout");
        assert_eq!(variables(&args, &slurm(true), &layout), [("OMPI_MCA_btl_tcp_if_include".to_string(), "10.0.0.0/24".to_string())]);
        let wide = Environment { slurm: Some(Slurm { cpus_per_task: Some(12), ..slurm(true).slurm.expect("one") }), ..machine(64) };
        assert!(line("", &wide).expect("a line").contains("--cpus-per-task=12"));
        assert!(!line("--nproc-per-node 8", &wide).expect("a line").contains("cpus"), "more ranks than the allocation counts on");
        // sbatch --gpus-per-node=8 alone: the cores of one task.
        let one_task = |cpus, pmix| Slurm { nodes: 1, cpus_per_task: Some(cpus), cpus_on_node: Some(cpus), pmix, ..Slurm::default() };
        let started = |cpus, pmix| line("", &Environment { gpus: 8, slurm: Some(one_task(cpus, pmix)), ..machine(64) }).expect("a line");
        assert!(started(48, true).contains("--ntasks-per-node=8 --cpus-per-task=6 L"), "{}", started(48, true));
        assert!(started(1, true).contains("--ntasks-per-node=8 --cpus-per-task=1 --overcommit --cpu-bind=none L"), "{}", started(1, true));
        assert!(started(48, false).contains("--map-by ppr:8:node:OVERSUBSCRIBE --bind-to none"), "{}", started(48, false));
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
