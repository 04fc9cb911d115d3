//! How far a run's phases have read each source. A source whose sequence length stays goes on from order to order, so no
//! sample comes twice before the source's epoch is over; under another length its samples are others, and it begins anew.
use crate::phase::PlannedOrder;
use data::{Begun, Loader};
use std::collections::HashMap;
use std::path::PathBuf;

/// A source is its manifest, wherever it lies; one named twice in a mixture is two sources. With the sequence length.
type Stream = (String, usize, u64);

#[derive(Default)]
pub(super) struct Streams {
    begun: HashMap<Stream, Begun>,
    read: Vec<Read>,
    anew: Vec<String>,
}

/// What a run reads of a source.
struct Read {
    path: PathBuf,
    manifest: String,
    train_tokens: u64,
    tokens: u64,
    sequence_length: u64,
}

impl Streams {
    /// The loader of the next order, going on where those before it stopped. A pure function of plan and corpora.
    pub fn go_on(&mut self, loader: Loader, order: &PlannedOrder) -> Loader {
        let mut streams: Vec<Stream> = Vec::new();
        for source in loader.sources() {
            let nth = streams.iter().filter(|(manifest, ..)| *manifest == source.manifest).count();
            streams.push((source.manifest, nth, order.phase.sequence_length));
        }
        let first = |place: usize| Begun { order: order.number, source: place as u64, drawn: 0 };
        let begun = |(place, stream)| self.begun.get(stream).copied().unwrap_or(first(place));
        let begun: Vec<Begun> = streams.iter().enumerate().map(begun).collect();
        let loader = loader.go_on(&begun);
        let ended = loader.begun_at(order.samples);
        for (source, (begun, ended)) in loader.sources().zip(begun.iter().zip(&ended)) {
            let tokens = (ended.drawn - begun.drawn) * order.phase.sequence_length;
            self.count(
                order,
                Read {
                    path: source.path.into(),
                    manifest: source.manifest,
                    train_tokens: source.train_tokens,
                    tokens,
                    sequence_length: order.phase.sequence_length,
                },
            );
        }
        self.begun.extend(streams.into_iter().zip(ended));
        loader
    }

    fn count(&mut self, order: &PlannedOrder, new: Read) {
        let Some(known) = self.read.iter_mut().find(|known| known.manifest == new.manifest) else { return self.read.push(new) };
        if known.sequence_length != new.sequence_length {
            let (path, from, to) = (new.path.display(), known.sequence_length, new.sequence_length);
            let words = format!("phase.{}: {path} is read in sequences of {to} after {from}", order.phase_number);
            let known_stream = self.begun.keys().any(|(manifest, _, length)| *manifest == new.manifest && *length == to);
            self.anew.push(if known_stream {
                format!("{words}: it goes on where those of {to} stopped")
            } else {
                format!("{words}: it begins anew")
            });
        }
        (known.tokens, known.sequence_length) = (known.tokens + new.tokens, new.sequence_length);
    }

    /// A line for each source, with how often the whole run goes through it, and one for each that begins anew.
    pub fn notes(&self) -> Vec<String> {
        let all: u64 = self.read.iter().map(|read| read.tokens).sum();
        let line = |read: &Read| {
            let (share, epochs) = (read.tokens as f64 / all.max(1) as f64 * 100.0, read.tokens as f64 / read.train_tokens.max(1) as f64);
            format!("{}: {} tokens, {share:.2} % of what the run reads, {epochs:.3} epochs", read.path.display(), read.train_tokens)
        };
        self.read.iter().map(line).chain(self.anew.iter().cloned()).collect()
    }
}
