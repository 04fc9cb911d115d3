//! Random corpora for the tests, from a seed.

use std::fs;
use std::path::{Path, PathBuf};

use data::{LoaderOptions, OrderSpec, PrepareArgs, Source, Split};

/// SplitMix64: the tests' only source of chance.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

const WORDS: [&str; 24] = [
    "let", " mut", " fn", "αβγ", "漢字かな", " 12345", "\n", "\n\n", ".\n", " {\n    ", "}", ";\r\n", "<｜end▁of▁sentence｜>",
    " naïve", "🦀", "\t", "  ", "return", " x", "+=", "é", "\u{301}", "한국어", " <|EOT|>",
];

/// A text of about `words` words, some of which the tokenizer has never seen.
pub fn text(random: &mut Random, words: u64) -> String {
    let mut text = String::new();
    for _ in 0..words {
        match random.below(8) {
            0 => text.push_str(&format!(" w{}", random.below(10_000))),
            _ => text.push_str(WORDS[random.below(WORDS.len() as u64) as usize]),
        }
    }
    text.push('x');
    text
}

/// A folder of `count` text files; returns their texts.
pub fn write_corpus(folder: &Path, seed: u64, count: u64) -> Vec<String> {
    let mut random = Random(seed);
    let texts: Vec<String> = (0..count)
        .map(|_| {
            let words = 1 + random.below(400);
            text(&mut random, words)
        })
        .collect();
    for (i, text) in texts.iter().enumerate() {
        let folder = folder.join(format!("part-{}", i % 7));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{i}.txt")), text).unwrap();
    }
    texts
}

/// Options for small corpora: many small row groups.
pub fn args(input: &Path, out: &Path) -> PrepareArgs {
    let mut args = PrepareArgs::new(vec![input.to_owned()], out.to_owned());
    args.vocab = Some(400);
    args.held_out = 0.1;
    args.row_group_tokens = 700;
    args
}

/// A prepared corpus in `folder`.
pub fn prepared(folder: &Path, seed: u64, count: u64) -> PathBuf {
    let (input, out) = (folder.join(format!("in-{seed}")), folder.join(format!("out-{seed}")));
    write_corpus(&input, seed, count);
    data::prepare(&args(&input, &out)).unwrap();
    out
}

pub fn spec(sources: &[(&Path, f64)], sequence_length: usize, split: Split) -> OrderSpec {
    let sources = sources.iter().map(|(path, weight)| Source { path: path.to_path_buf(), weight: *weight }).collect();
    OrderSpec { sources, sequence_length, seed: 5, phase: 0, split }
}

/// Fails fast: a test that meets a broken store should not wait.
pub fn options() -> LoaderOptions {
    let mut options = LoaderOptions::default();
    options.retry.patience = std::time::Duration::from_millis(20);
    options.retry.first_pause = std::time::Duration::from_millis(1);
    options
}
