//! Reading parts: a rank of any layout reads the rows that it needs, and no other byte, from whatever slices hold them.
use super::load::{Refused, check_file};
use super::manifest::SliceEntry;
use super::pass::{Wanted, parts};
use super::{Manifest, shard};
use anyhow::{Context, Result, anyhow, ensure};
use kernels::shim::bytes_mut;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// `fill` says what is wanted and where it is to go, `read` gets it: each file in one pass, whose hash is taken on the way if
/// it is one that this rank is to check.
pub struct Reader {
    path: PathBuf,
    manifest: Manifest,
    files: HashMap<String, Opened>,
    wanted: BTreeMap<String, Vec<Wanted>>,
    /// Files that this rank is to check, and what came of it.
    checks: BTreeMap<String, Option<Result<(), Refused>>>,
    bytes_read: u64,
    header_bytes: u64,
}

/// What a safetensors file says it holds. The file itself is open while it is read: a checkpoint may have thousands.
pub(super) struct Opened {
    path: PathBuf,
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
    /// Of a checkpoint that `verify` has passed: hashes are not checked again.
    pub fn open(checkpoint: &Path) -> Result<Reader> {
        let (path, manifest) = (checkpoint.to_path_buf(), Manifest::read(checkpoint)?);
        let (files, wanted, checks) = Default::default();
        Ok(Reader { path, manifest, files, wanted, checks, bytes_read: 0, header_bytes: 0 })
    }

    /// Of one that is checked as it is read, every `ranks`-th file from the `rank`-th on by this rank: what was read is good
    /// for something once `checked` says so on all of them.
    pub(super) fn checking(checkpoint: &Path, (rank, ranks): (usize, usize)) -> Result<Reader> {
        let mut reader = Reader::open(checkpoint)?;
        let mine = reader.manifest.files.iter().skip(rank).step_by(ranks);
        reader.checks = mine.map(|entry| (entry.name.clone(), None)).collect();
        Ok(reader)
    }

    pub(super) fn has_read(&self) -> bool {
        self.wanted.is_empty()
    }

    /// Reads the files that nothing was wanted of, too. The error is of the first file that is not what was written.
    pub(super) fn checked(self) -> Result<(), Refused> {
        let outcome = |(file, known): (&String, &Option<Result<(), Refused>>)| known.clone().unwrap_or_else(|| self.check(file, &[]));
        self.checks.iter().try_for_each(outcome)
    }

    fn check(&self, file: &str, wanted: &[Wanted]) -> Result<(), Refused> {
        let entry = self.manifest.files.iter().find(|entry| entry.name == file).expect("one of the manifest's");
        Ok(check_file(&self.path, entry, wanted)?)
    }

    /// What was wanted so far.
    pub fn read(&mut self) -> Result<()> {
        for (file, wanted) in std::mem::take(&mut self.wanted) {
            if self.checks.get(&file).is_some_and(Option::is_none) {
                let outcome = self.check(&file, &wanted);
                self.bytes_read += self.manifest.files.iter().filter(|entry| entry.name == file).map(|entry| entry.bytes).sum::<u64>();
                self.checks.insert(file, Some(outcome.clone()));
                outcome.map_err(|refused| anyhow!(refused.words))?;
            } else {
                self.bytes_read += parts(&self.path.join(&file), &wanted)?;
            }
        }
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.path
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
        self.read()?;
        Ok(target)
    }

    /// With the next `read`, into `target`, of any kind and device, come the rows from `start` on that it has room for.
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
        let Reader { path, files, wanted, header_bytes, .. } = self;
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
        let named = || format!("{}: {name}", opened.path.display());
        wanted.entry(file.clone()).or_default().push(Wanted::new(first, kind, flat).with_context(named)?);
        Ok(())
    }
}

impl Opened {
    pub fn new(path: PathBuf) -> Result<Opened> {
        let read = || -> Result<Vec<u8>> {
            let file = File::open(&path)?;
            let mut length = [0; 8];
            file.read_exact_at(&mut length, 0)?;
            let length = u64::from_le_bytes(length);
            ensure!(length < file.metadata()?.len(), "its header has {length} bytes, more than the file");
            let mut header = vec![0; length as usize];
            file.read_exact_at(&mut header, 8)?;
            Ok(header)
        };
        let header = read().with_context(|| format!("cannot read {}", path.display()))?;
        let tensors = serde_json::from_slice(&header).with_context(|| format!("{} is not a safetensors file", path.display()))?;
        Ok(Opened { path, tensors, data: 8 + header.len() as u64 })
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

    /// Whole, on the CPU.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let (info, kind) = self.find(name)?;
        let shape: Vec<i64> = info.shape.iter().map(|&n| n as i64).collect();
        let mut tensor = Tensor::empty(&shape, (kind, Device::Cpu));
        let from = self.data + info.data_offsets.0 as u64;
        let read = |file: File| file.read_exact_at(bytes_mut(&mut tensor).expect("just made"), from);
        File::open(&self.path).and_then(read).with_context(|| format!("cannot read {}", self.path.display()))?;
        Ok(tensor)
    }
}
