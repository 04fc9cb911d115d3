//! Parquet as its many writers leave it: codecs, dictionaries, columns without a type, values that are no text.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use data::{DataError, PrepareArgs, prepare};
use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, DoubleType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;

use crate::corpus;
use crate::prepare::folder_bytes;

const STRINGS: &str = "optional binary text (STRING);";

/// FineWeb's layout: a nullable string column `text` among others, several row groups.
pub fn parquet_of(texts: &[String]) -> Vec<u8> {
    parquet(STRINGS, Compression::UNCOMPRESSED, &texts.iter().map(String::as_bytes).collect::<Vec<_>>())
}

/// A file of one column, declared as `declared`, and of another beside it; a null at the end of each of its groups.
fn parquet(declared: &str, compression: Compression, values: &[&[u8]]) -> Vec<u8> {
    let schema = format!("message schema {{ {declared} required double score; }}");
    let schema = Arc::new(parquet::schema::parser::parse_message_type(&schema).unwrap());
    let properties = WriterProperties::builder().set_compression(compression).build();
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties.into()).unwrap();
    for some in values.chunks(25) {
        let mut group = writer.next_row_group().unwrap();
        let values: Vec<ByteArray> = some.iter().map(|value| value.to_vec().into()).collect();
        let levels: Vec<i16> = std::iter::repeat_n(1, some.len()).chain([0]).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<DoubleType>().write_batch(&vec![0.5; some.len() + 1], None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.into_inner().unwrap()
}

/// A category of pandas: dictionary encoded, and of arrow's type Dictionary.
fn category(texts: &[String]) -> Vec<u8> {
    use arrow::array::{DictionaryArray, RecordBatch};
    use arrow::datatypes::Int32Type;
    let column: DictionaryArray<Int32Type> = texts.iter().map(String::as_str).collect();
    let batch = RecordBatch::try_from_iter([("text", Arc::new(column) as _)]).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

/// Options to prepare this one file.
fn args(folder: &Path, name: &str, bytes: &[u8]) -> PrepareArgs {
    let input = folder.join(format!("{name}.parquet"));
    fs::write(&input, bytes).unwrap();
    corpus::args(&input, &folder.join(format!("out-{name}")))
}

#[test]
fn files_of_all_codecs_and_kinds_of_text_give_the_same_shards() {
    let folder = tempfile::tempdir().unwrap();
    let texts = corpus::write_corpus(&folder.path().join("text"), 3, 60);
    let values: Vec<&[u8]> = texts.iter().map(String::as_bytes).collect();
    let made = |name: &str, bytes: &[u8]| {
        let summary = prepare(&args(folder.path(), name, bytes)).unwrap_or_else(|error| panic!("{name}: {error}"));
        folder_bytes(&summary.out).into_iter().filter(|(name, _)| name != "manifest.json").collect::<Vec<_>>()
    };
    let plain = made("plain", &parquet_of(&texts));
    let codecs = [
        Compression::SNAPPY, Compression::GZIP(Default::default()), Compression::ZSTD(ZstdLevel::default()),
        Compression::BROTLI(Default::default()), Compression::LZ4, Compression::LZ4_RAW,
    ];
    for (number, codec) in codecs.into_iter().enumerate() {
        assert!(plain == made(&number.to_string(), &parquet(STRINGS, codec, &values)), "{codec}");
    }
    for declared in ["optional binary text;", "optional binary text (UTF8);", "optional binary text (ENUM);"] {
        assert!(plain == made("other", &parquet(declared, Compression::SNAPPY, &values)), "{declared}");
        fs::remove_dir_all(folder.path().join("out-other")).unwrap();
    }
    assert!(plain == made("category", &category(&texts)));
}

#[test]
fn a_value_that_is_not_utf8_counts_as_a_bad_line_does() {
    let folder = tempfile::tempdir().unwrap();
    let texts: Vec<String> = (0..480).map(|i| format!("row {i}")).collect();
    let mut values: Vec<&[u8]> = texts.iter().map(String::as_bytes).collect();
    values[30] = b"row \xff";
    for (name, declared) in [("strings", STRINGS), ("bytes", "optional binary text;")] {
        // 480 values and 20 nulls.
        let mut args = args(folder.path(), name, &parquet(declared, Compression::SNAPPY, &values));
        let said = prepare(&args).unwrap_err().to_string();
        // After 25 values and a null.
        assert!(said.contains(&format!("{name}.parquet: row 32: invalid utf-8")), "{said}");
        assert!(said.contains("1 of 500 lines and rows give no text, the limit is --max-bad 0.001"), "{said}");
        args.max_bad = 0.002;
        let summary = prepare(&args).unwrap();
        assert_eq!((summary.documents, summary.bad_lines, summary.empty_documents), (479, 1, 20));
    }
}

/// Two documents as pyarrow 26 writes them with `write_page_checksum=True`, which the crate's writer does not.
const WITH_CHECKSUMS: &[u8] = b"PAR1\x15\x00\x15B\x15B\x15\xb9\x9d\xed\xbb\t\x1c\x15\x04\x15\x00\x15\x06\x15\x06\x1c\x00\x00\x00\
    \x02\x00\x00\x00\x04\x01\x0c\x00\x00\x00one document\x07\x00\x00\x00another\x15\x04\x19,5\x00\x18\x06schema\x15\x02\x00\x15\x0c%\
    \x02\x18\x04text%\x00L\x1c\x00\x00\x00\x16\x04\x19\x1c\x19\x1c&\x00\x1c\x15\x0c\x19%\x06\x00\x19\x18\x04text\x15\x00\x16\x04\x16t\x16t&\
    \x08I\x1c\x15\x00\x15\x00\x15\x02\x00<\x16&\x19\x06\x19&\x00\x04\x00\x00\x00\x16t\x16\x04&\x08\x16t\x00( parquet-cpp-arrow version\
    \x2026.0.1\x19\x1c\x1c\x00\x00\x00\x88\x00\x00\x00PAR1";

#[test]
fn a_page_that_is_not_what_its_checksum_says_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let mut args = args(folder.path(), "x", WITH_CHECKSUMS);
    assert_eq!(prepare(&args).unwrap().documents, 2);
    let mut bytes = WITH_CHECKSUMS.to_vec();
    let at = bytes.windows(7).position(|word| word == b"another").unwrap();
    bytes[at] ^= 1;
    fs::write(&args.inputs[0], bytes).unwrap();
    args.out = folder.path().join("damaged");
    let error = prepare(&args).unwrap_err();
    assert!(matches!(&error, DataError::BadInput { path, .. } if path.ends_with("x.parquet")), "{error}");
    assert!(error.to_string().contains("CRC"), "{error}");
}

#[test]
fn a_column_that_holds_no_text_is_named_with_what_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let said = |declared: &str, column: &str| {
        let mut args = args(folder.path(), "x", &parquet(declared, Compression::SNAPPY, &[b"value"]));
        args.text_column = column.into();
        let error = prepare(&args).unwrap_err();
        assert!(matches!(error, DataError::BadInput { .. }), "{error}");
        fs::remove_dir_all(args.out.with_added_extension("partial")).unwrap();
        error.to_string()
    };
    let found = said(STRINGS, "body");
    assert!(found.contains("x.parquet: has no column \"body\"; it has text, score"), "{found}");
    let found = said(STRINGS, "score");
    assert!(found.contains("column \"score\" holds no text but DOUBLE"), "{found}");
    let found = said("optional binary text (DECIMAL(9, 2));", "text");
    assert!(found.contains("holds no text but BYTE_ARRAY (DECIMAL)"), "{found}");
    let found = said("required group text { optional binary text (STRING); }", "text");
    assert!(found.contains("holds no text but other columns or lists"), "{found}");
}

#[test]
fn a_column_of_nothing_but_nulls_has_no_type_and_no_text() {
    use arrow::array::{NullArray, RecordBatch};
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    let texts = corpus::write_corpus(&input, 47, 20);
    let batch = RecordBatch::try_from_iter_with_nullable([("text", Arc::new(NullArray::new(7)) as _, true)]).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    fs::write(input.join("nulls.parquet"), writer.into_inner().unwrap()).unwrap();
    let summary = prepare(&corpus::args(&input, &folder.path().join("out"))).unwrap();
    assert_eq!((summary.documents, summary.empty_documents), (texts.len() as u64, 7));
}
