//! Where the threads of a local world meet: one lock, one condition variable, what each has posted.
//! Invariant: `generation` moves whenever a waiting rank might have become able to go on; a rank that found
//! nothing to do notes the generation, so "all running ranks noted the present one" is exactly a deadlock.

use crate::comm::call::Call;
use crate::comm::{CommError, Reduce, sum};
use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tch::Tensor;

/// (group, number of the collective in it)
pub(super) type OpKey = (usize, u64);
/// (group, from, to, number of the message)
pub(super) type MailKey = (usize, usize, usize, u64);

/// One rank's part of a collective. Nobody writes to it once posted.
pub(super) struct Post {
    pub tensors: Vec<Tensor>,
    /// Rows for each rank (`all_to_all`), else empty.
    pub send: Vec<i64>,
}

/// What a transfer costs: time in which the waiting rank sleeps, as if a network card did the work. Each transfer
/// has the link to itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    pub latency: Duration,
    /// Infinite: only the latency counts.
    pub bytes_per_second: f64,
}

impl Link {
    pub const INSTANT: Link = Link { latency: Duration::ZERO, bytes_per_second: f64::INFINITY };

    fn arrival(&self, tensors: &[Tensor]) -> Instant {
        let bytes: usize = tensors.iter().map(|t| t.numel() * t.kind().elt_size_in_bytes()).sum();
        Instant::now() + self.latency + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second)
    }
}

fn sleep_until(then: Instant) {
    let left = then.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        std::thread::sleep(left);
    }
}

impl Post {
    fn alias(&self) -> Post {
        Post { tensors: self.tensors.iter().map(Tensor::shallow_clone).collect(), send: self.send.clone() }
    }
}

pub(super) struct World {
    link: Link,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    running: Vec<bool>,
    /// The generation at which a rank last found nothing to do.
    blocked_at: Vec<u64>,
    generation: u64,
    /// Why nobody need wait any longer.
    dead: Option<String>,
    first_panicked: Option<usize>,
    ops: HashMap<OpKey, Op>,
    mail: HashMap<MailKey, (Tensor, Instant)>,
    subgroups: HashMap<(usize, u64, usize), usize>,
}

struct Op {
    call: Call,
    first: usize,
    posts: Vec<Option<Post>>,
    num_posted: usize,
    num_taken: usize,
    mismatch: Option<(usize, Call)>,
    /// When the last part is over the link.
    arrives: Instant,
    sum: Option<SharedSum>,
}

/// A large sum, done block by block by whichever ranks are waiting for it.
struct SharedSum {
    outs: Vec<Tensor>,
    /// (tensor, first element, elements)
    blocks: Vec<(usize, i64, i64)>,
    next: usize,
    num_done: usize,
}

impl World {
    pub fn new(size: usize, link: Link) -> Arc<World> {
        let state = State {
            running: vec![true; size],
            blocked_at: vec![0; size],
            generation: 1,
            dead: None,
            first_panicked: None,
            ops: HashMap::new(),
            mail: HashMap::new(),
            subgroups: HashMap::new(),
        };
        Arc::new(World { link, state: Mutex::new(state), changed: Condvar::new() })
    }

