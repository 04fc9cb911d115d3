//! One run over all its starts: watch, classify, restart from the newest checkpoint, and say what happened.
use crate::args::Args;
use crate::command::{Ranked, command_line, places, quoted, variables};
use crate::ending::Ending;
use crate::environment::{Environment, Slurm, host_name, oom_kills, own_path, raise_file_limit, sibling};
use crate::guard::Guarded;
use crate::hosts::{Hosts, shared_secret, silence};
use crate::incidents::{Incidents, say};
use crate::layout::{Layout, listed, slots};
use crate::locks::{self, Lock};
use crate::lookout::{Hung, Lookout, News};
use crate::outcome::{CANNOT_START, Class, Outcome, STOPPED, STOPPED_LATE, TAKEN, USAGE, classify};
use crate::output::Output;
use crate::program::{Kind, Program};
use crate::progress::{Limits, Progress, Slow};
use crate::run_dir::{self, ANSWER, Holds, STALE};
use crate::serve::{Node, serve};
use crate::work::Worked;
use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(100);
/// Seconds that a look at the ranks' logs may take at least.
const LATE: f64 = 10.0;
const LONGEST_BACK_OFF: f64 = 60.0;
const LONGEST_WITHOUT_A_STEP: f64 = 300.0;

pub struct Supervisor {
    args: Args,
    environment: Environment,
    hosts: Hosts,
    program: Program,
    signals: Signals,
    incidents: Incidents,
    /// Of this launcher's restarts, those within the window.
    restarts: VecDeque<Instant>,
    in_vain: InVain,
    requests: usize,
    /// Signals of this launcher's own among them.
    own_requests: usize,
    /// The run has made a step: in this launcher's time, or it holds a checkpoint.
    has_worked: bool,
    /// Asked to stop while no rank was running.
    stopped_between: bool,
    /// Its nodes are SLURM's: another start would only run into the grace's end.
    preempted: bool,
    /// As far as was seen when the last attempt ended: the run directory's file system is not dead.
    answers: bool,
    _lock: Option<File>,
}

/// An attempt that has ended.
struct Ended {
    outcome: Outcome,
    made_a_step: bool,
    step: Option<u64>,
}

/// How often in a row it has failed alike.
#[derive(Default)]
struct InVain {
    at: (Option<u64>, Option<String>),
    times: usize,
}

impl InVain {
    /// One more failure, after the step that every rank has logged, with this newest checkpoint: so many alike in a row.
    fn times(&mut self, step: Option<u64>, newest: Option<String>) -> usize {
        let at = (step, newest);
        self.times = if at == self.at { self.times + 1 } else { 1 };
        self.at = at;
        self.times
    }
}

/// Seconds before the next start after `restarts`. What fails before a step, where the run has worked, may be a host or a file system
/// that needs minutes to come back.
fn back_off(first: f64, restarts: usize, stepped: bool) -> f64 {
    let (factor, most) = if stepped { (1.0, LONGEST_BACK_OFF) } else { (20.0, LONGEST_WITHOUT_A_STEP) };
    (first * factor * f64::powi(2.0, restarts as i32)).min(most)
}

impl Ended {
    fn before_a_rank(class: Class, error: &anyhow::Error) -> Ended {
        Ended { outcome: Outcome::new(class, format!("{error:#}")), made_a_step: false, step: None }
    }
}

