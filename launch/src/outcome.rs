//! How an attempt ended, in a word for the program and in words for people.
use serde::Serialize;

pub const FINISHED: u8 = 0;
/// EX_TEMPFAIL, as `tiefsee` has it.
pub const STOPPED: u8 = 75;
pub const USAGE: u8 = 2;
pub const TAKEN: u8 = 17;
pub const STOPPED_LATE: u8 = 18;
/// As `Class::CannotStart`.
pub const CANNOT_START: u8 = 16;
/// As `tiefsee` has it: memory was damaged beyond what the ranks can mend.
const STATE_LOST: i32 = 76;
/// Too many steps in a row were skipped.
const GAVE_UP: i32 = 77;
/// What mpirun answers when one of its daemons, or the link to it, is gone.
const DAEMON_LOST: i32 = 205;
/// How a transfer's failure begins that a rank met: another rank may be at fault, or the link. Without the blank behind it: of a line
/// that comes in pieces, one may end there.
const TOLD: &str = "error (told by rank";
/// A guard's word of processes that it cannot end, between the host and them.
pub const STUCK: &str = " has processes that SIGKILL does not end: ";
const SIGABRT: i32 = 6;
const SIGKILL: i32 = 9;
const SIGUSR1: i32 = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    Finished,
    Stopped,
    /// Asked to checkpoint, but ended by us when the grace was over.
    StoppedLate,
    Error,
    Killed,
    OutOfMemory,
    Abort,
    LinkLost,
    Hung,
    StateLost,
    GaveUp,
    CannotStart,
    /// The command line, or the config that it names.
    Usage,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub class: Class,
    /// For people: what ended, and the first reason that a rank gave.
    pub words: String,
    /// Where it began, if that is known.
    pub host: Option<String>,
    /// No further start can have it: SLURM has it down, or processes on it do not end.
    pub down: bool,
}

impl Outcome {
    pub fn new(class: Class, words: impl Into<String>) -> Self {
        Outcome { class, words: words.into(), host: None, down: false }
    }

    pub fn at(mut self, host: Option<String>) -> Self {
        self.host = host;
        self
    }

    pub fn exit_code(&self) -> u8 {
        match self.class {
            Class::Finished => FINISHED,
            Class::Stopped => STOPPED,
            Class::Error => 10,
            Class::Killed => 11,
            Class::OutOfMemory => 12,
            Class::Abort => 13,
            Class::LinkLost => 14,
            Class::Hung => 15,
            Class::CannotStart => CANNOT_START,
            Class::Usage => USAGE,
            Class::StoppedLate => STOPPED_LATE,
            Class::StateLost => 19,
            Class::GaveUp => 20,
        }
    }

    pub fn failed(&self) -> bool {
        !matches!(self.class, Class::Finished | Class::Stopped | Class::StoppedLate)
    }

    /// Why a restart would not help, where it would not. `has_worked`: the run has made a step, in this start or an earlier
    /// one. What has worked does not fail for its config, but for a host or a file system, and those may be back.
    pub fn would_come_again(&self, has_worked: bool) -> Option<&'static str> {
        match self.class {
            Class::GaveUp => Some("it would skip the same steps again"),
            // A missing corpus, a GPU that is too small.
            Class::Error | Class::Abort if !has_worked => Some("it failed before its first step and would fail so again"),
            Class::CannotStart | Class::Usage if !has_worked => Some("it would fail to start again"),
            _ => None,
        }
    }
}

/// What the output of an attempt told beside its exit code. Each is the first of its kind.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// "error (rank 1): …", a panic. Of a transfer that failed, "error (told by rank 1): …", only where nobody says why.
    pub reason: Option<String>,
    /// The rank and host of mpirun's "process rank 1 with PID 7 on node a exited on signal 9 (Killed)".
    pub signalled: Option<(usize, String)>,
    pub aborted_rank: Option<usize>,
    /// The rank that mpirun or srun says ended first, with a code.
    pub exited_rank: Option<usize>,
    /// That code, where srun tells it: its own is of the others, which it ends then.
    pub exit_code: Option<i32>,
    pub out_of_memory: bool,
    pub daemon_lost: bool,
    /// Whose daemon.
    pub lost_host: Option<String>,
    /// By SLURM's word, or because it takes no task.
    pub down: bool,
    pub cannot_start: Option<String>,
    /// A rank has said that the run is.
    pub finished: bool,
    /// A host with processes that nobody can end, and what its guard says of them.
    pub stuck: Option<(String, String)>,
}

