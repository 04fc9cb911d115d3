//! What a run does about corruption that a check has found: nothing was changed by the step, so once what it rests on is
//! whole again the step is done again, on the same samples, and comes to what it would have come to.
use super::Run;
use crate::checkpoint::{load_whole, set_aside};
use crate::checks::{Finding, Place};
use crate::coordinator::{all_or_none, shared};
use anyhow::Result;
use std::path::{Path, PathBuf};

/// What only a checkpoint can give back: the world must start again from one.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StateLost(String);

impl Run<'_> {
    /// Collective; `found` is the same on every rank. `then`: what follows, for people.
    pub(super) fn mend(&mut self, found: &[Finding], then: &str) -> Result<()> {
        let step = self.state.step + 1;
        found.iter().for_each(|finding| self.metrics.event(self.state.step, "corruption", &format!("step {step}: {finding}")));
        self.again += 1;
        if self.again > self.config.guard.max_skipped {
            let words = format!("{}; step {step} found corruption {} times in a row: a machine is broken, and doing it again does not help", found[0], self.again);
            return Err(shared(words));
        }
        match found.iter().find(|finding| finding.place.lost()) {
            Some(lost) => self.reload(lost, then)?,
            None if found.iter().any(|finding| finding.place == Place::Weight) => {
                self.trainer.rewrite_weights()?;
                let words = format!("step {step}: the weights are made again from the masters{then}");
                self.metrics.event(self.state.step, "mended", &words);
            }
            None => self.metrics.event(self.state.step, "mended", &format!("step {step} is done again")),
        }
        Ok(())
    }

    /// The state that is to be saved is whole, or was made so.
    pub(super) fn verified(&mut self) -> Result<()> {
        let found = self.trainer.verify()?;
        if found.is_empty() { Ok(()) } else { self.mend(&found, "") }
    }

    /// Everything from a copy of this very step, where there is one.
    fn reload(&mut self, lost: &Finding, then: &str) -> Result<()> {
        let step = self.state.step;
        let lost_for_good = |why: &str| {
            let words = format!("state lost: {lost}, and {why} of step {step}; the run can go on from its newest whole checkpoint");
            Err(StateLost(words).into())
        };
        let Some(path) = self.copy_of_this_step()? else {
            return lost_for_good("there is no copy");
        };
        let _waiting = self.waiting();
        if let Err(damage) = load_whole(&*self.world, &path, &mut |reader| self.trainer.load_all(reader))? {
            return lost_for_good(&format!("there is no whole copy ({damage})"));
        }
        self.trainer.gather()?;
        // It is of this very step: it must come to the checksums that AdamW left.
        if !self.trainer.verify()?.is_empty() {
            self.set_aside(&path)?;
            return lost_for_good("so is the copy");
        }
        self.remove_old();
        let words = format!("step {}: the state of step {step} is restored from {}{then}", step + 1, path.display());
        self.metrics.event(step, "mended", &words);
        Ok(())
    }

    /// Its hashes are right, but of a state that was damaged before they were taken: nobody shall resume from it.
    fn set_aside(&mut self, path: &Path) -> Result<()> {
        self.tier.iter().for_each(|tier| tier.forget(self.state.step)); // those of the step before may still be there
        all_or_none(&*self.world, if self.world.rank() == 0 { set_aside(path).map(drop) } else { Ok(()) })
    }

    /// The same on every rank: how a save ended is.
    fn copy_of_this_step(&mut self) -> Result<Option<PathBuf>> {
        self.save_settled()?;
        match self.last_checkpoint.as_ref().filter(|(at, _)| *at == self.state.step) {
            Some((_, path)) => Ok(Some(path.clone())),
            None => self.restore_this_step(),
        }
    }
}
