//! The second tier: a node's own folder, and a copy on the next node. With a node and the newest checkpoints gone the run
//! goes on from it, and is the undisturbed run.
use crate::support::{Run, scratch};
use parallel::comm::local::run_local;
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
    let of_run = fs::read_dir(dir).expect("a folder").next().expect("the run's").expect("an entry").path();
    of_run.join(format!("node-{node}"))
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

#[test]
fn a_damaged_copy_is_not_taken_and_without_a_whole_one_the_step_before_is() {
    let (run, dir) = crashed("damaged");
    let shard = |node: usize, rank: usize| -> PathBuf {
        let labels = fs::read_dir(self::node(&dir, node)).expect("steps").map(|entry| entry.expect("an entry").path());
        let newest = labels.max().expect("a step");
        newest.join(format!("rank-{rank}")).join(format!("shard-{rank:05}-of-{RANKS:05}.safetensors"))
    };
    let spoil = |path: &Path| {
        let mut bytes = fs::read(path).expect("a shard");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(path, bytes).expect("the shard");
    };
    // One of the two copies of a shard: the other is taken.
    spoil(&shard(0, 1));
    let tier = || {
        run_local(RANKS, |world| {
            let config = run.config();
            let nodes = [0, 0, 1, 1];
            let tier =
                checkpoint::second_tier::SecondTier::new(&config.checkpoint.second_tier, run.dir(), &nodes, &*world).expect("a tier");
            let (found, notes) = checkpoint::load_newest(&*world, run.dir(), Some(&tier), &mut |_| Ok(())).expect("an answer");
            (found.map(|(path, _)| path), notes)
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
