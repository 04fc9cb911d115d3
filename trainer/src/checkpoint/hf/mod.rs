//! To and from the released layout: a folder that Hugging Face transformers loads as it is. One tensor is in memory at a
//! time, whatever the model's size.
mod import;

pub use import::import;

use super::save::refuse_existing;
use super::{Reader, shard, verify};
use crate::run::resolved;
use anyhow::{Context, Result, ensure};
use kernels::fp8::{ScaleRule, TILE, quantise_blocks};
use model::hf::{Piece, config_json, copies, pieces};
use model::params::{ParamSpec, Role};
use model::{ModelConfig, ParamTable, Stage};
use serde_json::{Value, json};
use std::collections::BTreeMap;
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

/// What they are written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Plain(Kind),
    /// As DeepSeek releases them: what an FP8 run multiplies in FP8 is E4M3 with a `weight_scale_inv` for each 128 × 128
    /// block, quantised from the masters; the rest BF16.
    Fp8,
}

impl Format {
    /// The expert bias is FP32 in every release.
    fn plain(self, spec: &ParamSpec) -> Kind {
        match self {
            Format::Plain(Kind::Double) => Kind::Double,
            _ if !spec.trained() => Kind::Float,
            Format::Plain(kind) => kind,
            Format::Fp8 => Kind::BFloat16,
        }
    }

    fn in_blocks(self, spec: &ParamSpec) -> bool {
        let inside = spec.name.contains(".self_attn.") || spec.name.contains(".mlp.");
        self == Format::Fp8 && inside && matches!(spec.role, Role::Matrix | Role::Experts)
    }
}

/// A released tensor, and how it is made.
struct Released {
    entry: shard::Entry,
    /// The checkpoint's tensor that it is a part of, and that one's shape.
    from: String,
    whole: Vec<i64>,
    piece: Piece,
    part: Part,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Plain,
    /// E4M3 of a matrix in blocks.
    Blocks,
    /// And its FP32 scales.
    Scales,
}

