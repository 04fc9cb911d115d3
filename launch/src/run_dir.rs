//! What a run directory holds, and how a run that never reached a checkpoint is put aside.
use anyhow::{Context, Result, bail};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime};

/// So long the run directory's file system may take to answer.
pub const ANSWER: Duration = Duration::from_secs(60);
/// Longer than an NFS client believes by default what it knows of a folder.
pub const STALE: Duration = Duration::from_secs(65);
const TICK: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    Nothing,
    /// Begun, but ended before its first checkpoint.
    HalfRun,
    /// With a checkpoint that names all its files, or copies in a second tier. Whether they are whole is for
    /// `tiefsee resume` to find.
    Checkpoint,
    /// It had checkpoints, as its summary says, and has none.
    Gone,
}

/// An error is none of the three: what cannot be looked at now may hold a checkpoint.
pub fn holds(run_dir: &Path) -> Result<Holds> {
    let told = |name: &str| {
        let path = run_dir.join(name);
        path.try_exists().with_context(|| format!("cannot look for {}", path.display()))
    };
    if !told("resolved.toml")? {
        return Ok(Holds::Nothing);
    }
    if told("second-tier")? || has_checkpoint(&run_dir.join("checkpoints"))? {
        return Ok(Holds::Checkpoint);
    }
    Ok(if told("summary.json")? { Holds::Gone } else { Holds::HalfRun })
}

/// As [`holds`], in a thread of its own: no signal waits for a file system that does not answer, and after [`ANSWER`] that is an error.
/// None: `stop` said so meanwhile.
pub fn holds_now(run_dir: &Path, stop: impl FnMut() -> bool) -> Result<Option<Holds>> {
    let path = run_dir.to_path_buf();
    answered(ANSWER, move || holds(&path), stop).with_context(|| run_dir.display().to_string())?.transpose()
}