    /// No user code runs under the lock, so a poisoned one is still whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn progress(&self, state: &mut State) {
        state.generation += 1;
        self.changed.notify_all();
    }

    /// Waits until `ready` gives something. `who` is the caller's (rank in its group, world rank, group's size).
    fn wait<T>(&self, op: &'static str, who: (usize, usize, usize), mut ready: impl FnMut(&mut State) -> Option<Result<T, CommError>>) -> Result<T, CommError> {
        let (rank, me, size) = who;
        let mut state = self.lock();
        loop {
            if let Some(result) = ready(&mut state) {
                return result;
            }
            // An unwinding rank drops its pendings, which wait: its peers will not come any more.
            let panicking = std::thread::panicking().then(|| "this rank is panicking".to_string());
            if let Some(reason) = panicking.or_else(|| state.dead.clone()) {
                return Err(CommError::Lost { rank, size, op, reason });
            }
            state.blocked_at[me] = state.generation;
            if state.all_blocked() {
                state.dead = Some("every rank that still runs waits for another one (deadlock)".into());
                self.progress(&mut state);
                continue;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub fn post(&self, key: OpKey, rank: usize, size: usize, call: Call, post: Post) -> Result<(), CommError> {
        let mut state = self.lock();
        let op = state.ops.entry(key).or_insert_with(|| Op {
            call: call.clone(),
            first: rank,
            posts: (0..size).map(|_| None).collect(),
            num_posted: 0,
            num_taken: 0,
            mismatch: None,
            arrives: Instant::now(),
            sum: None,
        });
        if op.call != call {
            let (peer, theirs) = (op.first, op.call.to_string());
            let mine = call.to_string();
            op.mismatch = Some((rank, call));
            self.progress(&mut state);
            return Err(CommError::Disagree { rank, peer, mine, theirs });
        }
        op.arrives = op.arrives.max(self.link.arrival(&post.tensors));
        op.posts[rank] = Some(post);
        op.num_posted += 1;
        if op.num_posted == size {
            self.progress(&mut state);
        }
        Ok(())
    }

    /// Aliases of everyone's posts, once all are in.
    pub fn wait_posts(&self, key: OpKey, rank: usize, me: usize, size: usize, name: &'static str) -> Result<Vec<Post>, CommError> {
        let (posts, arrives) = self.wait(name, (rank, me, size), |state| {
            let op = state.ops.get(&key).expect("posted before waited on");
            if let Some((peer, theirs)) = &op.mismatch {
                let (mine, theirs) = (op.call.to_string(), theirs.to_string());
                return Some(Err(CommError::Disagree { rank, peer: *peer, mine, theirs }));
            }
            (op.num_posted == size).then(|| Ok((op.posts.iter().flatten().map(Post::alias).collect(), op.arrives)))
        })?;
        sleep_until(arrives);
        Ok(posts)
    }

    pub fn taken(&self, key: OpKey, size: usize) {
        let mut state = self.lock();
        let op = state.ops.get_mut(&key).expect("kept until all have taken it");
        op.num_taken += 1;
        if op.num_taken == size {
            state.ops.remove(&key);
        }
    }

    /// `who`: (rank in its group, world rank). The sum of all posts, each block of it computed by one of the waiting ranks; a copy for the caller.
    pub fn shared_sum(&self, key: OpKey, who: (usize, usize), posts: &[Post], reduce: Reduce) -> Result<Vec<Tensor>, CommError> {
        let (outs, mut claimed) = {
            let mut state = self.lock();
            let sum = state.ops.get_mut(&key).expect("kept until all have taken it").sum.get_or_insert_with(|| SharedSum::new(&posts[0]));
            (sum.outs.iter().map(Tensor::shallow_clone).collect::<Vec<_>>(), sum.claim())
        };
        while let Some((tensor, start, length)) = claimed {
            let parts: Vec<Tensor> = posts.iter().map(|p| p.tensors[tensor].view([-1]).narrow(0, start, length)).collect();
            sum::fold(&outs[tensor].view([-1]).narrow(0, start, length), &parts, reduce);
            let mut state = self.lock();
            let sum = state.shared_sum(key);
            sum.num_done += 1;
            let finished = sum.num_done == sum.blocks.len();
            claimed = sum.claim();
            if finished {
                self.progress(&mut state);
            }
        }
        self.wait("all_reduce", (who.0, who.1, posts.len()), |state| {
            let sum = state.shared_sum(key);
            (sum.num_done == sum.blocks.len()).then_some(Ok(()))
        })?;
        Ok(outs.iter().map(super::copied).collect())
    }

    pub fn send(&self, key: MailKey, tensor: Tensor) {
        let mut state = self.lock();
        let arrives = self.link.arrival(std::slice::from_ref(&tensor));
        state.mail.insert(key, (tensor, arrives));
        self.progress(&mut state);
    }

    pub fn receive(&self, key: MailKey, me: usize, size: usize) -> Result<Tensor, CommError> {
        let (tensor, arrives) = self.wait("exchange", (key.2, me, size), |state| state.mail.remove(&key).map(Ok))?;
        sleep_until(arrives);
        Ok(tensor)
    }

    /// The number of the group that `colour` of a split stands for, the same for all its members.
    pub fn subgroup(&self, parent: usize, op: u64, colour: usize) -> usize {
        let mut state = self.lock();
        let fresh = state.subgroups.len() + 1;
        *state.subgroups.entry((parent, op, colour)).or_insert(fresh)
    }

    /// This rank will post nothing more.
    pub fn leave(&self, me: usize, panicked: bool) {
        let mut state = self.lock();
        state.running[me] = false;
        if panicked {
            state.first_panicked.get_or_insert(me);
            state.dead.get_or_insert_with(|| format!("rank {me} of the world panicked"));
        }
        self.progress(&mut state);
    }

    pub fn first_panicked(&self) -> Option<usize> {
        self.lock().first_panicked
    }
}

impl State {
    fn all_blocked(&self) -> bool {
        self.running.iter().zip(&self.blocked_at).all(|(running, at)| !running || *at == self.generation)
    }

    fn shared_sum(&mut self, key: OpKey) -> &mut SharedSum {
        self.ops.get_mut(&key).and_then(|op| op.sum.as_mut()).expect("kept until all have taken it")
    }
}

impl SharedSum {
    fn new(like: &Post) -> Self {
        let outs: Vec<Tensor> = like.tensors.iter().map(|t| super::empty(&t.size(), t.kind(), t.device())).collect();
        let mut blocks = Vec::new();
        for (i, out) in outs.iter().enumerate() {
            let length = out.numel() as i64;
            blocks.extend((0..length).step_by(sum::BLOCK as usize).map(|start| (i, start, sum::BLOCK.min(length - start))));
        }
        SharedSum { outs, blocks, next: 0, num_done: 0 }
    }

    fn claim(&mut self) -> Option<(usize, i64, i64)> {
        let block = self.blocks.get(self.next).copied();
        self.next += 1;
        block
    }
}
