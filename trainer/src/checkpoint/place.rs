//! Where a run's copies of the second tier are: what its directory says of them.
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// There are whole copies: written when they are.
pub const MARKER: &str = "second-tier";
/// Tells a run from another that has the same place.
const ID: &str = "second-tier-id";

/// The name of a place's folder on the nodes: the same by whatever name a start calls the run's directory, which is there.
fn place(run_dir: &Path) -> Result<String> {
    let path = std::fs::canonicalize(run_dir).with_context(|| format!("cannot find {}", run_dir.display()))?;
    Ok(format!("tiefsee-{}", &blake3::hash(path.as_os_str().as_encoded_bytes()).to_hex()[..16]))
}

/// What the run's marker says of its copies; None: there are none.
pub fn copies(run_dir: &Path) -> Option<String> {
    std::fs::read_to_string(run_dir.join(MARKER)).ok()
}

/// PLACE/ID of a run: a `fresh` one's ID is `new`. The copies of a run that has another name since are not taken for another's: the
/// original of a run directory that was copied may be at work with them.
pub(super) fn place_and_id(run_dir: &Path, dir: &Path, new: &str, fresh: bool) -> Result<String> {
    let (place, file) = (place(run_dir)?, run_dir.join(ID));
    let id = match std::fs::read_to_string(&file) {
        // It becomes the name of a folder that is removed: half of one, or another's word, is none.
        Ok(id) if !fresh && id.len() == new.len() && id.bytes().all(|byte| byte.is_ascii_hexdigit()) => id,
        _ => {
            std::fs::write(&file, new).with_context(|| format!("cannot write {}", file.display()))?;
            new.to_string()
        }
    };
    let root = dir.join(&place).join(&id);
    let named = copies(run_dir).and_then(|text| Some(PathBuf::from(text.trim_end().split_once(" in ")?.1)));
    if let Some(other) = named.filter(|other| other.starts_with(dir) && *other != root && other.exists()) {
        bail!(
            "{} has its newest copies in {}, where it was when it had another place or name: rename that folder to {} on every node to go on from them, or remove {} to go on from a checkpoint",
            run_dir.display(), other.display(), root.display(), run_dir.join(MARKER).display()
        );
    }
    Ok(format!("{place}/{id}"))
}

/// Removes the copies of a step from ROOT/node-N/step-STEP-ATTEMPT: whether there are others. Best effort, and a node's other ranks
/// do the same.
pub(super) fn forget(root: &Path, step: u64) -> bool {
    let below = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect::<Vec<_>>();
    let name = format!("step-{step:08}-");
    let is_one = |path: &PathBuf| path.file_name().is_some_and(|own| own.to_string_lossy().starts_with(&name));
    let (gone, others): (Vec<_>, Vec<_>) = below(root).iter().flat_map(|node| below(node)).partition(is_one);
    gone.iter().for_each(|path| drop(std::fs::remove_dir_all(path)));
    !others.is_empty()
}

#[cfg(test)]
mod tests {
    use super::{ID, forget, place_and_id};
    use std::path::Path;

    #[test]
    fn one_step_s_copies_go_and_those_of_the_step_before_stay() {
        let root = tempfile::tempdir().unwrap();
        let copies = ["node-0/step-00000004-ab", "node-0/step-00000005-ab", "node-1/step-00000005-ab"].map(|path| root.path().join(path));
        copies.iter().for_each(|path| std::fs::create_dir_all(path.join("rank-0")).unwrap());
        assert!(forget(root.path(), 5));
        assert_eq!(copies.each_ref().map(|path| path.exists()), [true, false, false]);
        assert!(!forget(root.path(), 4) && !copies[0].exists());
    }

    #[test]
    fn an_id_stays_and_half_of_one_or_a_path_is_none() {
        let run = tempfile::tempdir().unwrap();
        let id = |new: &str, fresh: bool| place_and_id(run.path(), Path::new("/nowhere"), new, fresh).unwrap().split_once('/').unwrap().1.to_string();
        let (first, second) = ("0123456789abcdef", "fedcba9876543210");
        assert_eq!(id(first, true), first);
        assert_eq!(id(second, false), first);
        assert_eq!(id(second, true), second);
        for odd in ["", "0123", "../../../../home"] {
            std::fs::write(run.path().join(ID), odd).unwrap();
            assert_eq!(id(first, false), first, "{odd:?}");
        }
    }
}
