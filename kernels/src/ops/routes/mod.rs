//! Where rows go: from the experts that the gate chose to how many rows each rank and expert gets, and to each row's places on
//! its way. Places are in a fixed order (by destination, then row), so sums over them are, too.
//!
//! Legend: V rows, K slots a row (the expert of each choice, −1: elsewhere), P ranks of X experts each, S rows sent, R rows
//! at the local experts. All results are i32 unless said; −1 is nowhere.
use crate::device;
use crate::jit::Source;
use crate::launch::{Launch, Shape, aligned};
use tch::{Kind, Tensor};

mod cpu;

const TEXT: &str = include_str!("routes.cu");
const THREADS: usize = 1024;
/// A row's ranks are bits of a word.
const MOST_RANKS: i64 = 64;
/// Experts are counted in shared memory.
const MOST_EXPERTS: i64 = 8192;

fn source(slots: i64) -> Source {
    Source { name: "routes", text: TEXT.to_string(), defines: vec![("SLOTS", slots.to_string())] }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    [6, 8].into_iter().map(|slots| (source(slots), "places")).collect()
}

/// `slots` [V, K] is read in 16-byte pieces where K allows.
fn launch(slots: &Tensor, entry: &'static str, blocks: i64, arguments: impl FnOnce(Launch<'_>) -> Launch<'_>) {
    let (gpu, k) = (device::gpu(slots.device()), slots.size()[1]);
    let kernel = gpu.kernel(&format!("routes {k}"), entry, || source(k)).expect("our own kernels compile and load");
    arguments(Launch::new(gpu, &kernel)).run(Shape { grid: [blocks as usize, 1], block: THREADS, shared_bytes: 0 });
}

fn on_gpu(slots: &Tensor, ranks: i64) -> bool {
    slots.device().is_cuda() && ranks <= MOST_RANKS
}

/// routes [T, K] i64, all of `experts` → rows of each expert, then the rows that go to each of `ranks`, then to each of
/// `nodes` ranks in a row, [experts + ranks + nodes] i64.
pub fn count(routes: &Tensor, experts: i64, ranks: i64, nodes: i64) -> Tensor {
    if !on_gpu(routes, ranks) || experts > MOST_EXPERTS {
        return cpu::count(routes, experts, ranks, nodes);
    }
    let (t, _) = routes.size2().expect("routes are [T, K]");
    let out = Tensor::empty([experts + ranks + nodes], (Kind::Int64, routes.device()));
    launch(routes, "count", 1, |launch| {
        launch.tensor(&routes.contiguous(), Kind::Int64).tensor(&out, Kind::Int64).int(t).int(experts).int(ranks).int(nodes)
    });
    out
}

/// A hop's rows.
pub struct Places {
    /// The row of each sent row, [S], by destination, then row.
    pub source: Tensor,
    /// The slots of each sent row as its destination counts them, [S, K].
    pub slots: Tensor,
    /// The sent row of (row, rank), [V, P].
    pub sent_row: Tensor,
}

impl Places {
    /// Of so many rows.
    pub fn cut(&self, sent: i64) -> Places {
        let first = |all: &Tensor| all.narrow(0, 0, sent);
        Places { source: first(&self.source), slots: first(&self.slots), sent_row: self.sent_row.shallow_clone() }
    }
}

/// slots [V, K] i32; a row goes once to each rank that holds one of its experts; `sent` rows in all, or a bound of their
/// number: what lies behind the last has no meaning.
pub fn places(slots: &Tensor, share: i64, ranks: i64, sent: i64) -> Places {
    if !on_gpu(slots, ranks) {
        return cpu::places(slots, share, ranks, sent);
    }
    let (v, k) = slots.size2().expect("slots are [V, K]");
    let make = |shape: &[i64]| Tensor::empty(shape, (Kind::Int, slots.device()));
    let places = Places { source: make(&[sent]), slots: make(&[sent, k]), sent_row: make(&[v, ranks]) };
    launch(slots, "places", ranks, |launch| {
        let launch = launch.tensor(&aligned(slots), Kind::Int).tensor(&places.source, Kind::Int).tensor(&places.slots, Kind::Int);
        launch.tensor(&places.sent_row, Kind::Int).int(v).int(share).int(ranks)
    });
    places
}

/// Rows at their experts.
pub struct Local {
    /// The row of each local row, [R], by expert, then row.
    pub row: Tensor,
    /// The local row of each (row, slot), [V, K].
    pub place: Tensor,
    /// Rows of each expert, [X].
    pub counts: Tensor,
}

/// slots [V, K] i32, `count` of them of this rank's `share` experts, and their weights [V, K] → their places, and the weight of each
/// local row, [R].
pub fn local(slots: &Tensor, weights: &Tensor, share: i64, count: i64) -> (Local, Tensor) {
    if !slots.device().is_cuda() || weights.kind() != Kind::Float {
        return cpu::local(slots, weights, share, count);
    }
    let (v, k) = slots.size2().expect("slots are [V, K]");
    let make = |shape: &[i64]| Tensor::empty(shape, (Kind::Int, slots.device()));
    let local = Local { row: make(&[count]), place: make(&[v, k]), counts: make(&[share]) };
    let sorted = Tensor::empty([count], (Kind::Float, slots.device()));
    launch(slots, "local", share, |launch| {
        let launch = launch.tensor(&aligned(slots), Kind::Int).tensor(&weights.contiguous(), Kind::Float);
        let launch = launch.tensor(&local.row, Kind::Int).tensor(&local.place, Kind::Int).tensor(&local.counts, Kind::Int);
        launch.tensor(&sorted, Kind::Float).int(v)
    });
    (local, sorted)
}
