//! What happened to a run: RUN_DIR/log/incidents.jsonl, one line an event, and the same in words at exit.
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

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
    file: Option<File>,
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
        Incidents { file: log.and_then(|log| open(log.join("incidents.jsonl"))), ..Self::default() }
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
        if let Some(file) = &mut self.file {
            let mut line = serde_json::to_string(&incident).expect("plain fields");
            line.push('\n');
            // A full disk must not end the supervision of a run.
            if let Err(error) = file.write_all(line.as_bytes()) {
                say(&format!("cannot write incidents.jsonl: {error}"));
            }
        }
        self.told.push(incident);
    }

    pub fn summary(&self) -> String {
        let line = |incident: &Incident| format!("\n  {} {}{}", &incident.time[11..19], at(incident.step), incident.words);
        format!("what happened, UTC:{}", self.told.iter().map(line).collect::<String>())
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

    #[test]
    fn time_is_what_date_says() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_795_557_242), "2026-11-24T21:54:02Z");
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
