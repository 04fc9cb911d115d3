//! Lines of JSONL and rows of parquet that give no text. A share of them all may: how large it is, is known at the end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use super::inputs::{InputFile, Kind};
use super::spill::GroupDone;
use crate::DataError;

/// So many of a group, and none of them good, may be a sign.
const HOPELESS: u64 = 1000;

/// Refuses more than a share of `max_bad` among all groups' lines and rows, and names the first.
pub(super) fn check(groups: &[GroupDone], max_bad: f64) -> Result<(), DataError> {
    let sum = |field: fn(&GroupDone) -> u64| groups.iter().map(field).sum::<u64>();
    let (lines, bad) = (sum(|group| group.lines), sum(|group| group.bad_lines));
    match groups.iter().find_map(|group| group.first_bad.clone()) {
        Some((path, reason)) if bad as f64 > max_bad * lines as f64 => {
            let reason = format!("{reason}; {bad} of {lines} lines and rows give no text, the limit is --max-bad {max_bad}");
            Err(DataError::BadInput { path, reason })
        }
        _ => Ok(()),
    }
}

/// What tells before the end that going on is not worth it: a wrong --text-column should not cost a look at everything.
/// Files without one good line are no sign once any file has given a document, nor while the whole may hold as many.
#[derive(Default)]
pub(super) struct Signs {
    max_bad: f64,
    /// About as much text as all files of lines and rows hold, and those of them without one good line, so far.
    text: u64,
    barren: AtomicU64,
    fruitful: AtomicBool,
}

impl Signs {
    pub fn of(files: &[InputFile], max_bad: f64) -> Signs {
        let of_lines = files.iter().filter(|file| file.kind != Kind::Text);
        Signs { max_bad, text: of_lines.map(InputFile::text_estimate).sum(), ..Signs::default() }
    }

    pub fn see(&self, group: &GroupDone) {
        self.fruitful.fetch_or(group.documents > 0, Relaxed);
    }

    /// A file of the group without one good line.
    pub fn weigh(&self, file: &InputFile, group: &GroupDone) -> Result<(), DataError> {
        let barren = self.barren.fetch_add(file.text_estimate(), Relaxed) + file.text_estimate();
        let too_much = barren as f64 > self.max_bad * self.text as f64;
        match &group.first_bad {
            Some((path, reason)) if group.bad_lines >= HOPELESS && too_much && !self.fruitful.load(Relaxed) => {
                let GroupDone { bad_lines, lines, .. } = group;
                let reason = format!(
                    "{reason}; {bad_lines} of {lines} lines and rows give no text, nor did any file before; the limit is --max-bad {} of all",
                    self.max_bad
                );
                Err(DataError::BadInput { path: path.clone(), reason })
            }
            _ => Ok(()),
        }
    }
}
