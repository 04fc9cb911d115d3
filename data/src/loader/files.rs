//! Whether a source's files are there, before a run needs the last of them: one listing of its folder against the index.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::Loader;
use super::source::OpenSource;
use crate::DataError;
use crate::format::Split;

/// Files of each folder that was looked at, with their lengths: loaders over the same sources share one listing.
#[derive(Default)]
pub struct Listings(HashMap<PathBuf, HashMap<String, u64>>);

/// Files that an error names.
const NAMED: usize = 8;

impl Loader {
    /// Every shard of every source is there and as long as the index says. Returns what could not be looked at, since a
    /// store may let its objects be read and not listed.
    pub fn check_files(&self, listings: &mut Listings) -> Result<Vec<String>, DataError> {
        let mut notes = Vec::new();
        for source in &self.sources {
            if !listings.0.contains_key(source.path()) {
                let listed = self.runtime.block_on(source.store().list());
                notes.extend(
                    listed.as_ref().err().map(|error| format!("the files of {} are not looked for: {error}", source.path().display())),
                );
                listings.0.insert(source.path().to_owned(), listed.unwrap_or_default().into_iter().collect());
            }
            let files = &listings.0[source.path()];
            if !files.is_empty() {
                compare(source.path(), self.spec.split, source, files)?;
            }
        }
        Ok(notes)
    }
}

fn compare(path: &Path, split: Split, source: &OpenSource, files: &HashMap<String, u64>) -> Result<(), DataError> {
    let lengths = source.index.shard_lengths();
    let differs = |(shard, expected): (usize, &u64)| {
        let name = split.shard_file(shard as u32);
        match files.get(&name) {
            None => Some(format!("{name} is missing")),
            Some(found) if found != expected => Some(format!("{name} is {found} bytes long instead of {expected}")),
            Some(_) => None,
        }
    };
    // Chance may leave a shard without a document: it has no file.
    let written = lengths.iter().enumerate().filter(|(_, length)| **length > 0);
    let wrong: Vec<String> = written.filter_map(differs).collect();
    if wrong.is_empty() {
        return Ok(());
    }
    let more = if wrong.len() > NAMED { format!(", and {} more", wrong.len() - NAMED) } else { String::new() };
    let named = wrong[..wrong.len().min(NAMED)].join(", ");
    let reason = format!("{} of {} {} shards are not as the index says: {named}{more}", wrong.len(), lengths.len(), split.name());
    Err(DataError::BadInput { path: path.to_owned(), reason })
}
