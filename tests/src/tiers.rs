//! The second tier: a node's own folder, and a copy on the next node. With a node and the newest checkpoints gone the run
//! goes on from it, and is the undisturbed run.
use crate::checkpoint::with_room;
use crate::support::{Run, scratch, tiefsee};
use parallel::comm::local::{run_local, solo};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use trainer::checkpoint;
use trainer::coordinator::StopSignal;
use trainer::run::{Start, train};

/// Two nodes of two ranks each.
const RANKS: usize = 4;

fn run(name: &str) -> (Run, PathBuf) {
    let dir = scratch().join(format!("tier-{name}"));
    fs::create_dir_all(&dir).expect("a folder");
    let tier = format!("checkpoint.second_tier={{every=1,dir=\"{}\"}}", dir.display());
    let set = [tier.as_str(), "parallel.ranks_per_node=2", "parallel.pp=2", "checkpoint.every=4", "validation.every=0", "ema.decay=0.5"];
    (Run::new(&format!("tier-{name}"), &set), dir)
}

fn go(run: &Run, start: Start, stop_after: Option<u64>) -> Result<(), String> {
    go_in(run.dir(), run, start, stop_after)
}

/// With the run directory as somebody has named it.
fn go_in(dir: &Path, run: &Run, start: Start, stop_after: Option<u64>) -> Result<(), String> {
    let mut config = run.config();
    (config.run.dir, config.run.stop_after) = (dir.to_path_buf(), stop_after);
    let outcomes =
        run_local(RANKS, |world| train(&config, world, start, &StopSignal::default()).map(|_| ()).map_err(|error| format!("{error:#}")));
    outcomes.into_iter().collect()
}

fn node(dir: &Path, node: usize) -> PathBuf {
    let only = |folder: &Path| fs::read_dir(folder).expect("a folder").next().expect("one").expect("an entry").path();
    only(&only(dir)).join(format!("node-{node}"))
}

fn newest_shard(dir: &Path, node: usize, rank: usize) -> PathBuf {
    let labels = fs::read_dir(self::node(dir, node)).expect("steps").map(|entry| entry.expect("an entry").path());
    let newest = labels.max().expect("a step");
    newest.join(format!("rank-{rank}")).join(format!("shard-{rank:05}-of-{RANKS:05}.safetensors"))
}

fn spoil(shard: &Path) {
    let mut bytes = fs::read(shard).expect("a shard");
    *bytes.last_mut().expect("not empty") ^= 1;
    fs::write(shard, bytes).expect("the shard");
}

/// As a crash after step 10 leaves it: the checkpoint that the stop has made is not there.
fn crashed(name: &str) -> (Run, PathBuf) {
    let (run, dir) = run(name);
    go(&run, Start::Fresh, Some(10)).expect("ten steps");
    assert!(run.newest_checkpoint().ends_with("step-00000010"));
    fs::remove_dir_all(run.newest_checkpoint()).expect("it goes");
    assert!(run.newest_checkpoint().ends_with("step-00000008"));
    (run, dir)
}

#[test]
fn with_a_node_wiped_a_run_goes_on_from_the_copies_on_the_other() {
    let (whole, kept) = run("whole");
    go(&whole, Start::Fresh, None).expect("the run");
    assert_eq!(fs::read_dir(&kept).expect("a folder").count(), 0, "a run that is over leaves no copies");
    let marker = |run: &Run| run.dir().join("second-tier"); // by which the launcher knows that there is something to resume
    assert!(!marker(&whole).exists());
    for (wiped, disk_too) in [(0, false), (1, false), (0, true)] {
        let (run, dir) = crashed(&format!("wiped-{wiped}-{disk_too}"));
        fs::remove_dir_all(node(&dir, wiped)).expect("it goes");
        assert!(marker(&run).exists());
        if disk_too {
            fs::remove_dir_all(run.dir().join("checkpoints")).expect("they go");
            let error = go(&run, Start::Fresh, Some(9)).expect_err("its copies are a run");
            assert!(error.contains("already holds a run: resume it"), "{error}");
        }
        go(&run, Start::Resume, Some(9)).expect("nothing to do");
        checkpoint::verify(&run.newest_checkpoint()).expect("an ordinary checkpoint");
        assert!(run.newest_checkpoint().ends_with("step-00000010"), "restored, not done again");
        go(&run, Start::Resume, None).expect("the rest");
        for key in ["loss", "grad_norm"] {
            assert_eq!(run.series(key), whole.series(key), "{key}");
        }
        let (a, b) = (run.state(), whole.state());
        assert!(a.keys().eq(b.keys()) && a.iter().all(|(name, tensor)| tensor.equal(&b[name])), "another state with node {wiped} wiped");
    }
}

