//! Which files a corpus is read from. Invariant: the list depends on names, sizes and the seed
//! only, never on the order in which a folder happens to be listed or on where it lies.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::args::PrepareArgs;
use super::remote::{RemoteFile, RemoteFolder};
use crate::DataError;
use crate::store::Location;

/// How a file is taken apart into documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub(super) enum Kind {
    Text,
    Jsonl(Packing),
    Parquet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub(super) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

#[derive(Clone, serde::Serialize)]
pub(super) struct InputFile {
    /// A local path or a URL, as messages have it.
    #[serde(skip)]
    pub path: PathBuf,
    /// Where it is read if it is not local.
    #[serde(skip)]
    pub remote: Option<RemoteFile>,
    /// Relative to the input it was found under: the same wherever the corpus lies.
    pub name: PathBuf,
    pub bytes: u64,
    pub kind: Kind,
    /// Read no more text than this.
    pub limit: Option<u64>,
}

impl InputFile {
    /// A guess at the text inside: packed files hold about four times their size.
    pub fn text_estimate(&self) -> u64 {
        let text =
            if matches!(self.kind, Kind::Text | Kind::Jsonl(Packing::Plain)) { self.bytes } else { self.bytes * 4 };
        text.min(self.limit.unwrap_or(u64::MAX))
    }
}

/// All wanted files, and how many others were passed over.
pub(super) fn list(args: &PrepareArgs) -> Result<(Vec<InputFile>, u64), DataError> {
    let mut found = Found { args, files: Vec::new(), passed: 0 };
    for input in &args.inputs {
        match Location::parse(input)? {
            Location::Remote { .. } => list_remote(input, &mut found)?,
            Location::Local(path) => {
                let meta = fs::metadata(&path).map_err(DataError::io(&path, "open"))?;
                match meta.is_dir() {
                    true => walk(&path, Path::new(""), &mut found)?,
                    false => found.named(&path, meta.len(), None),
                }
            }
        }
    }
    let Found { mut files, passed, .. } = found;
    files.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(max_bytes) = args.max_bytes {
        take_about(&mut files, max_bytes, args.seed);
    }
    Ok((files, passed))
}

struct Found<'a> {
    args: &'a PrepareArgs,
    files: Vec<InputFile>,
    passed: u64,
}

impl Found<'_> {
    /// A file named outright is wanted whatever its extension and size.
    fn named(&mut self, path: &Path, bytes: u64, remote: Option<RemoteFile>) {
        let name = PathBuf::from(path.file_name().unwrap_or(path.as_os_str()));
        let kind = kind_of(&name, None).unwrap_or(Kind::Text);
        self.files.push(InputFile { path: path.to_owned(), remote, name, bytes, kind, limit: None });
    }

    /// A file met in a folder.
    fn met(&mut self, path: PathBuf, name: PathBuf, bytes: u64, remote: Option<RemoteFile>) {
        match kind_of(&name, Some(&self.args.extensions)) {
            Some(Kind::Text) if bytes > self.args.max_file_bytes => self.passed += 1,
            Some(kind) if bytes > 0 => self.files.push(InputFile { path, remote, name, bytes, kind, limit: None }),
            _ => self.passed += 1,
        }
    }
}

fn list_remote(input: &Path, found: &mut Found) -> Result<(), DataError> {
    let folder = Arc::new(RemoteFolder::open(input)?);
    for (name, bytes) in folder.list()? {
        let remote = Some(RemoteFile::new(folder.clone(), &name, bytes));
        match name.is_empty() {
            true => found.named(input, bytes, remote),
            false => found.met(input.join(&name), name.into(), bytes, remote),
        }
    }
    Ok(())
}

fn walk(root: &Path, under: &Path, found: &mut Found) -> Result<(), DataError> {
    let folder = root.join(under);
    let unreadable = || DataError::io(&folder, "list");
    for entry in fs::read_dir(&folder).map_err(unreadable())? {
        let entry = entry.map_err(unreadable())?;
        let name = under.join(entry.file_name());
        // A link may lead in a circle; what it points to is found where it lies.
        let kind = entry.file_type().map_err(unreadable())?;
        if kind.is_dir() {
            walk(root, &name, found)?;
        } else if kind.is_file() {
            let path = entry.path();
            let bytes = entry.metadata().map_err(DataError::io(&path, "look at"))?.len();
            found.met(path, name, bytes, None);
        }
    }
    Ok(())
}

/// None if `wanted` is given and does not name the extension.
fn kind_of(name: &Path, wanted: Option<&[String]>) -> Option<Kind> {
    let name = name.file_name()?.to_str()?.to_ascii_lowercase();
    let ends = |extension: &str| name.strip_suffix(extension).is_some_and(|stem| stem.len() > 1 && stem.ends_with('.'));
    if wanted.is_some_and(|wanted| !wanted.iter().any(|extension| ends(extension.trim_start_matches('.')))) {
        return None;
    }
    let packed = |kinds: [&str; 2]| kinds.iter().any(|kind| ends(kind));
    Some(match () {
        () if ends("parquet") => Kind::Parquet,
        () if ends("jsonl") => Kind::Jsonl(Packing::Plain),
        () if packed(["jsonl.gz", "json.gz"]) => Kind::Jsonl(Packing::Gzip),
        () if packed(["jsonl.zst", "json.zst"]) => Kind::Jsonl(Packing::Zstd),
        () => Kind::Text,
    })
}

/// Keeps files in a seeded order until they hold about `max_bytes`; the last one is cut short.
fn take_about(files: &mut Vec<InputFile>, max_bytes: u64, seed: u64) {
    let place = |file: &InputFile| {
        let mut hasher = blake3::Hasher::new_derive_key("tiefsee prepare file order 1");
        hasher.update(&seed.to_le_bytes()).update(file.name.as_os_str().as_encoded_bytes());
        *hasher.finalize().as_bytes()
    };
    files.sort_by_cached_key(|file| (place(file), file.name.clone()));
    let mut rest = max_bytes;
    files.retain_mut(|file| {
        let taken = rest > 0;
        file.limit = (file.kind != Kind::Text).then_some(rest);
        rest = rest.saturating_sub(file.bytes);
        taken
    });
}
