//! Checkpoints behind the steps: the state of a step's end is copied under the next one, and a thread hashes and writes the
//! copy while the run goes on.
//!
//! Invariant: the thread takes part in no collective. Ranks learn at step boundaries, by a reduced value, that all threads
//! are done; then the hashes are gathered, and rank 0's thread writes the manifest. At most one save is under way.
//!
//! Invariant: what a save made too old goes once its state is known to be sound: by a later step, or to whoever calls
//! `remove_old`.
use super::save::{Outline, Place, Written, begin, commit, gather_written, share, write_shard};
use super::staging::{Copying, Piece, Staging};
use super::{Manifest, Retention};
use crate::coordinator::Shared;
use crate::guard::GuardState;
use crate::state::{StatePart, StateReader};
use anyhow::Result;
use parallel::comm::{Communicator, Reduce};
use std::path::{Path, PathBuf};
use std::thread::{JoinHandle, spawn};
use std::time::Instant;
use tch::Tensor;

pub struct Saver {
    run_dir: PathBuf,
    retention: Retention,
    staging: Staging,
    /// The copy for the save under way, until somebody makes it.
    copy: Option<Copying>,
    running: Option<Running>,
    /// The step of the newest whole checkpoint, until its state is known to be sound and what it made too old is gone; rank 0's.
    unproven: Option<u64>,
    /// Removes what it made too old.
    removing: Option<JoinHandle<()>>,
    /// What the next save of this rank's shard comes to, for a test.
    pub injected: Option<std::io::Error>,
}

struct Running {
    head: Manifest,
    place: Place,
    began: Instant,
    stage: Stage,
}

enum Stage {
    /// This rank's shard.
    Writing(JoinHandle<(Vec<Piece>, Result<Written, String>)>),
    /// The manifest; None on all ranks but rank 0.
    Committing(Option<JoinHandle<Result<(), String>>>),
}

/// How a save ended; the same on every rank.
#[derive(Clone, Debug)]
pub struct Saved {
    pub step: u64,
    pub path: PathBuf,
    /// From the copy to the rename.
    pub seconds: f64,
    /// Of a failed one nothing is left.
    pub outcome: Result<(), String>,
}

impl Saver {
    pub fn new(run_dir: &Path, retention: Retention) -> Saver {
        let (run_dir, staging) = (run_dir.to_path_buf(), Staging::default());
        Saver { run_dir, retention, staging, copy: None, running: None, unproven: None, removing: None, injected: None }
    }

    /// Collective. The state may change again once what `take_copy` gives has run, or after `wait`. Waits for the save before,
    /// whose end it returns; where the folder cannot be made, this one's too: nothing is under way then.
    pub fn begin(&mut self, world: &dyn Communicator, head: Manifest, parts: Vec<StatePart>) -> Result<Vec<Saved>> {
        let mut ended: Vec<Saved> = self.wait(world)?.into_iter().collect();
        self.remove_old(head.step, &head.progress.guard);
        self.removed(); // before more is written
        let (place, began) = (Place::of(&self.run_dir, head.step), Instant::now());
        // One that all ranks have met is this save's; after one rank's own the others would wait for it.
        if let Err(error) = begin(world, &place) {
            if !error.is::<Shared>() {
                return Err(error);
            }
            ended.push(Saved { step: head.step, path: place.target, seconds: 0.0, outcome: Err(format!("{error:#}")) });
            return Ok(ended);
        }
        let (copying, mut parts) = self.staging.begin(parts);
        let outline = Outline::of(copying.now());
        self.copy = Some(copying);
        let (partial, ranks, injected) = (place.partial.clone(), (world.rank(), world.size()), self.injected.take());
        let writing = spawn(move || {
            let written = match injected {
                Some(error) => Err(format!("cannot write {}: {error}", partial.display())),
                None => write_shard(&partial, ranks, outline, |index| parts.tensor(index)).map_err(|error| format!("{error:#}")),
            };
            (parts.here, written)
        });
        self.running = Some(Running { head, place, began, stage: Stage::Writing(writing) });
        Ok(ended)
    }

