//! Two GPUs or more against one: every layout's losses, checkpoints that go from each to each, and a rank that dies or
//! stops in the middle. With fewer GPUs each test says that it was skipped.
use crate::launching::{Started, local, processes, rank_pid, signal, wait};
use crate::support::{Run, WIDE, gap, gpu, mpirun, start};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// A batch that every schedule takes, and every part of the loss.
const SET: [&str; 7] = [
    "run.device=cuda",
    "phase.0.tokens=15360",
    "phase.0.batch=8",
    "phase.1.tokens=7680",
    "phase.0.bias_speed=0",
    "phase.0.balance_weight=1e-2",
    "phase.0.mtp_weight=0.3",
];

/// Of two GPUs: expert parallel on one node and on two, pipelines, data parallel with ZeRO-1; each over both transports.
const LAYOUTS: &[(&str, &[&str])] = &[
    ("ep2", &["parallel.ep=2"]),
    ("ep2-two-nodes", &["parallel.ep=2", "parallel.ranks_per_node=1"]),
    ("ep2-paired", &["parallel.ep=2", "parallel.schedule=paired"]),
    ("pp2-1f1b", &["parallel.pp=2"]),
    ("pp2-zb1p", &["parallel.pp=2", "parallel.schedule=zb1p"]),
    ("pp2-dualpipe", &["parallel.pp=2", "parallel.schedule=dualpipe"]),
    ("dp2", &[]),
];

fn two_gpus(test: &str) -> Option<()> {
    gpu(test)?;
    let count = tch::Cuda::device_count();
    if count < 2 {
        println!("SKIPPED {test}: {count} GPU");
        return None;
    }
    Some(())
}

fn run(name: &str, set: &[&str]) -> Run {
    Run::new(&format!("gpus-{name}"), &[&WIDE[..], &SET, set].concat())
}

/// Four at a time: the GPUs have room for small models.
fn side_by_side<T: Sync>(jobs: &[T], work: impl Fn(&T) + Sync) {
    for some in jobs.chunks(4) {
        std::thread::scope(|scope| some.iter().for_each(|job| drop(scope.spawn(|| work(job)))));
    }
}

#[test]
fn every_layout_of_two_gpus_is_one_gpu() {
    let Some(()) = two_gpus("every_layout_of_two_gpus_is_one_gpu") else { return };
    for (precision, limit) in [("f32", 1e-5), ("bf16", 1e-2), ("fp8", 1e-2)] {
        let precision_set = format!("run.precision={precision}");
        let set = [&precision_set[..], "run.stop_after=10"];
        let one = run(&format!("one-{precision}"), &set);
        start(&one.train_args(), 75);
        let jobs: Vec<_> = ["peer", "nccl"].iter().flat_map(|transport| LAYOUTS.iter().map(move |layout| (transport, layout))).collect();
        side_by_side(&jobs, |(transport, (layout, more))| {
            let transport_set = format!("parallel.transport={transport}");
            let two = run(&format!("{layout}-{precision}-{transport}"), &[&set[..], &[&transport_set[..]], *more].concat());
            mpirun(2, &two.train_args(), 75);
            let gap = gap(&two.series("loss"), &one.series("loss"));
            println!("{precision}, {transport}, {layout}: ten losses at most {gap:.2e} from one GPU's");
            assert!(gap < limit, "{layout} over {transport} in {precision}: {gap:e}");
        });
    }
}

/// The run directory of `from`, copied, with another `[parallel]`.
fn moved(from: &Run, name: &str, parallel: &[&str]) -> Run {
    let to = run(name, parallel);
    let copied = Command::new("cp").arg("-r").arg(from.dir()).arg(to.dir()).status().expect("cp starts");
    assert!(copied.success());
    std::fs::write(trainer::run::resolved(to.dir()), to.config().to_toml().expect("TOML")).expect("a config is written");
    to
}

