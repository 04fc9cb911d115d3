//! The real binary under the real launcher: ranks, hosts, links and strangers at the port; what is said, and that nobody is
//! left. Hosts are network namespaces (scripts/fixtures/hosts.sh), which need root.
use crate::support::{Run, binary, root};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longer than anything here takes; only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(100);
/// Endless, for a test's purposes.
const LONG: &str = "phase.0.tokens=30000000";

pub fn wait(what: &str, done: impl FnMut() -> bool) {
    wait_for(PATIENCE, what, done);
}

fn wait_for(patience: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < patience, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Hosts h1, h2 … of this test, gone with it.
pub struct Hosts {
    state: tempfile::TempDir,
    pub count: usize,
}

impl Hosts {
    /// None, and said: this user cannot make any.
    pub fn up(count: usize) -> Option<Hosts> {
        let hosts = Hosts { state: tempfile::tempdir().expect("a folder"), count };
        let output = hosts.fixture("up").arg(count.to_string()).output().expect("a shell");
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr);
            let cannot = !is_root() || ["not permitted", "not found"].iter().any(|words| reason.contains(words));
            assert!(cannot, "hosts.sh up: {reason}");
            println!("SKIPPED: network namespaces need root, CAP_SYS_ADMIN, unshare and ip: {reason}");
            return None;
        }
        Some(hosts)
    }

    fn fixture(&self, action: &str) -> Command {
        let mut command = Command::new(root().join("scripts/fixtures/hosts.sh"));
        command.arg(action).arg(self.state.path());
        command
    }

    pub fn order(&self, action: &str, host: &str) {
        assert!(self.fixture(action).arg(host).status().expect("a shell").success(), "hosts.sh {action} {host}");
    }

    pub fn network(&self) -> String {
        String::from_utf8_lossy(&self.fixture("network").output().expect("a shell").stdout).trim().to_string()
    }

    /// The launcher of one host.
    fn launcher(&self, host: &str) -> Command {
        let mut command = self.fixture("run");
        command.arg(host).arg(launcher());
        command
    }

    /// Ranks on all hosts, supervised from h1.
    pub fn supervised(&self, options: &str) -> Command {
        let names: Vec<String> = (1..=self.count).map(|number| format!("h{number}")).collect();
        let agent = format!("{} agent {}", root().join("scripts/fixtures/hosts.sh").display(), self.state.path().display());
        let mut command = self.launcher("h1");
        command.args(["--hosts", &names.join(","), "--interface", &self.network(), "--rsh-agent", &agent]).args(options.split_whitespace());
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        let _ = self.fixture("down").status();
    }
}

fn is_root() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| status.lines().any(|line| line.starts_with("Uid:\t0\t")))
}

fn launcher() -> PathBuf {
    let path = binary().with_file_name("tiefsee-launch");
    assert!(path.exists(), "{} is not built; scripts/test.sh builds it first", path.display());
    path
}

pub fn local(options: &str) -> Command {
    let mut command = Command::new(launcher());
    command.args(options.split_whitespace());
    command
}

/// A launcher, or a bare mpirun, and what it says. A test that fails takes it with it.
pub struct Started {
    child: Child,
    log: PathBuf,
}

impl Started {
    pub fn new(mut command: Command, run: &Run, name: &str) -> Started {
        let log = run.dir().with_extension(format!("{name}.out"));
        fs::create_dir_all(log.parent().expect("a folder")).expect("made");
        let out = fs::File::create(&log).expect("a file");
        command.stdin(Stdio::null()).stderr(out.try_clone().expect("a file")).stdout(out);
        Started { child: command.spawn().expect("it starts"), log }
    }

    pub fn train(mut command: Command, run: &Run, name: &str) -> Started {
        command.arg("--").args(run.train_args());
        Started::new(command, run, name)
    }

    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    #[track_caller]
    pub fn says(&self, text: &str) {
        assert!(self.said().contains(text), "not said: {text}\n{}", self.said());
    }

