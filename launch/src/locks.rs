//! Who works in a run directory. The system frees a lock when its holder dies; a file system that many hosts share goes on holding
//! what a dead host held until it notices, for minutes.
use crate::incidents::say;
use crate::processes::name;
use crate::run_dir::log;
use anyhow::{Context, Result, bail};
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// So long nothing is said of a wait.
const PATIENCE: Duration = Duration::from_secs(2);
/// So long is waited for a lock. Ranks whose launcher has died end in seconds.
pub const LIMIT: Duration = Duration::from_secs(180);
const TICK: Duration = Duration::from_millis(50);

/// Held by a run's guard; see `guard.rs`.
pub fn guard(run_dir: &Path) -> PathBuf {
    log(run_dir).join("guard.lock")
}

/// Held by the ranks of a world, whoever started it.
pub fn world(run_dir: &Path) -> PathBuf {
    log(run_dir).join("run.lock")
}

/// What became of a wait.
#[derive(Debug)]
pub enum Lock {
    /// As long as the file is open.
    Ours(File),
    /// By whom.
    Held(String),
    /// `stop` said so meanwhile.
    Stopped,
}

/// The lock of a run's one launcher, which says in it where it is. A launcher of this host, `own`, that lives is not waited for.
pub fn launcher(run_dir: &Path, own: &str, limit: Duration, stop: impl FnMut() -> bool) -> Result<Lock> {
    let path = log(run_dir).join("launcher.lock");
    let file = open(&path)?;
    if let Err(TryLockError::Error(error)) = file.try_lock() {
        say(&format!("cannot lock {}: {error}; see to it yourself that no other launcher works there", path.display()));
    }
    // A pod on another machine may have the name of the one before; a machine's every start has an id.
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot = boot.trim();
    let holder = || match fs::read_to_string(&path).unwrap_or_default().split_whitespace().collect::<Vec<_>>()[..] {
        [host, on, pid] => {
            let here = host == own && on == boot && pid.parse().is_ok_and(|pid| name(pid).is_some());
            (format!("another launcher (host {host}, pid {pid})"), if here { Duration::ZERO } else { limit })
        }
        _ => ("another launcher, which has not said where it is".to_string(), limit),
    };
    let lock = wait(file, &path, holder, stop);
    if let Lock::Ours(file) = &lock {
        let mut file: &File = file;
        // Where there is no room for it, others know all the same that the lock is held. Synced: other hosts read it.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{own} {boot} {}", std::process::id())).and_then(|()| file.sync_all());
    }
    Ok(lock)
}

/// Waits until the lock at `path` is free. False: `stop` said so meanwhile. Errors: it is still held after `limit`.
pub fn wait_for(path: &Path, (holder, limit): (&str, Duration), stop: impl FnMut() -> bool) -> Result<bool> {
    match wait(open(path)?, path, || (holder.to_string(), limit), stop) {
        Lock::Ours(_) => Ok(true),
        Lock::Stopped => Ok(false),
        Lock::Held(holder) => {
            bail!(
                "{} is still held after {:.0} s, by {holder} or by the file system for a host that is gone",
                path.display(),
                limit.as_secs_f64()
            )
        }
    }
}

fn open(path: &Path) -> Result<File> {
    File::options().create(true).append(true).open(path).with_context(|| format!("cannot open {}", path.display()))
}

/// `holder`: who has it as of now, and how long that one is waited for.
fn wait(file: File, path: &Path, holder: impl Fn() -> (String, Duration), mut stop: impl FnMut() -> bool) -> Lock {
    let start = Instant::now();
    let mut said = false;
    // One that no file system tells of cannot be waited for.
    while !is_free(file.try_lock()).unwrap_or(true) {
        let (holder, limit) = holder();
        if start.elapsed() >= limit {
            return Lock::Held(holder);
        }
        if stop() {
            return Lock::Stopped;
        }
        if start.elapsed() > PATIENCE && !std::mem::replace(&mut said, true) {
            say(&format!("waiting for {holder} to end: {} is held", path.display()));
        }
        std::thread::sleep(TICK);
    }
    Lock::Ours(file)
}

/// Whether nobody else has the lock. An error: this file system has no locks.
fn is_free(tried: Result<(), TryLockError>) -> io::Result<bool> {
    match tried {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(log(folder.path())).expect("a folder");
        folder
    }

    #[test]
    fn a_wait_for_a_guard_can_be_stopped_and_has_an_end() {
        let run = run();
        let path = guard(run.path());
        let held = File::create(&path).expect("a file");
        held.lock().expect("locked");
        assert!(!wait_for(&path, ("the guard", LIMIT), || true).expect("a lock"));
        let error = wait_for(&path, ("the guard", Duration::ZERO), || false).expect_err("held").to_string();
        assert!(error.contains("guard.lock is still held after 0 s, by the guard"), "{error}");
        drop(held);
        assert!(wait_for(&path, ("the guard", LIMIT), || false).expect("a lock"));
    }

    #[test]
    fn a_file_system_without_locks_is_no_other_launcher() {
        assert!(is_free(Err(TryLockError::Error(io::ErrorKind::Unsupported.into()))).is_err());
        assert_eq!((is_free(Ok(())).ok(), is_free(Err(TryLockError::WouldBlock)).ok()), (Some(true), Some(false)));
    }

    #[test]
    fn a_launcher_is_waited_for_unless_it_is_seen_to_live() {
        let run = run();
        let first = launcher(run.path(), "n1", LIMIT, || false).expect("a lock");
        let second = |own: &str, limit: Duration, stop: bool| launcher(run.path(), own, limit, || stop).expect("a lock");
        let words = format!("another launcher (host n1, pid {})", std::process::id());
        assert!(matches!(second("n1", LIMIT, true), Lock::Held(holder) if holder == words), "at once");
        assert!(matches!(second("n2", LIMIT, true), Lock::Stopped), "it may be gone");
        assert!(matches!(second("n2", Duration::ZERO, false), Lock::Held(holder) if holder == words));
        // It has ended, its host has been started again since, or it has not come to say where it is.
        let there = fs::read_to_string(log(run.path()).join("launcher.lock")).expect("read");
        let [_, boot, pid] = there.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{there}") };
        for said in [format!("n1 {boot} 4294967295"), format!("n1 other {pid}"), String::new()] {
            fs::write(log(run.path()).join("launcher.lock"), &said).expect("written");
            assert!(matches!(second("n1", LIMIT, true), Lock::Stopped), "{said:?}");
        }
        let mut first = Some(first);
        let gone = launcher(run.path(), "n2", LIMIT, || first.take().is_none()).expect("a lock");
        assert!(matches!(gone, Lock::Ours(_)));
        let said = fs::read_to_string(log(run.path()).join("launcher.lock")).expect("read");
        assert_eq!(said, format!("n2 {boot} {pid}\n"));
    }
}
