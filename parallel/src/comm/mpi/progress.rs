//! Transfers in several steps, moved on whenever this process waits for any of them.
//! Invariant: while a rank waits it moves *all* its transfers on, so the ranks of a group may wait in any order:
//! the second half of an all_reduce must not depend on its owner waiting for that very one.

use super::{Batch, Link, Shared};
use crate::comm::CommError;
use ::mpi::topology::SimpleCommunicator;
use ::mpi::traits::{Communicator as _, CommunicatorCollectives as _};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long a wait only yields its core: a nap lasts some 70 µs longer than it says. Where each rank has cores to itself,
/// longer than ranks commonly are apart.
const SPIN: Duration = Duration::from_micros(100);
const SPIN_ALONE: Duration = Duration::from_millis(10);
const NAP: Duration = Duration::from_micros(20);

/// Starts the next batch of a transfer, when the one before is complete.
pub(super) type Step = Box<dyn FnOnce() -> Result<Batch, CommError>>;

/// One transfer under way.
pub(super) struct Flight(RefCell<State>);

struct State {
    link: Rc<Link>,
    batch: Batch,
    steps: VecDeque<Step>,
    outcome: Option<Result<(), CommError>>,
}

impl State {
    fn advance(&mut self) {
        while self.outcome.is_none() {
            self.outcome = match self.batch.poll(&self.link) {
                Ok(false) => return,
                Err(error) => Some(Err(error)),
                Ok(true) => match self.steps.pop_front().map(|step| step()) {
                    None => Some(Ok(())),
                    Some(Err(error)) => Some(Err(error)),
                    Some(Ok(batch)) => {
                        self.batch = batch;
                        None
                    }
                },
            };
        }
    }
}

/// Collective over the ranks of this host: some may be bound to cores of their own.
pub(super) fn spin(host: &SimpleCommunicator) -> Duration {
    let mut hasher = DefaultHasher::new();
    super::bound_to().hash(&mut hasher);
    let (mine, mut all) = (hasher.finish(), vec![0u64; host.size() as usize]);
    host.all_gather_into(&mine, &mut all[..]);
    let ranks = all.iter().filter(|&&cores| cores == mine).count();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores >= 2 * ranks { SPIN_ALONE } else { SPIN }
}

impl Shared {
    /// Registers a transfer whose first batch is posted.
    pub(super) fn start(&self, link: Rc<Link>, batch: Batch, steps: Vec<Step>) -> Rc<Flight> {
        let flight = Rc::new(Flight(RefCell::new(State { link, batch, steps: steps.into(), outcome: None })));
        self.in_flight.borrow_mut().push(flight.clone());
        self.advance();
        flight
    }

    /// Moves every transfer of this process on as far as it goes without waiting.
    fn advance(&self) {
        // Steps start new batches but no new transfers, so the list does not change underneath.
        self.in_flight.borrow_mut().retain(|flight| {
            let mut state = flight.0.borrow_mut();
            state.advance();
            state.outcome.is_none()
        });
    }

    /// Waits for one transfer. Yields the core in between: there may be more ranks than cores. Who waits long
    /// waits for a peer's computation, and sleeps, so as not to take turns with it.
    pub(super) fn wait(&self, flight: &Flight) -> Result<(), CommError> {
        let start = Instant::now();
        loop {
            if let Some(outcome) = flight.0.borrow_mut().outcome.take() {
                return outcome;
            }
            self.advance();
            if flight.0.borrow().outcome.is_none() {
                if start.elapsed() < self.spin { std::thread::yield_now() } else { std::thread::sleep(NAP) }
            }
        }
    }
}