fn answered<T: Send + 'static>(limit: Duration, look: impl FnOnce() -> T + Send + 'static, mut stop: impl FnMut() -> bool) -> Result<Option<T>> {
    let ((tell, told), start) = (channel(), Instant::now());
    // Where it never ends, nobody listens any more when it does.
    std::thread::spawn(move || drop(tell.send(look())));
    loop {
        match told.recv_timeout(TICK) {
            Ok(answer) => return Ok(Some(answer)),
            Err(RecvTimeoutError::Disconnected) => bail!("the look at it has failed"),
            Err(RecvTimeoutError::Timeout) if stop() => return Ok(None),
            Err(RecvTimeoutError::Timeout) if start.elapsed() >= limit => bail!("its file system has not answered for {:.0} s", limit.as_secs_f64()),
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

fn has_checkpoint(folder: &Path) -> Result<bool> {
    let cannot = || format!("cannot list {}", folder.display());
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        entries => entries.with_context(cannot)?,
    };
    for entry in entries {
        let entry = entry.with_context(cannot)?;
        let manifest = entry.path().join("manifest.json");
        if entry.file_name().to_string_lossy().starts_with("step-") && manifest.try_exists().with_context(|| format!("cannot look for {}", manifest.display()))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// When the run's summary was written, if it has one.
pub fn summarised(run_dir: &Path) -> Option<SystemTime> {
    fs::metadata(run_dir.join("summary.json")).and_then(|file| file.modified()).ok()
}

/// The run is over, by a summary that was written since (a run that was over may have gone on); also where that cannot be read
/// now, so that nobody begins again what may be done.
pub fn is_over(run_dir: &Path, since: Option<SystemTime>) -> bool {
    match fs::read(run_dir.join("summary.json")) {
        Ok(bytes) => summarised(run_dir) != since && serde_json::from_slice::<serde_json::Value>(&bytes).is_ok_and(|summary| summary["finished"] == true),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// As [`is_over`], where another host writes the summary: over NFS we may go on for `limit` to see none, as we saw none before.
pub fn is_over_within(limit: Duration, run_dir: &Path, since: Option<SystemTime>, mut stop: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if is_over(run_dir, since) {
            return true;
        }
        if start.elapsed() >= limit || stop() {
            return false;
        }
        // Who lists a folder asks the server what is in it.
        let _ = fs::read_dir(run_dir).map(Iterator::count);
        std::thread::sleep(TICK);
    }
}

/// The name of the newest checkpoint, by its number; whether it is whole is not looked at.
pub fn newest(run_dir: &Path) -> Option<String> {
    let names = fs::read_dir(run_dir.join("checkpoints")).ok()?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("step-")).max()
}

pub fn log(run_dir: &Path) -> PathBuf {
    run_dir.join("log")
}

/// Moves what a fresh start would stumble over into RUN_DIR/half-run-N. Nothing is deleted.
pub fn put_aside(run_dir: &Path) -> io::Result<PathBuf> {
    let aside = (1..).map(|number| run_dir.join(format!("half-run-{number}"))).find(|path| !path.exists()).expect("a free number");
    fs::create_dir_all(aside.join("log"))?;
    for entry in fs::read_dir(log(run_dir))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("rank-") {
            fs::rename(entry.path(), aside.join("log").join(name))?;
        }
    }
    for name in ["tensorboard", "checkpoints"] {
        if run_dir.join(name).exists() {
            fs::rename(run_dir.join(name), aside.join(name))?;
        }
    }
    // Last: as long as it is there, this is a half run.
    fs::rename(run_dir.join("resolved.toml"), aside.join("resolved.toml"))?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_run_is_moved_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let run = folder.path();
        assert_eq!(holds(run).expect("looked"), Holds::Nothing);
        fs::create_dir_all(run.join("checkpoints/.step-1.partial")).expect("a folder");
        fs::create_dir_all(log(run)).expect("a folder");
        for name in ["resolved.toml", "log/rank-0.jsonl", "log/incidents.jsonl"] {
            fs::write(run.join(name), name).expect("a file");
        }
        assert_eq!(holds(run).expect("looked"), Holds::HalfRun);
        let aside = put_aside(run).expect("moved");
        assert_eq!(holds(run).expect("looked"), Holds::Nothing);
        assert!(aside.join("log/rank-0.jsonl").exists() && aside.join("checkpoints/.step-1.partial").exists());
        assert!(run.join("log/incidents.jsonl").exists(), "the timeline stays");
    }

    #[test]
    fn only_a_written_manifest_counts() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("resolved.toml"), "").expect("a file");
        fs::create_dir_all(folder.path().join("checkpoints/step-00000004")).expect("a folder");
        assert_eq!(holds(folder.path()).expect("looked"), Holds::HalfRun);
        fs::write(folder.path().join("checkpoints/step-00000004/manifest.json"), "{}").expect("a file");
        assert_eq!(holds(folder.path()).expect("looked"), Holds::Checkpoint);
    }

    #[test]
    fn what_cannot_be_looked_at_is_no_half_run() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("resolved.toml"), "").expect("a file");
        fs::write(folder.path().join("checkpoints"), "").expect("a file where a folder belongs");
        let error = format!("{:#}", holds(folder.path()).expect_err("cannot be listed"));
        assert!(error.starts_with("cannot list ") && error.contains("checkpoints"), "{error}");
    }

    #[test]
    fn a_file_system_that_does_not_answer_is_an_error() {
        let waits = || {
            let (until, wait) = channel::<()>();
            // As long as the test.
            (until, move || wait.recv().is_ok())
        };
        let (_kept, look) = waits();
        let error = answered(Duration::ZERO, look, || false).expect_err("no answer").to_string();
        assert_eq!(error, "its file system has not answered for 0 s");
        let (_kept, look) = waits();
        assert_eq!(answered(ANSWER, look, || true).expect("stopped"), None);
        assert_eq!(answered(ANSWER, || 7, || false).expect("an answer"), Some(7));
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(holds_now(folder.path(), || false).expect("looked"), Some(Holds::Nothing));
    }

    #[test]
    fn a_second_tier_and_a_summary_count() {
        for (name, expected) in [("second-tier", Holds::Checkpoint), ("summary.json", Holds::Gone)] {
            let folder = tempfile::tempdir().expect("a folder");
            fs::write(folder.path().join("resolved.toml"), "").expect("a file");
            fs::write(folder.path().join(name), "").expect("a file");
            assert_eq!(holds(folder.path()).expect("looked"), expected, "{name}");
        }
    }

    #[test]
    fn a_run_is_over_by_its_summary() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(!is_over(folder.path(), None));
        for (text, over) in [(r#"{"finished": false}"#, false), (r#"{"finished": true}"#, true), (r#"{"finis"#, false)] {
            fs::write(folder.path().join("summary.json"), text).expect("a file");
            assert_eq!(is_over(folder.path(), None), over, "{text}");
            assert!(!is_over(folder.path(), summarised(folder.path())), "of before");
        }
    }

    #[test]
    fn a_summary_that_is_seen_late_counts() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(!is_over_within(Duration::ZERO, folder.path(), None, || panic!("no second look")));
        assert!(!is_over_within(STALE, folder.path(), None, || true), "asked to stop");
        let summary = folder.path().join("summary.json");
        let mut asked = 0;
        // It comes after the second look.
        let comes = || {
            asked += 1;
            assert!(asked < 4 && (asked != 2 || fs::write(&summary, r#"{"finished": true}"#).is_ok()));
            false
        };
        assert!(is_over_within(STALE, folder.path(), None, comes));
    }
}