impl Evidence {
    pub fn read(&mut self, line: &str) {
        let holds = |needles: &[&str]| needles.iter().any(|needle| line.contains(needle));
        let kept = || Some(line.trim().to_string());
        let is_reason = ["error: ", "error (rank ", "error (all ranks)", TOLD].iter().any(|start| line.starts_with(start)) || line.contains(" panicked");
        if is_reason && (self.reason.is_none() || !line.starts_with(TOLD) && self.is_told()) {
            self.reason = kept();
        }
        let behind = |mark: &str| line.split_once(mark).map(|(_, rest)| rest);
        // Of Open MPI 5 the signal stands in the next line.
        if self.signalled.is_none() && line.contains(" noticed that process rank ") && line.contains(" exited on") {
            let rank = behind("process rank ").and_then(number);
            self.signalled = rank.zip(behind(" on node ").and_then(word));
        }
        if self.exited_rank.is_none() {
            // `[[7,1],3]`, and of Open MPI 5 `[prterun-host-7@1,3]`.
            self.exited_rank = behind("Process name: [").and_then(|rest| number(rest.rsplit_once(',')?.1));
        }
        let of_srun = line.strip_prefix("srun: error: ").and_then(|rest| rest.split_once(": task")).and_then(|(host, rest)| Some((host, rest.split_once(": ")?)));
        // The first: srun then ends the others, of which it says "Terminated" or "Killed".
        if let (None, Some((host, (tasks, words)))) = (&self.signalled, of_srun)
            && ["Killed", "Out Of Memory", "Segmentation fault", "Bus error", "Aborted", "Illegal instruction"].iter().any(|signal| words.starts_with(signal))
        {
            self.signalled = number(tasks.trim_start_matches(['s', ' '])).map(|rank| (rank, host.to_string()));
        }
        // Of a killed task, a peer ends with a code that says nothing of it, but for those that all end with.
        let counts = |code: &i32| self.signalled.is_none() || [STOPPED.into(), STATE_LOST, GAVE_UP].contains(code);
        if let (None, Some((tasks, code))) = (self.exit_code, line.strip_prefix("srun: error: ").and_then(|rest| rest.split_once(": Exited with exit code ")))
            && let Some(code) = code.trim().parse().ok().filter(counts)
        {
            self.exit_code = Some(code);
            self.exited_rank = tasks.split_once(": task").and_then(|(_, rest)| number(rest.trim_start_matches(['s', ' '])));
        }
        if self.lost_host.is_none() {
            let down = behind("Node failure on ").and_then(word).filter(|host| !host.contains(['[', ',']));
            // Long before SLURM has a dead node down, no task can be started there.
            let (deaf, why) = line.strip_prefix("srun: error: Task launch for ").and_then(|rest| rest.split_once(" failed on node ")?.1.split_once(": ")).unzip();
            self.down = down.is_some() || why.is_some_and(|why| why.starts_with("Communication ") || why.starts_with("Socket timed out"));
            self.lost_host = down.or(deaf.map(str::to_string)).or_else(|| behind("tiefsee-launch: cannot reach host ").or_else(|| behind("Remote daemon: ")?.split_once(" on node ").map(|(_, rest)| rest)).and_then(word));
            self.daemon_lost |= self.lost_host.is_some();
        }
        if let Some(words) = line.strip_prefix("tiefsee-launch: ").filter(|words| words.contains(STUCK)) {
            self.stuck = words.strip_prefix("host ").and_then(word).map(|host| (host, words.to_string()));
        }
        self.finished |= line.starts_with("finished at step ");
        if self.aborted_rank.is_none() {
            self.aborted_rank = behind("MPI_ABORT was invoked on rank ").and_then(number);
        }
        self.out_of_memory |= holds(&["memory allocation of ", "out of memory", "Out of memory", "OutOfMemory", "Out Of Memory", "oom-kill", "OOM Killed"]);
        self.daemon_lost |= holds(&["RTE has lost communication with", "lost connection to a remote daemon", "Node failure on", "NODE FAILURE", " launch failed: "]);
        if self.cannot_start.is_none()
            && holds(&[
                "There are not enough slots",
                // Open MPI 4 of its options: one that is unknown, or without its value. 5 has a sentence.
                "mpirun: Error: ",
                "An unrecognized option was included on the ",
                "requested more processes than",
                "policy is not recognized:",
                "was unable to launch",
                "was unable to find the specified executable",
                "was unable to start the specified",
                "Unable to create step",
                "Unable to allocate resources",
                "slurmstepd: error: execve(): ",
                "tiefsee-launch: cannot start",
            ])
        {
            self.cannot_start = kept();
        }
    }

