//! Reading parts: a rank of any layout reads the rows that it needs, and no other byte, from whatever slices hold them.
use super::manifest::SliceEntry;
use super::shard::CHUNK;
use super::{Manifest, shard};
use anyhow::{Context, Result, ensure};
use kernels::shim::bytes_mut;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// A checkpoint that `verify` has passed, on this rank or shared out among several: hashes are not checked again.
pub struct Reader {
    path: PathBuf,
    manifest: Manifest,
    files: HashMap<String, Opened>,
    bytes_read: u64,
    header_bytes: u64,
}

/// A safetensors file, with what it says it holds.
pub(super) struct Opened {
    path: PathBuf,
    file: File,
    tensors: Metadata,
    /// Where the tensors' bytes begin.
    data: u64,
}

/// Rows of one slice that are wanted: from row `low` of the whole on, into row `to` of what is filled.
struct Part {
    slice: SliceEntry,
    low: i64,
    rows: i64,
    to: i64,
}

impl Reader {
    pub fn open(checkpoint: &Path) -> Result<Reader> {
        let manifest = Manifest::read(checkpoint)?;
        Ok(Reader { path: checkpoint.to_path_buf(), manifest, files: HashMap::new(), bytes_read: 0, header_bytes: 0 })
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Of tensors and of the headers that say where they are.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read + self.header_bytes
    }

    /// Of tensors alone.
    pub fn tensor_bytes_read(&self) -> u64 {
        self.bytes_read
    }

    /// Of the whole tensor `name`.
    pub fn shape(&self, name: &str) -> Result<Vec<i64>> {
        Ok(self.entry(name)?.shape.clone())
    }

    pub fn kind(&self, name: &str) -> Result<Kind> {
        let entry = self.entry(name)?;
        let kind = shard::kind_named(&entry.dtype);
        kind.with_context(|| format!("{}: {name} is {}, which is not read here", self.path.display(), entry.dtype))
    }

    fn entry(&self, name: &str) -> Result<&super::manifest::TensorEntry> {
        self.manifest.tensors.get(name).with_context(|| format!("{} holds no {name}", self.path.display()))
    }

    /// The whole tensor, on the CPU.
    pub fn whole(&mut self, name: &str) -> Result<Tensor> {
        let shape = self.shape(name)?;
        self.rows(name, &shape, 0, shape[0])
    }

    /// Rows start..start + rows of the tensor `name`, whose whole shape must be `whole`, on the CPU.
    pub fn rows(&mut self, name: &str, whole: &[i64], start: i64, rows: i64) -> Result<Tensor> {
        let mut shape = whole.to_vec();
        shape[0] = rows;
        let target = Tensor::empty(&shape, (self.kind(name)?, Device::Cpu));
        self.fill(name, whole, start, &target)?;
        Ok(target)
    }

    /// Into `target`, of any kind and device, the rows from `start` on that it has room for.
    pub fn fill(&mut self, name: &str, whole: &[i64], start: i64, target: &Tensor) -> Result<()> {
        let entry = self.entry(name)?;
        ensure!(entry.shape == whole, "{}: {name} is {:?}, the model's is {whole:?}", self.path.display(), entry.shape);
        let rows = target.size()[0];
        let part = |slice: &SliceEntry| {
            let (low, high) = (start.max(slice.start), (start + rows).min(slice.start + slice.rows));
            (low < high).then(|| Part { slice: slice.clone(), low, rows: high - low, to: low - start })
        };
        let parts: Vec<Part> = entry.slices.iter().filter_map(part).collect();
        let found: i64 = parts.iter().map(|part| part.rows).sum();
        ensure!(found == rows, "{}: {name} has {found} of the {rows} rows from {start} on", self.path.display());
        parts.iter().try_for_each(|part| self.fill_part(name, part, &target.narrow(0, part.to, part.rows)))
    }