/// The launcher's exit code.
pub fn run(mut args: Args) -> Result<u8> {
    // Before any process is started, also one that tells of the environment: a signal in between must not be lost.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1, SIGHUP])?;
    let environment = Environment::read();
    args.slots = slots(&args)?;
    if args.dry_run {
        return dry_run(&args, &environment);
    }
    raise_file_limit();
    if let (Some(number @ 1..), Some(rdzv)) = (args.node_rank, &args.rdzv) {
        let search = if args.start_limit > 0.0 { Duration::from_secs_f64(args.start_limit) } else { Duration::MAX };
        return serve(&Node { number, host: host_name(), rdzv, secret: shared_secret(&args)?, silence: silence(&args), search }, signals);
    }
    let program = Program::parse(&args.command)?;
    // A wrong command line is said before anything is made.
    if args.rdzv.is_some() {
        shared_secret(&args)?;
    } else {
        Layout::new(&args, &environment, &listed(&args, &environment)?)?;
    }
    // The command is right, and the file system, the name of node 0 or its port may be back.
    let not_now = |error: &anyhow::Error| {
        say(&format!("{error:#}"));
        Ok(CANNOT_START)
    };
    let lock = match enter(&program, &args, &environment.host, || signals.pending().count() > 0) {
        Ok(Entered::In(lock)) => lock,
        Ok(Entered::No(code)) => return Ok(code),
        Err(error) => return not_now(&error),
    };
    let incidents = Incidents::open(program.run_dir().map(run_dir::log).as_deref());
    let hosts = match Hosts::open(&args, &environment) {
        Ok(hosts) => hosts,
        Err(error) => return not_now(&error),
    };
    Supervisor { args, environment, hosts, program, signals, incidents, restarts: VecDeque::new(), in_vain: InVain::default(), requests: 0, own_requests: 0, has_worked: false, stopped_between: false, preempted: false, answers: true, _lock: lock }.run()
}

enum Entered {
    /// With the run directory's lock, where there is one.
    In(Option<File>),
    /// The exit code: there is nothing to do here, and it is said why.
    No(u8),
}

/// Takes the run directory, once the ranks of an earlier launcher are gone. `own`: this host's name.
fn enter(program: &Program, args: &Args, own: &str, mut stop: impl FnMut() -> bool) -> Result<Entered> {
    let mut lock = None;
    if let Some(run_dir) = program.run_dir() {
        let Some(holds) = run_dir::holds_now(run_dir, &mut stop)? else { return Ok(Entered::No(STOPPED)) };
        if matches!(program.kind, Kind::Train { .. }) && !args.auto_resume && holds != Holds::Nothing {
            let shown = run_dir.display();
            say(&match holds {
                Holds::HalfRun => format!("{shown} holds a run that ended before its first checkpoint: --auto-resume puts it aside and begins again; or name another run.dir"),
                _ => format!("{shown} already holds a run: resume it (resume {shown}), add --auto-resume, or name another run.dir"),
            });
            return Ok(Entered::No(USAGE));
        }
        if matches!(program.kind, Kind::Resume { .. }) && holds == Holds::Nothing {
            say(&format!("{} is not a run directory: it has no resolved.toml", run_dir.display()));
            return Ok(Entered::No(USAGE));
        }
        let log = run_dir::log(run_dir);
        std::fs::create_dir_all(&log).with_context(|| format!("cannot make {}", log.display()))?;
        match locks::launcher(run_dir, own, locks::LIMIT, &mut stop)? {
            Lock::Ours(file) => lock = Some(file),
            Lock::Held(holder) => {
                say(&format!("{}: {holder} is at work there: stop it first, or name another run.dir", run_dir.display()));
                return Ok(Entered::No(TAKEN));
            }
            Lock::Stopped => return Ok(Entered::No(STOPPED)),
        }
        if !locks::wait_for(&locks::guard(run_dir), ("the ranks of an earlier launcher", locks::LIMIT), stop)? {
            return Ok(Entered::No(STOPPED));
        }
    }
    if let Some(log_dir) = &args.log_dir {
        std::fs::create_dir_all(log_dir).with_context(|| format!("cannot make {}", log_dir.display()))?;
    }
    Ok(Entered::In(lock))
}

/// At a rendezvous the other nodes' names are not known yet.
fn dry_run(args: &Args, environment: &Environment) -> Result<u8> {
    let program = Program::parse(&args.command)?;
    let hosts = match args.nnodes.filter(|_| args.rdzv.is_some()) {
        Some(nodes) => (0..nodes.most).map(|node| format!("NODE{node}")).collect(),
        None => listed(args, environment)?,
    };
    let layout = Layout::new(args, environment, &hosts)?;
    let socket = args.rdzv.is_some().then(|| PathBuf::from("SOCKET"));
    let mut shown = vec![quoted(&line((args, environment), &layout, &program.command, socket.as_deref(), false)?)];
    shown.extend(places(environment, &layout));
    shown.extend(layout.remarks(args, environment).iter().map(|words| format!("# {words}")));
    // Whoever reads may have read enough.
    let _ = writeln!(std::io::stdout(), "{}", shown.join("\n"));
    Ok(0)
}