    pub fn wait_for(&mut self, text: &str) {
        wait(text, || {
            assert!(self.ended().is_none() || self.said().contains(text), "ended without {text}: {}", self.said());
            self.said().contains(text)
        });
    }

    pub fn ended(&mut self) -> Option<i32> {
        self.child.try_wait().expect("it is ours").map(|status| status.code().unwrap_or(-1))
    }

    pub fn code(&mut self) -> i32 {
        self.code_within(PATIENCE)
    }

    pub fn code_within(&mut self, patience: Duration) -> i32 {
        wait_for(patience, "the end", || self.ended().is_some());
        self.ended().expect("just seen")
    }

    pub fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn signal(pid: u32, name: &str) {
    // One that is already gone is no failure of the test's.
    let _ = Command::new("kill").args([format!("-{name}"), pid.to_string()]).stderr(Stdio::null()).status();
}

/// Every process that names this run: its number, its rank if it is one, and its command line.
pub fn processes(run: &Run) -> Vec<(u32, Option<usize>, String)> {
    let dir = run.dir().display().to_string();
    let read = |pid: u32, name: &str| fs::read(format!("/proc/{pid}/{name}")).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let pids = fs::read_dir("/proc").expect("a process table").flatten().filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    pids.filter_map(|pid| {
        let line = read(pid, "cmdline").replace('\0', " ");
        let rank = || read(pid, "environ").split('\0').find_map(|pair| pair.strip_prefix("OMPI_COMM_WORLD_RANK=")?.parse().ok());
        let is_rank = line.starts_with(&format!("{} ", binary().display()));
        line.contains(&dir).then(|| (pid, is_rank.then(rank).flatten(), line))
    })
    .collect()
}

pub fn rank_pid(run: &Run, rank: usize) -> Option<u32> {
    processes(run).into_iter().find(|(_, found, _)| *found == Some(rank)).map(|(pid, _, _)| pid)
}

#[track_caller]
fn nobody_is_left(run: &Run) {
    wait("the end of every process", || processes(run).is_empty());
}

/// Kills rank 2 of 4 in the middle of its steps: seconds until everything has ended, and the code.
fn kill_rank_2(command: Command, run: &Run) -> (f64, i32, Started) {
    let mut started = Started::new(command, run, "killed");
    run.wait_for_step(5);
    signal(rank_pid(run, 2).expect("rank 2"), "KILL");
    let start = Instant::now();
    let code = started.code();
    nobody_is_left(run);
    let seconds = start.elapsed().as_secs_f64();
    println!("kill -9 of rank 2: everything ended in {seconds:.1} s");
    // A bound of the system, not of this machine: it is 1 to 4 s.
    assert!(seconds < 10.0, "{seconds:.1} s");
    (seconds, code, started)
}

#[test]
fn a_killed_rank_ends_the_job_and_is_named_with_host_and_step() {
    let run = Run::new("launch-killed", &[LONG]);
    let mut command = local("--standalone --nproc-per-node 4 --max-restarts 0 --");
    command.args(run.train_args());
    let (_, code, started) = kill_rank_2(command, &run);
    assert_eq!(code, 11, "{}", started.said());
    let host = fs::read_to_string("/proc/sys/kernel/hostname").expect("a name");
    let said = started.said();
    let line = said.lines().find(|line| line.contains("was killed by signal 9")).unwrap_or_else(|| panic!("no word of it: {said}"));
    assert!(line.starts_with("tiefsee-launch: step ") && line.contains(&format!(": rank 2 on host {} was killed by signal 9 (SIGKILL)", host.trim())), "{line}");
}

#[test]
fn a_killed_rank_ends_a_bare_mpirun_too() {
    let run = Run::new("launch-bare", &[LONG]);
    let mut command = Command::new("mpirun");
    command.args("--allow-run-as-root --oversubscribe -n 4 --mca mpi_yield_when_idle 1 --bind-to none --mca btl_tcp_if_include lo".split(' '));
    command.arg(binary()).args(run.train_args());
    let (_, code, started) = kill_rank_2(command, &run);
    assert_eq!(code, 137, "{}", started.said());
    started.says("process rank 2 with PID");
}

#[test]
fn a_world_by_hand_is_refused_where_another_works() {
    let run = Run::new("launch-held", &[LONG, "checkpoint.every=5"]);
    let mut supervised = Started::train(local("--standalone --nproc-per-node 2"), &run, "out");
    supervised.wait_for("checkpoints/step-00000005");
    let resume = || Command::new(binary()).args(["resume", "--stop-after", "1"]).arg(run.dir()).output().expect("a rank");
    let refused = resume();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && said.contains(&format!("{}: another world is at work there (host ", run.dir().display())), "{said}");
    supervised.signal("INT");
    assert_eq!(supervised.code(), 75, "{}", supervised.said());
    assert_eq!(resume().status.code(), Some(75), "it is free again");
}

