//! MoE dispatch and combine over the ranks that share the experts (report §3.2.2). A token travels once to each node
//! that holds an expert of its, to the rank there with the sender's index, and from it once to each rank that holds one;
//! there its rows are sorted by expert. What the experts make of it is summed on their rank, then on their node, and
//! comes back as one row a node. The backward of dispatch is combine, the backward of combine is dispatch, over the same
//! plan. On one node (or nodes of uneven size) rows go straight to the ranks.
//!
//! Every transfer is posted at once and unpacked by its `wait`; the caller computes something else in between. The second
//! hop is posted by `Pending::advance`, or else by the wait: at the same place of the program on all ranks of a group.
//!
//! Legend: T tokens, K experts a token, E experts, R rows at the local experts, D width.
use crate::comm::{CommError, Pending, Work};
use hop::{Back, Hop, by_destination, sum_places};
use kernels::ops::routes::{self, Local, Places};
use std::cell::{Cell, OnceCell};
use std::rc::Rc;
use tch::{Kind, Tensor};

pub mod bytes;
mod group;
mod hop;
mod wire;

pub use group::ExpertGroup;
pub use wire::{Packed, Rows, Wire};

/// Where every (token, choice) goes; made once a MoE layer and micro-batch.
pub struct Plan(Rc<Route>);

struct Route {
    routes: Tensor,
    /// Until the first dispatch: the slots of the rows here, and their places if they go anywhere.
    first: Cell<Option<(Tensor, Option<Places>)>>,
    hops: Vec<Hop>,
    wire: Wire,
    counts: Vec<i64>,
    /// Known when the first dispatch is through: slots travel with its rows.
    arrival: OnceCell<Arrival>,
}

struct Arrival {
    places: Vec<Places>,
    local: Local,
}

/// What arrives at the local experts.
pub struct Dispatched {
    pub rows: Rows,      // [R, D], sorted by expert
    pub counts: Tensor,  // rows of each local expert, i32
    pub weights: Tensor, // [R]
}

/// The gradients of what was dispatched.
pub struct DispatchGrad {
    pub x: Returned,     // of [T, D]
    pub weights: Tensor, // [T, K]
}

/// Rows that are back, still to be summed for each token.
pub struct Returned {
    rows: Tensor,
    places: Tensor,
}

impl Returned {
    /// `add`, up to two [T, D], + the sum of each token's rows, [T, D], taken in at least FP32.
    pub fn sum(&self, add: &[&Tensor]) -> Tensor {
        sum_places(&self.rows, &self.places, add)
    }
}

/// A plan whose counts are on their way to the host.
pub struct Counted {
    routes: Tensor,
    slots: Tensor,
    /// With room for as many rows as there could be.
    places: Option<Places>,
    num_experts: i64,
    group: ExpertGroup,
    counting: group::Counting,
}

/// Rows as they travel, and their weights.
pub struct Outgoing {
    rows: Vec<Tensor>,
    /// By destination, with room for more; else in the order of the tokens.
    packed: bool,
    /// By destination if they go anywhere, with room for more.
    weights: Tensor,
    kind: Kind,
}

impl Outgoing {
    fn new(wire: Wire, places: Option<&Places>, x: &Tensor, weights: &Tensor) -> Self {
        let (packed, kind) = (places.is_some() && wire == Wire::Fp8, x.kind());
        let rows = match places {
            // Only rows that there are cost time; those of `Own` are copied when it is known how many.
            Some(places) if packed => wire.pack_to(x, places),
            Some(_) => vec![x.shallow_clone()],
            None => wire.pack(x),
        };
        // Sources behind the last have no meaning.
        let weights = places.map_or_else(|| weights.shallow_clone(), |places| weights.index_select(0, &places.source.clamp(0, x.size()[0] - 1)));
        Outgoing { rows, packed, weights, kind }
    }

    /// Each part by destination, where they go anywhere.
    fn parts(self, places: Option<&Places>) -> Vec<Tensor> {
        let Some(places) = places else { return self.rows.into_iter().chain([self.weights]).collect() };
        let cut = |part: &Tensor| part.narrow(0, 0, places.source.size()[0]);
        let mut parts = if self.packed { self.rows.iter().map(cut).collect() } else { by_destination(&self.rows, places) };
        parts.push(cut(&self.weights));
        parts
    }
}

impl Counted {
    /// routes [T, K] i64, the expert of each choice.
    pub fn start(routes: &Tensor, num_experts: i64, group: &ExpertGroup) -> Self {
        assert_eq!(num_experts % group.all.size() as i64, 0, "experts are shared out evenly");
        let counting = group::Counting::start(routes, num_experts, group);
        let slots = routes.to_kind(Kind::Int);
        let places = group.hops().first().map(|comm| {
            let (ranks, (tokens, choices)) = (comm.size() as i64, routes.size2().expect("routes are [T, K]"));
            routes::places(&slots, num_experts / ranks, ranks, tokens * ranks.min(choices))
        });
        Counted { routes: routes.shallow_clone(), slots, places, num_experts, group: group.clone(), counting }
    }

