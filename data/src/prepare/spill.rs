//! First stage: every document goes, with the hash of its text, to the *unit* its hash falls in.
//!
//! A document's key is a seeded BLAKE3 of its text. The shuffled order is the order of keys, the
//! held-out documents are those of the lowest keys, and equal documents have equal keys: one
//! partition by key ranges therefore shuffles, splits and de-duplicates, in memory of one unit.
//! Invariant: what a unit holds depends on the documents and the seed alone.
//!
//! A group of input files spills into part files, `GROUP-PART`: a table of units + 1 offsets, then
//! the units' records (key 16, length 4, text). A unit is gathered out of all parts there are, so a group's are joined
//! into one: of any amount of text there are no more than groups. `GROUP.json` is written when that is durable; a
//! restart repeats only groups without one. GROUP is a hash of all that the parts depend on, so a group whose files have
//! changed is another.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::bad_lines::Signs;
use super::documents::{self, Met};
use super::durable;
use super::groups::coarse;
use super::inputs::InputFile;
use super::left_out::{self, LeftOuts};
use super::tokens::Given;
use crate::{DataError, Split};

/// Text that one thread gathers before it writes a part.
pub(super) const PART_BYTES: usize = 64 << 20;

/// Parts joined at a time by one thread, and by all: a process may often have no more than 1024 files open.
const JOINED: usize = 64;
const JOINED_BY_ALL: usize = 512;

/// Documents of a group that a given tokenizer is tried on.
const CHECKED: u64 = 64;

/// Letters of a group's name, with which its files' begin.
const NAME: usize = 32;

/// A document's place in the shuffled order; equal texts have equal keys.
pub(super) type Key = [u8; 16];

/// How the key space is cut into units: first the held-out ones, then those of the train split.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Units {
    pub held_out: u32,
    pub train: u32,
    /// Keys whose first eight bytes are below this are held out.
    pub threshold: u64,
}

impl Units {
    pub fn new(held_out: f64, text_bytes: u64, unit_bytes: u64) -> Units {
        let train = coarse(text_bytes.div_ceil(unit_bytes)).clamp(1, 1 << 16) as u32;
        let fraction = (f64::from(train) * held_out).ceil().max(1.0) as u32;
        // The cast saturates; the fraction is at most a half.
        Units { held_out: fraction, train, threshold: (held_out * 2f64.powi(64)) as u64 }
    }

    pub fn count(&self) -> u32 {
        self.held_out + self.train
    }

    pub fn of(&self, key: &Key) -> u32 {
        let key = u64::from_be_bytes(key[..8].try_into().expect("eight bytes"));
        let part = |at: u64, width: u128, units: u32| (u128::from(at) * u128::from(units) / width) as u32;
        match key.checked_sub(self.threshold) {
            None => part(key, u128::from(self.threshold), self.held_out),
            Some(at) => self.held_out + part(at, (1 << 64) - u128::from(self.threshold), self.train),
        }
    }

    /// The split of a unit, and its number inside the split.
    pub fn place(&self, unit: u32) -> (Split, u32) {
        match unit.checked_sub(self.held_out) {
            None => (Split::HeldOut, unit),
            Some(shard) => (Split::Train, shard),
        }
    }
}

/// What a finished group reports.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct GroupDone {
    /// The group's name, which its part files begin with.
    pub name: String,
    pub parts: u32,
    pub documents: u64,
    pub held_out_documents: u64,
    pub text_bytes: u64,
    pub left_out: LeftOuts,
    pub empty_documents: u64,
    /// Of JSONL's lines and parquet's rows: all, those that give no text, and the first of them.
    pub lines: u64,
    pub bad_lines: u64,
    pub first_bad: Option<(PathBuf, String)>,
}

impl GroupDone {
    fn count(&mut self, file: &InputFile, met: Met) {
        if met.not_text {
            self.left_out.add(left_out::NOT_TEXT, &file.name, file.bytes);
        }
        self.empty_documents += met.empty;
        self.lines += met.lines;
        self.bad_lines += met.bad_lines;
        if let Some(reason) = met.first_bad {
            self.first_bad.get_or_insert_with(|| (file.path.clone(), reason));
        }
    }
}

/// The folder of part files.
pub(super) struct Spill<'a> {
    pub folder: PathBuf,
    pub units: Units,
    pub seed: u64,
    pub signs: Signs,
    pub part_bytes: usize,
    /// The tokenizer that must give each group's first documents back, unless it may be lossy.
    pub given: Option<&'a Given>,
    pub lossy: bool,
}

