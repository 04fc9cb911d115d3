//! `manifest.json`: what a checkpoint holds, where, and the hash of every byte of it, its own included.
use crate::guard::GuardState;
use crate::phase::Phase;
use crate::sentinel::SentinelState;
use anyhow::{Context, Result, ensure};
use kernels::Precision;
use model::ModelConfig;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

pub const FORMAT: &str = "tiefsee-checkpoint-2";
/// Stands for the manifest's own hash while that is taken.
const UNSEALED: &str = "0000000000000000000000000000000000000000000000000000000000000000";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: String,
    /// BLAKE3 of this file with 64 zeros in this place.
    pub blake3: String,
    /// Steps done, skipped ones counted.
    pub step: u64,
    /// Optimizer updates done.
    pub updates: u64,
    pub tokens: u64,
    pub cursor: Cursor,
    /// Random numbers are functions of (seed, name, index): the seed is the whole state.
    pub seed: u64,
    pub precision: Precision,
    /// Of the writer; a reader's may differ.
    pub mesh: Mesh,
    pub model: ModelConfig,
    /// Fingerprint of the corpora and their orders; the cursor means nothing over another.
    #[serde(default)]
    pub corpus: String,
    /// Of the tokenizer.json whose tokens it knows; empty: not known.
    #[serde(default)]
    pub tokenizer_blake3: String,
    /// Those that have had a step, the first ones of the run; older programs kept none.
    #[serde(default)]
    pub phases: Vec<Phase>,
    pub progress: Progress,
    pub files: Vec<FileEntry>,
    pub tensors: BTreeMap<String, TensorEntry>,
}

/// The next sample: a position in one of the run's sample orders.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    pub order: u64,
    pub next: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    pub world: usize,
    pub pp: usize,
    pub dp: usize,
    pub ep: usize,
}

/// What the closing summary wants to know of the steps before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub val_loss_start: Option<f64>,
    pub val_loss: Option<f64>,
    /// Of which step it is.
    #[serde(default)]
    pub validated: Option<u64>,
    /// Spent in steps and validation so far.
    pub seconds: f64,
    pub skipped_steps: u64,
    #[serde(default)]
    pub guard: GuardState,
    #[serde(default)]
    pub sentinel: SentinelState,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileEntry {
    pub name: String,
    pub bytes: u64,
    pub blake3: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorEntry {
    pub dtype: String,
    /// Of the whole, logical tensor.
    pub shape: Vec<i64>,
    pub slices: Vec<SliceEntry>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SliceEntry {
    pub file: String,
    /// Where the slice starts in dim 0; it is whole in every other dim.
    pub start: i64,
    pub rows: i64,
}

impl Manifest {
    /// A run's manifest before its first step; the caller fills in where the run is.
    pub fn head(config: &crate::RunConfig, mesh: &parallel::mesh::Mesh, updates: u64) -> Self {
        let mesh = Mesh { world: mesh.world_size(), pp: mesh.pp, dp: mesh.dp, ep: mesh.ep };
        Manifest { updates, seed: config.run.seed, mesh, ..Self::imported(config.model.clone(), config.run.precision) }
    }

    /// Weights from elsewhere: no step, no moments.
    pub fn imported(model: ModelConfig, precision: Precision) -> Self {
        Manifest {
            format: FORMAT.to_string(),
            blake3: UNSEALED.to_string(),
            step: 0,
            updates: 0,
            tokens: 0,
            cursor: Cursor::default(),
            seed: 0,
            precision,
            mesh: Mesh { world: 1, pp: 1, dp: 1, ep: 1 },
            model,
            corpus: String::new(),
            tokenizer_blake3: String::new(),
            phases: Vec::new(),
            progress: Progress::default(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
        }
    }

    /// Not a run's.
    pub fn is_import(&self) -> bool {
        self.corpus.is_empty() && self.step == 0
    }

    /// Adds a rank's shard.
    pub fn add(&mut self, file: FileEntry, tensors: Vec<(String, TensorEntry)>) {
        self.files.push(file);
        for (name, entry) in tensors {
            match self.tensors.get_mut(&name) {
                Some(known) => known.slices.extend(entry.slices),
                None => drop(self.tensors.insert(name, entry)),
            }
        }
    }

    /// Writes and syncs CHECKPOINT/manifest.json.
    pub fn write(&self, checkpoint: &Path) -> Result<()> {
        let path = checkpoint.join("manifest.json");
        let open = serde_json::to_string_pretty(&Manifest { blake3: UNSEALED.into(), ..self.clone() })?;
        let sealed = open.replacen(UNSEALED, blake3::hash(open.as_bytes()).to_hex().as_str(), 1);
        // One handle: what closing a file on NFS met, another would not be told.
        let write = || -> std::io::Result<()> {
            let mut file = std::fs::File::create(&path)?;
            file.write_all(sealed.as_bytes())?;
            file.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// CHECKPOINT/manifest.json, if every byte of it is what was written.
    pub fn read(checkpoint: &Path) -> Result<Manifest> {
        let path = checkpoint.join("manifest.json");
        let text = std::fs::read(&path).with_context(|| match super::list(checkpoint).unwrap_or_default().last() {
            Some((_, newest)) => format!("{} is a run directory, not a checkpoint; its newest is {}", checkpoint.display(), newest.display()),
            None => format!("cannot read {}", path.display()),
        })?;
        let text = String::from_utf8(text).with_context(|| format!("{} is not text", path.display()))?;
        let manifest: Manifest = serde_json::from_str(&text).with_context(|| format!("{} is not a checkpoint manifest", path.display()))?;
        ensure!(manifest.format == FORMAT, "{}: format `{}`, expected `{FORMAT}`", path.display(), manifest.format);
        let open = text.replacen(&manifest.blake3, UNSEALED, 1);
        let whole = manifest.blake3.len() == UNSEALED.len() && blake3::hash(open.as_bytes()).to_hex().as_str() == manifest.blake3;
        ensure!(whole, "{} is not what was written: its BLAKE3 differs", path.display());
        Ok(manifest)
    }
}
