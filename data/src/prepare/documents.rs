//! Documents out of one input file, each handed to a callback. Invariants: memory is bounded by the
//! longest document (and a parquet row group's pages), not by the file; what gives no document is counted.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use arrow::array::{ArrayRef, AsArray};
use arrow::datatypes::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::reader::ChunkReader;
use serde_json::Value;

use super::inputs::{InputFile, Kind, Packing};
use super::remote::{OpenFile, RemoteFile, RemoteReader};
use crate::DataError;

/// Documents of a parquet batch.
const BATCH: usize = 256;

/// A document is encoded in one piece, and its ids, four bytes each, make one page of a shard, which holds less than 2^31.
const LONGEST_DOCUMENT: u64 = 1 << 28;

/// With room for what JSON writes in more letters.
const LONGEST_LINE: u64 = 1 << 30;

/// The mark that some editors begin a UTF-8 file with.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// What was met in a file.
#[derive(Default)]
pub(super) struct Met {
    /// The file is not text and was passed over.
    pub not_text: bool,
    /// Lines of JSONL that are not blank.
    pub lines: u64,
    /// Those that give no text, and what is wrong with the first.
    pub bad_lines: u64,
    pub first_bad: Option<String>,
    /// Texts of no length, and nulls.
    pub empty: u64,
}

/// Takes a document and its number in the file.
type Each<'a> = &'a mut dyn FnMut(u64, &str) -> Result<(), DataError>;

/// Calls `each` for every document.
pub(super) fn read(file: &InputFile, column: &str, each: Each) -> Result<Met, DataError> {
    let remote = file.remote.as_ref().map(RemoteFile::open);
    let mut reader = Reader { file, column, each, left: file.limit.unwrap_or(u64::MAX), met: Met::default() };
    let result = reader.read(remote.as_ref());
    // What the store said tells more than what a reader made of it.
    match remote.and_then(|remote| remote.failure()) {
        Some(failure) => Err(failure),
        None => result.map(|()| reader.met),
    }
}

struct Reader<'a> {
    file: &'a InputFile,
    column: &'a str,
    each: Each<'a>,
    left: u64,
    met: Met,
}

impl Reader<'_> {
    fn read(&mut self, remote: Option<&OpenFile>) -> Result<(), DataError> {
        let path = &self.file.path;
        match (self.file.kind, remote) {
            (Kind::Text, remote) => {
                self.fits(1, self.file.bytes)?;
                match remote {
                    None => self.read_text(&fs::read(path).map_err(DataError::io(path, "read"))?),
                    Some(remote) => self.read_text(&remote.read_all()?),
                }
            }
            (Kind::Parquet, None) => self.read_parquet(open(path)?),
            (Kind::Parquet, Some(remote)) => self.read_parquet(remote.clone()),
            (Kind::Jsonl(packing), remote) => {
                let raw: Box<dyn Read> = match remote {
                    Some(remote) => Box::new(RemoteReader::new(remote.clone())),
                    None => Box::new(open(path)?),
                };
                let raw = BufReader::with_capacity(1 << 20, raw);
                let lines: Box<dyn Read> = match packing {
                    Packing::Plain => Box::new(raw),
                    Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(raw)),
                    Packing::Zstd => Box::new(zstd::Decoder::with_buffer(raw).map_err(DataError::io(path, "unpack"))?),
                };
                self.read_jsonl(BufReader::with_capacity(1 << 20, lines))
            }
        }
    }

    /// False once the limit is reached.
    fn take(&mut self, number: u64, text: &str) -> Result<bool, DataError> {
        match text.is_empty() {
            true => self.met.empty += 1,
            false => {
                self.fits(number, text.len() as u64)?;
                (self.each)(number, text)?;
            }
        }
        self.left = self.left.saturating_sub(text.len() as u64);
        Ok(self.left > 0)
    }

    fn fits(&self, number: u64, bytes: u64) -> Result<(), DataError> {
        if bytes <= LONGEST_DOCUMENT {
            return Ok(());
        }
        let hint = if self.file.kind == Kind::Text { "; --max-file-bytes leaves such files out" } else { "" };
        Err(self.bad(format!("{}a document of {bytes} bytes, the limit is {LONGEST_DOCUMENT}{hint}", self.file.place(number))))
    }

    fn bad(&self, reason: String) -> DataError {
        DataError::BadInput { path: self.file.path.clone(), reason }
    }

    fn read_text(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        match std::str::from_utf8(bytes) {
            Ok(text) if !bytes.contains(&0) => _ = self.take(1, text)?,
            _ => self.met.not_text = true,
        }
        Ok(())
    }

    fn read_jsonl(&mut self, mut lines: impl BufRead) -> Result<(), DataError> {
        let mut line = Vec::new();
        for number in 1u64.. {
            line.clear();
            let read = lines.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line);
            match read.map_err(DataError::io(&self.file.path, "read"))? as u64 {
                0 => break,
                LONGEST_LINE => return Err(self.bad(format!("line {number}: longer than {LONGEST_LINE} bytes"))),
                _ => {}
            }
            let json = if number == 1 { line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&line) } else { &line };
            if json.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            self.met.lines += 1;
            match text_of(json, self.column) {
                Ok(text) => {
                    if !self.take(number, &text)? {
                        break;
                    }
                }
                Err(reason) => {
                    self.met.bad_lines += 1;
                    self.met.first_bad.get_or_insert_with(|| format!("line {number}: {reason}"));
                }
            }
        }
        Ok(())
    }

    fn read_parquet(&mut self, file: impl ChunkReader + 'static) -> Result<(), DataError> {
        let column = self.column;
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| self.bad(e.to_string()))?;
        let names: Vec<&str> = builder.schema().fields().iter().map(|field| field.name().as_str()).collect();
        let found = names.iter().position(|name| *name == column);
        let found = found.ok_or_else(|| self.bad(format!("has no column {column:?}; it has {}", names.join(", "))))?;
        // Only this column's pages are read.
        let mask = ProjectionMask::roots(builder.parquet_schema(), [found]);
        let reader = builder.with_projection(mask).with_batch_size(BATCH).build().map_err(|e| self.bad(e.to_string()))?;
        let mut number = 0;
        for batch in reader {
            let batch = batch.map_err(|e| self.bad(e.to_string()))?;
            let texts = texts(batch.column(0))
                .ok_or_else(|| self.bad(format!("column {column:?} holds no text but {}", batch.column(0).data_type())))?;
            for text in texts {
                number += 1;
                if !self.take(number, text.unwrap_or_default())? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<File, DataError> {
    File::open(path).map_err(DataError::io(path, "open"))
}

/// The text of a line; of a null, as of a null in parquet, none.
fn text_of(json: &[u8], key: &str) -> Result<String, String> {
    let mut value: Value = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    match value.get_mut(key).map(Value::take) {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Null) => Ok(String::new()),
        Some(_) => Err(format!("{key:?} is no string")),
        None => Err(format!("has no {key:?}")),
    }
}

/// The rows of a text column in any of arrow's layouts; None in place of a null.
fn texts(column: &ArrayRef) -> Option<Vec<Option<&str>>> {
    match column.data_type() {
        DataType::Utf8 => Some(column.as_string::<i32>().iter().collect()),
        DataType::LargeUtf8 => Some(column.as_string::<i64>().iter().collect()),
        DataType::Utf8View => Some(column.as_string_view().iter().collect()),
        _ => None,
    }
}
