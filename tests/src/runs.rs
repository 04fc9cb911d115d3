//! Whole runs of the tiny model: resumed, on any number of ranks, over threads and over mpirun, they are one run.
use crate::support::{Run, corpus, mpirun, root, scratch, start, tiefsee};
use parallel::comm::local::run_local;
use std::path::{Path, PathBuf};
use trainer::coordinator::StopSignal;
use trainer::run::{Start, train};

/// A batch ramp up to step 19, then a longer sequence.
const STEPS: usize = 30;

/// In this process, on `ranks` threads.
fn over_threads(run: &Run, ranks: usize, start: Start, stop_after: Option<u64>) {
    let mut config = run.config();
    config.run.stop_after = stop_after;
    run_local(ranks, |world| train(&config, world, start, &StopSignal::default()).map(|_| ()).expect("the run"));
}

#[test]
fn a_resumed_run_is_the_undisturbed_run_bit_for_bit() {
    for ranks in [1, 2] {
        let whole = Run::new(&format!("whole-{ranks}"), &[]);
        over_threads(&whole, ranks, Start::Fresh, None);
        assert_eq!(whole.lines().len(), STEPS);
        // In the batch ramp, on the phase edge, and beyond it.
        for stop in [10, 19, 23] {
            let parts = Run::new(&format!("parts-{ranks}-{stop}"), &[]);
            over_threads(&parts, ranks, Start::Fresh, Some(stop));
            assert_eq!(parts.lines().len(), stop as usize);
            over_threads(&parts, ranks, Start::Resume, None);
            assert_eq!(parts.series("loss"), whole.series("loss"), "losses after a stop at {stop} on {ranks} rank(s)");
            assert_eq!(parts.series("grad_norm"), whole.series("grad_norm"));
            assert_eq!(parts.samples(), whole.samples());
            let (a, b) = (parts.state(), whole.state());
            assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
            for (name, tensor) in &a {
                assert!(tensor.equal(&b[name]), "{name} differs after a stop at {stop} on {ranks} rank(s)");
            }
            assert!(a.keys().any(|name| name.starts_with("second/")) && a.keys().any(|name| name.ends_with("e_score_correction_bias")));
        }
    }
}

#[test]
fn over_mpirun_too() {
    let whole = Run::new("mpi-whole", &[]);
    over_threads(&whole, 2, Start::Fresh, None);
    let parts = Run::new("mpi-parts", &["run.stop_after=10"]);
    mpirun(2, &parts.train_args(), 75);
    mpirun(2, &["resume".into(), parts.dir().display().to_string()], 0);
    assert_eq!(parts.series("loss"), whole.series("loss"));
    let (a, b) = (parts.state(), whole.state());
    assert!(a.iter().all(|(name, tensor)| tensor.equal(&b[name])), "weights or moments differ");
}

#[test]
fn any_number_of_data_parallel_ranks_gives_the_same_run() {
    let one = Run::new("dp-1", &[]);
    over_threads(&one, 1, Start::Fresh, None);
    for ranks in [2, 4] {
        // Batches of 4 to 12 in micro-batches of 1, then 8 in micro-batches of 2.
        let threads = Run::new(&format!("dp-threads-{ranks}"), &[]);
        over_threads(&threads, ranks, Start::Fresh, None);
        threads.assert_same(&one, 1e-9);
        let processes = Run::new(&format!("dp-mpi-{ranks}"), &[]);
        mpirun(ranks, &processes.train_args(), 0);
        processes.assert_same(&one, 1e-9);
        assert_eq!(processes.series("loss"), threads.series("loss"), "threads and processes reduce in the same order");
    }
}

