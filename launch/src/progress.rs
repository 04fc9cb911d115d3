//! The step watchdog: how far each rank is, by the lines that it appends to RUN_DIR/log/rank-N.jsonl. Where the disk is full
//! they drop them: then rank 0's printed steps, which come to us through no file, are the sign that the run goes on.
use crate::processes::{activity, descendants, rank};
use crate::waits::waits;
use crate::work::{Worked, median};
use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// Stands in RUN_DIR/log as long as the ranks wait for a checkpoint.
const SAVING: &str = "saving";
/// So many steps make the median.
const REMEMBERED: usize = 64;

/// A rank is slow that works so many times as long as the median rank …
const SLOW: f64 = 1.5;
/// … by the medians of so many of its last steps.
const JUDGED: usize = 32;

/// Seconds; a limit of 0 is none.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// n of "n × median step".
    pub steps: f64,
    pub floor: f64,
    /// Until the first step of an attempt.
    pub start: f64,
    /// While the ranks wait for a checkpoint.
    pub save: f64,
}

pub struct Progress {
    log: PathBuf,
    limits: Limits,
    ranks: BTreeMap<usize, Followed>,
    step_seconds: VecDeque<f64>,
    stepped: bool,
    /// Steps as rank 0 prints them.
    prints: Receiver<u64>,
    /// The last of them.
    printed: Option<u64>,
    /// The ranks wait for a checkpoint, by rank 0's word.
    saving: bool,
    last_change: Instant,
    events: Vec<Event>,
    /// Why the logs cannot be read: who cannot look must not call a run hung.
    blind: Option<String>,
    told_blind: bool,
}

/// What a rank says of the run itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `skipped`, `corruption` or `mended`.
    pub kind: String,
    pub words: String,
}

/// One rank's file.
#[derive(Default)]
struct Followed {
    read: u64,
    step: Option<u64>,
    /// Of its last steps.
    busy_ms: VecDeque<f64>,
    /// Its place in the pipe.
    stage: usize,
    called_slow: bool,
}

/// A rank that keeps the others waiting.
#[derive(Clone, Debug, PartialEq)]
pub struct Slow {
    pub worked: Worked,
    /// Of the median rank.
    pub usual_ms: f64,
}

#[derive(Deserialize)]
struct Line {
    step: u64,
    /// A validation's line has none.
    step_ms: Option<f64>,
    /// How long the rank itself worked in the step, without waiting for others. Where it is not told, nobody is called slow.
    busy_ms: Option<f64>,
    stage: Option<usize>,
    event: Option<String>,
    words: Option<String>,
}

impl Progress {
    /// What earlier attempts wrote is no progress.
    pub fn follow(log: &Path, limits: Limits, prints: Receiver<u64>, now: Instant) -> Result<Self> {
        let (log, ranks, step_seconds, events) = (log.to_path_buf(), BTreeMap::new(), VecDeque::new(), Vec::new());
        let mut progress =
            Progress { log, limits, ranks, step_seconds, stepped: false, prints, printed: None, saving: false, last_change: now, events, blind: None, told_blind: false };
        // Of ranks that were killed in a save.
        let _ = fs::remove_file(progress.log.join(SAVING));
        for (rank, _, length) in progress.files()? {
            progress.ranks.insert(rank, Followed { read: length, ..Followed::default() });
        }
        Ok(progress)
    }