    fn fill_part(&mut self, name: &str, part: &Part, target: &Tensor) -> Result<()> {
        let Reader { path, files, bytes_read, header_bytes, .. } = self;
        let file = &part.slice.file;
        if !files.contains_key(file) {
            let opened = Opened::new(path.join(file))?;
            *header_bytes += opened.data;
            files.insert(file.clone(), opened);
        }
        let opened = &files[file];
        let (info, kind) = opened.find(name)?;
        let row = (info.data_offsets.1 - info.data_offsets.0) / part.slice.rows as usize;
        let (flat, bytes) = (target.view(-1), part.rows as usize * row);
        let fits = flat.numel() * kind.elt_size_in_bytes() == bytes;
        ensure!(fits, "{}: {name} is not of the shape that the manifest says", opened.path.display());
        let first = opened.data + (info.data_offsets.0 + (part.low - part.slice.start) as usize * row) as u64;
        opened.read_into(first, kind, flat)?;
        *bytes_read += bytes as u64;
        Ok(())
    }
}

impl Opened {
    pub fn new(path: PathBuf) -> Result<Opened> {
        let read = || -> Result<(File, Vec<u8>)> {
            let file = File::open(&path)?;
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
        Ok(Opened { path, file, tensors, data: 8 + header.len() as u64 })
    }

    pub fn names(&self) -> impl Iterator<Item = String> {
        self.tensors.tensors().into_keys()
    }

    pub fn find(&self, name: &str) -> Result<(&TensorInfo, Kind)> {
        let info = self.tensors.info(name).with_context(|| format!("{} holds no {name}", self.path.display()))?;
        let kind = shard::kind(info.dtype)
            .with_context(|| format!("{}: {name} is {:?}, which is not read here", self.path.display(), info.dtype))?;
        Ok((info, kind))
    }

    /// Elements of `kind` from byte `first` of the file on, into `flat`; by as many threads as torch has, a run of chunks each.
    fn read_into(&self, first: u64, kind: Kind, flat: Tensor) -> Result<()> {
        let (width, numel) = (kind.elt_size_in_bytes() as i64, flat.numel() as i64);
        let step = CHUNK as i64 / width;
        let each = (numel / tch::get_num_threads().max(1) as i64).max(4 * step);
        let run = |target: Tensor, start: i64| -> Result<()> {
            let count = target.numel() as i64;
            for at in (0..count).step_by(step as usize) {
                let mut here = target.narrow(0, at, step.min(count - at));
                let from = first + ((start + at) * width) as u64;
                let same = here.kind() == kind;
                match bytes_mut(&mut here).filter(|_| same) {
                    Some(bytes) => self.read(bytes, from)?,
                    None => here.copy_(&self.read_tensor(&here.size(), kind, from)?),
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let runs = (each..numel).step_by(each as usize).map(|start| {
                let target = flat.narrow(0, start, each.min(numel - start));
                let run = &run;
                scope.spawn(move || run(target, start))
            });
            let others: Vec<_> = runs.collect();
            let mine = run(flat.narrow(0, 0, each.min(numel)), 0);
            others.into_iter().map(|other| other.join().expect("reading does not panic")).fold(mine, Result::and)
        })
    }

    /// Whole, on the CPU.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let (info, kind) = self.find(name)?;
        let shape: Vec<i64> = info.shape.iter().map(|&n| n as i64).collect();
        self.read_tensor(&shape, kind, self.data + info.data_offsets.0 as u64)
    }

    fn read_tensor(&self, shape: &[i64], kind: Kind, from: u64) -> Result<Tensor> {
        let mut tensor = Tensor::empty(shape, (kind, Device::Cpu));
        self.read(bytes_mut(&mut tensor).expect("just made"), from)?;
        Ok(tensor)
    }

    fn read(&self, bytes: &mut [u8], from: u64) -> Result<()> {
        self.file.read_exact_at(bytes, from).with_context(|| format!("cannot read {}", self.path.display()))
    }
}
