//! Documents out of one input file, each handed to a callback. Invariant: memory is bounded by the
//! longest document (and a parquet row group's pages), not by the file.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use arrow::array::{ArrayRef, AsArray};
use arrow::datatypes::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::reader::ChunkReader;

use super::inputs::{InputFile, Kind, Packing};
use super::remote::{RemoteFile, RemoteReader};
use crate::DataError;

/// Documents of a parquet batch.
const BATCH: usize = 256;

/// Calls `each` for every document. False if the file is not text and was passed over.
pub(super) fn read(file: &InputFile, column: &str, each: &mut dyn FnMut(&str)) -> Result<bool, DataError> {
    let result = read_kind(file, column, each);
    // What the store said tells more than what a reader made of it.
    match file.remote.as_ref().and_then(RemoteFile::failure) {
        Some(failure) => Err(failure),
        None => result,
    }
}

fn read_kind(file: &InputFile, column: &str, each: &mut dyn FnMut(&str)) -> Result<bool, DataError> {
    let mut left = file.limit.unwrap_or(u64::MAX);
    // False once the limit is reached.
    let mut take = |text: &str| {
        if !text.is_empty() {
            each(text);
        }
        left = left.saturating_sub(text.len() as u64);
        left > 0
    };
    match (file.kind, &file.remote) {
        (Kind::Text, None) => {
            return Ok(take_text(&fs::read(&file.path).map_err(DataError::io(&file.path, "read"))?, &mut take));
        }
        (Kind::Text, Some(remote)) => return Ok(take_text(&remote.read_all()?, &mut take)),
        (Kind::Parquet, None) => read_parquet(open(&file.path)?, &file.path, column, &mut take)?,
        (Kind::Parquet, Some(remote)) => read_parquet(remote.clone(), &file.path, column, &mut take)?,
        (Kind::Jsonl(packing), remote) => {
            let raw: Box<dyn Read> = match remote {
                Some(remote) => Box::new(RemoteReader::new(remote.clone())),
                None => Box::new(open(&file.path)?),
            };
            let raw = BufReader::with_capacity(1 << 20, raw);
            let lines: Box<dyn Read> = match packing {
                Packing::Plain => Box::new(raw),
                Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(raw)),
                Packing::Zstd => {
                    Box::new(zstd::Decoder::with_buffer(raw).map_err(DataError::io(&file.path, "unpack"))?)
                }
            };
            read_jsonl(&file.path, BufReader::with_capacity(1 << 20, lines), column, &mut take)?;
        }
    }
    Ok(true)
}

fn open(path: &Path) -> Result<File, DataError> {
    File::open(path).map_err(DataError::io(path, "open"))
}

/// False if `bytes` are not text.
fn take_text(bytes: &[u8], take: &mut dyn FnMut(&str) -> bool) -> bool {
    match std::str::from_utf8(bytes) {
        Ok(text) if !bytes.contains(&0) => {
            take(text);
            true
        }
        _ => false,
    }
}

fn read_jsonl(
    path: &Path, mut lines: impl BufRead, key: &str, take: &mut dyn FnMut(&str) -> bool,
) -> Result<(), DataError> {
    let mut line = Vec::new();
    for number in 1u64.. {
        line.clear();
        if lines.read_until(b'\n', &mut line).map_err(DataError::io(path, "read"))? == 0 {
            break;
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let bad =
            |reason: String| DataError::BadInput { path: path.to_owned(), reason: format!("line {number}: {reason}") };
        let value: serde_json::Value = serde_json::from_slice(&line).map_err(|e| bad(e.to_string()))?;
        let text = value.get(key).and_then(|text| text.as_str());
        if !take(text.ok_or_else(|| bad(format!("has no string {key:?}")))?) {
            break;
        }
    }
    Ok(())
}

fn read_parquet(
    file: impl ChunkReader + 'static, path: &Path, column: &str, take: &mut dyn FnMut(&str) -> bool,
) -> Result<(), DataError> {
    let bad = |reason: String| DataError::BadInput { path: path.to_owned(), reason };
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| bad(e.to_string()))?;
    let names: Vec<&str> = builder.schema().fields().iter().map(|field| field.name().as_str()).collect();
    let number = names
        .iter()
        .position(|name| *name == column)
        .ok_or_else(|| bad(format!("has no column {column:?}; it has {}", names.join(", "))))?;
    // Only this column's pages are read.
    let mask = ProjectionMask::roots(builder.parquet_schema(), [number]);
    let reader = builder.with_projection(mask).with_batch_size(BATCH).build().map_err(|e| bad(e.to_string()))?;
    for batch in reader {
        let batch = batch.map_err(|e| bad(e.to_string()))?;
        let texts = texts(batch.column(0))
            .ok_or_else(|| bad(format!("column {column:?} holds no text but {}", batch.column(0).data_type())))?;
        for text in texts.into_iter().flatten() {
            if !take(text) {
                return Ok(());
            }
        }
    }
    Ok(())
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