    fn files(&self) -> Result<Vec<(usize, PathBuf, u64)>> {
        let rank = |name: &str| name.strip_prefix("rank-")?.strip_suffix(".jsonl")?.parse().ok();
        let cannot = || format!("cannot list {}", self.log.display());
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.log).with_context(cannot)? {
            let entry = entry.with_context(cannot)?;
            let Some(rank) = rank(&entry.file_name().to_string_lossy()) else { continue };
            match entry.metadata() {
                Ok(metadata) => files.push((rank, entry.path(), metadata.len())),
                // A rank that begins again removes what was there.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(cannot),
            }
        }
        Ok(files)
    }

    /// Reads what is new.
    pub fn poll(&mut self, now: Instant) {
        if let Some(step) = self.prints.try_iter().last() {
            self.printed = Some(step);
            self.last_change = now;
        }
        if let Err(error) = self.look(now) {
            self.last_change = now;
            if !std::mem::replace(&mut self.told_blind, true) {
                self.blind = Some(format!("{error:#}: while that is so, no hang is seen"));
            }
        }
    }

    /// Why no progress can be seen; once.
    pub fn blind(&mut self) -> Option<String> {
        self.blind.take()
    }

    fn look(&mut self, now: Instant) -> Result<()> {
        let saving = self.log.join(SAVING).exists();
        if saving != std::mem::replace(&mut self.saving, saving) {
            self.last_change = now;
        }
        for (rank, path, length) in self.files()? {
            let followed = self.ranks.entry(rank).or_default();
            if length < followed.read {
                // A resumed rank rewrote its file without the steps that it will do again.
                followed.read = length;
                self.last_change = now;
            }
            if length > followed.read {
                let text = read_from(&path, followed.read).with_context(|| format!("cannot read {}", path.display()))?;
                // A line that is still being written waits for the next look.
                if let Some(end) = text.rfind('\n') {
                    followed.read += end as u64 + 1;
                    self.last_change = now;
                    self.take(rank, &text[..end]);
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, rank: usize, lines: &str) {
        let first = self.ranks.keys().next() == Some(&rank);
        let followed = self.ranks.entry(rank).or_default();
        for line in lines.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok()) {
            self.events.extend(line.event.zip(line.words).map(|(kind, words)| Event { kind, words }));
            followed.step = Some(line.step);
            followed.busy_ms.extend(line.busy_ms);
            followed.stage = line.stage.unwrap_or_default();
            if let Some(step_ms) = line.step_ms {
                self.stepped = true;
                // All ranks make the same steps.
                self.step_seconds.extend(first.then_some(step_ms / 1e3));
            }
        }
        keep_last(&mut followed.busy_ms, JUDGED);
        keep_last(&mut self.step_seconds, REMEMBERED);
    }

    /// Those since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    pub fn made_a_step(&self) -> bool {
        // A validation before the first step is printed as step 0.
        self.stepped || self.printed.is_some_and(|step| step > 0)
    }

    /// The last step of this attempt that every rank has logged.
    pub fn step(&self) -> Option<u64> {
        self.ranks.values().filter_map(|followed| followed.step).min()
    }

    /// How long nobody has made a step, if that is too long.
    pub fn hung(&self, now: Instant) -> Option<Duration> {
        let (limit, stepping) = match (self.saving, self.stepped) {
            (true, _) => (self.limits.save, 0.0),
            (false, true) => (self.limits.floor, self.limits.steps * self.median()),
            (false, false) => (self.limits.start, 0.0),
        };
        let quiet = now - self.last_change;
        (limit > 0.0 && quiet.as_secs_f64() > limit.max(stepping)).then_some(quiet)
    }

    /// The logs end before what rank 0 prints: no rank is more than a step behind it.
    fn unlogged(&self) -> Option<u64> {
        self.printed.filter(|&printed| self.step().is_none_or(|least| least + 1 < printed))
    }

    fn median(&self) -> f64 {
        median(self.step_seconds.iter().copied())
    }

    /// Of every rank that has made enough steps.
    pub fn worked(&self) -> Vec<Worked> {
        let judged = self.ranks.iter().filter(|(_, followed)| followed.busy_ms.len() == JUDGED);
        judged.map(|(&rank, followed)| Worked { rank, stage: followed.stage, busy_ms: median(followed.busy_ms.iter().copied()) }).collect()
    }

    /// A slow rank, each told once.
    pub fn slow(&mut self) -> Option<Slow> {
        let all = self.worked();
        let usual_ms = median(all.iter().map(|worked| worked.busy_ms));
        let slow = all.iter().find(|worked| worked.busy_ms > SLOW * usual_ms && !self.ranks[&worked.rank].called_slow);
        let worked = *slow.filter(|_| all.len() > 1)?;
        self.ranks.get_mut(&worked.rank)?.called_slow = true;
        Some(Slow { worked, usual_ms })
    }

    /// Who waits for whom, of a world of so many ranks.
    pub fn waits(&self, ranks: usize) -> Option<String> {
        waits(&self.log, ranks)
    }

    /// The one rank whose log ends before the others', if there is one and the logs are whole.
    pub fn last_rank(&self) -> Option<usize> {
        let least = self.step().filter(|_| self.unlogged().is_none())?;
        let mut late = self.ranks.iter().filter(|(_, followed)| followed.step == Some(least)).map(|(rank, _)| *rank);
        late.next().filter(|_| late.next().is_none())
    }

    /// Who is behind by the logs, or that none is.
    pub fn behind(&self) -> String {
        if let Some(printed) = self.unlogged() {
            return format!("rank 0 has printed step {printed}; not every rank could log it");
        }
        let steps: Vec<(usize, u64)> = self.ranks.iter().filter_map(|(rank, followed)| Some((*rank, followed.step?))).collect();
        let (Some(least), Some(most)) = (steps.iter().map(|(_, step)| *step).min(), steps.iter().map(|(_, step)| *step).max()) else {
            return "no rank has made a step since this start".to_string();
        };
        if self.saving {
            return format!("the checkpoint after step {least} is still being written");
        }
        if least == most {
            return format!("every rank has logged step {most}");
        }
        let late: Vec<String> = steps.iter().filter(|(_, step)| *step == least).map(|(rank, _)| rank.to_string()).collect();
        format!("rank {} stands at step {least}, the furthest at {most}", late.join(", "))
    }
}

