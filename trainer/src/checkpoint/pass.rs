//! One pass over a file: a thread reads, this one takes what tensors want, and hashes where every byte is read.
use super::direct::{BLOCK, Block, Direct, PAGE, PIECE, blocks};
use super::shard::Summed;
use anyhow::{Context, Result, ensure};
use kernels::shim::bytes_mut;
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::channel;
use std::thread::scope;
use tch::{Device, Kind, Tensor};

/// Numbers of `kind` from byte `first` of a file on, into a flat tensor of any kind and device.
pub struct Wanted {
    first: u64,
    kind: Kind,
    target: Tensor,
}

impl Wanted {
    /// The error says what is wrong with where they are; a sound file has numbers at multiples of their size.
    pub fn new(first: u64, kind: Kind, target: Tensor) -> Result<Wanted> {
        let width = kind.elt_size_in_bytes() as u64;
        ensure!(first.is_multiple_of(width), "begins at byte {first}, which is no multiple of {width}");
        Ok(Wanted { first, kind, target })
    }

    fn range(&self) -> Range<u64> {
        self.first..self.first + (self.target.numel() * self.kind.elt_size_in_bytes()) as u64
    }

    fn touches(&self, here: &Range<u64>) -> bool {
        let all = self.range();
        all.start < here.end && here.start < all.end
    }

    /// What `piece`, from byte `at` of the file on, has of them. It begins and ends between two numbers: at a page or the file's end.
    fn take(&self, at: u64, piece: &[u8]) {
        let (all, here) = (self.range(), at..at + piece.len() as u64);
        if !self.touches(&here) {
            return;
        }
        let (low, high) = (all.start.max(here.start), all.end.min(here.end));
        let width = self.kind.elt_size_in_bytes();
        let bytes = &piece[(low - here.start) as usize..(high - here.start) as usize];
        let mut target = self.target.narrow(0, (low - all.start) as i64 / width as i64, (bytes.len() / width) as i64);
        let same = target.kind() == self.kind;
        match bytes_mut(&mut target).filter(|_| same) {
            Some(target) => target.copy_from_slice(bytes),
            None => {
                let mut read = Tensor::empty([(bytes.len() / width) as i64], (self.kind, Device::Cpu));
                bytes_mut(&mut read).expect("just made").copy_from_slice(bytes);
                // A BF16 weight comes of its master: what is F64 is rounded to F32 first.
                let read = if target.kind() == Kind::BFloat16 { read.to_kind(Kind::Float) } else { read };
                target.copy_(&read);
            }
        }
    }
}

/// All of the file: what is wanted of it, and its hash, which says whether that is good for anything.
pub fn whole(path: &Path, wanted: &[Wanted]) -> Result<Summed> {
    let file = Direct::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let bytes = file.len().with_context(|| format!("cannot read {}", path.display()))?;
    let blake3 = pass(path, &file, std::slice::from_ref(&(0..bytes)), wanted, Some(blake3::Hasher::new()))?.expect("asked for");
    Ok(Summed { bytes, blake3 })
}

/// What is wanted and no more, each byte once; how many they are.
pub fn parts(path: &Path, wanted: &[Wanted]) -> Result<u64> {
    let file = Direct::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let runs = union(wanted.iter().map(Wanted::range).collect());
    pass(path, &file, &runs, wanted, None)?;
    Ok(runs.iter().map(|run| run.end - run.start).sum())
}

/// In order, and none touches another.
fn union(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut runs: Vec<Range<u64>> = Vec::new();
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        match runs.last_mut().filter(|last| range.start <= last.end) {
            Some(last) => last.end = last.end.max(range.end),
            None => runs.push(range),
        }
    }
    runs
}

fn pass(path: &Path, file: &Direct, runs: &[Range<u64>], wanted: &[Wanted], hasher: Option<blake3::Hasher>) -> Result<Option<String>> {
    let longest = runs.iter().map(|run| run.end - run.start).max().unwrap_or(0) + PAGE as u64;
    let (mut spare, used) = blocks(longest);
    let (read, blocks) = channel::<Block>();
    scope(move |scope| {
        let reading = scope.spawn(move || -> std::io::Result<()> {
            for run in runs {
                let first = run.start - run.start % PAGE as u64; // whole pages, as a disk has it
                for at in (first..run.end).step_by(BLOCK) {
                    let Some(mut block) = spare.take(at) else { return Ok(()) };
                    file.read(&mut block, (run.end - at).min(BLOCK as u64) as usize)?;
                    let _ = read.send(block);
                }
            }
            Ok(())
        });
        let mut hasher = hasher;
        for block in blocks {
            let here = block.at..block.at + block.bytes().len() as u64;
            let wanted: Vec<&Wanted> = wanted.iter().filter(|wanted| wanted.touches(&here)).collect();
            for (at, piece) in here.step_by(PIECE).zip(block.bytes().chunks(PIECE)) {
                if let Some(hasher) = &mut hasher {
                    hasher.update(piece);
                }
                wanted.iter().for_each(|wanted| wanted.take(at, piece));
            }
            let _ = used.send(block);
        }
        reading.join().expect("reading does not panic").with_context(|| format!("cannot read {}", path.display()))?;
        Ok(hasher.map(|hasher| hasher.finalize().to_hex().to_string()))
    })
}

#[cfg(test)]
mod tests {
    use super::union;

    #[test]
    fn a_byte_that_several_want_is_in_one_run() {
        let ranges = vec![40..50, 0..10, 10..12, 5..8, 60..60, 45..55];
        assert_eq!(union(ranges), [0..12, 40..55]);
    }
}
