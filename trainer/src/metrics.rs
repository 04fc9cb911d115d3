//! What a run says of itself: JSONL on every rank, whole on rank 0; there also TensorBoard scalars, one line a step, and a bar where
//! the output is a terminal. None of it can end a run once that has begun.
mod log;
mod tensorboard;

use crate::coordinator::host;
use crate::memory::MemoryReport;
use crate::sentinel::Seen;
use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use log::{Log, truncate_after};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use tensorboard::Events;

/// One step; the scalars' names are TensorBoard's tags below `train/`.
#[derive(Clone, Debug, Serialize)]
pub struct StepLine {
    pub step: u64,
    pub tokens: u64,
    pub loss: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtp_loss: Option<f64>,
    pub balance_loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    /// Largest and smallest expert load ÷ mean.
    pub load_max: f64,
    pub load_min: f64,
    pub tokens_per_s: f64,
    pub step_ms: f64,
    /// Of it, what this rank did not spend waiting for others.
    pub busy_ms: f64,
    /// This rank's place in the pipe.
    pub stage: usize,
    /// False: the update was skipped.
    pub applied: bool,
    /// First and last sample of the global batch, in sample order `order`.
    pub order: u64,
    pub samples: [u64; 2],
    /// What a checkpoint held the run up before this step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_stall_ms: Option<f64>,
}

/// What of it is the rank's own: the rest stands in rank 0's log, and thousands of ranks write for months.
#[derive(Serialize)]
struct RankLine {
    step: u64,
    step_ms: f64,
    busy_ms: f64,
    stage: usize,
}

impl From<&StepLine> for RankLine {
    fn from(&StepLine { step, step_ms, busy_ms, stage, .. }: &StepLine) -> RankLine {
        let to_a_microsecond = |ms: f64| (ms * 1e3).round() / 1e3;
        RankLine { step, step_ms: to_a_microsecond(step_ms), busy_ms: to_a_microsecond(busy_ms), stage }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct ValidationLine {
    pub step: u64,
    pub validation_loss: f64,
}

/// In the middle of a validation, for the launcher's watchdog.
#[derive(Clone, Debug, Serialize)]
struct ValidatingLine {
    step: u64,
    validated_micro_batches: usize,
}

/// What befell the run, for the launcher's timeline. `step` steps were done by then.
#[derive(Clone, Debug, Serialize)]
struct EventLine<'a> {
    step: u64,
    event: &'static str,
    words: &'a str,
}

pub struct Metrics {
    jsonl: Log,
    front: Option<Front>,
}

/// Rank 0's extras.
struct Front {
    tensorboard: Events,
    bar: ProgressBar,
    total_steps: u64,
}

impl Metrics {
    /// A resumed run drops the lines of steps it will do again, also those of ranks that a larger world had.
    pub fn open(run_dir: &Path, (rank, ranks): (usize, usize), done_steps: u64, total_steps: u64) -> Result<Self> {
        let log = run_dir.join("log");
        std::fs::create_dir_all(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let path = log.join(format!("rank-{rank}.jsonl"));
        truncate_after(&path, done_steps)?;
        if rank == 0 {
            absent(&log, ranks)?.iter().try_for_each(|path| truncate_after(path, done_steps))?;
        }
        let jsonl = Log::open(&path)?;
        let front = |run_dir: &Path| {
            // Lines above a bar go where it is: what goes to a file or a pipe is to have them.
            let bar = if std::io::stderr().is_terminal() && std::io::stdout().is_terminal() { ProgressBar::new(total_steps) } else { ProgressBar::hidden() };
            bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} [{elapsed} < {eta}]").expect("a valid template"));
            bar.set_position(done_steps);
            Front { tensorboard: Events::create(&run_dir.join("tensorboard"), &host(), done_steps), bar, total_steps }
        };
        Ok(Metrics { jsonl, front: (rank == 0).then(|| front(run_dir)) })
    }

