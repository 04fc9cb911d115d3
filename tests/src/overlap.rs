//! Overlap is real: in a pair every expert transfer is posted before, and waited on after, a segment of the other
//! micro-batch.
use crate::support::{Run, tokens};
use model::MicroBatch;
use parallel::comm::local::run_local;
use std::sync::{Arc, Mutex};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use trainer::phase::Plan;
use trainer::step::Trainer;

/// (direction, "send" or "wait"), in the order of one rank's program.
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
        tracing::subscriber::with_default(subscriber, || trainer.step(&moment, &batch, false)).expect("a step");
        let log = log.lock().expect("one thread");
        log.clone()
    });
    assert!(logs.iter().all(|log| *log == logs[0]), "all ranks run the same segments");
    logs.into_iter().next().expect("a rank")
}

/// (transfers with a segment of the other direction between post and wait, all transfers)
fn overlapped(log: &Log) -> (usize, usize) {
    let sends = log.iter().enumerate().filter(|(_, (_, what))| what == "send");
    let hidden = sends.clone().filter(|(at, (direction, _))| {
        let after = &log[at + 1..];
        let wait = after.iter().position(|(other, _)| other == direction).expect("every transfer is waited on");
        assert_eq!(after[wait].1, "wait", "a transfer is waited on before the next is posted");
        wait > 0
    });
    (hidden.count(), sends.count())
}

#[test]
fn in_a_pair_every_transfer_is_under_way_while_the_other_micro_batch_computes() {
    // Two MoE layers and MTP's, with a dispatch and a combine each way.
    let transfers = 3 * 2;
    let (hidden, all) = overlapped(&log("paired", 2));
    assert_eq!(all, MICRO_BATCHES * 2 * transfers);
    assert_eq!(all - hidden, 2 * transfers, "only the first forward and the last backward have no partner");
    let (hidden, all) = overlapped(&log("1f1b", 2));
    assert_eq!((hidden, all), (0, MICRO_BATCHES * 2 * transfers), "forward, then backward hides nothing");
}

#[test]
fn a_second_hop_is_posted_while_the_other_micro_batch_computes() {
    let log = log("paired", 4);
    let mut onward = 0;
    for (at, (direction, what)) in log.iter().enumerate().filter(|(_, (_, what))| what == "send") {
        let wait = at + 1 + log[at + 1..].iter().position(|(other, what)| other == direction && what == "wait").expect("it is waited on");
        let between = &log[at + 1..wait];
        let own = between.iter().filter(|(other, _)| other == direction).count();
        assert!(own <= 1 && what == "send", "only its second hop comes between");
        let Some(hop) = between.iter().position(|(other, what)| other == direction && what == "onward") else {
            assert!(between.is_empty(), "a transfer with a partner goes on under the partner's segment: {between:?}");
            continue;
        };
        onward += 1;
        // After it the partner posts or waits for something of its own, or its segment's weight gradients are made.
        assert!(between.len() > hop || between.len() == 1, "{between:?}");
    }
    let transfers = 3 * 2;
    assert_eq!(onward, 2 * transfers * (MICRO_BATCHES - 1), "every transfer of a pair");
}
