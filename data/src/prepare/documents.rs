//! Documents out of one input file, each handed to a callback. Invariants: memory is bounded by the
//! longest document (and a parquet row group's pages), not by the file; what gives no document is counted.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;

use parquet::basic::{ConvertedType, LogicalType, Type as PhysicalType};
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, SerializedFileReader};
use parquet::schema::types::SchemaDescriptor;

use super::inputs::{InputFile, Kind, Packing};
use super::line;
use super::remote::{OpenFile, RemoteFile, RemoteReader};
use crate::DataError;

/// Documents of a parquet batch.
const BATCH: usize = 256;

/// A document is encoded in one piece, and its ids, four bytes each, make one page of a shard, which holds less than 2^31.
pub(super) const LONGEST_DOCUMENT: u64 = 1 << 28;

/// With room for what JSON writes in more letters.
const LONGEST_LINE: u64 = 1 << 30;

/// Of what zstd looks back on, in bits: the most that it knows.
const LONGEST_WINDOW: u32 = 31;

/// The mark that some editors begin a UTF-8 file with.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// What was met in a file.
#[derive(Default)]
pub(super) struct Met {
    /// The file is not text and was passed over.
    pub not_text: bool,
    /// Lines of JSONL that are not blank, and rows of parquet.
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
        let whole = || -> Result<Box<dyn Read>, DataError> {
            Ok(match remote {
                Some(remote) => Box::new(RemoteReader::new(remote.clone())),
                None => Box::new(open(path)?),
            })
        };
        match (self.file.kind, remote) {
            (Kind::Text, _) => {
                let mut bytes = Vec::with_capacity(self.file.bytes as usize);
                whole()?.read_to_end(&mut bytes).map_err(DataError::io(path, "read"))?;
                self.read_text(&bytes)
            }
            (Kind::Parquet, None) => self.read_parquet(open(path)?),
            (Kind::Parquet, Some(remote)) => self.read_parquet(remote.clone()),
            (Kind::Jsonl(packing), _) => {
                let raw = BufReader::with_capacity(1 << 20, whole()?);
                let lines: Box<dyn Read> = match packing {
                    Packing::Plain => Box::new(raw),
                    Packing::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(raw)),
                    Packing::Zstd => {
                        // As `zstd --long` makes them.
                        let unpack = zstd::Decoder::with_buffer(raw).and_then(|mut lines| lines.window_log_max(LONGEST_WINDOW).map(|()| lines));
                        Box::new(unpack.map_err(DataError::io(path, "unpack"))?)
                    }
                };
                self.read_jsonl(BufReader::with_capacity(1 << 20, lines))
            }
        }
    }

    /// One line or row, or what is wrong with it; false once the limit is reached.
    fn meet(&mut self, number: u64, text: Result<impl AsRef<str>, String>) -> Result<bool, DataError> {
        self.met.lines += 1;
        match text {
            Ok(text) => self.take(number, text.as_ref()),
            Err(reason) => {
                self.met.bad_lines += 1;
                self.met.first_bad.get_or_insert_with(|| format!("{}{reason}", self.file.place(number)));
                Ok(true)
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
        Err(self.bad(format!("{}a document of {bytes} bytes, the limit is {LONGEST_DOCUMENT}", self.file.place(number))))
    }

    fn bad(&self, reason: String) -> DataError {
        DataError::BadInput { path: self.file.path.clone(), reason }
    }

    fn read_text(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        match std::str::from_utf8(bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes)) {
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
            let mark = if number == 1 && line.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
            let json = &mut line[mark..];
            if json.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            if !self.meet(number, line::text_of(json, self.column))? {
                break;
            }
        }
        Ok(())
    }

    /// Values are read as bytes and not through arrow, which makes another type of a pandas category and of a column of
    /// bytes, and ends at the first value that is not UTF-8.
    fn read_parquet(&mut self, file: impl ChunkReader + 'static) -> Result<(), DataError> {
        let input = self.file;
        let file = guarded(input, || SerializedFileReader::new(file))?;
        let schema = file.metadata().file_metadata().schema_descr();
        let Some(leaf) = text_leaf(schema, self.column).map_err(|reason| self.bad(reason))? else {
            let rows = file.metadata().file_metadata().num_rows() as u64;
            return (1..=rows).try_for_each(|number| self.meet(number, Ok("")).map(|_| ()));
        };
        let (mut number, mut levels, mut values) = (0, Vec::new(), Vec::new());
        for group in 0..file.num_row_groups() {
            // Only this column's pages are read.
            let pages = guarded(input, || file.get_row_group(group).and_then(|group| group.get_column_page_reader(leaf)))?;
            let mut column = ColumnReaderImpl::<ByteArrayType>::new(schema.column(leaf), pages);
            loop {
                let (rows, ..) = guarded(input, || column.read_records(BATCH, Some(&mut levels), None, &mut values))?;
                if rows == 0 {
                    break;
                }
                let mut filled = values.drain(..);
                for row in 0..rows {
                    number += 1;
                    // Of a column that may hold nulls there are levels; 0 is a null.
                    let value = if levels.get(row) == Some(&0) { None } else { filled.next() };
                    let text = std::str::from_utf8(value.as_ref().map_or(&[], ByteArray::data));
                    if !self.meet(number, text.map_err(|e| e.to_string()))? {
                        return Ok(());
                    }
                }
                drop(filled);
                levels.clear();
            }
        }
        Ok(())
    }
}

