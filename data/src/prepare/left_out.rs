//! What is not read, by reason: no text stays out of a corpus without a word.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::format::manifest::LeftOut;

pub(super) const BEYOND_MAX_BYTES: &str = "beyond --max-bytes";
pub(super) const EMPTY: &str = "empty";
pub(super) const LINK: &str = "links that cannot be followed";
pub(super) const NOT_A_FILE: &str = "no regular files";
pub(super) const NOT_TEXT: &str = "not UTF-8 text";
pub(super) const OTHER_EXTENSION: &str = "of an extension that --extensions does not name";
pub(super) const PREPARED: &str = "folders that prepare wrote";
pub(super) const TOO_LARGE: &str = "larger than --max-file-bytes";

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct LeftOuts(pub BTreeMap<String, LeftOut>);

impl LeftOuts {
    pub fn add(&mut self, reason: &str, name: &Path, bytes: u64) {
        self.add_all(reason, LeftOut { files: 1, bytes, largest: name.display().to_string(), largest_bytes: bytes });
    }

    pub fn merge(&mut self, other: &LeftOuts) {
        other.0.iter().for_each(|(reason, some)| self.add_all(reason, some.clone()));
    }

    pub fn files(&self) -> u64 {
        self.0.values().map(|some| some.files).sum()
    }

    fn add_all(&mut self, reason: &str, some: LeftOut) {
        let Some(all) = self.0.get_mut(reason) else {
            self.0.insert(reason.to_owned(), some);
            return;
        };
        all.files += some.files;
        all.bytes += some.bytes;
        // The same one in whatever order they come.
        let place = |one: &LeftOut| (one.largest_bytes, std::cmp::Reverse(one.largest.clone()));
        if place(&some) > place(all) {
            (all.largest, all.largest_bytes) = (some.largest, some.largest_bytes);
        }
    }
}

/// A line each, none for nothing.
impl fmt::Display for LeftOuts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (reason, LeftOut { files, bytes, largest, .. }) in &self.0 {
            writeln!(f, "left out: {files} {reason}, {:.1} MB, the largest is {largest}", *bytes as f64 / 1e6)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_do_not_depend_on_the_order() {
        let all = [("b", 5), ("a", 5), ("c", 2)].map(|(name, bytes)| {
            let mut one = LeftOuts::default();
            one.add(TOO_LARGE, Path::new(name), bytes);
            one
        });
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
            let mut sum = LeftOuts::default();
            order.iter().for_each(|i| sum.merge(&all[*i]));
            assert_eq!(sum.to_string(), "left out: 3 larger than --max-file-bytes, 0.0 MB, the largest is a\n");
            assert_eq!((sum.files(), sum.0[TOO_LARGE].bytes), (3, 12));
        }
    }
}