#[test]
fn two_ranks_on_each_of_two_hosts_are_four_ranks() {
    let Some(hosts) = Hosts::up(2) else { return };
    let set = ["parallel.ep=2"];
    let (spread, here) = (Run::new("launch-spread", &set), Run::new("launch-here", &set));
    let mut started = Started::train(hosts.supervised("--nproc-per-node 2"), &spread, "out");
    assert_eq!(started.code(), 0, "{}", started.said());
    started.says("4 rank(s) on 2 host(s) (h1, h2)");
    let mut started = Started::train(local("--standalone --nproc-per-node 4"), &here, "out");
    assert_eq!(started.code(), 0, "{}", started.said());
    spread.assert_same(&here, 1e-12);
}

#[test]
fn a_cut_link_is_noticed_and_the_run_goes_on_without_that_host() {
    for (count, options) in [(2, "--nproc-per-node 2 --nnodes 1:2"), (4, "--nproc-per-node 1 --nnodes 2:2 --max-restarts 9")] {
        let Some(hosts) = Hosts::up(count) else { return };
        let run = Run::new(&format!("launch-cut-{count}"), &[LONG, "checkpoint.every=5"]);
        let mut started = Started::train(hosts.supervised(options), &run, "out");
        started.wait_for("checkpoints/step-00000005");
        hosts.order("cut", "h2");
        let start = Instant::now();
        // The resumed ranks' own first word.
        started.wait_for("resuming ");
        println!("{count} hosts: a cut link, and the run went on after {:.1} s", start.elapsed().as_secs_f64());
        started.says("host h2");
        started.says("host h2 failed 2 times and is left out from here on");
        started.says(if count == 2 { "2 rank(s) on 1 host(s)" } else { "2 rank(s) on 2 host(s) (h1, h3)" });
        started.signal("INT");
        assert_eq!(started.code(), 75, "{}", started.said());
        hosts.order("join", "h2");
        nobody_is_left(&run);
    }
}

/// mpirun itself waits for a quarter of an hour where it had something to send.
#[test]
fn a_link_cut_under_a_message_is_noticed_by_the_heartbeat() {
    let Some(hosts) = Hosts::up(2) else { return };
    let run = Run::new("launch-busy", &[LONG, "checkpoint.every=5"]);
    let mut started = Started::train(hosts.supervised("--nproc-per-node 2 --heartbeat 4 --max-restarts 0"), &run, "out");
    started.wait_for("checkpoints/step-00000005");
    hosts.order("cut", "h2");
    // The launcher is asked to stop, and mpirun cannot pass it on.
    started.signal("USR1");
    assert_eq!(started.code(), 18, "{}", started.said());
    started.says("host h2 (ranks 2 to 3) is lost: no sign of life for");
    nobody_is_left(&run);
}

