//! Runs on a GPU against the same runs on the CPU, against themselves, and of several ranks that share the GPU. Without a
//! GPU each test says that it was skipped; the one that needs no GPU says so with one.
use crate::support::{Run, WIDE, gap, gpu, mpirun, scratch, start, within};
use kernels::device::{self, Found, Options};
use std::collections::BTreeMap;
use trainer::checkpoint;

const TOKENS: [&str; 2] = ["phase.0.tokens=6144", "phase.1.tokens=7680"];

fn run(name: &str, set: &[&str]) -> Run {
    Run::new(&format!("gpu-{name}"), &[set, &WIDE, &TOKENS].concat())
}

fn train(run: &Run, stop_after: u64, expected: i32) {
    let mut args = run.train_args();
    args.extend(["--set".into(), format!("run.stop_after={stop_after}")]);
    start(&args, expected);
}

#[test]
fn without_a_gpu_the_run_says_what_it_looked_for() {
    if !matches!(
        device::open(&Options { local_rank: 0, torch_cuda: None, nvrtc_folder: None, kernel_cache: scratch().join("runs/.kernels"), spared_sms: 0 }),
        Ok(Found::Cpu(_))
    ) {
        return println!("SKIPPED without_a_gpu_the_run_says_what_it_looked_for: there is a GPU");
    }
    let run = run("none", &["run.device=cuda"]);
    let said = start(&run.train_args(), 1);
    assert!(said.contains("run.device = \"cuda\"") && (said.contains("libcuda.so.1") || said.contains("libtorch_cuda.so")), "{said}");
    assert!(!run.dir().exists(), "nothing is written");
}

#[test]
fn the_first_losses_are_the_cpus() {
    let Some(()) = gpu("the_first_losses_are_the_cpus") else { return };
    for (precision, limit) in [("f64", 1e-9), ("f32", 1e-5), ("bf16", 1e-2), ("fp8", 1e-2)] {
        let precision_set = format!("run.precision={precision}");
        let on = |device: &str| {
            let run = run(&format!("{precision}-{device}"), &[&precision_set, &format!("run.device={device}")]);
            train(&run, 5, 75);
            run
        };
        let (cpu, gpu) = (on("cpu"), on("cuda"));
        let (loss, norm) = within(limit, &gpu, &cpu, precision);
        let [cpu, gpu] = [cpu, gpu].map(|run| run.series("loss"));
        println!("{precision}: CPU {cpu:.6?}\n     GPU {gpu:.6?}, at most {loss:.2e} apart, gradient norms {norm:.2e}");
    }
}

#[test]
fn a_run_repeats_and_resumes_bit_for_bit() {
    let Some(()) = gpu("a_run_repeats_and_resumes_bit_for_bit") else { return };
    for (precision, moments) in [("bf16", "f32"), ("bf16", "bf16"), ("fp8", "bf16")] {
        let (precision_set, moments_set) = (format!("run.precision={precision}"), format!("optimizer.moments={moments}"));
        let set = ["run.device=cuda", &precision_set, &moments_set];
        let named = |name: &str| run(&format!("{name}-{precision}-{moments}"), &set);
        let (whole, again, parts) = (named("whole"), named("again"), named("parts"));
        train(&whole, 10, 75);
        train(&again, 10, 75);
        train(&parts, 5, 75);
        start(&["resume".into(), parts.dir().display().to_string(), "--stop-after".into(), "10".into()], 75);
        for other in [&again, &parts] {
            assert_eq!(other.series("loss"), whole.series("loss"), "{precision}, {moments}");
            assert_eq!(other.series("grad_norm"), whole.series("grad_norm"), "{precision}, {moments}");
            let (a, b) = (other.state(), whole.state());
            assert!(a.iter().all(|(name, tensor)| tensor.equal(&b[name])), "weights or moments differ, {precision}, {moments}");
        }
        println!("{precision}, moments {moments}: two runs of 10 steps, and one of 5 + 5, are bit-equal: {:.6?}", whole.series("loss"));
    }
}

