//! Checkpoints written behind the steps: what they hold, what stays, what a failed one leaves, and what is read of them.
use crate::support::{Run, binary, mpirun, random, scratch, tiefsee, tiny};
use parallel::comm::counted::counted;
use parallel::comm::local::{run_local, solo};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tch::Tensor;
use trainer::checkpoint::{self, Found, Manifest, Reader, Retention, Saver};
use trainer::state::StatePart;
use trainer::step::run_beside;

fn head(step: u64) -> Manifest {
    Manifest { step, ..Manifest::imported(tiny(), kernels::Precision::F64) }
}

fn retention() -> Retention {
    Retention { last: 100, every: 0 }
}

fn part(rank: usize, tensor: &Tensor) -> StatePart {
    let rows = tensor.size()[0];
    StatePart { name: "weight/a".into(), tensor: tensor.shallow_clone(), start: rank as i64 * rows, total: 2 * rows }
}

#[test]
fn a_checkpoint_holds_the_state_of_its_step_whatever_the_steps_after_write() {
    let run_dir = scratch().join("behind");
    run_local(2, |world| {
        let mut saver = Saver::new(&run_dir, retention());
        let mut state = random(world.rank() as u64, &[600, 1000]);
        let first = state.copy();
        for step in 1..=3 {
            let before = saver.begin(&*world, head(step), vec![part(world.rank(), &state)]).expect("a save begins");
            let before: Vec<_> = before.into_iter().map(|saved| (saved.step, saved.outcome)).collect();
            assert_eq!(before, if step > 1 { vec![(step - 1, Ok(()))] } else { Vec::new() }, "the save before ended first");
            // Under the next step, before its update.
            let ((), _) = run_beside(saver.take_copy().into_iter().collect(), || ());
            state += 1.0;
        }
        let ended = loop {
            if let Some(saved) = saver.poll(&*world).expect("a poll") {
                break saved;
            }
        };
        assert_eq!((ended.step, ended.outcome), (3, Ok(())));
        assert!(saver.poll(&*world).expect("a poll").is_none() && saver.wait(&*world).expect("no wait").is_none());
        for (step, path) in checkpoint::list(&run_dir).expect("a list") {
            let (_, tensors) = checkpoint::load(&path, |_| true).expect("whole");
            let mine = tensors["weight/a"].narrow(0, 600 * world.rank() as i64, 600);
            assert!(mine.equal(&(&first + (step - 1) as f64)), "step {step}");
        }
    });
    assert_eq!(checkpoint::list(&run_dir).expect("a list").len(), 3);
}

#[test]
fn what_ranks_have_written_goes_to_rank_0_alone() {
    let run_dir = scratch().join("told");
    // Bytes that each rank sends of it.
    let sent = run_local(4, |world| {
        let (world, traffic) = counted(world, &[0; 4]);
        let part = |number: usize| StatePart { name: format!("weight/{}{number}", "a".repeat(1000)), ..part(world.rank(), &random(1, &[1, 2])) };
        let parts = (0..50).map(|number| StatePart { total: 4, ..part(number) }).collect();
        checkpoint::save(&*world, &run_dir, head(1), parts).expect("a checkpoint");
        traffic.inside_bytes()
    });
    assert!(sent[0] < 1000 && sent[1..].iter().all(|sent| (50_000..70_000).contains(sent)), "{sent:?}");
    assert_eq!(checkpoint::verify(&checkpoint::folder(&run_dir).join("step-00000001")).expect("whole").tensors.len(), 50);
}

#[test]
fn a_save_that_is_waited_for_writes_the_state_itself_and_keeps_none_of_it() {
    let run_dir = scratch().join("waited-for");
    let (mut saver, mut state) = (Saver::new(&run_dir, retention()), random(3, &[600, 1000]));
    let first = state.copy();
    let one = |state: &Tensor| vec![StatePart { total: 600, ..part(0, state) }];
    saver.begin(&*solo(), head(1), one(&state)).expect("a save begins");
    saver.wait(&*solo()).expect("an end");
    state += 1.0;
    // Were the state's own memory taken for the copy, the copy would change with it.
    saver.begin(&*solo(), head(2), one(&state)).expect("a save begins");
    let copy = saver.take_copy().expect("one is to be made");
    run_beside(vec![copy], || ());
    state += 1.0;
    saver.wait(&*solo()).expect("an end");
    for (step, path) in checkpoint::list(&run_dir).expect("a list") {
        assert!(checkpoint::load(&path, |_| true).expect("whole").1["weight/a"].equal(&(&first + (step - 1) as f64)), "step {step}");
    }
}