#[test]
fn experts_spread_over_ranks_give_the_same_run() {
    let one = Run::new("ep-1", &[]);
    over_threads(&one, 1, Start::Fresh, None);
    for (ranks, ep) in [(2, 2), (4, 2), (4, 4)] {
        let set = format!("parallel.ep={ep}");
        let threads = Run::new(&format!("ep-{ranks}-{ep}"), &[&set]);
        over_threads(&threads, ranks, Start::Fresh, None);
        threads.assert_same(&one, 1e-9);
    }
    let processes = Run::new("ep-mpi", &["parallel.ep=2"]);
    mpirun(4, &processes.train_args(), 0);
    processes.assert_same(&one, 1e-9);
    // One logical state, whoever wrote it.
    let (a, b) = (processes.state(), one.state());
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, tensor) in &a {
        crate::support::assert_close(name, tensor, &b[name], 1e-6);
    }
}

#[test]
fn a_checkpoint_resumes_on_another_number_of_ranks() {
    let whole = Run::new("elastic-whole", &[]);
    over_threads(&whole, 1, Start::Fresh, None);
    let parts = Run::new("elastic-parts", &[]);
    for (ranks, ep, start, stop) in [(2, 1, Start::Fresh, 8), (4, 2, Start::Resume, 15), (2, 2, Start::Resume, 21), (1, 1, Start::Resume, 30)] {
        let mut config = parts.config();
        (config.parallel.ep, config.run.stop_after) = (ep, Some(stop));
        run_local(ranks, |world| train(&config, world, start, &StopSignal::default()).map(|_| ()).expect("the run"));
    }
    parts.assert_same(&whole, 1e-9);
}

#[test]
fn every_validation_has_its_phase_s_rope_scaling() {
    const YARN: &str = "rope_scaling={factor=4.0,original_max_position_embeddings=32}";
    let losses = |name: &str, prefixes: &[&str]| {
        let set: Vec<String> = prefixes.iter().map(|prefix| format!("{prefix}{YARN}")).collect();
        let run = Run::new(name, &set.iter().map(String::as_str).collect::<Vec<_>>());
        let train = |start| train(&run.config(), parallel::comm::local::solo(), start, &StopSignal::default()).expect("a run").summary;
        let ended = train(Start::Fresh);
        // Again, though nothing is left to do: as after a crash at the very end.
        assert_eq!(train(Start::Resume).val_loss_end, ended.val_loss_end, "{name}");
        ended.val_loss_start.expect("a loss")
    };
    let (plain, model, first) = (losses("rope-plain", &["phase.1."]), losses("rope-model", &["model."]), losses("rope-first", &["phase.0."]));
    assert!(model == first && plain != first, "{plain} without, {model} in the model, {first} in the first phase");
}

#[test]
fn a_checkpoint_remembers_its_phases_rope_scaling_and_its_corpus() {
    let run = Run::new("remembers", &["phase.1.rope_scaling={factor=4.0,original_max_position_embeddings=32}"]);
    over_threads(&run, 1, Start::Fresh, Some(10));
    assert!(run.manifest()["model"].get("rope_scaling").is_none(), "phase 1 has none");
    over_threads(&run, 1, Start::Resume, Some(21));
    assert_eq!(run.manifest()["model"]["rope_scaling"]["factor"], 4.0);
    let mut config = run.config();
    config.run.seed += 1;
    let error = train(&config, parallel::comm::local::solo(), Start::Resume, &StopSignal::default()).map(|_| ()).expect_err("another order of samples");
    assert!(error.to_string().contains("another corpus") || error.to_string().contains("seed"), "{error:#}");
}

/// A corpus of `folder`'s sources with the tokenizer of the tests' corpus.
fn corpus_of(folder: &str, name: &str, held_out: &str) -> PathBuf {
    let (out, tokenizer) = (scratch().join(name), corpus().join("tokenizer.json"));
    let mut args: Vec<String> = ["prepare", "--held-out", held_out, "--extensions", "rs,toml", "--out"].map(String::from).into();
    args.extend([&out, Path::new("--tokenizer"), &tokenizer, &root().join(folder)].map(|path: &Path| path.display().to_string()));
    start(&args, 0);
    out
}

/// As a value of --set.
fn mixture(sources: &[(&Path, f64)]) -> String {
    let source = |(path, weight): &(&Path, f64)| format!("{{path=\"{}\",weight={weight:?}}}", path.display());
    format!("[{}]", sources.iter().map(source).collect::<Vec<_>>().join(","))
}

