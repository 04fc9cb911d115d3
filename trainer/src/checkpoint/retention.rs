//! Which checkpoints of a run are kept.
use super::{inspect, list};
use anyhow::{Context, Result, ensure};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many.
    pub last: usize,
    /// And those of every step that is a multiple of this; 0: none besides.
    pub every: u64,
}

impl Retention {
    /// Of `steps`, in rising order, those that may go.
    fn expired(&self, steps: &[u64]) -> Vec<u64> {
        let old = &steps[..steps.len().saturating_sub(self.last)];
        old.iter().copied().filter(|step| self.every == 0 || !step.is_multiple_of(self.every)).collect()
    }

    /// Those up to `step` alone: the state goes on from there.
    pub(super) fn apply(&self, run_dir: &Path, step: u64) -> Result<()> {
        let all: Vec<(u64, PathBuf)> = list(run_dir)?.into_iter().filter(|(at, _)| *at <= step).collect();
        remove(&self.select(&all))
    }

    fn select(&self, all: &[(u64, PathBuf)]) -> Vec<PathBuf> {
        let expired = self.expired(&all.iter().map(|(step, _)| *step).collect::<Vec<_>>());
        all.iter().filter(|(step, _)| expired.contains(step)).map(|(_, path)| path.clone()).collect()
    }
}

/// What `tiefsee checkpoint prune` would remove, or removed.
pub struct Pruned {
    pub removed: Vec<PathBuf>,
    pub kept: Vec<PathBuf>,
    /// A line for each damaged one: it is left where it is, and does not count among the newest.
    pub damaged: Vec<String>,
}

/// Looks at every checkpoint that would be kept, so that no whole one goes for the sake of one that lacks a file or a part of
/// one. Reads no tensor.
pub fn prune(run_dir: &Path, retention: Retention, dry_run: bool) -> Result<Pruned> {
    ensure!(run_dir.join("checkpoints").is_dir(), "{} is not a run directory: it has no checkpoints/", run_dir.display());
    let mut all = list(run_dir)?;
    let (mut damaged, mut whole) = (Vec::new(), HashSet::new());
    loop {
        let going = retention.select(&all);
        let kept: Vec<PathBuf> = all.iter().map(|(_, path)| path.clone()).filter(|path| !going.contains(path)).collect();
        let mut error = |path: &PathBuf| {
            let found = if whole.contains(path) { None } else { inspect(path).err() };
            whole.insert(path.clone());
            found.map(|error| (path.clone(), format!("{error:#}")))
        };
        let Some((broken, error)) = kept.iter().find_map(&mut error) else {
            if !dry_run {
                remove(&going)?;
            }
            return Ok(Pruned { removed: going, kept, damaged });
        };
        damaged.push(format!("{} is damaged: {error}", broken.display()));
        all.retain(|(_, path)| *path != broken);
    }
}

/// Renamed first: a folder that is half removed must not look like a checkpoint. One that cannot be removed keeps none of the others.
fn remove(paths: &[PathBuf]) -> Result<()> {
    let gone = |path: &PathBuf| -> Result<()> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let names = (0..).map(|number| path.with_file_name(if number == 0 { format!(".{name}.removed") } else { format!(".{name}.removed-{number}") }));
        // Where one of that name is left, somebody still reads in it.
        let aside = names.into_iter().find(|aside| !aside.exists()).expect("a free name");
        std::fs::rename(path, &aside).and_then(|()| std::fs::remove_dir_all(&aside)).with_context(|| format!("cannot remove {}", path.display()))
    };
    let outcomes: Vec<Result<()>> = paths.iter().map(gone).collect();
    outcomes.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_one_keeps_no_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let paths: Vec<PathBuf> = ["step-00000004", "step-00000008"].map(|name| folder.path().join(name)).into();
        for path in [&paths[0], &paths[1], &folder.path().join(".step-00000004.removed")] {
            std::fs::create_dir(path).expect("a folder");
            std::fs::write(path.join("manifest.json"), "").expect("a file");
        }
        remove(&paths).expect("both go");
        let left: Vec<_> = std::fs::read_dir(folder.path()).expect("a folder").map(|entry| entry.expect("an entry").file_name()).collect();
        assert_eq!(left, [".step-00000004.removed"]);
        let missing = folder.path().join("step-00000012");
        std::fs::create_dir(&paths[1]).expect("a folder");
        let error = remove(&[missing, paths[1].clone()]).expect_err("there is no such folder");
        assert!(format!("{error:#}").contains("step-00000012") && !paths[1].exists(), "{error:#}");
    }

    #[test]
    fn the_newest_and_every_so_many_steps_are_kept() {
        let steps = [100, 200, 300, 400, 500];
        assert_eq!(Retention { last: 2, every: 0 }.expired(&steps), [100, 200, 300]);
        assert_eq!(Retention { last: 1, every: 200 }.expired(&steps), [100, 300]);
        assert_eq!(Retention { last: 9, every: 0 }.expired(&steps), [0u64; 0]);
        // The newest stays whatever its number.
        assert_eq!(Retention { last: 1, every: 1000 }.expired(&steps[..3]), [100, 200]);
    }
}
