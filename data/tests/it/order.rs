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
    assert!(matches!(apart, Err(data::DataError::SourcesDiffer { what: "tokenizer", .. })), "{apart:?}");
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

/// A run's phases: each reads so many samples of an order of its own.
struct Phase {
    loader: Loader,
    samples: u64,
}

/// What a rank of `world` reads of `phases` from `cursor` (phase, sample) on, up to `stop` samples in all: (phase, sample).
fn read_run(phases: &[Phase], cursor: (usize, u64), stop: u64, rank: u64, world: u64) -> Vec<(usize, data::Sample)> {
    let before: u64 = phases[..cursor.0].iter().map(|phase| phase.samples).sum::<u64>() + cursor.1;
    let mut left = stop - before;
    let mut read = Vec::new();
    for (number, phase) in phases.iter().enumerate().skip(cursor.0) {
        let first = if number == cursor.0 { cursor.1 } else { 0 };
        let end = phase.samples.min(first + left);
        left -= end - first;
        let mine: Vec<u64> = (first..end).filter(|i| i % world == rank).collect();
        phase.loader.prefetch(&mine[..mine.len() / 3]);
        read.extend(phase.loader.read(&mine).unwrap().into_iter().map(|sample| (number, sample)));
    }
    read
}

/// Phases that change length, mixture or both; stops anywhere and at each edge; another world size after each stop.
#[test]
fn a_run_over_phases_is_the_same_however_often_and_wherever_it_stops() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(21);
    let mut paths = vec![corpus::prepared(folder.path(), 31, 60)];
    for seed in [32, 33] {
        let input = folder.path().join(format!("in-{seed}"));
        corpus::write_corpus(&input, seed, 20 + random.below(60));
        let mut args = corpus::args(&input, &folder.path().join(format!("out-{seed}")));
        (args.vocab, args.tokenizer) = (None, Some(paths[0].join("tokenizer.json")));
        args.row_group_tokens = 100 + random.below(2000);
        paths.push(data::prepare(&args).unwrap().out);
    }
    for round in 0..10 {
        let open = |random: &mut Random| -> Vec<Phase> {
            let phase = |(number, random): (u64, &mut Random)| {
                let sources: Vec<(&std::path::Path, f64)> =
                    paths[..1 + random.below(3) as usize].iter().map(|path| (path.as_path(), 0.1 + random.below(90) as f64)).collect();
                let mut spec = spec(&sources, 1 + random.below(120) as usize, Split::Train);
                (spec.seed, spec.phase) = (round, number);
                let mut options = options();
                options.cache_bytes = 1 + random.below(20_000);
                Phase { loader: Loader::open(spec, options).unwrap(), samples: 1 + random.below(150) }
            };
            (0..3).map(|number| phase((number, random))).collect()
        };
        let shape = random.next();
        let phases = open(&mut Random(shape));
        let total: u64 = phases.iter().map(|phase| phase.samples).sum();
        let whole = read_run(&phases, (0, 0), total, 0, 1);
        assert_eq!(whole.len() as u64, total);
        let edge = phases[0].samples;
        let mut stops = vec![edge, edge + phases[1].samples, random.below(total), random.below(total)];
        stops.sort_unstable();
        stops.push(total);
        let (mut at, mut resumed) = (0, Vec::new());
        for stop in stops {
            let (mut phase, mut sample) = (0, at);
            while phase < 2 && sample >= phases[phase].samples {
                (phase, sample) = (phase + 1, sample - phases[phase].samples);
            }
            // A resumed run opens everything anew, on another number of ranks.
            let (world, again) = (1 + random.below(5), open(&mut Random(shape)));
            let mut ranks: Vec<_> = (0..world).flat_map(|rank| read_run(&again, (phase, sample), stop, rank, world)).collect();
            ranks.sort_by_key(|(phase, sample)| (*phase, sample.index));
            resumed.extend(ranks);
            at = stop;
        }
        assert!(resumed == whole, "round {round}: stops change the run");
    }
}

/// Random corpora and lengths: over one epoch each token but the counted rest is a target once, and has the value it has in
/// the stream.
#[test]
fn every_token_of_a_source_is_a_target_once_an_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random(41);
    for round in 0..6 {
        let input = folder.path().join(format!("in-{round}"));
        corpus::write_corpus(&input, 50 + round, 3 + random.below(70));
        let mut args = corpus::args(&input, &folder.path().join(format!("out-{round}")));
        args.row_group_tokens = 1 + random.below(3000);
        let path = data::prepare(&args).unwrap().out;
        let stream = stream(&path, Split::Train);
        for _ in 0..4 {
            let length = 1 + random.below(stream.len() as u64 / 4) as usize;
            let loader = Loader::open(spec(&[(&path, 1.0)], length, Split::Train), options()).unwrap();
            let (n, epoch) = (loader.num_samples(), random.below(3));
            let mut counts = vec![0; stream.len()];
            for sample in loader.read(&(n * epoch..n * (epoch + 1)).collect::<Vec<_>>()).unwrap() {
                let place = loader.locate(sample.index).unwrap();
                assert_eq!(place.epoch, epoch);
                let start = place.sample as usize * length;
                assert_eq!(sample.tokens, stream[start..start + length + 1]);
                counts[start + 1..start + length + 1].iter_mut().for_each(|count| *count += 1);
            }
            let unused = loader.unused_tokens()[0] as usize;
            assert!(unused < length && counts[0] == 0, "the stream's first token is nobody's target");
            assert!(counts[1..stream.len() - unused].iter().all(|count| *count == 1), "L = {length}");
            assert!(counts[stream.len() - unused..].iter().all(|count| *count == 0), "L = {length}");
        }
    }
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

