//! Random corpora, weights, lengths, world sizes and stops: the order's promises.

use std::collections::HashMap;

use data::{Loader, Split};

use crate::corpus::{self, Random, options, spec};

/// The whole token stream of a source, put together from samples of one token at a distance of one.
fn stream(path: &std::path::Path, split: Split) -> Vec<u32> {
    let loader = Loader::open(spec(&[(path, 1.0)], 1, split), options()).unwrap();
    let n = loader.num_samples();
    let mut by_place = vec![None; n as usize + 1];
    let indices: Vec<u64> = (0..n).collect();
    for (sample, index) in loader.read(&indices).unwrap().into_iter().zip(&indices) {
        let at = loader.locate(*index).unwrap().sample as usize;
        by_place[at] = Some(sample.tokens[0]);
        by_place[at + 1] = Some(sample.tokens[1]);
    }
    by_place.into_iter().map(|token| token.expect("every place is in some sample")).collect()
}

#[test]
fn a_sample_is_its_piece_of_the_stream() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 1, 120);
    for split in [Split::Train, Split::HeldOut] {
        let stream = stream(&path, split);
        for length in [7, 64, 1000] {
            let mut options = options();
            options.extra_tokens = length % 3;
            let wanted = length + 1 + options.extra_tokens;
            let loader = Loader::open(spec(&[(&path, 1.0)], length, split), options).unwrap();
            let end = loader.end_token();
            for index in 0..loader.num_samples() {
                let sample = loader.read(&[index]).unwrap().remove(0);
                let start = loader.locate(index).unwrap().sample as usize * length;
                assert_eq!(sample.tokens, stream[start..start + wanted]);
                let begins = (start..start + wanted).filter(|at| *at == 0 || stream[at - 1] == end);
                let begins: Vec<u32> = begins.map(|at| (at - start) as u32).collect();
                assert_eq!(sample.document_starts, begins, "L = {length}, sample {index}");
            }
        }
    }
}

#[test]
fn ranks_together_read_the_one_rank_order_and_a_stop_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = [2, 3].map(|seed| corpus::prepared(folder.path(), seed, 80));
    // Sources of one run share a tokenizer: prepare the second with the first's.
    let mut args = corpus::args(&folder.path().join("in-3"), &folder.path().join("b"));
    args.vocab = None;
    args.tokenizer = Some(a.join("tokenizer.json"));
    let b_again = data::prepare(&args).unwrap().out;
    let apart = Loader::open(spec(&[(&a, 1.0), (&b, 1.0)], 32, Split::Train), options()).map(|_| ());
    assert!(matches!(apart, Err(data::DataError::TokenizersDiffer { .. })), "{apart:?}");
    let mut random = Random(11);
    for round in 0..6 {
        let weights = [1 + random.below(9), 1 + random.below(9)].map(|w| w as f64);
        let mut spec = spec(&[(&a, weights[0]), (&b_again, weights[1])], 16 << (round % 3), Split::Train);
        spec.seed = random.next();
        spec.phase = round;
        let total = 600;
        let one = Loader::open(spec.clone(), options()).unwrap();
        let all = one.read(&(0..total).collect::<Vec<_>>()).unwrap();
        for world in [2u64, 3, 4] {
            // Each rank opens its own loader at a random stop, and prefetches what it likes.
            let stop = random.below(total);
            for rank in 0..world {
                let mine: Vec<u64> = (stop..total).filter(|i| i % world == rank).collect();
                let mut small = options();
                small.cache_bytes = 4000;
                let loader = Loader::open(spec.clone(), small).unwrap();
                assert_eq!(loader.fingerprint(), one.fingerprint());
                loader.prefetch(&mine[..mine.len() / 2]);
                for sample in loader.read(&mine).unwrap() {
                    assert_eq!(sample, all[sample.index as usize]);
                }
            }
        }
        let mut other = spec.clone();
        other.phase += 1;
        let other = Loader::open(other, options()).unwrap();
        assert_ne!(other.fingerprint(), one.fingerprint());
        let again = other.read(&(0..100).collect::<Vec<_>>()).unwrap();
        assert!(again.iter().zip(&all).any(|(x, y)| x.tokens != y.tokens), "a phase has an order of its own");
    }
}