impl Spill<'_> {
    /// Reads one group of files, unless an earlier run has.
    pub fn add_group(&self, files: &[InputFile], column: &str) -> Result<GroupDone, DataError> {
        let tried = self.given.filter(|_| !self.lossy);
        let name = self.group_name(files, column, tried);
        // A group that the tokenizer was tried on serves where it need not be, too.
        for name in [&name, &self.group_name(files, column, self.given)] {
            if let Some(done) = durable::read_json(&self.done_file(name))? {
                self.signs.see(&done);
                return Ok(done);
            }
        }
        let mut done = GroupDone { name, ..GroupDone::default() };
        let mut buffers = vec![Vec::new(); self.units.count() as usize];
        let mut gathered = 0;
        for file in files {
            let mut each = |number: u64, text: &str| {
                if let Some(given) = tried.filter(|_| done.documents < CHECKED) {
                    given.check(file, number, text)?;
                }
                gathered += self.gather(text, &mut buffers, &mut done);
                if gathered >= self.part_bytes {
                    self.write_part(&done.name, done.parts, &mut buffers)?;
                    done.parts += 1;
                    gathered = 0;
                }
                Ok(())
            };
            let met = documents::read(file, column, &mut each)?;
            let barren = met.lines > 0 && met.lines == met.bad_lines;
            done.count(file, met);
            self.signs.see(&done);
            if barren {
                self.signs.weigh(file, &done)?;
            }
        }
        if gathered > 0 {
            self.write_part(&done.name, done.parts, &mut buffers)?;
            done.parts += 1;
        }
        while done.parts > 1 {
            done.parts = self.join(&done.name, done.parts)?;
        }
        durable::write_json(&self.done_file(&done.name), &done)?;
        Ok(done)
    }

    fn group_name(&self, files: &[InputFile], column: &str, tried: Option<&Given>) -> String {
        let paths: Vec<&Path> = files.iter().map(|file| file.path.as_path()).collect();
        let checked_with = tried.map(|given| &given.blake3);
        let made_of = serde_json::json!([files, paths, column, self.seed, self.units, checked_with]);
        blake3::hash(made_of.to_string().as_bytes()).to_hex()[..NAME].to_owned()
    }

    fn gather(&self, text: &str, buffers: &mut [Vec<u8>], done: &mut GroupDone) -> usize {
        let key = self.key(text);
        let unit = self.units.of(&key);
        let buffer = &mut buffers[unit as usize];
        buffer.extend_from_slice(&key);
        buffer.extend_from_slice(&(text.len() as u32).to_le_bytes());
        buffer.extend_from_slice(text.as_bytes());
        done.documents += 1;
        done.held_out_documents += u64::from(unit < self.units.held_out);
        done.text_bytes += text.len() as u64;
        text.len() + 20
    }

    fn key(&self, text: &str) -> Key {
        let mut hasher = blake3::Hasher::new_derive_key("tiefsee prepare document key 1");
        hasher.update(&self.seed.to_le_bytes()).update(text.as_bytes());
        hasher.finalize().as_bytes()[..16].try_into().expect("16 of 32 bytes")
    }

    fn write_part(&self, group: &str, part: u32, buffers: &mut [Vec<u8>]) -> Result<(), DataError> {
        let path = self.part_file(group, part);
        durable::write(&path, |file| {
            let table = table(buffers.iter().map(|buffer| buffer.len() as u64), self.units);
            file.write_all(&table).map_err(DataError::io(&path, "write"))?;
            // Memory goes back with each: kept, every unit's would in time be that of the fullest it ever was in a part.
            buffers.iter_mut().try_for_each(|buffer| file.write_all(&std::mem::take(buffer)).map_err(DataError::io(&path, "write")))
        })
    }

    /// Makes fewer parts, one of several, under numbers of parts that are read by then; returns how many.
    fn join(&self, group: &str, parts: u32) -> Result<u32, DataError> {
        let joined = (JOINED_BY_ALL / rayon::current_num_threads()).clamp(2, JOINED);
        let old: Vec<PathBuf> = (0..parts).map(|part| self.part_file(group, part)).collect();
        for (number, some) in (0..).zip(old.chunks(joined)) {
            join(some, &self.part_file(group, number), self.units)?;
        }
        let left = old.len().div_ceil(joined);
        old[left..].iter().try_for_each(|path| fs::remove_file(path).map_err(DataError::io(path, "remove")))?;
        Ok(left as u32)
    }

    fn done_file(&self, group: &str) -> PathBuf {
        self.folder.join(format!("{group}.json"))
    }

    fn part_file(&self, group: &str, part: u32) -> PathBuf {
        self.folder.join(format!("{group}-{part}"))
    }

    /// Removes what was read of groups that are none now: of files that changed, or into another number of units.
    pub fn keep_only(&self, groups: &[GroupDone]) -> Result<(), DataError> {
        let names: HashSet<&str> = groups.iter().map(|group| group.name.as_str()).collect();
        for entry in fs::read_dir(&self.folder).map_err(DataError::io(&self.folder, "list"))? {
            let path = entry.map_err(DataError::io(&self.folder, "list"))?.path();
            let group = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.get(..NAME)).unwrap_or_default();
            if !names.contains(group) {
                fs::remove_file(&path).map_err(DataError::io(&path, "remove"))?;
            }
        }
        Ok(())
    }

    /// All part files, given how many each group has.
    pub fn parts(&self, groups: &[GroupDone]) -> Vec<PathBuf> {
        groups.iter().flat_map(|group| (0..group.parts).map(|part| self.part_file(&group.name, part))).collect()
    }
}

