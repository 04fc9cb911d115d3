//! Tensors to safetensors, hashed on the way: the disk sets the pace.
use super::direct::{Block, Blocks, Direct, PAGE, PIECE, blocks};
use super::pass::{Wanted, whole};
use anyhow::{Context, Result, ensure};
use kernels::shim::bytes;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::collections::HashSet;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::thread::scope;
use tch::{Device, Kind, Tensor};

pub fn dtype(kind: Kind) -> Dtype {
    match kind {
        Kind::Double => Dtype::F64,
        Kind::Float => Dtype::F32,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Int64 => Dtype::I64,
        Kind::Float8e4m3fn => Dtype::F8_E4M3,
        other => panic!("a checkpoint holds no {other:?}"),
    }
}

pub fn kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F64 => Some(Kind::Double),
        Dtype::F32 => Some(Kind::Float),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::I64 => Some(Kind::Int64),
        Dtype::F8_E4M3 => Some(Kind::Float8e4m3fn),
        _ => None,
    }
}

/// Of a manifest's `dtype`.
pub fn kind_named(name: &str) -> Option<Kind> {
    serde_json::from_value(serde_json::Value::String(name.to_string())).ok().and_then(kind)
}

/// A tensor of a file to be written.
#[derive(Clone, Debug)]
pub struct Entry {
    pub name: String,
    pub kind: Kind,
    pub shape: Vec<i64>,
}

impl Entry {
    pub fn of(name: impl Into<String>, tensor: &Tensor) -> Entry {
        Entry { name: name.into(), kind: tensor.kind(), shape: tensor.size() }
    }

    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<i64>() as usize * self.kind.elt_size_in_bytes()
    }
}

/// Length and BLAKE3 of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summed {
    pub bytes: u64,
    pub blake3: String,
}

/// Writes and syncs the file. `tensor(i)` makes the i-th entry's tensor; one exists at a time. Widest kinds come first, so that
/// every tensor is aligned.
pub fn write(path: &Path, entries: &[Entry], tensor: impl FnMut(usize) -> Result<Tensor> + Send) -> Result<Summed> {
    write_in_order(path, entries, widest_first(entries), tensor)
}

/// In the entries' own order, where every tensor is aligned in that too.
pub fn write_as_given(path: &Path, entries: &[Entry], tensor: impl FnMut(usize) -> Result<Tensor> + Send) -> Result<Summed> {
    let widest = entries.iter().map(|entry| entry.kind.elt_size_in_bytes()).max().unwrap_or(1);
    let aligned = entries.iter().all(|entry| entry.bytes().is_multiple_of(widest));
    write_in_order(path, entries, if aligned { (0..entries.len()).collect() } else { widest_first(entries) }, tensor)
}

fn widest_first(entries: &[Entry]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(entries[index].kind.elt_size_in_bytes()));
    order
}

/// One thread fills and hashes blocks, this one writes.
fn write_in_order(path: &Path, entries: &[Entry], order: Vec<usize>, tensor: impl FnMut(usize) -> Result<Tensor> + Send) -> Result<Summed> {
    let head = header(order.iter().map(|&index| &entries[index]))?;
    let bytes = (head.len() + entries.iter().map(Entry::bytes).sum::<usize>()) as u64;
    let file = Direct::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let ((spare, used), (filled, blocks)) = (blocks(bytes), channel());
    scope(move |scope| {
        let filling = scope.spawn(move || Filling::new(spare, filled).all(&head, entries, &order, tensor));
        let put = move || -> std::io::Result<()> {
            for mut block in blocks {
                file.write(&mut block)?;
                let _ = used.send(block);
            }
            file.finish(bytes)
        };
        put().with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Summed { bytes, blake3: filling.join().expect("filling does not panic")? })
    })
}

/// A file's bytes, a block at a time, and their hash; ends early where nobody takes them any more.
struct Filling {
    spare: Blocks,
    filled: Sender<Block>,
    block: Option<Block>,
    at: u64,
    hasher: blake3::Hasher,
}

impl Filling {
    fn new(mut spare: Blocks, filled: Sender<Block>) -> Filling {
        Filling { block: spare.take(0), spare, filled, at: 0, hasher: blake3::Hasher::new() }
    }

    fn all(mut self, head: &[u8], entries: &[Entry], order: &[usize], mut tensor: impl FnMut(usize) -> Result<Tensor>) -> Result<String> {
        self.append(head);
        for &index in order {
            let (entry, tensor) = (&entries[index], tensor(index)?);
            assert_eq!((tensor.kind(), tensor.size()), (entry.kind, entry.shape.clone()), "{} is not what was announced", entry.name);
            let here = tensor.to_device(Device::Cpu).contiguous();
            self.append(bytes(&here).expect("contiguous and on the host"));
        }
        self.block.into_iter().for_each(|last| drop(self.filled.send(last)));
        Ok(self.hasher.finalize().to_hex().to_string())
    }

    fn append(&mut self, mut bytes: &[u8]) {
        while let Some(block) = self.block.as_mut().filter(|_| !bytes.is_empty()) {
            let (piece, rest) = bytes.split_at(block.append(&bytes[..bytes.len().min(PIECE)]));
            self.hasher.update(piece);
            (bytes, self.at) = (rest, self.at + piece.len() as u64);
            if block.full() {
                let full = std::mem::replace(&mut self.block, self.spare.take(self.at));
                full.into_iter().for_each(|block| drop(self.filled.send(block)));
            }
        }
    }
}

/// Length and names, as the format has them. What comes after must start at a multiple of eight. It starts where large
/// tensors lie in their pages, a cache line behind one's beginning: anywhere else, copying them costs up to twice the time.
fn header<'a>(entries: impl Iterator<Item = &'a Entry>) -> Result<Vec<u8>> {
    let mut at = 0;
    let mut names = HashSet::new();
    let info = |entry: &Entry| {
        ensure!(names.insert(entry.name.clone()), "two tensors are named {}", entry.name);
        let data_offsets = (at, at + entry.bytes());
        at = data_offsets.1;
        let shape = entry.shape.iter().map(|&n| n as usize).collect();
        Ok((entry.name.clone(), TensorInfo { dtype: dtype(entry.kind), shape, data_offsets }))
    };
    let tensors = entries.map(info).collect::<Result<_>>()?;
    let metadata = Metadata::new(Some([("format".to_string(), "pt".to_string())].into()), tensors)?;
    let mut text = serde_json::to_vec(&metadata)?;
    text.resize((8 + text.len()).next_multiple_of(PAGE) + 64 - 8, b' ');
    Ok([&(text.len() as u64).to_le_bytes(), text.as_slice()].concat())
}

impl Summed {
    /// The error says how the file at `path` differs from what was written. Takes what is wanted of it on the way: good for
    /// nothing where this fails.
    pub fn check(&self, path: &Path, wanted: &[Wanted]) -> Result<()> {
        let length = path.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
        ensure!(length == self.bytes, "{} has {length} bytes, {} were written", path.display(), self.bytes);
        ensure!(whole(path, wanted)? == *self, "{} is not what was written: its BLAKE3 differs", path.display());
        Ok(())
    }
}
