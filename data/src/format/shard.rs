//! Token shards: parquet files with one row per document.
//!
//! Schema: `message tokens { required binary tokens; }`. A value is the ids of one document as
//! little-endian u32, its end token included; PLAIN encoding, no dictionary, no statistics,
//! uncompressed, so that a row group is one contiguous run of bytes. The footer is that of any
//! parquet file (pyarrow, DuckDB and polars read it), but the loader does not need it: offset,
//! length and XXH3 of each row group are in the index, so a read is one ranged request.
//! XXH3 finds damage and mistakes as surely as BLAKE3, which would be a third of all that a reader does.

use std::io::{Read, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use parquet::basic::{Compression, Encoding};
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterPropertiesPtr};
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::{ColumnDescPtr, SchemaDescriptor, TypePtr};
use twox_hash::XxHash3_128;

use crate::DataError;

const SCHEMA: &str = "message tokens { required binary tokens; }";
/// Pages of a mebibyte: large enough that their headers cost nothing, small enough to decode in cache.
const PAGE_BYTES: usize = 1 << 20;

/// What the index keeps of one row group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowGroupInfo {
    pub tokens: u64,
    pub documents: u32,
    /// Where the column chunk lies in the file.
    pub offset: u64,
    pub bytes: u64,
    /// XXH3-128 of those bytes.
    pub xxh3: u128,
}

/// Documents of one row group, as they lie in the bytes that were read: a token is copied once, into the sample.
#[derive(Clone, Debug, Default)]
pub struct RowGroup {
    /// A document's ids as little-endian u32.
    documents: Vec<ByteArray>,
    /// Where each document begins among the group's tokens.
    pub starts: Vec<u32>,
}

impl RowGroup {
    /// Appends the tokens of `range`.
    pub fn copy(&self, range: Range<usize>, tokens: &mut Vec<u32>) {
        let first = self.starts.partition_point(|start| *start as usize <= range.start).saturating_sub(1);
        for (document, start) in self.documents[first..].iter().zip(&self.starts[first..]) {
            let (words, start) = (document.data().as_chunks::<4>().0, *start as usize);
            if start >= range.end {
                break;
            }
            let inside = &words[range.start.saturating_sub(start)..words.len().min(range.end - start)];
            tokens.extend(inside.iter().map(|word| u32::from_le_bytes(*word)));
        }
    }
}

/// Writes one shard. The bytes go to `sink`; naming, fsync and rename are the caller's.
pub struct ShardWriter<W: Write + Send> {
    writer: SerializedFileWriter<Hashing<W>>,
    rows: Vec<ByteArray>,
    row_tokens: u64,
    row_group_tokens: u64,
    groups: Vec<RowGroupInfo>,
}

impl<W: Write + Send> ShardWriter<W> {
    /// A row group is closed when it holds at least `row_group_tokens` tokens.
    pub fn new(sink: W, row_group_tokens: u64) -> ParquetResult<ShardWriter<W>> {
        let sink = Hashing { inner: sink, hasher: XxHash3_128::new(), written: 0 };
        let writer = SerializedFileWriter::new(sink, schema()?, properties())?;
        Ok(ShardWriter { writer, rows: Vec::new(), row_tokens: 0, row_group_tokens, groups: Vec::new() })
    }

    /// Appends one document: its ids as little-endian u32.
    pub fn push(&mut self, document: Bytes) -> ParquetResult<()> {
        debug_assert!(document.len().is_multiple_of(4), "a token is four bytes");
        self.row_tokens += document.len() as u64 / 4;
        self.rows.push(document.into());
        if self.row_tokens >= self.row_group_tokens { self.close_group() } else { Ok(()) }
    }

    /// Writes the footer; returns the sink, the row groups and the length of the file.
    pub fn finish(mut self) -> ParquetResult<(W, Vec<RowGroupInfo>, u64)> {
        if !self.rows.is_empty() {
            self.close_group()?;
        }
        let sink = self.writer.into_inner()?;
        Ok((sink.inner, self.groups, sink.written))
    }