/// Where the units' records begin and end in a part.
fn table(lengths: impl Iterator<Item = u64>, units: Units) -> Vec<u8> {
    let mut offset = (u64::from(units.count()) + 1) * 8;
    let mut table = offset.to_le_bytes().to_vec();
    for length in lengths {
        offset += length;
        table.extend_from_slice(&offset.to_le_bytes());
    }
    table
}

/// Writes the part that holds all that `parts` do, each read once from its beginning to its end.
fn join(parts: &[PathBuf], to: &Path, units: Units) -> Result<(), DataError> {
    let mut sources = parts.iter().map(|path| Source::open(path, units)).collect::<Result<Vec<Source>, DataError>>()?;
    durable::write(to, |file| {
        let lengths = (0..units.count()).map(|unit| sources.iter().map(|source| source.length(unit)).sum());
        file.write_all(&table(lengths, units)).map_err(DataError::io(to, "write"))?;
        (0..units.count()).try_for_each(|unit| sources.iter_mut().try_for_each(|source| source.copy(unit, file, to)))
    })
}

/// A part that is read from its beginning to its end.
struct Source<'a> {
    path: &'a Path,
    table: Vec<u8>,
    records: BufReader<File>,
}

impl Source<'_> {
    fn open(path: &Path, units: Units) -> Result<Source<'_>, DataError> {
        let mut records = BufReader::with_capacity(1 << 16, File::open(path).map_err(DataError::io(path, "open"))?);
        let mut table = vec![0; (units.count() as usize + 1) * 8];
        records.read_exact(&mut table).map_err(DataError::io(path, "read"))?;
        Ok(Source { path, table, records })
    }

    fn length(&self, unit: u32) -> u64 {
        let [start, end] = bounds(&self.table[unit as usize * 8..][..16]);
        end - start
    }

    fn copy(&mut self, unit: u32, file: &mut impl Write, to: &Path) -> Result<(), DataError> {
        let length = self.length(unit);
        let copied = io::copy(&mut (&mut self.records).take(length), file).map_err(DataError::io(to, "write"))?;
        let cut_off = || DataError::io(self.path, "read")(io::ErrorKind::UnexpectedEof.into());
        if copied == length { Ok(()) } else { Err(cut_off()) }
    }
}

/// Two neighbours of a table.
fn bounds(table: &[u8]) -> [u64; 2] {
    [0, 8].map(|at| u64::from_le_bytes(table[at..at + 8].try_into().expect("eight bytes")))
}

/// The distinct documents of one unit, in the order of their keys.
pub(super) struct Unit {
    text: Vec<u8>,
    documents: Vec<(Key, usize, usize)>,
    pub duplicates: u64,
}