    pub fn step(&mut self, line: &StepLine) {
        let Some(front) = &mut self.front else { return write_line(&mut self.jsonl, &RankLine::from(line)) };
        write_line(&mut self.jsonl, line);
        let mut scalar = |name: &str, value: f64| front.tensorboard.scalar(&format!("train/{name}"), value, line.step);
        scalar("loss", line.loss);
        if let Some(mtp) = line.mtp_loss {
            scalar("mtp_loss", mtp);
        }
        scalar("balance_loss", line.balance_loss);
        scalar("grad_norm", line.grad_norm);
        scalar("lr", line.lr);
        scalar("load_max", line.load_max);
        scalar("load_min", line.load_min);
        scalar("tokens_per_s", line.tokens_per_s);
        let mtp = line.mtp_loss.map(|mtp| format!(" | mtp {mtp:.4}")).unwrap_or_default();
        let skipped = if line.applied { "" } else { " | SKIPPED" };
        let stall = line.save_stall_ms.map(|ms| format!(" | save stall {ms:.0} ms")).unwrap_or_default();
        front.say(&format!(
            "step {}/{} | loss {:.4}{mtp} | norm {:.3} | lr {:.2e} | load {:.2} | {:.0} ms, {:.0} busy | {} tok/s{stall}{skipped}",
            line.step, front.total_steps, line.loss, line.grad_norm, line.lr, line.load_max, line.step_ms, line.busy_ms, short(line.tokens_per_s)
        ));
        front.bar.set_position(line.step);
    }

    pub fn validating(&mut self, step: u64, validated_micro_batches: usize) {
        write_line(&mut self.jsonl, &ValidatingLine { step, validated_micro_batches });
    }

    pub fn validation(&mut self, line: &ValidationLine) {
        write_line(&mut self.jsonl, line);
        if let Some(front) = &mut self.front {
            front.tensorboard.scalar("validation/loss", line.validation_loss, line.step);
            front.say(&format!("step {}/{} | validation loss {:.4}", line.step, front.total_steps, line.validation_loss));
        }
    }

    /// Of rank 0's GPU.
    pub fn memory(&mut self, step: u64, report: &MemoryReport) {
        let Some(front) = &mut self.front else { return };
        let MemoryReport { weights, gradients, optimizer, activations, peak, buffers, reserved, free, .. } = *report;
        let named = [("weights", weights), ("gradients", gradients), ("optimizer", optimizer), ("activations", activations), ("peak", peak), ("buffers", buffers), ("reserved", reserved), ("free", free)];
        for (name, bytes) in named {
            front.tensorboard.scalar(&format!("memory/{name}_gib"), bytes as f64 / (1u64 << 30) as f64, step);
        }
    }

    /// What the FP8 sentinel did in a step: its errors below `fp8/`, whether a linear computes in BF16, and words where one
    /// falls back or returns.
    pub fn sentinel(&mut self, step: u64, seen: &Seen) {
        let mut scalar = |name: &str, what: &str, value: f64| {
            if let Some(front) = &mut self.front {
                front.tensorboard.scalar(&format!("fp8/{name}/{what}"), value, step);
            }
        };
        if let Some(name) = &seen.returned {
            scalar(name, "in_bf16", 0.0);
        }
        if let Some(look) = &seen.looked_at {
            for (what, error) in ["fprop_error", "dgrad_error", "wgrad_error"].into_iter().zip(look.errors) {
                scalar(&look.name, what, error);
            }
            if look.back_in.is_some() {
                scalar(&look.name, "in_bf16", 1.0);
            }
        }
        if let Some(name) = &seen.returned {
            self.event(step, "fp8-again", &format!("step {step}: {name} computes in FP8 again"));
        }
        if let Some(look) = seen.looked_at.as_ref().filter(|look| look.back_in.is_some()) {
            self.event(step, "fp8-fallback", &format!("step {step}: {look}"));
        }
    }

