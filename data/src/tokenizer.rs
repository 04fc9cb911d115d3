//! A byte-level BPE tokenizer read from a Hugging Face `tokenizer.json`.
//!
//! Encoding runs on `fastokens`, whose ids are those of the `tokenizers` crate at a hundred times
//! the speed (`tests/tokenizer.rs` compares them); a file that it cannot load falls back to
//! `tokenizers` itself, with one line in the log. `decode(encode_document(text)) == text` for every tokenizer that
//! spells all bytes and normalizes nothing; `first_change` tells where one does not.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::DataError;

/// Names under which tokenizers know the token that ends a document, most specific first.
const END_TOKENS: [&str; 6] =
    ["<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "</s>", "<|im_end|>"];

/// Tables and an embedding have a row for each id up to the largest: a slip in one would take all memory.
const MOST_TOKENS: u64 = 1 << 24;

/// The fill-in-the-middle tokens, in DeepSeek's spelling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FimTokens {
    pub begin: u32,
    pub hole: u32,
    pub end: u32,
}

/// See the module head.
pub struct Tokenizer {
    path: PathBuf,
    json: serde_json::Value,
    fast: Option<fastokens::Tokenizer>,
    /// The reference: always there as a fallback, but loaded only when it is needed.
    slow: OnceLock<Slow>,
    vocab_size: u32,
}

/// `tokenizers` has no way to ignore *all* added tokens, so there is a second one without any.
struct Slow {
    full: tokenizers::Tokenizer,
    plain: tokenizers::Tokenizer,
}

/// Reads a `tokenizer.json`.
pub fn open_tokenizer(path: impl AsRef<Path>) -> Result<Tokenizer, DataError> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(DataError::io(path, "read"))?;
    Tokenizer::from_bytes(path, &bytes)
}

