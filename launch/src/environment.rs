//! Everything the launcher takes from its environment: variables, the machine's size, SLURM's allocation.
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::env::var;
use std::path::PathBuf;
use std::process::{Command, Stdio};

#[derive(Clone, Debug, Default)]
pub struct Environment {
    pub root: bool,
    /// This machine's own name.
    pub host: String,
    pub cores: usize,
    pub gpus: usize,
    pub numa_nodes: usize,
    /// Variables that ranks on other hosts need and that are set here.
    pub exported: Vec<String>,
    pub slurm: Option<Slurm>,
    /// Open MPI's, where mpirun says it: 4, or 5, whose mpirun is another program (PRRTE).
    pub mpi_major: u32,
    /// How mpirun starts its daemons is set: not by srun, as it would by itself.
    pub plm: bool,
    /// GPUs that the ranks of this host may use, by number: CUDA_VISIBLE_DEVICES.
    pub visible_devices: Option<String>,
}

/// The allocation that this process was started in.
#[derive(Clone, Debug, Default)]
pub struct Slurm {
    pub job: String,
    pub nodes: usize,
    /// Their names, in the order in which srun numbers tasks; empty where scontrol does not tell.
    pub hosts: Vec<String>,
    /// As --ntasks-per-node asks.
    pub tasks_per_node: Option<usize>,
    /// Those of this job on its first node, however they were asked for.
    pub tasks: Option<usize>,
    pub cpus_per_task: Option<usize>,
    /// Of this node, those that are the job's.
    pub cpus_on_node: Option<usize>,
    /// srun can start MPI ranks through PMIx.
    pub pmix: bool,
    /// How often SLURM requeued the job.
    pub restarts: u64,
    /// This process runs in a step of the job, as in `srun --pty bash`, which has the job's cores: one more waits for them for ever.
    pub in_step: bool,
}

/// As SLURM numbers the steps that a batch script and salloc's shell are; these leave the cores to others.
const SHELLS: [&str; 2] = ["4294967291", "4294967290"];

const EXPORTED: [&str; 4] = ["LD_LIBRARY_PATH", "RUST_BACKTRACE", "RUST_LOG", "CUDA_DEVICE_MAX_CONNECTIONS"];

/// The way to the stores that corpora may be in; proxies in small letters too.
const WEB: [&str; 6] = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"];

/// Settings of the network between GPUs and between hosts, of the stores that corpora may be in, and of what computes: where they
/// differ between ranks, transfers fail, or sums come out otherwise.
const EXPORTED_BY_PREFIX: [&str; 9] = ["NCCL_", "UCX_", "FI_", "AWS_", "GOOGLE_", "PYTORCH_", "TORCH_", "MKL_", "OMP_"];

fn exported(set: impl Iterator<Item = String>) -> Vec<String> {
    let web = |name: &str| WEB.contains(&name) || name.ends_with("_proxy") && WEB.contains(&name.to_ascii_uppercase().as_str());
    let wanted = |name: &String| EXPORTED.contains(&name.as_str()) || web(name) || EXPORTED_BY_PREFIX.iter().any(|prefix| name.starts_with(prefix));
    let mut names: Vec<String> = set.filter(wanted).collect();
    names.sort();
    names
}

impl Environment {
    pub fn read() -> Self {
        let (gpus, visible_devices) = devices();
        Environment {
            root: nix::unistd::Uid::effective().is_root(),
            host: host_name(),
            cores: std::thread::available_parallelism().map_or(1, |cores| cores.get()),
            gpus,
            numa_nodes: numbered("/sys/devices/system/node", "node").max(1),
            exported: exported(std::env::vars_os().filter_map(|(name, _)| name.into_string().ok())),
            slurm: slurm(),
            mpi_major: mpi_major(),
            plm: ["OMPI_MCA_plm", "PRTE_MCA_plm"].iter().any(|name| std::env::var_os(name).is_some()),
            visible_devices,
        }
    }
}

impl Slurm {
    /// More than the job's tasks on a node: SLURM has no place for so many by itself.
    pub fn is_exceeded_by(&self, ranks: usize) -> bool {
        ranks > self.tasks.into_iter().chain(self.tasks_per_node).max().unwrap_or(1)
    }