    /// For people, and on rank 0's log.
    pub fn event(&mut self, step: u64, event: &'static str, words: &str) {
        if self.front.is_some() {
            self.say(words);
            write_line(&mut self.jsonl, &EventLine { step, event, words });
        }
    }

    /// A line for people, on rank 0.
    pub fn say(&self, text: &str) {
        if let Some(front) = &self.front {
            front.say(text);
        }
    }
}

impl Front {
    fn say(&self, text: &str) {
        if self.bar.is_hidden() {
            // `println!` would panic where the output is a file on a full disk.
            let _ = writeln!(std::io::stdout(), "{text}");
        } else {
            self.bar.println(text);
        }
    }
}

/// The logs of ranks that a world of `ranks` has not.
fn absent(log: &Path, ranks: usize) -> Result<Vec<PathBuf>> {
    let rank = |path: &PathBuf| path.file_name()?.to_str()?.strip_prefix("rank-")?.strip_suffix(".jsonl")?.parse::<usize>().ok();
    let entries = std::fs::read_dir(log).with_context(|| format!("cannot list {}", log.display()))?;
    Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| rank(path).is_some_and(|rank| rank >= ranks)).collect())
}

fn write_line(log: &mut Log, line: &impl Serialize) {
    let mut text = serde_json::to_vec(line).expect("plain values");
    text.push(b'\n');
    log.append(&text);
}

/// 1234567 → 1.2M
fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.1}M", v / 1e6),
        v if v >= 1e4 => format!("{:.1}K", v / 1e3),
        v => format!("{v:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_goes_on_without_tensorboard() {
        let run = tempfile::tempdir().expect("a folder");
        std::fs::write(run.path().join("tensorboard"), "a file where a folder belongs").expect("written");
        let mut metrics = Metrics::open(run.path(), (0, 1), 0, 9).expect("open");
        metrics.validation(&ValidationLine { step: 2, validation_loss: 1.5 });
        assert!(std::fs::read_to_string(run.path().join("log/rank-0.jsonl")).expect("text").contains("1.5"));
    }

    #[test]
    fn ranks_but_the_first_write_what_is_their_own() {
        let run = tempfile::tempdir().expect("a folder");
        let line = StepLine {
            step: 250_000, tokens: 1 << 43, loss: 1.9, mtp_loss: Some(2.0), balance_loss: 1.0, grad_norm: 0.1, lr: 7.3e-6, load_max: 1.1, load_min: 0.9,
            tokens_per_s: 5e6, step_ms: 12345.6789123, busy_ms: 12000.1, stage: 15, applied: true, order: 3, samples: [1, 2], save_stall_ms: None,
        };
        let written = [0, 1].map(|rank| {
            Metrics::open(run.path(), (rank, 2), 0, 9).expect("open").step(&line);
            std::fs::read_to_string(run.path().join(format!("log/rank-{rank}.jsonl"))).expect("text")
        });
        assert!(written[0].contains("\"loss\":1.9"));
        assert_eq!(written[1], "{\"step\":250000,\"step_ms\":12345.679,\"busy_ms\":12000.1,\"stage\":15}\n");
    }

    #[test]
    fn a_smaller_world_drops_the_lines_of_ranks_it_has_not() {
        let run = tempfile::tempdir().expect("a folder");
        let log = run.path().join("log");
        std::fs::create_dir(&log).expect("a folder");
        for rank in 0..4 {
            std::fs::write(log.join(format!("rank-{rank}.jsonl")), "{\"step\":3}\n{\"step\":4}\n").expect("written");
        }
        Metrics::open(run.path(), (0, 2), 3, 9).expect("open");
        let lines = [0, 1, 2, 3].map(|rank| std::fs::read_to_string(log.join(format!("rank-{rank}.jsonl"))).expect("text").lines().count());
        assert_eq!(lines, [1, 2, 1, 1], "rank 1 cuts its own");
    }
}
