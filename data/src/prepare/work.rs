//! `OUT.partial`: the folder in which everything is made, and the right to work there.
//!
//! Invariants: nothing is removed that `prepare` has not made, and whether OUT may be written is settled before anything
//! is read. What an interrupted or failed prepare has done is kept: the same command goes on from there, also when an
//! input or the tokenizer has been mended meanwhile; then only what was read of unchanged files is taken over.

use std::fs::{self, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::durable;
use crate::DataError;
use crate::format::manifest::MANIFEST_FILE;

const FOLDERS: [&str; 3] = ["spill", "done", "out"];
/// The job file goes last: while it is there, the same command knows that the folder is its own.
const FILES: [&str; 3] = ["lock", "job.tmp", "job"];

/// What a work folder was begun for: the format, and hashes of the options and of what is read.
#[derive(PartialEq, Serialize, Deserialize)]
pub(super) struct Job {
    pub format: String,
    pub options: String,
    pub inputs: String,
}

/// The work folder, locked.
pub(super) struct Work {
    pub folder: PathBuf,
    _lock: fs::File,
}

/// Whether OUT and OUT.partial can be this prepare's.
pub(super) fn check(out: &Path) -> Result<(), DataError> {
    let refused = |reason: &str| Err(DataError::bad_option("--out", out.display(), reason));
    if out.file_name().is_none() {
        return refused("must end in a name: the corpus is made beside it and renamed");
    }
    let work = folder_beside(out);
    let entries = names(&work)?;
    let begun = entries.iter().any(|name| name == "job");
    if !begun && let Some(name) = entries.iter().find(|name| !FILES.contains(&name.as_str())) {
        let reason = format!("is needed for the work, but holds {name:?}, which is not prepare's; move it, or choose another --out");
        return Err(DataError::BadInput { path: work, reason });
    }
    match names(out)?.is_empty() {
        true => {}
        // The run before came as far as the last renames.
        false if begun && out.join(MANIFEST_FILE).exists() => {}
        false if out.join(MANIFEST_FILE).exists() => return Err(DataError::OutputExists { path: out.to_owned() }),
        false => return refused("is a folder with other files in it; choose another --out"),
    }
    match (immovable(&work)?, immovable(out)?) {
        (None, None) => Ok(()),
        (None, Some(reason)) => refused(reason),
        (Some(reason), _) => Err(DataError::BadInput { path: work, reason: format!("is needed for the work, but {reason}") }),
    }
}

/// Why the rename at the very end would fail on this folder, if it is there.
fn immovable(folder: &Path) -> Result<Option<&'static str>, DataError> {
    let meta = match fs::symlink_metadata(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        meta => meta.map_err(DataError::io(folder, "look at"))?,
    };
    if meta.is_symlink() {
        return Ok(Some("is a link, which no rename follows; choose another --out, such as where it leads"));
    }
    let parent = durable::parent(folder);
    let around = fs::metadata(parent).map_err(DataError::io(parent, "look at"))?;
    Ok((meta.dev() != around.dev()).then_some("is a mount point, which no rename replaces; choose another --out, such as a folder in it"))
}

impl Work {
    /// Takes over the folder that an earlier run of the same job left, or makes one.
    pub fn claim(out: &Path, job: &Job) -> Result<Work, DataError> {
        let folder = folder_beside(out);
        durable::make_folder(&folder)?;
        let lock = fs::File::create(folder.join("lock")).map_err(DataError::io(&folder, "lock"))?;
        judge(lock.try_lock(), &folder)?;
        let work = Work { folder, _lock: lock };
        let job_file = work.folder.join("job");
        let found: Option<Job> = match fs::read(&job_file) {
            Ok(bytes) => Some(serde_json::from_slice(&bytes).map_err(|_| DataError::OtherPrepare { path: work.folder.clone() })?),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(DataError::io(job_file, "read")(error)),
        };
        match found {
            Some(found) if found == *job => return Ok(work),
            Some(_) if out.join(MANIFEST_FILE).exists() => return Err(DataError::OutputExists { path: out.to_owned() }),
            Some(found) if (&found.format, &found.options) != (&job.format, &job.options) => {
                return Err(DataError::OtherPrepare { path: work.folder });
            }
            Some(_) => {
                tracing::warn!(folder = %work.folder.display(), "the inputs changed since this prepare began; what was read of the others is kept");
                work.remove_folders(&["done", "out"])?;
            }
            // Another prepare has finished since this one looked.
            None if out.join(MANIFEST_FILE).exists() => {
                work.remove()?;
                return Err(DataError::OutputExists { path: out.to_owned() });
            }
            None => {}
        }
        durable::write_json(&job_file, job)?;
        Ok(work)
    }

    /// Once OUT is in place, or when nothing here can serve another run.
    pub fn remove(&self) -> Result<(), DataError> {
        self.remove_folders(&FOLDERS)?;
        for file in FILES.map(|name| self.folder.join(name)) {
            gone(fs::remove_file(&file)).map_err(DataError::io(file, "remove"))?;
        }
        match fs::remove_dir(&self.folder) {
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {
                tracing::warn!(folder = %self.folder.display(), "stays: it holds files that prepare has not made");
                Ok(())
            }
            removed => gone(removed).map_err(DataError::io(&self.folder, "remove")),
        }
    }

    fn remove_folders(&self, names: &[&str]) -> Result<(), DataError> {
        names.iter().map(|name| self.folder.join(name)).try_for_each(|folder| gone(fs::remove_dir_all(&folder)).map_err(DataError::io(folder, "remove")))
    }
}

fn folder_beside(out: &Path) -> PathBuf {
    out.with_added_extension("partial")
}

/// The names in a folder; none if it is not there.
fn names(folder: &Path) -> Result<Vec<String>, DataError> {
    let failed = || DataError::io(folder, "list");
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry.map_err(failed())?.file_name().to_string_lossy().into_owned())).collect(),
        Err(error) if error.kind() == ErrorKind::NotFound && fs::symlink_metadata(folder).is_err() => Ok(Vec::new()),
        Err(error) => Err(failed()(error)),
    }
}

fn gone(removed: std::io::Result<()>) -> std::io::Result<()> {
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Only a lock that another holds is a reason to stop; some network file systems know none.
fn judge(locked: Result<(), TryLockError>, folder: &Path) -> Result<(), DataError> {
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(DataError::BadInput { path: folder.to_owned(), reason: "another prepare is at work here".into() }),
        Err(TryLockError::Error(error)) => {
            tracing::warn!(folder = %folder.display(), %error, "cannot be locked; see to it that no other prepare works here");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_lock_stops_and_a_file_system_without_locks_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let open = || fs::File::create(folder.path().join("lock")).unwrap();
        let (first, second) = (open(), open());
        judge(first.try_lock(), folder.path()).unwrap();
        assert!(judge(second.try_lock(), folder.path()).unwrap_err().to_string().contains("another prepare"));
        // ENOLCK.
        judge(Err(TryLockError::Error(std::io::Error::from_raw_os_error(37))), folder.path()).unwrap();
    }

    #[test]
    fn who_comes_just_after_the_work_is_done_does_not_take_the_corpus_for_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let job = Job { format: String::new(), options: "others".into(), inputs: String::new() };
        fs::create_dir(&out).unwrap();
        fs::write(out.join(MANIFEST_FILE), "{}").unwrap();
        let refused = Work::claim(&out, &job).map(|_| ()).unwrap_err();
        assert!(matches!(refused, DataError::OutputExists { .. }), "{refused}");
        assert!(!folder_beside(&out).exists());
    }
}