    /// Of so many on a node: a task's, but where there are more than the job's tasks, no more than a part of what the job has there. 0:
    /// less than one.
    pub fn cpus_of_a_rank(&self, ranks: usize) -> Option<usize> {
        if !self.is_exceeded_by(ranks) {
            return self.cpus_per_task;
        }
        let part = self.cpus_on_node.map(|cpus| cpus / ranks);
        part.map(|part| self.cpus_per_task.map_or(part, |cpus| cpus.min(part)))
    }

    /// SLURM has told this job's steps to end and takes its nodes when the grace is over.
    pub fn preempted(&self) -> bool {
        let shown = Command::new("timeout").args(["10", "scontrol", "show", "job", &self.job]).stdin(Stdio::null()).output();
        shown.is_ok_and(|shown| is_preempted(&String::from_utf8_lossy(&shown.stdout)))
    }

    /// The nodes that the job has now: from one that goes on without (sbatch --no-kill), SLURM takes those that it has down. Empty: it
    /// does not tell.
    pub fn hosts_now(&self) -> Vec<String> {
        let shown = Command::new("timeout").args(["10", "squeue", "--noheader", "--format=%N", "--jobs", &self.job]).stdin(Stdio::null()).output();
        shown.map(|shown| String::from_utf8_lossy(&shown.stdout).trim().to_string()).ok().filter(|list| !list.is_empty()).map(|list| hosts(&list)).unwrap_or_default()
    }
}

/// `mpirun (Open MPI) 5.0.8` → 5; 4 where it says nothing of the kind.
fn mpi_major() -> u32 {
    let said = Command::new("timeout").args(["10", "mpirun", "--version"]).stdin(Stdio::null()).output();
    let text = said.map(|said| String::from_utf8_lossy(&said.stdout).into_owned()).unwrap_or_default();
    text.split_once("(Open MPI) ").and_then(|(_, version)| version.split('.').next()?.parse().ok()).unwrap_or(4)
}

fn is_preempted(shown: &str) -> bool {
    shown.split_whitespace().any(|word| word.strip_prefix("PreemptTime=").is_some_and(|time| time.starts_with(|letter: char| letter.is_ascii_digit())))
}

/// How many GPUs the ranks of this host may use, and which: CUDA_VISIBLE_DEVICES.
pub fn devices() -> (usize, Option<String>) {
    let (here, visible) = (numbered("/dev", "nvidia"), var("CUDA_VISIBLE_DEVICES").ok());
    let named = |visible: &String| visible.split(',').filter(|device| !device.trim().is_empty()).count();
    (visible.as_ref().map_or(here, |visible| named(visible).min(here)), visible)
}

/// What a rank's own process is told of its place, by Open MPI or SLURM.
pub struct RankPlace {
    pub rank: usize,
    /// On its host.
    pub local: usize,
}

impl RankPlace {
    pub fn read() -> Self {
        let first = |names: [&str; 3]| names.iter().find_map(|name| var(name).ok()?.parse().ok()).unwrap_or(0);
        RankPlace { rank: first(["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID"]), local: first(["OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID"]) }
    }
}

/// The variable with what nodes at a rendezvous share.
pub const SECRET: &str = "TIEFSEE_SECRET";

pub fn secret() -> Option<String> {
    var(SECRET).ok()
}

/// This machine's own name.
pub fn host_name() -> String {
    nix::unistd::gethostname().map_or_else(|_| "localhost".to_string(), |name| name.to_string_lossy().into_owned())
}

fn slurm() -> Option<Slurm> {
    // The last task of an array has the number of the array itself: alone it would mean all tasks.
    let task = var("SLURM_ARRAY_JOB_ID").ok().zip(var("SLURM_ARRAY_TASK_ID").ok()).map(|(array, task)| format!("{array}_{task}"));
    let job = task.or(var("SLURM_JOB_ID").ok())?;
    let number = |name: &str| var(name).ok().and_then(|text| text.parse().ok());
    Some(Slurm {
        job,
        nodes: number("SLURM_JOB_NUM_NODES").or_else(|| number("SLURM_NNODES")).unwrap_or(1),
        hosts: var("SLURM_JOB_NODELIST").map(|list| hosts(&list)).unwrap_or_default(),
        // "4" or "4(x2)"
        tasks_per_node: var("SLURM_NTASKS_PER_NODE").ok().and_then(|text| text.split('(').next()?.parse().ok()),
        // "4", "4(x2)" or "4(x2),3"
        tasks: var("SLURM_TASKS_PER_NODE").ok().and_then(|text| text.split(['(', ',']).next()?.parse().ok()),
        cpus_per_task: number("SLURM_CPUS_PER_TASK"),
        cpus_on_node: number("SLURM_CPUS_ON_NODE"),
        pmix: has_pmix(),
        restarts: number("SLURM_RESTART_COUNT").unwrap_or(0) as u64,
        // A batch script may have its number from the shell that called sbatch; srun by that variable wants no cores of its own.
        in_step: is_in_step(var("SLURM_STEP_ID").ok().as_deref()) && var("ENVIRONMENT").as_deref() != Ok("BATCH") && var("SLURM_OVERLAP").is_err(),
    })
}

