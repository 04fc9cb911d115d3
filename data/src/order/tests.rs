use std::collections::{HashMap, HashSet};

use super::*;

fn key(split: Split, seed: u64, phase: u64) -> OrderKey {
    OrderKey { sequence_length: 8, seed, phase, split }
}

/// Small pseudo-random numbers for shapes.
fn draw(state: u64, limit: u64) -> u64 {
    derive(&[99, state]) % limit
}

#[test]
fn epochs_are_complete_whatever_the_windows_and_blocks() {
    for round in 0..40 {
        let sizes: Vec<u64> = (0..1 + draw(round, 3)).map(|s| 1 + draw(round * 10 + s, 300)).collect();
        let sources: Vec<(u64, f64)> = sizes.iter().map(|n| (*n, 1.0 + draw(*n, 5) as f64)).collect();
        let (window, block) = (1 + draw(round + 50, 40), 1 + draw(round + 70, 60));
        let order = Order::with_window(key(Split::Train, round, round % 2), &sources, window, block).unwrap();
        let mut seen: HashMap<u32, Vec<(u64, u64)>> = HashMap::new();
        for index in 0..3000 {
            let place = order.locate(index).unwrap();
            seen.entry(place.source).or_default().push((place.epoch, place.sample));
        }
        for (source, places) in seen {
            let n = sizes[source as usize];
            assert!(places.iter().all(|(_, sample)| *sample < n));
            assert_eq!(places.iter().collect::<HashSet<_>>().len(), places.len(), "a sample twice in an epoch");
            // One epoch after the other, each complete but the last.
            for (k, (epoch, _)) in places.iter().enumerate() {
                assert_eq!(*epoch, k as u64 / n);
            }
        }
    }
}

#[test]
fn shares_are_exact_to_half_a_sample_at_block_ends() {
    let weights = [0.703, 0.2, 0.0969, 0.0001];
    let sources: Vec<(u64, f64)> = weights.iter().map(|w| (1_000_003, w * 42.0)).collect();
    let order = Order::new(key(Split::Train, 3, 1), &sources).unwrap();
    let mut counts = [0u64; 4];
    let mut block = 0;
    for index in 0..1_000_000 {
        if index == order.blocks_total(block) {
            for (count, share) in counts.iter().zip(&order.sources) {
                let exact = share.weight as f64 / ONE as f64 * (BLOCK * block) as f64;
                assert!((*count as f64 - exact).abs() <= 0.5, "{count} for {exact} at block {block}");
            }
            block += 1;
        }
        counts[order.locate(index).unwrap().source as usize] += 1;
    }
    for (count, weight) in counts.iter().zip(weights) {
        let share = *count as f64 / 1e6;
        assert!((share - weight).abs() <= 0.01 * weight, "{share} for {weight}");
    }
}

#[test]
fn random_mixtures_keep_their_shares_over_a_million_samples() {
    for round in 0..2 {
        let weights: Vec<f64> = (0..2 + draw(round, 5)).map(|s| 0.02 + draw(round * 100 + s, 1000) as f64 / 1000.0).collect();
        let sources: Vec<(u64, f64)> = weights.iter().map(|weight| (1 + draw((weight * 1e6) as u64, 100_000), *weight)).collect();
        let order = Order::new(key(Split::Train, round, round), &sources).unwrap();
        let mut counts = vec![0u64; weights.len()];
        (0..1_000_000).for_each(|index| counts[order.locate(index).unwrap().source as usize] += 1);
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(&weights) {
            let (share, wanted) = (*count as f64 / 1e6, weight / total);
            assert!((share - wanted).abs() <= 0.01 * wanted, "{share} for {wanted} of {weights:?}");
        }
    }
}

#[test]
fn windows_stay_together_and_the_short_one_stays_last() {
    let order = Order::with_window(key(Split::Train, 1, 0), &[(103, 1.0)], 10, 1).unwrap();
    let epoch: Vec<u64> = (0..103).map(|i| order.locate(i).unwrap().sample).collect();
    for window in epoch.chunks(10) {
        let first = window.iter().min().unwrap() / 10;
        assert!(window.iter().all(|sample| sample / 10 == first), "{window:?}");
    }
    assert!(epoch[100..].iter().all(|sample| *sample >= 100));
    assert_ne!(epoch[..100], (0..100).collect::<Vec<_>>()[..]);
    let next: Vec<u64> = (103..206).map(|i| order.locate(i).unwrap().sample).collect();
    assert_ne!(epoch, next, "an epoch has an order of its own");
}

#[test]
fn seed_and_phase_change_the_order_and_nothing_else_does() {
    let order = |seed, phase| {
        let order = Order::new(key(Split::Train, seed, phase), &[(50_000, 2.0), (70_000, 1.0)]).unwrap();
        (0..500).map(|i| order.locate(i).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(order(1, 1), order(1, 1));
    let all: HashSet<Vec<Place>> = [(1, 1), (1, 2), (2, 1), (2, 2)].map(|(s, p)| order(s, p)).into_iter().collect();
    assert_eq!(all.len(), 4);
}

#[test]
fn held_out_is_one_source_after_the_other() {
    let order = Order::new(key(Split::HeldOut, 1, 1), &[(3, 1.0), (2, 9.0)]).unwrap();
    let places: Vec<(u32, u64)> = (0..5).map(|i| order.locate(i).unwrap()).map(|p| (p.source, p.sample)).collect();
    assert_eq!(places, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]);
    assert!(order.locate(5).is_err());
}

#[test]
fn bad_weights_are_refused() {
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(Order::new(key(Split::Train, 0, 0), &[(5, 1.0), (5, weight)]).is_err(), "{weight}");
    }
    assert!(Order::new(key(Split::Train, 0, 0), &[]).is_err());
    assert!(Order::new(key(Split::Train, 0, 0), &[(5, 1.0), (5, 1e-12)]).is_err());
}