fn resume_error(config: &trainer::RunConfig) -> String {
    let resumed = train(config, parallel::comm::local::solo(), Start::Resume, &StopSignal::default());
    format!("{:#}", resumed.map(|_| ()).expect_err("another order of samples"))
}

#[test]
fn a_phase_of_another_mixture_goes_on_with_each_source_and_resumes_on_any_layout() {
    let other = corpus_of("launch", "goes-on", "0.2");
    let later = format!("phase.1.mixture={}", mixture(&[(&other, 1.0), (corpus(), 2.0)]));
    let set = [later.as_str(), "phase.1.sequence_length=32", "phase.1.tokens=2048", "validation.every=0"];
    let whole = Run::new("goes-on-whole", &set);
    over_threads(&whole, 1, Start::Fresh, None);
    assert_eq!(whole.samples().last().map(|(order, _)| order.clone()), Some(1.into()));
    for (ranks, stop) in [(1, 19), (1, 22), (2, 22)] {
        let parts = Run::new(&format!("goes-on-{ranks}-{stop}"), &set);
        over_threads(&parts, 1, Start::Fresh, Some(stop));
        over_threads(&parts, ranks, Start::Resume, None);
        parts.assert_same(&whole, if ranks == 1 { 0.0 } else { 1e-9 });
    }
    let said = start(&Run::new("goes-on-said", &[set.as_slice(), &["run.stop_after=0"]].concat()).train_args(), 75);
    let line = said.lines().find(|line| line.contains(&format!("{}: ", other.display()))).unwrap_or_else(|| panic!("{said}"));
    assert!(line.contains("% of what the run reads") && line.contains(" epochs"), "{line}");
    assert!(!said.contains("begins anew"), "{said}");
    let said = start(&Run::new("anew-said", &["run.stop_after=0"]).train_args(), 75);
    assert!(said.contains("phase.1") && said.contains("in sequences of 45 after 32: it begins anew"), "{said}");
}

#[test]
fn a_mixture_that_changes_in_name_only_changes_nothing() {
    let set = ["phase.1.sequence_length=32", "phase.1.tokens=2048", "validation.every=0"];
    let one = Run::new("one-mixture", &set);
    over_threads(&one, 1, Start::Fresh, None);
    let again = format!("phase.1.mixture={}", mixture(&[(corpus(), 2.0)]));
    let two = Run::new("two-mixtures", &[&set[..], &[&again]].concat());
    over_threads(&two, 1, Start::Fresh, None);
    assert_ne!(two.samples(), one.samples(), "two orders");
    assert_eq!(two.series("loss"), one.series("loss"), "of the same samples");
}

#[test]
fn phases_to_come_may_change_and_those_begun_may_not() {
    let other = corpus_of("launch", "to-come", "0.2");
    let run = Run::new("to-come", &[]);
    over_threads(&run, 1, Start::Fresh, Some(10));
    let mut config = run.config();
    config.phase[1].sequence_length = 64;
    train(&config, parallel::comm::local::solo(), Start::Resume, &StopSignal::default()).expect("its second phase had not begun");
    // Finished; a third phase of another mixture.
    let mut third = config.phase[1].clone();
    third.mixture = Some(vec![data::Source { path: other.clone(), weight: 1.0 }]);
    config.phase.push(third);
    let steps = run.lines().len();
    train(&config, parallel::comm::local::solo(), Start::Resume, &StopSignal::default()).expect("a phase more");
    assert!(run.lines().len() > steps);

    let mut changed = config.clone();
    changed.phase[2].mixture = Some(vec![data::Source { path: corpus().to_owned(), weight: 2.0 }]);
    let error = resume_error(&changed);
    assert!(error.contains("sample order 2") && error.contains(&format!("{} is not the corpus", corpus().display())), "{error}");
    let mut changed = config.clone();
    changed.data.mixture.push(data::Source { path: other.clone(), weight: 1.0 });
    let error = resume_error(&changed);
    assert!(error.contains("sample order 0") && error.contains("1 source(s), now there are 2"), "{error}");
    let mut changed = config.clone();
    changed.phase[1].sequence_length = 45;
    let error = resume_error(&changed);
    assert!(error.contains("sample order 1") && error.contains("sequence length"), "{error}");
    let mut changed = config.clone();
    changed.phase[0].tokens += 1 << 20;
    let error = resume_error(&changed);
    assert!(error.contains("it has reached sample order 2") && error.contains("one that is over was made longer"), "{error}");
    let mut changed = config.clone();
    changed.model.rope_theta = 5000.0;
    let error = resume_error(&changed);
    assert!(error.contains("its model has rope_theta = 10000.0, the run's model.rope_theta is 5000.0"), "{error}");
    let mut changed = config.clone();
    changed.model.num_nextn_predict_layers = 0;
    let error = resume_error(&changed);
    assert!(error.contains("its model has num_nextn_predict_layers = 1"), "{error}");
}