impl Tokenizer {
    /// `path` is only for messages.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Tokenizer, DataError> {
        let bad = |reason: String| DataError::Tokenizer { path: path.to_owned(), reason };
        let mut json: serde_json::Value = serde_json::from_slice(bytes).map_err(|e| bad(e.to_string()))?;
        // They fit texts to a model's inputs: a document would be cut, lengthened, or another one each time.
        for key in ["/truncation", "/padding", "/model/dropout"] {
            if let Some(value) = json.pointer_mut(key) {
                value.take();
            }
        }
        let largest = largest_id(&json).ok_or_else(|| {
            let found = json["model"]["type"].as_str().unwrap_or("missing");
            bad(format!("model.vocab names no tokens with their ids, and model.type is {found}; BPE, WordPiece and WordLevel are read"))
        })?;
        if largest >= MOST_TOKENS {
            return Err(bad(format!("has a token with id {largest}, the limit is {}", MOST_TOKENS - 1)));
        }
        let vocab_size = largest as u32 + 1;
        let fast = match fastokens::Tokenizer::from_json(json.clone()) {
            Ok(fast) => Some(fast),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "fastokens cannot load this tokenizer; using tokenizers, which is slower");
                None
            }
        };
        let tokenizer =
            Tokenizer { path: path.to_owned(), json, fast, slow: OnceLock::new(), vocab_size };
        if tokenizer.fast.is_none() {
            let slow = Slow::load(&tokenizer.json).map_err(|e| bad(e.to_string()))?;
            tokenizer.slow.get_or_init(|| slow);
        }
        Ok(tokenizer)
    }

    /// The same tokenizer on the `tokenizers` crate: what the fast one is compared with.
    pub fn into_reference(mut self) -> Result<Tokenizer, DataError> {
        let slow = Slow::load(&self.json).map_err(|e| self.error(e.to_string()))?;
        self.fast = None;
        self.slow = OnceLock::from(slow);
        Ok(self)
    }

    /// Ids of `text`, in which added tokens (`<｜User｜>`) are recognised: what transformers gives
    /// with `add_special_tokens=False`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        match &self.fast {
            Some(fast) => fast.encode(text).map_err(|e| self.error(e.to_string())),
            None => self.encode_slow(text, |slow| &slow.full),
        }
    }

    /// Ids of a document's text, in which nothing is an added token: a corpus that *mentions*
    /// `<｜end▁of▁sentence｜>` must not end there.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>, DataError> {
        match &self.fast {
            Some(fast) => fast.encode_ordinary(text).map_err(|e| self.error(e.to_string())),
            None => self.encode_slow(text, |slow| &slow.plain),
        }
    }

    /// The text of `ids`, added tokens included. Bytes that are not UTF-8 (a cut in the middle of
    /// a character) become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        match (&self.fast, self.slow.get()) {
            (Some(fast), _) => fast.decode(ids, false).map_err(|e| self.error(e.to_string())),
            (None, Some(slow)) => slow.full.decode(ids, false).map_err(|e| self.error(e.to_string())),
            (None, None) => unreachable!("a tokenizer without a fast side has loaded the slow one"),
        }
    }

    /// Where `ids` do not give `text` back, and what they give; always between characters of both.
    pub fn first_change(&self, text: &str, ids: &[u32]) -> Result<Option<(usize, String)>, DataError> {
        let found = self.decode(ids)?;
        if found == text {
            return Ok(None);
        }
        let same = text.chars().zip(found.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        Ok(Some((same, found)))
    }

    /// One more than the largest id, added tokens included: the rows an embedding needs.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether encoding runs on `fastokens`.
    pub fn is_fast(&self) -> bool {
        self.fast.is_some()
    }

    /// The id of an added or ordinary token by its exact content.
    pub fn token_id(&self, content: &str) -> Option<u32> {
        let added = self.json["added_tokens"].as_array().into_iter().flatten();
        let found = added.filter(|t| t["content"] == content).find_map(|t| t["id"].as_u64());
        found.or_else(|| self.json["model"]["vocab"][content].as_u64()).and_then(|id| u32::try_from(id).ok())
    }

    /// The token that ends a document: `name`, or the first known name that the file has.
    pub fn end_token(&self, name: Option<&str>) -> Result<u32, DataError> {
        match name {
            Some(name) => self.token_id(name).ok_or_else(|| self.error(format!("has no token {name:?}"))),
            None => END_TOKENS.iter().find_map(|name| self.token_id(name)).ok_or_else(|| {
                self.error(format!("has no end-of-document token ({}); name one", END_TOKENS.join(", ")))
            }),
        }
    }

    pub fn fim_tokens(&self) -> Option<FimTokens> {
        Some(FimTokens {
            begin: self.token_id("<｜fim▁begin｜>")?,
            hole: self.token_id("<｜fim▁hole｜>")?,
            end: self.token_id("<｜fim▁end｜>")?,
        })
    }

    /// All ordinary tokens as (id, text in the byte-level alphabet).
    pub(crate) fn model_vocab(&self) -> impl Iterator<Item = (u32, &str)> {
        let vocab = self.json["model"]["vocab"].as_object().into_iter().flatten();
        vocab.filter_map(|(token, id)| Some((u32::try_from(id.as_u64()?).ok()?, token.as_str())))
    }

    fn encode_slow(&self, text: &str, pick: fn(&Slow) -> &tokenizers::Tokenizer) -> Result<Vec<u32>, DataError> {
        let slow = self.slow.get().expect("a tokenizer without a fast side has loaded the slow one");
        let encoding = pick(slow).encode_fast(text, false).map_err(|e| self.error(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    fn error(&self, reason: String) -> DataError {
        DataError::Tokenizer { path: self.path.clone(), reason }
    }
}

impl Slow {
    fn load(json: &serde_json::Value) -> tokenizers::Result<Slow> {
        let full = tokenizers::Tokenizer::from_bytes(serde_json::to_vec(json)?)?;
        let mut without = json.clone();
        without["added_tokens"] = serde_json::Value::Array(Vec::new());
        let plain = tokenizers::Tokenizer::from_bytes(serde_json::to_vec(&without)?)?;
        Ok(Slow { full, plain })
    }
}

fn largest_id(json: &serde_json::Value) -> Option<u64> {
    let ordinary = json["model"]["vocab"].as_object()?.values().filter_map(|id| id.as_u64());
    let added = json["added_tokens"].as_array().into_iter().flatten().filter_map(|t| t["id"].as_u64());
    ordinary.chain(added).max()
}
