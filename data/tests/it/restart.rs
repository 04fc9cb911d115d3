//! A prepare that is killed at random moments, again and again, writes what an undisturbed one does.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use data::{DataError, PrepareArgs, prepare};

use crate::corpus::{self, Random};
use crate::prepare::folder_bytes;

/// Set for the process that is to be killed.
const FOLDER: &str = "TIEFSEE_TEST_PREPARE_IN";

fn args(folder: &Path, out: &str) -> PrepareArgs {
    let mut args = corpus::args(&folder.join("in"), &folder.join(out));
    // Several units and groups, so that a kill falls between and inside them.
    (args.shard_mib, args.bpe_mib, args.fim_rate, args.threads) = (1, 1, 0.2, 2);
    args
}

/// Not a check of its own: the process that `killed_again_and_again` starts, which sets `FOLDER`.
#[test]
fn victim() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    match prepare(&args(&folder, "killed")) {
        Ok(_) | Err(DataError::OutputExists { .. }) => {}
        Err(error) => panic!("{error}"),
    }
}

/// Starts the victim; kills it after `patience`. True if it ended by itself.
fn run_victim(folder: &Path, patience: Option<Duration>) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "restart::victim"]).env(FOLDER, folder);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().unwrap();
    if let Some(patience) = patience {
        std::thread::sleep(patience);
        child.kill().unwrap();
    }
    let status = child.wait().unwrap();
    assert!(status.success() || status.signal() == Some(9), "{status}");
    status.success()
}

#[test]
fn killed_again_and_again() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let input = folder.join("in");
    let mut random = Random(9);
    std::fs::create_dir_all(&input).unwrap();
    for file in 0..12 {
        let lines = (0..150).map(|_| format!("{}\n", serde_json::json!({"text": corpus::text(&mut random, 400)})));
        std::fs::write(input.join(format!("{file}.jsonl")), lines.collect::<String>()).unwrap();
    }
    let undisturbed = folder_bytes(&prepare(&args(folder, "whole")).unwrap().out);
    assert!(undisturbed.iter().filter(|(name, _)| name.starts_with("train-")).count() > 2);
    let start = Instant::now();
    assert!(run_victim(folder, None));
    let usual = start.elapsed();
    let (mut kills, mut finished) = (0, 0);
    while kills < 50 && finished < 60 {
        std::fs::remove_dir_all(folder.join("killed")).unwrap();
        loop {
            // Mostly early, so that one corpus is interrupted several times.
            let patience = usual.mul_f64(random.below(1000) as f64 / 1000.0);
            match run_victim(folder, Some(patience)) {
                true => break,
                false => kills += 1,
            }
        }
        // The last one may have been past all work; a further run says that the corpus is there.
        assert!(run_victim(folder, None));
        assert!(!folder.join("killed.partial").join("job").exists());
        let files = folder_bytes(&folder.join("killed"));
        assert!(undisturbed == files, "after {kills} kills");
        finished += 1;
    }
    assert!(kills >= 20, "only {kills} kills hit a running process");
}