    /// As `Plan::dispatch` takes them; made before the host must wait.
    pub fn pack(&self, x: &Tensor, weights: &Tensor) -> Outgoing {
        Outgoing::new(self.group.wire(), self.places.as_ref(), x, weights)
    }

    /// Collective over the group; the one host wait of a layer and micro-batch, for all counts of all hops.
    pub fn plan(self) -> Result<Plan, CommError> {
        let Counted { routes, slots, places, num_experts, group, counting } = self;
        let counts = group::Counts::exchange(counting, num_experts, &group)?;
        let mut share = num_experts;
        let hops = group.hops().iter().zip(counts.send.into_iter().zip(counts.recv)).map(|(comm, (send, recv))| {
            share /= comm.size() as i64;
            Hop { comm: comm.clone(), send, recv, share }
        });
        let hops: Vec<Hop> = hops.collect();
        let places = places.zip(hops.first()).map(|(places, hop)| places.cut(hop.send.iter().sum()));
        let first = Cell::new(Some((slots, places)));
        Ok(Plan(Rc::new(Route { hops, routes, first, wire: group.wire, counts: counts.experts, arrival: OnceCell::new() })))
    }
}

impl Plan {
    /// As `Counted`, at once.
    pub fn new(routes: &Tensor, num_experts: i64, group: &ExpertGroup) -> Result<Self, CommError> {
        Counted::start(routes, num_experts, group).plan()
    }

    /// What it holds between forward and backward.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let arrival = self.0.arrival.get().into_iter().flat_map(|arrival| {
            let local = [&arrival.local.row, &arrival.local.place];
            arrival.places.iter().flat_map(|places| [&places.source, &places.slots, &places.sent_row]).chain(local)
        });
        std::iter::once(&self.0.routes).chain(arrival).collect()
    }

    /// Rows of each local expert.
    pub fn counts(&self) -> &[i64] {
        &self.0.counts
    }

    /// Forward: x [T, D] and weights [T, K] → the rows and weights at the local experts, in one transfer. Once a plan,
    /// and before all others.
    pub fn dispatch(&self, x: &Tensor, weights: &Tensor) -> Result<Pending<Dispatched>, CommError> {
        let first = self.0.first.take();
        let places = first.as_ref().and_then(|(_, places)| places.as_ref());
        let outgoing = Outgoing::new(self.0.wire, places, x, weights);
        self.0.first.set(first);
        self.send(outgoing, &mut || ())
    }

    /// `dispatch` of what is packed. `work` is called once, to give a GPU what it can do while rows travel to the first hop.
    pub fn send(&self, outgoing: Outgoing, work: Work) -> Result<Pending<Dispatched>, CommError> {
        let (route, kind) = (self.0.clone(), outgoing.kind);
        let (slots, places) = route.first.take().expect("a plan dispatches once");
        let parts = outgoing.parts(places.as_ref());
        let sent = route.clone().find_way(&slots, places, parts, Vec::new(), work)?;
        Ok(sent.map(move |mut parts| {
            let weights = parts.pop().expect("weights come last");
            let local = &route.arrival().local;
            Ok(Dispatched { rows: route.wire.unpack(parts, &local.row, kind), counts: local.counts.shallow_clone(), weights })
        }))
    }

    /// Forward: rows [R, D] → those of each token, to be summed; what a rank or node has of a token's it sums first.
    pub fn combine(&self, rows: &Tensor) -> Result<Pending<Returned>, CommError> {
        let route = self.0.clone();
        if route.hops.is_empty() {
            return Ok(Pending::ready(Returned { rows: rows.shallow_clone(), places: route.arrival().local.place.shallow_clone() }));
        }
        let back = self.0.clone().inward(vec![route.sums(rows)], route.hops.len())?;
        Ok(back.map(move |parts| {
            let [rows] = all(parts);
            Ok(route.returned(rows))
        }))
    }

    /// The backward of `combine`: dy [T, D] → the gradient of its rows, [R, D].
    pub fn combine_backward(&self, dy: &Tensor) -> Result<Pending<Rows>, CommError> {
        let (route, kind) = (self.0.clone(), dy.kind());
        let parts = match route.arrival().places.first() {
            Some(places) => route.wire.pack_to(dy, places),
            None => route.wire.pack(dy),
        };
        let sent = route.clone().outward(0, parts)?;
        Ok(sent.map(move |parts| Ok(route.wire.unpack(parts, &route.arrival().local.row, kind))))
    }

    /// The backward of `dispatch`: the gradients of its rows [R, D] and weights [R] → those of x and weights.
    pub fn dispatch_backward(&self, drows: &Tensor, dweights: &Tensor) -> Result<Pending<DispatchGrad>, CommError> {
        let (route, place) = (self.0.clone(), &self.0.arrival().local.place);
        let slots = hop::picked(dweights, &place.flatten(0, -1)).view_as(place); // [V, K]
        if route.hops.is_empty() {
            let x = Returned { rows: drows.shallow_clone(), places: place.shallow_clone() };
            return Ok(Pending::ready(DispatchGrad { x, weights: slots }));
        }
        let back = self.0.clone().inward(vec![route.sums(drows), Back { rows: slots, sums: None }], route.hops.len())?;
        Ok(back.map(move |parts| {
            let [x, weights] = all(parts);
            // A slot came back from one rank, zeros from the others: their sum is exact.
            let weights = route.returned(weights).sum(&[]);
            Ok(DispatchGrad { x: route.returned(x), weights })
        }))
    }
}