/// One rank with copies of every step; `faults` as a list, the last of them a kill.
fn dying(name: &str, set: &[&str], faults: &[&str]) -> Run {
    let dir = scratch().join(format!("tier-{name}"));
    fs::create_dir_all(&dir).expect("a folder");
    let tier = format!("checkpoint.second_tier={{every=1,dir=\"{}\"}}", dir.display());
    let faults = format!("faults.inject=[{}]", faults.iter().map(|fault| format!("{{rank=0,{fault}}}")).collect::<Vec<_>>().join(","));
    Run::new(&format!("tier-{name}"), &[&[&tier[..], &faults, "checkpoint.keep_every=0"], set].concat())
}

/// Until the run kills itself: the steps of its checkpoints then.
fn until_killed(run: &Run, args: &[String]) -> Vec<u64> {
    let output = tiefsee(args).output().expect("tiefsee starts");
    assert_eq!(output.status.code(), None, "killed: {}", String::from_utf8_lossy(&output.stderr));
    checkpoint::list(run.dir()).expect("a list").into_iter().map(|(step, _)| step).collect()
}

#[test]
fn checkpoints_made_of_copies_after_crashes_are_kept_no_longer_than_saved_ones() {
    let kills = [5, 8, 11, 14].map(|step| format!("kind=\"kill\",step={step}"));
    let run = dying("crashes", &["checkpoint.every=100", "checkpoint.keep_last=2"], &kills.each_ref().map(String::as_str));
    let resume = ["resume".into(), run.dir().display().to_string()];
    let seen = [&run.train_args()[..], &resume, &resume, &resume].map(|args| until_killed(&run, args).len());
    assert_eq!(seen, [0, 1, 2, 2]);
}

#[test]
fn a_checkpoint_made_of_copies_while_steps_are_skipped_pushes_out_none() {
    let faults = ["kind=\"nan\",step=6", "kind=\"flip-master\",step=7", "kind=\"kill\",step=8"];
    let run = dying("skipping", &["checkpoint.every=5", "checkpoint.keep_last=1"], &faults);
    assert_eq!(until_killed(&run, &run.train_args()), [5, 6]);
    let log = fs::read_to_string(run.dir().join("log/rank-0.jsonl")).expect("a log");
    assert!(log.contains("the state of step 6 is restored from "), "{log}");
}

#[test]
fn a_damaged_copy_is_not_taken_and_without_a_whole_one_the_step_before_is() {
    let (run, dir) = crashed("damaged");
    let shard = |node, rank| newest_shard(&dir, node, rank);
    // One of the two copies of a shard: the other is taken.
    spoil(&shard(0, 1));
    let tier = || {
        run_local(RANKS, |world| {
            let config = run.config();
            let nodes = [0, 0, 1, 1];
            let tier =
                checkpoint::second_tier::SecondTier::new(&config.checkpoint.second_tier, run.dir(), &nodes, false, &*world).expect("a tier");
            let found = checkpoint::load_newest(&*world, run.dir(), Some(&tier), &mut |_| Ok(())).expect("an answer");
            (found.newest.map(|(path, _)| path), found.notes)
        })
        .remove(0)
    };
    let (found, notes) = tier();
    assert!(found.expect("a checkpoint").ends_with("step-00000010"), "{notes:?}");
    assert!(notes.iter().any(|note| note.contains("step 10 is restored from the second tier")), "{notes:?}");
    // Both: the step counts for nothing, and why is said; the copies of the step before are there still.
    fs::remove_dir_all(run.newest_checkpoint()).expect("it goes");
    spoil(&shard(1, 1));
    let (found, notes) = tier();
    assert!(found.expect("a checkpoint").ends_with("step-00000009"), "{notes:?}");
    let note = notes
        .iter()
        .find(|note| note.contains("step 10 of the second tier was passed over: no whole copy of rank 1's shard"))
        .unwrap_or_else(|| panic!("{notes:?}"));
    assert!(note.contains("BLAKE3"), "{note}");
}

