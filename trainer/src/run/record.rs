//! What a run says of its steps, and what it does about a skipped one.
use super::Run;
use crate::guard::Reason;
use crate::metrics::{StepLine, ValidationLine};
use crate::phase::{Moment, Phase};
use crate::step::StepReport;
use crate::validate::held_out_loss;
use anyhow::Result;
use std::time::Instant;

/// Skipping does not mend it, and neither would another start from the same state.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GaveUp(String);

impl Run<'_> {
    pub(super) fn record(&mut self, report: &StepReport, (tokens, seconds, lr): (u64, f64, f64), samples: [u64; 2]) {
        let line = StepLine {
            step: self.state.step,
            tokens: self.state.tokens,
            loss: report.loss,
            mtp_loss: report.mtp,
            balance_loss: report.balance,
            grad_norm: report.grad_norm,
            lr,
            load_max: report.load.0,
            load_min: report.load.1,
            tokens_per_s: tokens as f64 / seconds,
            step_ms: seconds * 1e3,
            busy_ms: (seconds * 1e3 - self.waited_ms).max(0.0),
            stage: self.trainer.mesh.place(self.world.rank()).pp,
            applied: report.applied(),
            order: self.state.cursor.order,
            samples,
            save_stall_ms: self.stall_ms.take(),
        };
        self.metrics.step(&line);
    }

    /// On a GPU; for people once, when the first step has shown the peak.
    pub(super) fn report_memory(&mut self) -> Result<()> {
        let Some(report) = self.trainer.memory()? else { return Ok(()) };
        self.metrics.memory(self.state.step, &report);
        if !std::mem::replace(&mut self.memory_said, true) {
            self.metrics.say(&report.to_string());
        }
        Ok(())
    }

    pub(super) fn judge(&mut self, report: &StepReport, batch: u64) -> Result<()> {
        let next = self.state.cursor.next;
        let samples = format!("samples {} to {} of order {}", next - batch, next - 1, self.state.cursor.order);
        if let Some(worst) = &report.odd {
            self.metrics.event(
                self.state.step,
                "odd",
                &format!("step {}: {worst} again: it is the samples' own ({samples})", self.state.step),
            );
        }
        let Some(reason) = &report.skipped else { return Ok(()) };
        self.state.progress.skipped_steps += 1;
        self.metrics.event(
            self.state.step,
            "skipped",
            &format!("step {}: {reason}; the update was skipped ({samples})", self.state.step),
        );
        if self.trainer.guard.gives_up() { self.give_up(reason) } else { Ok(()) }
    }

    /// A save here takes no older checkpoint's place (`Saver::advance`): one of those is what the run may have to go on from.
    fn give_up(&mut self, reason: &Reason) -> Result<()> {
        let (step, skipped) = (self.state.step, self.trainer.guard.state.in_a_row);
        self.save_settled()?;
        // A skipped step changes no state.
        let held = |run: &Self| run.last_checkpoint.as_ref().is_some_and(|(at, _)| at + u64::from(skipped) >= step);
        if !held(self) {
            self.verified()?;
            self.save()?;
            self.save_settled()?;
        }
        // Else whoever removes checkpoints to go on from an older one would get this state again.
        if held(self) {
            self.leave_tier(true)?;
        }
        let newest = self.last_checkpoint.as_ref().map_or("there is none".to_string(), |(_, path)| path.display().to_string());
        Err(GaveUp(format!("gave up: {skipped} steps in a row were skipped, the last because {reason}; newest checkpoint: {newest}")).into())
    }

    /// At the end of the phases: steps were skipped one and all, and nothing was learnt.
    pub(super) fn check_learnt(&self) -> Result<()> {
        let steps = self.state.step;
        if steps > 0 && self.state.progress.skipped_steps == steps {
            return Err(GaveUp(format!("the run is over, and each of its {steps} steps was skipped: it has learnt nothing")).into());
        }
        Ok(())
    }

    pub(super) fn validate(&mut self, mark: &mut Instant) -> Result<()> {
        let (Some(held_out), true) = (&self.corpus.held_out, self.config.validation.every > 0) else { return Ok(()) };
        // Always the first phase's sequence length, so that the numbers of one run compare.
        let plan = self.plan.clone();
        let first = plan.at(0).expect("a run has a first phase");
        let phase = Phase { rope_scaling: self.rope_scaling.clone(), ..first.phase.clone() };
        let moment = Moment { phase: &phase, ..first };
        let (metrics, step) = (&mut self.metrics, self.state.step);
        let loss = held_out_loss(&mut self.trainer, held_out, &moment, self.config.validation.sequences, |done| metrics.validating(step, done))?;
        self.state.progress.val_loss_start.get_or_insert(loss);
        self.state.progress.val_loss = Some(loss);
        self.state.progress.validated = Some(self.state.step);
        self.take_time(mark);
        self.metrics.validation(&ValidationLine { step: self.state.step, validation_loss: loss });
        Ok(())
    }
}