#[test]
fn a_corpus_is_the_same_however_its_path_is_spelled() {
    let (folder, name) = (corpus().parent().expect("a folder"), corpus().file_name().expect("a name").display().to_string());
    let one_order = "phase.1.sequence_length=32";
    let set = [format!("data.mixture.0.path={name}"), format!("phase.1.mixture=[{{path=\"./{name}\",weight=1.0}}]"), one_order.into()];
    let (one, two) = (Run::new("spelled-once", &[one_order]), Run::new("spelled-twice", &set.each_ref().map(String::as_str)));
    over_threads(&one, 1, Start::Fresh, Some(22));
    let end = |args: &[String]| tiefsee(args).current_dir(folder).output().expect("tiefsee starts").status.code();
    assert_eq!(end(&[two.train_args(), vec!["--set".into(), "run.stop_after=21".into()]].concat()), Some(75));
    assert_eq!(end(&["resume".into(), two.dir().display().to_string(), "--stop-after".into(), "22".into()]), Some(75));
    two.assert_same(&one, 0.0);
}

#[test]
fn a_phase_that_is_over_may_not_become_another_and_its_shards_may_be_gone() {
    let first = corpus_of("launch", "over", "0.2");
    let later = format!("phase.1.mixture={}", mixture(&[(corpus(), 1.0)]));
    let run = Run::new("over-run", &[&format!("data.mixture.0.path={}", first.display()), &later, "validation.every=0"]);
    over_threads(&run, 1, Start::Fresh, Some(10));
    let mut changed = run.config();
    changed.phase[0].tokens /= 8;
    let error = resume_error(&changed);
    assert!(error.contains("it has read 40 samples of sample order 0") && error.contains("one that is over was changed"), "{error}");
    // Its last step has been done, and no step of the next one.
    over_threads(&run, 1, Start::Resume, Some(18));
    std::fs::remove_file(first.join("train-00000.parquet")).expect("a shard");
    over_threads(&run, 1, Start::Resume, Some(24));
    assert_eq!(run.lines().len(), 24);
}