/// What the reader makes of a damaged file is that file's error: it panics over some numbers that it should refuse.
fn guarded<T>(file: &InputFile, read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, DataError> {
    let read = panic::catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err(ParquetError::General("damaged".into())));
    read.map_err(|e| DataError::BadInput { path: file.path.clone(), reason: e.to_string() })
}

fn open(path: &Path) -> Result<File, DataError> {
    File::open(path).map_err(DataError::io(path, "open"))
}

/// The number of the column that holds the text: strings, or bytes of no type, which old writers made of strings. None: it has
/// nothing but nulls, and so no type.
fn text_leaf(schema: &SchemaDescriptor, name: &str) -> Result<Option<usize>, String> {
    let Some(leaf) = schema.columns().iter().position(|column| column.path().parts()[0] == name) else {
        let names: Vec<&str> = schema.root_schema().get_fields().iter().map(|field| field.name()).collect();
        return Err(format!("has no column {name:?}; it has {}", names.join(", ")));
    };
    let column = schema.column(leaf);
    let text = matches!(
        (column.logical_type_ref(), column.converted_type()),
        (Some(LogicalType::String | LogicalType::Json | LogicalType::Enum), _)
            | (None, ConvertedType::NONE | ConvertedType::UTF8 | ConvertedType::JSON | ConvertedType::ENUM)
    );
    match (column.path().parts().len() > 1 || column.max_rep_level() > 0, column.physical_type()) {
        (true, _) => Err(format!("column {name:?} holds no text but other columns or lists")),
        (false, PhysicalType::BYTE_ARRAY) if text => Ok(Some(leaf)),
        (false, _) if column.logical_type_ref() == Some(&LogicalType::Unknown) => Ok(None),
        (false, found) => Err(format!("column {name:?} holds no text but {found} ({})", column.converted_type())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::*;

    /// Each bit in turn: of a number the lowest is its sign.
    #[test]
    fn a_damaged_parquet_file_is_read_or_refused_and_no_panic() {
        let folder = tempfile::tempdir().unwrap();
        let schema = Arc::new(parse_message_type("message rows { required binary text (UTF8); }").unwrap());
        let mut writer = SerializedFileWriter::new(Vec::new(), schema, Arc::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[ByteArray::from("a text")], None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        let whole = writer.into_inner().unwrap();
        let (path, bytes) = (folder.path().join("a.parquet"), whole.len() as u64);
        let file = InputFile { path: path.clone(), remote: None, name: "a.parquet".into(), bytes, version: String::new(), kind: Kind::Parquet, limit: None };
        let (mut read_whole, mut refused) = (0, 0);
        for bit in 0..whole.len() * 8 {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, damaged).unwrap();
            let result = read(&file, "text", &mut |_, text| {
                read_whole += u64::from(text == "a text");
                Ok(())
            });
            match result {
                Ok(_) => {}
                Err(DataError::BadInput { path, .. }) if path.ends_with("a.parquet") => refused += 1,
                Err(other) => panic!("bit {bit}: {other}"),
            }
        }
        assert!(read_whole > 100 && refused > 500, "{read_whole} were read, {refused} refused, of {} bytes", whole.len());
    }
}
