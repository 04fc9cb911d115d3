//! The samples of a run: where its phases' orders and its held-out split are read from.
use crate::config::RunConfig;
use crate::phase::Plan;
use anyhow::{Result, ensure};
use data::{Loader, LoaderOptions, OrderSpec, Source, Split};
use std::collections::HashMap;

/// The sample orders of a run's phases, and the held-out split of the first.
pub(super) struct Corpus {
    orders: HashMap<u64, Loader>,
    pub held_out: Option<Loader>,
    pub unigram_entropy: Option<f64>,
}

impl Corpus {
    pub fn open(config: &RunConfig, plan: &Plan) -> Result<Self> {
        let mut orders = HashMap::new();
        let mut tokens = 0;
        while let Some(moment) = plan.at(tokens) {
            if let std::collections::hash_map::Entry::Vacant(entry) = orders.entry(moment.order) {
                let spec = spec(config, plan.mixture(moment.phase), moment.phase.sequence_length, moment.order, Split::Train);
                entry.insert(open_checked(config, spec)?);
            }
            tokens += moment.phase.tokens;
        }
        let held_out = match config.validation.every {
            0 => None,
            _ => {
                let spec = spec(config, &config.data.mixture, config.phase[0].sequence_length, 0, Split::HeldOut);
                let loader = open_checked(config, spec)?;
                ensure!(
                    loader.num_samples() > 0,
                    "the held-out split of {} has not one sequence of {} tokens",
                    config.data.mixture[0].path.display(),
                    config.phase[0].sequence_length
                );
                Some(loader)
            }
        };
        let unigram_entropy = Some(orders[&0].unigram_entropy(0));
        Ok(Corpus { orders, held_out, unigram_entropy })
    }

    pub fn loader(&self, order: u64) -> &Loader {
        &self.orders[&order]
    }

    pub fn fingerprint(&self) -> String {
        let mut orders: Vec<_> = self.orders.iter().collect();
        orders.sort_by_key(|(order, _)| **order);
        orders.iter().map(|(order, loader)| format!("{order}:{}", loader.fingerprint())).collect::<Vec<_>>().join(" ")
    }
}

fn spec(config: &RunConfig, sources: &[Source], sequence_length: u64, phase: u64, split: Split) -> OrderSpec {
    OrderSpec { sources: sources.to_vec(), sequence_length: sequence_length as usize, seed: config.run.seed, phase, split }
}

/// A corpus whose tokens the model has embeddings for.
pub fn open_checked(config: &RunConfig, spec: OrderSpec) -> Result<Loader> {
    let name = spec.sources[0].path.clone();
    let loader = Loader::open(spec, LoaderOptions::default())?;
    let (corpus, model) = (loader.vocab_size() as i64, config.model.vocab_size);
    ensure!(corpus <= model, "the tokenizer of {} has {corpus} tokens, model.vocab_size is {model}", name.display());
    Ok(loader)
}
