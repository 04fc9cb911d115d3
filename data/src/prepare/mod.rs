//! `prepare`: text in, a corpus folder out.
//!
//!     inputs → documents → spill (shuffle, split and de-duplicate by key) → BPE → encode → index → manifest
//!
//! Everything is made in `OUT.partial` and renamed to OUT at the very end. Each stage leaves durable
//! pieces that a later run of the same command takes over (see `work`), so a killed prepare continues.
//! Invariant: the folder's bytes are a function of the inputs' names and contents and the options,
//! whatever the number of threads and interruptions.

mod args;
mod bad_lines;
mod bpe;
mod documents;
mod durable;
mod encode;
mod groups;
mod inputs;
mod left_out;
mod line;
mod remote;
mod spill;
mod summary;
mod tokens;
mod transform;
mod work;

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;

use crate::format::manifest::{FORMAT, MANIFEST_FILE, Manifest, Recipe, TOKENIZER_FILE};
use crate::tokenizer::{Tokenizer, open_tokenizer};
use crate::{DataError, Split};
pub use args::{MOST_THREADS, PrepareArgs};
use bad_lines::Signs;
use encode::{Encoder, ShardDone};
use inputs::InputFile;
use left_out::LeftOuts;
use spill::{GroupDone, Spill, Unit, Units};
use tokens::Given;
pub use summary::PrepareSummary;
pub use transform::undo as decode_document;
use work::{Job, Work};

/// See the module head. Prints what it found; shows a bar on a terminal.
pub fn prepare(args: &PrepareArgs) -> Result<PrepareSummary, DataError> {
    args.validate()?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads).build();
    let pool = pool.map_err(|e| DataError::bad_option("--threads", args.threads, e.to_string()))?;
    pool.install(|| Prepare::start(args)?.run())
}

struct Prepare<'a> {
    args: &'a PrepareArgs,
    started: Instant,
    given: Option<Given>,
    files: Vec<InputFile>,
    left_out: LeftOuts,
    work: Work,
}

