//! Which files a corpus is read from. Links are followed. Invariants: the list depends on names, sizes and the seed
//! only, never on the order in which a folder happens to be listed or on where it lies; what is met and not listed is
//! counted in `left_out`, and an input in which nothing is met is an error.

use std::collections::{HashMap, HashSet};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::args::PrepareArgs;
use super::documents::LONGEST_DOCUMENT;
use super::durable;
use super::left_out::{self, LeftOuts};
use super::remote::{RemoteFile, RemoteFolder};
use crate::DataError;
use crate::format::manifest::{FORMAT, MANIFEST_FILE};
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
    /// When it was written last, or an object's tag: work on an older version is not taken over.
    pub version: String,
    pub kind: Kind,
    /// Read no more text than this.
    pub limit: Option<u64>,
}

impl InputFile {
    /// A document's place in the file, for messages.
    pub fn place(&self, number: u64) -> String {
        match self.kind {
            Kind::Text => String::new(),
            Kind::Jsonl(_) => format!("line {number}: "),
            Kind::Parquet => format!("row {number}: "),
        }
    }

    /// A guess at the text inside: packed files hold about four times their size.
    pub fn text_estimate(&self) -> u64 {
        let text =
            if matches!(self.kind, Kind::Text | Kind::Jsonl(Packing::Plain)) { self.bytes } else { self.bytes * 4 };
        text.min(self.limit.unwrap_or(u64::MAX))
    }
}

/// All wanted files, and what else there was.
pub(super) fn list(args: &PrepareArgs) -> Result<(Vec<InputFile>, LeftOuts), DataError> {
    let own = [args.out.clone(), args.out.with_added_extension("partial")];
    let own = own.iter().filter_map(|folder| folder.canonicalize().ok()).collect();
    let mut found = Found { args, own, files: Vec::new(), left_out: LeftOuts::default(), visited: HashSet::new(), links: Vec::new(), met: 0 };
    for input in &args.inputs {
        match Location::parse(input)? {
            Location::Remote { .. } => list_remote(input, &mut found)?,
            Location::Local(path) => {
                let meta = fs::metadata(&path).map_err(DataError::io(&path, "open"))?;
                match () {
                    () if meta.is_dir() => walk(&path, &mut found)?,
                    () if meta.is_file() => found.named(&path, None, meta.len(), changed(&meta))?,
                    // Of what waits for a writer, has no end, or can be read once only, no run could go on.
                    () => return Err(DataError::BadInput { path, reason: "no regular file; write it to one".into() }),
                }
            }
        }
    }
    let Found { mut files, mut left_out, .. } = found;
    files = distinct(files)?;
    files.sort_by(|a, b| (&a.name, &a.path).cmp(&(&b.name, &b.path)));
    if let Some(max_bytes) = args.max_bytes {
        take_about(&mut files, max_bytes, args.seed, &mut left_out);
    }
    Ok((files, left_out))
}

/// Inputs may overlap and be spelled in several ways: of a file that was met again the one of the smallest name stays.
fn distinct(files: Vec<InputFile>) -> Result<Vec<InputFile>, DataError> {
    let mut folders: HashMap<PathBuf, PathBuf> = HashMap::new();
    let mut place = |file: &InputFile| {
        if file.remote.is_some() {
            return Ok(file.path.clone());
        }
        let folder = durable::parent(&file.path);
        if !folders.contains_key(folder) {
            folders.insert(folder.to_owned(), folder.canonicalize().map_err(DataError::io(folder, "look at"))?);
        }
        Ok(folders[folder].join(file.path.file_name().expect("a file has a name")))
    };
    let placed = files.into_iter().map(|file| Ok((place(&file)?, file)));
    let mut placed = placed.collect::<Result<Vec<(PathBuf, InputFile)>, DataError>>()?;
    placed.sort_by(|(place, a), (other, b)| (place, &a.name, &a.path).cmp(&(other, &b.name, &b.path)));
    placed.dedup_by(|(place, _), (kept, _)| place == kept);
    Ok(placed.into_iter().map(|(_, file)| file).collect())
}

