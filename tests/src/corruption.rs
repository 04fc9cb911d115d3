//! A thousand ways to spoil a checkpoint, each noticed: nothing of a damaged one is taken, the newest whole one is.
use crate::chaos::Random;
use crate::support::{Run, mpirun, random, scratch, tiefsee};
use parallel::comm::local::{run_local, solo};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use trainer::checkpoint::{self, Cursor, Manifest};
use trainer::state::StatePart;

const CORRUPTIONS: u64 = 1000;
const STEPS: [u64; 3] = [3, 6, 9];
const RANKS: usize = 3;

/// Three checkpoints of three ranks, in a folder of its own.
fn series(name: &str) -> PathBuf {
    let run_dir = scratch().join("corruption").join(name);
    for step in STEPS {
        run_local(RANKS, |world| {
            let rank = world.rank() as i64;
            let part = |name: &str, rows: i64| StatePart {
                name: name.into(),
                tensor: random(100 * step + rank as u64, &[rows, 7]),
                start: rank * rows,
                total: rows * RANKS as i64,
            };
            let head = Manifest { step, tokens: 1000 * step, cursor: Cursor { order: 0, next: 8 * step }, ..head() };
            checkpoint::save(&*world, &run_dir, head, vec![part("weight/a", 5), part("first/a", 5), part("weight/b", 2)])
                .expect("a checkpoint");
        });
    }
    run_dir
}

fn head() -> Manifest {
    Manifest::imported(crate::support::small(), kernels::Precision::F64)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
    found.sort();
    found
}

/// Back to what was written, whatever has happened.
fn restore(original: &Path, copy: &Path) {
    let _ = fs::remove_dir_all(copy);
    for (step, path) in checkpoint::list(original).expect("a list") {
        let to = copy.join(format!("checkpoints/step-{step:08}"));
        fs::create_dir_all(&to).expect("a folder");
        for file in files(&path) {
            fs::copy(&file, to.join(file.file_name().expect("a name"))).expect("a copy");
        }
    }
}

/// Spoils something below `run_dir`; says what, and which checkpoints are damaged by it.
fn spoil(run_dir: &Path, random: &mut Random) -> (String, BTreeSet<PathBuf>) {
    let mut all: Vec<PathBuf> = checkpoint::list(run_dir).expect("a list").into_iter().map(|(_, path)| path).collect();
    // The newest in half of the cases: it is the one that a resume would take.
    let at = if random.below(2) == 0 { all.len() - 1 } else { random.below(all.len() as u64) as usize };
    let pick = |folder: &Path, random: &mut Random| {
        let mut files = files(folder);
        files.swap_remove(random.below(files.len() as u64) as usize)
    };
    let file = pick(&all[at], random);
    let named = |what: &str| format!("{what} {}", file.display());
    let bytes = fs::read(&file).expect("a file");
    let what = match random.below(6) {
        0 => {
            let length = random.below(bytes.len() as u64) as usize;
            fs::write(&file, &bytes[..length]).expect("a shorter file");
            named(&format!("cut to {length} bytes:"))
        }
        1 => {
            let (byte, bit) = (random.below(bytes.len() as u64) as usize, random.below(8));
            let mut flipped = bytes;
            flipped[byte] ^= 1 << bit;
            fs::write(&file, flipped).expect("the file");
            named(&format!("flipped bit {bit} of byte {byte}:"))
        }
        2 => {
            let other = loop {
                let folder = &all[random.below(all.len() as u64) as usize].clone();
                let other = pick(folder, random);
                if other != file {
                    break other;
                }
            };
            fs::write(&file, fs::read(&other).expect("a file")).expect("the one");
            fs::write(&other, bytes).expect("the other");
            let damaged = [&file, &other].map(|file| file.parent().expect("a checkpoint").to_path_buf());
            return (format!("swapped {} with {}", file.display(), other.display()), damaged.into());
        }
        3 => {
            fs::remove_file(&file).expect("it goes");
            named("deleted")
        }
        4 => {
            fs::rename(&file, file.with_extension(format!("old-{}", random.below(100)))).expect("another name");
            named("renamed")
        }
        _ => {
            // Another step's name, older or newer than all or between two.
            let to = all[at].with_file_name(format!("step-{:08}", [1, 4, 7, 12][random.below(4) as usize]));
            fs::rename(&all[at], &to).expect("another name");
            all[at] = to;
            format!("renamed to {}", all[at].display())
        }
    };
    (what, [all[at].clone()].into())
}

