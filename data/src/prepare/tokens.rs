//! The corpus's tokenizer: given, or trained on the first of the shuffled training documents. What a given one lacks is
//! said before the inputs are read, what it loses of their text with the first of them, or else when they are encoded.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::encode::Job;
use super::inputs::InputFile;
use super::spill::Unit;
use super::transform::Transform;
use super::{PrepareArgs, bpe, durable};
use crate::format::manifest::TOKENIZER_FILE;
use crate::tokenizer::{Tokenizer, open_tokenizer};
use crate::{DataError, Split};

const CONFIG_FILE: &str = "tokenizer_config.json";

/// Text of a document that is tried.
const CHECKED_BYTES: usize = 1 << 16;

/// `--tokenizer`, as it was when `prepare` began.
pub(super) struct Given {
    pub tokenizer: Tokenizer,
    pub blake3: String,
    bytes: Vec<u8>,
    config: Option<Vec<u8>>,
}

/// Opens `--tokenizer`, and refuses options that the tokenizer cannot serve.
pub(super) fn open_given(args: &PrepareArgs) -> Result<Option<Given>, DataError> {
    let Some(path) = &args.tokenizer else {
        let special = bpe::SPECIAL_TOKENS;
        return match args.end_token.as_deref().filter(|name| !special.contains(name)) {
            Some(name) => Err(DataError::bad_option("--end-token", name, format!("a tokenizer trained here has {}", special.join(", ")))),
            None => Ok(None),
        };
    };
    let read = |path: &Path| fs::read(path).map_err(DataError::io(path, "read"));
    let bytes = read(path)?;
    let tokenizer = Tokenizer::from_bytes(path, &bytes)?;
    Transform::new(&tokenizer, args)?;
    let config = bpe::config_beside(path).map(|beside| read(&beside)).transpose()?;
    Ok(Some(Given { tokenizer, blake3: blake3::hash(&bytes).to_hex().to_string(), bytes, config }))
}

impl Given {
    /// Refuses a tokenizer that does not give a document back as it was.
    pub fn check(&self, file: &InputFile, number: u64, text: &str) -> Result<(), DataError> {
        let text = &text[..text.floor_char_boundary(text.len().min(CHECKED_BYTES))];
        let ids = self.tokenizer.encode_document(text)?;
        check(&self.tokenizer, text, &ids, || format!("{}: {}", file.path.display(), file.place(number)))
    }

    pub fn write(&self, out: &Path) -> Result<(), DataError> {
        if let Some(config) = &self.config {
            durable::write_bytes(&out.join(CONFIG_FILE), config)?;
        }
        durable::write_bytes(&out.join(TOKENIZER_FILE), &self.bytes)
    }
}

/// Refuses ids that do not give `text` back; `place` says where it lies.
pub(super) fn check(tokenizer: &Tokenizer, text: &str, ids: &[u32], place: impl FnOnce() -> String) -> Result<(), DataError> {
    let Some((at, found)) = tokenizer.first_change(text, ids)? else { return Ok(()) };
    let shown = |text: &str| text[at..].chars().take(20).collect::<String>();
    let reason = format!(
        "does not give text back: {}{:?} at byte {at} becomes {:?}; --lossy-tokenizer accepts that",
        place(), shown(text), shown(&found)
    );
    Err(DataError::Tokenizer { path: tokenizer.path().to_owned(), reason })
}

/// Trains one of `vocab` tokens on the first `bytes` of training text.
pub(super) fn train(out: &Path, spilled: &[PathBuf], jobs: &[Job], vocab: u32, bytes: u64) -> Result<Tokenizer, DataError> {
    let mut sample: Vec<(Unit, Range<usize>)> = Vec::new();
    let mut text = 0;
    for job in jobs.iter().filter(|job| job.split == Split::Train) {
        let unit = Unit::load(spilled, job.unit)?;
        let documents = job.part.of(unit.len());
        text += documents.clone().map(|i| unit.document(i).1.len() as u64).sum::<u64>();
        sample.push((unit, documents));
        if text >= bytes {
            break;
        }
    }
    let documents = sample.iter().flat_map(|(unit, documents)| documents.clone().map(|i| unit.document(i).1));
    let bpe = bpe::train(&first_text(documents, bytes), vocab)?;
    if bpe.tokens.len() < vocab as usize {
        tracing::warn!("the text gives {} tokens of the {vocab} of --vocab: no other pair occurs twice in it", bpe.tokens.len());
    }
    durable::write_json(&out.join(CONFIG_FILE), &bpe::config_json())?;
    let path = out.join(TOKENIZER_FILE);
    durable::write_json(&path, &bpe.to_json())?;
    open_tokenizer(&path)
}

/// The first `bytes` of the documents, the last of them cut.
fn first_text<'t>(documents: impl Iterator<Item = &'t str>, bytes: u64) -> Vec<&'t str> {
    let (mut left, mut first) = (bytes as usize, Vec::new());
    for text in documents {
        let cut = text.floor_char_boundary(left.min(text.len()));
        first.push(&text[..cut]);
        if cut < text.len() {
            break;
        }
        left -= cut;
    }
    first
}

#[cfg(test)]
mod tests {
    use super::first_text;

    #[test]
    fn a_document_longer_than_what_is_left_is_cut_between_characters() {
        let long = "漢字".repeat(1000);
        assert_eq!(first_text(["abc", "defg", &long, "x"].into_iter(), 11), ["abc", "defg", "漢"]);
        assert_eq!(first_text([long.as_str(), "x"].into_iter(), 7), ["漢字"]);
        assert_eq!(first_text(["ab", "", "c"].into_iter(), 100), ["ab", "", "c"]);
    }
}
