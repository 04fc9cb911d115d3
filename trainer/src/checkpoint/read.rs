//! Reading parts: a rank of any layout reads the rows that it needs, and no other byte, from whatever slices hold them.
use super::load::read_manifest;
use super::{Manifest, shard};
use anyhow::{Context, Result, ensure};
use safetensors::tensor::Metadata;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// A checkpoint that `verify` has passed, on this rank or on one that decides for all: hashes are not checked again.
pub struct Reader {
    path: PathBuf,
    manifest: Manifest,
    files: HashMap<String, Opened>,
    bytes_read: u64,
}

struct Opened {
    file: File,
    tensors: Metadata,
    /// Where the tensors' bytes begin.
    data: u64,
}

impl Reader {
    pub fn open(checkpoint: &Path) -> Result<Reader> {
        let manifest = read_manifest(checkpoint)?;
        Ok(Reader { path: checkpoint.to_path_buf(), manifest, files: HashMap::new(), bytes_read: 0 })
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Of tensors and of the headers that say where they are.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Rows start..start + rows of the tensor `name`, whose whole shape must be `whole`.
    pub fn rows(&mut self, name: &str, whole: &[i64], start: i64, rows: i64) -> Result<Tensor> {
        let Reader { path, manifest, files, bytes_read } = self;
        let entry = manifest.tensors.get(name).with_context(|| format!("{} holds no {name}", path.display()))?;
        ensure!(entry.shape == whole, "{}: {name} is {:?}, the model's is {whole:?}", path.display(), entry.shape);
        let mut shape = whole.to_vec();
        shape[0] = rows;
        let (mut bytes, mut kind, mut found) = (Vec::new(), None, 0);
        for slice in &entry.slices {
            let (low, high) = (start.max(slice.start), (start + rows).min(slice.start + slice.rows));
            if low >= high {
                continue;
            }
            let name_of = || path.join(&slice.file);
            let opened = match files.get(&slice.file) {
                Some(opened) => opened,
                None => {
                    let opened = Opened::new(&name_of(), bytes_read)?;
                    files.entry(slice.file.clone()).or_insert(opened)
                }
            };
            let info = opened.tensors.info(name).with_context(|| format!("{} holds no {name}", name_of().display()))?;
            let row = (info.data_offsets.1 - info.data_offsets.0) / slice.rows as usize;
            kind = Some(
                shard::kind(info.dtype)
                    .with_context(|| format!("{}: {name} is {:?}, which is not read here", name_of().display(), info.dtype))?,
            );
            bytes.resize(rows as usize * row, 0);
            let part = &mut bytes[(low - start) as usize * row..(high - start) as usize * row];
            let at = opened.data + (info.data_offsets.0 + (low - slice.start) as usize * row) as u64;
            opened.file.read_exact_at(part, at).with_context(|| format!("cannot read {}", name_of().display()))?;
            *bytes_read += part.len() as u64;
            found += high - low;
        }
        ensure!(found == rows, "{}: {name} has {found} of the {rows} rows from {start} on", path.display());
        let kind = kind.with_context(|| format!("{}: no row of {name} was asked for", path.display()))?;
        Ok(Tensor::from_data_size(&bytes, &shape, kind))
    }
}

impl Opened {
    fn new(path: &Path, bytes_read: &mut u64) -> Result<Opened> {
        let read = || -> Result<(File, Vec<u8>)> {
            let file = File::open(path)?;
            let mut length = [0; 8];
            file.read_exact_at(&mut length, 0)?;
            let length = u64::from_le_bytes(length);
            ensure!(length < file.metadata()?.len(), "its header has {length} bytes, more than the file");
            let mut header = vec![0; length as usize];
            file.read_exact_at(&mut header, 8)?;
            Ok((file, header))
        };
        let (file, header) = read().with_context(|| format!("cannot read {}", path.display()))?;
        let tensors = serde_json::from_slice(&header).with_context(|| format!("{} is not a safetensors file", path.display()))?;
        *bytes_read += 8 + header.len() as u64;
        Ok(Opened { file, tensors, data: 8 + header.len() as u64 })
    }
}