    fn close_group(&mut self) -> ParquetResult<()> {
        // What is still buffered belongs to the bytes before this group.
        self.writer.flush()?;
        let offset = self.writer.bytes_written() as u64;
        self.writer.inner_mut().hasher = XxHash3_128::new();
        let mut group = self.writer.next_row_group()?;
        let mut column = group.next_column()?.expect("the schema has one column");
        column.typed::<ByteArrayType>().write_batch(&self.rows, None, None)?;
        column.close()?;
        group.close()?;
        self.writer.flush()?;
        let bytes = self.writer.bytes_written() as u64 - offset;
        let xxh3 = self.writer.inner().hasher.finish_128();
        let documents = self.rows.len() as u32;
        self.groups.push(RowGroupInfo { tokens: self.row_tokens, documents, offset, bytes, xxh3 });
        self.rows.clear();
        self.row_tokens = 0;
        Ok(())
    }
}

/// Decodes the column chunk of one row group, whose bytes have been checked against `info.xxh3`.
/// `path` and `part` are only for messages.
pub fn decode_row_group(bytes: Bytes, info: &RowGroupInfo, path: &Path, part: &str) -> Result<RowGroup, DataError> {
    let corrupt = |reason: String| DataError::Corrupt { path: path.to_owned(), part: part.to_owned(), reason };
    let documents = read_rows(bytes, info).map_err(|e| corrupt(e.to_string()))?;
    let (mut starts, mut num_tokens) = (Vec::with_capacity(documents.len()), 0u64);
    for document in &documents {
        starts.push(num_tokens as u32);
        let (words, rest) = document.data().as_chunks::<4>();
        if !rest.is_empty() || words.is_empty() {
            return Err(corrupt(format!("a document of {} bytes", document.len())));
        }
        num_tokens += words.len() as u64;
    }
    if num_tokens != info.tokens {
        return Err(corrupt(format!("{num_tokens} tokens where the index says {}", info.tokens)));
    }
    Ok(RowGroup { documents, starts })
}

fn read_rows(bytes: Bytes, info: &RowGroupInfo) -> ParquetResult<Vec<ByteArray>> {
    let column = column()?;
    let chunk = ColumnChunkMetaData::builder(column.clone())
        .set_compression(Compression::UNCOMPRESSED)
        .set_encodings(vec![Encoding::PLAIN])
        .set_num_values(i64::from(info.documents))
        .set_data_page_offset(0)
        .set_total_compressed_size(bytes.len() as i64)
        .set_total_uncompressed_size(bytes.len() as i64)
        .build()?;
    let rows = info.documents as usize;
    let pages = SerializedPageReader::new(Arc::new(Chunk(bytes)), &chunk, rows, None)?;
    let mut reader = ColumnReaderImpl::<ByteArrayType>::new(column, Box::new(pages));
    let mut values = Vec::with_capacity(rows);
    let (read, _, _) = reader.read_records(rows, None, None, &mut values)?;
    match read == rows {
        true => Ok(values),
        false => Err(ParquetError::General(format!("{read} documents where the index says {rows}"))),
    }
}

fn schema() -> ParquetResult<TypePtr> {
    Ok(Arc::new(parse_message_type(SCHEMA)?))
}

fn column() -> ParquetResult<ColumnDescPtr> {
    Ok(SchemaDescriptor::new(schema()?).column(0))
}

fn properties() -> WriterPropertiesPtr {
    let properties = WriterProperties::builder()
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_offset_index_disabled(true)
        .set_compression(Compression::UNCOMPRESSED)
        .set_data_page_size_limit(PAGE_BYTES)
        .set_write_batch_size(64)
        // Two builds of the crate must write the same bytes.
        .set_created_by("tiefsee".into())
        .build();
    Arc::new(properties)
}

/// Hashes what passes through, so that a row group is never read back to be checksummed.
struct Hashing<W> {
    inner: W,
    hasher: XxHash3_128,
    written: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.write(&bytes[..written]);
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// A column chunk in memory, as parquet wants to read it.
struct Chunk(Bytes);

impl Length for Chunk {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

impl ChunkReader for Chunk {
    type T = Box<dyn Read + Send>;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        let start = usize::try_from(start).ok().filter(|s| *s <= self.0.len());
        let start = start.ok_or_else(|| ParquetError::EOF("read past the row group".into()))?;
        Ok(Box::new(self.0.slice(start..).reader()))
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        let end = (start as usize).checked_add(length).filter(|end| *end <= self.0.len());
        let end = end.ok_or_else(|| ParquetError::EOF("read past the row group".into()))?;
        Ok(self.0.slice(start as usize..end))
    }
}
