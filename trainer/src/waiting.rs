//! Says what this rank has been waiting for too long, in RUN_DIR/log/rank-N.waiting, for whoever asks why a run stands still:
//! the rank itself, deep in a collective, cannot. The file is there only while the wait lasts.
use parallel::comm::watched::{Wait, Watch};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

/// Longer than ranks wait for each other in an ordinary step.
const LONG: Duration = Duration::from_secs(2);
const PERIOD: Duration = Duration::from_millis(500);

/// Ends, with its file, when it is dropped.
pub struct Reporter {
    _alive: Arc<()>,
}

#[derive(Serialize)]
struct Line<'a> {
    op: &'static str,
    /// Ranks.
    from: &'a [usize],
}

impl Reporter {
    pub fn start(watch: &Watch, run_dir: &Path, rank: usize) -> Reporter {
        let alive = Arc::new(());
        let (ends, now, path) = (Arc::downgrade(&alive), watch.now(), run_dir.join(format!("log/rank-{rank}.waiting")));
        std::thread::spawn(move || report(&ends, &now, &path));
        Reporter { _alive: alive }
    }
}

fn report(alive: &Weak<()>, now: &Mutex<Option<Wait>>, path: &PathBuf) {
    // A rank that was killed leaves one behind.
    let _ = std::fs::remove_file(path);
    let mut told: Option<Instant> = None;
    while alive.strong_count() > 0 {
        let wait = now.lock().expect("nobody panics with it").clone().filter(|wait| wait.since.elapsed() > LONG);
        if told != wait.as_ref().map(|wait| wait.since) {
            // Where the disk is full there is only less to say.
            let _ = match &wait {
                Some(Wait { op, from, .. }) => std::fs::write(path, serde_json::to_vec(&Line { op, from }).expect("plain values")),
                None => std::fs::remove_file(path),
            };
            told = wait.map(|wait| wait.since);
        }
        std::thread::sleep(PERIOD);
    }
    let _ = std::fs::remove_file(path);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_there_while_a_long_wait_lasts() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("log")).expect("a folder");
        let path = folder.path().join("log/rank-1.waiting");
        std::fs::write(&path, "left behind").expect("written");
        let watch = Watch::default();
        let reporter = Reporter::start(&watch, folder.path(), 1);
        let until = |what: &str, done: &dyn Fn() -> bool| {
            let start = Instant::now();
            while !done() {
                assert!(start.elapsed() < Duration::from_secs(20), "waited in vain for {what}");
                std::thread::sleep(PERIOD / 10);
            }
        };
        until("the old one's end", &|| !path.exists());
        *watch.now().lock().expect("free") = Some(Wait { op: "exchange", from: vec![0], since: Instant::now() - 2 * LONG });
        until("the file", &|| std::fs::read_to_string(&path).is_ok_and(|text| text == r#"{"op":"exchange","from":[0]}"#));
        *watch.now().lock().expect("free") = None;
        until("its end", &|| !path.exists());
        drop(reporter);
    }
}