/// Node `number` of a rendezvous at `address`.
fn node(command: Command, number: usize, address: &str, secret: Option<&str>, run: &Run) -> Started {
    let mut command = command;
    match secret {
        Some(secret) => command.env("TIEFSEE_SECRET", secret),
        None => command.env_remove("TIEFSEE_SECRET"),
    };
    command.args(["--nnodes", "2", "--node-rank", &number.to_string(), "--rdzv", address]);
    Started::train(command, run, &format!("node-{number}"))
}

const SECRET: &str = "a secret of this test alone";

#[test]
fn nodes_that_meet_at_a_rendezvous_train_without_ssh_and_find_each_other_again() {
    let Some(hosts) = Hosts::up(2) else { return };
    // 100 steps in the second phase.
    let run = Run::new("launch-rendezvous", &["parallel.ep=2", "phase.1.tokens=36000", "checkpoint.every=5"]);
    let network = hosts.network();
    let address = network.replace(".0/24", ".1:29400");
    let start = |number: usize| {
        let mut command = hosts.launcher(&format!("h{}", number + 1));
        command.args(["--nproc-per-node", "2", "--interface", &network, "--auto-resume"]);
        node(command, number, &address, Some(SECRET), &run)
    };
    let (mut first, mut second) = (start(0), start(1));
    run.wait_for_step(12);
    first.says("4 rank(s) on 2 host(s) (h1, h2)");
    first.signal("KILL");
    first.code();
    second.wait_for("its processes here are ended");
    wait("the end of every rank", || processes(&run).iter().all(|(_, rank, _)| rank.is_none()));
    let mut first = start(0);
    assert_eq!([first.code(), second.code()], [0, 0], "{}{}", first.said(), second.said());
    first.says("resuming from");
    assert_eq!(run.lines().len(), 118);
    nobody_is_left(&run);
}

/// On one host: its two "hosts" must not share memory.
fn on_loopback() -> Command {
    local("--nproc-per-node 1 --interface lo --pass --mca --pass btl --pass self,tcp --max-restarts 9 --back-off 0")
}

#[test]
fn strangers_at_the_port_start_nothing_and_stop_nothing() {
    let version = Command::new("mpirun").arg("--version").output().expect("mpirun starts").stdout;
    if !String::from_utf8_lossy(&version).contains("(Open MPI) 4.") {
        return println!("SKIPPED strangers_at_the_port_start_nothing_and_stop_nothing: Open MPI 5 does not take one machine for two hosts");
    }
    let run = Run::new("launch-strangers", &[LONG, "checkpoint.every=5"]);
    let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
    let address = format!("127.0.0.1:{port}");
    let mut none = node(on_loopback(), 0, &address, None, &run);
    assert_eq!(none.code(), 2, "{}", none.said());
    none.says("a rendezvous needs a secret");

    let mut first = node(on_loopback(), 0, &address, Some(SECRET), &run);
    wait("the port", || TcpStream::connect(&address).is_ok());
    let mut wrong = node(on_loopback(), 1, &address, Some("another secret of nobody"), &run);
    wrong.wait_for("is its secret the same?");
    first.wait_for("a wrong secret");
    assert!(processes(&run).iter().all(|(_, rank, _)| rank.is_none()), "a wrong secret started ranks");
    drop(wrong);

    // What node 1 says is recorded on its way to node 0, and said again by a stranger.
    let recorded = record(&address, |proxy| node(on_loopback(), 1, proxy, Some(SECRET), &run).wait_for("registered at"));
    first.wait_for("node 1, ");
    let mut replay = TcpStream::connect(&address).expect("connected");
    replay.set_read_timeout(Some(Duration::from_secs(20))).expect("set");
    replay.read_exact(&mut [0; 40]).expect("a greeting");
    replay.write_all(&recorded).expect("sent");
    assert!(replay.read(&mut [0; 64]).map_or(true, |read| read == 0), "a recorded handshake was answered");

    let mut second = node(on_loopback(), 1, &address, Some(SECRET), &run);
    run.wait_for_step(3);
    let starts = |first: &Started| first.said().matches("rank(s) on 2 host(s)").count();
    let (before, started) = (run.lines().len(), starts(&first));
    let garbage: Vec<TcpStream> = (0..1000_u32).filter_map(|number| stranger(&address, number)).collect();
    run.wait_for_step(before + 20);
    drop(garbage);
    second.says("registered at");
    assert_eq!(starts(&first), started, "the run was started again: {}", first.said());
    assert_eq!(processes(&run).iter().filter(|(_, rank, _)| rank.is_some()).count(), 2);
    // As a scheduler does: every node is told, which is one request.
    second.signal("TERM");
    first.wait_for("asked to stop");
    first.signal("TERM");
    assert_eq!([first.code(), second.code()], [75, 75], "{}{}", first.said(), second.said());
    nobody_is_left(&run);
}

