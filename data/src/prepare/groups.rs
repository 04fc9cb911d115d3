//! Which files are read together. A group is taken over by a restart if nothing that it is made of has changed.
//! Invariant: a file that changes, comes or goes leaves nearly all other groups as they were, at any size of the whole:
//! groups end where their files say so, and what follows from the sum of all goes in steps.

use super::inputs::InputFile;

/// Files of half of this to all of it, and the file that exceeds it; more where there would be too many groups.
const GROUP_BYTES: u64 = 8 << 20;
const MOST_GROUPS: u64 = 4096;

/// Rounded up to four binary digits: steps of a sixteenth to an eighth.
pub(super) fn coarse(number: u64) -> u64 {
    let digits = u64::BITS - number.leading_zeros();
    number.next_multiple_of(1 << digits.saturating_sub(4))
}

pub(super) fn cut(files: &[InputFile]) -> Vec<&[InputFile]> {
    let total: u64 = files.iter().map(|file| file.bytes).sum();
    // All may be halves.
    let size = GROUP_BYTES.max(coarse(2 * total / MOST_GROUPS));
    let mut bytes = 0;
    let cut = files.split_inclusive(|file| {
        bytes += file.bytes;
        let full = bytes >= size || bytes >= size / 2 && may_end(file, size);
        if full {
            bytes = 0;
        }
        full
    });
    cut.collect()
}

/// Drawn by its name: about two of the files in half a group, wherever that begins.
fn may_end(file: &InputFile, size: u64) -> bool {
    let name = blake3::derive_key("tiefsee prepare group end 1", file.name.as_os_str().as_encoded_bytes());
    let lot = u64::from_le_bytes(name[..8].try_into().expect("eight bytes"));
    u128::from(lot) * u128::from(size) < (u128::from(file.bytes) * 4) << 64
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::prepare::inputs::Kind;
    use crate::prepare::spill::Units;

    fn files(scale: u64) -> Vec<InputFile> {
        let file = |i: u64| {
            let (name, bytes) = (format!("{i:05}.txt"), scale * (1 + i * 7919 % 1000));
            InputFile { path: name.clone().into(), remote: None, name: name.into(), bytes, version: String::new(), kind: Kind::Text, limit: None }
        };
        (0..20_000).map(file).collect()
    }

    fn groups(files: &[InputFile]) -> HashSet<Vec<(String, u64)>> {
        let known = |file: &InputFile| (file.name.display().to_string(), file.bytes);
        cut(files).into_iter().map(|group| group.iter().map(known).collect()).collect()
    }

    #[test]
    fn a_file_that_changes_comes_or_goes_leaves_the_other_groups() {
        // Of 10 GB and of 10 TB.
        for scale in [1 << 10, 1 << 20] {
            let all = files(scale);
            let before = groups(&all);
            assert!(before.len() > 1000 && before.len() <= MOST_GROUPS as usize + 1, "{} groups", before.len());
            for at in [0, 777, 10_000, 19_999] {
                let (mut changed, mut gone, mut come) = (all.clone(), all.clone(), all.clone());
                changed[at].bytes += 999 * scale;
                gone.remove(at);
                come.insert(at, InputFile { name: "come.txt".into(), ..all[at].clone() });
                for other in [changed, gone, come] {
                    let lost = before.difference(&groups(&other)).count();
                    assert!((1..=40).contains(&lost), "{lost} of {} groups for file {at}", before.len());
                }
            }
        }
    }

    #[test]
    fn a_little_more_text_makes_no_other_units() {
        let units = |text: u64| Units::new(0.01, text, 128 << 20).count();
        let stay = (1..=1000).map(|i| i * 20_000_000_019).filter(|text| units(*text) == units(text + (1 << 24))).count();
        assert!(stay > 980, "{stay} of 1000");
        for number in [0, 1, 15, 16, 17, 1000, (1 << 60) + 1] {
            let found = coarse(number);
            assert!((number..=number + number / 8).contains(&found) && coarse(found) == found, "{number}: {found}");
        }
    }
}