struct Found<'a> {
    args: &'a PrepareArgs,
    /// The output and the folder it is made in.
    own: Vec<PathBuf>,
    files: Vec<InputFile>,
    left_out: LeftOuts,
    /// Device and inode of every folder walked.
    visited: HashSet<(u64, u64)>,
    /// Links to folders under the input that is being walked.
    links: Vec<PathBuf>,
    /// All that folders hold but folders, taken or not.
    met: u64,
}

impl Found<'_> {
    /// A file named outright is wanted whatever its extension and size.
    fn named(&mut self, path: &Path, remote: Option<RemoteFile>, bytes: u64, version: String) -> Result<(), DataError> {
        let name = PathBuf::from(path.file_name().unwrap_or(path.as_os_str()));
        let kind = kind_of(&name, None).unwrap_or(Kind::Text);
        self.take(InputFile { path: path.to_owned(), remote, name, bytes, version, kind, limit: None }, "")
    }

    /// A file met in a folder.
    fn met(&mut self, path: PathBuf, name: PathBuf, remote: Option<RemoteFile>, bytes: u64, version: String) -> Result<(), DataError> {
        let reason = match kind_of(&name, Some(&self.args.extensions)) {
            None => left_out::OTHER_EXTENSION,
            Some(_) if bytes == 0 => left_out::EMPTY,
            Some(Kind::Text) if self.args.max_file_bytes.is_some_and(|most| bytes > most) => left_out::TOO_LARGE,
            Some(kind) => {
                let file = InputFile { path, remote, name, bytes, version, kind, limit: None };
                return self.take(file, "; --max-file-bytes leaves such files out");
            }
        };
        self.left_out.add(reason, &name, bytes);
        Ok(())
    }

    /// Names are written down, so they must be text. A file that is one document too long is refused before any is read.
    fn take(&mut self, file: InputFile, hint: &str) -> Result<(), DataError> {
        if file.path.to_str().is_none() {
            return Err(DataError::BadInput { path: file.path, reason: "its path is not UTF-8; rename it".into() });
        }
        if file.kind == Kind::Text && file.bytes > LONGEST_DOCUMENT {
            let reason = format!("a document of {} bytes, the limit is {LONGEST_DOCUMENT}{hint}", file.bytes);
            return Err(DataError::BadInput { path: file.path, reason });
        }
        self.files.push(file);
        Ok(())
    }
}

fn list_remote(input: &Path, found: &mut Found) -> Result<(), DataError> {
    let folder = Arc::new(RemoteFolder::open(input)?);
    for (name, bytes, version) in folder.list()? {
        let remote = Some(RemoteFile::new(folder.clone(), &name, bytes));
        match name.is_empty() {
            true => found.named(input, remote, bytes, version)?,
            false => found.met(input.join(&name), name.into(), remote, bytes, version)?,
        }
    }
    Ok(())
}

/// All below `root`, then what links lead to, unless that has been walked: a link may lead in a circle.
fn walk(root: &Path, found: &mut Found) -> Result<(), DataError> {
    let before = found.met;
    walk_folder(root, Path::new(""), found)?;
    if found.met == before {
        return Err(DataError::BadInput { path: root.to_owned(), reason: "holds no file; if it is a mount point, mount it".into() });
    }
    // Those that a link's own folder holds come last.
    while !found.links.is_empty() {
        let mut links = std::mem::take(&mut found.links);
        links.sort();
        for link in links {
            let path = root.join(&link);
            let meta = fs::metadata(&path).map_err(DataError::io(&path, "look at"))?;
            if !found.visited.contains(&(meta.dev(), meta.ino())) {
                walk_folder(root, &link, found)?;
            }
        }
    }
    Ok(())
}

