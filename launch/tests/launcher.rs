//! The launcher over a real mpirun, with a stand-in for `tiefsee`: codes, restarts, hangs, signals, orphans.
use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Longer than any of these runs takes; only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A run directory, the faults in it and what became of it.
struct Run {
    folder: tempfile::TempDir,
}

impl Run {
    fn new(steps: usize, fault: &str) -> Self {
        let run = Run { folder: tempfile::tempdir().expect("a folder") };
        run.write("steps", &steps.to_string());
        if !fault.is_empty() {
            run.write("fault", &format!("{fault}\n"));
        }
        run
    }

    fn dir(&self) -> &Path {
        self.folder.path()
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir().join(name), text).expect("written");
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir().join(name)).unwrap_or_default()
    }

    fn command(&self, options: &str) -> Command {
        let stand_in = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/stand_in.sh");
        let mut command = Command::new(env!("CARGO_BIN_EXE_tiefsee-launch"));
        command.args("--standalone --nproc-per-node 2 --back-off 0 --kill-after 2".split(' ')).args(options.split_whitespace());
        command.arg("--program").arg(stand_in).args(["--", "train", "--config", "../configs/run/tiny.toml", "--set"]).arg(format!("run.dir={}", self.dir().display()));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn launch(&self, options: &str) -> Output {
        self.command(options).output().expect("a launcher")
    }

    fn events(&self) -> Vec<String> {
        let event = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["event"].as_str().expect("a name").to_string();
        self.read("log/incidents.jsonl").lines().map(event).collect()
    }

    /// Runs until every rank has logged a step, and then `then`.
    fn started(&self, options: &str) -> Started {
        let child = Started(Some(self.command(options).spawn().expect("a launcher")));
        wait("both ranks to step", || [0, 1].iter().all(|rank| !self.read(&format!("log/rank-{rank}.jsonl")).is_empty()));
        child
    }

    /// Every rank that ever started, and every process that names this run.
    fn alive(&self) -> Vec<String> {
        let dir = self.dir().display().to_string();
        let of = |pid: &str| fs::read(format!("/proc/{pid}/cmdline")).map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " ")).unwrap_or_default();
        let pids = fs::read_dir("/proc").expect("a process table").flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
        pids.filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit())).map(|pid| of(&pid)).filter(|line| line.contains(&dir)).collect()
    }
}

/// Ends with its test, also one that fails.
struct Started(Option<Child>);

impl Started {
    fn signal(&self, name: &str) {
        let pid = self.0.as_ref().expect("running").id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().expect("kill").success());
    }

    fn output(mut self) -> Output {
        self.0.take().expect("running").wait_with_output().expect("ended")
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            child.kill().expect("killed");
            child.wait().expect("reaped");
        }
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_clean_run_is_0_with_prefixed_and_kept_output() {
    let run = Run::new(3, "");
    let output = run.launch("");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("[1] train from 0"), "{}", text(&output));
    assert_eq!(run.read("log/rank-1.log"), "train from 0\n");
    assert_eq!(run.events(), ["started", "ended"]);
}

