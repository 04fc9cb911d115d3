//! What the ranks print: prefixed by rank on our own output, whole in LOG_DIR/rank-N.log, and read for evidence.
use crate::incidents::say;
use crate::outcome::Evidence;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Logs open at a time, of any number of ranks.
const OPEN: usize = 64;
const TICK: Duration = Duration::from_millis(10);

/// The readers of one attempt.
pub struct Output {
    shared: Arc<Mutex<Shared>>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    tag_end: &'static str,
    evidence: Evidence,
    log_dir: Option<PathBuf>,
    logs: BTreeMap<usize, File>,
    unwritten: bool,
}

impl Output {
    /// `steps` gets the step of every line that a rank prints after one. Open MPI from 5 on puts a blank behind a tag.
    pub fn read(mpi_major: u32, log_dir: Option<PathBuf>, steps: Sender<u64>, stdout: impl Read + Send + 'static, stderr: impl Read + Send + 'static) -> Self {
        let shared = Arc::new(Mutex::new(Shared { tag_end: if mpi_major < 5 { ">:" } else { ">: " }, log_dir, ..Shared::default() }));
        let readers = vec![reader(shared.clone(), steps.clone(), stdout, std::io::stdout()), reader(shared.clone(), steps, stderr, std::io::stderr())];
        Output { shared, readers }
    }

    /// Until both pipes are at their end: every process of the attempt is gone then. One that nobody can end may keep them open.
    pub fn finish(self) -> Evidence {
        loop {
            let read = self.readers.iter().all(JoinHandle::is_finished);
            let mut shared = self.shared.lock().expect("a reader does not panic");
            if read || shared.evidence.stuck.is_some() {
                return std::mem::take(&mut shared.evidence);
            }
            drop(shared);
            std::thread::sleep(TICK);
        }
    }
}

fn reader(shared: Arc<Mutex<Shared>>, steps: Sender<u64>, from: impl Read + Send + 'static, mut to: impl Write + Send + 'static) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut bytes = Vec::new();
        let tag_end = shared.lock().expect("a reader does not panic").tag_end;
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
            let mut shared = shared.lock().expect("a reader does not panic");
            shared.evidence.read(line);
            // Whoever reads us may have gone; the run goes on.
            let _ = match rank {
                Some(rank) => writeln!(to, "[{rank}] {line}"),
                None => writeln!(to, "{line}"),
            };
            if let Some(rank) = rank {
                shared.log(rank, line);
            }
            bytes.clear();
        }
    })
}

impl Shared {
    /// A full disk must not stop the run's output.
    fn log(&mut self, rank: usize, line: &str) {
        let Some(path) = self.log_dir.as_ref().map(|folder| folder.join(format!("rank-{rank}.log"))) else { return };
        if let Err(error) = self.append(rank, &path, line)
            && !std::mem::replace(&mut self.unwritten, true)
        {
            say(&format!("cannot write {}: {error}; what the ranks print is kept here alone", path.display()));
        }
    }

    fn append(&mut self, rank: usize, path: &Path, line: &str) -> std::io::Result<()> {
        if !self.logs.contains_key(&rank) {
            if self.logs.len() == OPEN {
                self.logs.clear();
            }
            self.logs.insert(rank, OpenOptions::new().create(true).append(true).open(path)?);
        }
        writeln!(self.logs.get_mut(&rank).expect("just put there"), "{line}")
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
        let mut shared = Shared { log_dir: Some(folder.path().to_path_buf()), ..Shared::default() };
        for (rank, line) in (0..3).flat_map(|line| (0..3 * OPEN).map(move |rank| (rank, line))) {
            shared.log(rank, &format!("line {line}"));
            assert!(shared.logs.len() <= OPEN);
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