#[test]
fn of_a_thousand_corruptions_each_is_noticed_and_the_newest_whole_checkpoint_used() {
    let original = series("original");
    let run_dir = scratch().join("corruption/spoilt");
    let mut random = Random(20);
    for corruption in 0..CORRUPTIONS {
        restore(&original, &run_dir);
        let (what, damaged) = spoil(&run_dir, &mut random);
        let all: Vec<PathBuf> = checkpoint::list(&run_dir).expect("a list").into_iter().map(|(_, path)| path).collect();
        for path in &all {
            let verdict = checkpoint::verify(path);
            assert_eq!(verdict.is_err(), damaged.contains(path), "{what}: {} is {:?}", path.display(), verdict.err());
        }
        let expected = all.iter().rev().find(|path| !damaged.contains(*path)).expect("three checkpoints, at most two damaged");
        let passed_over: Vec<&PathBuf> = all.iter().rev().take_while(|path| *path != expected).collect();
        // What resume does, on one rank and, now and then, with the files shared out among three.
        let check = |(found, notes): (Option<PathBuf>, Vec<String>)| {
            assert_eq!(found.as_ref(), Some(expected), "{what}: {notes:?}");
            assert_eq!(notes.len(), passed_over.len(), "{what}: {notes:?}");
            for (note, path) in notes.iter().zip(&passed_over) {
                assert!(note.starts_with(&format!("{} is damaged and was passed over: ", path.display())), "{what}: {note}");
                assert!(!note.contains('\n'), "one line: {note}");
            }
        };
        check(checkpoint::newest_whole(&*solo(), &run_dir).expect("an answer"));
        if corruption % 20 == 0 {
            run_local(3, |world| check(checkpoint::newest_whole(&*world, &run_dir).expect("an answer")));
        }
    }
}

#[test]
fn a_run_without_a_whole_checkpoint_says_what_is_wrong_with_each() {
    let run_dir = series("none-left");
    for (_, path) in checkpoint::list(&run_dir).expect("a list") {
        fs::remove_file(path.join("manifest.json")).expect("it goes");
    }
    fs::create_dir_all(run_dir.join("checkpoints/.step-00000012.partial")).expect("a folder");
    let (found, notes) = checkpoint::newest_whole(&*solo(), &run_dir).expect("an answer");
    assert_eq!((found, notes.len()), (None, 4), "{notes:?}");
    assert!(notes[0].contains("was never finished"), "{notes:?}");
}

#[test]
fn the_command_resumes_from_the_newest_whole_one_and_verify_names_the_damaged() {
    let set = ["checkpoint.every=3", "checkpoint.keep_last=9", "run.stop_after=9", "validation.every=0"];
    let whole = Run::new("corruption-whole", &set);
    let args = whole.train_args();
    assert_eq!(tiefsee(&args).status().expect("tiefsee starts").code(), Some(75));
    for (index, file) in ["shard-00000-of-00002.safetensors", "manifest.json"].iter().enumerate() {
        let run = Run::new(&format!("corruption-{index}"), &set);
        mpirun(2, &run.train_args(), 75);
        let spoilt = run.newest_checkpoint();
        let mut bytes = fs::read(spoilt.join(file)).expect("a file");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(spoilt.join(file), bytes).expect("the file");
        let words = ["checkpoint", "verify", &run.dir().display().to_string()].map(String::from);
        let output = tiefsee(&words).output().expect("tiefsee starts");
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1));
        assert!(said.contains("step-00000009: DAMAGED: ") && said.contains("step-00000006: whole"), "{said}");
        // Steps 7 to 9 again, from step 6.
        let said = mpirun(2, &["resume".into(), run.dir().display().to_string(), "--stop-after".into(), "9".into()], 75);
        let note = said.lines().find(|line| line.contains("is damaged and was passed over")).unwrap_or_else(|| panic!("{said}"));
        assert!(note.contains("step-00000009") && said.contains("step-00000006 (step 6"), "{said}");
        checkpoint::verify(&run.newest_checkpoint()).expect("written anew");
        run.assert_same(&whole, 1e-9);
    }
}