#[test]
fn a_phase_under_way_stays_what_it_was() {
    let changed = |set: &[&str]| Run::new("under-way", set);
    over_threads(&changed(&[]), 1, Start::Fresh, Some(10));
    for (set, said) in [
        ("phase.0.lr.to=2e-2", "phase.0.lr = { from = 0.0, shape = \"linear\", to = 0.02 }: the phase has begun, with { from = 0.0, shape = \"linear\", to = 0.01 }"),
        ("phase.0.batch.to=8", "phase.0.batch = { from = 4, multiple = 4, to = 8 }: the phase has begun, with"),
        ("phase.0.tokens=6144", "phase.0.tokens = 6144: the phase has begun, with 3072"),
        ("phase.0.bias_speed=0.5", "phase.0.bias_speed = 0.5: the phase has begun, with 0.001"),
        ("phase.0.rope_scaling={factor=4.0,original_max_position_embeddings=32}", "the phase has begun, with none"),
    ] {
        let error = resume_error(&changed(&[set]).config());
        assert!(error.contains("step-00000010 does not go on with these phases: phase.0.") && error.contains(said), "{error}");
    }
    // What it may change, and a phase that has not begun.
    over_threads(&changed(&["phase.0.micro_batch=2", "phase.1.lr.to=1e-4", "phase.1.bias_speed=0.5"]), 1, Start::Resume, Some(12));
    assert_eq!(changed(&[]).lines().len(), 12);
    // One of constants ends sooner, and another is begun; or later; but not before what is done.
    let even = |set: &[&str]| Run::new("even", &[&["phase.0.lr=1e-3", "phase.0.batch=8", "phase.0.micro_batch=1"], set].concat());
    over_threads(&even(&[]), 1, Start::Fresh, Some(4));
    let error = resume_error(&even(&["phase.0.tokens=768"]).config());
    assert!(error.contains("phase.0.tokens = 768: it would end after 768 tokens, and 1024 are done"), "{error}");
    let error = resume_error(&even(&["phase.0.lr=2e-3"]).config());
    assert!(error.contains("phase.0.lr = 0.002: the phase has begun, with 0.001"), "{error}");
    over_threads(&even(&["phase.0.tokens=6144"]), 1, Start::Resume, Some(5));
    over_threads(&even(&["phase.0.tokens=1280", "phase.1.bias_speed=0.5"]), 1, Start::Resume, Some(6));
    let error = resume_error(&even(&["phase.0.tokens=6144"]).config());
    assert!(error.contains("it has reached sample order 1") && error.contains("one that is over was made longer"), "{error}");
    // The first step goes beyond the first phase's end, and no step of the second has been done.
    let edge = |set: &[&str]| Run::new("at-the-edge", &[set, &["phase.0.tokens=100"]].concat());
    over_threads(&edge(&[]), 1, Start::Fresh, Some(1));
    over_threads(&edge(&["phase.1.bias_speed=0.5"]), 1, Start::Resume, Some(2));
    let error = resume_error(&edge(&[]).config());
    assert!(error.contains("phase.1.bias_speed = 0.001: the phase has begun, with 0.5"), "{error}");
}

#[test]
fn validation_reads_what_the_mixture_weighs() {
    let (other, without) = (corpus_of("launch", "weighed", "0.2"), corpus_of("parallel", "without", "0.0"));
    let validated = |name: &str, sources: &[(&Path, f64)]| {
        let run = Run::new(name, &["run.stop_after=0", &format!("data.mixture={}", mixture(sources))]);
        let said = start(&run.train_args(), 75);
        let summary = std::fs::read(run.dir().join("summary.json")).expect("a summary");
        let summary: serde_json::Value = serde_json::from_slice(&summary).expect("JSON");
        (["val_loss_start", "unigram_entropy"].map(|key| summary[key].as_f64().expect("a number")), said)
    };
    let ([alone, entropy], _) = validated("validates-alone", &[(&other, 1.0)]);
    let ([first, entropy_of_first], _) = validated("validates-first", &[(corpus(), 1.0)]);
    assert_ne!(alone, first);
    let ([weighed, mixed], said) = validated("validates-weighed", &[(&without, 500.0), (corpus(), 1.0), (&other, 1000.0)]);
    assert_eq!(weighed, alone, "the first source has a thousandth, and no sequence of eight");
    assert!((mixed - (entropy_of_first + 1000.0 * entropy) / 1001.0).abs() < 1e-9, "{mixed} of {entropy_of_first} and {entropy}");
    assert!(said.contains(&format!("validation leaves out {}: no held-out sequence", without.display())), "{said}");
    let run = Run::new("validates-nothing", &[&format!("data.mixture={}", mixture(&[(&without, 1.0)]))]);
    let said = start(&run.train_args(), 1);
    assert!(said.contains("validation.every = 5 needs a held-out split") && said.contains("without"), "{said}");
}