    fn is_told(&self) -> bool {
        self.reason.as_ref().is_some_and(|reason| reason.starts_with(TOLD))
    }

    /// Whose failure the reason is. At one rank's error all end, and one says of another: "error (all ranks): rank 5: …". None: nobody's;
    /// whoever ended first did not fail by itself.
    fn failed_rank(&self) -> Option<usize> {
        let told = self.reason.as_ref().and_then(|reason| reason.strip_prefix("error (")?.split_once("): "));
        match told {
            Some((teller, words)) => words.strip_prefix("rank ").and_then(number).or_else(|| teller.strip_prefix("rank ").and_then(number)),
            None if self.is_told() => None,
            None => self.aborted_rank.or(self.exited_rank),
        }
    }
}

fn number(text: &str) -> Option<usize> {
    text.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
}

fn word(text: &str) -> Option<String> {
    Some(text.split_whitespace().next()?.trim_end_matches(':').to_string())
}

/// Of a run that is not over. `code`: mpirun's or srun's, where no better one is known. `asked`: we had forwarded a request to stop. `oom_kills`: the control group's count rose.
/// `host_of`: where a rank ran.
pub fn classify(code: i32, evidence: &Evidence, (asked, oom_kills): (bool, bool), host_of: impl Fn(usize) -> Option<String>) -> Outcome {
    let code = evidence.exit_code.filter(|_| code != 0).unwrap_or(code);
    let because = evidence.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    let killed = (129..=192).contains(&code).then(|| code - 128);
    let (rank, host) = match &evidence.signalled {
        Some((rank, host)) if killed.is_some() => (Some(*rank), Some(host.clone())),
        _ => {
            let rank = evidence.failed_rank();
            (rank, rank.and_then(&host_of))
        }
    };
    let at = host.as_ref().map(|host| format!(" on host {host}")).unwrap_or_default();
    let who = rank.map_or_else(|| "a rank".to_string(), |rank| format!("rank {rank}{at}"));
    let lost = || {
        let name = evidence.lost_host.as_ref().map_or_else(|| "a host".to_string(), |host| format!("host {host}"));
        let outcome = Outcome::new(Class::LinkLost, format!("{name}, or the link to it, was lost{because}")).at(evidence.lost_host.clone());
        Outcome { down: evidence.down, ..outcome }
    };
    match (code, killed) {
        (STATE_LOST, _) => {
            let words = evidence.reason.clone().unwrap_or_else(|| "memory was damaged".to_string());
            let damaged = words.split_once("state lost: rank ").and_then(|(_, rest)| number(rest)).and_then(&host_of);
            Outcome::new(Class::StateLost, words).at(damaged)
        }
        (GAVE_UP, _) => Outcome::new(Class::GaveUp, evidence.reason.clone().unwrap_or_else(|| "too many steps were skipped".to_string())),
        (75, _) => Outcome::new(Class::Stopped, "stopped on request, with a checkpoint"),
        (_, Some(SIGUSR1)) if asked => Outcome::new(Class::Stopped, "stopped on request, before the ranks had begun"),
        // Whatever else ended: until it is seen to, nothing can be started there.
        _ if let Some((host, words)) = &evidence.stuck => {
            Outcome { class: Class::LinkLost, words: words.clone(), host: Some(host.clone()), down: true }
        }
        (DAEMON_LOST, _) => lost(),
        // Open MPI 5 says so as well of one that it cannot start.
        _ if evidence.daemon_lost && evidence.cannot_start.is_none() => lost(),
        (_, Some(SIGKILL)) if oom_kills => Outcome::new(Class::OutOfMemory, format!("the kernel killed {who} for its memory{because}")).at(host),
        (_, Some(signal)) if signal != SIGABRT || !evidence.out_of_memory => {
            let hint = if signal == SIGKILL { "; where nobody did that, the host was short of memory" } else { "" };
            Outcome::new(Class::Killed, format!("{who} was killed by signal {signal} ({}){hint}{because}", signal_name(signal))).at(host)
        }
        _ if evidence.out_of_memory => Outcome::new(Class::OutOfMemory, format!("{who} ran out of memory{because}")).at(host),
        _ if evidence.cannot_start.is_some() => Outcome::new(Class::CannotStart, evidence.cannot_start.clone().unwrap_or_default()).at(host),
        (126 | 127, _) => Outcome::new(Class::CannotStart, "the ranks could not be started"),
        (2, _) => Outcome::new(Class::Usage, format!("{who} does not take this command or its config{because}")).at(host),
        _ if evidence.aborted_rank.is_some() => Outcome::new(Class::Abort, format!("{who} aborted with code {code}{because}")).at(host),
        (0, _) => Outcome::new(Class::LinkLost, format!("the ranks ended with code 0, but the run's summary.json does not say that it is over{because}")),
        // Open MPI's own words of it may be missing.
        (1, _) if because.starts_with(": error (") => Outcome::new(Class::Abort, format!("{who} ended with code {code}{because}")).at(host),
        _ => Outcome::new(Class::Error, format!("{who} ended with code {code}{because}")).at(host),
    }
}