impl Unit {
    /// Gathers a unit out of all parts. Holds each distinct document once.
    pub fn load(parts: &[PathBuf], unit: u32) -> Result<Unit, DataError> {
        let mut loaded = Unit { text: Vec::new(), documents: Vec::new(), duplicates: 0 };
        let mut seen = std::collections::HashSet::new();
        for path in parts {
            let segment = read_segment(path, unit)?;
            let mut rest = segment.as_slice();
            while let Some((key, after)) = rest.split_first_chunk::<16>() {
                let broken = || DataError::BadInput { path: path.clone(), reason: "a part file is damaged".into() };
                let (length, after) = after.split_first_chunk::<4>().ok_or_else(broken)?;
                let length = u32::from_le_bytes(*length) as usize;
                let (text, after) = after.split_at_checked(length).ok_or_else(broken)?;
                rest = after;
                if seen.insert(*key) {
                    let start = loaded.text.len();
                    loaded.text.extend_from_slice(text);
                    loaded.documents.push((*key, start, start + length));
                } else {
                    loaded.duplicates += 1;
                }
            }
        }
        loaded.documents.sort_unstable();
        Ok(loaded)
    }

    pub fn len(&self) -> usize {
        self.documents.len()
    }

    pub fn document(&self, i: usize) -> (&Key, &str) {
        let (key, start, end) = &self.documents[i];
        let text = std::str::from_utf8(&self.text[*start..*end]).expect("only UTF-8 is spilled");
        (key, text)
    }
}

fn read_segment(path: &Path, unit: u32) -> Result<Vec<u8>, DataError> {
    let failed = || DataError::io(path, "read");
    let file = File::open(path).map_err(failed())?;
    let mut found = [0u8; 16];
    file.read_exact_at(&mut found, u64::from(unit) * 8).map_err(failed())?;
    let [start, end] = bounds(&found);
    let mut segment = vec![0; (end - start) as usize];
    file.read_exact_at(&mut segment, start).map_err(failed())?;
    Ok(segment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prepare::inputs::{Kind, Packing};

    /// The units, and the names of what is left in the folder.
    fn spilled(folder: &Path, file: &InputFile, part_bytes: usize) -> (Vec<Unit>, Vec<String>) {
        fs::create_dir_all(folder).unwrap();
        let units = Units::new(0.1, 900, 100);
        let spill = Spill { folder: folder.to_owned(), units, seed: 0, signs: Signs::default(), part_bytes, given: None, lossy: false };
        let group = spill.add_group(std::slice::from_ref(file), "text").unwrap();
        let parts = spill.parts(&[group]);
        let units = (0..units.count()).map(|unit| Unit::load(&parts, unit).unwrap()).collect();
        let mut names: Vec<String> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        (units, names)
    }

    #[test]
    fn buffers_hold_a_part_and_not_the_fullest_of_each_unit() {
        let folder = tempfile::tempdir().unwrap();
        let units = Units::new(0.1, 1 << 20, 1 << 10);
        let spill = Spill { folder: folder.path().to_owned(), units, seed: 0, signs: Signs::default(), part_bytes: 1 << 16, given: None, lossy: false };
        let mut buffers = vec![Vec::new(); units.count() as usize];
        let mut done = GroupDone::default();
        // Each fills a part.
        for number in 0..200 {
            spill.gather(&format!("{number} {}", "text ".repeat(1 << 14)), &mut buffers, &mut done);
            let held: usize = buffers.iter().map(Vec::capacity).sum();
            assert!(held < 3 * spill.part_bytes, "{held} bytes after {number} parts");
            spill.write_part("x", number, &mut buffers).unwrap();
        }
    }

    #[test]
    fn a_group_leaves_one_part_however_often_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        // Some of them twice.
        let text: String = (0..1500).map(|i| format!("{{\"text\":\"document {}\"}}\n", i % 1200)).collect();
        fs::write(&path, &text).unwrap();
        let (name, bytes, kind) = ("a.jsonl".into(), text.len() as u64, Kind::Jsonl(Packing::Plain));
        let file = InputFile { path, remote: None, name, bytes, version: String::new(), kind, limit: None };
        let (whole, names) = spilled(&folder.path().join("whole"), &file, PART_BYTES);
        assert_eq!(names.len(), 2, "{names:?}");
        assert_eq!(whole.iter().map(Unit::len).sum::<usize>(), 1200);
        // A part for each document, which are joined in two rounds; some dozen; a few.
        for part_bytes in [1, 1000, 9000] {
            let (joined, found) = spilled(&folder.path().join(part_bytes.to_string()), &file, part_bytes);
            assert_eq!(found, names);
            for (joined, whole) in joined.iter().zip(&whole) {
                assert_eq!(joined.duplicates, whole.duplicates);
                assert_eq!(joined.len(), whole.len());
                assert!((0..whole.len()).all(|i| joined.document(i) == whole.document(i)));
            }
        }
    }
}
