//! Are transfers hidden under computation? Forwards and backwards of a step under `paired` over a link that takes time but
//! no processor, beside Σ over segments of max(compute, transfer under way), and the same step under `1f1b`, where each
//! micro-batch waits for its own transfers. Compute is measured over a link that takes no time, the transfer is the link's
//! own time for the bytes. The reduction of gradients is left out.
use super::meter::{Meter, metered};
use super::{Args, batch};
use anyhow::{Result, ensure};
use model::Grads;
use parallel::comm::local::{Link, run_linked};
use parallel::comm::{Comm, CommError, TensorSpec, barrier};
use parallel::mesh::Mesh;
use parallel::schedule::run::{Parcel, Stages, run as run_schedule};
use parallel::schedule::{Chunk, Payload, Schedule};
use serde_json::json;
use std::fmt::Debug;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use trainer::RunConfig;
use trainer::phase::Plan;
use trainer::pipeline::Pipeline;
use trainer::step::Trainer;

/// What happened when on a rank.
#[derive(Clone, Copy, PartialEq)]
enum Mark {
    /// An action of the schedule starts: nothing is under way.
    Start,
    /// A transfer was posted.
    Send,
    /// A transfer is waited for.
    Wait,
}

type Log = Arc<Mutex<Vec<(Instant, Mark)>>>;

struct Recorder(Log);

impl<S: tracing::Subscriber> Layer<S> for Recorder {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        struct What(Option<Mark>);
        impl Visit for What {
            fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
            fn record_str(&mut self, field: &Field, value: &str) {
                match (field.name(), value) {
                    ("what", "send") => self.0 = Some(Mark::Send),
                    ("what", "wait") => self.0 = Some(Mark::Wait),
                    _ => {}
                }
            }
        }
        let mut what = What(None);
        if event.metadata().target() == "overlap" {
            event.record(&mut what);
        }
        if let Some(mark) = what.0 {
            push(&self.0, mark);
        }
    }
}

fn push(log: &Log, mark: Mark) {
    log.lock().expect("no rank panicked").push((Instant::now(), mark));
}

/// The rank's stages, with the start of each action on record.
struct Marked<'a, 'g> {
    inner: Pipeline<'a, 'g>,
    log: Log,
}

impl Stages for Marked<'_, '_> {
    type Error = CommError;

    fn specs(&self, chunk: Chunk, payload: Payload) -> Vec<TensorSpec> {
        self.inner.specs(chunk, payload)
    }

    fn forward(&mut self, chunk: Chunk, input: Parcel) -> Result<Parcel, CommError> {
        push(&self.log, Mark::Start);
        self.inner.forward(chunk, input)
    }

    fn backward(&mut self, chunk: Chunk, gradient: Parcel, split: bool) -> Result<Parcel, CommError> {
        push(&self.log, Mark::Start);
        self.inner.backward(chunk, gradient, split)
    }

    fn backward_weight(&mut self, chunk: Chunk) -> Result<(), CommError> {
        self.inner.backward_weight(chunk)
    }

    fn pair(&mut self, forward: (Chunk, Parcel), backward: (Chunk, Parcel)) -> Result<(Parcel, Parcel), CommError> {
        push(&self.log, Mark::Start);
        self.inner.pair(forward, backward)
    }

    fn rest(&mut self) -> Result<(), CommError> {
        self.inner.rest()
    }
}

/// From one posted transfer or wait to the next.
struct Segment {
    compute: f64,
    /// A transfer was posted just before and passes while this computes.
    covers: bool,
}

/// A step's segments. One ends where a transfer is waited for, or, where the next one has nothing to wait for, with the
/// transfer that it posts.
fn segments(log: &[(Instant, Mark)], end: Instant) -> Vec<Segment> {
    let mut found = Vec::new();
    let (mut start, mut covers, mut sent) = (log[0].0, false, None);
    let mut close = |start: Instant, end: Instant, covers: bool| found.push(Segment { compute: (end - start).as_secs_f64(), covers });
    for &(at, mark) in &log[1..] {
        match (mark, sent) {
            (Mark::Send, None) => sent = Some(at),
            (Mark::Send, Some(before)) => {
                close(start, before, covers);
                (start, covers, sent) = (before, true, Some(at));
            }
            (Mark::Wait, _) => {
                close(start, at, covers);
                (start, covers, sent) = (at, sent.is_some(), None);
            }
            (Mark::Start, _) => {
                close(start, at, covers);
                (start, covers, sent) = (at, false, None);
            }
        }
    }
    close(start, end, covers);
    found
}