#[test]
fn a_launcher_that_is_built_anew_meanwhile_still_restarts() {
    let run = Run::new(7, "1 6 kill");
    let (built, own) = (env!("CARGO_BIN_EXE_tiefsee-launch"), run.dir().join("tiefsee-launch"));
    // By processes of their own: while this one has a file open for writing, a child of another test may too, and none can run it.
    let copy = |to: &Path| assert!(Command::new("cp").arg(built).arg(to).status().expect("cp").success());
    copy(&own);
    let child = Started(Some(Command::new(&own).args(run.command("").get_args()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a launcher")));
    wait("the first start", || run.events().contains(&"started".to_string()));
    // At once, as a build does: mpirun may be starting ranks with it.
    let newer = run.dir().join("newer");
    copy(&newer);
    fs::rename(&newer, &own).expect("another in its place");
    let output = child.output();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(run.events(), ["started", "failed", "restarting", "started", "ended"]);
}

#[test]
fn hosts_are_reached_from_a_folder_with_a_blank_in_its_name() {
    let run = Run::new(3, "");
    let folder = run.dir().join("a folder");
    fs::create_dir(&folder).expect("a folder");
    let own = folder.join("tiefsee-launch");
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_tiefsee-launch")).arg(&own).status().expect("cp").success());
    // In place of ssh; its words are the host's and the daemon's.
    let agent = run.dir().join("agent");
    fs::write(&agent, format!("#!/usr/bin/env bash\necho \"$1\" >{}/reached\nexit 1\n", run.dir().display())).expect("written");
    fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).expect("executable");
    let mut command = Command::new(&own);
    command.args("--hosts elsewhere --heartbeat 0 --max-restarts 0 --rsh-agent".split(' ')).arg(&agent).args(["--", "train", "--config", "../configs/run/tiny.toml", "--set"]);
    let output = command.arg(format!("run.dir={}", run.dir().display())).output().expect("a launcher");
    assert_eq!((run.read("reached").trim(), output.status.code()), ("elsewhere", Some(14)), "{}", text(&output));
}

#[test]
fn slots_of_a_hostfile_are_the_ranks_of_a_host() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let shown = |text: &str| {
        fs::write(file.path(), text).expect("written");
        let mut command = Command::new(env!("CARGO_BIN_EXE_tiefsee-launch"));
        command.arg("--hostfile").arg(file.path()).args(["--dry-run", "--", "resume", "a"]).output().expect("a launcher")
    };
    let output = shown("n1 slots=3\nn2 slots=3\n");
    assert!(text(&output).contains(" -np 6 ") && text(&output).contains("--host n1:3,n2:3 "), "{}", text(&output));
    let output = shown("n1 slots=3\nn2 slots=4\n");
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(text(&output).contains(&format!("--hostfile {}: host n2 has slots=4", file.path().display())), "{}", text(&output));
}

#[test]
fn nothing_is_made_where_there_is_no_run_to_resume() {
    let folder = tempfile::tempdir().expect("a folder");
    let typo = folder.path().join("typo");
    let output = Command::new(env!("CARGO_BIN_EXE_tiefsee-launch")).args(["--standalone", "--", "resume"]).arg(&typo).output().expect("a launcher");
    assert!(output.status.code() == Some(2) && text(&output).contains("typo is not a run directory") && !typo.exists(), "{}", text(&output));
}

#[test]
fn a_killed_rank_is_restarted_from_its_checkpoint() {
    let run = Run::new(7, "1 6 kill");
    let output = run.launch("");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("[0] resume from 4"), "{}", text(&output));
    assert!(text(&output).contains(": rank 1 on host ") && text(&output).contains("was killed by signal 9 (SIGKILL)"), "{}", text(&output));
    assert_eq!(run.events(), ["started", "failed", "restarting", "started", "ended"]);
}

#[test]
fn a_code_of_0_before_the_end_is_no_end() {
    let run = Run::new(7, "1 6 quit");
    let output = run.launch("");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("summary.json does not say that it is over") && text(&output).contains("[0] resume from 4"), "{}", text(&output));
    assert_eq!(run.events(), ["started", "failed", "restarting", "started", "ended"]);
    // Its summary is there now, and the run goes on all the same.
    run.write("steps", "12");
    run.write("fault", "1 10 quit\n");
    let output = run.launch("--auto-resume");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("[0] resume from 8"), "{}", text(&output));
}

#[test]
fn a_half_run_is_put_aside_and_begun_again() {
    let run = Run::new(5, "0 2 kill");
    let output = run.launch("");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(run.events(), ["started", "failed", "restarting", "put_aside", "started", "ended"]);
    assert!(run.dir().join("half-run-1/log/rank-0.jsonl").exists());
    let again = run.launch("");
    assert_eq!(again.status.code(), Some(2), "a run that is there is not begun anew: {}", text(&again));
    assert_eq!(run.launch("--auto-resume").status.code(), Some(0));
    // What can be done about one that nobody began again.
    let left = Run::new(5, "0 2 kill");
    assert_ne!(left.launch("--max-restarts 0").status.code(), Some(0));
    let again = left.launch("");
    assert!(again.status.code() == Some(2) && text(&again).contains("ended before its first checkpoint: --auto-resume"), "{}", text(&again));
}

#[test]
fn restarts_are_counted_and_errors_before_a_step_are_final() {
    let run = Run::new(7, "1 6 exit5");
    let output = run.launch("--max-restarts 0");
    assert_eq!(output.status.code(), Some(10), "{}", text(&output));
    assert!(text(&output).contains("step 5: rank 1 on host "), "{}", text(&output));
    assert!(text(&output).contains(" ended with code 5: error (rank 1): out of ideas"), "{}", text(&output));
    let run = Run::new(7, "0 1 exit5");
    let output = run.launch("");
    assert_eq!(output.status.code(), Some(10), "{}", text(&output));
    assert_eq!(run.events(), ["started", "failed", "given_up"]);
}

