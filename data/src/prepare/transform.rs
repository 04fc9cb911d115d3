//! One document's text to its ids: encode, fill-in-the-middle, token splitting, end token.
//!
//! What happens to a document is drawn from its key, so it is the same wherever and whenever it is
//! encoded. Invariant: `undo` gives the text back byte for byte, unless a lossy tokenizer was asked for.

use std::collections::HashMap;

use bytes::Bytes;
use regex::Regex;

use super::spill::Key;
use super::{PrepareArgs, bpe, tokens};
use crate::tokenizer::{FimTokens, Tokenizer};
use crate::DataError;

/// See the module head.
pub(super) struct Transform<'a> {
    tokenizer: &'a Tokenizer,
    pub end_token: u32,
    /// Whether every document's ids must give it back.
    pub strict: bool,
    spelled: Vec<Option<Box<[u8]>>>,
    fim: Option<(f64, FimTokens)>,
    split_rate: f64,
    /// For a token that joins punctuation and line breaks: the ids of its two parts.
    splits: Vec<Option<Box<[u32]>>>,
}

impl<'a> Transform<'a> {
    pub fn new(tokenizer: &'a Tokenizer, args: &PrepareArgs) -> Result<Transform<'a>, DataError> {
        let end_token = tokenizer.end_token(args.end_token.as_deref())?;
        let PrepareArgs { fim_rate, split_rate, .. } = *args;
        let fim = match tokenizer.fim_tokens() {
            _ if fim_rate == 0.0 => None,
            Some(tokens) => Some((fim_rate, tokens)),
            None => {
                let limit = "the tokenizer has no <｜fim▁begin｜>, <｜fim▁hole｜>, <｜fim▁end｜>";
                return Err(DataError::bad_option("--fim-rate", fim_rate, limit));
            }
        };
        let spelled = spelled(tokenizer);
        let splits = if split_rate > 0.0 { split_table(tokenizer, &spelled)? } else { Vec::new() };
        if split_rate > 0.0 && splits.iter().all(Option::is_none) {
            let path = tokenizer.path().display();
            let limit = format!("{path} has no token of punctuation and line breaks in the byte-level alphabet, so none would be split");
            match args.tokenizer {
                Some(_) => return Err(DataError::bad_option("--split-rate", split_rate, limit)),
                // It was trained on what was read, which need not be read again.
                None => tracing::warn!("--split-rate = {split_rate}: {limit}"),
            }
        }
        let strict = args.tokenizer.is_some() && !args.lossy_tokenizer;
        Ok(Transform { tokenizer, end_token, strict, spelled, fim, split_rate, splits })
    }

    /// The ids as little-endian u32, end token included; none of a document of which a lossy tokenizer leaves nothing.
    pub fn encode(&self, key: &Key, text: &str) -> Result<Option<Bytes>, DataError> {
        let mut draw = Draw::new(key);
        let mut ids = Vec::with_capacity(text.len() / 3 + 8);
        let mut marks = 0;
        match self.fim {
            Some((rate, fim)) if draw.fraction() < rate => {
                marks = 3;
                let (prefix, middle, suffix) = cut_in_three(text, &mut draw);
                for (mark, part) in [(fim.begin, prefix), (fim.hole, suffix), (fim.end, middle)] {
                    ids.push(mark);
                    self.push_text(part, &mut draw, &mut ids)?;
                }
            }
            _ => self.push_text(text, &mut draw, &mut ids)?,
        }
        if ids.len() == marks {
            return Ok(None);
        }
        ids.push(self.end_token);
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        ids.iter().for_each(|id| bytes.extend_from_slice(&id.to_le_bytes()));
        Ok(Some(bytes.into()))
    }

    fn push_text(&self, text: &str, draw: &mut Draw, ids: &mut Vec<u32>) -> Result<(), DataError> {
        let encoded = self.tokenizer.encode_document(text)?;
        // Some tokenizers have them in their vocabulary, too.
        let marks = self.fim.iter().flat_map(|(_, fim)| [fim.begin, fim.hole, fim.end]).chain([self.end_token]);
        if let Some(mark) = marks.into_iter().find(|mark| encoded.contains(mark)) {
            let begins: String = text.chars().take(40).collect();
            let reason = format!("makes token {mark}, which ends documents or their parts, of a document's text: {begins:?}…");
            return Err(DataError::Tokenizer { path: self.tokenizer.path().to_owned(), reason });
        }
        if self.strict && !self.spells(text, &encoded) {
            let begins: String = text.chars().take(40).collect();
            tokens::check(self.tokenizer, text, &encoded, || format!("in a text of {} bytes, {begins:?}…, ", text.len()))?;
        }
        if self.split_rate == 0.0 {
            ids.extend(encoded);
            return Ok(());
        }
        for id in encoded {
            match self.splits.get(id as usize) {
                Some(Some(parts)) if draw.fraction() < self.split_rate => ids.extend_from_slice(parts),
                _ => ids.push(id),
            }
        }
        Ok(())
    }

    /// Whether the tokens' bytes are the text's: a twentieth of what it costs to decode and compare.
    fn spells(&self, text: &str, ids: &[u32]) -> bool {
        let bytes = |id: &u32| self.spelled.get(*id as usize)?.as_deref();
        let rest = ids.iter().try_fold(text.as_bytes(), |rest, id| rest.strip_prefix(bytes(id)?));
        rest.is_some_and(<[u8]>::is_empty)
    }
}

/// Two cuts between characters, anywhere in the document.
fn cut_in_three<'t>(text: &'t str, draw: &mut Draw) -> (&'t str, &'t str, &'t str) {
    let mut cut = || text.floor_char_boundary(draw.below(text.len() as u64 + 1) as usize);
    let (a, b) = (cut(), cut());
    let (a, b) = (a.min(b), a.max(b));
    (&text[..a], &text[a..b], &text[b..])
}

