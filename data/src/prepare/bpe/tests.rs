use super::*;

/// The definition: recount everything before each merge.
fn by_recounting(words: &[(String, i64)], vocab_size: u32) -> Bpe {
    let Bpe { mut tokens, .. } = learn(&[], 0);
    let id = |tokens: &[String], text: &str| tokens.iter().position(|t| t == text).map(|i| i as u32);
    let mut spelled: Vec<Vec<u32>> =
        words.iter().map(|(w, _)| w.chars().map(|c| id(&tokens, &c.to_string()).unwrap()).collect()).collect();
    let mut merges = Vec::new();
    while (tokens.len() as u32) < vocab_size {
        let mut counts: HashMap<Pair, i64> = HashMap::new();
        for (word, (_, times)) in spelled.iter().zip(words) {
            word.windows(2).for_each(|p| *counts.entry((p[0], p[1])).or_default() += times);
        }
        let best = counts.into_iter().max_by_key(|(pair, count)| (*count, Reverse(*pair)));
        let Some((pair, _)) = best.filter(|(_, count)| *count >= MIN_FREQUENCY) else { break };
        let joined = format!("{}{}", tokens[pair.0 as usize], tokens[pair.1 as usize]);
        let new = id(&tokens, &joined).unwrap_or(tokens.len() as u32);
        if new as usize == tokens.len() {
            tokens.push(joined);
        }
        merges.push(pair);
        for word in &mut spelled {
            let mut i = 0;
            while i + 1 < word.len() {
                if (word[i], word[i + 1]) == pair {
                    word.splice(i..i + 2, [new]);
                }
                i += 1;
            }
        }
    }
    Bpe { tokens, merges }
}

#[test]
fn the_heap_learns_what_recounting_learns() {
    let mut state = 1u64;
    let mut random = |limit: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % limit
    };
    for letters in [2, 3, 6] {
        // Few letters make overlapping pairs ("aaa"), ties, and tokens that two pairs spell.
        let mut word = || (0..1 + random(9)).map(|_| char::from(b'a' + random(letters) as u8)).collect::<String>();
        let words: Vec<String> = (0..200).map(|_| word()).collect();
        let counted: Vec<(String, i64)> = words.into_iter().map(|w| (w, 1 + random(4) as i64)).collect();
        let learned = learn(&counted, smallest_vocab() + 150);
        assert!(learned.merges.len() >= 100, "{}", learned.merges.len());
        assert_eq!(learned, by_recounting(&counted, smallest_vocab() + 150));
    }
}

#[test]
fn no_token_is_longer_than_a_reader_bears() {
    let learned = learn(&[("-".repeat(100_000), 1), ("ab".into(), 5)], smallest_vocab() + 100);
    let longest = learned.tokens.iter().map(|token| token.chars().filter(|letter| *letter == '-').count()).max();
    assert_eq!(longest, Some(LONGEST_TOKEN), "{:?}", learned.merges);
    assert!(learned.tokens.iter().any(|token| token == "ab"), "and others are learned after it");
}

#[test]
fn the_alphabet_stands_for_all_bytes() {
    let letters: std::collections::HashSet<char> = (0..=255).map(byte_letter).collect();
    assert_eq!(letters.len(), 256);
    assert_eq!((byte_letter(b'\n'), byte_letter(b' '), byte_letter(b'a')), ('Ċ', 'Ġ', 'a'));
}
