//! What a rank sends and waits for, by axis: a world communicator whose groups each have a meter of their own.
use parallel::comm::counted::{Traffic, counted};
use parallel::comm::{Comm, CommError, Communicator, Pending, Reduce, TensorSpec, Work};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Instant;
use tch::Tensor;

/// Of one axis, so far.
pub struct Meter {
    pub traffic: Rc<Traffic>,
    /// Posting (which copies, over threads), waiting and receiving.
    pub seconds: Cell<f64>,
    /// What was handed over at the last `all_to_all`, this rank's own rows too: what a `Link` takes time for.
    pub last_posted: Cell<u64>,
}

/// The groups that were split from a metered world.
#[derive(Clone, Default)]
pub struct Meters(Rc<RefCell<Vec<Group>>>);

type Group = (Comm, Rc<Meter>);

impl Meters {
    /// Of a group, and of all groups split from it.
    pub fn of(&self, group: &Comm) -> Rc<Meter> {
        let list = self.0.borrow();
        let found = list.iter().find(|(comm, _)| std::ptr::addr_eq(Rc::as_ptr(comm), Rc::as_ptr(group)));
        found.map(|(_, meter)| meter.clone()).expect("the group was split from this world")
    }
}

/// `nodes`: the node of every rank.
pub fn metered(world: Comm, nodes: &[usize]) -> (Comm, Meters) {
    let meters = Meters::default();
    (meter(world, nodes, &meters, true), meters)
}

fn meter(plain: Comm, nodes: &[usize], meters: &Meters, is_world: bool) -> Comm {
    let (comm, traffic) = counted(plain.clone(), nodes);
    let meter = Rc::new(Meter { traffic, seconds: Cell::new(0.0), last_posted: Cell::new(0) });
    let axes = is_world.then(|| Axes { plain, node: nodes[comm.rank()], meters: meters.clone() });
    let comm: Comm = Rc::new(Metered { comm, meter: meter.clone(), axes });
    meters.0.borrow_mut().push((comm.clone(), meter));
    comm
}

struct Metered {
    comm: Comm,
    meter: Rc<Meter>,
    /// Only the world's: each of its groups is an axis.
    axes: Option<Axes>,
}

struct Axes {
    plain: Comm,
    node: usize,
    meters: Meters,
}

impl Meter {
    fn timed<T>(&self, f: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let value = f();
        self.seconds.set(self.seconds.get() + start.elapsed().as_secs_f64());
        value
    }
}

impl Metered {
    fn under_way<T: 'static>(&self, post: impl FnOnce() -> Result<Pending<T>, CommError>) -> Result<Pending<T>, CommError> {
        let (pending, meter) = (self.meter.timed(post)?, self.meter.clone());
        Ok(Pending::running(move || meter.timed(|| pending.wait())))
    }
}

impl Communicator for Metered {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn size(&self) -> usize {
        self.comm.size()
    }

    fn all_reduce(&self, tensors: Vec<Tensor>, op: Reduce) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.under_way(|| self.comm.all_reduce(tensors, op))
    }

    fn reduce_scatter(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.under_way(|| self.comm.reduce_scatter(tensors))
    }

    fn all_gather(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.under_way(|| self.comm.all_gather(tensors))
    }

    fn broadcast(&self, tensors: Vec<Tensor>, root: usize) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.under_way(|| self.comm.broadcast(tensors, root))
    }

    fn exchange_counts(&self, counts: &[Vec<i64>]) -> Result<Vec<Vec<i64>>, CommError> {
        self.meter.timed(|| self.comm.exchange_counts(counts))
    }

    fn all_to_all_under(&self, tensors: Vec<Tensor>, send: &[i64], recv: &[i64], work: Work) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.meter.last_posted.set(tensors.iter().map(|t| (t.numel() * t.kind().elt_size_in_bytes()) as u64).sum());
        let mut worked = 0.0;
        let mut work = || {
            let start = Instant::now();
            work();
            worked = start.elapsed().as_secs_f64();
        };
        let posted = self.under_way(|| self.comm.all_to_all_under(tensors, send, recv, &mut work))?;
        self.meter.seconds.set(self.meter.seconds.get() - worked);
        Ok(posted)
    }

    fn exchange(&self, sends: Vec<(usize, Tensor)>, recvs: Vec<(usize, TensorSpec)>) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.under_way(|| self.comm.exchange(sends, recvs))
    }

    fn buffer_bytes(&self) -> usize {
        self.comm.buffer_bytes()
    }

    fn split(&self, colour: usize, key: usize) -> Result<Comm, CommError> {
        let Some(Axes { plain, node, meters }) = &self.axes else {
            return Ok(Rc::new(Metered { comm: self.comm.split(colour, key)?, meter: self.meter.clone(), axes: None }));
        };
        let group = plain.split(colour, key)?;
        let nodes = Vec::<i64>::try_from(&group.all_gather(vec![Tensor::from_slice(&[*node as i64])])?.wait()?[0]).expect("i64 nodes");
        let nodes: Vec<usize> = nodes.into_iter().map(|node| node as usize).collect();
        Ok(meter(group, &nodes, meters, false))
    }
}
