//! A file that lines or records are appended to while a run lasts. Where one cannot be written it is said and dropped: a full
//! disk is no end of a run. A crash leaves at most a piece of one behind.
use anyhow::{Context, Result};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub struct Log {
    path: PathBuf,
    file: File,
    /// Whole records up to here.
    bytes: u64,
    /// Since the last that was written.
    dropped: u64,
}

impl Log {
    pub fn open(path: &Path) -> Result<Log> {
        let named = || format!("cannot open {}", path.display());
        let file = OpenOptions::new().create(true).append(true).open(path).with_context(named)?;
        let bytes = file.metadata().with_context(named)?.len();
        Ok(Log { path: path.to_path_buf(), file, bytes, dropped: 0 })
    }

    pub fn append(&mut self, record: &[u8]) {
        match self.file.write_all(record) {
            Ok(()) => {
                self.bytes += record.len() as u64;
                if self.dropped > 0 {
                    tracing::warn!("{} is written again; {} records are missing", self.path.display(), self.dropped);
                    self.dropped = 0;
                }
            }
            Err(error) => {
                // What follows is not to stand behind half a record.
                let _ = self.file.set_len(self.bytes);
                if self.dropped == 0 {
                    tracing::warn!("cannot write {}: {error}; what belongs there is dropped until it can be written", self.path.display());
                }
                self.dropped += 1;
            }
        }
    }
}

/// Keeps the lines up to `step`, whose number never falls from line to line; a line that a crash cut short goes too. Reads
/// only what goes, from the end.
pub fn truncate_after(path: &Path, step: u64) -> Result<()> {
    let truncate = |file: File| -> io::Result<()> {
        let length = file.metadata()?.len();
        let mut end = length;
        while end > 0 {
            let (start, line) = last_line(&file, end)?;
            let at = || serde_json::from_slice::<serde_json::Value>(&line).ok()?["step"].as_u64();
            if line.ends_with(b"\n") && at().is_some_and(|at| at <= step) {
                break;
            }
            end = start;
        }
        if end < length { file.set_len(end) } else { Ok(()) }
    };
    match OpenOptions::new().read(true).write(true).open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        file => file.and_then(truncate).with_context(|| format!("cannot cut {} behind step {step}", path.display())),
    }
}

/// Of the first `end` bytes: where it begins, and it with its newline.
fn last_line(file: &File, end: u64) -> io::Result<(u64, Vec<u8>)> {
    let mut span = 4096;
    loop {
        let from = end.saturating_sub(span);
        let mut bytes = vec![0; (end - from) as usize];
        file.read_exact_at(&mut bytes, from)?;
        match bytes[..bytes.len() - 1].iter().rposition(|&byte| byte == b'\n') {
            Some(at) => return Ok((from + at as u64 + 1, bytes.split_off(at + 1))),
            None if from == 0 => return Ok((0, bytes)),
            None => span *= 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn line(step: u64, words: usize) -> String {
        format!("{{\"step\":{step},\"words\":\"{}\"}}\n", "x".repeat(words))
    }

    #[test]
    fn lines_of_later_steps_and_pieces_go_and_the_rest_is_not_touched() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("rank-0.jsonl");
        truncate_after(&path, 3).expect("none is there");
        let kept: String = [1, 1, 2, 3].map(|step| line(step, 10)).concat();
        for rest in [
            String::new(),
            line(4, 9000) + &line(4, 3) + &line(5, 5000),
            line(4, 0) + "{\"step\":3,",
            line(3, 0).trim_end().to_string(),
            "\0".repeat(20_000),
        ] {
            std::fs::write(&path, kept.clone() + &rest).expect("written");
            let inode = path.metadata().expect("it is there").ino();
            truncate_after(&path, 3).expect("cut");
            assert_eq!(std::fs::read_to_string(&path).expect("text"), kept);
            assert_eq!(path.metadata().expect("it is there").ino(), inode);
        }
        // What lies before is not even read.
        let damaged = "no line\n".to_string() + &kept;
        std::fs::write(&path, damaged.clone() + &line(9, 1)).expect("written");
        truncate_after(&path, 3).expect("cut");
        assert_eq!(std::fs::read_to_string(&path).expect("text"), damaged);
        truncate_after(&path, 0).expect("cut");
        assert_eq!(path.metadata().expect("it is there").len(), 0);
    }

    #[test]
    fn what_cannot_be_written_is_dropped() {
        let mut log = Log::open(Path::new("/dev/full")).expect("it opens");
        log.append(b"a");
        log.append(b"b");
        assert_eq!((log.dropped, log.bytes), (2, 0));
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        std::fs::write(&path, "old\n").expect("written");
        let mut log = Log { dropped: 2, ..Log::open(&path).expect("it opens") };
        log.append(b"new\n");
        assert_eq!((log.dropped, log.bytes), (0, 8));
        assert_eq!(std::fs::read_to_string(&path).expect("text"), "old\nnew\n");
    }
}
