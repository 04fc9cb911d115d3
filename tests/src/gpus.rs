//! Two, four and eight GPUs against one: every layout's losses, checkpoints that go from each to another, and a rank that dies
//! or stops in the middle. With fewer GPUs each test says that it was skipped; that every layout is one, and the same run,
//! CPUs show, and ranks that share what GPUs there are.
use crate::launching::{Started, local, processes, signal, wait};
use crate::layouts::over_threads;
use crate::support::{Run, WIDE, gap, gpu, mpirun, start, within};
use std::collections::VecDeque;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;
use trainer::run::Start;

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

/// On more than two: two micro-batches a rank for the longest pipe beside others, and a layer for each stage.
const WIDER: [&str; 4] = ["phase.0.batch=16", "phase.1.tokens=8192", "phase.1.batch=16", "phase.1.micro_batch=1"];

/// A name, and `[parallel]`.
type Layout = (&'static str, &'static [&'static str]);

/// Expert parallel on one node and on two, pipelines, data parallel with ZeRO-1.
const TWO: &[Layout] = &[
    ("ep2", &["parallel.ep=2"]),
    ("ep2-two-nodes", &["parallel.ep=2", "parallel.ranks_per_node=1"]),
    ("ep2-paired", &["parallel.ep=2", "parallel.schedule=paired"]),
    ("pp2-1f1b", &["parallel.pp=2"]),
    ("pp2-zb1p", &["parallel.pp=2", "parallel.schedule=zb1p"]),
    ("pp2-dualpipe", &["parallel.pp=2", "parallel.schedule=dualpipe"]),
    ("pp2-dualpipe-few", &["parallel.pp=2", "parallel.schedule=dualpipe", "phase.0.micro_batch=4", "phase.1.micro_batch=4"]),
    ("dp2", &[]),
];

const FOUR: &[Layout] = &[
    ("pp2-ep2-dualpipe", &["parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"]),
    ("ep4", &["parallel.ep=4"]),
    ("ep4-two-nodes", &["parallel.ep=4", "parallel.ranks_per_node=2"]),
    ("dp2-ep2", &["parallel.ep=2"]),
    ("pp4-1f1b", &["parallel.pp=4"]),
    ("pp4-zb1p", &["parallel.pp=4", "parallel.schedule=zb1p"]),
    ("pp4-dualpipe", &["parallel.pp=4", "parallel.schedule=dualpipe"]),
    ("pp4-dualpipe-few", &["parallel.pp=4", "parallel.schedule=dualpipe", "phase.0.micro_batch=4", "phase.1.micro_batch=4"]),
];

const EIGHT: &[Layout] = &[
    ("pp2-ep4-dualpipe", &["parallel.pp=2", "parallel.ep=4", "parallel.schedule=dualpipe"]),
    ("pp4-ep2-dualpipe", &["parallel.pp=4", "parallel.ep=2", "parallel.schedule=dualpipe"]),
    ("dp2-ep4", &["parallel.ep=4"]),
    ("ep8", &["parallel.ep=8"]),
    ("ep8-two-nodes", &["parallel.ep=8", "parallel.ranks_per_node=4"]),
    ("pp8-dualpipe", &["parallel.pp=8", "parallel.schedule=dualpipe"]),
];

/// A GPU a rank.
const OWN: [&str; 2] = ["peer", "nccl"];
/// Through the host, and ranks may share a GPU.
const SHARED: [&str; 1] = ["staged"];

fn layouts(gpus: usize) -> &'static [Layout] {
    match gpus {
        2 => TWO,
        4 => FOUR,
        8 => EIGHT,
        _ => unreachable!("no layouts of {gpus} GPUs"),
    }
}

/// None: fewer are here, and the test has said so.
fn enough(test: &str, wanted: usize) -> Option<()> {
    gpu(test)?;
    let count = tch::Cuda::device_count() as usize;
    if count < wanted {
        println!("SKIPPED {test}: {count} GPU(s) of {wanted}");
        return None;
    }
    Some(())
}

/// All of them, as far as there are layouts.
fn all_gpus(test: &str) -> Option<usize> {
    enough(test, 2)?;
    [8, 4, 2].into_iter().find(|&gpus| gpus <= tch::Cuda::device_count() as usize)
}

/// The run that layouts of so many GPUs are compared with.
fn run(gpus: usize, name: &str, set: &[&str]) -> Run {
    let layers = format!("model.num_hidden_layers={gpus}");
    let wider = [&[&layers[..]], &WIDER[..]].concat();
    Run::new(&format!("gpus-{gpus}-{name}"), &[&WIDE[..], &SET, if gpus > 2 { &wider } else { &[] }, set].concat())
}

/// Four at a time: more have room, but GPUs take turns with them and are no sooner done. Fewer of many ranks: 32 processes that
/// begin at once on two GPUs get CUDA's "out of memory", whatever is free there.
fn side_by_side<T: Send>(ranks: usize, jobs: impl IntoIterator<Item = T>, work: impl Fn(T) + Sync) {
    let queue = Mutex::new(jobs.into_iter().collect::<VecDeque<T>>());
    let next = || queue.lock().expect("nobody panics with it").pop_front();
    std::thread::scope(|scope| {
        for _ in 0..(16 / ranks).min(4) {
            scope.spawn(|| {
                while let Some(job) = next() {
                    work(job);
                }
            });
        }
    });
}

fn every_layout_is_one_gpu(test: &str, (gpus, transports): (usize, &[&str]), (precision, limit): (&str, f64)) {
    let Some(()) = enough(test, if transports == SHARED { 1 } else { gpus }) else { return };
    let precision_set = format!("run.precision={precision}");
    let set = [&precision_set[..], "run.stop_after=10"];
    let one = run(gpus, &format!("one-{precision}-{}", transports[0]), &set);
    start(&one.train_args(), 75);
    let jobs = transports.iter().flat_map(|transport| layouts(gpus).iter().map(move |layout| (transport, layout)));
    side_by_side(gpus, jobs, |(transport, (layout, more))| {
        let transport_set = format!("parallel.transport={transport}");
        let several = run(gpus, &format!("{layout}-{precision}-{transport}"), &[&set[..], &[&transport_set[..]], *more].concat());
        mpirun(gpus, &several.train_args(), 75);
        let what = format!("{gpus} ranks, {precision}, {transport}, {layout}");
        let (loss, norm) = within(limit, &several, &one, &what);
        println!("{what}: ten losses at most {loss:.2e} from one GPU's, gradient norms {norm:.2e}");
    });
}

macro_rules! every_layout_is_one_gpu {
    ($($name:ident: $gpus:literal, $transports:ident, $precision:literal, $limit:literal;)*) => {
        $(#[test]
        fn $name() {
            every_layout_is_one_gpu(stringify!($name), ($gpus, &$transports), ($precision, $limit));
        })*
    };
}

every_layout_is_one_gpu! {
    every_layout_of_two_gpus_is_one_gpu_in_f32: 2, OWN, "f32", 1e-5;
    every_layout_of_two_gpus_is_one_gpu_in_bf16: 2, OWN, "bf16", 1e-2;
    every_layout_of_two_gpus_is_one_gpu_in_fp8: 2, OWN, "fp8", 1e-2;
    every_layout_of_four_gpus_is_one_gpu_in_f32: 4, OWN, "f32", 1e-5;
    every_layout_of_four_gpus_is_one_gpu_in_bf16: 4, OWN, "bf16", 1e-2;
    every_layout_of_four_gpus_is_one_gpu_in_fp8: 4, OWN, "fp8", 1e-2;
    every_layout_of_eight_gpus_is_one_gpu_in_f32: 8, OWN, "f32", 1e-5;
    every_layout_of_eight_gpus_is_one_gpu_in_bf16: 8, OWN, "bf16", 1e-2;
    every_layout_of_eight_gpus_is_one_gpu_in_fp8: 8, OWN, "fp8", 1e-2;
    every_layout_of_four_ranks_that_share_gpus_is_one_gpu_in_f32: 4, SHARED, "f32", 1e-5;
    every_layout_of_four_ranks_that_share_gpus_is_one_gpu_in_bf16: 4, SHARED, "bf16", 1e-2;
    every_layout_of_four_ranks_that_share_gpus_is_one_gpu_in_fp8: 4, SHARED, "fp8", 1e-2;
    every_layout_of_eight_ranks_that_share_gpus_is_one_gpu_in_f32: 8, SHARED, "f32", 1e-5;
    every_layout_of_eight_ranks_that_share_gpus_is_one_gpu_in_bf16: 8, SHARED, "bf16", 1e-2;
    every_layout_of_eight_ranks_that_share_gpus_is_one_gpu_in_fp8: 8, SHARED, "fp8", 1e-2;
}

/// The same settings on threads: no layout is refused, and each is the run of one rank, to rounding.
#[test]
fn every_layout_of_gpus_is_one_rank_on_cpus_too() {
    for gpus in [2, 4, 8] {
        let set = ["run.device=cpu", "run.precision=f64"];
        let one = run(gpus, "cpu-one", &set);
        over_threads(&one, 1, Start::Fresh, Some(2));
        for (layout, more) in layouts(gpus) {
            let several = run(gpus, &format!("cpu-{layout}"), &[&set[..], *more].concat());
            over_threads(&several, gpus, Start::Fresh, Some(2));
            several.assert_same(&one, 1e-11);
        }
    }
}

/// What `within` is for: a part of the gradients of four times its weight passes by the losses.
#[test]
fn gradients_of_another_scale_are_told_by_their_norms() {
    let of = |name: &str, weight: &str| {
        let several = run(2, name, &["run.device=cpu", "run.precision=f64", weight]);
        over_threads(&several, 1, Start::Fresh, Some(3));
        several
    };
    let (right, wrong) = (of("scale-right", "phase.0.mtp_weight=0.3"), of("scale-wrong", "phase.0.mtp_weight=1.2"));
    assert!(gap(&wrong.series("loss"), &right.series("loss")) < 1e-2);
    assert!(std::panic::catch_unwind(|| within(1e-2, &wrong, &right, "scale")).is_err());
    assert_eq!(within(1e-2, &right, &right, "scale"), (0.0, 0.0));
}

/// The run directory of `from`, copied, with another `[parallel]`.
fn moved(from: &Run, gpus: usize, name: &str, parallel: &[&str]) -> Run {
    let to = run(gpus, name, parallel);
    let copied = Command::new("cp").arg("-r").arg(from.dir()).arg(to.dir()).status().expect("cp starts");
    assert!(copied.success());
    std::fs::write(trainer::run::resolved(to.dir()), to.config().to_toml().expect("TOML")).expect("a config is written");
    to
}

/// `ranks` ranks go on with a run that was stopped, to the end of step `last`.
fn go_on(run: &Run, ranks: usize, last: u64) {
    let resume = ["resume".into(), run.dir().display().to_string(), "--stop-after".into(), last.to_string()];
    match ranks {
        1 => start(&resume, 75),
        _ => mpirun(ranks, &resume, 75),
    };
}

/// (layout that begins, ranks and layout that go on)
type Move = (&'static Layout, usize, Layout);

/// Four steps in one layout and four in another, for each of `moves`, against eight on one GPU.
fn checkpoints_go_on(test: &str, (gpus, transport): (usize, &str), moves: impl Fn(usize) -> Vec<Move>) {
    let Some(()) = enough(test, if transport == SHARED[0] { 1 } else { gpus }) else { return };
    let over = format!("parallel.transport={transport}");
    let set = ["run.precision=f32", &over];
    let named = |name: &str, more: &[&str]| run(gpus, &format!("{name}-{transport}"), &[&set[..], more].concat());
    let one = named("one-whole", &["run.stop_after=8"]);
    start(&one.train_args(), 75);
    let half = |(from, more): &Layout| named(&format!("half-{from}"), &[&["run.stop_after=4"][..], *more].concat());
    side_by_side(gpus, layouts(gpus), |from| drop(mpirun(gpus, &half(from).train_args(), 75)));
    let jobs = (0..layouts(gpus).len()).flat_map(moves);
    side_by_side(gpus, jobs, |(from, ranks, (to, more))| {
        let on = moved(&half(from), gpus, &format!("{}-to-{to}-{transport}", from.0), &[&set[..], more].concat());
        go_on(&on, ranks, 8);
        let what = format!("{gpus} ranks, {transport}, {} to {to} on {ranks}", from.0);
        let (loss, norm) = within(1e-5, &on, &one, &what);
        println!("{what}: eight losses at most {loss:.2e} from one GPU's, gradient norms {norm:.2e}");
    });
}

const ONE: Layout = ("one", &[]);

#[test]
fn a_checkpoint_of_each_layout_goes_on_in_each() {
    let all = |from: usize| TWO.iter().map(move |&to| (&TWO[from], 2, to)).chain([(&TWO[from], 1, ONE)]).collect();
    checkpoints_go_on("a_checkpoint_of_each_layout_goes_on_in_each", (2, "peer"), all);
}

/// In the next layout, in one of half the GPUs, and on one GPU.
fn around(gpus: usize) -> impl Fn(usize) -> Vec<Move> {
    move |from| {
        let (all, fewer) = (layouts(gpus), layouts(gpus / 2));
        vec![(&all[from], gpus, all[(from + 1) % all.len()]), (&all[from], gpus / 2, fewer[from % fewer.len()]), (&all[from], 1, ONE)]
    }
}

#[test]
fn checkpoints_of_four_gpus_go_on_in_another_layout_on_two_and_on_one() {
    checkpoints_go_on("checkpoints_of_four_gpus_go_on_in_another_layout_on_two_and_on_one", (4, "peer"), around(4));
}

#[test]
fn checkpoints_of_eight_gpus_go_on_in_another_layout_on_four_and_on_one() {
    checkpoints_go_on("checkpoints_of_eight_gpus_go_on_in_another_layout_on_four_and_on_one", (8, "peer"), around(8));
}

#[test]
fn checkpoints_of_four_ranks_that_share_gpus_go_on_in_other_layouts() {
    checkpoints_go_on("checkpoints_of_four_ranks_that_share_gpus_go_on_in_other_layouts", (4, SHARED[0]), around(4));
}

#[test]
fn checkpoints_of_eight_ranks_that_share_gpus_go_on_in_other_layouts() {
    checkpoints_go_on("checkpoints_of_eight_ranks_that_share_gpus_go_on_in_other_layouts", (8, SHARED[0]), around(8));
}

#[test]
fn every_byte_of_a_thousand_exchanges_is_right() {
    let Some(gpus) = all_gpus("every_byte_of_a_thousand_exchanges_is_right") else { return };
    let example = crate::support::binary().with_file_name("examples").join("comm_check");
    for over in ["peer", "nccl"] {
        let output = Command::new("timeout")
            .args(["300", "mpirun", "--oversubscribe", "-n", &gpus.to_string()])
            .arg(&example)
            .args(["--gpu", over])
            .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
            .output()
            .expect("mpirun starts");
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && text.contains(&format!("GPU tensors equal on {gpus} ranks over {over}")), "{over}: {text}");
    }
}

/// MiB in use on each GPU, whoever uses them.
fn used() -> Vec<i64> {
    let output =
        Command::new("nvidia-smi").args(["--query-gpu=memory.used", "--format=csv,noheader,nounits"]).output().expect("nvidia-smi");
    String::from_utf8_lossy(&output.stdout).lines().filter_map(|line| line.trim().parse().ok()).collect()
}

/// Sends rank 1 of a run that is on its way a signal: seconds until every process that was a rank then is gone, and with it
/// what it held of its GPU.
fn hurt(run: &Run, gpus: usize, name: &str) -> f64 {
    run.wait_for_step(7);
    let ranks: Vec<(u32, usize)> = processes(run).into_iter().filter_map(|(pid, rank, _)| Some((pid, rank?))).collect();
    assert_eq!(ranks.len(), gpus, "{ranks:?}");
    let &(victim, _) = ranks.iter().find(|&&(_, rank)| rank == 1).expect("rank 1");
    signal(victim, name);
    let start = Instant::now();
    wait("the end of the ranks", || ranks.iter().all(|(pid, _)| !Path::new(&format!("/proc/{pid}")).exists()));
    start.elapsed().as_secs_f64()
}

#[test]
fn a_rank_that_dies_or_stops_in_mid_exchange_frees_all_gpus_and_the_run_ends_as_if_it_had_not() {
    let Some(gpus) = all_gpus("a_rank_that_dies_or_stops_in_mid_exchange_frees_all_gpus_and_the_run_ends_as_if_it_had_not") else { return };
    let experts = format!("parallel.ep={gpus}");
    let set = [&experts[..], "run.precision=bf16", "checkpoint.every=5"];
    let launch = |options: &str| local(&format!("--standalone --nproc-per-node {gpus} --back-off 0 {options}"));
    let whole = run(gpus, "whole", &set);
    let mut started = Started::train(launch(""), &whole, "out");
    assert_eq!(started.code(), 0, "{}", started.said());
    for (name, options, words) in [("KILL", "", "was killed by signal 9"), ("STOP", "--hang-floor 8 --hang-steps 20", "rank 1")] {
        let other = run(gpus, &format!("hurt-{name}"), &set);
        let mut started = Started::train(launch(options), &other, "out");
        let seconds = hurt(&other, gpus, name);
        assert_eq!(started.code(), 0, "{}", started.said());
        started.says(words);
        assert!(other.state().iter().all(|(name, tensor)| tensor.equal(&whole.state()[name])), "{name}: the end differs");
        assert_eq!(other.series("loss").last(), whole.series("loss").last());
        println!("SIG{name}: all {gpus} ranks were gone after {seconds:.1} s; the run ended bit-equal to the undisturbed one");
        assert!(name == "STOP" || seconds < 10.0, "{seconds:.1} s");
    }
}

/// Its peers wait for it in a transfer, and so would NCCL when it gives back what it has.
#[test]
fn a_rank_that_fails_says_why_and_ends_all() {
    let fails = |device: &str, transport: &str| {
        let set = [&format!("run.device={device}")[..], &format!("parallel.transport={transport}"), "parallel.ep=2", "run.precision=bf16"];
        let run = run(2, &format!("fails-{device}-{transport}"), &[&set[..], &["faults.inject=[{kind=\"fail\",rank=1,step=5}]"]].concat());
        let said = mpirun(2, &run.train_args(), 1);
        assert!(said.contains("error (rank 1): faults.inject: a fail before step 5"), "{device}, {transport}: {said}");
    };
    fails("cpu", "peer");
    let Some(()) = enough("a_rank_that_fails_says_why_and_ends_all", 2) else { return };
    for transport in OWN {
        fails("cuda", transport);
    }
}

#[test]
fn a_run_whose_rank_died_goes_on_on_half_of_the_gpus() {
    let Some(gpus) = all_gpus("a_run_whose_rank_died_goes_on_on_half_of_the_gpus") else { return };
    let set = |ranks: usize, more: &'static str| {
        [format!("parallel.ep={ranks}"), "run.precision=f32".into(), "checkpoint.every=5".into(), more.into()]
    };
    let of = |name: &str, set: [String; 4]| run(gpus, name, &set.each_ref().map(String::as_str));
    let one = of("alone", set(1, "run.stop_after=14"));
    start(&one.train_args(), 75);
    let (died, before) = (of("died", set(gpus, "checkpoint.keep_last=4")), used());
    let mut started = Started::train(local(&format!("--standalone --nproc-per-node {gpus} --max-restarts 0")), &died, "out");
    let (seconds, after) = (hurt(&died, gpus, "KILL"), used());
    assert_ne!(started.code(), 0, "{}", started.said());
    let half = set(gpus / 2, "checkpoint.keep_last=4");
    let on = moved(&died, gpus, "on-half", &half.each_ref().map(String::as_str));
    go_on(&on, gpus / 2, 14);
    let (loss, norm) = within(1e-5, &on, &one, "on half of the GPUs");
    println!(
        "SIGKILL: all {gpus} ranks were gone after {seconds:.1} s, MiB in use on the GPUs before {before:?} and then {after:?}; on {} GPU(s) fourteen losses at most {loss:.2e} from one GPU's, gradient norms {norm:.2e}",
        gpus / 2
    );
    assert!(seconds < 10.0, "{seconds:.1} s");
}
