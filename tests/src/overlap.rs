//! Overlap is real: in a pair every expert transfer is posted before, and waited on after, a segment of the other
//! micro-batch.
use crate::support::{Run, tokens};
use kernels::Precision;
use model::flow::Work;
use model::mla::Positions;
use model::stage::StageIn;
use model::{MicroBatch, ParamTable, Stage, StepContext, Weights};
use parallel::comm::local::{run_local, solo};
use parallel::dispatch::ExpertGroup;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use trainer::phase::Plan;
use trainer::step::Trainer;

/// (direction, what), as `model` logs it, in the order of one rank's program.
type Log = Vec<(String, String)>;

struct Keep(Arc<Mutex<Log>>);

#[derive(Default)]
struct Fields(Vec<String>);

impl Visit for Fields {
    fn record_str(&mut self, _: &Field, value: &str) {
        self.0.push(value.to_string());
    }
    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

impl<S: tracing::Subscriber> Layer<S> for Keep {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() == "overlap" {
            let mut fields = Fields::default();
            event.record(&mut fields);
            let [direction, what] = <[String; 2]>::try_from(fields.0).expect("a direction and what it does");
            self.0.lock().expect("one thread").push((direction, what));
        }
    }
}

const MICRO_BATCHES: usize = 4;

/// What one rank of `ranks` that share the experts did in a step; they are on two nodes where they are four.
fn log(schedule: &str, ranks: usize) -> Log {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _mine = ONE_AT_A_TIME.lock();
    let batch = format!("phase.0.batch={}", MICRO_BATCHES * ranks);
    let set = [&format!("parallel.ep={ranks}"), &format!("parallel.schedule={schedule}"), &batch, "phase.0.micro_batch=1", "parallel.ranks_per_node=2"];
    let run = Run::new("overlap", &set);
    let config = run.config();
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let logs = run_local(ranks, |world| {
        let log = Arc::new(Mutex::new(Log::new()));
        let rank = world.rank() as u64;
        let mut trainer = Trainer::new(&config, &config.mesh(&vec![0; ranks]).expect("a layout"), world).expect("a trainer");
        let moment = plan.at(0).expect("a phase");
        let batch = |index| MicroBatch::new(tokens(10 * rank + index, &[1, 33], config.model.vocab_size));
        let batch: Vec<MicroBatch> = (0..MICRO_BATCHES as u64).map(batch).collect();
        let subscriber = tracing_subscriber::registry().with(Keep(log.clone()));
        tracing::subscriber::with_default(subscriber, || {
            // Whenever a rank comes with its subscriber it is found out anew who is interested in what, and events are lost.
            trainer.step(&moment, &batch, false).expect("a step");
            log.lock().expect("one thread").clear();
            trainer.step(&moment, &batch, false).expect("a step");
        });
        let log = log.lock().expect("one thread");
        log.clone()
    });
    assert!(logs.iter().all(|log| *log == logs[0]), "all ranks run the same segments");
    logs.into_iter().next().expect("a rank")
}

/// What happened between each "send" and the "wait" of its direction: its second hop ("onward"), what it computed itself ("own"),
/// what the other direction did ("computes"). No other transfer of its own comes between.
fn under_way(log: &Log) -> Vec<Vec<&'static str>> {
    let sends = log.iter().enumerate().filter(|(_, (_, what))| what == "send");
    let between = sends.map(|(at, (direction, _))| {
        let mut found = Vec::new();
        for (other, what) in &log[at + 1..] {
            match (other == direction, &what[..]) {
                (true, "wait") => return found,
                (true, "onward") => found.push("onward"),
                (true, "computes") => found.push("own"),
                (false, "computes") => found.push("computes"),
                (own, what) => assert!(!own, "a transfer is waited on before the next is posted: {what}"),
            }
        }
        panic!("every transfer is waited on")
    });
    between.collect()
}

/// Two MoE layers and MTP's, with a dispatch and a combine each way.
const TRANSFERS: usize = 3 * 2;

#[test]
fn in_a_pair_every_transfer_is_under_way_while_the_other_micro_batch_computes() {
    let hidden = |log: Log| {
        let transfers = under_way(&log);
        assert_eq!(transfers.len(), MICRO_BATCHES * 2 * TRANSFERS);
        transfers.iter().filter(|between| between.contains(&"computes")).count()
    };
    let all = MICRO_BATCHES * 2 * TRANSFERS;
    assert_eq!(hidden(log("paired", 2)), all - 2 * TRANSFERS, "only the first forward and the last backward have no partner");
    assert_eq!(hidden(log("1f1b", 2)), 0, "forward, then backward hides nothing");
}

#[test]
fn hosts_agree_on_counts_amid_the_other_micro_batch() {
    // What stands before each.
    let before = |log: Log| -> Vec<String> {
        log.windows(2).filter(|pair| pair[1].1 == "counts").map(|pair| pair[0].0.clone()).collect()
    };
    let (alone, paired) = (before(log("1f1b", 2)), before(log("paired", 2)));
    assert!(alone.len() == MICRO_BATCHES * TRANSFERS / 2 && alone.iter().all(|before| before == "forward"));
    let amid = paired.iter().filter(|before| *before == "backward").count();
    assert_eq!((paired.len(), amid), (alone.len(), (MICRO_BATCHES - 1) * TRANSFERS / 2), "only the first forward has no partner");
}

/// Else a last stage's host could wait for the first stage's, which waits for its result.
#[test]
fn a_last_stage_gives_the_embeddings_gradient_once_its_result_can_be_sent() {
    let model = Run::new("last-stage", &[]).config().model;
    let (mut table, parts) = (ParamTable::default(), trainer::pipeline::parts(&model, 2, &[]).expect("two stages"));
    let stage = Stage::new(&mut table, &model, &parts[1]);
    let mut weights = Weights::initial(Rc::new(table), Precision::F64, 1, Device::Cpu);
    let (batch, options) = (MicroBatch::new(tokens(1, &[1, 33], model.vocab_size)), (Kind::Double, Device::Cpu));
    let positions = Positions::new(&model, None, 32, options);
    let experts = ExpertGroup::flat(solo());
    let step = StepContext { main_targets: 32, mtp_targets: 31, sequences: 1, mtp_weight: 0.3, balance_weight: 0.0, positions, experts };
    let hidden = StageIn::Hidden(Tensor::ones([32, model.hidden_size], options));
    let (_, _, saved) = stage.forward(&step, &mut weights, &batch, hidden).expect("forward");
    let of_embedding = |work: &Work| matches!(work, Work::Embedding(_));
    let mut before = Vec::new();
    let (dx, rest) = stage.backward(&weights, None, saved, &mut |work| before.push(of_embedding(&work))).expect("backward");
    assert!(dx.is_some() && before.len() > 5 && !before.contains(&true), "{before:?}");
    assert_eq!(rest.iter().filter(|work| of_embedding(work)).count(), 1);
}

#[test]
fn both_hops_pass_while_something_is_computed() {
    let log = log("paired", 4);
    let transfers = under_way(&log);
    let (with_partner, alone): (Vec<_>, Vec<_>) = transfers.iter().partition(|between| between.contains(&"computes"));
    assert_eq!((with_partner.len(), alone.len()), (2 * TRANSFERS * (MICRO_BATCHES - 1), 2 * TRANSFERS));
    for between in with_partner {
        let hop = between.iter().position(|what| *what == "onward").expect("the second hop is posted before the wait");
        assert!(hop > 0 && between[hop + 1..].contains(&"computes"), "{between:?}");
    }
    assert!(alone.iter().all(|between| !between.contains(&"onward")), "{alone:?}");
}