/// The text of a document's ids, end token left off and fill-in-the-middle undone.
pub fn undo(tokenizer: &Tokenizer, ids: &[u32], end_token: u32) -> Result<String, DataError> {
    let ids = ids.strip_suffix(&[end_token]).unwrap_or(ids);
    if let Some(fim) = tokenizer.fim_tokens()
        && let Some(rest) = ids.strip_prefix(&[fim.begin])
        && let Some(hole) = rest.iter().position(|id| *id == fim.hole)
        && let Some(end) = rest.iter().position(|id| *id == fim.end)
        && hole < end
    {
        let parts = [&rest[..hole], &rest[end + 1..], &rest[hole + 1..end]];
        return parts.iter().map(|part| tokenizer.decode(part)).collect();
    }
    tokenizer.decode(ids)
}

/// Punctuation and the line breaks that the pre-tokenizer lets into one word with it.
const PUNCTUATION_AND_BREAKS: &str = r"^([ \p{P}\p{S}]*[\p{P}\p{S}] *)([\r\n]+)$";

/// The bytes of each token whose letters are all of the byte-level alphabet.
fn spelled(tokenizer: &Tokenizer) -> Vec<Option<Box<[u8]>>> {
    let bytes: HashMap<char, u8> = (0..=255).map(|byte| (bpe::byte_letter(byte), byte)).collect();
    let mut table = vec![None; tokenizer.vocab_size() as usize];
    for (id, token) in tokenizer.model_vocab() {
        table[id as usize] = token.chars().map(|letter| bytes.get(&letter).copied()).collect();
    }
    table
}

/// Tokens of the byte-level vocabulary that hold punctuation followed by line breaks.
fn split_table(tokenizer: &Tokenizer, spelled: &[Option<Box<[u8]>>]) -> Result<Vec<Option<Box<[u32]>>>, DataError> {
    let joined = Regex::new(PUNCTUATION_AND_BREAKS).expect("a constant");
    let mut table = vec![None; spelled.len()];
    for (parts, bytes) in table.iter_mut().zip(spelled) {
        // A token may hold a part of a character.
        let Some(Ok(text)) = bytes.as_deref().map(std::str::from_utf8) else { continue };
        if let Some(found) = joined.captures(text) {
            let mut ids = tokenizer.encode_document(&found[1])?;
            ids.extend(tokenizer.encode_document(&found[2])?);
            *parts = Some(ids.into_boxed_slice());
        }
    }
    Ok(table)
}

/// Random numbers of one document: BLAKE3 of its key, read on and on.
struct Draw(blake3::OutputReader);

impl Draw {
    fn new(key: &Key) -> Draw {
        Draw(blake3::Hasher::new_derive_key("tiefsee prepare document draws 1").update(key).finalize_xof())
    }

    fn next(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// In 0 to 1, 1 excluded.
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}
