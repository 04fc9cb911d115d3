//! What users meet: errors that name what is wrong, exit codes, TensorBoard, parameter counts, the summary.
use crate::support::{Run, corpus, mpirun, root, scratch, tiefsee};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Runs `tiefsee` and expects an error whose text has every part.
#[track_caller]
fn refused(args: &[String], parts: &[&str]) {
    refused_with(1, args, parts);
}

/// By the config alone, before a world is looked at.
fn misconfigured(run: &Run, parts: &[&str]) {
    refused_with(2, &run.train_args(), parts);
}

fn refused_with(code: i32, args: &[String], parts: &[&str]) {
    let output = tiefsee(args).output().expect("tiefsee starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?} was not refused: {text}");
    for part in parts {
        assert!(text.contains(part), "the error does not say {part}: {text}");
    }
}

fn words(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| arg.to_string()).collect()
}

/// A finished run of a few steps.
fn finished(name: &str) -> Run {
    let run = Run::new(name, &["run.stop_after=2", "checkpoint.every=1"]);
    let output = tiefsee(&run.train_args()).output().expect("it runs");
    assert_eq!(output.status.code(), Some(75), "{}", String::from_utf8_lossy(&output.stderr));
    run
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_right_one() {
    let run = Run::new("unknown-key", &["optimizer.weigth_decay=0.2"]);
    misconfigured(&run, &["tiny.toml", "weigth_decay", "did you mean `weight_decay`?"]);
    let run = Run::new("unknown-model-key", &["model.kv_lora_rnk=3"]);
    misconfigured(&run, &["kv_lora_rnk", "did you mean `kv_lora_rank`?"]);
    let unlike = tiefsee(&Run::new("unlike-key", &["optimizer.lr=0.1"]).train_args()).output().expect("it runs").stderr;
    let unlike = String::from_utf8_lossy(&unlike);
    assert!(unlike.contains("unknown field `lr`") && !unlike.contains("did you mean"), "{unlike}");
    let model = root().join("configs/model/tiny.toml").display().to_string();
    refused(&words(&["plan", "config", &model]), &["configs/model/tiny.toml is a model's file, not a run's"]);
    assert!(!run.dir().exists());
    for (set, parts) in [
        ("data.pata=60", ["unknown field `pata`", "did you mean `patience`?"]),
        ("phase.0.lr.form=0.1", ["unknown field `form`", "did you mean `from`?"]),
        ("phase.1.lr.shape=cosin", ["unknown variant `cosin`", "did you mean `cosine`?"]),
        ("phase.0.batch.multipel=4", ["unknown field `multipel`", "did you mean `multiple`?"]),
        ("phase.1.lr=fast", ["\"fast\", expected a number, or a table of from, to and shape", "in `phase"]),
        ("phase.1.batch=-8", ["`-8`", "in `phase"]),
        ("phase.1.batch={from=4,to=8}", ["missing field `multiple`", "in `phase"]),
    ] {
        misconfigured(&Run::new("unknown-phase-key", &[set]), &parts);
    }
}

#[test]
fn a_run_keeps_what_it_makes_and_where_it_is_told() {
    for (set, parts) in [
        (["checkpoint.every=300", "checkpoint.keep_every=1000"], ["checkpoint.keep_every = 1000", "checkpoint.every = 300"]),
        (["checkpoint.every=0", "checkpoint.keep_every=1000"], ["checkpoint.keep_every = 1000", "checkpoint.every = 0"]),
        (["run.dir=~/runs/a", "run.seed=2"], ["run.dir = \"~/runs/a\"", "~ and $ are for a shell to replace"]),
        (["run.dir=$SCRATCH/a", "run.seed=2"], ["run.dir = \"$SCRATCH/a\"", "~ and $ are for a shell to replace"]),
    ] {
        let run = Run::new("kept-where", &set);
        misconfigured(&run, &parts);
        let args = run.train_args();
        let plan = ["plan", "run", &args[2], "--ranks", "1"].map(String::from);
        refused(&[&plan, &args[3..]].concat(), &parts);
    }
    assert!(!Path::new("~").exists());
}

#[test]
fn a_run_in_a_store_is_refused() {
    for key in ["dir", "init_from"] {
        let set = format!("run.{key}=s3://bucket/run");
        let said = format!("run.{key} = \"s3://bucket/run\": is a URL, and checkpoints are written to and read from file systems only");
        misconfigured(&Run::new("in-a-store", &[&set]), &["tiny.toml", &said]);
    }
    assert!(!Path::new("s3:").exists());
}

#[test]
fn values_that_do_not_fit_together_are_refused_with_their_numbers() {
    refused(&Run::new("dp", &["parallel.dp=3"]).train_args(), &["world size 1 ≠ pp 1 × dp 3 = 3"]);
    refused(&Run::new("micro", &["phase.0.micro_batch=3"]).train_args(), &["phase.0", "batch 4", "micro_batch 3 × dp 1 = 3"]);
    misconfigured(&Run::new("length", &["phase.1.sequence_length=1000"]), &["phase.1", "sequence_length = 1000", "max_position_embeddings = 256"]);
    misconfigured(&Run::new("groups", &["model.n_group=3"]), &["model.n_group = 3", "n_routed_experts = 8"]);
    refused(&Run::new("vocab", &["model.vocab_size=100"]).train_args(), &["512", "model.vocab_size is 100"]);
    let text = mpirun(2, &Run::new("dp-mpi", &["parallel.dp=3"]).train_args(), 1);
    assert!(text.contains("world size 2 ≠ pp 1 × dp 3 = 3"), "{text}");
    misconfigured(&Run::new("fp8", &["run.precision=fp8"]), &["model.kv_lora_rank = 12", "multiple of 16 where run.precision = \"fp8\""]);
    misconfigured(&Run::new("patience", &["data.patience=0"]), &["data.patience = 0: must be from 1 to 86400 s"]);
    refused(&Run::new("ep", &["parallel.ep=2"]).train_args(), &["dp 1 does not divide by ep 2"]);
    for (sequences, instead) in [(7, 6), (1, 2)] {
        let (set, said) = (format!("validation.sequences={sequences}"), format!("validation.sequences = {sequences}"));
        let run = Run::new("odd-validation", &["parallel.ep=2", &set]);
        let text = mpirun(2, &run.train_args(), 1);
        let would = format!("; validation.sequences = {instead} would do");
        assert!(text.contains(&format!("{said}, of which")) && text.contains(&would), "{text}");
        let tiny = root().join("configs/run/tiny.toml").display().to_string();
        let plan = words(&["plan", "run", &tiny, "--ranks", "2", "--set", "parallel.ep=2", "--set", &set]);
        let output = tiefsee(&plan).output().expect("it runs");
        let told = String::from_utf8_lossy(&output.stdout).to_string();
        assert!(output.status.success() && told.contains(&format!("it will not start: {said}: no multiple of dp 2")) && told.contains(&would), "{told}");
    }
    let moved = finished("moved-corpus");
    let kept = fs::read_to_string(moved.dir().join("resolved.toml")).expect("a config");
    fs::write(moved.dir().join("resolved.toml"), kept.replace(&corpus().display().to_string(), "/nonexistent")).expect("written");
    let resume = words(&["resume", &moved.dir().display().to_string()]);
    refused(&resume, &["the corpora that ", "moved-corpus/resolved.toml names: /nonexistent"]);
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_is_used() {
    let run = finished("damaged");
    let shard = run.newest_checkpoint().join("shard-00000-of-00001.safetensors");
    let whole = fs::read(&shard).expect("a shard");
    let verify = words(&["checkpoint", "verify", &run.newest_checkpoint().display().to_string()]);
    assert!(tiefsee(&verify).output().expect("it runs").status.success());

    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    fs::write(&shard, &flipped).expect("a write");
    refused(&verify, &[&shard.display().to_string(), "BLAKE3"]);
    let resume = words(&["resume", &run.dir().display().to_string(), "--stop-after", "2"]);
    let output = tiefsee(&resume).output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("step-00000002 is damaged") && text.contains("step-00000001 (step 1"), "{text}");

    // The resumed run wrote step 2 anew; now cut it short and lose step 1.
    let shard = run.newest_checkpoint().join("shard-00000-of-00001.safetensors");
    fs::write(&shard, &whole[..whole.len() - 7]).expect("a write");
    refused(&verify, &[&shard.display().to_string(), "bytes"]);
    fs::remove_file(run.dir().join("checkpoints/step-00000001/manifest.json")).expect("a removal");
    refused(&resume, &["holds no whole checkpoint", "step-00000002 is damaged", "step-00000001 is damaged"]);
}

#[test]
fn a_damaged_corpus_is_named() {
    let copy = scratch().join("damaged-corpus");
    let status = Command::new("cp").args(["-r", &corpus().display().to_string(), &copy.display().to_string()]).status().expect("cp");
    assert!(status.success());
    let shard = fs::read_dir(&copy)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").path())
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("train")))
        .expect("a training shard");
    let mut bytes = fs::read(&shard).expect("a shard");
    let end = bytes.len() * 3 / 4; // before the footer
    bytes[..end].iter_mut().skip(100).step_by(1000).for_each(|byte| *byte ^= 0x55); // whichever samples come first
    fs::write(&shard, bytes).expect("a write");
    let path = format!("data.mixture.0.path={}", copy.display());
    let run = Run::new("damaged-corpus-run", &[&path, "run.stop_after=3"]);
    refused(&run.train_args(), &[shard.file_name().expect("a name").to_str().expect("text")]);
    let nowhere = Run::new("no-corpus", &["data.mixture.0.path=/nonexistent/corpus"]);
    refused(&nowhere.train_args(), &["/nonexistent/corpus"]);
    assert!(!nowhere.dir().exists(), "a refused run leaves nothing");
}