#[test]
fn phases_and_validation_speak_one_vocabulary() {
    let other = scratch().join("spoken");
    let args = ["prepare", "--vocab", "480", "--held-out", "0.2", "--extensions", "rs,toml", "--out"].map(String::from);
    start(&[&args[..], &[other.display().to_string(), root().join("launch").display().to_string()]].concat(), 0);
    let (there, here) = (other.display(), corpus().display());
    for (name, set, first, then) in [("later", "phase.1.mixture", &here, &there), ("earlier", "phase.0.mixture", &there, &here)] {
        let run = Run::new(&format!("spoken-{name}"), &[&format!("{set}={}", mixture(&[(&other, 1.0)])), "validation.every=0"]);
        let said = start(&run.train_args(), 1);
        assert!(said.contains(&format!("the sources do not share one tokenizer: {then} has ")) && said.contains(&format!(", {first} has ")), "{said}");
        assert!(!run.dir().exists());
    }
    let run = Run::new("spoken-validated", &[0, 1].map(|phase| format!("phase.{phase}.mixture={}", mixture(&[(&other, 1.0)]))).each_ref().map(String::as_str));
    let said = start(&run.train_args(), 1);
    assert!(said.contains(&format!("do not share one tokenizer: {here} has ")), "{said}");
    // Nor do weights of the one go on with the other; those of before are told of another RoPE.
    let first = Run::new("spoken-first", &["run.stop_after=1"]);
    start(&first.train_args(), 75);
    let from = format!("run.init_from={}", first.newest_checkpoint().display());
    let said = start(&Run::new("spoken-from", &[&from, "run.stop_after=1", &format!("data.mixture={}", mixture(&[(&other, 1.0)]))]).train_args(), 1);
    assert!(said.contains("knows the tokens of a tokenizer.json whose BLAKE3 is") && said.contains("prepare --tokenizer takes the first"), "{said}");
    let scaled = "phase.0.rope_scaling={factor=2.0,original_max_position_embeddings=64}";
    let said = start(&Run::new("spoken-scaled", &[&from, "run.stop_after=1", scaled]).train_args(), 75);
    assert!(said.contains("was trained with rope_scaling none, phase 0 has {"), "{said}");
}

#[test]
fn a_missing_shard_is_named_before_the_first_step() {
    let other = corpus_of("launch", "shard-gone", "0.2");
    std::fs::remove_file(other.join("train-00000.parquet")).expect("a shard");
    let run = Run::new("shard-gone-run", &[&format!("phase.1.mixture={}", mixture(&[(&other, 1.0)]))]);
    let said = mpirun(2, &run.train_args(), 1);
    assert!(said.contains("shard-gone: 1 of 1 train shards") && said.contains("train-00000.parquet is missing"), "{said}");
    assert!(!run.dir().exists());
}

#[test]
fn in_f32_the_number_of_ranks_shows_only_in_rounding() {
    // Every token goes to every expert: where it chooses, two affinities a rounding apart may change places, and that is no rounding.
    let set = ["run.precision=f32", "model.num_experts_per_tok=8", "model.n_group=1", "model.topk_group=1"];
    let one = Run::new("f32-1", &set);
    over_threads(&one, 1, Start::Fresh, None);
    for ranks in [2, 4] {
        let several = Run::new(&format!("f32-{ranks}"), &set);
        over_threads(&several, ranks, Start::Fresh, None);
        several.assert_same(&one, 1e-4);
    }
}

#[test]
fn bf16_and_fp8_train_with_bf16_moments_and_resume_bit_for_bit() {
    let sizes = ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"].map(|key| format!("model.{key}=16"));
    for precision in ["bf16", "fp8"] {
        let set = [format!("run.precision={precision}"), "optimizer.moments=bf16".into()].into_iter().chain(sizes.clone());
        let set: Vec<String> = set.collect();
        let set: Vec<&str> = set.iter().map(String::as_str).collect();
        let whole = Run::new(&format!("{precision}-whole"), &set);
        over_threads(&whole, 1, Start::Fresh, None);
        let parts = Run::new(&format!("{precision}-parts"), &set);
        over_threads(&parts, 1, Start::Fresh, Some(11));
        over_threads(&parts, 1, Start::Resume, None);
        assert_eq!(parts.series("loss"), whole.series("loss"), "{precision}");
        let (a, b) = (parts.state(), whole.state());
        assert!(a.iter().all(|(name, tensor)| tensor.equal(&b[name])), "{precision}: masters or moments differ");
        assert_eq!(a["second/lm_head.weight"].kind(), tch::Kind::BFloat16);
        let losses = whole.series("loss");
        assert!(losses[STEPS - 1] < losses[0] - 0.1, "{precision}: {} is not below {}", losses[STEPS - 1], losses[0]);
    }
}