    /// A whole checkpoint of `step` that no save of this run made: what it makes too old goes as with one of its own.
    pub fn adopt(&mut self, world: &dyn Communicator, step: u64, guard: &GuardState) {
        // While steps are skipped the state stays what it is: its copies must not push out the last ones of a sound one.
        if world.rank() == 0 && guard.in_a_row == 0 {
            self.unproven = Some(step);
        }
    }

    /// The copy of the state that the save under way waits for: whoever takes it runs it before the state changes.
    pub fn take_copy(&mut self) -> Option<StateReader> {
        let copying = self.copy.take()?;
        Some(Box::new(move || copying.copy()))
    }

    /// Collective: the end of the save under way, once there is one. Costs a sum of one number while one is, else nothing. What it
    /// made too old stays until `remove_old`.
    pub fn poll(&mut self, world: &dyn Communicator) -> Result<Option<Saved>> {
        let Some(running) = &self.running else {
            return Ok(None);
        };
        assert!(self.copy.is_none(), "the state of step {} changed before its copy was made", running.head.step);
        let done = match &running.stage {
            Stage::Writing(thread) => thread.is_finished(),
            Stage::Committing(thread) => thread.as_ref().is_none_or(JoinHandle::is_finished),
        };
        let all = world.all_reduce(vec![Tensor::from_slice(&[done as i64])], Reduce::Min)?.wait()?;
        if all[0].int64_value(&[0]) == 1 { self.advance(world) } else { Ok(None) }
    }

    /// Collective: until the save under way has ended. What it made too old stays until `remove_old`.
    pub fn wait(&mut self, world: &dyn Communicator) -> Result<Option<Saved>> {
        while self.running.is_some() {
            if let Some(saved) = self.advance(world)? {
                return Ok(Some(saved));
            }
        }
        Ok(None)
    }

    /// Collective: waits for this stage, and begins the next.
    fn advance(&mut self, world: &dyn Communicator) -> Result<Option<Saved>> {
        let Some(Running { head, place, began, stage }) = self.running.take() else { return Ok(None) };
        let step = head.step;
        match stage {
            Stage::Writing(thread) => {
                // Nobody has made a copy, and nobody needs one: the state is written before this returns.
                self.copy.take().into_iter().for_each(Copying::lend);
                let (parts, written) = thread.join().expect("a writer returns its errors");
                self.staging.give_back(parts);
                let all = gather_written(world, &written)?;
                let stage = Stage::Committing((world.rank() == 0).then(|| {
                    let (place, head) = (place.clone(), head.clone());
                    spawn(move || commit(&place, head, all).map_err(|error| format!("{error:#}")))
                }));
                self.running = Some(Running { head, place, began, stage });
                Ok(None)
            }
            Stage::Committing(thread) => {
                let mine = thread.map_or(Ok(()), |thread| thread.join().expect("a writer returns its errors"));
                let (outcome, seconds) = (share(world, mine)?, began.elapsed().as_secs_f64());
                if outcome.is_ok() {
                    self.adopt(world, step, &head.progress.guard);
                }
                Ok(Some(Saved { step, path: place.target, seconds, outcome }))
            }
        }
    }

    /// What the newest save made too old, unless its state may be why the steps after it, up to `now`, are skipped. A large file
    /// goes slowly, and nobody has to wait for it but the next save.
    pub fn remove_old(&mut self, now: u64, guard: &GuardState) {
        let skipped = u64::from(guard.in_a_row);
        let Some(step) = self.unproven.take_if(|step| skipped == 0 || *step + skipped < now) else { return };
        self.removed();
        let (run_dir, retention) = (self.run_dir.clone(), self.retention);
        self.removing = Some(spawn(move || {
            // The checkpoint is there; what is left too long is no reason to end a run.
            if let Err(error) = retention.apply(&run_dir, step) {
                tracing::warn!("{error:#}");
            }
        }));
    }

    /// What is being removed is gone.
    pub fn removed(&mut self) {
        self.removing.take().into_iter().for_each(|thread| thread.join().expect("what cannot be removed is said"));
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.removed();
    }
}
