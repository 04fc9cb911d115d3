//! Ranges of local files, into buffers that are used again. A row group is megabytes; to get fresh memory for
//! each, and to zero it as `GetResult::bytes` does, would be a third of all that a reader of a warm corpus does.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use bytes::Bytes;

/// Empty buffers kept for the next reads, at most.
const KEPT: usize = 4;
const ROUND: u64 = 1 << 20;

/// Buffers that come back when the last slice of their bytes is dropped.
#[derive(Clone, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

impl Buffers {
    /// Up to the end of the file, if that comes first.
    pub fn read(&self, file: &mut File, range: Range<u64>) -> io::Result<Bytes> {
        let length = range.end - range.start;
        let kept = self.0.lock().expect("no holder of this lock panics").pop();
        let mut buffer = Borrowed { bytes: kept.unwrap_or_default(), home: self.clone() };
        file.seek(SeekFrom::Start(range.start))?;
        // Rounded up, so that the next, slightly longer range fits too.
        buffer.bytes.reserve_exact(length.next_multiple_of(ROUND) as usize);
        file.take(length).read_to_end(&mut buffer.bytes)?;
        Ok(Bytes::from_owner(buffer))
    }
}

struct Borrowed {
    bytes: Vec<u8>,
    home: Buffers,
}

impl AsRef<[u8]> for Borrowed {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        if let Ok(mut kept) = self.home.0.lock()
            && kept.len() < KEPT
        {
            kept.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_right_and_buffers_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let (path, buffers) = (folder.path().join("file"), Buffers::default());
        let content: Vec<u8> = (0..1000u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(&path, &content).unwrap();
        let mut file = File::open(&path).unwrap();
        let first = buffers.read(&mut file, 8..100).unwrap();
        let slice = first.slice(10..20);
        drop(first);
        assert_eq!(buffers.0.lock().unwrap().len(), 0, "a slice still needs it");
        assert_eq!((&slice[..], slice.len()), (&content[18..28], 10));
        drop(slice);
        assert_eq!(buffers.0.lock().unwrap().len(), 1);
        // A larger range into the same buffer, a smaller one, and one past the end.
        for range in [0..4000, 3..5, 3990..5000] {
            let read = buffers.read(&mut file, range.clone()).unwrap();
            assert_eq!(read, content[range.start as usize..(range.end as usize).min(4000)]);
        }
        assert_eq!(buffers.0.lock().unwrap().len(), 1);
    }
}
