//! Tensors to and from safetensors, hashed on the way by a thread of their own: the disk sets the pace.
use anyhow::{Context, Result, ensure};
use kernels::shim::bytes;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::scope;
use tch::{Device, Kind, Tensor};

/// What is hashed and written, or read, at a time.
pub(super) const CHUNK: usize = 4 << 20;
/// Chunks that one side may be ahead of the other.
const AHEAD: usize = 4;

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

/// Writes and syncs the file. `tensor(i)` makes the i-th entry's tensor; a few exist at a time. Widest kinds come first, so
/// that every tensor is aligned.
pub fn write(path: &Path, entries: &[Entry], tensor: impl FnMut(usize) -> Result<Tensor> + Send) -> Result<Summed> {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(entries[index].kind.elt_size_in_bytes()));
    let head = header(order.iter().map(|&index| &entries[index]))?;
    let mut file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let (full, chunks) = sync_channel(AHEAD);
    scope(|scope| {
        let hashing = scope.spawn(move || produce(&head, entries, &order, tensor, |chunk| full.send(chunk).is_ok()));
        let mut bytes = 0;
        let put = || -> std::io::Result<()> {
            for chunk in chunks {
                let chunk = in_memory(&chunk);
                file.write_all(chunk)?;
                bytes += chunk.len() as u64;
            }
            file.sync_all()
        };
        put().with_context(|| format!("cannot write {}", path.display()))?;
        let blake3 = hashing.join().expect("hashing does not panic")?;
        Ok(Summed { bytes, blake3 })
    })
}

fn in_memory(chunk: &Tensor) -> &[u8] {
    bytes(chunk).expect("a run of a contiguous tensor on the host")
}

/// The file's bytes in chunks, and their hash; ends early where nobody takes them any more.
fn produce(
    head: &[u8],
    entries: &[Entry],
    order: &[usize],
    mut tensor: impl FnMut(usize) -> Result<Tensor>,
    take: impl Fn(Tensor) -> bool,
) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(head);
    let mut going = take(Tensor::from_slice(head));
    for &index in order {
        let (entry, tensor) = (&entries[index], tensor(index)?);
        assert_eq!((tensor.kind(), tensor.size()), (entry.kind, entry.shape.clone()), "{} is not what was announced", entry.name);
        let flat = tensor.to_device(Device::Cpu).contiguous().view(-1);
        let (each, numel) = ((CHUNK / entry.kind.elt_size_in_bytes()) as i64, flat.numel() as i64);
        let mut start = 0;
        while going && start < numel {
            let chunk = flat.narrow(0, start, each.min(numel - start));
            start += each;
            hasher.update(in_memory(&chunk));
            going = take(chunk);
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Length and names, as the format has them: what comes after starts at a multiple of eight.
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
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok([&(text.len() as u64).to_le_bytes(), text.as_slice()].concat())
}

/// Of the file as it is now. Two threads read ahead of the hashing, every other chunk each: a disk is faster so.
pub fn sum(path: &Path) -> Result<Summed> {
    let file = &File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let bytes = file.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
    let read = move |start: u64, full: SyncSender<Vec<u8>>, spare: Receiver<Vec<u8>>| -> std::io::Result<()> {
        for at in (start..bytes).step_by(2 * CHUNK) {
            let mut chunk = spare.try_recv().unwrap_or_default();
            chunk.resize((CHUNK as u64).min(bytes - at) as usize, 0);
            file.read_exact_at(&mut chunk, at)?;
            if full.send(chunk).is_err() {
                break;
            }
        }
        Ok(())
    };
    scope(|scope| {
        let readers = [0, CHUNK as u64].map(|start| {
            let ((full, chunks), (used, spare)) = (sync_channel::<Vec<u8>>(AHEAD), channel());
            (scope.spawn(move || read(start, full, spare)), chunks, used)
        });
        let mut hasher = blake3::Hasher::new();
        for (_, chunks, used) in readers.iter().cycle() {
            let Ok(chunk) = chunks.recv() else { break };
            hasher.update(&chunk);
            let _ = used.send(chunk);
        }
        for (reader, chunks, _) in readers {
            drop(chunks);
            reader.join().expect("reading does not panic").with_context(|| format!("cannot read {}", path.display()))?;
        }
        Ok(Summed { bytes, blake3: hasher.finalize().to_hex().to_string() })
    })
}

impl Summed {
    /// The error says how the file at `path` differs from what was written.
    pub fn check(&self, path: &Path) -> Result<()> {
        let length = path.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
        ensure!(length == self.bytes, "{} has {length} bytes, {} were written", path.display(), self.bytes);
        ensure!(sum(path)? == *self, "{} is not what was written: its BLAKE3 differs", path.display());
        Ok(())
    }
}
