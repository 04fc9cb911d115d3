//! The command line of `prepare`, and what its values must satisfy.

use std::path::PathBuf;

use crate::{DataError, is_url};

/// Turn text into tokenised, shuffled parquet shards.
#[derive(clap::Args, Clone, Debug, serde::Serialize)]
#[command(group = clap::ArgGroup::new("ids").required(true).args(["vocab", "tokenizer"]))]
pub struct PrepareArgs {
    /// Files and folders of text, JSONL (.gz, .zst) or parquet; folders are walked and links followed. s3://bucket/prefix
    /// and gs://bucket/prefix too, with the credentials, region and endpoint of the environment.
    #[arg(required = true, value_name = "PATH")]
    pub inputs: Vec<PathBuf>,

    /// Folder to write; must not exist yet. Work goes on in OUT.partial until all is done, and the
    /// same command continues it after an interruption.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Train a byte-level BPE of this many tokens on the corpus.
    #[arg(long, value_name = "N")]
    pub vocab: Option<u32>,

    /// Use this Hugging Face tokenizer.json instead of training one.
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,

    /// Use it even if it changes text (normalizes it, or lacks tokens for some); a document of which nothing is left is
    /// left out.
    #[arg(long, requires = "tokenizer")]
    #[serde(skip)]
    pub lossy_tokenizer: bool,

    /// Text the BPE is trained on, in MiB: the first of the shuffled training documents.
    #[arg(long, value_name = "MIB", default_value_t = 16)]
    pub bpe_mib: u64,

    /// Share of the documents kept out of training, chosen by the hash of their text.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.01)]
    pub held_out: f64,

    /// Seed of the shuffle, the held-out choice, fill-in-the-middle and token splitting.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Threads, at most 1024; 0 takes one a core. The output does not depend on it.
    #[arg(long, default_value_t = 0)]
    #[serde(skip)]
    pub threads: usize,

    /// Stop choosing files at about this much text, for a quick start. Files are then taken in a
    /// seeded order instead of all.
    #[arg(long, value_name = "BYTES")]
    pub max_bytes: Option<u64>,

    /// Leave out text files larger than this (generated tables, vendored bundles); no limit if not given.
    #[arg(long, value_name = "BYTES")]
    pub max_file_bytes: Option<u64>,

    /// Extensions to read, separated by commas, in capitals or not. jsonl (or json, ndjson, jsonlines), those
    /// with .gz or .zst behind and parquet are taken apart into documents; a file of any other extension is one document.
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_values_t = DEFAULT_EXTENSIONS.map(String::from))]
    pub extensions: Vec<String>,

    /// JSONL key and parquet column that hold the text; the column may be of strings or of bytes.
    #[arg(long, default_value = "text")]
    pub text_column: String,

    /// Share of JSONL lines (not UTF-8, no JSON, no such key) and parquet rows (not UTF-8) that may give no text and are
    /// left out.
    #[arg(long, value_name = "SHARE", default_value_t = 0.001)]
    #[serde(skip)]
    pub max_bad: f64,

    /// Share of the documents of both splits turned into fill-in-the-middle (prefix, suffix, middle). DeepSeek-V3's is 0.1: PSM at the
    /// level of documents, as here.
    #[arg(long, value_name = "RATE", default_value_t = 0.0)]
    pub fim_rate: f64,

    /// Share of the tokens joining punctuation and line breaks that are split into the two; needs a byte-level tokenizer
    /// that has some.
    #[arg(long, value_name = "RATE", default_value_t = 0.0)]
    pub split_rate: f64,

    /// Token after each document; found by its usual names if not given.
    #[arg(long, value_name = "TOKEN")]
    pub end_token: Option<String>,

    /// Tokens of a row group, the unit that training reads.
    #[arg(long, value_name = "N", default_value_t = ROW_GROUP_TOKENS)]
    pub row_group_tokens: u64,

    /// Text of a shard in MiB. A thread holds one in memory, tokens included, about 3 times this.
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub shard_mib: u64,
}