fn signal_name(signal: i32) -> &'static str {
    nix::sys::signal::Signal::try_from(signal).map_or("unknown", |signal| signal.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(code: i32, lines: &[&str], asked: bool, oom_kills: bool) -> Class {
        let mut evidence = Evidence::default();
        lines.iter().for_each(|line| evidence.read(line));
        classify(code, &evidence, (asked, oom_kills), |_| None).class
    }

    #[test]
    fn every_code_has_its_word() {
        for (code, lines, expected) in [
            (0, &[][..], Class::LinkLost),
            (0, &["tiefsee-launch: cannot start /agent: not there", "PRTE has lost communication with a remote daemon."], Class::CannotStart),
            (75, &[], Class::Stopped),
            (5, &[], Class::Error),
            (1, &["error (rank 0): phase.0: batch 4 is not a multiple of 3"], Class::Abort),
            (76, &["MPI_ABORT was invoked on rank 0 in communicator MPI_COMM_WORLD"], Class::StateLost),
            (77, &["MPI_ABORT was invoked on rank 0 in communicator MPI_COMM_WORLD"], Class::GaveUp),
            (137, &[], Class::Killed),
            (139, &["mpirun noticed that process rank 1 with PID 0 on node a exited on signal 11 (Segmentation fault)."], Class::Killed),
            (134, &["memory allocation of 99999999 bytes failed"], Class::OutOfMemory),
            (134, &["rank 3 panicked"], Class::Killed),
            (1, &["error (rank 0): CUDA out of memory"], Class::OutOfMemory),
            (6, &["MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD"], Class::Abort),
            (205, &[], Class::LinkLost),
            (1, &["ORTE has lost communication with a remote daemon."], Class::LinkLost),
            (1, &["There are not enough slots available in the system to satisfy the 4"], Class::CannotStart),
            (1, &["mpirun: Error: unknown option \"--nonsense\"", "Type 'mpirun --help' for usage."], Class::CannotStart),
            (1, &["/opt/ompi/bin/mpirun: Error: option \"--map-by\" did not have enough parameters (1)"], Class::CannotStart),
            (1, &["An unrecognized option was included on the mpirun command line:", "", "  Option: --nonsense"], Class::CannotStart),
            (1, &["Your job has requested more processes than the ppr for", "this topology can support:"], Class::CannotStart),
            (1, &["The specified mapping policy is not recognized:", "  Policy: nonsense"], Class::CannotStart),
            (127, &[], Class::CannotStart),
            (2, &["slurmstepd: error: execve(): /nix/tiefsee: No such file or directory", "srun: error: n2: task 1: Exited with exit code 2"], Class::CannotStart),
            (2, &["MPI_ABORT was invoked on rank 0 in communicator MPI_COMM_WORLD"], Class::Usage),
            (138, &[], Class::Killed),
            (143, &["srun: error: n1: task 0: Exited with exit code 75", "srun: error: n2: task 1: Exited with exit code 1"], Class::Stopped),
            (143, &["srun: error: n1: tasks 0-3: Exited with exit code 5"], Class::Error),
            (143, &["srun: error: n2: task 1: Terminated"], Class::Killed),
            (137, &["srun: error: n2: task 9: Killed", "srun: error: n1: task 3: Exited with exit code 1"], Class::Killed),
            (137, &["srun: error: n2: task 9: Killed", "srun: error: n1: task 0: Exited with exit code 75"], Class::Stopped),
            (137, &["srun: error: n2: task 9: Killed", "srun: error: n1: task 0: Exited with exit code 76"], Class::StateLost),
            (137, &["srun: error: n1: task 3: Exited with exit code 5", "srun: error: n2: task 9: Killed"], Class::Error),
        ] {
            assert_eq!(class(code, lines, false, false), expected, "{code} {lines:?}");
        }
        assert_eq!(class(138, &[], true, false), Class::Stopped);
        assert_eq!(class(137, &[], false, true), Class::OutOfMemory);
    }

    #[test]
    fn hosts_are_named() {
        for (code, line, words, host) in [
            (
                137,
                "mpirun noticed that process rank 3 with PID 71 on node b exited on signal 9 (Killed).",
                "rank 3 on host b was killed by signal 9 (SIGKILL); where nobody did that, the host was short of memory",
                "b",
            ),
            (
                139,
                "prterun noticed that process rank 3 with PID 71 on node b exited on",
                "rank 3 on host b was killed by signal 11 (SIGSEGV)",
                "b",
            ),
            (0, "  Remote daemon: [prterun-h1-31533@0,1] on node h2", "host h2, or the link to it, was lost", "h2"),
            (205, "  Remote daemon: [[45829,0],1] on node h2", "host h2, or the link to it, was lost", "h2"),
            (255, "tiefsee-launch: cannot reach host h3: ssh ended with code 255", "host h3, or the link to it, was lost", "h3"),
            (76, "error (rank 0): state lost: rank 1: the master of x changed", "error (rank 0): state lost: rank 1: the master of x changed", "c"),
            (1, "error (all ranks): rank 7: cannot open GPU 7", "rank 7 on host h7 ended with code 1: error (all ranks): rank 7: cannot open GPU 7", "h7"),
            (143, "srun: error: n[1-2]: tasks 2,4: Exited with exit code 5", "rank 2 on host c ended with code 5", "c"),
            (
                137,
                "srun: error: n1: task 5: Killed",
                "rank 5 on host n1 was killed by signal 9 (SIGKILL); where nobody did that, the host was short of memory",
                "n1",
            ),
            (5, "  Process name: [[45229,1],2]", "rank 2 on host c ended with code 5", "c"),
            (5, "  Process name: [prterun-h,1-45229@1,2]", "rank 2 on host c ended with code 5", "c"),
        ] {
            let mut evidence = Evidence::default();
            evidence.read(line);
            let outcome = classify(code, &evidence, (false, false), |rank| Some(if rank == 7 { "h7" } else { "c" }.to_string()));
            assert_eq!((outcome.words.as_str(), outcome.host.as_deref()), (words, Some(host)));
        }
    }

    #[test]
    fn what_every_rank_has_is_nobodys() {
        let found = |lines: &[&str]| {
            let mut evidence = Evidence::default();
            lines.iter().for_each(|line| evidence.read(line));
            let outcome = classify(1, &evidence, (false, false), |rank| Some(format!("h{rank}")));
            (outcome.words, outcome.host)
        };
        let (all, aborted) = ("error (all ranks): there is no checkpoint of step 30", "MPI_ABORT was invoked on rank 3 in communicator");
        assert_eq!(found(&[all, aborted]), (format!("a rank aborted with code 1: {all}"), None));
        let told = "error (told by rank 2): all_reduce of 4 ranks failed at number 1 of them: NCCL error 6";
        assert_eq!(found(&[told, aborted]), (format!("a rank aborted with code 1: {told}"), None));
        // Of a line in pieces, the first.
        let piece = "error (told by rank ";
        assert_eq!(found(&[piece, "2", aborted]).1, None);
        // Who says why counts, though it came later.
        let own = "error (rank 1): no room";
        for told in [told, piece] {
            assert_eq!(found(&[told, own, told, aborted]), (format!("rank 1 on host h1 aborted with code 1: {own}"), Some("h1".to_string())));
        }
    }

    #[test]
    fn a_node_that_slurm_has_down_is_named() {
        let launch = "srun: error: Task launch for StepId=1.2 failed on node n2: ";
        for (line, host, down) in [
            ("srun: error: Node failure on n2", Some("n2"), true),
            ("srun: error: Node failure on n[2-3]", None, false),
            (&format!("{launch}Socket timed out on send/recv operation"), Some("n2"), true),
            (&format!("{launch}Communication connection failure"), Some("n2"), true),
            (&format!("{launch}Invalid job credential"), Some("n2"), false),
        ] {
            let mut evidence = Evidence::default();
            evidence.read(line);
            let outcome = classify(143, &evidence, (false, false), |_| None);
            assert_eq!((outcome.class, outcome.host.as_deref(), outcome.down), (Class::LinkLost, host, down), "{line}");
        }
    }

    #[test]
    fn a_host_whose_processes_do_not_end_is_to_blame() {
        let said = format!("host n2{STUCK}4711 (tiefsee, state D)");
        let mut evidence = Evidence::default();
        ["[1,3]<stderr>:error (rank 3): no room", &format!("tiefsee-launch: {said}")].iter().for_each(|line| evidence.read(line));
        let outcome = |code| classify(code, &evidence, (false, false), |_| Some("n1".to_string()));
        let expected = Outcome { class: Class::LinkLost, words: said.clone(), host: Some("n2".to_string()), down: true };
        assert_eq!([137, 1, 205].map(outcome), [137, 1, 205].map(|_| expected.clone()));
        assert_eq!(outcome(75).class, Class::Stopped, "what was asked for is done");
        assert!(!evidence.finished);
        evidence.read("finished at step 9");
        assert!(evidence.finished);
    }

    #[test]
    fn words_carry_the_ranks_reason() {
        let mut evidence = Evidence::default();
        for line in ["error (told by rank 3): all_reduce failed", "error (all ranks): rank 1: no such corpus", "error (rank 2): later", "MPI_ABORT was invoked on rank 3 in communicator"] {
            evidence.read(line);
        }
        let outcome = classify(1, &evidence, (false, false), |rank| Some(format!("h{rank}")));
        assert_eq!(outcome.words, "rank 1 on host h1 aborted with code 1: error (all ranks): rank 1: no such corpus");
        assert!(outcome.would_come_again(false).is_some() && outcome.would_come_again(true).is_none());
    }
}
