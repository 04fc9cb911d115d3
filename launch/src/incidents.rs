//! What happened to a run: RUN_DIR/log/incidents.jsonl, one line an event, and the same in words at exit. A thread of its own writes
//! it: a run whose file system does not answer must still be ended.
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// So long the last lines are waited for.
const LAST: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_millis(10);

#[derive(Clone, Debug, Serialize)]
pub struct Incident {
    /// UTC, RFC 3339.
    pub time: String,
    pub event: String,
    /// Starts of this launcher, from 1.
    pub attempt: usize,
    /// The last step that every rank had logged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    pub words: String,
}

#[derive(Default)]
pub struct Incidents {
    lines: Option<Sender<String>>,
    /// Lines that are not in the file yet.
    unwritten: Arc<AtomicUsize>,
    pub attempt: usize,
    told: Vec<Incident>,
}

impl Incidents {
    /// A run is supervised also where the file cannot be had.
    pub fn open(log: Option<&Path>) -> Self {
        let open = |path: std::path::PathBuf| {
            let file = OpenOptions::new().create(true).append(true).open(&path);
            file.inspect_err(|error| say(&format!("cannot open {}: {error}; what happens is said here alone", path.display()))).ok()
        };
        let mut incidents = Self::default();
        if let Some(file) = log.and_then(|log| open(log.join("incidents.jsonl"))) {
            let (lines, to_write) = channel();
            let unwritten = incidents.unwritten.clone();
            std::thread::spawn(move || write(file, &to_write, &unwritten));
            incidents.lines = Some(lines);
        }
        incidents
    }

    /// Whether all is in the file: as long as it is not, the run's file system may not answer.
    pub fn written(&self) -> bool {
        self.unwritten.load(Ordering::Relaxed) == 0
    }

    /// Written, and said at once.
    pub fn add(&mut self, event: &str, step: Option<u64>, words: impl Into<String>) {
        let words = words.into();
        say(&format!("{}{words}", at(step)));
        self.note(event, step, words);
    }

    /// Written: somebody else has said it.
    pub fn note(&mut self, event: &str, step: Option<u64>, words: String) {
        let incident = Incident { time: now(), event: event.to_string(), attempt: self.attempt, step, words };
        if let Some(lines) = &self.lines {
            self.unwritten.fetch_add(1, Ordering::Relaxed);
            lines.send(serde_json::to_string(&incident).expect("plain fields") + "\n").expect("the writer outlives us");
        }
        self.told.push(incident);
    }

    pub fn summary(&self) -> String {
        let line = |incident: &Incident| format!("\n  {} {}{}", &incident.time[11..19], at(incident.step), incident.words);
        format!("what happened, UTC:{}", self.told.iter().map(line).collect::<String>())
    }
}

impl Drop for Incidents {
    fn drop(&mut self) {
        let start = Instant::now();
        while !self.written() && start.elapsed() < LAST {
            std::thread::sleep(TICK);
        }
    }
}

fn write(mut file: File, lines: &Receiver<String>, unwritten: &AtomicUsize) {
    for line in lines {
        // A full disk must not end the supervision of a run.
        if let Err(error) = file.write_all(line.as_bytes()) {
            say(&format!("cannot write incidents.jsonl: {error}"));
        }
        // A line that only this host's memory holds says nothing of the file system. Not every one can do it.
        let _ = file.sync_data();
        unwritten.fetch_sub(1, Ordering::Relaxed);
    }
}

fn at(step: Option<u64>) -> String {
    step.map(|step| format!("step {step}: ")).unwrap_or_default()
}

/// For people, beside the ranks' own output. A closed stderr is no reason to end.
pub fn say(words: &str) {
    let _ = writeln!(std::io::stderr(), "tiefsee-launch: {words}");
}

fn now() -> String {
    rfc3339(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

fn rfc3339(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Days since 1970 → civil date. Years begin in March here, so that a leap day is a year's last.
fn date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day_of_year - (153 * shifted_month + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn time_is_what_date_says() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_795_557_242), "2026-11-24T21:54:02Z");
    }

    #[test]
    fn a_file_system_that_does_not_answer_holds_nobody_up() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("incidents.jsonl");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().expect("mkfifo").success());
        let mut pipe = OpenOptions::new().read(true).write(true).open(&path).expect("a pipe");
        let mut incidents = Incidents::open(Some(folder.path()));
        // More than a pipe takes.
        incidents.note("failed", None, "x".repeat(1 << 20));
        assert!(!incidents.written());
        let mut line = vec![0; serde_json::to_string(&incidents.told[0]).expect("JSON").len() + 1];
        pipe.read_exact(&mut line).expect("the line");
        let start = Instant::now();
        while !incidents.written() {
            assert!(start.elapsed() < Duration::from_secs(60), "it is written");
            std::thread::sleep(TICK);
        }
    }

    #[test]
    fn the_timeline_is_kept_over_launchers() {
        let folder = tempfile::tempdir().expect("a folder");
        for attempt in [1, 2] {
            let mut incidents = Incidents::open(Some(folder.path()));
            incidents.attempt = attempt;
            incidents.add("hung", Some(4), "rank 1 stopped");
            assert!(incidents.summary().ends_with("step 4: rank 1 stopped"));
        }
        let text = std::fs::read_to_string(folder.path().join("incidents.jsonl")).expect("a log");
        let attempts: Vec<u64> = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["attempt"].as_u64().expect("a number")).collect();
        assert_eq!(attempts, [1, 2]);
    }
}