/// Says nothing, half a greeting, or much; a port that is busy may turn it away.
fn stranger(address: &str, number: u32) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(address).ok()?;
    let bytes: Vec<u8> = (0..[0, 7, 64, 5000][number as usize % 4]).map(|at: u32| (at.wrapping_mul(2_654_435_761).wrapping_add(number) >> 7) as u8).collect();
    let _ = stream.write_all(&bytes);
    Some(stream)
}

/// Everything that a client says through a proxy before `address` while `client` runs against the proxy.
fn record(address: &str, client: impl FnOnce(&str)) -> Vec<u8> {
    let proxy = TcpListener::bind("127.0.0.1:0").expect("a port");
    let (own, target) = (proxy.local_addr().expect("an address").to_string(), address.to_string());
    let recorder = std::thread::spawn(move || {
        let mut from = proxy.accept().expect("a connection").0;
        let mut to = TcpStream::connect(target).expect("connected");
        let (mut back_from, mut back_to) = (to.try_clone().expect("a half"), from.try_clone().expect("a half"));
        let back = std::thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
        let mut said = Vec::new();
        let mut bytes = [0; 4096];
        while let Ok(read @ 1..) = from.read(&mut bytes) {
            said.extend_from_slice(&bytes[..read]);
            if to.write_all(&bytes[..read]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(std::net::Shutdown::Both);
        let _ = back.join();
        said
    });
    client(&own);
    recorder.join().expect("it ends")
}

#[test]
fn a_wrong_config_is_2_and_said_once() {
    for (set, said) in [("optimizer.beta1=2", "optimizer.beta1 = 2"), ("run.nothing=1", "nothing")] {
        let run = Run::new("launch-wrong", &[set]);
        let mut started = Started::train(local("--standalone --nproc-per-node 3"), &run, "out");
        assert_eq!(started.code(), 2, "{}", started.said());
        let lines: Vec<String> = started.said().lines().filter(|line| line.contains("error (rank ")).filter(|line| line.starts_with('[')).map(str::to_string).collect();
        assert!(lines.len() == 1 && lines[0].contains(said), "{lines:?}");
        started.says("no restart: ");
    }
}

/// With stand-ins for the launcher, which ends with CODE, and for scontrol, which ends the batch shell as a requeue does.
#[test]
fn a_batch_job_is_requeued_for_eight_lost_hosts_in_a_row_and_its_grace_can_be_raised() {
    let folder = tempfile::tempdir().expect("a folder");
    let stand_in = |name: &str, script: &str| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
        assert!(Command::new("chmod").arg("+x").arg(&path).status().expect("chmod").success());
    };
    stand_in("scripts/launch.sh", "echo \"$*\" >launched; exit $CODE");
    stand_in("bin/scontrol", "[ $1 = requeue ] || exit 0; touch requeued; kill -KILL $PPID");
    let path = format!("{}:{}", folder.path().join("bin").display(), std::env::var("PATH").expect("a path"));
    let batch = |job: &str, code: &str| {
        let mut command = Command::new("bash");
        command.arg(root().join("scripts/train.sbatch")).args(["resume", "runs/a"]).env_remove("TIEFSEE").env_remove("GRACE").env_remove("LAUNCH_OPTIONS");
        command.env("SLURM_SUBMIT_DIR", folder.path()).envs([("PATH", path.as_str()), ("SLURM_JOB_ID", job), ("CODE", code)]);
        command.envs([("SLURM_RESTART_COUNT", "100"), ("SLURM_JOB_NODELIST", "n1"), ("SLURM_JOB_NAME", "tiefsee")]);
        command
    };
    let requeued = |job: &str, code: &str| {
        let output = batch(job, code).output().expect("a shell");
        let requeued = fs::remove_file(folder.path().join("requeued")).is_ok();
        assert!(requeued || output.status.code() == code.parse().ok(), "{output:?}");
        requeued
    };
    let lost = |job: &str, times: usize| assert!((0..times).all(|_| requeued(job, "14")), "job {job}");
    lost("7", 7);
    lost("8", 8); // another task of an array
    assert!(requeued("7", "75"), "its time was up");
    lost("7", 8);
    assert!(!requeued("7", "14") && !requeued("8", "14"), "a ninth time");
    lost("7", 1);
    assert!(!requeued("7", "0"));
    let left: Vec<_> = fs::read_dir(folder.path()).expect("a list").map(|entry| entry.expect("an entry").file_name()).collect();
    assert_eq!(left.len(), 3, "bin, launched and scripts, not {left:?}");

    // Of a run that has worked, what used its restarts up may be gone in a while; of another it would come again.
    assert!(!["10", "11", "12", "13", "15", "16", "19"].iter().any(|code| requeued("7", code)));
    fs::create_dir_all(folder.path().join("runs/a/checkpoints/step-00000004")).expect("a folder");
    assert!(["10", "11", "12", "13", "15", "16", "19", "14"].iter().all(|code| requeued("7", code)));
    assert!(!requeued("7", "13"), "a ninth time");
    assert!(!["2", "20"].iter().any(|code| requeued("7", code)));
    // The launcher that is at work there may be its own, on a host that was lost; that of a first start is another's.
    assert!((0..8).all(|_| requeued("10", "17")) && !requeued("10", "17"), "a ninth time");
    assert_eq!(batch("10", "17").env("SLURM_RESTART_COUNT", "0").status().expect("a shell").code(), Some(17));
    let launched = || fs::read_to_string(folder.path().join("launched")).expect("launched");
    assert_eq!(launched(), "--auto-resume --grace 90 -- resume runs/a\n");
    assert!(batch("7", "0").env("GRACE", "900").status().expect("a shell").success());
    assert_eq!(launched(), "--auto-resume --grace 900 -- resume runs/a\n");
    // At its time limit: with a launcher that ends as soon as it is told, and that has made no checkpoint since.
    stand_in("scripts/launch.sh", "trap 'exit 75' USR1; touch ready; while :; do :; done");
    let at_limit = || {
        let mut shell = batch("9", "75").spawn().expect("a shell");
        wait("the launcher", || folder.path().join("ready").exists());
        fs::remove_file(folder.path().join("ready")).expect("it was there");
        assert!(Command::new("kill").args(["-USR1", &shell.id().to_string()]).status().expect("kill").success());
        shell.wait().expect("it ends");
        fs::remove_file(folder.path().join("requeued")).is_ok()
    };
    assert!((0..8).all(|_| at_limit()));
    assert!(!at_limit(), "a ninth time");
}

#[test]
fn a_dry_run_shows_the_command_and_each_ranks_place() {
    let output = local("--dry-run --hosts a,b --nproc-per-node 2 -- resume x").output().expect("a launcher");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.starts_with("mpirun ") && text.contains("# rank 3: b, local rank 1"), "{text}");
}
