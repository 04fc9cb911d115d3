//! Watches what a rank waits for, and for how long: the rest of its time it works, and if it never comes back from a wait,
//! somebody else can say which one that is.
use super::{Comm, CommError, Communicator, Pending, Reduce, TensorSpec, Work};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};

/// A wait under way.
#[derive(Clone, Debug, PartialEq)]
pub struct Wait {
    pub op: &'static str,
    /// The ranks of the world that can end it: all of a group, or the senders of messages.
    pub from: Vec<usize>,
    pub since: Instant,
}

/// One rank's waits, over all its groups.
#[derive(Clone, Default)]
pub struct Watch {
    waited: Rc<Cell<Duration>>,
    now: Arc<Mutex<Option<Wait>>>,
}

impl Watch {
    /// Time spent in communicators since the last call: posting, waiting and receiving. On a GPU, where it is the stream
    /// that waits, only what the host does.
    pub fn take_waited(&self) -> Duration {
        self.waited.take()
    }

    /// For another thread to look at.
    pub fn now(&self) -> Arc<Mutex<Option<Wait>>> {
        self.now.clone()
    }

    fn during<T>(&self, wait: Wait, f: impl FnOnce() -> T) -> T {
        let since = wait.since;
        *self.now.lock().expect("nobody panics with it") = Some(wait);
        let value = f();
        let over = self.now.lock().expect("nobody panics with it").take();
        self.waited.set(self.waited.get() + over.map_or(since, |wait| wait.since).elapsed());
        value
    }

    /// What is done within `during` and is no waiting.
    fn but(&self, work: Work) {
        let (paused, start) = (self.now.lock().expect("nobody panics with it").take(), Instant::now());
        work();
        *self.now.lock().expect("nobody panics with it") = paused.map(|wait| Wait { since: wait.since + start.elapsed(), ..wait });
    }
}

/// `world` and all that is split from it, watched.
pub fn watched(world: Comm) -> (Comm, Watch) {
    let watch = Watch::default();
    let members = (0..world.size()).collect();
    (Rc::new(Watched { comm: world, members, watch: watch.clone() }), watch)
}

struct Watched {
    comm: Comm,
    /// Their ranks in the world.
    members: Rc<[usize]>,
    watch: Watch,
}

impl Watched {
    fn wait(&self, op: &'static str) -> Wait {
        Wait { op, from: self.members.to_vec(), since: Instant::now() }
    }

    fn under_way<T: 'static>(&self, wait: Wait, post: impl FnOnce() -> Result<Pending<T>, CommError>) -> Result<Pending<T>, CommError> {
        let (pending, watch) = (self.watch.during(wait.clone(), post)?, self.watch.clone());
        Ok(Pending::running(move || watch.during(Wait { since: Instant::now(), ..wait }, || pending.wait())))
    }
}

impl Communicator for Watched {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn size(&self) -> usize {
        self.comm.size()
    }

