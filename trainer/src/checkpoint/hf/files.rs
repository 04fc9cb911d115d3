//! The files of an export: each on a thread of its own, as many at a time as there are cores.
use super::{Format, write_json};
use crate::checkpoint::each::each;
use crate::checkpoint::load::check_file;
use crate::checkpoint::manifest::FileEntry;
use crate::checkpoint::{Manifest, Reader, shard};
use anyhow::Result;
use kernels::fp8::{Blocks, ScaleRule, TILE, quantise_blocks};
use model::hf::Piece;
use model::params::ParamSpec;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tch::{Kind, Tensor};

/// A released tensor, and how it is made.
pub(super) struct Released {
    pub entry: shard::Entry,
    /// The checkpoint's tensor that it is a part of, and that one's shape.
    from: String,
    whole: Vec<i64>,
    piece: Piece,
    pub part: Part,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Plain,
    /// E4M3 of a matrix in blocks.
    Blocks,
    /// And its FP32 scales.
    Scales,
}

impl Released {
    pub fn new(spec: &ParamSpec, from: String, piece: Piece, part: Part, format: Format) -> Released {
        let mut shape = spec.shape.clone();
        if piece.expert.is_some() {
            shape.remove(0);
        }
        if let Some((_, rows)) = piece.rows {
            shape[0] = rows;
        }
        let (name, kind) = match part {
            Part::Plain => (piece.name.clone(), format.plain(spec)),
            Part::Blocks => (piece.name.clone(), Kind::Float8e4m3fn),
            Part::Scales => (format!("{}_scale_inv", piece.name), Kind::Float),
        };
        if part == Part::Scales {
            shape.iter_mut().for_each(|side| *side = (*side + TILE - 1) / TILE);
        }
        Released { entry: shard::Entry { name, kind, shape }, from, whole: spec.shape.clone(), piece, part }
    }
}

/// What one thread makes released tensors of. Those that come of the same rows follow each other: an expert's gate and up, a
/// matrix's values and scales. They are read once.
struct Source {
    reader: Reader,
    /// (tensor, first row) of what was read last.
    newest: Option<((String, i64), Tensor)>,
    /// Of the piece that was quantised last.
    blocks: Option<(String, Blocks)>,
}

impl Source {
    fn open(checkpoint: &Path) -> Result<Source> {
        Ok(Source { reader: Reader::open(checkpoint)?, newest: None, blocks: None })
    }

    fn make(&mut self, released: &Released) -> Result<Tensor> {
        let kind = released.entry.kind;
        match released.part {
            Part::Plain => Ok(self.piece(released)?.to_kind(kind).contiguous()),
            Part::Blocks => Ok(self.blocks(released)?.values.shallow_clone()),
            Part::Scales => Ok(self.blocks(released)?.scales.contiguous()),
        }
    }

    fn blocks(&mut self, released: &Released) -> Result<&Blocks> {
        let name = &released.piece.name;
        if self.blocks.as_ref().is_none_or(|(newest, _)| newest != name) {
            self.blocks = None; // one at a time
            let value = self.piece(released)?;
            self.blocks = Some((name.clone(), quantise_blocks(&value, ScaleRule::Amax)));
        }
        Ok(&self.blocks.as_ref().expect("just made").1)
    }

    fn piece(&mut self, Released { from, whole, piece, .. }: &Released) -> Result<Tensor> {
        match (piece.expert, piece.rows) {
            (None, None) => self.rows(from, whole, 0, whole[0]),
            (None, Some((start, rows))) => self.rows(from, whole, start, rows),
            (Some(expert), None) => Ok(self.rows(from, whole, expert, 1)?.squeeze_dim(0)),
            (Some(expert), Some((start, rows))) => Ok(self.rows(from, whole, expert, 1)?.squeeze_dim(0).narrow(0, start, rows)),
        }
    }

    fn rows(&mut self, from: &str, whole: &[i64], start: i64, rows: i64) -> Result<Tensor> {
        let is = |((name, first), tensor): &((String, i64), Tensor)| name == from && *first == start && tensor.size()[0] == rows;
        if !self.newest.as_ref().is_some_and(is) {
            self.newest = None; // one at a time
            self.newest = Some(((from.to_string(), start), self.reader.rows(from, whole, start, rows)?));
        }
        Ok(self.newest.as_ref().expect("just read").1.shallow_clone())
    }
}

/// Every file that the released tensors are read from is what was written.
pub(super) fn check_files(checkpoint: &Path, manifest: &Manifest, released: &[Released]) -> Result<()> {
    let slices = |tensor: &Released| manifest.tensors.get(&tensor.from).into_iter().flat_map(|entry| &entry.slices);
    let read: BTreeSet<&str> = released.iter().flat_map(slices).map(|slice| slice.file.as_str()).collect();
    let files: Vec<&FileEntry> = manifest.files.iter().filter(|file| read.contains(file.name.as_str())).collect();
    each(files.len(), || Ok(()), |(), index| check_file(checkpoint, files[index], &[]))?;
    Ok(())
}

/// The tensors into files of about so many bytes; bytes of tensors that were read.
pub(super) fn write_files(folder: &Path, released: &[Released], checkpoint: &Path, file_bytes: usize) -> Result<u64> {
    let mut files: Vec<Vec<&Released>> = vec![Vec::new()];
    let (mut bytes, mut total) = (0, 0);
    for tensor in released {
        let size = tensor.entry.bytes();
        if bytes > 0 && bytes + size > file_bytes {
            files.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        total += size;
        files.last_mut().expect("starts with one").push(tensor);
    }
    let count = files.len();
    let name = |index: usize| if count == 1 { "model.safetensors".into() } else { format!("model-{:05}-of-{count:05}.safetensors", index + 1) };
    let write = |source: &mut Source, index: usize| {
        let entries: Vec<shard::Entry> = files[index].iter().map(|tensor| tensor.entry.clone()).collect();
        shard::write_as_given(&folder.join(name(index)), &entries, |at| source.make(files[index][at])).map(|_| ())
    };
    let sources = each(count, || Source::open(checkpoint), write)?;
    if count > 1 {
        let named = |(index, tensors): (usize, &Vec<&Released>)| tensors.iter().map(|t| (t.entry.name.clone(), name(index))).collect::<Vec<_>>();
        let map: BTreeMap<String, String> = files.iter().enumerate().flat_map(named).collect();
        write_json(&folder.join("model.safetensors.index.json"), &json!({"metadata": {"total_size": total}, "weight_map": map}))?;
    }
    Ok(sources.iter().map(|source| source.reader.tensor_bytes_read()).sum())
}
