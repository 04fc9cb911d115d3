//! A prepare that is killed at random moments, again and again, writes what an undisturbed one does.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use data::{DataError, PrepareArgs, prepare};

use crate::corpus::{self, Random};
use crate::prepare::folder_bytes;

/// Set for the process that is to be killed, or to run out of space.
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
    // A mount of its own, where there is one.
    let out = if folder.join("small").exists() { "small/killed" } else { "killed" };
    match prepare(&args(&folder, out)) {
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

/// Some megabytes of text, and what an undisturbed prepare makes of them.
fn undisturbed(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let input = folder.join("in");
    let mut random = Random(9);
    std::fs::create_dir_all(&input).unwrap();
    for file in 0..12 {
        let lines = (0..150).map(|_| format!("{}\n", serde_json::json!({"text": corpus::text(&mut random, 400)})));
        std::fs::write(input.join(format!("{file}.jsonl")), lines.collect::<String>()).unwrap();
    }
    folder_bytes(&prepare(&args(folder, "whole")).unwrap().out)
}

#[test]
fn killed_again_and_again() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (undisturbed, mut random) = (undisturbed(folder), Random(10));
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

/// The victim on a disk of $2 MiB, then, the disk made larger, again; what it wrote ends up outside the mount.
const SMALL_DISK: &str = r#"
set -e
mount -t tmpfs -o size="$2"m none "$1/small"
if "$3" --exact restart::victim >"$1/said" 2>&1; then exit 3; fi
[ ! -e "$1/small/killed" ]
mount -o remount,size=200m "$1/small"
"$3" --exact restart::victim >/dev/null
cp -r "$1/small/killed" "$1/made"
"#;

/// A script in a namespace with mounts of its own, run with the folder, `word` and this binary; None where that is not allowed.
fn in_namespace(folder: &Path, script: &str, word: &str) -> Option<Output> {
    let run = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]).arg(folder).arg(word);
        command.arg(std::env::current_exe().unwrap()).env(FOLDER, folder).output()
    };
    std::fs::create_dir_all(folder.join("small")).unwrap();
    if !run("mount -t tmpfs -o size=1m none \"$1/small\"").is_ok_and(|output| output.status.success()) {
        println!("skipped: a disk of its own needs a mount namespace, which is not allowed here");
        return None;
    }
    Some(run(script).unwrap())
}

#[test]
fn a_full_disk_is_a_clear_error_and_the_work_goes_on_once_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let undisturbed = undisturbed(folder);
    // Too small for what is read, for the shards beside it, and for the last of them.
    for size in ["1", "5", "8"] {
        let Some(output) = in_namespace(folder, SMALL_DISK, size) else { return };
        let said = std::fs::read_to_string(folder.join("said")).unwrap();
        assert!(output.status.success(), "{size} MiB: {}\n{said}", output.status);
        assert!(said.contains("small/killed.partial") && said.contains("No space left on device"), "{size} MiB: {said}");
        assert!(undisturbed == folder_bytes(&folder.join("made")), "{size} MiB");
        std::fs::remove_dir_all(folder.join("made")).unwrap();
    }
}

/// The victim with a mount point in place of its folder $2.
const MOUNTED: &str = r#"
set -e
mkdir "$1/small/$2"
mount -t tmpfs none "$1/small/$2"
if "$3" --exact restart::victim >"$1/said" 2>&1; then exit 3; fi
umount "$1/small/$2"
rmdir "$1/small/$2"
rmdir "$1/small"
"#;

#[test]
fn a_mount_point_in_place_of_out_or_of_the_work_folder_is_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    corpus::write_corpus(&folder.join("in"), 11, 20);
    for (name, reason) in [("killed", "is a mount point"), ("killed.partial", "is needed for the work, but is a mount point")] {
        let Some(output) = in_namespace(folder, MOUNTED, name) else { return };
        let said = std::fs::read_to_string(folder.join("said")).unwrap();
        // Nothing was left beside it.
        assert!(output.status.success(), "{}\n{said}{}", output.status, String::from_utf8_lossy(&output.stderr));
        assert!(said.contains(reason), "{said}");
    }
}