#[test]
fn a_disk_without_room_for_the_copies_is_no_damage_of_theirs() {
    for older in [true, false] {
        let dir = scratch().join(format!("tier-no-room-{older}"));
        fs::create_dir_all(&dir).expect("a folder");
        let tier = format!("checkpoint.second_tier={{every=1,dir=\"{}\"}}", dir.display());
        let run = Run::new(&format!("tier-no-room-{older}"), &[&tier, "checkpoint.every=4", "validation.every=0"]);
        let alone = |start, stop_after| {
            let mut config = run.config();
            config.run.stop_after = Some(stop_after);
            train(&config, solo(), start, &StopSignal::default()).map(|_| ()).expect("the run");
        };
        alone(Start::Fresh, 6);
        fs::remove_dir_all(run.newest_checkpoint()).expect("it goes");
        if !older {
            fs::remove_dir_all(run.dir().join("checkpoints")).expect("they go");
        }
        let (code, said) = with_room(1, &run, &[]);
        assert_eq!(code, Some(1), "{said}");
        let shard = run.dir().join("checkpoints/.step-00000006.partial/shard-00000-of-00001.safetensors");
        for text in [&*format!("to {}: File too large", shard.display()), "the copies of step 6 in the second tier are kept"] {
            assert!(said.contains(text), "not said: {text}\n{said}");
        }
        assert!(run.dir().join("second-tier").exists(), "the launcher tries again");
        assert!(!shard.parent().expect("a folder").exists(), "what has no room leaves none of it");
        alone(Start::Resume, 5);
        assert!(run.newest_checkpoint().ends_with("step-00000006"), "restored, not done again");
    }
}

#[test]
fn a_copy_that_cannot_be_read_gives_way_to_the_other_and_to_nothing_else() {
    let (run, dir) = crashed("unread");
    // A link to itself: it is there, and nobody can open it.
    let unread = |file: &Path| {
        fs::rename(file, file.with_extension("kept")).expect("aside");
        symlink(file, file).expect("a link");
    };
    unread(&newest_shard(&dir, 0, 1));
    go(&run, Start::Resume, Some(9)).expect("nothing to do");
    assert!(run.newest_checkpoint().ends_with("step-00000010"), "restored, not done again");

    for (name, file) in [("shard", format!("shard-00001-of-{RANKS:05}.safetensors")), ("manifest", "manifest.json".to_string())] {
        let (run, dir) = crashed(&format!("unread-{name}"));
        let files = [0, 1].map(|node| newest_shard(&dir, node, 1).with_file_name(&file));
        files.iter().for_each(|file| unread(file));
        let error = go(&run, Start::Resume, Some(9)).expect_err("step 8 is no answer");
        assert!(error.starts_with("rank ") && error.contains("it may be whole (mend that, or remove it)"), "{error}");
        assert!(error.contains(&*files[0].to_string_lossy()), "{error}");
        assert!(error.ends_with("the copies of step 10 in the second tier are kept"), "{error}");
        fs::rename(files[0].with_extension("kept"), &files[0]).expect("mended");
        go(&run, Start::Resume, Some(9)).expect("nothing to do");
        assert!(run.newest_checkpoint().ends_with("step-00000010"), "restored, not done again");
    }
}

