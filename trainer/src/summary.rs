//! `summary.json`: what a run came to.
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub steps: u64,
    pub tokens: u64,
    /// Over the whole run's steps and validations, resumed parts included.
    pub tokens_per_s: f64,
    /// Of the held-out split, nats a token.
    pub unigram_entropy: Option<f64>,
    pub val_loss_start: Option<f64>,
    pub val_loss_end: Option<f64>,
    pub checkpoint: Option<PathBuf>,
    pub seconds: f64,
    pub skipped_steps: u64,
    /// False: stopped on request before the end of the phases.
    pub finished: bool,
}

impl Summary {
    pub fn write(&self, run_dir: &Path) -> Result<()> {
        let path = run_dir.join("summary.json");
        std::fs::write(&path, serde_json::to_vec_pretty(self)?).with_context(|| format!("cannot write {}", path.display()))
    }
}
