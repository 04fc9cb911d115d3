//! Files past the page cache: the disk reads and writes memory of ours itself, in whole pages. A checkpoint is not worth the
//! memory that it would take there, and copying it through costs more than hashing it.
use memmap2::{Advice, MmapMut};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Result};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

/// What is read or written at a time; a multiple of a page.
pub const BLOCK: usize = 4 << 20;
/// Blocks that a file under way has, as far as disk and hashing may be apart: few enough to stay in a processor's cache.
const BLOCKS: usize = 4;
/// What is copied and hashed at a time: the second finds it where the first has left it.
pub const PIECE: usize = 256 << 10;
/// Of memory, offsets and lengths; disks want this or less.
pub const PAGE: usize = 4096;

/// Part of a file. In large pages where they fit: a disk reads and writes those at twice the speed.
pub struct Block {
    memory: MmapMut,
    pub at: u64,
    len: usize,
}

impl Block {
    fn new(size: usize) -> Block {
        let memory = MmapMut::map_anon(size).expect("memory for a block");
        let _ = memory.advise(Advice::HugePage); // a kernel without large pages says no
        Block { memory, at: 0, len: 0 }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.memory[..self.len]
    }

    /// As many of `bytes` as there is room for; how many that were.
    pub fn append(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.memory.len() - self.len);
        self.memory[self.len..self.len + count].copy_from_slice(&bytes[..count]);
        self.len += count;
        count
    }

    pub fn full(&self) -> bool {
        self.len == self.memory.len()
    }
}

/// Blocks for one file of so many bytes. They come back through the sender: who takes one waits until there is one.
pub fn blocks(file: u64) -> (Blocks, Sender<Block>) {
    let (used, spare) = channel();
    let size = (file.max(1).next_multiple_of(PAGE as u64) as usize).min(BLOCK);
    (Blocks { size, left: BLOCKS, spare }, used)
}

pub struct Blocks {
    size: usize,
    left: usize,
    spare: Receiver<Block>,
}

impl Blocks {
    /// None: nobody gives any back any more.
    pub fn take(&mut self, at: u64) -> Option<Block> {
        let block = self.spare.try_recv().ok().or_else(|| {
            let fresh = self.left > 0;
            self.left -= fresh as usize;
            if fresh { Some(Block::new(self.size)) } else { self.spare.recv().ok() }
        });
        block.map(|block| Block { at, len: 0, ..block })
    }
}

pub struct Direct {
    file: File,
    /// Not where a file system, of memory mostly, cannot.
    direct: bool,
}

impl Direct {
    pub fn create(path: &Path) -> Result<Direct> {
        Direct::with(OpenOptions::new().write(true).create(true).truncate(true), path)
    }

    pub fn open(path: &Path) -> Result<Direct> {
        Direct::with(OpenOptions::new().read(true), path)
    }

    fn with(options: &mut OpenOptions, path: &Path) -> Result<Direct> {
        match options.custom_flags(libc::O_DIRECT).open(path) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Ok(Direct { file: options.custom_flags(0).open(path)?, direct: false })
            }
            file => Ok(Direct { file: file?, direct: true }),
        }
    }

    pub fn len(&self) -> Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Fills the block with `len` bytes of the file. It starts at a page, and so does the next one or the file ends with it.
    pub fn read(&self, block: &mut Block, len: usize) -> Result<()> {
        let pages = &mut block.memory[..len.next_multiple_of(PAGE)];
        let mut got = 0;
        while got < len {
            match self.file.read_at(&mut pages[got..], block.at + got as u64) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => got += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        block.len = len;
        Ok(())
    }

    /// Only a file's last block may be short of whole pages: `finish` cuts what was written beyond it.
    pub fn write(&self, block: &mut Block) -> Result<()> {
        let len = block.len;
        let padded = if self.direct { len.next_multiple_of(PAGE) } else { len };
        block.memory[len..padded].fill(0);
        self.file.write_all_at(&block.memory[..padded], block.at)
    }

    pub fn finish(self, len: u64) -> Result<()> {
        self.file.set_len(len)?;
        self.file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_any_length_are_written_and_read_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        for folder in [folder.path(), Path::new("/dev/shm")] {
            for len in [0, 1, PAGE - 1, PAGE, 3 * PAGE + 5] {
                let path = folder.join(format!("tiefsee-direct-{}-{len}", std::process::id()));
                let bytes: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
                let (mut blocks, used) = blocks(PAGE as u64);
                let file = Direct::create(&path).unwrap();
                for (index, part) in bytes.chunks(PAGE).enumerate() {
                    let mut block = blocks.take((index * PAGE) as u64).unwrap();
                    assert_eq!(block.append(part), part.len());
                    file.write(&mut block).unwrap();
                    used.send(block).unwrap();
                }
                file.finish(len as u64).unwrap();
                assert_eq!(std::fs::read(&path).unwrap(), bytes);
                let file = Direct::open(&path).unwrap();
                for (index, part) in bytes.chunks(PAGE).enumerate() {
                    let mut block = blocks.take((index * PAGE) as u64).unwrap();
                    file.read(&mut block, part.len()).unwrap();
                    assert_eq!(block.bytes(), part);
                    used.send(block).unwrap();
                }
                std::fs::remove_file(path).unwrap();
            }
        }
    }
}
