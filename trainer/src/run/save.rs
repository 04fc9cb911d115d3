//! What a run does with its checkpoints, of both tiers. A copy of the state is made under the next step, whose check of the state
//! it rests on comes before the save can end: only where no step follows is the state checked first.
use super::{Run, State};
use crate::checkpoint::second_tier::SecondTier;
use crate::checkpoint::{Manifest, Progress, Saved};
use crate::coordinator::shared;
use crate::state::StateReader;
use anyhow::Result;
use model::ModelConfig;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// RUN_DIR/log/saving, there as long as the ranks wait for a checkpoint to be written or read: the launcher then has more patience
/// than with a step.
pub(super) struct Waiting(Option<PathBuf>);

impl Waiting {
    pub fn of(run_dir: &Path, rank: usize) -> Waiting {
        // Where the disk is full there is only less patience.
        let path = (rank == 0).then(|| run_dir.join("log/saving")).filter(|path| std::fs::write(path, "").is_ok());
        Waiting(path)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.take().into_iter().for_each(|path| drop(std::fs::remove_file(path)));
    }
}

impl Run<'_> {
    pub(super) fn waiting(&self) -> Waiting {
        Waiting::of(&self.config.run.dir, self.world.rank())
    }

    pub(super) fn head(&self) -> Manifest {
        let head = Manifest::head(self.config, &self.trainer.mesh, self.trainer.optimizer.updates);
        let State { step, tokens, cursor, progress } = self.state.clone();
        let model = ModelConfig { rope_scaling: self.rope_scaling.clone(), ..head.model.clone() };
        let (guard, sentinel) = (self.trainer.guard.state.clone(), self.trainer.sentinel.state.clone());
        let progress = Progress { guard, sentinel, ..progress };
        let phases = self.plan.begun(tokens).to_vec();
        Manifest { step, tokens, cursor, progress, model, phases, corpus: self.corpus.fingerprint(), tokenizer_blake3: self.corpus.loader(0).tokenizer_blake3().to_string(), ..head }
    }

    pub(super) fn save(&mut self) -> Result<()> {
        let start = Instant::now();
        self.saver.injected = self.trainer.faults.disk(self.state.step).err();
        let _waiting = self.waiting();
        let ended = self.saver.begin(&*self.world, self.head(), self.trainer.state())?;
        self.stalled(start.elapsed());
        ended.into_iter().for_each(|saved| self.saved(Some(saved)));
        Ok(())
    }

    /// A failed save is no end of the run: the one before stays, and the next may go well.
    pub(super) fn saved(&mut self, ended: Option<Saved>) {
        match ended {
            Some(Saved { step, path, seconds, outcome: Ok(()) }) => {
                self.metrics.say(&format!("checkpoint {} | written in {seconds:.1} s", path.display()));
                self.last_checkpoint = Some((step, path));
            }
            Some(Saved { path, outcome: Err(error), .. }) => {
                let newest = self
                    .last_checkpoint
                    .as_ref()
                    .map_or("there is none yet".into(), |(_, path)| format!("the newest whole one is {}", path.display()));
                self.metrics.say(&format!("checkpoint {} was NOT written: {error}; {newest}", path.display()));
            }
            None => {}
        }
    }

    /// The copies of the state that saves under way wait for, to be made under the next step.
    pub(super) fn copies(&mut self) -> Vec<StateReader> {
        self.saver.take_copy().into_iter().chain(self.tier.as_mut().and_then(SecondTier::take_copy)).collect()
    }

    /// A save held the run up for so long; a step's line will say so.
    pub(super) fn stalled(&mut self, time: Duration) {
        *self.stall_ms.get_or_insert(0.0) += time.as_secs_f64() * 1e3;
    }

    /// A checkpoint of this very step, on the disk when it returns.
    pub(super) fn save_whole(&mut self) -> Result<()> {
        self.verified()?;
        let step = self.state.step;
        let whole = |run: &Self| run.last_checkpoint.as_ref().is_some_and(|(at, _)| *at == step);
        self.save_settled()?;
        if !whole(self) {
            self.save()?;
            self.save_settled()?;
        }
        if !whole(self) {
            return Err(shared(format!("there is no checkpoint of step {step}: see above")));
        }
        self.remove_old();
        Ok(())
    }

    pub(super) fn remove_old(&mut self) {
        self.saver.remove_old(self.state.step, &self.trainer.guard.state);
    }

    /// No save is under way when it returns. The state that it wrote may be unsound.
    pub(super) fn save_settled(&mut self) -> Result<()> {
        let _waiting = self.waiting();
        let ended = self.saver.wait(&*self.world)?;
        self.saved(ended);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_0_shows_that_all_wait_and_for_how_long() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("log")).expect("a folder");
        let shown = || folder.path().join("log/saving").exists();
        let other = Waiting::of(folder.path(), 1);
        assert!(!shown());
        let waiting = Waiting::of(folder.path(), 0);
        drop(other);
        assert!(shown());
        drop(waiting);
        assert!(!shown());
    }
}