impl Released {
    fn new(spec: &ParamSpec, from: String, piece: Piece, part: Part, format: Format) -> Released {
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

    fn read(&self, reader: &mut Reader) -> Result<Tensor> {
        let value = match (self.piece.expert, self.piece.rows) {
            (None, None) => reader.rows(&self.from, &self.whole, 0, self.whole[0])?,
            (None, Some((start, rows))) => reader.rows(&self.from, &self.whole, start, rows)?,
            (Some(expert), rows) => {
                let matrix = reader.rows(&self.from, &self.whole, expert, 1)?.squeeze_dim(0);
                rows.map_or_else(|| matrix.shallow_clone(), |(start, rows)| matrix.narrow(0, start, rows))
            }
        };
        Ok(match self.part {
            Part::Plain => value.to_kind(self.entry.kind).contiguous(),
            Part::Blocks => quantise_blocks(&value, ScaleRule::Amax).values,
            Part::Scales => quantise_blocks(&value, ScaleRule::Amax).scales.contiguous(),
        })
    }
}

/// What an export came to.
pub struct Exported {
    /// Matrices in FP8 that transformers' own dequantisation cannot read: it takes the blocks of a side that is above 128
    /// and no multiple of it to be equal.
    pub uneven: usize,
}

/// Writes `out`, which must not exist: safetensors, config.json, and the run's tokenizer where it is found.
pub fn export(checkpoint: &Path, out: &Path, format: Format, values: Values) -> Result<Exported> {
    refuse_existing(out)?;
    let manifest = verify(checkpoint)?;
    let mut reader = Reader::open(checkpoint)?;
    let averaged = values == Values::Averaged;
    ensure!(
        !averaged || manifest.tensors.keys().any(|name| name.starts_with("ema/")),
        "{} holds no averages: its run had no [ema] decay",
        checkpoint.display()
    );
    let table = table(&manifest.model);
    let from = |spec: &ParamSpec| format!("{}/{}", if averaged && spec.trained() { "ema" } else { "weight" }, spec.name);
    let mut released: Vec<Released> = Vec::new();
    for spec in table.specs() {
        let parts: &[Part] = if format.in_blocks(spec) { &[Part::Blocks, Part::Scales] } else { &[Part::Plain] };
        for piece in pieces(spec) {
            released.extend(parts.iter().map(|&part| Released::new(spec, from(spec), piece.clone(), part, format)));
        }
    }
    for (name, ours) in copies(&manifest.model) {
        let spec = table.spec(table.find(ours).expect("a copy is of a parameter"));
        released.push(Released::new(spec, from(spec), Piece { name, expert: None, rows: None }, Part::Plain, format));
    }
    let partial = PathBuf::from(format!("{}.partial", out.display()));
    if partial.exists() {
        std::fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    std::fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
    write_files(&partial, &released, &mut reader)?;
    write_json(&partial.join("config.json"), &config(&manifest.model, format))?;
    copy_tokenizer(checkpoint, &partial)?;
    std::fs::rename(&partial, out).with_context(|| format!("cannot rename {} into place", partial.display()))?;
    let uneven =
        |released: &&Released| released.part == Part::Blocks && released.entry.shape.iter().any(|&side| side > TILE && side % TILE != 0);
    Ok(Exported { uneven: released.iter().filter(uneven).count() })
}

fn config(model: &ModelConfig, format: Format) -> Value {
    let dtype = match format {
        Format::Plain(Kind::Double) => "float64",
        Format::Plain(Kind::Float) => "float32",
        _ => "bfloat16",
    };
    let mut config = config_json(model, dtype);
    if format == Format::Fp8 {
        config["quantization_config"] =
            json!({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE]});
    }
    config
}

fn write_files(folder: &Path, released: &[Released], reader: &mut Reader) -> Result<()> {
    let mut files: Vec<Vec<&Released>> = vec![Vec::new()];
    let (mut bytes, mut total) = (0, 0);
    for tensor in released {
        let size = tensor.entry.bytes();
        if bytes > 0 && bytes + size > FILE_BYTES {
            files.push(Vec::new());
            bytes = 0;
        }
        bytes += size;
        total += size;
        files.last_mut().expect("starts with one").push(tensor);
    }
    let count = files.len();
    let mut map = BTreeMap::new();
    for (index, tensors) in files.into_iter().enumerate() {
        let file = if count == 1 { "model.safetensors".into() } else { format!("model-{:05}-of-{count:05}.safetensors", index + 1) };
        map.extend(tensors.iter().map(|tensor| (tensor.entry.name.clone(), file.clone())));
        let entries: Vec<shard::Entry> = tensors.iter().map(|tensor| tensor.entry.clone()).collect();
        shard::write(&folder.join(&file), &entries, |index| tensors[index].read(reader))?;
    }
    if count == 1 {
        return Ok(());
    }
    write_json(&folder.join("model.safetensors.index.json"), &json!({"metadata": {"total_size": total}, "weight_map": map}))
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, serde_json::to_vec_pretty(value)?).with_context(|| format!("cannot write {}", path.display()))
}

/// The run's config says where its corpus is; the tokenizer lies there.
fn copy_tokenizer(checkpoint: &Path, out: &Path) -> Result<()> {
    let Some(run_dir) = checkpoint.parent().and_then(Path::parent) else { return Ok(()) };
    let Ok(text) = std::fs::read_to_string(resolved(run_dir)) else { return Ok(()) };
    let config: crate::RunConfig = toml::from_str(&text).with_context(|| format!("{}", resolved(run_dir).display()))?;
    if let Some(tokenizer) = data::fetch(&config.data.mixture[0].path, "tokenizer.json")? {
        std::fs::write(out.join("tokenizer.json"), tokenizer).with_context(|| format!("cannot write {}", out.display()))?;
        let about = json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
        write_json(&out.join("tokenizer_config.json"), &about)?;
    }
    Ok(())
}
