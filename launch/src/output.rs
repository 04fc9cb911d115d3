//! What the ranks print: prefixed by rank on our own output, whole in LOG_DIR/rank-N.log, and read for evidence. The logs have a
//! thread of their own: a file system that does not answer holds nobody up.
use crate::incidents::say;
use crate::outcome::Evidence;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Logs open at a time, of any number of ranks.
const OPEN: usize = 64;
/// So long the last lines of the logs are waited for.
const LAST: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_millis(10);

/// The readers of one attempt.
pub struct Output {
    evidence: Arc<Mutex<Evidence>>,
    readers: Vec<JoinHandle<()>>,
    logger: Option<JoinHandle<()>>,
}

/// Where what is read goes.
#[derive(Clone)]
struct Sink {
    tag_end: &'static str,
    evidence: Arc<Mutex<Evidence>>,
    steps: Sender<u64>,
    logs: Option<Sender<(usize, String)>>,
}

struct Logs {
    folder: PathBuf,
    open: BTreeMap<usize, File>,
    unwritten: bool,
}

impl Output {
    /// `steps` gets the step of every line that a rank prints after one. Open MPI from 5 on puts a blank behind a tag.
    pub fn read(mpi_major: u32, log_dir: Option<PathBuf>, steps: Sender<u64>, stdout: impl Read + Send + 'static, stderr: impl Read + Send + 'static) -> Self {
        let (logs, logger) = log_dir.map(Logs::start).unzip();
        let evidence = Arc::<Mutex<Evidence>>::default();
        let sink = Sink { tag_end: if mpi_major < 5 { ">:" } else { ">: " }, evidence: evidence.clone(), steps, logs };
        let readers = vec![reader(sink.clone(), stdout, std::io::stdout()), reader(sink, stderr, std::io::stderr())];
        Output { evidence, readers, logger }
    }

    /// Until both pipes are at their end: every process of the attempt is gone then. One that nobody can end may keep them open.
    pub fn finish(self) -> Evidence {
        loop {
            let read = self.readers.iter().all(JoinHandle::is_finished);
            let mut evidence = self.evidence.lock().expect("a reader does not panic");
            if evidence.stuck.is_some() {
                return std::mem::take(&mut evidence);
            }
            if read {
                self.last_lines();
                return std::mem::take(&mut evidence);
            }
            drop(evidence);
            std::thread::sleep(TICK);
        }
    }

    fn last_lines(&self) {
        let start = Instant::now();
        while self.logger.as_ref().is_some_and(|logger| !logger.is_finished()) && start.elapsed() < LAST {
            std::thread::sleep(TICK);
        }
    }
}

fn reader(sink: Sink, from: impl Read + Send + 'static, mut to: impl Write + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut bytes = Vec::new();
        let Sink { tag_end, evidence, steps, logs } = sink;
        // A read error is the end of a pipe, too.
        while from.read_until(b'\n', &mut bytes).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&bytes);
            let (rank, line) = untagged(text.trim_end_matches(['\n', '\r']), tag_end);
            // mpirun tags every write, and a line on stderr may be many.
            let line = &rank.map_or_else(|| line.to_string(), |rank| line.replace(&format!("[1,{rank}]<stderr{tag_end}"), ""));
            if let Some(step) = printed_step(line).filter(|_| rank.is_some()) {
                // Not every command's steps are followed.
                let _ = steps.send(step);
            }
            // Held as long as the line is printed: the two readers' lines stay whole.
            let mut evidence = evidence.lock().expect("a reader does not panic");
            evidence.read(line);
            // Whoever reads us may have gone; the run goes on.
            let _ = match rank {
                Some(rank) => writeln!(to, "[{rank}] {line}"),
                None => writeln!(to, "{line}"),
            };
            if let (Some(rank), Some(logs)) = (rank, &logs) {
                logs.send((rank, line.clone())).expect("the logger outlives its readers");
            }
            bytes.clear();
        }
    })
}

impl Logs {
    /// Ends when the last sender is gone.
    fn start(folder: PathBuf) -> (Sender<(usize, String)>, JoinHandle<()>) {
        let (lines, to_write): (_, Receiver<(usize, String)>) = channel();
        let mut logs = Logs { folder, open: BTreeMap::new(), unwritten: false };
        (lines, std::thread::spawn(move || to_write.iter().for_each(|(rank, line)| logs.log(rank, &line))))
    }

    /// A full disk must not stop the run's output.
    fn log(&mut self, rank: usize, line: &str) {
        let path = self.folder.join(format!("rank-{rank}.log"));
        if let Err(error) = self.append(rank, &path, line)
            && !std::mem::replace(&mut self.unwritten, true)
        {
            say(&format!("cannot write {}: {error}; what the ranks print is kept here alone", path.display()));
        }
    }