#[test]
fn a_rank_that_cannot_write_fails_the_save_on_all_and_leaves_the_one_before() {
    let run_dir = scratch().join("cannot-write");
    run_local(2, |world| {
        let mut saver = Saver::new(&run_dir, retention());
        let state = random(1, &[4, 4]);
        saver.begin(&*world, head(1), vec![part(world.rank(), &state)]).expect("a save begins");
        saver.wait(&*world).expect("an end");
        // Two tensors of one name are no file.
        let parts = if world.rank() == 1 { vec![part(1, &state), part(1, &state)] } else { vec![part(0, &state)] };
        saver.begin(&*world, head(2), parts).expect("a save begins");
        let ended = saver.wait(&*world).expect("an end").expect("of step 2");
        let error = ended.outcome.expect_err("a failure");
        assert!(error.starts_with("rank 1: "), "{error}");
        saver.begin(&*world, head(3), vec![part(world.rank(), &state)]).expect("a save begins");
        assert_eq!(saver.wait(&*world).expect("an end").map(|saved| saved.outcome), Some(Ok(())));
    });
    let steps: Vec<u64> = checkpoint::list(&run_dir).expect("a list").into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [1, 3]);
    assert_eq!(fs::read_dir(run_dir.join("checkpoints")).expect("a folder").count(), 2, "nothing half written is left");
}

#[test]
fn the_one_before_stays_until_somebody_answers_for_the_newest() {
    let run_dir = scratch().join("answered-for");
    let retention = Retention { last: 1, every: 0 };
    let steps = || checkpoint::list(&run_dir).expect("a list").into_iter().map(|(step, _)| step).collect::<Vec<u64>>();
    let (mut saver, state) = (Saver::new(&run_dir, retention), random(3, &[6, 10]));
    let parts = || vec![StatePart { total: 6, ..part(0, &state) }];
    for step in 1..=2 {
        saver.begin(&*solo(), head(step), parts()).expect("a save begins");
        saver.wait(&*solo()).expect("an end");
    }
    drop(saver); // what it removes is gone then
    assert_eq!(steps(), [1, 2], "of a state that nobody has looked at since");
    let mut saver = Saver::new(&run_dir, retention);
    saver.begin(&*solo(), head(3), parts()).expect("a save begins");
    saver.wait(&*solo()).expect("an end");
    saver.begin(&*solo(), head(4), parts()).expect("the run has gone on");
    assert_eq!(steps(), [3]);
    run_beside(saver.take_copy().into_iter().collect(), || ());
    while saver.poll(&*solo()).expect("a poll").is_none() {}
    saver.removed();
    assert_eq!(steps(), [3, 4], "of a state that nobody has looked at since");
    let mut skipping = head(5);
    skipping.progress.guard.in_a_row = 1;
    let skipped = skipping.progress.guard.clone();
    saver.begin(&*solo(), skipping, parts()).expect("a save begins");
    saver.wait(&*solo()).expect("an end");
    saver.removed();
    assert_eq!(steps(), [3, 4, 5], "the state may be the reason that a step was skipped");
    saver.remove_old(5, &skipped);
    saver.removed();
    assert_eq!(steps(), [3, 4, 5]);
    saver.remove_old(6, &skipped);
    drop(saver);
    assert_eq!(steps(), [4, 5], "a step has gone well meanwhile");
}

#[test]
fn a_folder_that_cannot_be_made_hides_no_save_before() {
    let run_dir = scratch().join("no-folder");
    let (mut saver, state) = (Saver::new(&run_dir, retention()), random(3, &[6, 10]));
    let mut begin = |step| saver.begin(&*solo(), head(step), vec![StatePart { total: 6, ..part(0, &state) }]).expect("an answer");
    assert!(begin(1).is_empty());
    fs::write(run_dir.join("checkpoints/.step-00000002.partial"), "a file, which is no folder to be removed").expect("written");
    let ended: Vec<(u64, bool)> = begin(2).into_iter().map(|saved| (saved.step, saved.outcome.is_ok())).collect();
    assert_eq!(ended, [(1, true), (2, false)]);
}