#[test]
fn a_stop_signal_ends_in_a_checkpoint_and_a_code_of_its_own() {
    let run = Run::new("signal", &["phase.0.tokens=300000"]);
    let child = tiefsee(&run.train_args()).stdout(std::process::Stdio::null()).spawn().expect("tiefsee starts");
    run.wait_for_step(3);
    signal(child.id(), "TERM");
    let status = child.wait_with_output().expect("it ends").status;
    assert_eq!(status.code(), Some(75));
    let steps = run.lines().len() as u64;
    assert_eq!(run.manifest()["step"].as_u64(), Some(steps));
    let resumed = tiefsee(&["resume".into(), run.dir().display().to_string(), "--stop-after".into(), (steps + 2).to_string()]).output().expect("it runs");
    assert_eq!(resumed.status.code(), Some(75), "{}", String::from_utf8_lossy(&resumed.stderr));
    assert_eq!(run.lines().len() as u64, steps + 2);
}

#[test]
fn a_second_ctrl_c_ends_a_run_that_does_not_come_to_its_checkpoint() {
    let run = Run::new("impatient", &["faults.inject=[{kind=\"hang\",rank=0,step=3}]", "checkpoint.every=1"]);
    let mut child = tiefsee(&run.train_args()).stdout(std::process::Stdio::null()).spawn().expect("tiefsee starts");
    run.wait_for_step(2);
    // What tells ranks to stop may do so twice; and a Ctrl-C that is passed on comes twice at once.
    for name in ["TERM", "USR1", "TERM", "USR1", "INT", "INT"] {
        signal(child.id(), name);
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert!(child.try_wait().expect("it can be asked").is_none(), "it had no second Ctrl-C");
    signal(child.id(), "INT");
    let (began, mut ended) = (std::time::Instant::now(), None);
    while ended.is_none() && began.elapsed().as_secs() < 20 {
        ended = child.try_wait().expect("it can be asked");
    }
    child.kill().expect("it is gone, or goes");
    assert_eq!(ended.and_then(|status| std::os::unix::process::ExitStatusExt::signal(&status)), Some(2), "{ended:?}");
}

#[test]
fn a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before_it() {
    // A vocabulary large enough that a save takes a while.
    let run = Run::new("kill", &["model.vocab_size=150000", "checkpoint.every=2", "validation.every=0", "phase.0.tokens=300000"]);
    let mut child = tiefsee(&run.train_args()).stdout(std::process::Stdio::null()).spawn().expect("tiefsee starts");
    run.wait_for(|| Path::new(&run.dir().join("checkpoints/step-00000002")).exists());
    run.wait_for(|| Path::new(&run.dir().join("checkpoints/.step-00000004.partial")).exists());
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    assert!(!run.dir().join("checkpoints/step-00000004").exists(), "the save was over before the kill");
    let args = ["resume".into(), run.dir().display().to_string(), "--stop-after".into(), "3".into()];
    let resumed = tiefsee(&args).output().expect("it runs");
    let text = String::from_utf8_lossy(&resumed.stdout);
    assert_eq!(resumed.status.code(), Some(75), "{}", String::from_utf8_lossy(&resumed.stderr));
    assert!(text.contains(".step-00000004.partial was never finished") && text.contains("step-00000002 (step 2"), "{text}");
    assert!(!run.dir().join("checkpoints/.step-00000004.partial").exists());
}

fn signal(pid: u32, name: &str) {
    let status = std::process::Command::new("kill").args([format!("-{name}"), pid.to_string()]).status().expect("kill is there");
    assert!(status.success());
}
