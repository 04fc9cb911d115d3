//! The inverse of an export: a folder in the released layout, FP8 or not, → a checkpoint of weights alone.
use super::{FILE_BYTES, table};
use crate::checkpoint::manifest::FileEntry;
use crate::checkpoint::read::Opened;
use crate::checkpoint::save::{Place, described, shard_name, write_aside};
use crate::checkpoint::{Manifest, list, shard};
use crate::run::resolved;
use anyhow::{Context, Result, bail, ensure};
use kernels::Precision;
use kernels::fp8::Blocks;
use model::config::ModelConfig;
use model::hf::{Piece, copies, parse_config, pieces};
use model::params::ParamSpec;
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// `folder` → RUN_DIR/checkpoints/step-00000000, for `run.init_from`. RUN_DIR must hold neither a run nor an import. Returns
/// the checkpoint.
pub fn import(folder: &Path, run_dir: &Path) -> Result<PathBuf> {
    import_in_files(folder, run_dir, FILE_BYTES)
}

/// In files of about so many bytes: the ranks of a run share them out when it starts.
pub fn import_in_files(folder: &Path, run_dir: &Path, file_bytes: usize) -> Result<PathBuf> {
    let used = !list(run_dir)?.is_empty() || resolved(run_dir).exists();
    ensure!(!used, "{} already holds a run or an import: name another folder", run_dir.display());
    let config_path = folder.join("config.json");
    let text = std::fs::read(&config_path).with_context(|| format!("cannot read {}", config_path.display()))?;
    let value: Value = serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", config_path.display()))?;
    let mut model = parse_config(&value).with_context(|| format!("{}", config_path.display()))?;
    let (released, depth) = (Folder::open(folder)?, model.num_nextn_predict_layers);
    let mtp = format!("model.layers.{}.enorm.weight", model.num_hidden_layers);
    let has_mtp = released.tensors.contains_key(&mtp);
    ensure!(depth <= 1 || !has_mtp, "{}: num_nextn_predict_layers = {depth}: only 0 and 1 are implemented", config_path.display());
    model.num_nextn_predict_layers = has_mtp as i64;
    model.validate()?;
    let kind = if released.any_double() { Kind::Double } else { Kind::Float };
    let table = table(&model);
    released.check_all_known(&model, table.specs())?;
    let place = Place::of(run_dir, 0);
    let mut manifest = Manifest::imported(model, if kind == Kind::Double { Precision::F64 } else { Precision::F32 });
    if let Ok(tokenizer) = std::fs::read(folder.join("tokenizer.json")) {
        manifest.tokenizer_blake3 = blake3::hash(&tokenizer).to_hex().to_string();
    }
    let files = share_out(table.specs(), kind, file_bytes);
    let write = |number: usize, slices: &[Slice]| -> Result<_> {
        let name = shard_name(number, files.len());
        let entries: Vec<shard::Entry> = slices.iter().map(|slice| slice.entry(kind)).collect();
        let summed = shard::write(&place.partial.join(&name), &entries, |index| released.assemble(&slices[index], kind))?;
        let described = described(&name, &entries, slices.iter().map(|slice| (slice.start, slice.spec.shape[0])));
        Ok((FileEntry { name, bytes: summed.bytes, blake3: summed.blake3 }, described))
    };
    write_aside(&place.partial, &place.target, || {
        for (number, slices) in files.iter().enumerate() {
            let (file, described) = write(number, slices)?;
            manifest.add(file, described);
        }
        manifest.write(&place.partial)
    })?;
    Ok(place.target)
}

/// Rows of a parameter that one file holds.
struct Slice<'a> {
    spec: &'a ParamSpec,
    start: i64,
    rows: i64,
}

impl Slice<'_> {
    fn shape(&self) -> Vec<i64> {
        [&[self.rows], &self.spec.shape[1..]].concat()
    }

    fn entry(&self, kind: Kind) -> shard::Entry {
        shard::Entry { name: format!("weight/{}", self.spec.name), kind, shape: self.shape() }
    }
}