fn line((args, environment): (&Args, &Environment), layout: &Layout, command: &[String], socket: Option<&Path>, again: bool) -> Result<Vec<String>> {
    let (own, beside) = (own_path()?, sibling("tiefsee")?);
    let program = args.program.as_deref().unwrap_or(&beside);
    // This process outlives mpirun.
    let agent = if own.to_string_lossy().contains(char::is_whitespace) { PathBuf::from(format!("/proc/{}/exe", std::process::id())) } else { own.clone() };
    Ok(command_line(args, environment, layout, &Ranked { own: &own, agent: &agent, program, command, socket, again }))
}

impl Supervisor {
    fn run(mut self) -> Result<u8> {
        let code = self.attempts();
        // The other nodes would look for us.
        self.hosts.over(*code.as_ref().unwrap_or(&USAGE));
        code
    }

    fn attempts(&mut self) -> Result<u8> {
        loop {
            self.incidents.attempt += 1;
            // A file system or a host that fails now may be back at the next start.
            let ended = self.start().unwrap_or_else(|error| Some(Ended::before_a_rank(Class::Error, &error)));
            let Some(ended) = ended else {
                self.incidents.add("stop_requested", None, "asked to stop while no rank was running");
                return Ok(STOPPED);
            };
            self.has_worked |= ended.made_a_step;
            let event = if ended.outcome.failed() { "failed" } else { "ended" };
            self.incidents.add(event, ended.step, ended.outcome.words.clone());
            if !ended.outcome.failed() || !self.restarts_after(&ended) {
                if self.incidents.attempt > 1 || ended.outcome.failed() {
                    say(&self.incidents.summary());
                }
                return Ok(self.exit_code(&ended.outcome));
            }
        }
    }

    /// None: asked to stop before any rank was there.
    fn start(&mut self) -> Result<Option<Ended>> {
        let Some(holds) = self.holds()? else { return Ok(None) };
        self.has_worked |= holds == Holds::Checkpoint;
        let Some(command) = self.next_command(holds)? else { return Ok(None) };
        let signals = &mut self.signals;
        let hosts = match self.hosts.gather(&self.args, || signals.pending().count() > 0) {
            Ok(Some(hosts)) => hosts,
            Ok(None) => return Ok(None),
            Err(error) => return Ok(Some(Ended::before_a_rank(Class::CannotStart, &error))),
        };
        if self.new_requests() {
            return Ok(None);
        }
        match Layout::new(&self.args, &self.environment, &hosts) {
            Ok(layout) => self.attempt(&command, &layout).map(Some),
            Err(error) => Ok(Some(Ended::before_a_rank(Class::Usage, &error))),
        }
    }

    /// None: asked to stop meanwhile.
    fn holds(&mut self) -> Result<Option<Holds>> {
        let signals = &mut self.signals;
        self.program.run_dir().map_or(Ok(Some(Holds::Nothing)), |run_dir| run_dir::holds_now(run_dir, || signals.pending().count() > 0))
    }

    fn has_checkpoint(&self) -> bool {
        self.program.run_dir().is_some_and(|run_dir| run_dir::holds_now(run_dir, || false).is_ok_and(|holds| holds == Some(Holds::Checkpoint)))
    }