    fn all_reduce(&self, tensors: Vec<Tensor>, op: Reduce) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.under_way(self.wait("all_reduce"), || self.comm.all_reduce(tensors, op))
    }

    fn reduce_scatter(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.under_way(self.wait("reduce_scatter"), || self.comm.reduce_scatter(tensors))
    }

    fn all_gather(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.under_way(self.wait("all_gather"), || self.comm.all_gather(tensors))
    }

    fn broadcast(&self, tensors: Vec<Tensor>, root: usize) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.under_way(self.wait("broadcast"), || self.comm.broadcast(tensors, root))
    }

    fn exchange_counts(&self, counts: &[Vec<i64>]) -> Result<Vec<Vec<i64>>, CommError> {
        self.watch.during(self.wait("exchange_counts"), || self.comm.exchange_counts(counts))
    }

    fn all_to_all_under(&self, tensors: Vec<Tensor>, send: &[i64], recv: &[i64], work: Work) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.under_way(self.wait("all_to_all"), || self.comm.all_to_all_under(tensors, send, recv, &mut || self.watch.but(work)))
    }

    fn exchange(&self, sends: Vec<(usize, Tensor)>, recvs: Vec<(usize, TensorSpec)>) -> Result<Pending<Vec<Tensor>>, CommError> {
        let peers = recvs.iter().map(|(peer, _)| peer).chain(sends.iter().map(|(peer, _)| peer));
        let mut from: Vec<usize> = peers.map(|&peer| self.members[peer]).collect();
        from.sort_unstable();
        from.dedup();
        self.under_way(Wait { from, ..self.wait("exchange") }, || self.comm.exchange(sends, recvs))
    }

    fn exchange_into(&self, sends: Vec<(usize, Tensor)>, places: Vec<(usize, Tensor)>) -> Result<Pending<()>, CommError> {
        self.under_way(self.wait("exchange_into"), || self.comm.exchange_into(sends, places))
    }

    fn room(&self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor, CommError> {
        self.comm.room(shape, kind, device)
    }

    fn lands_in_place(&self) -> bool {
        self.comm.lands_in_place()
    }

    fn buffer_bytes(&self) -> usize {
        self.comm.buffer_bytes()
    }

    fn split(&self, colour: usize, key: usize) -> Result<Comm, CommError> {
        let comm = self.comm.split(colour, key)?;
        let mine = Tensor::from_slice(&[self.members[self.rank()] as i64]);
        let members = Vec::<i64>::try_from(&comm.all_gather(vec![mine])?.wait()?[0]).expect("i64 ranks");
        let members = members.into_iter().map(|rank| rank as usize).collect();
        Ok(Rc::new(Watched { comm, members, watch: self.watch.clone() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::local::run_local;
    use std::sync::atomic::{AtomicBool, Ordering};
    use tch::{Device, Kind};

    #[test]
    fn a_wait_is_named_while_it_lasts_and_counted_when_it_is_over() {
        const WORK: Duration = Duration::from_millis(500);
        // Rank 3 sends once rank 1 was seen to wait.
        let seen_waiting = AtomicBool::new(false);
        run_local(4, |comm| {
            let (world, watch) = watched(comm);
            let pair = world.split(world.rank() % 2, 0).unwrap();
            let _ = watch.take_waited();
            let (rank, number) = (world.rank(), TensorSpec { shape: vec![1], kind: Kind::Int64, device: Device::Cpu });
            let numbers = || vec![Tensor::from_slice(&[1_i64])];
            if rank == 3 {
                while !seen_waiting.load(Ordering::Acquire) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                pair.exchange(vec![(0, numbers().remove(0))], vec![]).unwrap().wait().unwrap();
            } else if rank == 1 {
                let seen = watch.now();
                let look = || loop {
                    let wait = seen.lock().unwrap().clone();
                    if let Some(wait) = wait {
                        seen_waiting.store(true, Ordering::Release);
                        return wait;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                };
                let wait = std::thread::scope(|scope| {
                    let looker = scope.spawn(look);
                    let got = pair.exchange(vec![], vec![(1, number)]).unwrap().wait().unwrap();
                    assert_eq!(got[0].int64_value(&[0]), 1);
                    looker.join().unwrap()
                });
                assert_eq!((wait.op, &wait.from[..]), ("exchange", &[3][..]), "rank 1 of the pair is rank 3 of the world");
                assert!(watch.take_waited() > Duration::ZERO && watch.take_waited() == Duration::ZERO);
            }
            let sum = world.all_reduce(numbers(), Reduce::Sum).unwrap().wait().unwrap();
            assert_eq!(sum[0].int64_value(&[0]), 4);
            let _ = watch.take_waited();
            let mut work = || {
                std::thread::sleep(WORK);
                assert_eq!(*watch.now().lock().unwrap(), None, "it works");
            };
            pair.all_to_all_under(numbers(), &[1, 0], &[1 - pair.rank() as i64; 2], &mut work).unwrap().wait().unwrap();
            assert!(watch.take_waited() < WORK, "work under a transfer is no waiting");
            assert_eq!(*watch.now().lock().unwrap(), None);
        });
    }
}
