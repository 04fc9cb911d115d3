//! The batch script with stand-ins for SLURM and for the launcher: what it passes on, and when it asks for another start.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Ends with 75 when told to, as one does whose ranks have checkpointed.
const STOPS_WHEN_TOLD: &str = "trap 'exit 75' USR1 TERM; touch started; for ((tick = 0; tick < 600; tick++)); do /bin/sleep 0.05; done";

/// A repository with a launcher of its own, and commands that are found before the system's.
struct Job {
    folder: tempfile::TempDir,
}

impl Job {
    fn new(launcher: &str) -> Self {
        let job = Job { folder: tempfile::tempdir().expect("a folder") };
        job.script("scripts/launch.sh", launcher);
        job.script("bin/scontrol", "if [ \"$1\" = requeue ]; then touch requeued; fi");
        // Nothing ends the shell of a job that was requeued here.
        job.script("bin/sleep", "");
        job
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn script(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a folder's file")).expect("a folder");
        fs::write(&path, format!("#!/usr/bin/env bash\n{text}\n")).expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
    }

    fn start(&self, words: &[&str]) -> Child {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/train.sbatch");
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").expect("a path"));
        let mut command = Command::new("bash");
        command.arg(script).args(words).env("PATH", path).env("SLURM_SUBMIT_DIR", self.folder.path()).env_remove("SLURM_ARRAY_TASK_ID").env_remove("TIEFSEE");
        for (name, value) in [("SLURM_STEP_ID", "0"), ("SLURM_JOB_ID", "7"), ("SLURM_JOB_NAME", "tiefsee"), ("SLURM_JOB_NODELIST", "n1")] {
            command.env(name, value);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a shell")
    }

    fn wait(&self, name: &str) {
        let start = Instant::now();
        while !self.path(name).exists() {
            assert!(start.elapsed() < Duration::from_secs(60), "waited in vain for {name}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Told once `name` is there: its output, and whether it asked to be requeued.
    fn told(&self, signal: &str, name: &str, words: &[&str]) -> (Output, bool) {
        let child = self.start(words);
        self.wait(name);
        assert!(Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().expect("kill").success());
        let output = child.wait_with_output().expect("ended");
        (output, fs::remove_file(self.path("requeued")).is_ok())
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn what_comes_before_the_launcher_is_passed_on() {
    let resumed = ["resume", "run"];
    for (signal, again) in [("USR1", true), ("TERM", false)] {
        let job = Job::new(STOPS_WHEN_TOLD);
        // What looks for the newest checkpoint.
        job.script("bin/ls", "touch looked; /bin/sleep 0.5");
        fs::create_dir(job.path("run")).expect("a folder");
        let (output, requeued) = job.told(signal, "looked", &resumed);
        // The launcher may have had no time to listen.
        assert!(if again { output.status.code() == Some(75) } else { matches!(output.status.code(), Some(75 | 143)) }, "{signal}: {}", text(&output));
        assert_eq!(requeued, again, "{signal}: {}", text(&output));
    }
}

#[test]
fn a_launcher_that_does_not_listen_yet_is_stopped_as_asked() {
    let job = Job::new("touch started; for ((tick = 0; tick < 600; tick++)); do /bin/sleep 0.05; done");
    let (output, requeued) = job.told("USR1", "started", &["train", "--set", "run.dir=run"]);
    assert!(output.status.code() == Some(75) && requeued, "{}", text(&output));
    assert!(text(&output).contains("it stopped without a new checkpoint, 1 time(s) in a row"), "{}", text(&output));
}

#[test]
fn a_run_directory_is_read_off_the_config() {
    // Checkpoints in `run`, wherever that was found: what ends in one got somewhere.
    let job = Job::new("trap 'mkdir -p run/checkpoints/step-00000001; exit 75' USR1; touch started; for ((tick = 0; tick < 600; tick++)); do /bin/sleep 0.05; done");
    let in_vain = "it stopped, and whether with a new checkpoint is not known";
    for (config, found) in [
        ("[run]\ndir = \"run\" # ours\n", true),
        ("[run]\nsteps = 3\n  dir='run'\n", true),
        (" [ run ]\n\tdir   =   'run'\n[data]\ndir = \"elsewhere\"\n", true),
        ("[data]\ndir = \"run\"\n[run]\nrun_dir = \"run\"\n", false),
        ("# ours\nrun.dir = \"run\"\n[data]\n", true),
        (" run . dir='run'", true),
        ("[data]\nrun.dir = \"run\"\n", false),
        ("[model]\n[data]\nrun.dir = 'run'\n", false),
    ] {
        fs::write(job.path("a.toml"), config).expect("written");
        let (output, requeued) = job.told("USR1", "started", &["train", "--config", "a.toml"]);
        assert!(requeued && text(&output).contains(in_vain) != found, "{config}: {}", text(&output));
        assert!(!text(&output).contains("without a new checkpoint"), "{config}: {}", text(&output));
        fs::remove_dir_all(job.path("run")).expect("a checkpoint");
        fs::remove_file(job.path("started")).expect("a start");
    }
}

#[test]
fn a_run_that_stops_where_its_config_says_is_not_started_again() {
    let job = Job::new("exit 75");
    for (config, again) in [("[run]\ndir = 'run'\n", true), ("[run]\n\tstop_after = 4\n", false), ("run.dir = 'run'\nrun.stop_after = 4\n", false)] {
        fs::write(job.path("a.toml"), config).expect("written");
        let output = job.start(&["train", "--config", "a.toml"]).wait_with_output().expect("ended");
        assert_eq!(fs::remove_file(job.path("requeued")).is_ok(), again, "{config}: {}", text(&output));
    }
}

#[test]
fn a_run_whose_directory_is_not_known_is_not_requeued_for_ever() {
    let job = Job::new(STOPS_WHEN_TOLD);
    for time in 1..=9 {
        let (output, requeued) = job.told("USR1", "started", &["train", "--config", "nowhere.toml"]);
        assert_eq!(requeued, time < 9, "time {time}: {}", text(&output));
        fs::remove_file(job.path("started")).expect("a start");
    }
}

#[test]
fn a_file_system_that_does_not_answer_is_not_waited_for() {
    let job = Job::new("exit 13");
    job.script("bin/ls", "/bin/sleep 20; touch answered");
    // A minute is too long here.
    job.script("bin/timeout", "[ \"$1 $2 $3\" = '-k 1 60' ] && exec /usr/bin/timeout -k 1 0.5 \"${@:4}\"");
    let output = job.start(&["train", "--set", "run.dir=run"]).wait_with_output().expect("ended");
    assert!(!job.path("answered").exists(), "{}", text(&output));
    // It may have a checkpoint.
    assert!(job.path("requeued").exists() && text(&output).contains("its restarts were used up, 1 time(s) in a row"), "{}", text(&output));
}

#[test]
fn a_step_that_called_sbatch_is_forgotten() {
    let job = Job::new("echo \"step: ${SLURM_STEP_ID:-none}\"");
    let output = job.start(&["train", "--set", "run.dir=run"]).wait_with_output().expect("ended");
    assert!(output.status.success() && text(&output).contains("step: none"), "{}", text(&output));
}

/// A number there would count as the caller's, and one rank would take all GPUs of a node.
#[test]
fn how_many_ranks_a_node_has_is_left_to_its_gpus() {
    let script = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/train.sbatch")).expect("a script");
    let asked: Vec<&str> = script.lines().filter(|line| line.starts_with("#SBATCH ")).collect();
    assert!(asked.contains(&"#SBATCH --nodes=1") && !asked.iter().any(|line| line.contains("--ntasks") || line.contains(" -n")), "{asked:?}");
}