#[test]
fn every_sample_of_a_source_comes_once_an_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 4, 100);
    let loader = Loader::open(spec(&[(&path, 1.0)], 24, Split::Train), options()).unwrap();
    let (n, unused) = (loader.num_samples(), loader.unused_tokens()[0]);
    let tokens = stream(&path, Split::Train).len() as u64;
    assert_eq!(n * 24 + 1 + unused, tokens);
    assert!(unused < 24);
    let mut seen: HashMap<(u64, u64), u64> = HashMap::new();
    let places = (0..n * 5).map(|i| loader.locate(i).unwrap());
    places.for_each(|place| *seen.entry((place.epoch, place.sample)).or_default() += 1);
    assert_eq!(seen.len() as u64, n * 5);
    assert!((0..5).all(|epoch| (0..n).all(|sample| seen.contains_key(&(epoch, sample)))));
}

/// Twenty files of 150 documents each, every document naming its file in its first words.
#[test]
fn documents_of_different_files_mix_inside_a_batch() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in");
    std::fs::create_dir_all(&input).unwrap();
    let mut random = Random(12);
    for file in 0..20 {
        let text = |random: &mut Random| format!("file{file}= {}", corpus::text(random, 20));
        let lines = (0..150).map(|_| format!("{}\n", serde_json::json!({"text": text(&mut random)})));
        std::fs::write(input.join(format!("{file:02}.jsonl")), lines.collect::<String>()).unwrap();
    }
    let out = data::prepare(&corpus::args(&input, &folder.path().join("out"))).unwrap().out;
    let tokenizer = data::open_tokenizer(out.join("tokenizer.json")).unwrap();
    let loader = Loader::open(spec(&[(&out, 1.0)], 128, Split::Train), options()).unwrap();
    let (mut distinct, mut expected, mut batches) = (0.0, 0.0, 0.0);
    let indices: Vec<u64> = (0..loader.num_samples()).collect();
    for batch in indices.chunks_exact(8) {
        let text: String = loader.read(batch).unwrap().iter().map(|s| tokenizer.decode(&s.tokens).unwrap()).collect();
        let named = text.split("file").skip(1).filter_map(|rest| rest.split_once("= ")?.0.parse::<u32>().ok());
        let named: Vec<u32> = named.collect();
        distinct += named.iter().collect::<std::collections::HashSet<_>>().len() as f64;
        // Of n documents drawn from 20 equal files in a full shuffle, this many files show up.
        expected += 20.0 * (1.0 - 0.95f64.powi(named.len() as i32));
        batches += 1.0;
    }
    let (distinct, expected) = (distinct / batches, expected / batches);
    println!("files in a batch of 8 samples: {distinct:.2} of 20; in a full shuffle {expected:.2}");
    assert!(batches > 30.0 && expected < 19.5, "too easy: {expected} over {batches}");
    assert!(distinct > 0.95 * expected, "{distinct} files in a batch, {expected} in a full shuffle");
}

#[test]
fn held_out_is_in_stream_order_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = corpus::prepared(folder.path(), 5, 100);
    let loader = Loader::open(spec(&[(&path, 1.0)], 32, Split::HeldOut), options()).unwrap();
    let n = loader.num_samples();
    assert!((0..n).all(|i| loader.locate(i).unwrap().sample == i));
    let beyond = loader.read(&[n]).map(|_| ());
    assert!(matches!(beyond, Err(data::DataError::SampleOutOfRange { index, limit }) if index == n && limit == n));
    assert!(!loader.read(&[]).is_ok_and(|samples| !samples.is_empty()));
}
