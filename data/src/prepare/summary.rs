//! What `prepare` reports.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use super::left_out::LeftOuts;
use crate::format::manifest::{LeftOut, Manifest};

/// The figures of a finished corpus.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct PrepareSummary {
    pub files: u64,
    /// Files of a wanted extension that are not UTF-8 text.
    pub skipped_files: u64,
    /// Documents without text, or of which a lossy tokenizer left nothing, and lines of JSONL and rows of parquet that
    /// gave none.
    pub empty_documents: u64,
    pub bad_lines: u64,
    /// Files that were not read, by reason; the skipped ones among them.
    pub left_out: BTreeMap<String, LeftOut>,
    /// Distinct documents.
    pub documents: u64,
    /// Documents left out because another has the same text.
    pub duplicates: u64,
    pub text_bytes: u64,
    pub train_tokens: u64,
    pub held_out_tokens: u64,
    pub vocab_size: u32,
    /// Nats per token of the held-out split under its own unigram distribution: what a model that
    /// knows only how frequent each token is would reach.
    pub unigram_entropy: f64,
    pub seconds: f64,
    pub out: PathBuf,
}

impl PrepareSummary {
    pub(super) fn new(manifest: &Manifest, out: PathBuf, seconds: f64) -> PrepareSummary {
        PrepareSummary {
            files: manifest.prepare.files,
            skipped_files: manifest.prepare.skipped_files,
            empty_documents: manifest.prepare.empty_documents,
            bad_lines: manifest.prepare.bad_lines,
            left_out: manifest.prepare.left_out.clone(),
            documents: manifest.train.documents + manifest.held_out.documents,
            duplicates: manifest.prepare.duplicates,
            text_bytes: manifest.prepare.text_bytes,
            train_tokens: manifest.train.tokens,
            held_out_tokens: manifest.held_out.tokens,
            vocab_size: manifest.vocab_size,
            unigram_entropy: manifest.unigram_entropy,
            seconds,
            out,
        }
    }
}

impl fmt::Display for PrepareSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} files, {} documents and {} duplicates left out, {:.1} MB of text",
            self.files, self.documents, self.duplicates, self.text_bytes as f64 / 1e6
        )?;
        write!(f, "{}", LeftOuts(self.left_out.clone()))?;
        write!(f, "{}", without_text(self.empty_documents, self.bad_lines))?;
        writeln!(
            f,
            "{} train and {} held-out tokens of a vocabulary of {}, in {:.1} s",
            self.train_tokens, self.held_out_tokens, self.vocab_size, self.seconds
        )?;
        match self.held_out_tokens {
            0 => writeln!(f, "nothing is held out: a run on this corpus alone has validation.every = 0")?,
            _ => writeln!(f, "held-out unigram entropy: {:.4} nats per token", self.unigram_entropy)?,
        }
        write!(f, "corpus: {}", self.out.display())
    }
}

/// A line, none for nothing.
pub(super) fn without_text(documents: u64, lines: u64) -> String {
    match documents + lines {
        0 => String::new(),
        _ => format!("left out: {documents} documents without text, {lines} lines and rows that give none\n"),
    }
}

/// −Σ p ln p over the counts of all shards; 0 for none.
pub(super) fn unigram_entropy<'a>(shards: impl Iterator<Item = &'a [(u32, u64)]>) -> f64 {
    let mut counts: BTreeMap<u32, u64> = BTreeMap::new();
    for (id, count) in shards.flatten() {
        *counts.entry(*id).or_default() += count;
    }
    let total: u64 = counts.values().sum();
    let shares = counts.values().map(|count| *count as f64 / total as f64);
    shares.map(|p| -p * p.ln()).sum::<f64>().abs()
}