impl<'a> Prepare<'a> {
    /// Lists the inputs, then takes over the work folder or makes one.
    fn start(args: &'a PrepareArgs) -> Result<Prepare<'a>, DataError> {
        let started = Instant::now();
        work::check(&args.out)?;
        let given = tokens::open_given(args)?;
        let (files, left_out) = inputs::list(args)?;
        if files.is_empty() {
            return Err(no_text(args, left_out.files(), &left_out, &[]));
        }
        let given_blake3 = given.as_ref().map(|given| &given.blake3);
        let (options, inputs) = (digest(&serde_json::json!(args)), digest(&(&files, given_blake3)));
        let work = Work::claim(&args.out, &Job { format: FORMAT.into(), options, inputs })?;
        Ok(Prepare { args, started, given, files, left_out, work })
    }

    fn run(&mut self) -> Result<PrepareSummary, DataError> {
        let out = self.work.folder.join("out");
        // An earlier run may have come as far as the last renames.
        if !self.args.out.join(MANIFEST_FILE).exists() {
            if !out.join(MANIFEST_FILE).exists() {
                self.make(&out).inspect_err(|error| self.keep_or_remove(error))?;
            }
            durable::rename(&out, &self.args.out)?;
        }
        self.work.remove()?;
        let path = self.args.out.join(MANIFEST_FILE);
        let manifest = durable::read_json(&path)?.expect("the manifest was there a moment ago");
        let summary = PrepareSummary::new(&manifest, self.args.out.clone(), self.started.elapsed().as_secs_f64());
        println!("{summary}");
        Ok(summary)
    }

    /// Nothing serves a run with other options; anything else can be mended and the work continued.
    fn keep_or_remove(&self, error: &DataError) {
        if !matches!(error, DataError::NoText { .. } | DataError::BadOption { .. }) {
            tracing::warn!(folder = %self.work.folder.display(), "what is done is kept; once the error is mended the same command goes on");
        } else if let Err(left) = self.work.remove() {
            tracing::warn!(%left, "the work folder stays");
        }
    }

    /// All stages, up to and with the manifest.
    fn make(&mut self, out: &Path) -> Result<(), DataError> {
        let (spills, done) = (self.work.folder.join("spill"), self.work.folder.join("done"));
        [out, &spills, &done].into_iter().try_for_each(durable::make_folder)?;
        let text: u64 = self.files.iter().map(InputFile::text_estimate).sum();
        let units = Units::new(self.args.held_out, text, self.args.shard_mib << 20);
        let signs = Signs::of(&self.files, self.args.max_bad);
        let (given, lossy) = (self.given.as_ref(), self.args.lossy_tokenizer);
        let spill = Spill { folder: spills, units, seed: self.args.seed, signs, part_bytes: spill::PART_BYTES, given, lossy };
        let groups = self.read_inputs(&spill)?;
        spill.keep_only(&groups)?;
        bad_lines::check(&groups, self.args.max_bad)?;
        let parts = spill.parts(&groups);
        let documents: u64 = groups.iter().map(|group| group.documents).sum();
        let mut left_out = self.left_out.clone();
        groups.iter().for_each(|group| left_out.merge(&group.left_out));
        if documents == 0 {
            return Err(no_text(self.args, self.files.len() as u64 + self.left_out.files(), &left_out, &groups));
        }
        let held_out: u64 = groups.iter().map(|group| group.held_out_documents).sum();
        let lender = match held_out {
            0 if self.args.held_out > 0.0 => first_filled(&parts, units.held_out..units.count(), 2)?,
            all if all == documents => first_filled(&parts, 0..units.held_out, 1)?,
            _ => None,
        };
        let jobs = encode::jobs(units, lender);
        let tokenizer = self.tokenizer(out, &parts, &jobs)?;
        let transform = transform::Transform::new(&tokenizer, self.args)?;
        let end_token = transform.end_token;
        let row_group_tokens = self.args.row_group_tokens;
        let encoder = Encoder { transform, parts: &parts, out, done: &done, row_group_tokens };
        let shards = self.encode(&encoder, &jobs)?;
        let (held_out, train): (Vec<_>, Vec<_>) = shards.into_iter().partition(|(split, _)| *split == Split::HeldOut);
        if train.iter().all(|(_, done)| done.documents == 0) {
            let lost: u64 = train.iter().map(|(_, done)| done.empty).sum();
            let reason = format!("has no token for any of the {lost} documents to train on");
            return Err(DataError::Tokenizer { path: tokenizer.path().to_owned(), reason });
        }
        let stream = |split, shards: &[(Split, ShardDone)]| {
            let shards: Vec<ShardDone> = shards.iter().map(|(_, done)| done.clone()).collect();
            encoder.write_index(split, &shards)
        };
        let manifest = Manifest {
            format: FORMAT.into(),
            vocab_size: tokenizer.vocab_size(),
            end_token,
            tokenizer_blake3: hash_file(&out.join(TOKENIZER_FILE))?,
            unigram_entropy: summary::unigram_entropy(held_out.iter().map(|(_, done)| done.counts.as_slice())),
            prepare: self.recipe(&groups, left_out, train.iter().chain(&held_out).map(|(_, done)| done)),
            train: stream(Split::Train, &train)?,
            held_out: stream(Split::HeldOut, &held_out)?,
        };
        durable::write_json(&out.join(MANIFEST_FILE), &manifest)?;
        Ok(())
    }

    fn read_inputs(&self, spill: &Spill) -> Result<Vec<GroupDone>, DataError> {
        let total: u64 = self.files.iter().map(|file| file.bytes).sum();
        let bar = bar("reading", total);
        let read = groups::cut(&self.files).into_par_iter().map(|files| {
            let done = spill.add_group(files, &self.args.text_column)?;
            bar.inc(files.iter().map(|file| file.bytes).sum());
            Ok(done)
        });
        let read = read.collect();
        bar.finish_and_clear();
        read
    }

    /// The tokenizer that lies in the output folder: copied, trained, or left there by an earlier run.
    fn tokenizer(&mut self, out: &Path, parts: &[PathBuf], jobs: &[encode::Job]) -> Result<Tokenizer, DataError> {
        let path = out.join(TOKENIZER_FILE);
        if let Some(given) = self.given.take() {
            given.write(out)?;
            return Ok(given.tokenizer);
        }
        if path.exists() {
            return open_tokenizer(&path);
        }
        let vocab = self.args.vocab.expect("validated: a vocabulary or a tokenizer");
        tokens::train(out, parts, jobs, vocab, self.args.bpe_mib << 20)
    }

    /// As many shards at once as there are threads, and documents side by side inside each.
    fn encode(&self, encoder: &Encoder, jobs: &[encode::Job]) -> Result<Vec<(Split, ShardDone)>, DataError> {
        let bar = bar("encoding", jobs.len() as u64);
        let mut shards = Vec::with_capacity(jobs.len());
        for some in jobs.chunks(rayon::current_num_threads()) {
            let made = some.par_iter().map(|job| {
                let done = encoder.run(*job)?;
                bar.inc(1);
                Ok((job.split, done))
            });
            shards.extend(made.collect::<Result<Vec<_>, DataError>>()?);
        }
        bar.finish_and_clear();
        Ok(shards)
    }

    fn recipe<'d>(&self, groups: &[GroupDone], left_out: LeftOuts, shards: impl Iterator<Item = &'d ShardDone>) -> Recipe {
        let sum = |field: fn(&GroupDone) -> u64| groups.iter().map(field).sum::<u64>();
        let (duplicates, empty) = shards.fold((0, 0), |(duplicates, empty), done| (duplicates + done.duplicates, empty + done.empty));
        Recipe {
            seed: self.args.seed,
            held_out: self.args.held_out,
            fim_rate: self.args.fim_rate,
            split_rate: self.args.split_rate,
            files: self.files.len() as u64,
            skipped_files: left_out.0.get(left_out::NOT_TEXT).map_or(0, |some| some.files),
            text_bytes: sum(|group| group.text_bytes),
            duplicates,
            empty_documents: sum(|group| group.empty_documents) + empty,
            bad_lines: sum(|group| group.bad_lines),
            left_out: left_out.0,
        }
    }
}

