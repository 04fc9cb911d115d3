//! To and from the released layout: a folder that Hugging Face transformers loads as it is.
use super::{load, manifest::Manifest, save, shard};
use crate::run::resolved;
use crate::state::StatePart;
use anyhow::{Context, Result, ensure};
use kernels::Precision;
use model::hf::{config_json, copies, parse_config, pieces};
use model::params::ParamSpec;
use model::{ModelConfig, ParamTable, Stage};
use parallel::comm::Comm;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// One file of an export holds about so much.
const FILE_BYTES: usize = 4 << 30;

fn table(config: &ModelConfig) -> ParamTable {
    let mut table = ParamTable::default();
    Stage::whole(&mut table, config);
    table
}

/// Which of a checkpoint's values are the released weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    Newest,
    /// Their moving average; expert biases, which are not averaged, are the newest.
    Averaged,
}

/// Writes `out`, which must not exist: safetensors of `kind`, config.json, and the run's tokenizer where it is found.
pub fn export(checkpoint: &Path, out: &Path, kind: Kind, values: Values) -> Result<()> {
    ensure!(!out.exists(), "{} exists already", out.display());
    let averaged = values == Values::Averaged;
    let (manifest, tensors) = load(checkpoint, |name| name.starts_with("weight/") || averaged && name.starts_with("ema/"))?;
    ensure!(
        !averaged || tensors.keys().any(|name| name.starts_with("ema/")),
        "{} holds no averages: its run had no [ema] decay",
        checkpoint.display()
    );
    let table = table(&manifest.model);
    let value = |spec: &ParamSpec| {
        let name = format!("{}/{}", if averaged && spec.trained() { "ema" } else { "weight" }, spec.name);
        tensors.get(&name).with_context(|| format!("{} holds no {name}", checkpoint.display()))
    };
    let mut released: Vec<(String, Tensor)> = Vec::new();
    for spec in table.specs() {
        let whole = value(spec)?;
        for piece in pieces(spec) {
            let part = piece.expert.map_or_else(|| whole.shallow_clone(), |expert| whole.select(0, expert));
            let part = piece.rows.map_or_else(|| part.shallow_clone(), |(start, rows)| part.narrow(0, start, rows));
            // The expert bias is FP32 in every release.
            let kind = if spec.trained() || kind == Kind::Double { kind } else { Kind::Float };
            released.push((piece.name, part.to_kind(kind).contiguous()));
        }
    }
    for (name, ours) in copies(&manifest.model) {
        let spec = table.spec(table.find(ours).expect("a copy is of a parameter"));
        released.push((name, value(spec)?.to_kind(kind)));
    }
    let partial = PathBuf::from(format!("{}.partial", out.display()));
    if partial.exists() {
        std::fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    std::fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
    write_files(&partial, released)?;
    let dtype = match kind {
        Kind::BFloat16 => "bfloat16",
        Kind::Double => "float64",
        _ => "float32",
    };
    std::fs::write(partial.join("config.json"), serde_json::to_vec_pretty(&config_json(&manifest.model, dtype))?)?;
    copy_tokenizer(checkpoint, &partial)?;
    std::fs::rename(&partial, out).with_context(|| format!("cannot rename {} into place", partial.display()))
}

fn write_files(folder: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let mut files: Vec<Vec<(String, Tensor)>> = vec![Vec::new()];
    let (mut bytes, mut total) = (0, 0);
    for (name, tensor) in tensors {
        let size = tensor.numel() * tensor.kind().elt_size_in_bytes();
        if bytes > 0 && bytes + size > FILE_BYTES {
            files.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        total += size;
        files.last_mut().expect("starts with one").push((name, tensor));
    }
    if files.len() == 1 {
        return shard::write(&folder.join("model.safetensors"), files.pop().expect("one"));
    }
    let count = files.len();
    let mut map = BTreeMap::new();
    for (index, tensors) in files.into_iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", index + 1);
        map.extend(tensors.iter().map(|(name, _)| (name.clone(), file.clone())));
        shard::write(&folder.join(&file), tensors)?;
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    Ok(std::fs::write(folder.join("model.safetensors.index.json"), serde_json::to_vec_pretty(&index)?)?)
}

/// The run's config says where its corpus is; the tokenizer lies there.
fn copy_tokenizer(checkpoint: &Path, out: &Path) -> Result<()> {
    let Some(run_dir) = checkpoint.parent().and_then(Path::parent) else { return Ok(()) };
    let Ok(text) = std::fs::read_to_string(resolved(run_dir)) else { return Ok(()) };
    let config: crate::RunConfig = toml::from_str(&text).with_context(|| format!("{}", resolved(run_dir).display()))?;
    if let Some(tokenizer) = data::fetch(&config.data.mixture[0].path, "tokenizer.json")? {
        std::fs::write(out.join("tokenizer.json"), tokenizer).with_context(|| format!("cannot write {}", out.display()))?;
        let about = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
        std::fs::write(out.join("tokenizer_config.json"), serde_json::to_vec_pretty(&about)?)?;
    }
    Ok(())
}

/// The inverse: a folder in the released layout → RUN_DIR/checkpoints/step-00000000 with weights alone, for
/// `run.init_from`. Returns the checkpoint.
pub fn import(folder: &Path, run_dir: &Path, world: &Comm) -> Result<PathBuf> {
    let config_path = folder.join("config.json");
    let text = std::fs::read(&config_path).with_context(|| format!("cannot read {}", config_path.display()))?;
    let value: Value = serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", config_path.display()))?;
    let mut model = parse_config(&value).with_context(|| format!("{}", config_path.display()))?;
    let released = read_folder(folder)?;
    let mtp = format!("model.layers.{}.enorm.weight", model.num_hidden_layers);
    model.num_nextn_predict_layers = released.contains_key(&mtp) as i64;
    model.validate()?;
    let kind = if released.values().any(|tensor| tensor.kind() == Kind::Double) { Kind::Double } else { Kind::Float };
    let mut parts = Vec::new();
    for spec in table(&model).specs() {
        let whole = Tensor::zeros(&spec.shape, (kind, tch::Device::Cpu));
        for piece in pieces(spec) {
            let part = piece.expert.map_or_else(|| whole.shallow_clone(), |expert| whole.select(0, expert));
            let mut part = piece.rows.map_or_else(|| part.shallow_clone(), |(start, rows)| part.narrow(0, start, rows));
            let tensor = released.get(&piece.name).with_context(|| format!("{} holds no {}", folder.display(), piece.name))?;
            ensure!(
                tensor.size() == part.size(),
                "{}: {} is {:?}, config.json makes it {:?}",
                folder.display(),
                piece.name,
                tensor.size(),
                part.size()
            );
            part.copy_(tensor);
        }
        parts.push(StatePart { name: format!("weight/{}", spec.name), tensor: whole, start: 0, total: spec.total });
    }
    let precision = if kind == Kind::Double { Precision::F64 } else { Precision::F32 };
    save(&**world, run_dir, Manifest::imported(model, precision), parts, usize::MAX)
}

fn read_folder(folder: &Path) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    let entries = std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            tensors.extend(shard::parse(&path, &bytes)?);
        }
    }
    ensure!(!tensors.is_empty(), "{} holds no .safetensors file", folder.display());
    Ok(tensors)
}
