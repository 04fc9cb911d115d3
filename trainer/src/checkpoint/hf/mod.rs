//! To and from the released layout: a folder that Hugging Face transformers loads as it is. Every core of an export has one tensor
//! in memory at a time, an import what one file has of one, whatever the model's size.
mod files;
mod import;

pub use import::{import, import_in_files};

use super::inspect;
use super::save::{refuse_existing, write_aside};
use crate::config::DataSection;
use crate::run::resolved;
use anyhow::{Context, Result, ensure};
use files::{Part, Released, check_files, write_files};
use kernels::fp8::TILE;
use model::hf::{Piece, config_json, copies, pieces};
use model::params::{ParamSpec, Role};
use model::{ModelConfig, ParamTable, Stage};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;
use tch::Kind;

/// One file of an export or an import holds about so much.
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
    /// block, quantised from the masters; the rest BF16. A run multiplies what its BF16 weights quantise to: of some elements
    /// in a hundred the neighbouring value.
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

/// What an export came to.
pub struct Exported {
    /// Matrices in FP8 that transformers' own dequantisation cannot read: it takes the blocks of a side that is above 128
    /// and no multiple of it to be equal.
    pub uneven: usize,
    /// Of tensors, beside the pass that checks the files they are in.
    pub bytes_read: u64,
    /// Why the run's tokenizer is not with them.
    pub no_tokenizer: Option<String>,
}

/// Writes `out`, which must not exist: safetensors, config.json, and the run's tokenizer where it is found.
pub fn export(checkpoint: &Path, out: &Path, format: Format, values: Values) -> Result<Exported> {
    export_in_files(checkpoint, out, format, values, FILE_BYTES)
}

/// In files of about so many bytes.
pub fn export_in_files(checkpoint: &Path, out: &Path, format: Format, values: Values, file_bytes: usize) -> Result<Exported> {
    refuse_existing(out)?;
    let manifest = inspect(checkpoint)?;
    manifest.model.validate_export().with_context(|| format!("{} cannot be exported", checkpoint.display()))?;
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
    check_files(checkpoint, &manifest, &released)?;
    // Beside it, also where its name ends in a slash.
    let partial = out.with_added_extension("partial");
    let (tokenizer, bytes_read) = write_aside(&partial, out, || {
        let tokenizer = copy_tokenizer(checkpoint, &manifest.tokenizer_blake3, &partial)?; // before the long part: it may be the wrong one
        let bytes_read = write_files(&partial, &released, checkpoint, file_bytes)?;
        let mut config = config(&manifest.model, format);
        if let Ok(end) = tokenizer {
            // Else transformers takes its own default of the model's kind.
            config["eos_token_id"] = json!(end);
        }
        write_json(&partial.join("config.json"), &config)?;
        Ok((tokenizer, bytes_read))
    })?;
    let uneven =
        |released: &&Released| released.part == Part::Blocks && released.entry.shape.iter().any(|&side| side > TILE && side % TILE != 0);
    Ok(Exported { uneven: released.iter().filter(uneven).count(), bytes_read, no_tokenizer: tokenizer.err() })
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

fn write_json(path: &Path, value: &Value) -> Result<()> {
    std::fs::write(path, serde_json::to_vec_pretty(value)?).with_context(|| format!("cannot write {}", path.display()))
}

/// What an export needs of a run's config, whatever version has written it.
#[derive(Deserialize)]
struct OfRun {
    data: DataSection,
}

/// The run's config says where its corpus is; the tokenizer lies there, mostly with a config. `known`: the hash of the one whose
/// tokens the checkpoint knows, where it says so. The token that ends a document; the inner error is why there is none.
fn copy_tokenizer(checkpoint: &Path, known: &str, out: &Path) -> Result<Result<u32, String>> {
    let checkpoint = std::path::absolute(checkpoint)?; // "." has no parent
    let config = resolved(checkpoint.ancestors().nth(2).unwrap_or(Path::new("/")));
    let Ok(text) = std::fs::read_to_string(&config) else { return Ok(Err(format!("{} is not there, which would say where the corpus is", config.display()))) };
    let config: OfRun = toml::from_str(&text).with_context(|| format!("{}", config.display()))?;
    let corpus = &config.data.mixture[0].path;
    // The weights are worth having where the corpus cannot be reached.
    let fetch = |name: &str| data::fetch(corpus, name).map_err(|error| error.to_string());
    let there = |name: &str| fetch(name)?.ok_or_else(|| format!("{}/{name} is not there", corpus.display()));
    let all = || -> Result<_, String> { Ok((there("tokenizer.json")?, there("manifest.json")?, fetch("tokenizer_config.json")?)) };
    let (tokenizer, manifest, about) = match all() {
        Ok(all) => all,
        Err(none) => return Ok(Err(none)),
    };
    let manifest: data::format::manifest::Manifest = serde_json::from_slice(&manifest).with_context(|| format!("{}/manifest.json", corpus.display()))?;
    let (found, expected) = (blake3::hash(&tokenizer).to_hex(), &manifest.tokenizer_blake3);
    ensure!(found.as_str() == expected, "{}/tokenizer.json: its BLAKE3 is {found} where the manifest says {expected}: the model knows another one's tokens", corpus.display());
    if !known.is_empty() && found.as_str() != known {
        return Ok(Err(format!("{}/tokenizer.json is another one: its BLAKE3 is {found}, the checkpoint knows the tokens of {known}", corpus.display())));
    }
    let write = |name: &str, bytes: &[u8]| std::fs::write(out.join(name), bytes).with_context(|| format!("cannot write {}", out.join(name).display()));
    write("tokenizer.json", &tokenizer)?;
    match about {
        Some(about) => write("tokenizer_config.json", &about)?,
        None => write_json(&out.join("tokenizer_config.json"), &json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false}))?,
    }
    Ok(Ok(manifest.end_token))
}