    /// The first start is as asked for; a later one, or any with --auto-resume, goes on with what is there. None: asked to stop
    /// while another world, which was not started by a launcher, was waited for.
    fn next_command(&mut self, mut holds: Holds) -> Result<Option<Vec<String>>> {
        let Kind::Train { run_dir, .. } = &self.program.kind else {
            return Ok(Some(self.program.command.clone()));
        };
        if holds == Holds::HalfRun {
            let signals = &mut self.signals;
            let mut stop = || signals.pending().count() > 0;
            if !locks::wait_for(&locks::world(run_dir), ("another world in this run directory", locks::LIMIT), &mut stop)? {
                return Ok(None);
            }
            let Some(now) = run_dir::holds_now(run_dir, stop)? else { return Ok(None) };
            holds = now;
        }
        match holds {
            Holds::Nothing => Ok(Some(self.program.command.clone())),
            Holds::Checkpoint => {
                if self.incidents.attempt == 1 {
                    say(&format!("{0} holds a checkpoint: its run goes on, with the config in {0}/resolved.toml and not this command's", run_dir.display()));
                }
                Ok(Some(self.program.resume_command()))
            }
            Holds::Gone => bail!("{} holds a run whose checkpoints are gone: its summary.json says that it had some; bring them back, or name another run.dir", run_dir.display()),
            Holds::HalfRun => {
                let aside = run_dir::put_aside(run_dir).with_context(|| format!("cannot put the half run in {} aside", run_dir.display()))?;
                self.incidents.add("put_aside", None, format!("the run had no checkpoint yet: it begins again, what it wrote is in {}", aside.display()));
                Ok(Some(self.program.command.clone()))
            }
        }
    }

    fn attempt(&mut self, command: &[String], layout: &Layout) -> Result<Ended> {
        let line = line((&self.args, &self.environment), layout, command, self.hosts.socket().as_deref(), self.incidents.attempt > 1)?;
        layout.remarks(&self.args, &self.environment).iter().filter(|_| self.incidents.attempt == 1).for_each(|words| say(words));
        let named = if layout.hosts.len() > 1 { format!(" ({})", layout.hosts.join(", ")) } else { String::new() };
        self.incidents.add("started", None, format!("{} rank(s) on {} host(s){named}: {}", layout.ranks(), layout.nodes, quoted(command)));
        let kills_before = oom_kills();
        let before = self.program.run_dir().and_then(run_dir::summarised);
        let guard_lock = self.program.run_dir().map(locks::guard);
        let log = self.program.run_dir().map(run_dir::log);
        let limits = Limits { steps: self.args.hang_steps, floor: self.args.hang_floor, start: self.args.start_limit, save: self.args.save_limit };
        let (steps, prints) = channel();
        let progress = log.as_ref().map(|log| Progress::follow(log, limits, prints, Instant::now())).transpose()?;
        let mut set = variables(&self.args, &self.environment, layout);
        set.extend(self.hosts.begin(self.incidents.attempt));
        let (mut guarded, stdout, stderr) = Guarded::spawn(guard_lock.as_deref(), &line, &set).context("cannot start the guard")?;
        let mut lookout = progress.map(|progress| Lookout::start(progress, guarded.pid(), layout.ranks()));
        let log_dir: Option<PathBuf> = self.args.log_dir.clone().or(log);
        let output = Output::read(self.environment.mpi_major, log_dir, steps, stdout, stderr);
        let (code, verdict) = self.watch(&mut guarded, &mut lookout, layout)?;
        let evidence = output.finish();
        if let Some(lookout) = &mut lookout {
            let news = lookout.end(|| self.new_requests());
            news.into_iter().for_each(|news| self.tell(news, lookout.step, layout));
        }
        let host_of = |rank| layout.host_of(rank).map(str::to_string).or_else(|| (layout.nodes == 1).then(host_name));
        // A code alone does not end a run: Open MPI 5's is 0 also where a daemon was lost, or ended by a scheduler.
        let seen_late = if evidence.finished && !layout.begins_at(&self.environment.host) { STALE } else { Duration::ZERO };
        let run_dir = self.program.run_dir().map(Path::to_path_buf);
        let over = code == 0 && run_dir.is_none_or(|run_dir| run_dir::is_over_within(seen_late, &run_dir, before, || self.new_requests()));
        // Ranks that still made their checkpoint, or came to the end, while we lost patience did what was asked. Processes that do not
        // end are worse than what they were to be ended for.
        let verdict = verdict.filter(|_| code != i32::from(STOPPED) && !over && evidence.stuck.is_none());
        let mut outcome = match verdict {
            Some(verdict) => verdict,
            None if over => Outcome::new(Class::Finished, "finished"),
            None => classify(code, &evidence, (self.requests > 0, oom_kills() > kills_before), host_of),
        };
        outcome.host = outcome.host.map(|host| layout.known(&host));
        Ok(Ended { outcome, made_a_step: lookout.as_ref().is_some_and(|lookout| lookout.made_a_step), step: lookout.and_then(|lookout| lookout.step) })
    }

