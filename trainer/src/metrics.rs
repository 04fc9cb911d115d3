//! What a run says of itself: JSONL on every rank; on rank 0 TensorBoard scalars, one line a step, and a bar where
//! the output is a terminal.
use crate::memory::MemoryReport;
use crate::sentinel::Seen;
use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::Path;
use tensorboard_rs::summary_writer::SummaryWriter;

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

#[derive(Clone, Debug, Serialize)]
pub struct ValidationLine {
    pub step: u64,
    pub validation_loss: f64,
}

/// What befell the run, for the launcher's timeline. `step` steps were done by then.
#[derive(Clone, Debug, Serialize)]
struct EventLine<'a> {
    step: u64,
    event: &'static str,
    words: &'a str,
}

pub struct Metrics {
    jsonl: File,
    front: Option<Front>,
}

/// Rank 0's extras.
struct Front {
    tensorboard: SummaryWriter,
    bar: ProgressBar,
    total_steps: u64,
}

impl Metrics {
    /// A resumed run drops the lines of steps it will do again.
    pub fn open(run_dir: &Path, rank: usize, done_steps: u64, total_steps: u64) -> Result<Self> {
        let log = run_dir.join("log");
        std::fs::create_dir_all(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let path = log.join(format!("rank-{rank}.jsonl"));
        truncate_after(&path, done_steps)?;
        let jsonl = OpenOptions::new().create(true).append(true).open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let front = (rank == 0).then(|| {
            let bar = if std::io::stderr().is_terminal() { ProgressBar::new(total_steps) } else { ProgressBar::hidden() };
            bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} [{elapsed} < {eta}]").expect("a valid template"));
            bar.set_position(done_steps);
            Front { tensorboard: SummaryWriter::new(run_dir.join("tensorboard")), bar, total_steps }
        });
        Ok(Metrics { jsonl, front })
    }

    pub fn step(&mut self, line: &StepLine) -> Result<()> {
        write_line(&mut self.jsonl, line)?;
        let Some(front) = &mut self.front else { return Ok(()) };
        let mut scalar = |name: &str, value: f64| front.tensorboard.add_scalar(&format!("train/{name}"), value as f32, line.step as usize);
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
        Ok(())
    }

    pub fn validation(&mut self, line: &ValidationLine) -> Result<()> {
        write_line(&mut self.jsonl, line)?;
        if let Some(front) = &mut self.front {
            front.tensorboard.add_scalar("validation/loss", line.validation_loss as f32, line.step as usize);
            front.say(&format!("step {}/{} | validation loss {:.4}", line.step, front.total_steps, line.validation_loss));
        }
        Ok(())
    }

    /// Of rank 0's GPU.
    pub fn memory(&mut self, step: u64, report: &MemoryReport) {
        let Some(front) = &mut self.front else { return };
        let MemoryReport { weights, gradients, optimizer, activations, peak, buffers, reserved, .. } = *report;
        let named = [("weights", weights), ("gradients", gradients), ("optimizer", optimizer), ("activations", activations), ("peak", peak), ("buffers", buffers), ("reserved", reserved)];
        for (name, bytes) in named {
            front.tensorboard.add_scalar(&format!("memory/{name}_gib"), bytes as f32 / (1u64 << 30) as f32, step as usize);
        }
    }

    /// What the FP8 sentinel did in a step: its errors below `fp8/`, whether a linear computes in BF16, and words where one
    /// falls back or returns.
    pub fn sentinel(&mut self, step: u64, seen: &Seen) -> Result<()> {
        let mut scalar = |name: &str, what: &str, value: f64| {
            if let Some(front) = &mut self.front {
                front.tensorboard.add_scalar(&format!("fp8/{name}/{what}"), value as f32, step as usize);
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
            self.event(step, "fp8-again", &format!("step {step}: {name} computes in FP8 again"))?;
        }
        match &seen.looked_at {
            Some(look) if look.back_in.is_some() => self.event(step, "fp8-fallback", &format!("step {step}: {look}")),
            _ => Ok(()),
        }
    }

    /// For people, and on rank 0's log.
    pub fn event(&mut self, step: u64, event: &'static str, words: &str) -> Result<()> {
        if self.front.is_some() {
            self.say(words);
            write_line(&mut self.jsonl, &EventLine { step, event, words })?;
        }
        Ok(())
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
        if self.bar.is_hidden() { println!("{text}") } else { self.bar.println(text) }
    }
}

fn write_line(file: &mut File, line: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text).context("cannot write the log")
}

/// Keeps the lines up to `step`; a line that a crash cut short goes too.
fn truncate_after(path: &Path, step: u64) -> Result<()> {
    let Ok(file) = File::open(path) else { return Ok(()) };
    let kept = |line: &String| serde_json::from_str::<serde_json::Value>(line).ok().and_then(|v| v["step"].as_u64()).is_some_and(|s| s <= step);
    let lines: Vec<String> = BufReader::new(file).lines().map_while(|line| line.ok()).filter(kept).collect();
    let text: String = lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect();
    std::fs::write(path, text).with_context(|| format!("cannot rewrite {}", path.display()))
}

/// 1234567 → 1.2M
fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.1}M", v / 1e6),
        v if v >= 1e4 => format!("{:.1}K", v / 1e3),
        v => format!("{v:.0}"),
    }
}