/// One corpus with a held-out split, one of the same tokenizer with or without.
fn beside(folder: &std::path::Path, first: &std::path::Path, seed: u64, held_out: f64) -> std::path::PathBuf {
    let input = folder.join(format!("in-{seed}"));
    corpus::write_corpus(&input, seed, 150);
    let mut args = corpus::args(&input, &folder.join(format!("out-{seed}")));
    (args.vocab, args.tokenizer, args.held_out) = (None, Some(first.join("tokenizer.json")), held_out);
    data::prepare(&args).unwrap().out
}

#[test]
fn held_out_samples_come_by_the_mixtures_shares_from_the_sources_that_have_some() {
    let folder = tempfile::tempdir().unwrap();
    let a = corpus::prepared(folder.path(), 61, 150);
    let b = beside(folder.path(), &a, 62, 0.1);
    let c = beside(folder.path(), &a, 63, 0.0);
    let entropy = |path: &std::path::Path| Loader::open(spec(&[(path, 1.0)], 8, Split::Train), options()).unwrap().unigram_entropy();
    let (of_a, of_b) = (entropy(&a).unwrap(), entropy(&b).unwrap());
    assert_eq!(entropy(&c), None);
    assert_ne!(of_a, of_b);

    let loader = Loader::open(spec(&[(&c, 5.0), (&a, 1.0), (&b, 9.0)], 8, Split::HeldOut), options()).unwrap();
    assert_eq!(loader.left_out(), std::slice::from_ref(&c));
    assert!((loader.unigram_entropy().unwrap() - (of_a + 9.0 * of_b) / 10.0).abs() < 1e-12);
    let alone = [&a, &b].map(|path| Loader::open(spec(&[(path, 1.0)], 8, Split::HeldOut), options()).unwrap());
    let mut counts = [0u64; 2];
    for sample in loader.read(&(0..20).collect::<Vec<_>>()).unwrap() {
        let source = sample.source as usize;
        assert_eq!(sample.tokens, alone[source].read(&[counts[source]]).unwrap()[0].tokens);
        counts[source] += 1;
    }
    assert_eq!(counts, [2, 18]);

    let none = Loader::open(spec(&[(&c, 1.0)], 8, Split::HeldOut), options()).map(|_| ()).unwrap_err();
    assert!(matches!(none, data::DataError::TooFewTokens { tokens: 0, .. }) && none.to_string().contains("out-63"), "{none}");
}

#[test]
fn a_source_goes_on_in_the_next_order_and_the_fingerprint_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let a = corpus::prepared(folder.path(), 64, 100);
    let b = beside(folder.path(), &a, 65, 0.1);
    let open = |sources: &[(&std::path::Path, f64)], phase| {
        let spec = data::OrderSpec { phase, ..spec(sources, 16, Split::Train) };
        Loader::open(spec, options()).unwrap()
    };
    let first = open(&[(&a, 1.0)], 0);
    let edge = first.num_samples() / 2;
    let begun = first.begun_at(edge);
    let fresh = open(&[(&b, 1.0), (&a, 3.0)], 1);
    let new = fresh.begun_at(0)[0];
    let next = open(&[(&b, 1.0), (&a, 3.0)], 1).go_on(&[new, begun[0]]);
    assert_ne!(next.fingerprint(), fresh.fingerprint(), "other samples");
    assert_eq!(open(&[(&b, 1.0), (&a, 3.0)], 1).go_on(&fresh.begun_at(0)).fingerprint(), fresh.fingerprint());
    // What is left of a's epoch comes as if no phase had ended.
    let of_a = (0..).map(|index| (index, next.locate(index).unwrap())).filter(|(_, place)| place.source == 1);
    for (before, (index, place)) in (edge..first.num_samples()).zip(of_a) {
        assert_eq!((place.epoch, place.sample), (0, first.locate(before).unwrap().sample));
        assert_eq!(next.read(&[index]).unwrap()[0].tokens, first.read(&[before]).unwrap()[0].tokens);
    }
}
