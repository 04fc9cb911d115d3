//! What keeps a checkpoint from being read: damage gives way to the one before, what may be whole does not; and how many files
//! are open meanwhile.
use crate::checkpoint::sharded;
use crate::support::{Run, binary, scratch};
use parallel::comm::local::{run_local, solo};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use trainer::checkpoint;
use trainer::coordinator::StopSignal;
use trainer::run::{Start, train};

fn shard(checkpoint: &Path, rank: usize) -> PathBuf {
    checkpoint.join(format!("shard-{rank:05}-of-00002.safetensors"))
}

#[test]
fn a_checkpoint_of_many_files_needs_few_open_ones() {
    let (checkpoint, out) = (sharded(&scratch().join("many-files"), 40), scratch().join("many-files-in-one"));
    let script = "ulimit -n 32; exec \"$0\" checkpoint reshard \"$@\" --files 1";
    let output = Command::new("bash").args(["-c", script]).arg(binary()).args([&checkpoint, &out]).output().expect("bash starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    checkpoint::verify(&out).expect("whole");
}

#[test]
fn what_cannot_be_read_is_not_taken_for_damage() {
    let run_dir = scratch().join("unread");
    let older = sharded(&run_dir, 2);
    let newer = older.with_file_name("step-00000002");
    let aside = sharded(&scratch().join("unread-other"), 2);
    let manifest = checkpoint::Manifest { step: 2, ..checkpoint::verify(&aside).expect("whole") };
    fs::rename(&aside, &newer).expect("beside the other");
    manifest.write(&newer).expect("its manifest");
    let newest = || {
        run_local(2, |world| {
            checkpoint::newest_whole(&*world, &run_dir).map(|(found, _)| found.expect("one is whole")).map_err(|error| error.to_string())
        })
    };
    assert_eq!(newest(), [Ok(newer.clone()), Ok(newer.clone())]);
    // A link to itself: it is there, and nobody can open it.
    let (file, kept) = (shard(&newer, 1), newer.join("kept"));
    fs::rename(&file, &kept).expect("aside");
    symlink(&file, &file).expect("a link");
    for error in newest() {
        let error = error.expect_err("nothing is passed over");
        assert!(error.starts_with(&format!("rank 1: {} could not be read and may be whole", newer.display())), "{error}");
        assert!(error.contains(": cannot read ") && error.contains("shard-00001"), "{error}");
    }
    // Gone, it is not what was written; one of which another file is damaged gives way, too.
    fs::remove_file(&file).expect("it goes");
    assert_eq!(newest(), [Ok(older.clone()), Ok(older.clone())]);
    symlink(&file, &file).expect("a link");
    fs::write(shard(&newer, 0), "short").expect("written");
    assert_eq!(newest(), [Ok(older.clone()), Ok(older)]);
}

#[test]
fn a_run_does_not_begin_with_the_weights_of_another_model() {
    let checkpoint = sharded(&scratch().join("another-model"), 2);
    let run = Run::new("from-another", &[&format!("run.init_from={}", checkpoint.display()), "model.routed_scaling_factor=1.25", "model.max_position_embeddings=300"]);
    let go = |run: &Run| train(&run.config(), solo(), Start::Fresh, &StopSignal::default()).map(|_| ()).map_err(|error| format!("{error:#}"));
    let text = go(&run).expect_err("another model");
    assert!(text.contains("run.init_from") && text.contains("its model has routed_scaling_factor = ") && text.contains("the run's model.routed_scaling_factor is 1.25"), "{text}");
    let without = Run::new("without-mtp", &["model.num_nextn_predict_layers=0", "run.stop_after=1"]);
    go(&without).expect("a step");
    let text = go(&Run::new("with-mtp", &[&format!("run.init_from={}", without.newest_checkpoint().display())])).expect_err("no module");
    assert!(text.ends_with("has no MTP module: model.num_nextn_predict_layers must be 0, it is 1"), "{text}");
}

#[test]
fn a_run_does_not_begin_with_damaged_weights() {
    let checkpoint = sharded(&scratch().join("damaged-weights"), 2);
    let mut bytes = fs::read(shard(&checkpoint, 1)).expect("a shard");
    *bytes.last_mut().expect("not empty") ^= 1;
    fs::write(shard(&checkpoint, 1), bytes).expect("the shard");
    let run = Run::new("from-damaged", &[&format!("run.init_from={}", checkpoint.display())]);
    let config = run.config();
    let errors = run_local(2, |world| {
        train(&config, world, Start::Fresh, &StopSignal::default()).map(|_| ()).expect_err("damaged").to_string()
    });
    for error in errors {
        assert!(error.starts_with("run.init_from: ") && error.ends_with("shard-00001-of-00002.safetensors is not what was written: its BLAKE3 differs"), "{error}");
    }
}

#[test]
fn the_launcher_sees_that_a_start_reads_a_checkpoint() {
    let set = ["validation.every=0", "run.stop_after=2"];
    let first = Run::new("seen-first", &set);
    let start = |run: &Run, start| {
        let config = run.config();
        std::thread::spawn(move || train(&config, solo(), start, &StopSignal::default()).map(|_| ()).expect("the run"))
    };
    start(&first, Start::Fresh).join().expect("two steps");
    let second = Run::new("seen-second", &[set[0], set[1], &format!("run.init_from={}", first.newest_checkpoint().display())]);
    for (run, how) in [(&second, Start::Fresh), (&first, Start::Resume)] {
        // A pipe in the manifest's place: who reads it waits for us.
        let (manifest, kept) = (first.newest_checkpoint().join("manifest.json"), scratch().join("seen-manifest"));
        fs::rename(&manifest, &kept).expect("aside");
        assert!(Command::new("mkfifo").arg(&manifest).status().expect("mkfifo starts").success());
        let running = start(run, how);
        let mut pipe = File::options().write(true).open(&manifest).expect("somebody reads");
        let shown = || run.dir().join("log/saving").exists();
        let seen = shown();
        let text = fs::read(&kept).expect("a manifest");
        fs::rename(&kept, &manifest).expect("back");
        std::io::Write::write_all(&mut pipe, &text).expect("read");
        drop(pipe);
        running.join().expect("two steps");
        assert!(seen && !shown(), "{how:?}: {seen}");
    }
}
