//! The launcher in an allocation of three nodes, with stand-ins for SLURM's commands: which nodes it asks for after a loss.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output};

/// One node is spare.
const NODES: &str = "n1,n2,n3";

struct Job {
    folder: tempfile::TempDir,
}

impl Job {
    /// `starts`: cases of a shell's `case`, by the number of the start, each what srun does then. `has`: the nodes that the job still
    /// has, by squeue.
    fn new(starts: &str, has: &str) -> Self {
        let job = Job { folder: tempfile::tempdir().expect("a folder") };
        fs::create_dir_all(job.path("bin")).expect("a folder");
        let srun = "if [ \"$1\" = --mpi=list ]; then echo pmix; exit; fi\necho \"$*\" >>starts\nmkdir -p run/checkpoints/step-00000004\n\
            touch run/resolved.toml run/checkpoints/step-00000004/manifest.json\ncase $(wc -l <starts) in";
        job.script("srun", &format!("{srun}\n{starts}\n*) echo '{{\"finished\": true}}' >run/summary.json ;;\nesac"));
        job.script("scontrol", "if [ \"$2\" = hostnames ]; then tr , '\\n' <<<\"$3\"; fi");
        job.script("squeue", has);
        job
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn script(&self, name: &str, text: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/usr/bin/env bash\n{text}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
    }

    fn launch(&self) -> Output {
        fs::write(self.path("a.toml"), "run.dir = \"run\"\n").expect("written");
        let mut command = Command::new(env!("CARGO_BIN_EXE_tiefsee-launch"));
        command.args("--nnodes 2 --nproc-per-node 1 --back-off 0 --max-restarts 2 -- train --config a.toml".split(' ')).current_dir(self.folder.path());
        command.env("PATH", format!("{}:{}", self.path("bin").display(), std::env::var("PATH").expect("a path")));
        for name in ["SLURM_STEP_ID", "SLURM_ARRAY_JOB_ID", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK"] {
            command.env_remove(name);
        }
        command.env("SLURM_JOB_ID", "7").env("SLURM_JOB_NUM_NODES", "3").env("SLURM_JOB_NODELIST", NODES).output().expect("a launcher")
    }

    /// The nodes of each start, and whether it shares cores with steps that SLURM takes for alive.
    fn starts(&self) -> Vec<(String, bool)> {
        let starts = fs::read_to_string(self.path("starts")).expect("srun was called");
        let nodes = |line: &str| line.split(' ').find_map(|word| word.strip_prefix("--nodelist=")).expect("nodes").to_string();
        starts.lines().map(|line| (nodes(line), line.split(' ').any(|word| word == "--overlap"))).collect()
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// As where the node lost its power, and SLURM waits for five minutes before it has it down.
#[test]
fn a_node_that_takes_no_task_is_left_out_before_slurm_has_it_down() {
    let launch = "2) echo 'srun: error: Task launch for StepId=7.1 failed on node n2: Socket timed out on send/recv operation' >&2; exit 140 ;;";
    let job = Job::new(&format!("1) echo 'srun: error: n1: task 0: Aborted' >&2; exit 134 ;;\n{launch}"), &format!("echo {NODES}"));
    let output = job.launch();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(job.starts(), [("n1,n2".to_string(), false), ("n1,n2".to_string(), true), ("n1,n3".to_string(), true)]);
    assert!(text(&output).contains("host n2 cannot be used and is left out from here on; 2 host(s) are left"), "{}", text(&output));
}

#[test]
fn a_node_that_slurm_has_taken_from_the_job_is_not_asked_for_again() {
    let job = Job::new("1) echo 'srun: error: n1: task 0: Aborted' >&2; exit 134 ;;", "if [ -e starts ]; then echo n1,n3; else echo n1,n2,n3; fi");
    let output = job.launch();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(job.starts(), [("n1,n2".to_string(), false), ("n1,n3".to_string(), true)]);
}