#[test]
fn a_disk_that_spoils_what_it_was_given_is_no_damage_of_the_copies() {
    let (run, dir) = crashed("spoils");
    let spoilt = run.dir().join("checkpoints/step-00000010").join(format!("shard-00001-of-{RANKS:05}.safetensors"));
    let errors = run_local(RANKS, |world| {
        let section = run.config().checkpoint.second_tier;
        let tier = checkpoint::second_tier::SecondTier::new(&section, run.dir(), &[0, 0, 1, 1], false, &*world).expect("a tier");
        let load = &mut |_: &mut checkpoint::Reader| {
            if world.rank() == 1 && spoilt.exists() {
                spoil(&spoilt);
            }
            Ok(())
        };
        checkpoint::load_newest(&*world, run.dir(), Some(&tier), load).map(|_| ()).expect_err("step 8 is no answer").to_string()
    });
    assert!(errors[0].contains("step-00000010 was whole when it was made of the second tier's copies, which are kept"), "{errors:?}");
    assert!(node(&dir, 0).exists());
    go(&run, Start::Resume, Some(9)).expect("nothing to do");
    assert!(run.newest_checkpoint().ends_with("step-00000010"), "restored, not done again");
    checkpoint::verify(&run.newest_checkpoint()).expect("whole");
}

#[test]
fn copies_that_cannot_become_a_checkpoint_are_kept() {
    let (run, _) = crashed("no-rename");
    // It leads nowhere, and no folder takes its place.
    let target = run.dir().join("checkpoints/step-00000010");
    symlink("nowhere", &target).expect("a link");
    let error = go(&run, Start::Resume, Some(9)).expect_err("no checkpoint");
    assert!(error.starts_with("rank 0: cannot rename ") && error.contains("the copies of step 10 in the second tier are kept"), "{error}");
    fs::remove_file(&target).expect("it goes");
    go(&run, Start::Resume, Some(9)).expect("nothing to do");
    assert!(run.newest_checkpoint().ends_with("step-00000010"), "restored, not done again");
}

#[test]
fn a_run_finds_its_copies_by_whatever_name_its_directory_is_called() {
    let (run, _) = crashed("names");
    let link = scratch().join("tier-names-link");
    symlink(run.dir(), &link).expect("a link");
    for name in [run.dir().join(""), link, run.dir().join("../tier-names")] {
        go_in(&name, &run, Start::Resume, Some(9)).expect("nothing to do");
        assert!(run.newest_checkpoint().ends_with("step-00000010"), "{}: not restored", name.display());
        // As after the crash, by this name.
        fs::remove_dir_all(run.newest_checkpoint()).expect("it goes");
        go_in(&name, &run, Start::Resume, Some(10)).expect("two steps");
        fs::remove_dir_all(run.newest_checkpoint()).expect("it goes");
    }
}

#[test]
fn a_folder_that_is_not_there_is_an_error() {
    let run = Run::new("tier-nowhere", &["checkpoint.second_tier={every=1,dir=\"/dev/null/none\"}"]);
    let error = go(&run, Start::Fresh, Some(1)).expect_err("no folder");
    assert!(error.contains("checkpoint.second_tier.dir = /dev/null/none: there is no such folder"), "{error}");
}

#[test]
fn a_run_that_was_moved_says_where_its_copies_are_and_takes_none_of_its_original_s() {
    let (run, dir) = crashed("moved");
    let (away, copies) = (run.dir().with_file_name("tier-moved-away"), node(&dir, 0).parent().expect("the run's").to_path_buf());
    fs::rename(run.dir(), &away).expect("moved");
    let error = go_in(&away, &run, Start::Resume, Some(9)).expect_err("its copies have another name");
    let named = error.split_once("rename that folder to ").and_then(|(_, rest)| rest.split_once(" on every node")).expect(&error).0;
    assert!(error.contains(&format!("has its newest copies in {}, where", copies.display())), "{error}");
    assert!(copies.exists());
    fs::create_dir_all(Path::new(named).parent().expect("a place")).and_then(|()| fs::rename(&copies, named)).expect("renamed");
    go_in(&away, &run, Start::Resume, Some(9)).expect("nothing to do");
    assert!(away.join("checkpoints/step-00000010").exists(), "restored, not done again");
}