    /// Until the guard ends: its code, and what we ended it for.
    fn watch(&mut self, guarded: &mut Guarded, lookout: &mut Option<Lookout>, layout: &Layout) -> Result<(i32, Option<Outcome>)> {
        let mut ending = Ending::default();
        if self.requests > 0 {
            ending.ask(guarded, self.args.grace);
        }
        loop {
            if let Some(code) = guarded.try_wait()? {
                return Ok((code, ending.verdict));
            }
            let now = Instant::now();
            if self.new_requests() {
                let step = lookout.as_ref().and_then(|lookout| lookout.step);
                if self.requests == 1 {
                    // The order first: the incident may be written slowly.
                    ending.ask(guarded, self.args.grace);
                    self.incidents.add("stop_requested", step, "asked to stop: the ranks checkpoint");
                } else if !ending.begun() {
                    ending.end(guarded, self.args.kill_after, Outcome::new(Class::StoppedLate, "ended on request, without a checkpoint of the last steps"));
                    self.incidents.add("stop_requested", step, "asked again: the ranks are ended");
                }
            }
            if !ending.begun()
                && let Some((host, words)) = self.hosts.lost(layout, now)
            {
                say(&words);
                // mpirun does not listen to a TERM now.
                ending.end(guarded, self.args.kill_after.min(1.0), Outcome::new(Class::LinkLost, words).at(Some(host)));
            }
            if let Some(lookout) = lookout {
                let (news, hung) = lookout.take();
                // Said alone: where what happens is written may be that file system.
                lookout.late(Duration::from_secs_f64(self.args.hang_floor.max(LATE))).iter().for_each(|words| say(words));
                news.into_iter().for_each(|news| self.tell(news, lookout.step, layout));
                if let Some(Hung { words, last_rank }) = hung.filter(|_| !ending.begun() && !ending.asked()) {
                    let host = last_rank.and_then(|rank| layout.host_of(rank)).map(str::to_string);
                    ending.end(guarded, self.args.kill_after, Outcome::new(Class::Hung, words.clone()).at(host));
                    self.incidents.add("hung", lookout.step, words);
                }
            }
            ending.tick(guarded, self.args.kill_after, now);
            std::thread::sleep(TICK);
        }
    }

    fn tell(&mut self, news: News, step: Option<u64>, layout: &Layout) {
        match news {
            News::Event(event) => self.incidents.note(&event.kind, None, event.words),
            News::Blind(words) => self.incidents.add("blind", step, words),
            News::Work(words) => self.incidents.add("work", step, words),
            News::Slow(Slow { worked: Worked { rank, stage, busy_ms }, usual_ms }) => {
                let at = layout.host_of(rank).map(|host| format!(" on host {host}")).unwrap_or_default();
                let words = format!("rank {rank}{at}, stage {stage}, is slow: it works {busy_ms:.0} ms a step, the median rank {usual_ms:.0} ms; the others wait for it");
                self.incidents.add("slow", step, words);
            }
        }
    }

    /// One more: a signal of our own, or the first that another node tells of. Whoever stops a job tells all its nodes, which is
    /// no second request.
    fn new_requests(&mut self) -> bool {
        let (before, told) = (self.requests, self.hosts.stops() > 0);
        self.own_requests += usize::from(self.signals.pending().count() > 0);
        self.requests = before.max(self.own_requests).max(usize::from(told));
        self.requests > before
    }