/// The slices of each file. A layer's experts, by far the largest tensors, may be in several; what else there is in one.
fn share_out(specs: &[ParamSpec], kind: Kind, file_bytes: usize) -> Vec<Vec<Slice<'_>>> {
    let mut files: Vec<Vec<Slice>> = vec![Vec::new()];
    let mut room = file_bytes;
    for spec in specs {
        let all = spec.shape[0];
        let least = if pieces(spec).iter().all(|piece| piece.expert.is_some()) { 1 } else { all };
        let bytes = Slice { spec, start: 0, rows: least }.entry(kind).bytes();
        let mut start = 0;
        while start < all {
            let fit = (room / bytes) as i64 * least;
            if fit == 0 && files.last().is_some_and(|file| !file.is_empty()) {
                files.push(Vec::new());
                room = file_bytes;
                continue;
            }
            let rows = fit.clamp(least, all - start);
            files.last_mut().expect("starts with one").push(Slice { spec, start, rows });
            (start, room) = (start + rows, room.saturating_sub((rows / least) as usize * bytes));
        }
    }
    files
}

/// A released folder: its files, and which of them each tensor is in.
struct Folder {
    path: PathBuf,
    files: Vec<Opened>,
    tensors: HashMap<String, usize>,
}

impl Folder {
    fn open(path: &Path) -> Result<Folder> {
        let entries = std::fs::read_dir(path).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).with_context(|| format!("cannot list {}", path.display()))?;
        let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
        paths.retain(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
        paths.sort();
        let mut folder = Folder { path: path.to_path_buf(), files: Vec::new(), tensors: HashMap::new() };
        for (number, file) in paths.iter().enumerate() {
            let opened = Opened::new(file.clone())?;
            for name in opened.names() {
                // Nobody can tell which of them is meant.
                if let Some(other) = folder.tensors.insert(name.clone(), number) {
                    bail!("{name} is in {} and in {}", paths[other].display(), file.display());
                }
            }
            folder.files.push(opened);
        }
        ensure!(!folder.tensors.is_empty(), "{} holds no .safetensors file", path.display());
        Ok(folder)
    }

    /// A tensor that has no place here would be left out, and the model be another one.
    fn check_all_known(&self, model: &ModelConfig, specs: &[ParamSpec]) -> Result<()> {
        let ours = specs.iter().flat_map(|spec| pieces(spec).into_iter().map(|piece| piece.name));
        let known: HashSet<String> = ours.chain(copies(model).into_iter().map(|(name, _)| name)).collect();
        // Older transformers saved what RoPE's table is made of.
        let is_known = |name: &str| known.contains(name.strip_suffix("_scale_inv").unwrap_or(name)) || name.ends_with(".rotary_emb.inv_freq");
        let mut unknown: Vec<&String> = self.tensors.keys().filter(|name| !is_known(name)).collect();
        unknown.sort();
        ensure!(unknown.is_empty(), "{} holds {} tensors that the model of its config.json does not have, such as {}", self.path.display(), unknown.len(), unknown[0]);
        Ok(())
    }

    fn any_double(&self) -> bool {
        self.tensors.iter().any(|(name, &file)| self.files[file].find(name).is_ok_and(|(_, kind)| kind == Kind::Double))
    }

    /// Rows of our tensor from their released pieces.
    fn assemble(&self, slice: &Slice, kind: Kind) -> Result<Tensor> {
        let all = Tensor::zeros(slice.shape(), (kind, Device::Cpu));
        let wanted = |piece: &Piece| piece.expert.is_none_or(|expert| (slice.start..slice.start + slice.rows).contains(&expert));
        for piece in pieces(slice.spec).into_iter().filter(wanted) {
            let part = piece.expert.map_or_else(|| all.shallow_clone(), |expert| all.select(0, expert - slice.start));
            let mut part = piece.rows.map_or_else(|| part.shallow_clone(), |(start, rows)| part.narrow(0, start, rows));
            let tensor = self.tensor(&piece.name)?;
            let (is, expected) = (tensor.size(), part.size());
            ensure!(is == expected, "{}: {} is {is:?}, config.json makes it {expected:?}", self.path.display(), piece.name);
            part.copy_(&tensor);
        }
        Ok(all)
    }

    /// FP8 comes as what it stands for, in FP32: exported again, it is the same FP8.
    fn tensor(&self, name: &str) -> Result<Tensor> {
        let values = self.raw(name)?;
        if values.kind() != Kind::Float8e4m3fn {
            return Ok(values);
        }
        let scales = self.raw(&format!("{name}_scale_inv"))?;
        Ok(Blocks { values, scales }.dequantise(Kind::Float))
    }

    fn raw(&self, name: &str) -> Result<Tensor> {
        let &file = self.tensors.get(name).with_context(|| format!("{} holds no {name}", self.path.display()))?;
        self.files[file].tensor(name)
    }
}
