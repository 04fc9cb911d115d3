//! Reading: nothing is taken from a file whose hash is not the manifest's.
use super::manifest::{FORMAT, FileEntry, Manifest};
use super::shard;
use anyhow::{Context, Result, bail, ensure};
use std::collections::HashMap;
use std::path::Path;
use tch::{Device, Tensor};

pub(super) fn read_manifest(checkpoint: &Path) -> Result<Manifest> {
    let path = checkpoint.join("manifest.json");
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let manifest: Manifest = serde_json::from_slice(&bytes).with_context(|| format!("{} is not a checkpoint manifest", path.display()))?;
    ensure!(manifest.format == FORMAT, "{}: format `{}`, expected `{FORMAT}`", path.display(), manifest.format);
    Ok(manifest)
}

/// The bytes of one file, if they are the ones that were written.
fn read_file(checkpoint: &Path, entry: &FileEntry) -> Result<Vec<u8>> {
    let path = checkpoint.join(&entry.name);
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    if bytes.len() as u64 != entry.bytes {
        bail!("{} has {} bytes, the manifest says {}", path.display(), bytes.len(), entry.bytes);
    }
    ensure!(blake3::hash(&bytes).to_hex().as_str() == entry.blake3, "{} is not what was written: its BLAKE3 differs from the manifest's", path.display());
    Ok(bytes)
}

/// Every file present, whole and unchanged, and every tensor complete.
pub fn verify(checkpoint: &Path) -> Result<Manifest> {
    let manifest = read_manifest(checkpoint)?;
    for entry in &manifest.files {
        let bytes = read_file(checkpoint, entry)?;
        shard::parse(&checkpoint.join(&entry.name), &bytes)?;
    }
    for (name, tensor) in &manifest.tensors {
        let rows: i64 = tensor.slices.iter().map(|slice| slice.rows).sum();
        let expected = tensor.shape.first().copied().unwrap_or(1);
        ensure!(rows == expected, "{}: {name} has {rows} of {expected} rows", checkpoint.display());
    }
    Ok(manifest)
}

/// The tensors whose name `wanted` accepts, whole, on the CPU.
pub fn load(checkpoint: &Path, wanted: impl Fn(&str) -> bool) -> Result<(Manifest, HashMap<String, Tensor>)> {
    let manifest = read_manifest(checkpoint)?;
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    for entry in &manifest.files {
        let path = checkpoint.join(&entry.name);
        for (name, piece) in shard::parse(&path, &read_file(checkpoint, entry)?)? {
            if !wanted(&name) {
                continue;
            }
            let logical = manifest.tensors.get(&name).with_context(|| format!("{} holds {name}, which the manifest does not know", path.display()))?;
            if logical.slices.len() == 1 {
                tensors.insert(name, piece);
                continue;
            }
            let slice = logical.slices.iter().find(|slice| slice.file == entry.name).with_context(|| format!("the manifest has no slice of {name} in {}", entry.name))?;
            let whole = tensors.entry(name).or_insert_with(|| Tensor::empty(&logical.shape, (piece.kind(), Device::Cpu)));
            whole.narrow(0, slice.start, slice.rows).copy_(&piece);
        }
    }
    Ok((manifest, tensors))
}
