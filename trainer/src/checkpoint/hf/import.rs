//! The inverse of an export: a folder in the released layout, FP8 or not, → a checkpoint of weights alone.
use super::{fresh, table};
use crate::checkpoint::manifest::FileEntry;
use crate::checkpoint::read::Opened;
use crate::checkpoint::save::{Place, described, put_in_place, shard_name};
use crate::checkpoint::{Manifest, list, shard};
use crate::run::resolved;
use anyhow::{Context, Result, ensure};
use kernels::Precision;
use kernels::fp8::Blocks;
use model::hf::{parse_config, pieces};
use model::params::ParamSpec;
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tch::{Device, Kind, Tensor};

/// `folder` → RUN_DIR/checkpoints/step-00000000, for `run.init_from`. RUN_DIR must hold neither a run nor an import. Returns
/// the checkpoint.
pub fn import(folder: &Path, run_dir: &Path) -> Result<PathBuf> {
    let used = !list(run_dir)?.is_empty() || resolved(run_dir).exists();
    ensure!(!used, "{} already holds a run or an import: name another folder", run_dir.display());
    let config_path = folder.join("config.json");
    let text = std::fs::read(&config_path).with_context(|| format!("cannot read {}", config_path.display()))?;
    let value: Value = serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", config_path.display()))?;
    let mut model = parse_config(&value).with_context(|| format!("{}", config_path.display()))?;
    let released = Folder::open(folder)?;
    let mtp = format!("model.layers.{}.enorm.weight", model.num_hidden_layers);
    model.num_nextn_predict_layers = released.tensors.contains_key(&mtp) as i64;
    model.validate()?;
    let kind = if released.any_double() { Kind::Double } else { Kind::Float };
    let table = table(&model);
    let entry = |spec: &ParamSpec| shard::Entry { name: format!("weight/{}", spec.name), kind, shape: spec.shape.clone() };
    let entries: Vec<shard::Entry> = table.specs().iter().map(entry).collect();
    let place = Place::of(run_dir, 0);
    fresh(&place.partial)?;
    let name = shard_name(0, 1);
    let specs = table.specs();
    let summed = shard::write(&place.partial.join(&name), &entries, |index| released.assemble(&specs[index], kind))?;
    let described = described(&name, &entries, entries.iter().map(|entry| (0, entry.shape[0])));
    let mut manifest = Manifest::imported(model, if kind == Kind::Double { Precision::F64 } else { Precision::F32 });
    manifest.add(FileEntry { name, bytes: summed.bytes, blake3: summed.blake3 }, described);
    put_in_place(&place, &manifest)?;
    Ok(place.target)
}

/// A released folder: its files, and which of them each tensor is in.
struct Folder {
    path: PathBuf,
    files: Vec<Opened>,
    tensors: HashMap<String, usize>,
}

impl Folder {
    fn open(path: &Path) -> Result<Folder> {
        let entries = std::fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
        let mut folder = Folder { path: path.to_path_buf(), files: Vec::new(), tensors: HashMap::new() };
        for entry in entries {
            let file = entry?.path();
            if file.extension().is_some_and(|extension| extension == "safetensors") {
                let opened = Opened::new(file)?;
                folder.tensors.extend(opened.names().map(|name| (name, folder.files.len())));
                folder.files.push(opened);
            }
        }
        ensure!(!folder.tensors.is_empty(), "{} holds no .safetensors file", path.display());
        Ok(folder)
    }

    fn any_double(&self) -> bool {
        self.tensors.iter().any(|(name, &file)| self.files[file].find(name).is_ok_and(|(_, kind)| kind == Kind::Double))
    }

    /// Our tensor from its released pieces.
    fn assemble(&self, spec: &ParamSpec, kind: Kind) -> Result<Tensor> {
        let whole = Tensor::zeros(&spec.shape, (kind, Device::Cpu));
        for piece in pieces(spec) {
            let part = piece.expert.map_or_else(|| whole.shallow_clone(), |expert| whole.select(0, expert));
            let mut part = piece.rows.map_or_else(|| part.shallow_clone(), |(start, rows)| part.narrow(0, start, rows));
            let tensor = self.tensor(&piece.name)?;
            let (is, expected) = (tensor.size(), part.size());
            ensure!(is == expected, "{}: {} is {is:?}, config.json makes it {expected:?}", self.path.display(), piece.name);
            part.copy_(&tensor);
        }
        Ok(whole)
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
