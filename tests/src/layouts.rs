//! Every layout is the same run: loss and every gradient against one rank, twenty steps, and one checkpoint for all.
use crate::support::{Run, distance, mpirun, tokens};
use model::MicroBatch;
use parallel::comm::Comm;
use parallel::comm::local::run_local;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};
use trainer::coordinator::StopSignal;
use trainer::phase::Plan;
use trainer::run::{Start, train};
use trainer::step::{Totals, Trainer};
use trainer::zero::Shard;

/// Sequences of the global batch, and their length.
const BATCH: usize = 16;
const LENGTH: i64 = 12;

/// (pp, dp, ep, schedule, sequences of a micro-batch, other settings)
pub type Layout = (usize, usize, usize, &'static str, usize, &'static [&'static str]);

const UNEVEN: &[&str] = &["parallel.layers=[1, 4]"];
const LAST_EMPTY: &[&str] = &["parallel.layers=[2, 2, 1, 0]"];
const FIRST_EMPTY: &[&str] = &["parallel.layers=[0, 1, 3, 1]"];
const TWO_A_NODE: &[&str] = &["parallel.ranks_per_node=2"];
const ONE_A_NODE: &[&str] = &["parallel.ranks_per_node=1"];

/// Everything that can be made again is, and nothing is.
const AGAIN: &[&str] = &["recompute.rms_norm=true", "recompute.mla_up_projection=true"];
const KEPT: &[&str] = &["recompute.swiglu=false"];
const AGAIN_TWO_A_NODE: &[&str] = &["recompute.rms_norm=true", "recompute.mla_up_projection=true", "parallel.ranks_per_node=2"];

const LAYOUTS: &[Layout] = &[
    (1, 1, 1, "gpipe", 1, &[]),
    (1, 1, 1, "zb1p", 2, &[]),
    (1, 1, 1, "paired", 1, &[]),
    (1, 1, 1, "paired", 16, &[]),
    (1, 2, 1, "1f1b", 2, &[]),
    (1, 2, 2, "paired", 1, &[]),
    (1, 4, 1, "paired", 4, &[]),
    (1, 4, 2, "1f1b", 1, TWO_A_NODE),
    (1, 4, 4, "paired", 2, TWO_A_NODE),
    (1, 4, 4, "1f1b", 4, ONE_A_NODE),
    (1, 8, 4, "paired", 1, TWO_A_NODE),
    (1, 8, 8, "1f1b", 2, &[]),
    (2, 1, 1, "gpipe", 2, &[]),
    (2, 1, 1, "1f1b", 16, &[]),
    (2, 1, 1, "zb1p", 1, UNEVEN),
    (2, 1, 1, "dualpipe", 2, UNEVEN),
    (2, 1, 1, "dualpipe", 4, &[]),
    (2, 2, 1, "1f1b", 1, UNEVEN),
    (2, 2, 2, "dualpipe", 1, &[]),
    (2, 2, 2, "zb1p", 4, TWO_A_NODE),
    (2, 4, 2, "dualpipe", 1, TWO_A_NODE),
    (2, 4, 4, "dualpipe", 1, TWO_A_NODE),
    (2, 4, 4, "gpipe", 2, ONE_A_NODE),
    (4, 1, 1, "gpipe", 1, LAST_EMPTY),
    (4, 1, 1, "1f1b", 1, FIRST_EMPTY),
    (4, 1, 1, "zb1p", 2, &[]),
    (4, 1, 1, "dualpipe", 1, LAST_EMPTY),
    (4, 1, 1, "dualpipe", 2, FIRST_EMPTY),
    (4, 2, 2, "1f1b", 1, LAST_EMPTY),
    (4, 2, 2, "zb1p", 1, &[]),
    (4, 2, 2, "dualpipe", 1, &[]),
    (4, 2, 1, "dualpipe", 1, TWO_A_NODE),
    // Too few micro-batches for DualPipe: 1F1B on one copy, the other's gradients are zero.
    (4, 2, 2, "dualpipe", 2, LAST_EMPTY),
    (1, 1, 1, "paired", 2, AGAIN),
    (1, 4, 4, "paired", 1, AGAIN_TWO_A_NODE),
    (2, 2, 2, "dualpipe", 1, AGAIN),
    (2, 2, 2, "zb1p", 2, KEPT),
];

/// What a step found before its update: losses and counts, and every gradient, whole, by name.
pub struct Found {
    pub losses: Vec<f64>,
    pub gradients: BTreeMap<String, Tensor>,
}

/// One rank's: (name, first row, rows of the whole, the part).
type Part = (String, i64, i64, Tensor);

pub fn find(run: &Run, (pp, dp, ep, schedule, size, _): Layout) -> Found {
    let config = run.config();
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let one_rank = |world: Comm| -> (Vec<f64>, Vec<Part>) {
        let mesh = config.mesh(&vec![0; world.size()]).expect("a layout");
        assert_eq!((mesh.pp, mesh.dp, mesh.ep, mesh.schedule.to_string().as_str()), (pp, dp, ep, schedule));
        let place = mesh.place(world.rank());
        let mut trainer = Trainer::new(&config, &mesh, world).expect("a trainer");
        let (moment, each) = (plan.at(0).expect("a phase"), BATCH / dp);
        let all = tokens(5, &[BATCH as i64, LENGTH + 1], config.model.vocab_size);
        let mine = all.narrow(0, (place.dp * each) as i64, each as i64);
        let batch: Vec<MicroBatch> = mine.split(size as i64, 0).into_iter().map(MicroBatch::new).collect();
        let step = trainer.context(&moment, BATCH as u64);
        let computed = trainer.gradients(&step, &batch).expect("a step");
        let Totals { losses, counts, gradients, .. } = trainer.total(&step, &batch, computed, false).expect("sums");
        // Every token is counted once; MTP's block has one position a sequence less.
        let routed = [LENGTH, LENGTH - 1].map(|length| BATCH as i64 * length * config.model.num_experts_per_tok);
        for layer in 0..counts.size()[0] {
            let sum = counts.select(0, layer).sum(Kind::Int64).int64_value(&[]);
            assert!(routed.contains(&sum), "layer {layer} counted {sum} routes of {routed:?}");
        }
        let table = trainer.weights.table.clone();
        let part = |(shard, gradient): (&Shard, Tensor)| {
            let spec = shard.spec(table.spec(shard.id));
            (spec.name, spec.start, spec.total, gradient)
        };
        (losses, trainer.zero.shards().iter().zip(gradients).map(part).collect())
    };
    let ranks = run_local(pp * dp, one_rank);
    let mut gradients: BTreeMap<String, (Tensor, i64)> = BTreeMap::new();
    for (name, start, total, part) in ranks.iter().flat_map(|(_, parts)| parts) {
        let (whole, rows) = gradients.entry(name.clone()).or_insert_with(|| {
            let shape: Vec<i64> = std::iter::once(*total).chain(part.size()[1..].iter().copied()).collect();
            (Tensor::full(shape, f64::NAN, (part.kind(), part.device())), 0)
        });
        let mut place = whole.narrow(0, *start, part.size()[0]);
        match place.isnan().any().int64_value(&[]) {
            0 => assert!(place.equal(part), "{name}: two ranks that hold it alike have different gradients"),
            _ => place.copy_(part),
        }
        *rows += part.size()[0];
    }
    let whole = |(name, (whole, rows)): (String, (Tensor, i64))| {
        assert!(rows >= whole.size()[0] && whole.isfinite().all().int64_value(&[]) == 1, "{name} is not whole");
        (name, whole)
    };
    Found { losses: ranks[0].0.clone(), gradients: gradients.into_iter().map(whole).collect() }
}

/// Bit for bit: what is made again is what was not kept.
#[test]
fn recomputation_changes_nothing() {
    const UP: &[&str] = &["recompute.mla_up_projection=true"];
    const NORMS: &[&str] = &["recompute.rms_norm=true"];
    for precision in ["f64", "bf16", "fp8"] {
        let of = |more| {
            let layout: Layout = (1, 1, 1, "1f1b", 4, more);
            find(&run("recompute", precision, layout), layout)
        };
        // An FP8 run keeps SwiGLU's input in FP8, so there its output made again is another.
        let kept = of(if precision == "fp8" { &[] } else { KEPT });
        for more in [AGAIN, UP, NORMS] {
            let again = of(more);
            assert_eq!(again.losses, kept.losses, "{precision}, {more:?}");
            for (name, gradient) in &again.gradients {
                assert!(gradient.equal(&kept.gradients[name]), "{precision}, {more:?}: the gradient of {name} differs");
            }
        }
    }
}

pub fn run(name: &str, precision: &str, (pp, dp, ep, schedule, size, more): Layout) -> Run {
    let mut set = vec![format!("run.precision={precision}"), "model.num_hidden_layers=5".into(), format!("phase.0.sequence_length={LENGTH}")];
    set.extend([format!("phase.0.batch={BATCH}"), format!("phase.0.micro_batch={size}"), "phase.0.balance_weight=0.01".into()]);
    set.extend([format!("parallel.pp={pp}"), format!("parallel.dp={dp}"), format!("parallel.ep={ep}"), format!("parallel.schedule={schedule}")]);
    set.extend(["phase.1.batch=16".into(), "phase.1.micro_batch=1".into()]);
    if precision == "fp8" {
        // Rows of FP8 are multiples of 16.
        set.extend(["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"].map(|key| format!("model.{key}=16")));
    }
    set.extend(more.iter().map(|text| text.to_string()));
    Run::new(name, &set.iter().map(String::as_str).collect::<Vec<_>>())
}

fn assert_equals_one_rank(precision: &str, limit: f64, layouts: &[Layout]) {
    let single: Layout = (1, 1, 1, "1f1b", 1, &[]);
    let one = find(&run("parity", precision, single), single);
    assert!(one.losses[..3].iter().all(|&loss| loss > 0.0) && one.gradients.values().all(|gradient| gradient.norm().double_value(&[]) > 0.0));
    for &layout in layouts {
        let found = find(&run("parity", precision, layout), layout);
        assert_eq!(found.losses.len(), one.losses.len(), "{layout:?}");
        for (a, b) in found.losses.iter().zip(&one.losses) {
            assert!((a - b).abs() <= limit * b.abs(), "{layout:?}: losses {:?}, on one rank {:?}", found.losses, one.losses);
        }
        assert_eq!(found.gradients.keys().collect::<Vec<_>>(), one.gradients.keys().collect::<Vec<_>>(), "{layout:?}");
        for (name, gradient) in &found.gradients {
            let distance = distance(gradient, &one.gradients[name]);
            assert!(distance < limit, "{layout:?}: the gradient of {name} is {distance:.1e} from one rank's");
        }
    }
}

#[test]
fn loss_and_every_gradient_equal_one_rank_s_in_f64() {
    assert_equals_one_rank("f64", 1e-12, LAYOUTS);
}

#[test]
fn loss_and_every_gradient_equal_one_rank_s_in_f32() {
    assert_equals_one_rank("f32", 1e-5, &LAYOUTS[8..]);
}

#[test]
fn after_every_step_all_copies_of_a_weight_are_equal_bit_for_bit() {
    for layout in [LAYOUTS[18], LAYOUTS[26], LAYOUTS[30], LAYOUTS[32], LAYOUTS[17]] {
        let config = run("copies", "f64", layout).config();
        let plan = Plan::new(&config.phase, &config.data.mixture);
        let ranks = run_local(layout.0 * layout.1, |world| {
            let mesh = config.mesh(&vec![0; world.size()]).expect("a layout");
            let place = mesh.place(world.rank());
            let mut trainer = Trainer::new(&config, &mesh, world).expect("a trainer");
            let moment = plan.at(2000).expect("a phase");
            let each = (BATCH / layout.1) as i64;
            let steps = (0..3).map(|seed| {
                let mine = tokens(seed, &[BATCH as i64, LENGTH + 1], config.model.vocab_size).narrow(0, place.dp as i64 * each, each);
                let batch: Vec<MicroBatch> = mine.split(layout.4 as i64, 0).into_iter().map(MicroBatch::new).collect();
                assert!(trainer.step(&moment, &batch, false).expect("a step").applied());
                trainer.weights.ready(|_| true).expect("gathered");
                let table = trainer.weights.table.clone();
                let copy = |id| ((table.spec(id).name.clone(), table.spec(id).start), trainer.weights.get(id).copy());
                table.ids().map(copy).collect::<Vec<_>>()
            });
            steps.collect::<Vec<_>>()
        });
        for step in 0..3 {
            let mut seen: BTreeMap<&(String, i64), &Tensor> = BTreeMap::new();
            let mut compared = 0;
            for (key, weight) in ranks.iter().flat_map(|steps| &steps[step]) {
                match seen.get(key) {
                    Some(first) => {
                        assert!(weight.equal(first), "{layout:?}: the copies of {key:?} differ after step {}", step + 1);
                        compared += 1;
                    }
                    None => drop(seen.insert(key, weight)),
                }
            }
            assert!(compared >= seen.len(), "every weight has a copy");
        }
    }
}

/// Settings and ranks of layouts that the tiny run's ramp (4 to 12 sequences, then 8 in micro-batches of 2) fits.
const RUNS: &[(usize, &[&str])] = &[
    (1, &["parallel.schedule=paired"]),
    (2, &["parallel.pp=2"]),
    (2, &["parallel.pp=2", "parallel.schedule=dualpipe"]),
    (4, &["parallel.pp=2", "parallel.ep=2", "parallel.schedule=zb1p", "parallel.layers=[1, 2]"]),
    (4, &["parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "parallel.layers=[1, 2]"]),
    (4, &["parallel.ep=4", "parallel.ranks_per_node=2", "parallel.schedule=paired"]),
    (3, &["parallel.pp=3", "parallel.schedule=gpipe"]),
    (4, &["parallel.pp=4", "parallel.schedule=dualpipe", "parallel.layers=[1, 1, 1, 0]"]),
    (2, &["parallel.ep=2"]),
    (8, &["parallel.pp=2", "parallel.ep=4", "parallel.schedule=dualpipe"]),
    (4, &["parallel.pp=4", "parallel.schedule=1f1b", "parallel.layers=[0, 1, 1, 1]"]),
    (4, &[]),
    (2, &["parallel.pp=2", "parallel.schedule=gpipe"]),
];

pub fn over_threads(run: &Run, ranks: usize, start: Start, stop_after: Option<u64>) {
    let mut config = run.config();
    config.run.stop_after = stop_after;
    run_local(ranks, |world| train(&config, world, start, &StopSignal::default()).map(|_| ()).expect("the run"));
}

#[test]
fn whole_runs_equal_one_rank_s() {
    let one = Run::new("layouts-one", &[]);
    over_threads(&one, 1, Start::Fresh, None);
    for (index, (ranks, set)) in RUNS.iter().enumerate().take(8) {
        let other = Run::new(&format!("layouts-{index}"), set);
        over_threads(&other, *ranks, Start::Fresh, None);
        other.assert_same(&one, 1e-9);
    }
}

#[test]
fn over_mpirun_a_layout_gives_the_same_bits_as_over_threads() {
    for index in [1, 2, 3, 4, 5] {
        let (ranks, set) = RUNS[index];
        let (threads, processes) = (Run::new(&format!("bits-threads-{index}"), set), Run::new(&format!("bits-mpi-{index}"), set));
        over_threads(&threads, ranks, Start::Fresh, None);
        mpirun(ranks, &processes.train_args(), 0);
        for key in ["loss", "mtp_loss", "balance_loss", "grad_norm"] {
            assert_eq!(processes.series(key), threads.series(key), "{key} of {set:?}");
        }
        let (a, b) = (processes.state(), threads.state());
        assert!(a.iter().all(|(name, tensor)| tensor.equal(&b[name])), "{set:?}: weights or moments differ");
    }
}

#[test]
fn a_run_that_changes_its_layout_every_two_steps_is_the_same_run() {
    let one = Run::new("layouts-undisturbed", &[]);
    over_threads(&one, 1, Start::Fresh, None);
    let first = Run::new("layouts-changing", RUNS[0].1);
    over_threads(&first, RUNS[0].0, Start::Fresh, Some(2));
    for (index, (ranks, set)) in RUNS.iter().enumerate().skip(1) {
        let next = Run::new("layouts-changing", set);
        let last = index + 1 == RUNS.len();
        over_threads(&next, *ranks, Start::Resume, (!last).then_some(2 * (index as u64 + 1)));
    }
    first.assert_same(&one, 1e-9);
}