#[test]
fn what_fails_at_the_same_step_again_and_again_is_given_up() {
    let run = Run::new(9, "1 6 kills");
    // Each restart is forgotten at once.
    let output = run.launch("--max-restarts 2 --restart-window 0");
    assert_eq!(output.status.code(), Some(11), "{}", text(&output));
    assert!(text(&output).contains("no restart: it failed 3 times in a row at the same step, and there is no newer checkpoint"), "{}", text(&output));
    let event = |name: &str| run.events().iter().filter(|event| *event == name).count();
    assert_eq!((event("started"), event("failed"), event("given_up")), (3, 3, 1), "{:?}", run.events());
}

#[test]
fn a_file_system_that_fails_now_is_no_wrong_command() {
    let run = Run::new(3, "");
    run.write("resolved.toml", "");
    run.write("checkpoints", "a file where a folder belongs");
    let output = run.launch("--auto-resume");
    assert_eq!(output.status.code(), Some(16), "{}", text(&output));
    assert!(text(&output).contains("cannot list ") && text(&output).contains("checkpoints"), "{}", text(&output));
    // Nor is a run left alone where nobody can write down what happens to it.
    let run = Run::new(3, "");
    fs::create_dir_all(run.dir().join("log/incidents.jsonl")).expect("a folder where a file belongs");
    let output = run.launch("");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("incidents.jsonl: Is a directory"), "{}", text(&output));
}

/// As one whose host has lost its GPU, or whose file system is not there yet.
#[test]
fn a_run_that_has_worked_is_started_again_also_where_it_fails_before_a_step() {
    let run = Run::new(7, "1 6 kill");
    run.write("fault.next", "0 5 exit5\n");
    let output = run.launch("");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(run.events(), ["started", "failed", "restarting", "started", "failed", "restarting", "started", "ended"]);
    run.write("steps", "9");
    run.write("fault", "0 5 exit5\n");
    let output = run.launch("--auto-resume");
    assert_eq!(output.status.code(), Some(0), "a launcher that found a checkpoint: {}", text(&output));
    assert!(text(&output).contains("resolved.toml and not this command's"), "{}", text(&output));
}

#[test]
fn a_last_checkpoint_that_fails_leaves_a_run_that_can_go_on() {
    for fault in ["unsaved", "lost"] {
        let run = Run::new(1000, &format!("0 6 {fault}"));
        let child = run.started("");
        wait("the fault", || run.dir().join("fault.taken").exists());
        child.signal("USR1");
        let output = child.output();
        assert_eq!(output.status.code(), Some(18), "{fault}: {}", text(&output));
    }
}

#[test]
fn a_run_whose_checkpoints_are_gone_is_never_begun_anew() {
    let run = Run::new(3, "");
    fs::create_dir_all(run.dir().join("log")).expect("a folder");
    ["resolved.toml", "summary.json", "log/rank-0.jsonl"].iter().for_each(|name| run.write(name, ""));
    let output = run.launch("--auto-resume");
    assert!(!output.status.success() && text(&output).contains("holds a run whose checkpoints are gone"), "{}", text(&output));
    assert!(run.dir().join("log/rank-0.jsonl").exists() && !run.dir().join("half-run-1").exists(), "what it wrote stays");
}

#[test]
fn a_rendezvous_without_a_secret_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let run_dir = folder.path().join("run");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tiefsee-launch"));
    command.env_remove("TIEFSEE_SECRET").args("--nnodes 2 --node-rank 0 --rdzv 127.0.0.1:29417 -- train --config ../configs/run/tiny.toml --set".split(' '));
    let output = command.arg(format!("run.dir={}", run_dir.display())).output().expect("a launcher");
    assert!(!output.status.success() && text(&output).contains("secret"), "{}", text(&output));
    assert!(!run_dir.exists());
}