fn walk_folder(root: &Path, under: &Path, found: &mut Found) -> Result<(), DataError> {
    let folder = root.join(under);
    let unreadable = || DataError::io(&folder, "list");
    if found.own.contains(&folder.canonicalize().map_err(unreadable())?) {
        return Ok(());
    }
    if prepared(&folder) {
        // By its place in the input: the same wherever that lies.
        let name = if under == Path::new("") { Path::new(".") } else { under };
        found.left_out.add(left_out::PREPARED, name, 0);
        found.met += 1;
        return Ok(());
    }
    let meta = fs::metadata(&folder).map_err(unreadable())?;
    found.visited.insert((meta.dev(), meta.ino()));
    for entry in fs::read_dir(&folder).map_err(unreadable())? {
        let entry = entry.map_err(unreadable())?;
        let (path, name) = (entry.path(), under.join(entry.file_name()));
        let kind = entry.file_type().map_err(unreadable())?;
        let is_link = kind.is_symlink();
        found.met += u64::from(!kind.is_dir());
        let meta = match fs::metadata(&path) {
            Err(_) if is_link => {
                found.left_out.add(left_out::LINK, &name, 0);
                continue;
            }
            meta => meta.map_err(DataError::io(&path, "look at"))?,
        };
        match () {
            () if meta.is_dir() && is_link => found.links.push(name),
            () if meta.is_dir() => walk_folder(root, &name, found)?,
            () if meta.is_file() => found.met(path, name, None, meta.len(), changed(&meta))?,
            () => found.left_out.add(left_out::NOT_A_FILE, &name, 0),
        }
    }
    Ok(())
}

fn changed(meta: &Metadata) -> String {
    format!("{}.{:09}", meta.mtime(), meta.mtime_nsec())
}

/// Whether a folder is a corpus, or one in the making: its shards are no input.
fn prepared(folder: &Path) -> bool {
    let (family, _) = FORMAT.rsplit_once('-').expect("a format has a number");
    [MANIFEST_FILE, "job"].iter().any(|name| {
        let small = fs::metadata(folder.join(name)).is_ok_and(|meta| meta.is_file() && meta.len() < 1 << 20);
        let text = if small { fs::read_to_string(folder.join(name)).unwrap_or_default() } else { String::new() };
        text.contains(&format!("\"format\": \"{family}-"))
    })
}

/// None if `wanted` is given and does not name the extension.
fn kind_of(name: &Path, wanted: Option<&[String]>) -> Option<Kind> {
    let name = name.file_name()?.to_string_lossy().to_ascii_lowercase();
    let ends = |extension: &str| name.strip_suffix(extension).is_some_and(|stem| stem.len() > 1 && stem.ends_with('.'));
    if wanted.is_some_and(|wanted| !wanted.iter().any(|extension| ends(&extension.trim_start_matches('.').to_ascii_lowercase()))) {
        return None;
    }
    let lines = |packed: &str| ["jsonl", "json", "ndjson", "jsonlines"].iter().any(|kind| ends(&format!("{kind}{packed}")));
    Some(match () {
        () if ends("parquet") => Kind::Parquet,
        () if lines("") => Kind::Jsonl(Packing::Plain),
        () if lines(".gz") => Kind::Jsonl(Packing::Gzip),
        () if lines(".zst") => Kind::Jsonl(Packing::Zstd),
        () => Kind::Text,
    })
}

/// Keeps files in a seeded order until they hold about `max_bytes` of text; the last one is cut short where it is no text file.
fn take_about(files: &mut Vec<InputFile>, max_bytes: u64, seed: u64, left_out: &mut LeftOuts) {
    let place = |file: &InputFile| {
        let mut hasher = blake3::Hasher::new_derive_key("tiefsee prepare file order 1");
        hasher.update(&seed.to_le_bytes()).update(file.name.as_os_str().as_encoded_bytes());
        *hasher.finalize().as_bytes()
    };
    files.sort_by_cached_key(|file| (place(file), file.name.clone()));
    let mut rest = max_bytes;
    files.retain_mut(|file| {
        let taken = rest > 0;
        if !taken {
            left_out.add(left_out::BEYOND_MAX_BYTES, &file.name, file.bytes);
        }
        file.limit = (file.kind != Kind::Text).then_some(rest);
        rest = rest.saturating_sub(file.text_estimate());
        taken
    });
}
