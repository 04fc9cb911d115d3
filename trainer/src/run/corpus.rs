//! The samples of a run: where its phases' orders and its held-out split are read from.
use super::streams::Streams;
use crate::config::RunConfig;
use crate::coordinator::all_or_none;
use crate::phase::Plan;
use anyhow::{Context, Result, bail, ensure};
use data::{Listings, Loader, LoaderOptions, OrderSpec, Retry, Source, Split};
use parallel::comm::Communicator;
use std::collections::BTreeMap;
use std::time::Duration;

/// The sample orders of a run's phases, and the held-out splits of `data.mixture`.
pub(super) struct Corpus {
    orders: BTreeMap<u64, Loader>,
    pub held_out: Option<Loader>,
    pub unigram_entropy: Option<f64>,
    /// For people, before the first step.
    pub notes: Vec<String>,
}

impl Corpus {
    pub fn open(config: &RunConfig, plan: &Plan) -> Result<Self> {
        let (mut streams, mut orders) = (Streams::default(), BTreeMap::new());
        for order in plan.orders() {
            let length = order.phase.sequence_length;
            let loader = open_checked(config, spec(config, plan.mixture(order.phase), length, order.number, Split::Train))?;
            orders.insert(order.number, streams.go_on(loader, &order));
        }
        let held_out = match config.validation.every {
            0 => None,
            every => {
                let spec = spec(config, &config.data.mixture, config.phase[0].sequence_length, 0, Split::HeldOut);
                Some(open_checked(config, spec).with_context(|| format!("validation.every = {every} needs a held-out split (0 does without; prepare's --held-out makes one)"))?)
            }
        };
        let mut all = orders.values().chain(&held_out);
        let first = all.next().expect("a run has a phase");
        all.try_for_each(|loader| loader.check_alike(first))?;
        let unigram_entropy = held_out.as_ref().unwrap_or(&orders[&0]).unigram_entropy();
        let mut notes = streams.notes();
        notes.extend(held_out.iter().flat_map(|loader| validation_notes(config, loader)));
        Ok(Corpus { orders, held_out, unigram_entropy, notes })
    }

    /// Every shard that is still to be read is looked for, from this order on: one that is over may be gone but for its
    /// manifest and index. Collective; one rank looks.
    pub fn look_for_files(&mut self, world: &dyn Communicator, from: u64) -> Result<()> {
        let look = || {
            let mut listings = Listings::default();
            let loaders = self.orders.range(from..).map(|(_, loader)| loader).chain(&self.held_out);
            Ok(loaders.map(|loader| loader.check_files(&mut listings)).collect::<Result<Vec<_>, _>>()?.concat())
        };
        let notes = all_or_none(world, if world.rank() == 0 { look() } else { Ok(Vec::new()) })?;
        self.notes.extend(notes);
        Ok(())
    }

    pub fn loader(&self, order: u64) -> &Loader {
        &self.orders[&order]
    }

    /// Of each order: number, fingerprint, and for the words of an error what it is made of.
    pub fn fingerprint(&self) -> String {
        let order = |(number, loader): (&u64, &Loader)| format!("{number}:{}:{}", loader.fingerprint(), made_of(loader).join(","));
        self.orders.iter().map(order).collect::<Vec<_>>().join(" ")
    }

    /// Whether a checkpoint whose fingerprint is `written` has read what the run reads now, up to the order it has
    /// `reached`: what comes later may change.
    pub fn check_read(&self, written: &str, reached: u64) -> Result<()> {
        ensure!(self.orders.contains_key(&reached), "it has reached sample order {reached}, and the run's phases have no such order now");
        for (&number, loader) in self.orders.range(..=reached) {
            let entry = written.split(' ').find_map(|entry| entry.strip_prefix(&format!("{number}:")));
            let (hash, sources) = entry.map(|entry| entry.split_once(':').unwrap_or((entry, ""))).unwrap_or_default();
            if hash != loader.fingerprint() {
                bail!("sample order {number}, which it has read from, is another now: {}", difference(loader, sources));
            }
        }
        Ok(())
    }
}

/// Of each source, in short: what its manifest is, and its weight.
fn made_of(loader: &Loader) -> Vec<String> {
    loader.sources().map(|source| format!("{}@{}", &source.manifest[..16], source.weight)).collect()
}

/// The first thing in which `written`, of `made_of`, is not what `loader` reads.
fn difference(loader: &Loader, written: &str) -> String {
    let before: Vec<&str> = written.split(',').filter(|part| !part.is_empty()).collect();
    let paths: Vec<String> = loader.sources().map(|source| source.path.display().to_string()).collect();
    if before.is_empty() {
        return format!("it was not read from {} in this way", paths.join(", "));
    }
    if before.len() != paths.len() {
        return format!("it had {} source(s), now there are {}: {}", before.len(), paths.len(), paths.join(", "));
    }
    for ((now, then), path) in made_of(loader).iter().zip(before).zip(paths) {
        let ((manifest, weight), (then, weight_then)) = (now.split_once('@').unwrap_or_default(), then.split_once('@').unwrap_or_default());
        if manifest != then {
            return format!("{path} is not the corpus that was read, or not in its place of the mixture");
        }
        if weight != weight_then {
            return format!("{path} has weight {weight}, it had {weight_then}");
        }
    }
    "its sequence length, or where its sources begin, which follows from the phases before it".into()
}

fn validation_notes(config: &RunConfig, held_out: &Loader) -> Vec<String> {
    let (wanted, there) = (config.validation.sequences, held_out.num_samples());
    let left_out: Vec<String> = held_out.left_out().iter().map(|path| path.display().to_string()).collect();
    let left_out = (!left_out.is_empty()).then(|| {
        format!("validation leaves out {}: no held-out sequence of {} tokens", left_out.join(", "), config.phase[0].sequence_length)
    });
    let few =
        (there < wanted).then(|| format!("validation reads {there} sequences, not {wanted}: with them a source's held-out split ends"));
    left_out.into_iter().chain(few).collect()
}

fn spec(config: &RunConfig, sources: &[Source], sequence_length: u64, phase: u64, split: Split) -> OrderSpec {
    OrderSpec { sources: sources.to_vec(), sequence_length: sequence_length as usize, seed: config.run.seed, phase, split }
}

/// A corpus whose tokens the model has embeddings for.
pub fn open_checked(config: &RunConfig, spec: OrderSpec) -> Result<Loader> {
    let name = spec.sources[0].path.clone();
    let retry = Retry { patience: Duration::from_secs(config.data.patience), ..Retry::default() };
    let loader = Loader::open(spec, LoaderOptions { retry, ..LoaderOptions::default() })?;
    let (corpus, model) = (loader.vocab_size() as i64, config.model.vocab_size);
    ensure!(corpus <= model, "the tokenizer of {} has {corpus} tokens, model.vocab_size is {model}", name.display());
    Ok(loader)
}