    /// After the back-off: true, go on.
    fn restarts_after(&mut self, ended: &Ended) -> bool {
        let now = Instant::now();
        if let Some(words) = ended.outcome.host.as_ref().and_then(|host| self.hosts.blame((host, ended.outcome.down), &self.args, now)) {
            self.incidents.add("host_failed", ended.step, words);
        }
        while self.restarts.front().is_some_and(|&then| (now - then).as_secs_f64() > self.args.restart_window) {
            self.restarts.pop_front();
        }
        let answers = self.file_system_answers(now);
        self.answers = answers;
        let times = self.in_vain.times(ended.step, self.program.run_dir().filter(|_| answers).and_then(run_dir::newest));
        let refusal = if self.requests > 0 {
            Some("no restart: asked to stop".to_string())
        } else if !answers {
            Some(format!("no restart: the file system of the run directory has not answered for {:.0} s", now.elapsed().as_secs_f64()))
        } else if self.program.run_dir().is_none() {
            Some("no restart: this command has no run directory to go on from".to_string())
        } else if let Some(why) = ended.outcome.would_come_again(self.has_worked) {
            Some(format!("no restart: {why}"))
        } else if self.restarts.len() >= self.args.max_restarts {
            Some(format!("no restart: {} within {:.0} s are used up", self.args.max_restarts, self.args.restart_window))
        } else if times > self.args.max_restarts {
            Some(format!("no restart: it failed {times} times in a row at the same step, and there is no newer checkpoint"))
        } else if self.environment.slurm.as_ref().is_some_and(Slurm::preempted) {
            self.preempted = true;
            Some("no restart: SLURM pre-empts this job".to_string())
        } else {
            None
        };
        if let Some(refusal) = refusal {
            self.incidents.add("given_up", None, refusal);
            return false;
        }
        let wait = back_off(self.args.back_off, self.restarts.len(), ended.made_a_step || !self.has_worked);
        self.restarts.push_back(now);
        self.incidents.add("restarting", None, format!("restart {} of {} in {wait:.1} s", self.restarts.len(), self.args.max_restarts));
        while now.elapsed().as_secs_f64() < wait {
            if self.new_requests() {
                self.stopped_between = true;
                self.incidents.add("stop_requested", None, "asked to stop while no rank was running");
                return false;
            }
            std::thread::sleep(TICK);
        }
        true
    }

    /// That what happened is written, or asked to stop meanwhile: whoever looks at a file system that does not answer hears no signals.
    fn file_system_answers(&mut self, since: Instant) -> bool {
        while !self.incidents.written() && since.elapsed() < ANSWER && !self.new_requests() {
            std::thread::sleep(TICK);
        }
        self.incidents.written()
    }

    fn exit_code(&self, outcome: &Outcome) -> u8 {
        match outcome.class {
            // What is there can be resumed.
            _ if self.stopped_between => STOPPED,
            _ if self.preempted => STOPPED_LATE,
            // srun calls it so where it is told to end before its step is there.
            Class::CannotStart if self.requests > 0 => STOPPED,
            // A rank that died while the others checkpointed: an older checkpoint may be there.
            Class::Killed | Class::OutOfMemory | Class::LinkLost | Class::Hung if self.requests > 0 => STOPPED_LATE,
            // The last checkpoint could not be written, or what it was to hold was damaged.
            Class::Error | Class::Abort | Class::StateLost if self.requests > 0 && self.answers && self.has_checkpoint() => STOPPED_LATE,
            _ => outcome.exit_code(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_that_comes_to_no_step_is_waited_for_longer() {
        assert_eq!([0, 1, 2, 9].map(|restarts| back_off(1.0, restarts, true)), [1.0, 2.0, 4.0, 60.0]);
        assert_eq!([0, 1, 2, 9].map(|restarts| back_off(1.0, restarts, false)), [20.0, 40.0, 80.0, 300.0]);
        assert_eq!(back_off(0.0, 9, false), 0.0);
    }
}