/// The files of a process may have so many KiB, as on a disk that is full.
pub fn with_room(kib: u64, run: &Run, rest: &[&str]) -> (Option<i32>, String) {
    let script = format!("trap '' XFSZ; ulimit -f {kib}; exec \"$0\" \"$@\"");
    let output = Command::new("bash")
        .args(["-c", &script])
        .arg(binary())
        .args(["resume", &run.dir().display().to_string()])
        .args(rest)
        .env_remove("OMPI_COMM_WORLD_RANK")
        .output()
        .expect("bash starts");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.code(), text)
}

#[test]
fn a_full_disk_costs_checkpoints_but_no_step() {
    let set = ["checkpoint.every=4", "run.stop_after=4", "validation.every=0", "ema.decay=0.5"];
    let whole = Run::new("disk-whole", &["validation.every=0", "ema.decay=0.5"]);
    assert_eq!(tiefsee(&whole.train_args()).status().expect("tiefsee starts").code(), Some(0));
    let run = Run::new("disk-full", &set);
    assert_eq!(tiefsee(&run.train_args()).status().expect("tiefsee starts").code(), Some(75));
    let (code, said) = with_room(1, &run, &["--stop-after", "10"]); // less than its logs have by now
    assert_eq!(code, Some(1), "no checkpoint, no 75: {said}");
    let failed = |step: u64| said.lines().any(|line| line.contains(&format!("step-{step:08} was NOT written: rank 0: cannot write")));
    assert!(failed(8) && failed(10), "{said}");
    assert!(said.contains("the newest whole one is") && said.contains("there is no checkpoint of step 10"), "{said}");
    assert!((5..=10).all(|step| said.contains(&format!("\nstep {step}/30 | "))), "it went on: {said}");
    let told = |log: &str| said.lines().filter(|line| line.contains("WARN cannot write ") && line.contains(log)).count();
    assert_eq!(told("/rank-0.jsonl: "), 1, "once, not with every line: {said}");
    assert!(told("/events.out.tfevents.") >= 1, "{said}"); // a smaller record may still have found room
    assert_eq!(run.lines().len(), 4, "none is half written");
    for file in fs::read_dir(run.dir().join("tensorboard")).expect("a folder") {
        let bytes = fs::read(file.expect("an entry").path()).expect("an event file");
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().expect("eight")) as usize;
            rest = &rest[12 + length + 4..];
        }
    }
    assert!(run.newest_checkpoint().ends_with("step-00000004"));
    assert_eq!(fs::read_dir(run.dir().join("checkpoints")).expect("a folder").count(), 1, "nothing half written is left");
    // With room again it is the undisturbed run: averages and the guard's medians, too.
    assert_eq!(tiefsee(&["resume".into(), run.dir().display().to_string()]).status().expect("tiefsee starts").code(), Some(0));
    assert_eq!(run.series("loss"), whole.series("loss"));
    let (a, b) = (run.state(), whole.state());
    assert!(a.keys().eq(b.keys()) && a.iter().all(|(name, tensor)| tensor.equal(&b[name])));
    assert!(a.keys().any(|name| name.starts_with("ema/")));
    let guard = |run: &Run| run.manifest()["progress"]["guard"].clone();
    assert_eq!(guard(&run), guard(&whole));
    assert_eq!(guard(&run)["losses"].as_array().map(Vec::len), Some(12), "of the second phase, whose samples are longer");
}

