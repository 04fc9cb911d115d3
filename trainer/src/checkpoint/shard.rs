//! Tensors to and from safetensors.
use anyhow::{Context, Result, bail};
use safetensors::tensor::{Dtype, View};
use safetensors::{SafeTensors, serialize_to_file};
use std::borrow::Cow;
use std::path::Path;
use tch::{Kind, Tensor};

pub fn dtype(kind: Kind) -> Dtype {
    match kind {
        Kind::Double => Dtype::F64,
        Kind::Float => Dtype::F32,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Int64 => Dtype::I64,
        other => panic!("a checkpoint holds no {other:?}"),
    }
}

pub fn kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F64 => Some(Kind::Double),
        Dtype::F32 => Some(Kind::Float),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::I64 => Some(Kind::Int64),
        _ => None,
    }
}

/// A contiguous host tensor as safetensors sees it: bytes are copied out one tensor at a time.
struct Bytes {
    tensor: Tensor,
    shape: Vec<usize>,
}

impl View for Bytes {
    fn dtype(&self) -> Dtype {
        dtype(self.tensor.kind())
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0u8; self.data_len()];
        self.tensor.copy_data_u8(&mut bytes, self.tensor.numel());
        Cow::Owned(bytes)
    }
    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

/// Writes and syncs the file. A zero-dim or empty tensor is fine.
pub fn write(path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let views = tensors.into_iter().map(|(name, tensor)| {
        let tensor = tensor.to_device(tch::Device::Cpu).contiguous();
        let shape = tensor.size().iter().map(|&n| n as usize).collect();
        (name, Bytes { tensor, shape })
    });
    let metadata = [("format".to_string(), "pt".to_string())].into();
    serialize_to_file(views, Some(metadata), path).with_context(|| format!("cannot write {}", path.display()))?;
    std::fs::File::open(path)?.sync_all().with_context(|| format!("cannot sync {}", path.display()))
}

/// Every tensor of a safetensors file's bytes.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<(String, Tensor)>> {
    let file = SafeTensors::deserialize(bytes).with_context(|| format!("{} is not a safetensors file", path.display()))?;
    let mut tensors = Vec::new();
    for (name, view) in file.tensors() {
        let Some(kind) = kind(view.dtype()) else { bail!("{}: {name} is {:?}, which is not read here", path.display(), view.dtype()) };
        let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
        tensors.push((name.to_string(), Tensor::from_data_size(view.data(), &shape, kind)));
    }
    Ok(tensors)
}