/// A rank reads whole row groups and may need a few samples of each, so they are small: of 14.8T tokens there are
/// 2.3 × 10⁸ then, and the index, searched in place, has 11 GB, 9 MB of which are read when it is opened.
const ROW_GROUP_TOKENS: u64 = 1 << 16;

/// No machine has more cores.
pub const MOST_THREADS: usize = 1024;

const DEFAULT_EXTENSIONS: [&str; 24] = [
    "txt", "md", "rst", "adoc", "rs", "c", "h", "cc", "cpp", "hpp", "py", "go", "java", "js", "ts", "sh", "sql", "tex",
    "jsonl", "jsonl.gz", "jsonl.zst", "json.gz", "json.zst", "parquet",
];

impl PrepareArgs {
    /// The defaults of the command line, for callers in code.
    pub fn new(inputs: Vec<PathBuf>, out: PathBuf) -> PrepareArgs {
        PrepareArgs {
            inputs,
            out,
            vocab: None,
            tokenizer: None,
            lossy_tokenizer: false,
            bpe_mib: 16,
            held_out: 0.01,
            seed: 0,
            threads: 0,
            max_bytes: None,
            max_file_bytes: None,
            extensions: DEFAULT_EXTENSIONS.map(String::from).to_vec(),
            text_column: "text".into(),
            max_bad: 0.001,
            fim_rate: 0.0,
            split_rate: 0.0,
            end_token: None,
            row_group_tokens: ROW_GROUP_TOKENS,
            shard_mib: 128,
        }
    }

    pub(super) fn validate(&self) -> Result<(), DataError> {
        if is_url(&self.out) {
            return Err(DataError::bad_option(
                "--out",
                self.out.display(),
                "must be a local folder: its files are renamed into place; copy it to a store afterwards",
            ));
        }
        let paths = self.inputs.iter().map(|input| ("PATH", input)).chain([("--out", &self.out)]);
        let mut paths = paths.chain(self.tokenizer.iter().map(|tokenizer| ("--tokenizer", tokenizer)));
        if let Some((option, path)) = paths.find(|(_, path)| path.to_str().is_none()) {
            return Err(DataError::bad_option(option, path.display(), "is not UTF-8"));
        }
        let rates = [
            ("--held-out", self.held_out),
            ("--fim-rate", self.fim_rate),
            ("--split-rate", self.split_rate),
            ("--max-bad", self.max_bad),
        ];
        if let Some((option, rate)) = rates.into_iter().find(|(_, rate)| !(0.0..=1.0).contains(rate)) {
            return Err(DataError::bad_option(option, rate, "must lie in 0 to 1"));
        }
        if self.held_out > 0.5 {
            return Err(DataError::bad_option("--held-out", self.held_out, "must not exceed 0.5"));
        }
        if self.vocab.is_some() == self.tokenizer.is_some() {
            return Err(DataError::bad_option(
                "--vocab",
                format!("{:?}", self.vocab),
                "give either --vocab or --tokenizer",
            ));
        }
        if self.threads > MOST_THREADS {
            return Err(DataError::bad_option("--threads", self.threads, format!("must lie in 0 to {MOST_THREADS}")));
        }
        let smallest = super::bpe::smallest_vocab();
        if let Some(vocab) = self.vocab.filter(|vocab| *vocab < smallest) {
            let limit = format!("must be at least {smallest}: 256 bytes and the special tokens");
            return Err(DataError::bad_option("--vocab", vocab, limit));
        }
        if !(1..=1 << 20).contains(&self.bpe_mib) {
            return Err(DataError::bad_option("--bpe-mib", self.bpe_mib, "must lie in 1 to 2^20"));
        }
        // A row group and the longest document after it must fit a page.
        if !(1..=1 << 27).contains(&self.row_group_tokens) {
            return Err(DataError::bad_option("--row-group-tokens", self.row_group_tokens, "must lie in 1 to 2^27"));
        }
        if !(1..=1 << 14).contains(&self.shard_mib) {
            return Err(DataError::bad_option("--shard-mib", self.shard_mib, "must lie in 1 to 16384"));
        }
        Ok(())
    }
}
