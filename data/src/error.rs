//! Every way in which the crate can fail. A variant names the file it is about, the value found
//! and the limit or the value expected, so that a message can be acted on without the source.

use std::path::PathBuf;
use std::time::Duration;

/// An error of preparing or of reading a corpus.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// `error` is told here, and is no source: who prints the chain would print it twice.
    #[error("{}: cannot {doing}: {error}", path.display())]
    Io { path: PathBuf, doing: &'static str, error: std::io::Error },

    #[error("no text found under {inputs}: {files} files looked at, none of the extensions {extensions} held a document\n{left_out}")]
    NoText { inputs: String, files: u64, extensions: String, left_out: String },

    #[error("{}: {reason}", path.display())]
    BadInput { path: PathBuf, reason: String },

    #[error("{option} = {value}: {limit}")]
    BadOption { option: &'static str, value: String, limit: String },

    #[error("{}: not a usable tokenizer: {reason}", path.display())]
    Tokenizer { path: PathBuf, reason: String },

    #[error("{}: already holds a prepared corpus; choose another --out or remove it", path.display())]
    OutputExists { path: PathBuf },

    #[error("{}: holds an unfinished prepare with other options; remove it, or repeat the command that started it", path.display())]
    OtherPrepare { path: PathBuf },

    #[error("{}: not a manifest of this format: {reason}", path.display())]
    Manifest { path: PathBuf, reason: String },

    #[error("{}: file is missing", path.display())]
    MissingFile { path: PathBuf },

    #[error("{}: {found} bytes long where the manifest says {expected}: truncated or replaced", path.display())]
    WrongLength { path: PathBuf, found: u64, expected: u64 },

    #[error("{}: checksum of {part} is {found} where the manifest says {expected}: damaged or replaced", path.display())]
    Checksum { path: PathBuf, part: String, found: String, expected: String },

    #[error("{}: {part} does not decode: {reason}", path.display())]
    Corrupt { path: PathBuf, part: String, reason: String },

    #[error("{}: token id {id} in {part} is outside the vocabulary of {vocab_size}", path.display())]
    TokenOutOfRange { path: PathBuf, part: String, id: u32, vocab_size: u32 },

    #[error("{}: the {split} split holds {tokens} tokens where one sample needs {needed}", path.display())]
    TooFewTokens { path: PathBuf, split: &'static str, tokens: u64, needed: u64 },

    #[error("sample {index} is outside the {limit} samples of this order")]
    SampleOutOfRange { index: u64, limit: u64 },

    #[error("the sources do not share one {what}: {} has {found}, {} has {expected}", path.display(), first.display())]
    SourcesDiffer { what: &'static str, path: PathBuf, found: String, first: PathBuf, expected: String },

    #[error("{}: not a usable location: {reason}", url.display())]
    BadUrl { url: PathBuf, reason: String },

    #[error("{}: the store refuses it: {reason}", path.display())]
    Refused { path: PathBuf, reason: String },

    #[error("{}: {attempts} attempts in {:.1} s failed, the last with: {reason}", path.display(), waited.as_secs_f64())]
    Store { path: PathBuf, attempts: u32, waited: Duration, reason: String },
}

impl DataError {
    /// For `map_err` on standard library calls.
    pub(crate) fn io(path: impl Into<PathBuf>, doing: &'static str) -> impl FnOnce(std::io::Error) -> DataError {
        let path = path.into();
        move |error| DataError::Io { path, doing, error }
    }

    pub(crate) fn bad_option(option: &'static str, value: impl ToString, limit: impl Into<String>) -> DataError {
        DataError::BadOption { option, value: value.to_string(), limit: limit.into() }
    }
}
