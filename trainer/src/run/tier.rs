//! What a run does with the second tier of its checkpoints.
use super::Run;
use anyhow::Result;
use std::path::PathBuf;
use std::time::Instant;

impl Run<'_> {
    /// The state of this step onto the nodes. A failure is said, and no end of the run.
    pub(super) fn copy_to_tier(&mut self) -> Result<()> {
        let (start, head) = (Instant::now(), self.head());
        let _waiting = self.waiting();
        let Some(tier) = &mut self.tier else { return Ok(()) };
        let failed = tier.save(&*self.world, &head, self.trainer.state())?;
        self.stalled(start.elapsed());
        self.say_failed(failed);
        Ok(())
    }

    fn say_failed(&self, failed: Option<String>) {
        if let Some(error) = failed {
            self.metrics.say(&format!("the second tier's copies before step {} were NOT written: {error}", self.state.step));
        }
    }

    /// A checkpoint of this very step made from the copies on the nodes, where they are of this step. Collective.
    pub(super) fn restore_this_step(&mut self) -> Result<Option<PathBuf>> {
        let _waiting = self.waiting();
        let Some(tier) = &mut self.tier else { return Ok(None) };
        let failed = tier.wait(&*self.world)?;
        let (path, notes) = tier.restore(&*self.world, &self.config.run.dir, self.state.step.checked_sub(1))?;
        self.say_failed(failed);
        notes.iter().for_each(|note| self.metrics.say(note));
        if let Some(path) = &path {
            self.last_checkpoint = Some((self.state.step, path.clone()));
            self.saver.adopt(&*self.world, self.state.step, &self.trainer.guard.state);
        }
        Ok(path)
    }

    /// A run that is over needs no copies; one that was stopped keeps them for its next start.
    pub(super) fn leave_tier(&mut self, finished: bool) -> Result<()> {
        let _waiting = self.waiting();
        let Some(tier) = &mut self.tier else { return Ok(()) };
        let failed = tier.wait(&*self.world)?;
        if finished {
            tier.clear();
        }
        self.say_failed(failed);
        Ok(())
    }
}