fn keep_last(values: &mut VecDeque<f64>, most: usize) {
    let surplus = values.len().saturating_sub(most);
    values.drain(..surplus);
}

fn read_from(path: &Path, offset: u64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Ranks of this host that are not working, looked at for `time`: one that waits for a peer polls, one that hangs in
/// a lock, a device or a stopped process does not. Says nothing where all or none are idle.
pub fn idle_ranks(guard: u32, time: Duration) -> Option<String> {
    let look = || -> BTreeMap<usize, (char, u64)> {
        let mut ranks: BTreeMap<usize, (char, u64)> = BTreeMap::new();
        for pid in descendants(guard) {
            if let (Some(rank), Some((state, ticks))) = (rank(pid), activity(pid)) {
                let entry = ranks.entry(rank).or_insert((state, 0));
                entry.0 = if state == 'T' { 'T' } else { entry.0 };
                entry.1 += ticks;
            }
        }
        ranks
    };
    let before = look();
    std::thread::sleep(time);
    let after = look();
    let stopped: Vec<String> = after.iter().filter(|(_, (state, _))| *state == 'T').map(|(rank, _)| rank.to_string()).collect();
    if !stopped.is_empty() {
        return Some(format!("rank {} is a stopped process", stopped.join(", ")));
    }
    let idle: Vec<String> = after.iter().filter(|(rank, (_, ticks))| before.get(rank).is_some_and(|(_, then)| then == ticks)).map(|(rank, _)| rank.to_string()).collect();
    (!idle.is_empty() && idle.len() < after.len()).then(|| format!("rank {} uses no processor time while others wait", idle.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn append(log: &Path, rank: usize, text: &str) {
        use std::io::Write;
        let mut file = File::options().create(true).append(true).open(log.join(format!("rank-{rank}.jsonl"))).expect("a file");
        file.write_all(text.as_bytes()).expect("written");
    }

    #[test]
    fn silence_is_measured_in_steps_above_a_floor() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path();
        append(log, 0, "{\"step\":9,\"step_ms\":9.0}\n");
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let mut progress = Progress::follow(log, Limits { steps: 10.0, floor: 5.0, start: 100.0, save: 1.0 }, channel().1, start).expect("followed");
        progress.poll(after(50));
        assert!(!progress.made_a_step() && progress.hung(after(99)).is_none() && progress.hung(after(101)).is_some());
        for rank in [0, 1] {
            append(log, rank, "{\"step\":10,\"step_ms\":2000.0}\n");
        }
        append(log, 0, "{\"step\":11,\"step_ms\":2000.0}\n{\"step\":1");
        progress.poll(after(60));
        assert_eq!(progress.step(), Some(10));
        assert!(progress.hung(after(79)).is_none(), "10 steps of 2 s are above the floor");
        assert!(progress.hung(after(81)).is_some());
        assert_eq!(progress.behind(), "rank 1 stands at step 10, the furthest at 11");
        append(log, 0, "2,\"step_ms\":1.0}\n");
        append(log, 1, "{\"step\":12,\"validation_loss\":1.0}\n");
        progress.poll(after(70));
        assert_eq!(progress.behind(), "every rank has logged step 12");
    }

    #[test]
    fn a_run_that_prints_steps_but_cannot_log_them_is_not_hung() {
        let folder = tempfile::tempdir().expect("a folder");
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let (steps, prints) = channel();
        let mut progress = Progress::follow(folder.path(), Limits { steps: 1.0, floor: 5.0, start: 20.0, save: 1.0 }, prints, start).expect("followed");
        steps.send(1).expect("followed");
        progress.poll(after(1));
        assert!(progress.made_a_step() && progress.hung(after(20)).is_none() && progress.hung(after(22)).is_some());
        assert_eq!(progress.behind(), "rank 0 has printed step 1; not every rank could log it");
        (0..2).for_each(|rank| append(folder.path(), rank, "{\"step\":2,\"step_ms\":1000.0}\n"));
        append(folder.path(), 1, "{\"step\":3,\"step_ms\":1000.0}\n");
        steps.send(3).expect("followed");
        progress.poll(after(10));
        assert_eq!((progress.last_rank(), progress.behind().as_str()), (Some(0), "rank 0 stands at step 2, the furthest at 3"));
        for seconds in [14, 18, 22] {
            [0, 1].iter().for_each(|step| steps.send(seconds + step).expect("followed"));
            progress.poll(after(seconds));
            assert!(progress.hung(after(seconds + 4)).is_none());
        }
        assert_eq!((progress.last_rank(), progress.behind().as_str()), (None, "rank 0 has printed step 23; not every rank could log it"));
        progress.poll(after(28));
        assert!(progress.hung(after(28)).is_some(), "what is neither logged nor printed is a hang");
    }

    #[test]
    fn a_slow_rank_is_named_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let now = Instant::now();
        let mut progress = Progress::follow(folder.path(), Limits { steps: 1.0, floor: 1.0, start: 1.0, save: 1.0 }, channel().1, now).expect("followed");
        for step in 0..JUDGED + 5 {
            for (rank, busy_ms) in [(0, 100.0), (1, 170.0), (2, 105.0), (3, 95.0)] {
                append(folder.path(), rank, &format!("{{\"step\":{step},\"step_ms\":180.0,\"busy_ms\":{busy_ms}}}\n"));
            }
        }
        progress.poll(now);
        assert_eq!(progress.slow(), Some(Slow { worked: Worked { rank: 1, stage: 0, busy_ms: 170.0 }, usual_ms: 100.0 }));
        assert_eq!(progress.slow(), None);
    }

    #[test]
    fn who_cannot_look_calls_nobody_hung_and_says_so_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path().join("log");
        fs::create_dir(&log).expect("a folder");
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let mut progress = Progress::follow(&log, Limits { steps: 1.0, floor: 5.0, start: 5.0, save: 1.0 }, channel().1, start).expect("followed");
        // A file that cannot be read, whoever we are.
        fs::create_dir(log.join("rank-0.jsonl")).expect("a folder");
        for seconds in [3, 6, 9] {
            progress.poll(after(seconds));
            assert!(progress.hung(after(seconds)).is_none());
        }
        assert!(progress.blind().expect("words").contains("rank-0.jsonl") && progress.blind().is_none());
        fs::remove_dir(log.join("rank-0.jsonl")).expect("removed");
        progress.poll(after(12));
        assert!(progress.blind().is_none() && progress.hung(after(13)).is_none() && progress.hung(after(15)).is_some());
        fs::remove_dir(&log).expect("removed");
        progress.poll(after(21));
        assert!(progress.blind().is_none() && progress.hung(after(22)).is_none());
    }

    #[test]
    fn a_save_has_a_limit_of_its_own() {
        let folder = tempfile::tempdir().expect("a folder");
        let saving = folder.path().join(SAVING);
        fs::write(&saving, "").expect("left behind");
        let start = Instant::now();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let mut progress = Progress::follow(folder.path(), Limits { steps: 1.0, floor: 5.0, start: 5.0, save: 100.0 }, channel().1, start).expect("followed");
        assert!(progress.hung(after(6)).is_some(), "what a killed rank left is no save");
        append(folder.path(), 0, "{\"step\":1,\"step_ms\":1.0}\n");
        progress.poll(after(1));
        fs::write(&saving, "").expect("begun");
        progress.poll(after(2));
        assert!(progress.hung(after(90)).is_none() && progress.hung(after(103)).is_some());
        assert_eq!(progress.behind(), "the checkpoint after step 1 is still being written");
        fs::remove_file(&saving).expect("ended");
        progress.poll(after(90));
        assert!(progress.hung(after(94)).is_none() && progress.hung(after(96)).is_some());
    }

    #[test]
    fn the_median_is_of_one_ranks_steps() {
        let folder = tempfile::tempdir().expect("a folder");
        let now = Instant::now();
        let mut progress = Progress::follow(folder.path(), Limits { steps: 1.0, floor: 1.0, start: 1.0, save: 1.0 }, channel().1, now).expect("followed");
        for step in 0..8 {
            let step_ms = if step == 7 { 9000.0 } else { 1000.0 };
            (0..100).for_each(|rank| append(folder.path(), rank, &format!("{{\"step\":{step},\"step_ms\":{step_ms}}}\n")));
            progress.poll(now);
        }
        assert_eq!(progress.median(), 1.0, "the newest step alone is no median");
    }

    #[test]
    fn a_rewritten_log_is_read_from_its_new_end() {
        let folder = tempfile::tempdir().expect("a folder");
        append(folder.path(), 0, "{\"step\":1,\"step_ms\":1.0}\n{\"step\":2,\"step_ms\":1.0}\n");
        let now = Instant::now();
        let mut progress = Progress::follow(folder.path(), Limits { steps: 1.0, floor: 1.0, start: 1.0, save: 1.0 }, channel().1, now).expect("followed");
        fs::write(folder.path().join("rank-0.jsonl"), "{\"step\":1,\"step_ms\":1.0}\n").expect("written");
        progress.poll(now);
        assert_eq!(progress.step(), None);
        append(folder.path(), 0, "{\"step\":2,\"step_ms\":1.0}\n");
        progress.poll(now);
        assert_eq!(progress.step(), Some(2));
    }
}