#[test]
fn the_newest_and_every_so_many_stay_and_each_save_says_its_stall() {
    let set = ["checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=4", "run.stop_after=10", "validation.every=0"];
    let run = Run::new("kept", &set);
    mpirun(2, &run.train_args(), 75);
    let steps = || checkpoint::list(run.dir()).expect("a list").into_iter().map(|(step, _)| step).collect::<Vec<u64>>();
    assert_eq!(steps(), [4, 8, 9, 10]);
    let stalls: Vec<bool> = run.lines().iter().map(|line| line["save_stall_ms"].as_f64().is_some_and(|ms| ms > 0.0)).collect();
    assert_eq!(stalls, [vec![false], vec![true; 9]].concat(), "a save before every step but the first");
    // By hand: no whole one goes for the sake of a damaged one.
    fs::write(run.newest_checkpoint().join("manifest.json"), "{}").expect("the manifest");
    let prune = |more: &[&str]| {
        let words: Vec<String> = ["checkpoint", "prune", &run.dir().display().to_string(), "--keep-last", "2"]
            .into_iter()
            .chain(more.iter().copied())
            .map(String::from)
            .collect();
        let output = tiefsee(&words).output().expect("tiefsee starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).to_string()
    };
    let said = prune(&["--dry-run"]);
    assert!(said.contains("step-00000010 is damaged") && said.contains("would remove") && said.contains("step-00000004"), "{said}");
    assert_eq!(steps(), [4, 8, 9, 10]);
    prune(&[]);
    assert_eq!(steps(), [8, 9, 10]);
}

#[test]
fn a_damaged_checkpoint_does_not_count_among_the_newest() {
    let set = ["checkpoint.every=2", "checkpoint.keep_last=2", "checkpoint.keep_every=0", "validation.every=0", "run.stop_after=5"];
    let run = Run::new("kept-damaged", &set);
    let resume = |last: u64| tiefsee(&["resume".into(), run.dir().display().to_string(), "--stop-after".into(), last.to_string()]).status();
    assert_eq!(tiefsee(&run.train_args()).status().expect("it runs").code(), Some(75));
    // Twice the same step: neither damaged one is lost, and none is one of the two.
    for (last, kept) in [(5, [4, 5]), (6, [4, 6])] {
        let shard = run.newest_checkpoint().join("shard-00000-of-00001.safetensors");
        let mut bytes = fs::read(&shard).expect("a shard");
        *bytes.last_mut().expect("not empty") ^= 1;
        fs::write(&shard, bytes).expect("the shard");
        assert_eq!(resume(last).expect("it runs").code(), Some(75));
        let steps: Vec<u64> = checkpoint::list(run.dir()).expect("a list").into_iter().map(|(step, _)| step).collect();
        assert_eq!(steps, kept);
    }
    for aside in ["damaged-step-00000005", "damaged-step-00000005-2"] {
        assert!(run.dir().join("checkpoints").join(aside).join("manifest.json").exists(), "{aside}");
    }
}

/// One checkpoint by `ranks` ranks: rows of two tensors, the second too small for all of them to have some.
pub fn sharded(run_dir: &Path, ranks: usize) -> PathBuf {
    run_local(ranks, |world| {
        let whole = [("weight/a", random(1, &[40, 3, 5])), ("weight/b", random(2, &[5, 2]))];
        let share = |of: i64| (of * world.rank() as i64 / ranks as i64, of * (world.rank() as i64 + 1) / ranks as i64);
        let part = |(name, whole): &(&str, Tensor)| {
            let total = whole.size()[0];
            let (start, end) = share(total);
            (start < end).then(|| StatePart { name: name.to_string(), tensor: whole.narrow(0, start, end - start), start, total })
        };
        checkpoint::save(&*world, run_dir, head(1), whole.iter().filter_map(part).collect()).expect("a checkpoint")
    })
    .remove(0)
}

#[test]
fn a_reshard_reads_every_byte_once_and_changes_none() {
    let renamed = scratch().join("resharded-renamed/step-00000009");
    let error = checkpoint::reshard(&sharded(&scratch().join("reshard-renamed"), 2), &renamed, 1).err().expect("refused");
    assert!(error.to_string().contains("step-00000009: ") && error.to_string().ends_with("the copy would count as renamed"), "{error}");
    assert!(!renamed.exists());
    let bytes = 8 * (40 * 3 * 5 + 5 * 2);
    for (from, to) in [(1, 8), (8, 3)] {
        let checkpoint = sharded(&scratch().join(format!("reshard-{from}")), from);
        let out = scratch().join(format!("reshard-{from}-{to}"));
        let done = checkpoint::reshard(&checkpoint, &out, to).expect("a reshard");
        assert_eq!(done.bytes_read, bytes, "{from} to {to}");
        let written = checkpoint::verify(&out).expect("whole");
        assert_eq!(written.files.len(), to);
        let (a, b) = (checkpoint::load(&checkpoint, |_| true).expect("the old").1, checkpoint::load(&out, |_| true).expect("the new").1);
        assert!(a.len() == 2 && a.iter().all(|(name, tensor)| tensor.equal(&b[name])));
        assert!(checkpoint::reshard(&checkpoint, &out, to).err().is_some_and(|error| error.to_string().contains("exists already")));
        let too_many = checkpoint::reshard(&checkpoint, &out.with_extension("many"), 41).err().expect("a file would be empty");
        assert!(too_many.to_string().starts_with("--files 41: no tensor has more than 40 rows"), "{too_many:#}");
        // A reader of another layout takes its rows and no other byte.
        let mut reader = Reader::open(&out).expect("a reader");
        let rows = reader.rows("weight/a", &[40, 3, 5], 13, 14).expect("rows");
        assert!(rows.equal(&a["weight/a"].narrow(0, 13, 14)));
        assert_eq!(reader.tensor_bytes_read(), 8 * 14 * 15);
    }
}

/// Rows 0 to 40 of `weight/a`, by ranks that share them out evenly; what each read, and how many bytes of files that was.
fn load_rows(run_dir: &Path, ranks: usize) -> Vec<(Tensor, u64, Vec<String>)> {
    run_local(ranks, |world| {
        let rows = 40 / ranks as i64;
        let target = Tensor::zeros([rows, 3, 5], (tch::Kind::Double, tch::Device::Cpu));
        let mut bytes = 0;
        let mut load = |reader: &mut Reader| {
            reader.fill("weight/a", &[40, 3, 5], rows * world.rank() as i64, &target)?;
            reader.read()?;
            bytes = reader.tensor_bytes_read();
            Ok(())
        };
        let Found { newest, notes, .. } = checkpoint::load_newest(&*world, run_dir, None, &mut load).expect("an answer");
        assert!(newest.is_some(), "{notes:?}");
        (target, bytes, notes)
    })
}

#[test]
fn a_load_checks_what_it_reads_in_the_same_pass() {
    let run_dir = scratch().join("one-pass");
    let checkpoint = sharded(&run_dir, 4);
    let whole = random(1, &[40, 3, 5]);
    let manifest = checkpoint::verify(&checkpoint).expect("whole");
    let file = |rank: usize| manifest.files[rank].bytes;
    for ranks in [4, 2] {
        for (rank, (rows, bytes, _)) in load_rows(&run_dir, ranks).into_iter().enumerate() {
            let each = 40 / ranks as i64;
            assert!(rows.equal(&whole.narrow(0, each * rank as i64, each)), "rank {rank} of {ranks}");
            // Of 4: its own file, once. Of 2: rank 0 checks files 0 and 2 and needs 0 and 1, rank 1 checks 1 and 3 and needs 2 and 3.
            let expected = if ranks == 4 { file(rank) } else { file(3 * rank) + 8 * 10 * 15 };
            assert_eq!(bytes, expected, "rank {rank} of {ranks}");
        }
    }
}

#[test]
fn rows_of_a_damaged_checkpoint_give_way_to_those_of_the_one_before() {
    let run_dir = scratch().join("gives-way");
    let old = sharded(&run_dir, 2);
    let newer = run_dir.join("checkpoints/step-00000002");
    run_local(2, |world| {
        let state = random(8, &[20, 3, 5]);
        checkpoint::save(&*world, &run_dir, head(2), vec![part(world.rank(), &state)]).expect("a checkpoint");
    });
    let newest = random(8, &[20, 3, 5]);
    assert!(load_rows(&run_dir, 2).iter().all(|(rows, ..)| rows.equal(&newest)));
    // Of one rank's file, beyond all that anybody wants of it: what the header says of the tensors.
    let shard = newer.join("shard-00001-of-00002.safetensors");
    let mut bytes = fs::read(&shard).expect("a shard");
    let at = bytes.windows(2).position(|pair| pair == b"pt").expect("the format's name");
    bytes[at] = b'q';
    fs::write(&shard, bytes).expect("the shard");
    let whole = checkpoint::load(&old, |_| true).expect("whole").1;
    for (rank, (rows, _, notes)) in load_rows(&run_dir, 2).into_iter().enumerate() {
        assert!(rows.equal(&whole["weight/a"].narrow(0, 20 * rank as i64, 20)), "rank {rank}");
        assert!(notes.len() == 1 && notes[0].contains("step-00000002 is damaged"), "{notes:?}");
    }
}

#[test]
fn a_resharded_checkpoint_resumes() {
    let run = Run::new("resharded", &["run.stop_after=6", "validation.every=0"]);
    mpirun(2, &run.train_args(), 75);
    let whole = Run::new("resharded-not", &["run.stop_after=9", "validation.every=0"]);
    mpirun(2, &whole.train_args(), 75);
    let old = run.newest_checkpoint();
    let aside = run.dir().join("old");
    fs::rename(&old, &aside).expect("aside");
    let words = ["checkpoint", "reshard", &aside.display().to_string(), &old.display().to_string(), "--files", "5"].map(String::from);
    assert!(tiefsee(&words).status().expect("tiefsee starts").success());
    mpirun(2, &["resume".into(), run.dir().display().to_string(), "--stop-after".into(), "9".into()], 75);
    assert_eq!(run.series("loss"), whole.series("loss"));
}