/// The first of some units with a document, if they have `least`.
fn first_filled(parts: &[PathBuf], units: Range<u32>, least: usize) -> Result<Option<u32>, DataError> {
    let (mut first, mut documents) = (None, 0);
    for unit in units {
        documents += Unit::load(parts, unit)?.len();
        first = first.or((documents > 0).then_some(unit));
        if documents >= least {
            return Ok(first);
        }
    }
    Ok(None)
}

fn no_text(args: &PrepareArgs, files: u64, left_out: &LeftOuts, groups: &[GroupDone]) -> DataError {
    let inputs: Vec<String> = args.inputs.iter().map(|input| input.display().to_string()).collect();
    let sum = |field: fn(&GroupDone) -> u64| groups.iter().map(field).sum();
    let left_out = format!("{left_out}{}", summary::without_text(sum(|group| group.empty_documents), sum(|group| group.bad_lines)));
    DataError::NoText { inputs: inputs.join(", "), extensions: args.extensions.join(", "), files, left_out }
}

/// As it is written down: the list of files may be long, and a tree of it would take twenty times its memory.
fn digest(value: &impl serde::Serialize) -> String {
    let mut hasher = blake3::Hasher::new();
    serde_json::to_writer(&mut hasher, value).expect("plain structs serialise");
    hasher.finalize().to_hex().to_string()
}

fn hash_file(path: &Path) -> Result<String, DataError> {
    let bytes = fs::read(path).map_err(DataError::io(path, "read"))?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

/// Shown on a terminal only, with the time left.
fn bar(doing: &'static str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:10} {wide_bar} {percent:>3} % | {elapsed} | {eta} left");
    ProgressBar::new(total).with_style(style.expect("a constant")).with_message(doing)
}