    fn append(&mut self, rank: usize, path: &Path, line: &str) -> std::io::Result<()> {
        if !self.open.contains_key(&rank) {
            if self.open.len() == OPEN {
                self.open.clear();
            }
            self.open.insert(rank, OpenOptions::new().create(true).append(true).open(path)?);
        }
        writeln!(self.open.get_mut(&rank).expect("just put there"), "{line}")
    }
}

/// mpirun's `[1,3]<stderr>:text`, of Open MPI 5 `[1,3]<stderr>: text`, and srun's `3: text` → rank and text.
fn untagged<'a>(line: &'a str, tag_end: &str) -> (Option<usize>, &'a str) {
    let mpirun = || {
        let (tag, text) = line.strip_prefix('[')?.split_once(tag_end)?;
        let (job, stream) = tag.split_once("]<")?;
        let rank = job.split_once(',')?.1.parse().ok()?;
        matches!(stream, "stdout" | "stderr").then_some((rank, text))
    };
    let srun = || {
        let (rank, text) = line.split_once(": ")?;
        Some((rank.trim_start().parse().ok()?, text))
    };
    mpirun().or_else(srun).map_or((None, line), |(rank, text)| (Some(rank), text))
}

/// The trainer's `step 3/100 | …`.
fn printed_step(line: &str) -> Option<u64> {
    line.strip_prefix("step ")?.split_once('/')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::STUCK;

    #[test]
    fn many_ranks_need_few_files() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut logs = Logs { folder: folder.path().to_path_buf(), open: BTreeMap::new(), unwritten: false };
        for (rank, line) in (0..3).flat_map(|line| (0..3 * OPEN).map(move |rank| (rank, line))) {
            logs.log(rank, &format!("line {line}"));
            assert!(logs.open.len() <= OPEN);
        }
        for rank in 0..3 * OPEN {
            let text = std::fs::read_to_string(folder.path().join(format!("rank-{rank}.log"))).expect("a log");
            assert_eq!(text, "line 0\nline 1\nline 2\n", "rank {rank}");
        }
    }

    #[test]
    fn pipes_that_a_process_holds_for_ever_are_left() {
        let (never_read, held) = std::io::pipe().expect("a pipe");
        let said = format!("tiefsee-launch: host n2{STUCK}4711 (tiefsee, state D)\n");
        let evidence = Output::read(4, None, std::sync::mpsc::channel().0, never_read, std::io::Cursor::new(said)).finish();
        assert_eq!(evidence.stuck.expect("read").0, "n2");
        drop(held);
    }

    #[test]
    fn a_log_that_is_not_written_holds_nobody_up() {
        let folder = tempfile::tempdir().expect("a folder");
        // Who opens a pipe that nobody reads waits for a reader.
        assert!(std::process::Command::new("mkfifo").arg(folder.path().join("rank-3.log")).status().expect("mkfifo").success());
        let said = format!("[1,3]<stdout>:a line\n[1,3]<stdout>:another\ntiefsee-launch: host n2{STUCK}4711 (tiefsee, state D)\n");
        let evidence = Output::read(4, Some(folder.path().into()), std::sync::mpsc::channel().0, std::io::empty(), std::io::Cursor::new(said)).finish();
        assert_eq!(evidence.stuck.expect("read").0, "n2");
    }

    #[test]
    fn printed_steps_are_passed_on() {
        let four = "[1,0]<stdout>:step 3/9 | loss 1.0\n[1,1]<stdout>:step 16: rank 1: x\nstep 8/9 | nobody's\n0: step 4/9 | loss 1.0\n";
        let five = "[1,0]<stdout>: step 3/9 | loss 1.0\n[1,0]<stdout>: step 4/9 | loss 1.0\n";
        for (mpi_major, printed) in [(4, four), (5, five)] {
            let (steps, prints) = std::sync::mpsc::channel();
            Output::read(mpi_major, None, steps, printed.as_bytes(), std::io::empty()).finish();
            assert_eq!(prints.iter().collect::<Vec<_>>(), [3, 4], "Open MPI {mpi_major}");
        }
    }

    #[test]
    fn tags_become_ranks() {
        assert_eq!(untagged("[1,12]<stderr>:error (rank 12): x", ">:"), (Some(12), "error (rank 12): x"));
        assert_eq!(untagged("[1,12]<stdout>:   x", ">:"), (Some(12), "   x"));
        assert_eq!(untagged("[1,12]<stdout>:   x", ">: "), (Some(12), "  x"));
        assert_eq!(untagged(" 3: step 1", ">:"), (Some(3), "step 1"));
        assert_eq!(untagged("srun: error: x", ">:"), (None, "srun: error: x"));
        assert_eq!(untagged("[host:123] [[1,0],0] lost", ">:"), (None, "[host:123] [[1,0],0] lost"));
    }
}