#[test]
fn a_port_that_is_taken_now_is_no_wrong_command() {
    let (run, taken) = (Run::new(3, ""), std::net::TcpListener::bind("127.0.0.1:0").expect("a port"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_tiefsee-launch"));
    command.env("TIEFSEE_SECRET", "a secret that both nodes know").args(["--nnodes", "2", "--node-rank", "0", "--rdzv", &taken.local_addr().expect("an address").to_string()]);
    let output = command.args(["--", "train", "--config", "../configs/run/tiny.toml", "--set"]).arg(format!("run.dir={}", run.dir().display())).output().expect("a launcher");
    assert_eq!(output.status.code(), Some(16), "{}", text(&output));
    assert!(text(&output).contains("node 0 cannot listen at --rdzv 127.0.0.1:"), "{}", text(&output));
}

#[test]
fn what_mpirun_refuses_is_no_ranks_failure() {
    let output = Run::new(3, "").launch("--pass=--nonsense");
    assert_eq!(output.status.code(), Some(16), "{}", text(&output));
    assert!(text(&output).contains("--nonsense") && !text(&output).contains("a rank ended"), "{}", text(&output));
}

/// As where whoever stops a job ends the host of node 0 first.
#[test]
fn a_node_that_was_asked_to_stop_does_not_look_for_a_lost_node_0() {
    let (run, said) = (Run::new(3, ""), tempfile::NamedTempFile::new().expect("a file"));
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").to_string();
    let start = |number: &str, to: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tiefsee-launch"));
        command.env("TIEFSEE_SECRET", "a secret that both nodes know").args(["--start-limit", "10", "--nnodes", "3", "--rdzv", &port, "--node-rank", number]);
        command.args(["--", "train", "--config", "../configs/run/tiny.toml", "--set"]).arg(format!("run.dir={}", run.dir().display()));
        Started(Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(to).spawn().expect("a launcher")))
    };
    let (first, other) = (start("0", Stdio::null()), start("1", said.reopen().expect("a file").into()));
    let told = |words: &str| fs::read_to_string(said.path()).expect("a file").contains(words);
    wait("the registration", || told("registered at"));
    // It cannot answer any more.
    first.signal("STOP");
    other.signal("TERM");
    wait("the request", || told("asked to stop: node 0 is told"));
    drop(first);
    let output = other.output();
    assert_eq!(output.status.code(), Some(18), "{}", fs::read_to_string(said.path()).expect("a file"));
    assert!(told("after this node was asked to stop"));
}

#[test]
fn a_world_that_another_started_is_not_put_aside() {
    let run = Run::new(3, "");
    fs::create_dir_all(run.dir().join("log")).expect("a folder");
    run.write("resolved.toml", "");
    let world = fs::File::create(run.dir().join("log/run.lock")).expect("a file");
    world.lock().expect("free");
    let child = Started(Some(run.command("--auto-resume").spawn().expect("a launcher")));
    std::thread::sleep(Duration::from_secs(1));
    fs::create_dir_all(run.dir().join("checkpoints/step-00000002")).expect("a folder");
    run.write("checkpoints/step-00000002/manifest.json", "{}");
    drop(world);
    let output = child.output();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(run.events(), ["started", "ended"]);
    assert!(text(&output).contains("resume from 2"), "{}", text(&output));
}

#[test]
fn a_frozen_rank_is_named_killed_and_restarted() {
    let run = Run::new(7, "1 6 freeze");
    let output = run.launch("--hang-floor 2 --hang-steps 10");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("every rank has logged step 5; rank 1 is a stopped process"), "{}", text(&output));
    assert_eq!(run.events(), ["started", "hung", "failed", "restarting", "started", "ended"]);
    assert_eq!(run.alive(), Vec::<String>::new());
}

#[test]
fn signals_end_in_a_checkpoint_and_75() {
    for name in ["INT", "TERM", "USR1"] {
        let run = Run::new(1000, "");
        let child = run.started("");
        child.signal(name);
        let output = child.output();
        assert_eq!(output.status.code(), Some(75), "{name}: {}", text(&output));
        assert!(run.dir().join("checkpoints").exists(), "{name}");
        assert_eq!(run.events(), ["started", "stop_requested", "ended"], "{name}");
    }
}

/// A stand-in for mpirun, which tells its version late.
fn own_mpirun(run: &Run, started: &str) -> Started {
    let (folder, dir) = (run.dir().join("bin"), run.dir().display());
    fs::create_dir(&folder).expect("a folder");
    let text = format!("#!/usr/bin/env bash\nif [ \"$1\" = --version ]; then touch {dir}/asked; sleep 0.5; exit; fi\n{started}\n");
    fs::write(folder.join("mpirun"), text).expect("written");
    fs::set_permissions(folder.join("mpirun"), fs::Permissions::from_mode(0o755)).expect("executable");
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").expect("a path"));
    Started(Some(run.command("").env("PATH", path).spawn().expect("a launcher")))
}