#[test]
fn newer_copies_are_not_passed_over_by_a_start_that_looks_elsewhere() {
    let (run, dir) = crashed("elsewhere");
    let another = scratch().join("tier-elsewhere-another");
    fs::create_dir_all(&another).expect("a folder");
    for (every, dir) in [(0, &dir), (1, &another)] {
        let mut config = run.config();
        (config.checkpoint.second_tier.every, config.checkpoint.second_tier.dir) = (every, dir.clone());
        let resumed = || run_local(RANKS, |world| train(&config, world, Start::Resume, &StopSignal::default()).map(|_| ()));
        let error = resumed().remove(3).expect_err("refused").to_string();
        assert!(error.contains("has newer copies (step-00000010-") && error.contains(&format!("every = {every} and dir = {}", dir.display())), "{error}");
    }
    go(&run, Start::Resume, Some(10)).expect("as before");
    assert!(run.newest_checkpoint().ends_with("step-00000010"));
}

#[test]
fn what_a_node_holds_of_a_run_that_was_removed_counts_for_nothing() {
    let (removed, dir) = crashed("replaced");
    let away = dir.with_file_name("tier-replaced-away");
    let copy = |from: &Path, to: &Path| {
        let done = std::process::Command::new("cp").args(["-a", &format!("{}/.", from.display())]).arg(to).status();
        assert!(done.expect("cp").success());
    };
    copy(&dir, &away);
    fs::remove_dir_all(removed.dir()).expect("removed");
    let (run, _) = self::run("replaced");
    go(&run, Start::Fresh, Some(6)).expect("six steps");
    assert!(newest_shard(&dir, 0, 0).to_string_lossy().contains("step-00000006"), "what was there takes no room");
    fs::remove_dir_all(run.newest_checkpoint()).expect("it goes");
    copy(&away, &dir);
    go(&run, Start::Resume, Some(5)).expect("nothing to do");
    assert!(run.newest_checkpoint().ends_with("step-00000006"), "{}", run.newest_checkpoint().display());
}

#[test]
fn copies_that_cannot_be_listed_are_not_taken_for_none() {
    let (run, dir) = crashed("unlisted");
    let copies = fs::read_dir(&dir).expect("a folder").next().expect("the run's").expect("an entry").path();
    let aside = copies.with_extension("aside");
    fs::rename(&copies, &aside).and_then(|()| fs::write(&copies, "no folder")).expect("in its place");
    let error = go(&run, Start::Resume, Some(9)).expect_err("who knows what there was");
    assert!(error.contains(&format!("rank 0: cannot list {}", copies.display())) && error.contains("there may be copies"), "{error}");
    fs::remove_file(&copies).and_then(|()| fs::rename(&aside, &copies)).expect("back");
    go(&run, Start::Resume, Some(9)).expect("nothing to do");
    assert!(run.newest_checkpoint().ends_with("step-00000010"), "restored, not done again");
}

#[test]
fn a_marker_that_cannot_be_written_ends_no_run() {
    let (run, dir) = run("no-marker");
    fs::create_dir_all(run.dir().join("second-tier")).expect("a folder in its place");
    go(&run, Start::Fresh, Some(3)).expect("three steps");
    assert_eq!(run.lines().len(), 3);
    assert!(node(&dir, 1).exists(), "the copies are there");
}

#[test]
fn a_corrupt_master_is_restored_from_the_copy_of_this_very_step() {
    let (whole, _) = run("clean");
    go(&whole, Start::Fresh, Some(9)).expect("nine steps");
    let (mut bad, _) = run("flipped");
    bad.add("faults.inject=[{kind=\"flip-master\",rank=1,step=7}]");
    go(&bad, Start::Fresh, Some(9)).expect("nine steps");
    let log = fs::read_to_string(bad.dir().join("log/rank-0.jsonl")).expect("a log");
    assert!(log.contains("step 7: the state of step 6 is restored from ") && !log.contains("state lost"), "{log}");
    assert_eq!(bad.series("loss"), whole.series("loss"));
    let (a, b) = (bad.state(), whole.state());
    assert!(a.keys().eq(b.keys()) && a.iter().all(|(name, tensor)| tensor.equal(&b[name])));
}