#[test]
fn prepare_names_both_ways_to_tokens_and_says_that_nothing_is_held_out() {
    let (text, out) = (scratch().join("nothing-held-out.txt"), scratch().join("nothing-held-out"));
    fs::write(&text, "one document of some words ".repeat(40)).expect("a file");
    let args = words(&["prepare", &text.display().to_string(), "--out", &out.display().to_string(), "--held-out", "0"]);
    refused_with(2, &args, &["<--vocab <N>|--tokenizer <FILE>>"]);
    let output = tiefsee(&[&args[..], &words(&["--vocab", "270"])].concat()).output().expect("it runs");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("nothing is held out: a run on this corpus alone has validation.every = 0"), "{said}");
}

#[test]
fn another_precision_is_said() {
    let run = finished("another-precision");
    let config = run.dir().join("resolved.toml");
    let text = fs::read_to_string(&config).expect("a config");
    fs::write(&config, text.replace("precision = \"f64\"", "precision = \"f32\"")).expect("written");
    let output = tiefsee(&words(&["resume", &run.dir().display().to_string(), "--stop-after", "3"])).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("run.precision is F32 from here on, it was F64"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_folder_without_text_makes_no_corpus() {
    let (empty, out) = (scratch().join("empty"), scratch().join("empty-out"));
    fs::create_dir_all(&empty).expect("a folder");
    fs::write(empty.join("picture.rs"), [0u8, 159, 146, 150]).expect("a file");
    let prepare = |input: &Path| words(&["prepare", &input.display().to_string(), "--out", &out.display().to_string(), "--vocab", "512"]);
    refused(&prepare(&empty), &[&empty.display().to_string()]);
    let gone = empty.join("gone");
    refused(&prepare(&gone), &[&format!("error: {}: cannot ", gone.display()), ": No such file or directory (os error 2)\n"]);
    assert!(!out.exists());
}

#[test]
fn a_run_directory_is_not_overwritten() {
    let run = finished("twice");
    refused(&run.train_args(), &["already holds a run", "tiefsee resume"]);
    let (show, newest) = (words(&["checkpoint", "show", &run.dir().display().to_string()]), run.newest_checkpoint());
    refused(&show, &[&format!("{} is a run directory, not a checkpoint; its newest is {}", run.dir().display(), newest.display())]);
    fs::remove_dir_all(run.dir().join("checkpoints")).expect("removed");
    refused(&run.train_args(), &["already held a run, whose checkpoints are gone", "twice/summary.json"]);
    assert_eq!(run.lines().len(), 2, "its log stays");
    let import = Run::new("an-import", &[]);
    fs::create_dir_all(import.dir().join("checkpoints/step-00000000")).expect("a folder");
    refused(&import.train_args(), &["an-import holds checkpoints and no run", "in run.init_from"]);
}

#[test]
fn a_config_is_printed_with_every_key() {
    let set = ["guard.window=7", "run.dir=/nowhere"];
    let config = trainer::RunConfig::load(&root().join("configs/run/tiny.toml"), &set.map(String::from)).expect("a config");
    let output = tiefsee(&words(&["plan", "config", &root().join("configs/run/tiny.toml").display().to_string(), "--set", set[0], "--set", set[1]])).output().expect("it runs");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(toml::from_str::<trainer::RunConfig>(&printed).expect("a config"), config);
    assert!(printed.contains("norm_spike = ") && printed.contains("moments = "), "{printed}");
    // What is absent is said as a comment where it would stand, and is a config where it is none.
    let absent = |text: &str| text.lines().filter_map(|line| line.strip_prefix("# ")?.split_once(" = ")).map(|(key, _)| key.to_string()).collect::<Vec<_>>();
    let expected = ["stop_after", "init_from", "random", "rope_scaling", "mixture", "rope_scaling", "mixture", "rope_scaling"];
    assert_eq!(absent(&printed), expected);
    let path = scratch().join("every-key.toml");
    fs::write(&path, printed.replace("\n# ", "\n")).expect("written");
    let all = tiefsee(&words(&["plan", "config", &path.display().to_string()])).output().expect("it runs");
    assert!(all.status.success() && absent(&String::from_utf8_lossy(&all.stdout)).is_empty(), "{all:?}");
}

#[test]
fn a_relative_folder_of_the_second_tier_is_the_same_one_on_resume() {
    let run = Run::new("relative-tier", &["run.stop_after=1", "checkpoint.second_tier.dir=some/where"]);
    assert_eq!(tiefsee(&run.train_args()).current_dir(scratch()).output().expect("it runs").status.code(), Some(75));
    let kept = trainer::RunConfig::load(&trainer::run::resolved(run.dir()), &[]).expect("a config");
    assert_eq!(kept.checkpoint.second_tier.dir, scratch().join("some/where"));
}

#[test]
fn an_export_has_the_tokenizer_or_says_why_not() {
    let run = finished("whose-tokenizer");
    let (inside, elsewhere) = (scratch().join("whose-tokenizer-inside"), scratch().join("whose-tokenizer-elsewhere"));
    let export = words(&["checkpoint", "export-hf", ".", &inside.display().to_string()]);
    let output = tiefsee(&export).current_dir(run.newest_checkpoint()).output().expect("it runs");
    assert!(output.status.success() && inside.join("tokenizer.json").exists(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(!String::from_utf8_lossy(&output.stdout).contains("no tokenizer"));
    let alone = elsewhere.with_file_name("alone/step-00000002");
    fs::create_dir_all(alone.parent().expect("a folder")).expect("made");
    fs::rename(run.newest_checkpoint(), &alone).expect("moved");
    let export = words(&["checkpoint", "export-hf", &alone.display().to_string(), &elsewhere.display().to_string()]);
    let output = tiefsee(&export).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("no tokenizer: ") && said.contains("resolved.toml is not there"), "{said}");
}

#[test]
fn a_full_disk_leaves_no_half_checkpoint() {
    let disk = scratch().join("small-disk");
    fs::create_dir_all(&disk).expect("a folder");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=3m", "tmpfs"]).arg(&disk).status().is_ok_and(|status| status.success());
    if !mounted {
        println!("skipped: mounting a tmpfs is not allowed here");
        return;
    }
    let run_dir = format!("run.dir={}", disk.join("run").display());
    let run = Run::new("full-disk", &[&run_dir, "checkpoint.every=2", "validation.every=0", "model.vocab_size=8000"]);
    let output = tiefsee(&run.train_args()).output().expect("it runs");
    let (said, text) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let left: Vec<_> = fs::read_dir(disk.join("run/checkpoints")).map(|entries| entries.map(|e| e.expect("an entry").path()).collect()).unwrap_or_default();
    assert!(Command::new("umount").arg(&disk).status().is_ok_and(|status| status.success()));
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(said.contains("step-00000002 was NOT written: ") && said.contains("shard-00000"), "{said}");
    assert!(text.contains("there is no checkpoint of step 30"), "the last one must be: {text}");
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn what_every_rank_finds_one_of_them_says() {
    let run = Run::new("three-ranks", &[]);
    assert_eq!(mpirun(3, &run.train_args(), 1).matches("is not a multiple of micro_batch 1 × dp 3").count(), 1);
    let stopped = finished("no-checkpoint-left");
    fs::remove_dir_all(stopped.dir().join("checkpoints")).expect("removed");
    let resume = words(&["resume", &stopped.dir().display().to_string()]);
    assert_eq!(mpirun(2, &resume, 1).matches("holds no whole checkpoint to resume from").count(), 1);
}

#[test]
fn a_full_output_is_an_error_of_one_line() {
    let (text, out) = (scratch().join("full-output.txt"), scratch().join("full-output"));
    fs::write(&text, "one document of some words ".repeat(40)).expect("a file");
    let (text, corpus) = (text.display().to_string(), out.display().to_string());
    let prepare = words(&["prepare", &text, "--out", &corpus, "--vocab", "270", "--held-out", "0"]);
    for args in [prepare, words(&["plan", &root().join("configs/model/tiny.toml").display().to_string()])] {
        let full = fs::File::options().write(true).open("/dev/full").expect("a device");
        let output = tiefsee(&args).stdout(full).output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().last().unwrap_or_default();
        assert_eq!((output.status.code(), last), (Some(1), "error: cannot write to stdout: No space left on device (os error 28)"), "{said}");
    }
    assert!(out.join("manifest.json").exists(), "the corpus was whole before the words about it");
}

#[test]
fn no_export_takes_a_tokenizer_that_was_replaced() {
    let own = scratch().join("corpus-retokenized");
    fs::create_dir_all(&own).expect("a folder");
    for entry in fs::read_dir(corpus()).expect("a corpus").flatten() {
        fs::copy(entry.path(), own.join(entry.file_name())).expect("a copy");
    }
    let run = Run::new("retokenized", &["run.stop_after=1", &format!("data.mixture.0.path={}", own.display())]);
    assert_eq!(tiefsee(&run.train_args()).output().expect("it runs").status.code(), Some(75));
    let out = scratch().join("retokenized-export");
    let export = words(&["checkpoint", "export-hf", &run.newest_checkpoint().display().to_string(), &out.display().to_string()]);
    let tokenizer = fs::read(own.join("tokenizer.json")).expect("a tokenizer");
    fs::write(own.join("tokenizer.json"), [&tokenizer[..], b"\n"].concat()).expect("written");
    refused(&export, &["corpus-retokenized/tokenizer.json: its BLAKE3 is ", "where the manifest says "]);
    assert!(!out.exists() && !out.with_added_extension("partial").exists(), "half an export");
    fs::write(own.join("tokenizer.json"), tokenizer).expect("written");
    assert!(tiefsee(&export).output().expect("it runs").status.success());
}

#[test]
fn an_export_has_the_tokenizer_that_the_checkpoint_knows_or_none() {
    let own = scratch().join("corpus-made-anew");
    let prepare = |vocab: &str, folder: &str| {
        let args = ["prepare", &root().join(folder).display().to_string(), "--out", &own.display().to_string(), "--vocab", vocab, "--held-out", "0.2", "--extensions", "rs"];
        assert!(tiefsee(&words(&args)).output().expect("it runs").status.success());
    };
    prepare("500", "launch");
    let run = Run::new("made-anew", &["run.stop_after=1", &format!("data.mixture.0.path={}", own.display())]);
    assert_eq!(tiefsee(&run.train_args()).output().expect("it runs").status.code(), Some(75));
    fs::remove_dir_all(&own).expect("it goes");
    prepare("480", "parallel");
    let exported = |name: &str| {
        let out = scratch().join(name);
        let export = words(&["checkpoint", "export-hf", &run.newest_checkpoint().display().to_string(), &out.display().to_string()]);
        let output = tiefsee(&export).output().expect("it runs");
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{said}");
        let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).expect("a config")).expect("JSON");
        assert!(config["eos_token_id"].is_null() && !out.join("tokenizer.json").exists() && out.join("model.safetensors").exists(), "{config}");
        said
    };
    let said = exported("made-anew-export");
    assert!(said.contains("no tokenizer: ") && said.contains("corpus-made-anew/tokenizer.json is another one: its BLAKE3 is "), "{said}");
    // A store that cannot be reached is no reason to write no weights.
    let resolved = run.dir().join("resolved.toml");
    let kept = fs::read_to_string(&resolved).expect("a config");
    fs::write(&resolved, kept.replace(&own.display().to_string(), "ftp://bucket/corpus")).expect("written");
    let said = exported("unreached-export");
    assert!(said.contains("no tokenizer: ftp://bucket/corpus"), "{said}");
}

#[test]
fn a_folder_without_checkpoints_is_not_pruned() {
    let folder = scratch().join("no-run");
    fs::create_dir_all(&folder).expect("a folder");
    refused(&words(&["checkpoint", "prune", &folder.display().to_string(), "--keep-last", "1"]), &["no-run is not a run directory: it has no checkpoints/"]);
}

#[test]
fn a_run_that_skipped_every_step_is_no_success() {
    let run = Run::new("learnt-nothing", &["model.initializer_range=1e300", "guard.max_skipped=1000", "validation.every=0"]);
    refused_with(77, &run.train_args(), &["each of its 30 steps was skipped: it has learnt nothing"]);
    assert_eq!(serde_json::from_slice::<Value>(&fs::read(run.dir().join("summary.json")).expect("a summary")).expect("JSON")["skipped_steps"], 30);
}

#[test]
fn tensorboard_reads_every_scalar_of_every_step() {
    let run = Run::new("tensorboard", &["checkpoint.every=10"]);
    // Stopped and resumed from further back: steps 11 to 15 are done twice.
    let mut first = run.train_args();
    first.extend(words(&["--set", "run.stop_after=15"]));
    mpirun(2, &first, 75);
    fs::remove_dir_all(run.newest_checkpoint()).expect("it goes");
    let resume = words(&["resume", &run.dir().display().to_string()]);
    mpirun(2, &resume, 0);
    let log = || fs::read_to_string(run.dir().join("log/rank-0.jsonl")).expect("a log");
    let done = log();
    mpirun(2, &resume, 0);
    assert!(log() == done, "a finished run is resumed without a word");
    let python = root().join(".deps/venv/bin/python");
    assert!(python.exists(), "the test venv is not there; scripts/test.sh makes it");
    let output = Command::new(python).arg(root().join("tests/oracle/tensorboard_read.py")).arg(run.dir()).output().expect("python starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let read: BTreeMap<String, Vec<(u64, f64)>> = serde_json::from_slice(&output.stdout).expect("JSON");
    let scalars = ["loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "load_max", "load_min", "tokens_per_s"];
    for scalar in scalars {
        let expected: Vec<(u64, f64)> = run.lines().iter().map(|line| (line["step"].as_u64().expect("a step"), line[scalar].as_f64().expect("a number") as f32 as f64)).collect();
        assert_eq!(read[&format!("train/{scalar}")], expected, "{scalar}");
    }
    let validations = done.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")).filter(|line| line.get("validation_loss").is_some());
    let expected: Vec<(u64, f64)> = validations.map(|line| (line["step"].as_u64().expect("a step"), line["validation_loss"].as_f64().expect("a number") as f32 as f64)).collect();
    assert_eq!(expected.iter().map(|(step, _)| *step).collect::<Vec<_>>(), (0..=30).step_by(5).collect::<Vec<u64>>());
    assert_eq!(read["validation/loss"], expected);
    assert_eq!(read.len(), scalars.len() + 1);

    let summary: Value = serde_json::from_slice(&fs::read(run.dir().join("summary.json")).expect("a summary")).expect("JSON");
    assert_eq!(summary["steps"], 30);
    assert_eq!(summary["val_loss_end"].as_f64().map(|v| v as f32 as f64), expected.last().map(|(_, v)| *v));
    for key in ["tokens", "tokens_per_s", "unigram_entropy", "val_loss_start", "checkpoint", "seconds"] {
        assert!(!summary[key].is_null(), "{key} in {summary}");
    }
}

/// The launcher takes any line of a log for a sign of life.
#[test]
fn a_long_validation_tells_every_rank_s_log_how_far_it_is() {
    let validate = |name: &str, micro_batch: &str| {
        let run = Run::new(name, &["validation.sequences=80", "run.stop_after=1", &format!("phase.0.micro_batch={micro_batch}")]);
        mpirun(2, &run.train_args(), 75);
        let logs = [0, 1].map(|rank| fs::read_to_string(run.dir().join(format!("log/rank-{rank}.jsonl"))).expect("a log"));
        let of = |key: &str| logs.each_ref().map(|log| log.lines().filter_map(|line| serde_json::from_str::<Value>(line).expect("JSON")[key].as_f64()).collect::<Vec<_>>());
        (of("validated_micro_batches"), of("validation_loss")[0][0])
    };
    let (told, loss) = validate("long-validation", "1");
    let (none, whole) = validate("short-validation", "2");
    assert_eq!((told, none), ([vec![32.0], vec![32.0]], [vec![], vec![]]));
    assert!((loss / whole - 1.0).abs() < 1e-12, "{loss} in parts, {whole} at once");
}

#[test]
fn parameters_are_counted_as_released() {
    let counts = |name: &str| {
        let output = tiefsee(&words(&["plan", &root().join(format!("configs/model/{name}.toml")).display().to_string()])).output().expect("it runs");
        String::from_utf8(output.stdout).expect("text")
    };
    let v3 = counts("v3-671b");
    for number in ["671026419200", "36625618432", "11610068224"] {
        assert!(v3.contains(number), "{number} in {v3}");
    }
    // Every config's count is the sum of the parameters that the model really makes.
    for name in ["tiny", "quickstart"] {
        let text = fs::read_to_string(root().join(format!("configs/model/{name}.toml"))).expect("a config");
        let config: model::ModelConfig = toml::from_str(&text).expect("a model");
        let mut table = model::ParamTable::default();
        model::Stage::whole(&mut table, &config);
        assert_eq!(table.numel(), config.count().main + config.count().mtp, "{name}");
    }
}

#[test]
fn every_shipped_config_is_valid() {
    for entry in fs::read_dir(root().join("configs/run")).expect("configs") {
        let path = entry.expect("an entry").path();
        let config = trainer::RunConfig::load(&path, &[]).unwrap_or_else(|error| panic!("{error:#}"));
        assert_eq!(toml::from_str::<trainer::RunConfig>(&config.to_toml().expect("TOML")).expect("round trip"), config);
    }
}
