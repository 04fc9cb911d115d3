//! The process between the launcher and mpirun that lets no rank outlive them.
//!
//! It stands in its own session (a terminal's Ctrl-C and a killed process group do not reach it) and takes orders over
//! its standard input; the end of that pipe means that the launcher is dead. Descendants that lose their parent come to
//! it (subreaper), so it can end every one, whatever process group mpirun gave it.
use crate::environment::{NAME, OWN, SECRET, host_name};
use crate::incidents::say;
use crate::outcome::STUCK;
use crate::processes::{descendants, name, state};
use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getppid, setsid};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// First arguments that make this executable a guard, or tie mpirun to its guard's life.
pub const GUARD: &str = "@guard";
pub const TIED: &str = "@tied";
/// The guard could not start its command.
pub const CANNOT_START: u8 = 127;
/// The command's code where KILL has not ended it: as if it had.
const KILLED: u8 = 128 + Signal::SIGKILL as u8;
/// A guard of a killed launcher needs as long to end its ranks; the next launcher waits for it.
const FAREWELL: Duration = Duration::from_secs(5);
/// What outlives KILL for so long stands in the kernel, which alone can end it.
const GIVE_UP: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_millis(50);

/// What the launcher can ask of its guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// mpirun and srun forward it to the ranks, which checkpoint.
    User1 = b'u' as isize,
    Term = b't' as isize,
    /// Every descendant.
    Kill = b'k' as isize,
}

/// The launcher's side.
pub struct Guarded {
    child: Child,
    orders: ChildStdin,
}

impl Guarded {
    /// `lock` is held as long as any rank may live.
    pub fn spawn(lock: Option<&Path>, command: &[String], set: &[(String, String)]) -> std::io::Result<(Self, std::process::ChildStdout, std::process::ChildStderr)> {
        let mut child = Command::new(OWN)
            .arg0(NAME)
            .arg(GUARD)
            .arg(lock.unwrap_or(Path::new("")))
            .args(command)
            // A secret is for launchers, not for what they start.
            .env_remove(SECRET)
            .envs(set.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (orders, stdout, stderr) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        Ok((Guarded { child, orders }, stdout, stderr))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A guard that has just ended needs no orders.
    pub fn order(&mut self, order: Order) {
        let _ = self.orders.write_all(&[order as u8]);
    }

    /// The command's exit code, 128 + n for a signal.
    pub fn try_wait(&mut self) -> std::io::Result<Option<i32>> {
        Ok(self.child.try_wait()?.map(code))
    }
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// The guard's whole life. `args`: the lock's path or nothing, then the command.
pub fn guard(args: &[String]) -> u8 {
    let (lock, command) = (&args[0], &args[1..]);
    // Already leading a session is as good.
    let _ = setsid();
    if let Err(error) = set_child_subreaper(true) {
        eprintln!("tiefsee-launch: cannot become a subreaper: {error}");
        return CANNOT_START;
    }
    let _held = match hold(Path::new(lock)) {
        Ok(held) => held,
        Err(error) => {
            eprintln!("tiefsee-launch: {lock}: {error}");
            return CANNOT_START;
        }
    };
    let started = Command::new(OWN).arg0(NAME).arg(TIED).args(command).stdin(Stdio::null()).spawn();
    let mut child = match started {
        Ok(child) => child,
        Err(error) => {
            eprintln!("tiefsee-launch: cannot start {}: {error}", command[0]);
            return CANNOT_START;
        }
    };
    let command = child.id();
    let ended = watch(&mut child, &orders());
    let (code, left) = end_descendants(command, Signal::SIGKILL, GIVE_UP);
    if !left.is_empty() {
        let (host, left, seconds) = (host_name(), left.join(", "), GIVE_UP.as_secs());
        say(&format!("host {host}{STUCK}{left}; whatever they wait for there has not answered for {seconds} s"));
    }
    ended.or(code).unwrap_or(KILLED)
}

/// Shared between a run's guards one after the other: waits until the ranks of the one before are gone. Where the file system
/// has no locks, the launcher has said so.
fn hold(path: &Path) -> std::io::Result<Option<File>> {
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let file = File::options().create(true).append(true).open(path)?;
    Ok(file.lock().is_ok().then_some(file))
}

fn orders() -> Receiver<u8> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut byte = [0];
        let mut orders = std::io::stdin().lock();
        while orders.read_exact(&mut byte).is_ok() && sender.send(byte[0]).is_ok() {}
    });
    receiver
}

/// The code of a command that ends; None: everything is to be killed.
fn watch(child: &mut Child, orders: &Receiver<u8>) -> Option<u8> {
    let pid = Pid::from_raw(child.id() as i32);
    let mut ends_at = None;
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(code(status).clamp(0, 255) as u8);
        }
        match orders.recv_timeout(TICK) {
            Ok(b'u') => send(pid, Signal::SIGUSR1),
            Ok(b't') => send(pid, Signal::SIGTERM),
            Ok(_) => return None,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                std::thread::sleep(TICK);
                if ends_at.is_none() {
                    send(pid, Signal::SIGTERM);
                }
                if Instant::now() >= *ends_at.get_or_insert_with(|| Instant::now() + FAREWELL) {
                    return None;
                }
            }
        }
    }
}

/// One that is already gone is what we want.
fn send(pid: Pid, signal: Signal) {
    let _ = kill(pid, signal);
}

/// Until none is left, or `limit` is over: the code of `command`, if it ends only here, and in words who is left. What a killed
/// process leaves behind comes to us and gets `signal` in the next round.
pub fn end_descendants(command: u32, signal: Signal, limit: Duration) -> (Option<u8>, Vec<String>) {
    let (start, command, mut code) = (Instant::now(), Pid::from_raw(command as i32), None);
    loop {
        let alive = descendants(std::process::id());
        alive.iter().for_each(|pid| send(Pid::from_raw(*pid as i32), signal));
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => break,
                Ok(WaitStatus::Exited(pid, exited)) if pid == command => code = Some(exited as u8),
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == command => code = Some(128 + signal as u8),
                Ok(_) => {}
                Err(_) => return (code, Vec::new()),
            }
        }
        if start.elapsed() >= limit {
            return (code, alive.into_iter().filter_map(shown).collect());
        }
        std::thread::sleep(TICK);
    }
}

/// For people. None: it is gone, or has ended and waits for a parent that does not take note.
fn shown(pid: u32) -> Option<String> {
    let state = state(pid).filter(|state| *state != 'Z')?;
    Some(format!("{pid} ({}, state {state})", name(pid)?))
}

/// Becomes `command`, which gets TERM when its parent dies. Returns only if it cannot.
pub fn tied(command: &[String]) -> u8 {
    tie(Signal::SIGTERM).map_or_else(
        |error| {
            eprintln!("tiefsee-launch: cannot tie {} to its parent: {error}", command[0]);
            CANNOT_START
        },
        |()| become_program(command),
    )
}

/// This process, also after an exec, gets `signal` when the thread that started it ends.
pub fn tie(signal: Signal) -> std::io::Result<()> {
    let parent = getppid();
    set_pdeathsig(signal)?;
    if getppid() == parent { Ok(()) } else { Err(std::io::Error::other("it has already ended")) }
}

/// Returns only if it cannot.
pub fn become_program(command: &[String]) -> u8 {
    let error = Command::new(&command[0]).args(&command[1..]).exec();
    eprintln!("tiefsee-launch: cannot start {}: {error}", command[0]);
    CANNOT_START
}