fn all<const N: usize>(parts: Vec<Tensor>) -> [Tensor; N] {
    parts.try_into().expect("as many tensors come as went")
}

impl Route {
    fn arrival(&self) -> &Arrival {
        self.arrival.get().expect("dispatch is waited for first")
    }

    /// rows [R, D], of which goes back the sum for each row that came, [V, D].
    fn sums(&self, rows: &Tensor) -> Back {
        Back { rows: rows.shallow_clone(), sums: Some(self.arrival().local.place.shallow_clone()) }
    }

    /// What came back over the first hop.
    fn returned(&self, rows: Tensor) -> Returned {
        Returned { rows, places: self.arrival().places[0].sent_row.shallow_clone() }
    }

    /// The first time outward, from the hop after those whose places are `found`: finds those of each hop on the way. `next`
    /// are this one's, and then the parts are by destination. The weights of what came are then those of the local rows.
    fn find_way(
        self: Rc<Self>, slots: &Tensor, next: Option<Places>, mut parts: Vec<Tensor>, mut found: Vec<Places>, work: Work,
    ) -> Result<Pending<Vec<Tensor>>, CommError> {
        let Some((hop, places)) = self.hops.get(found.len()).zip(next) else {
            work();
            let weights = parts.pop().expect("weights come last");
            let (local, sorted) = routes::local(slots, &weights, self.counts.len() as i64, self.counts.iter().sum());
            parts.push(sorted);
            assert!(self.arrival.set(Arrival { places: found, local }).is_ok(), "a plan dispatches once");
            return Ok(Pending::ready(parts));
        };
        parts.push(places.slots.shallow_clone());
        let sent = hop.out(parts, work)?;
        found.push(places);
        let last = found.len() == self.hops.len();
        let onward = move |mut parts: Vec<Tensor>| {
            let slots = parts.pop().expect("slots come last");
            let next = self.hops.get(found.len()).map(|hop| hop.places(&slots));
            let parts = next.iter().fold(parts, |parts, places| by_destination(&parts, places));
            self.find_way(&slots, next, parts, found, &mut || ())
        };
        // After the last hop nothing is to be posted.
        Ok(if last { sent.map(|parts| onward(parts)?.wait()) } else { Pending::staged(|| onward(sent.wait()?)) })
    }

    /// Rows of each part [S, …], by destination → the rows that arrive, [V, …]; from `level` on.
    fn outward(self: Rc<Self>, level: usize, parts: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        let Some(hop) = self.hops.get(level) else { return Ok(Pending::ready(parts)) };
        let sent = hop.out(parts, &mut || ())?;
        if level + 1 == self.hops.len() {
            return Ok(sent);
        }
        Ok(Pending::staged(move || {
            let parts = by_destination(&sent.wait()?, &self.arrival().places[level + 1]);
            self.outward(level + 1, parts)
        }))
    }

    /// One row of each part for each that came, [V, …], goes back over the first `level` hops, of which there are some; on the
    /// way, but not after the last, they are summed.
    fn inward(self: Rc<Self>, parts: Vec<Back>, level: usize) -> Result<Pending<Vec<Tensor>>, CommError> {
        let back = self.hops[level - 1].back(parts)?;
        if level == 1 {
            return Ok(back);
        }
        Ok(Pending::staged(move || {
            let sum = |rows| Back { rows, sums: Some(self.arrival().places[level - 1].sent_row.shallow_clone()) };
            let sums = back.wait()?.into_iter().map(sum).collect();
            self.inward(sums, level - 1)
        }))
    }
}

#[cfg(test)]
mod tests;
