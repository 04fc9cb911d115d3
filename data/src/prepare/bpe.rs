//! Training a byte-level BPE with DeepSeek-V3's pre-tokenizer, and its `tokenizer.json`.
//!
//! The merges are learned here and not by the `tokenizers` crate: that one breaks ties between
//! equally frequent pairs by the state of a randomly seeded hash map, so two runs may differ.
//! Invariant: the merges are a function of the word counts: the most frequent pair, of those the
//! one with the smallest ids. The words themselves are cut by `tokenizers`, the reference.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::path::Path;

use rayon::prelude::*;
use serde_json::{Value, json};
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

use crate::DataError;

/// Ids 0, 1, … of every tokenizer trained here; names as DeepSeek's.
pub(super) const SPECIAL_TOKENS: [&str; 6] = [
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>",
];
/// A pair seen once teaches nothing.
const MIN_FREQUENCY: i64 = 2;
/// No token has more bytes: one line of 100 000 dashes would make some of 65 536, which teach nothing, and readers of a
/// tokenizer that are quick with words are not with those.
const LONGEST_TOKEN: usize = 128;

pub(super) fn smallest_vocab() -> u32 {
    256 + SPECIAL_TOKENS.len() as u32
}

/// The tokens of a trained BPE in the byte-level alphabet, and the merges that build them.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Bpe {
    pub tokens: Vec<String>,
    pub merges: Vec<(u32, u32)>,
}

/// Trains on `documents`; stops early if no pair occurs twice any more.
pub(super) fn train(documents: &[&str], vocab_size: u32) -> Result<Bpe, DataError> {
    let cut: PreTokenizerWrapper = serde_json::from_value(pre_tokenizer()).expect("a constant");
    let counts = documents.par_iter().try_fold(HashMap::new, |mut counts, text| {
        count_words(&cut, text, &mut counts).map(|()| counts)
    });
    let counts = counts.try_reduce(HashMap::new, |a, b| {
        let (mut large, small) = if a.len() > b.len() { (a, b) } else { (b, a) };
        small.into_iter().for_each(|(word, count)| *large.entry(word).or_insert(0) += count);
        Ok(large)
    });
    let counts = counts.map_err(|e| DataError::Tokenizer { path: "tokenizer.json".into(), reason: e.to_string() })?;
    let mut counts: Vec<(String, i64)> = counts.into_iter().collect();
    counts.sort_unstable();
    Ok(learn(&counts, vocab_size))
}

fn count_words(cut: &PreTokenizerWrapper, text: &str, counts: &mut HashMap<String, i64>) -> tokenizers::Result<()> {
    let mut words = PreTokenizedString::from(text);
    cut.pre_tokenize(&mut words)?;
    for (word, _, _) in words.get_splits(OffsetReferential::Normalized, OffsetType::Byte) {
        match counts.get_mut(word) {
            Some(count) => *count += 1,
            None => _ = counts.insert(word.to_owned(), 1),
        }
    }
    Ok(())
}

type Pair = (u32, u32);