#[test]
fn a_signal_that_comes_while_the_environment_is_read_is_heard() {
    let run = Run::new(1000, "");
    let child = own_mpirun(&run, "exit 1");
    wait("the question", || run.dir().join("asked").exists());
    child.signal("USR1");
    let output = child.output();
    assert_eq!(output.status.code(), Some(75), "{}", text(&output));
    assert_eq!(run.events(), ["stop_requested"]);
}

/// As srun, where it still waits for its nodes.
#[test]
fn ranks_that_cannot_start_because_of_a_request_are_stopped() {
    let run = Run::new(1000, "");
    let dir = run.dir().display();
    let child = own_mpirun(&run, &format!("trap 'echo \"srun: error: Unable to create step for job 7: Job/step already completing\" >&2; exit 1' USR1; touch {dir}/begun; while :; do sleep 0.05; done"));
    wait("the start", || run.dir().join("begun").exists());
    child.signal("USR1");
    let output = child.output();
    assert_eq!(output.status.code(), Some(75), "{}", text(&output));
    assert_eq!(run.events(), ["started", "stop_requested", "failed", "given_up"]);
}

/// A log that cannot be opened, as on a file system that does not answer.
#[test]
fn a_signal_does_not_wait_for_a_look_at_the_logs() {
    let run = Run::new(1000, "");
    let child = run.started("");
    let (pipe, log) = (run.dir().join("pipe"), run.dir().join("log/rank-7.jsonl"));
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
    std::os::unix::fs::symlink(&pipe, log).expect("a link");
    // Until the logs are looked at: once a second.
    std::thread::sleep(Duration::from_secs(3));
    child.signal("TERM");
    wait("the checkpoint", || run.dir().join("stopped").exists());
    // Only beside a reader that waits can it be opened so; then it answers that it is no file.
    let mut answer = None;
    wait("the look", || {
        answer = fs::File::options().write(true).custom_flags(nix::libc::O_NONBLOCK).open(&pipe).ok();
        answer.is_some()
    });
    let output = child.output();
    assert_eq!(output.status.code(), Some(75), "{}", text(&output));
    assert_eq!(run.events(), ["started", "stop_requested", "blind", "ended"]);
}

#[test]
fn deaf_ranks_are_ended_after_the_grace() {
    let run = Run::new(1000, "0 2 deaf");
    let child = run.started("--grace 1");
    wait("the fault", || run.dir().join("fault.taken").exists());
    child.signal("TERM");
    let output = child.output();
    assert_eq!(output.status.code(), Some(18), "{}", text(&output));
    assert_eq!(run.alive(), Vec::<String>::new());
}

#[test]
fn a_killed_launcher_leaves_nobody_and_another_goes_on() {
    let run = Run::new(12, "1 9 deaf");
    let child = run.started("");
    wait("the fault", || run.dir().join("fault.taken").exists());
    assert_eq!(run.launch("--auto-resume").status.code(), Some(17), "a run has one launcher");
    drop(child);
    // At once: it waits for the ranks of the killed one.
    let output = run.launch("--auto-resume");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(text(&output).contains("resume from 8"), "{}", text(&output));
    assert_eq!(run.alive(), Vec::<String>::new());
}

#[test]
fn what_a_host_that_is_gone_had_locked_is_waited_for() {
    let run = Run::new(3, "");
    fs::create_dir_all(run.dir().join("log")).expect("a folder");
    run.write("log/launcher.lock", "elsewhere 1\n");
    let held = fs::File::options().append(true).open(run.dir().join("log/launcher.lock")).expect("a file");
    held.lock().expect("free");
    let child = Started(Some(run.command("").spawn().expect("a launcher")));
    std::thread::sleep(Duration::from_secs(1));
    drop(held);
    let output = child.output();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
}

#[test]
fn a_program_that_is_not_there_is_said() {
    let output = Command::new(env!("CARGO_BIN_EXE_tiefsee-launch")).args(["--standalone", "--program", "/nowhere/tiefsee", "--", "plan", "x"]).output().expect("a launcher");
    assert_eq!(output.status.code(), Some(16), "{}", text(&output));
    let refused = Command::new(env!("CARGO_BIN_EXE_tiefsee-launch")).args(["--nnodes", "9", "--", "resume", "x"]).output().expect("a launcher");
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
}