#[test]
fn a_checkpoint_of_each_layout_goes_on_in_each() {
    let Some(()) = two_gpus("a_checkpoint_of_each_layout_goes_on_in_each") else { return };
    let precision = "run.precision=f32";
    let one = run("one-whole", &[precision, "run.stop_after=8"]);
    start(&one.train_args(), 75);
    let half = |from: &str, more: &[&str]| run(&format!("half-{from}"), &[&[precision, "run.stop_after=4"][..], more].concat());
    side_by_side(LAYOUTS, |(from, more)| drop(mpirun(2, &half(from, more).train_args(), 75)));
    let targets = || LAYOUTS.iter().copied().chain([("one", &[][..])]);
    let jobs: Vec<_> = LAYOUTS.iter().flat_map(|from| targets().map(move |to| (from, to))).collect();
    side_by_side(&jobs, |((from, begun), (to, more))| {
        let on = moved(&half(from, begun), &format!("{from}-to-{to}"), &[&[precision][..], *more].concat());
        let resume = ["resume".into(), on.dir().display().to_string(), "--stop-after".into(), "8".into()];
        if *to == "one" { drop(start(&resume, 75)) } else { drop(mpirun(2, &resume, 75)) };
        let gap = gap(&on.series("loss"), &one.series("loss"));
        println!("{from} to {to}: eight losses at most {gap:.2e} from one GPU's");
        assert!(gap < 1e-5, "{from} to {to}: {gap:e}");
    });
}

#[test]
fn every_byte_of_a_thousand_exchanges_is_right() {
    let Some(()) = two_gpus("every_byte_of_a_thousand_exchanges_is_right") else { return };
    let example = crate::support::binary().with_file_name("examples").join("comm_check");
    for over in ["peer", "nccl"] {
        let output = Command::new("timeout")
            .args(["300", "mpirun", "--oversubscribe", "-n", "2"])
            .arg(&example)
            .args(["--gpu", over])
            .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
            .output()
            .expect("mpirun starts");
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && text.contains(&format!("GPU tensors equal on 2 ranks over {over}")), "{over}: {text}");
    }
}

/// Processes that hold memory of a GPU and name this run.
fn on_gpus(run: &Run) -> usize {
    let output = Command::new("nvidia-smi").args(["--query-compute-apps=pid", "--format=csv,noheader"]).output().expect("nvidia-smi");
    let pids = String::from_utf8_lossy(&output.stdout).into_owned();
    processes(run).iter().filter(|(pid, _, _)| pids.lines().any(|line| line.trim() == pid.to_string())).count()
}

#[test]
fn a_rank_that_dies_or_stops_in_mid_exchange_frees_both_gpus_and_the_run_ends_as_if_it_had_not() {
    let Some(()) = two_gpus("a_rank_that_dies_or_stops_in_mid_exchange_frees_both_gpus_and_the_run_ends_as_if_it_had_not") else { return };
    let set = ["parallel.ep=2", "run.precision=bf16", "run.deterministic=true", "checkpoint.every=5"];
    let launch = |options: &str| local(&format!("--standalone --nproc-per-node 2 --back-off 0 {options}"));
    let whole = run("whole", &set);
    let mut started = Started::train(launch(""), &whole, "out");
    assert_eq!(started.code(), 0, "{}", started.said());
    for (signal_name, options, words) in [("KILL", "", "was killed by signal 9"), ("STOP", "--hang-floor 8 --hang-steps 20", "rank 1")] {
        let hurt = run(&format!("hurt-{signal_name}"), &set);
        let mut started = Started::train(launch(options), &hurt, "out");
        hurt.wait_for_step(7);
        let victim = rank_pid(&hurt, 1).expect("rank 1");
        signal(victim, signal_name);
        let start = Instant::now();
        wait("the end of the ranks", || !Path::new(&format!("/proc/{victim}")).exists());
        let (seconds, left) = (start.elapsed().as_secs_f64(), on_gpus(&hurt));
        assert_eq!(started.code(), 0, "{}", started.said());
        started.says(words);
        assert!(hurt.state().iter().all(|(name, tensor)| tensor.equal(&whole.state()[name])), "{signal_name}: the end differs");
        assert_eq!(hurt.series("loss").last(), whole.series("loss").last());
        println!("SIG{signal_name}: rank 1 was gone after {seconds:.1} s, {left} processes on the GPUs then; the run ended bit-equal to the undisturbed one");
        assert!(signal_name == "STOP" || seconds < 10.0, "{seconds:.1} s");
    }
}