fn is_in_step(id: Option<&str>) -> bool {
    id.is_some_and(|id| !SHELLS.contains(&id))
}

/// Of a list as `n[1-3,7]`.
fn hosts(list: &str) -> Vec<String> {
    let shown = Command::new("timeout").args(["10", "scontrol", "show", "hostnames", list]).stdin(Stdio::null()).output();
    shown.map(|shown| String::from_utf8_lossy(&shown.stdout).split_whitespace().map(str::to_string).collect()).unwrap_or_default()
}

fn has_pmix() -> bool {
    let listed = Command::new("srun").arg("--mpi=list").stdin(Stdio::null()).output();
    listed.is_ok_and(|listed| [listed.stdout, listed.stderr].iter().any(|text| String::from_utf8_lossy(text).contains("pmix")))
}

/// Files that this process, and what it starts, may have open: as many as the system lets us, but no more than mpirun can use.
/// Its agents close every number below the limit, one after the other.
pub fn raise_file_limit() {
    const ENOUGH: u64 = 1 << 16;
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    // Without it a run of some hundred ranks still works.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, hard.min(ENOUGH).max(soft), hard);
}

/// How many entries of `folder` are `prefix` and a number.
fn numbered(folder: &str, prefix: &str) -> usize {
    let is_one = |name: &str| name.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()));
    std::fs::read_dir(folder).map_or(0, |entries| entries.flatten().filter(|entry| is_one(&entry.file_name().to_string_lossy())).count())
}

/// This very executable, also where a build has put another in its place.
pub const OWN: &str = "/proc/self/exe";
/// What lists of processes call it.
pub const NAME: &str = "tiefsee-launch";

/// Where this executable lies; after a build, the one that has taken its place.
pub fn own_path() -> std::io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let replaced = path.to_str().and_then(|path| path.strip_suffix(" (deleted)")).map(PathBuf::from);
    Ok(replaced.unwrap_or(path))
}

/// The `tiefsee` beside this executable.
pub fn sibling(name: &str) -> std::io::Result<PathBuf> {
    Ok(own_path()?.with_file_name(name))
}

/// How often the kernel has killed a process of our control group for its memory; 0 where that is not told.
pub fn oom_kills() -> u64 {
    let told = || {
        let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
        let events = std::fs::read_to_string(format!("/sys/fs/cgroup{path}/memory.events")).ok()?;
        events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
    };
    told().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ranks_on_other_hosts_need_is_passed_on() {
        let set = ["HOME", "NCCL_IB_HCA", "RUST_LOG", "AWS_REGION", "MY_AWS_KEY", "HTTPS_PROXY", "no_proxy", "ftp_proxy", SECRET].map(str::to_string);
        assert_eq!(exported(set.into_iter()), ["AWS_REGION", "HTTPS_PROXY", "NCCL_IB_HCA", "RUST_LOG", "no_proxy"]);
        let set = ["UCX_NET_DEVICES", "FI_PROVIDER", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_SHOW_CPP_STACKTRACES", "MKL_NUM_THREADS", "OMP_NUM_THREADS"].map(str::to_string);
        assert_eq!(exported(set.clone().into_iter()).len(), set.len());
    }

    #[test]
    fn shells_of_a_job_are_no_steps() {
        assert_eq!([None, Some("4294967291"), Some("4294967290"), Some("0"), Some("3")].map(is_in_step), [false, false, false, true, true]);
    }

    #[test]
    fn a_job_is_preempted_once_it_has_a_time_of_it() {
        assert!(!is_preempted("   PreemptEligibleTime=2026-11-26T23:20:11 PreemptTime=None\n"));
        assert!(is_preempted("   PreemptEligibleTime=2026-11-26T23:20:11 PreemptTime=2026-11-26T23:21:00\n"));
    }
}