/// The merge loop. Counts of pairs are kept up to date word by word; a heap holds possibly stale
/// maxima, which are refreshed when they come up.
fn learn(words: &[(String, i64)], vocab_size: u32) -> Bpe {
    let mut tokens: Vec<String> = SPECIAL_TOKENS.map(String::from).to_vec();
    let mut ids: HashMap<String, u32> = HashMap::new();
    for letter in alphabet() {
        ids.insert(letter.to_string(), tokens.len() as u32);
        tokens.push(letter.to_string());
    }
    let letters = |word: &str| word.chars().map(|c| ids[c.encode_utf8(&mut [0; 4]) as &str]).collect();
    let mut spelled: Vec<Vec<u32>> = words.iter().map(|(word, _)| letters(word)).collect();
    let mut counts: HashMap<Pair, i64> = HashMap::new();
    let mut places: HashMap<Pair, Vec<u32>> = HashMap::new();
    for (number, word) in spelled.iter().enumerate() {
        for pair in word.windows(2).map(|p| (p[0], p[1])) {
            *counts.entry(pair).or_default() += words[number].1;
            places.entry(pair).or_default().push(number as u32);
        }
    }
    let mut heap: BinaryHeap<(i64, Reverse<Pair>)> = counts.iter().map(|(pair, count)| (*count, Reverse(*pair))).collect();
    let mut merges = Vec::new();
    while (tokens.len() as u32) < vocab_size {
        let Some((count, Reverse(pair))) = heap.pop() else { break };
        let current = counts.get(&pair).copied().unwrap_or(0);
        if current != count {
            // A raise pushed an entry of its own; only a fall leaves nothing else behind.
            if current < count && current > 0 {
                heap.push((current, Reverse(pair)));
            }
            continue;
        }
        if count < MIN_FREQUENCY {
            break;
        }
        let joined = format!("{}{}", tokens[pair.0 as usize], tokens[pair.1 as usize]);
        if joined.chars().count() > LONGEST_TOKEN {
            continue; // a letter is a byte
        }
        // Two pairs may spell one token.
        let id = *ids.entry(joined.clone()).or_insert(tokens.len() as u32);
        if id as usize == tokens.len() {
            tokens.push(joined);
        }
        merges.push(pair);
        let mut raised = Vec::new();
        let mut numbers = places.remove(&pair).unwrap_or_default();
        numbers.dedup();
        for number in numbers {
            let times = words[number as usize].1;
            merge_word(&mut spelled[number as usize], pair, id, &mut |pair, change| {
                *counts.entry(pair).or_default() += change * times;
                if change > 0 {
                    places.entry(pair).or_default().push(number);
                    raised.push(pair);
                }
            });
        }
        raised.sort_unstable();
        raised.dedup();
        heap.extend(raised.into_iter().map(|pair| (counts[&pair], Reverse(pair))));
    }
    Bpe { tokens, merges }
}

/// Replaces each `pair` in `word` by `id`, left to right, and reports the pairs gone and come. In one pass: a word may be as
/// long as a document.
fn merge_word(word: &mut Vec<u32>, pair: Pair, id: u32, change: &mut impl FnMut(Pair, i64)) {
    let (mut read, mut written) = (0, 0);
    while read < word.len() {
        let merges = word.get(read + 1).is_some_and(|&next| (word[read], next) == pair);
        if merges {
            change(pair, -1);
            if written > 0 {
                change((word[written - 1], pair.0), -1);
                change((word[written - 1], id), 1);
            }
            if let Some(&right) = word.get(read + 2) {
                change((pair.1, right), -1);
                change((id, right), 1);
            }
        }
        word[written] = if merges { id } else { word[read] };
        read += if merges { 2 } else { 1 };
        written += 1;
    }
    word.truncate(written);
}

/// The 256 characters that stand for bytes, ordered by code point as `tokenizers` does.
fn alphabet() -> Vec<char> {
    let mut letters: Vec<char> = (0..=255).map(byte_letter).collect();
    letters.sort_unstable();
    letters
}

/// GPT-2's printable stand-in for a byte.
pub(super) fn byte_letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + before).expect("below the surrogates")
}

/// DeepSeek-V3's: digits by three, CJK runs, then words, punctuation with line breaks, spaces.
fn pre_tokenizer() -> Value {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    json!({"type": "Sequence", "pretokenizers": [
        split(r"\p{N}{1,3}"),
        split("[一-龥\u{3040}-ゟ゠-ヿ]+"),
        split("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"),
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
    ]})
}

impl Bpe {
    /// Hugging Face's `tokenizer.json`.
    pub fn to_json(&self) -> Value {
        let vocab: serde_json::Map<String, Value> = self.tokens.iter().cloned().zip((0u32..).map(Value::from)).collect();
        let merges = self.merges.iter().map(|(a, b)| format!("{} {}", self.tokens[*a as usize], self.tokens[*b as usize]));
        let added = SPECIAL_TOKENS.iter().enumerate().map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        });
        json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": added.collect::<Vec<_>>(),
            "pre_tokenizer": pre_tokenizer(),
            "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": merges.collect::<Vec<_>>(),
            },
        })
    }
}

/// `tokenizer_config.json`: what makes transformers load the folder as it is.
pub(super) fn config_json() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false,
        "bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1], "pad_token": SPECIAL_TOKENS[2],
        "model_max_length": 131072,
    })
}

/// The config that lies beside `tokenizer`, if any.
pub(super) fn config_beside(tokenizer: &Path) -> Option<std::path::PathBuf> {
    Some(tokenizer.with_file_name("tokenizer_config.json")).filter(|path| path.is_file())
}

#[cfg(test)]
mod tests;