/// One step on rank 0.
struct Timed {
    seconds: f64,
    segments: Vec<Segment>,
    /// Handed over for a transfer.
    bytes: u64,
}

fn timed(ranks: usize, config: &RunConfig, schedule: Schedule, link: Link) -> Result<Timed> {
    let mesh = Mesh { schedule, ..config.mesh(&vec![0; ranks])? };
    let ranks = run_linked(ranks, link, |world| one_rank(config, &mesh, world));
    ranks.into_iter().next().expect("rank 0")
}

fn one_rank(config: &RunConfig, mesh: &Mesh, world: Comm) -> Result<Timed> {
    tch::set_num_threads(config.run.threads.max(1) as i32);
    let (world, meters) = metered(world, &mesh.nodes);
    let mut trainer = Trainer::new(config, mesh, world)?;
    let meter: Rc<Meter> = meters.of(&trainer.groups.expert.all);
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let moment = plan.at(0).expect("a config has a phase");
    let batch = batch(&trainer, &moment, 0);
    let context = trainer.context(&moment, moment.batch);
    let actions = mesh.schedule.actions(trainer.groups.pipe.rank(), mesh.pp, batch.len())?;
    let mut made = Vec::new();
    let mut grads = Grads::new(&trainer.weights, trainer.stages.uses(&actions), &mut made);
    let inner = Pipeline::new(&context, &trainer.stages, &mut trainer.weights, Some(&mut grads), &batch, &config.model);
    let log = Log::default();
    let recorder = tracing_subscriber::registry().with(Recorder(log.clone()));
    barrier(&*trainer.groups.world)?;
    let start = Instant::now();
    tracing::subscriber::with_default(recorder, || run_schedule(&actions, &*trainer.groups.pipe, &mut Marked { inner, log: log.clone() }))?;
    let end = Instant::now();
    let segments = segments(&log.lock().expect("no rank panicked"), end);
    Ok(Timed { seconds: (end - start).as_secs_f64(), segments, bytes: meter.last_posted.get() })
}

/// Of one round, in seconds: the three steps follow each other, so that what else the machine does meets all alike.
struct Round {
    transfer: f64,
    compute: f64,
    bound: f64,
    paired: f64,
    plain: f64,
}

fn round(ranks: usize, config: &RunConfig) -> Result<Round> {
    let instant = timed(ranks, config, Schedule::Paired, Link::INSTANT)?;
    let covering: Vec<f64> = instant.segments.iter().filter(|segment| segment.covers).map(|segment| segment.compute).collect();
    ensure!(!covering.is_empty(), "--overlap: no segment has another's transfer to hide: phase.0.batch is too small");
    // A transfer as long as the mean segment that hides one.
    let transfer = covering.iter().sum::<f64>() / covering.len() as f64;
    let link = Link { latency: Duration::ZERO, bytes_per_second: instant.bytes as f64 / transfer };
    let bound = instant.segments.iter().map(|s| if s.covers { s.compute.max(transfer) } else { s.compute }).sum();
    let paired = timed(ranks, config, Schedule::Paired, link)?.seconds;
    let plain = timed(ranks, config, Schedule::OneFOneB, link)?.seconds;
    Ok(Round { transfer, compute: instant.seconds, bound, paired, plain })
}

/// Prints JSON, medians of `args.steps` rounds.
pub fn run(args: &Args, config: &RunConfig) -> Result<()> {
    ensure!(config.parallel.pp == 1 && config.parallel.ep > 1, "--overlap: parallel.pp must be 1 and parallel.ep above 1");
    timed(args.ranks, config, Schedule::Paired, Link::INSTANT)?; // warm
    let rounds = (0..args.steps).map(|_| round(args.ranks, config)).collect::<Result<Vec<Round>>>()?;
    let median = |f: fn(&Round) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(f).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    println!(
        "{}",
        json!({
            "rounds": args.steps, "transfer_ms": median(|r| r.transfer) * 1e3, "compute_ms": median(|r| r.compute) * 1e3,
            "bound_ms": median(|r| r.bound) * 1e3, "paired_ms": median(|r| r.paired) * 1e3, "plain_ms": median(|r| r.plain) * 1e3,
            "paired_ratio": median(|r| r.paired / r.bound), "plain_ratio": median(|r| r.plain / r.bound),
            "ratios": rounds.iter().map(|r| [r.paired / r.bound, r.plain / r.bound]).collect::<Vec<_>>(),
        })
    );
    Ok(())
}