/// Each step's averages from those before it and its masters, bit for bit: on a GPU they are copied beside the next step.
#[test]
fn averages_are_of_every_update() {
    let of = |device: &str, every: usize| {
        let set = ["run.precision=bf16", "ema.decay=0.75", "checkpoint.keep_last=9", "validation.every=0"];
        let more = [format!("run.device={device}"), format!("checkpoint.every={every}")];
        let run = run(&format!("averages-{device}-{every}"), &[&set[..], &more.each_ref().map(String::as_str)].concat());
        train(&run, 6, 75);
        run
    };
    let on = |device: &str| {
        // A checkpoint waits for the copy; without one before the end it goes beside the step.
        let (run, beside) = (of(device, 1), of(device, 0).state());
        assert!(run.state().iter().all(|(name, tensor)| tensor.equal(&beside[name])), "{device}: copies beside steps differ");
        let mut before = BTreeMap::new();
        for (step, path) in checkpoint::list(run.dir()).expect("a list") {
            let (_, state) = checkpoint::load(&path, |_| true).expect("a checkpoint");
            for (name, average) in state.iter().filter(|(name, _)| name.starts_with("ema/")) {
                let master = &state[&name.replace("ema/", "weight/")];
                if let Some(before) = before.insert(name.clone(), average.copy()) {
                    assert!(average.equal(&(&before + (master - &before) * 0.25)), "{device}, step {step}: {name}");
                    assert!(!average.equal(master), "{device}, step {step}: {name} is no average");
                }
            }
        }
        assert!(before.len() > 10, "{}", before.len());
    };
    on("cpu");
    let Some(()) = gpu("averages_are_of_every_update") else { return };
    on("cuda");
}

#[test]
fn the_sentinel_looks_and_changes_nothing() {
    let Some(()) = gpu("the_sentinel_looks_and_changes_nothing") else { return };
    let set = ["run.device=cuda", "run.precision=fp8"];
    let (plain, watched) = (run("unwatched", &set), run("watched", &[&set[..], &["sentinel.every=1", "sentinel.limit=0.3"]].concat()));
    train(&plain, 20, 75);
    train(&watched, 20, 75);
    assert_eq!(watched.series("loss"), plain.series("loss"));
    let log = std::fs::read_to_string(watched.dir().join("log/rank-0.jsonl")).expect("a log");
    assert!(!log.contains("fp8-fallback"), "{log}");
    let fallen = run("fallen", &[&set[..], &["sentinel.every=1", "sentinel.limit=1e-6"]].concat());
    train(&fallen, 20, 75);
    let gap = gap(&fallen.series("loss"), &plain.series("loss"));
    println!("with every linear in BF16 in turn the losses are at most {gap:.2e} from FP8's");
    assert!(gap > 0.0 && gap < 1e-2, "{gap:e}");
}

#[test]
fn four_ranks_that_share_the_gpu_are_one_rank() {
    let Some(()) = gpu("four_ranks_that_share_the_gpu_are_one_rank") else { return };
    for (precision, limit) in [("f32", 1e-5), ("bf16", 1e-2)] {
        let precision_set = format!("run.precision={precision}");
        let set = ["run.device=cuda", &precision_set, "phase.0.bias_speed=0", "run.stop_after=8"];
        let one = run(&format!("one-{precision}"), &set);
        start(&one.train_args(), 75);
        for (layout, more) in [("dp4", ""), ("ep4", "parallel.ep=4"), ("pp2-ep2", "parallel.ep=2")] {
            let mut set = set.to_vec();
            set.extend([more, if layout.starts_with("pp") { "parallel.pp=2" } else { "" }].into_iter().filter(|set| !set.is_empty()));
            let four = run(&format!("{layout}-{precision}"), &set);
            mpirun(4, &four.train_args(), 75);
            let (loss, norm) = within(limit, &four, &one, &format!("{precision}, {layout}"));
            println!("{precision}, {layout}: losses at most {loss:.2e} from one rank's, gradient norms {norm:.2e}");
        }
    }
}
