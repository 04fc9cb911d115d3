//! One world at a time in a run directory: two would remove each other's checkpoints.
use anyhow::{Context, Result, ensure};
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

/// A process of this host that was killed gives its lock back as soon as its memory is free …
const HERE: Duration = Duration::from_secs(5);
/// … one of a host that is gone when its file server's lease (90 s on NFS) is over.
const ELSEWHERE: Duration = Duration::from_secs(120);

/// The system frees the lock when this process ends, however that is. None, and said: this file system has no locks.
pub(super) fn hold(dir: &Path) -> Result<Option<File>> {
    hold_within(dir, HERE, ELSEWHERE)
}

fn hold_within(dir: &Path, here: Duration, elsewhere: Duration) -> Result<Option<File>> {
    let log = dir.join("log");
    fs::create_dir_all(&log).with_context(|| format!("cannot make {}", log.display()))?;
    let path = log.join("run.lock");
    let mut file = File::options().create(true).append(true).open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let ours = format!("host {}, pid ", host.trim());
    let (start, mut said) = (Instant::now(), false);
    while let Err(error) = file.try_lock() {
        if let TryLockError::Error(error) = error {
            tracing::warn!("cannot lock {}: {error}; see to it yourself that no other world works in {}", path.display(), dir.display());
            return Ok(None);
        }
        let holder = fs::read_to_string(&path).unwrap_or_default();
        let local = holder.starts_with(&ours);
        let patience = if local { here } else { elsewhere };
        ensure!(start.elapsed() < patience, "{}: another world is at work there ({}): stop it first, or name another run.dir", dir.display(), holder.trim());
        if !local && !std::mem::replace(&mut said, true) {
            tracing::warn!("{}: another world is at work there ({}), or its host is gone: waiting for up to {} s", dir.display(), holder.trim(), patience.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    // For people; a full disk is no reason against a run.
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{ours}{}", std::process::id()));
    Ok(Some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_held_by_one_and_free_when_that_is_gone() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("run");
        let first = hold(&dir).expect("free");
        let refused = hold_within(&dir, Duration::ZERO, Duration::from_secs(60)).expect_err("held").to_string();
        assert!(refused.contains(&dir.display().to_string()) && refused.contains(&format!("pid {}", std::process::id())), "{refused}");
        fs::write(dir.join("log/run.lock"), "host another, pid 1\n").expect("written");
        let refused = hold_within(&dir, Duration::from_secs(60), Duration::ZERO).expect_err("held elsewhere").to_string();
        assert!(refused.contains("host another, pid 1"), "{refused}");
        drop(first);
        assert!(hold_within(&dir, Duration::ZERO, Duration::ZERO).expect("free").is_some());
    }
}
