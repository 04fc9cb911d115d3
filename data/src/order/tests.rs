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
fn held_out_keeps_the_shares_from_the_first_samples_on_and_ends_with_the_first_source() {
    let order = Order::new(key(Split::HeldOut, 1, 0), &[(3, 1.0), (2, 9.0)]).unwrap();
    let places = |order: &Order| (0..order.num_samples()).map(|i| order.locate(i).unwrap()).collect::<Vec<_>>();
    assert_eq!(places(&order).iter().map(|p| (p.source, p.sample)).collect::<Vec<_>>(), [(1, 0), (1, 1)]);
    assert!(order.locate(2).is_err());
    for round in 0..20 {
        let sources: Vec<(u64, f64)> =
            (0..1 + draw(round, 5)).map(|s| (1 + draw(round * 9 + s, 500), 1.0 + draw(s + round, 99) as f64)).collect();
        let order = Order::new(key(Split::HeldOut, round, 0), &sources).unwrap();
        let total: f64 = sources.iter().map(|(_, weight)| weight).sum();
        let mut counts = vec![0u64; sources.len()];
        for place in places(&order) {
            let count = &mut counts[place.source as usize];
            assert_eq!((place.epoch, place.sample), (0, *count), "stream order, one pass");
            *count += 1;
            let read: u64 = counts.iter().sum();
            for (count, (_, weight)) in counts.iter().zip(&sources) {
                let exact = weight / total * read as f64;
                assert!((*count as f64 - exact).abs() <= sources.len() as f64, "{count} for {exact} of {sources:?}");
            }
        }
        assert!(counts.iter().zip(&sources).any(|(count, (limit, _))| count == limit), "{counts:?} of {sources:?}");
    }
}

/// Phases that change shares, sources and their places, where a source's draws go on.
#[test]
fn a_source_that_goes_on_gives_no_sample_twice_before_its_epoch_is_over() {
    for round in 0..30 {
        let sizes: Vec<u64> = (0..4).map(|s| 1 + draw(round * 10 + s, 900)).collect();
        let mut begun: Vec<Option<Begun>> = vec![None; 4];
        let mut seen: Vec<Vec<Place>> = vec![Vec::new(); 4];
        for phase in 0..5 {
            let names: Vec<usize> = (0..4)
                .map(|s| (s + round as usize + phase as usize) % 4)
                .filter(|s| draw(round * 50 + phase * 4 + *s as u64, 4) > 0)
                .collect();
            let names = if names.is_empty() { vec![0] } else { names };
            let sources: Vec<(u64, f64)> = names.iter().map(|s| (sizes[*s], 1.0 + draw(round + phase + *s as u64, 7) as f64)).collect();
            let mut order = Order::with_window(key(Split::Train, round, phase), &sources, 7, 16).unwrap();
            let from = |(place, name): (usize, &usize)| begun[*name].unwrap_or(Begun { order: phase, source: place as u64, drawn: 0 });
            order.go_on(&names.iter().enumerate().map(from).collect::<Vec<_>>());
            let end = draw(round * 7 + phase, 700);
            for index in 0..end {
                let place = order.locate(index).unwrap();
                seen[names[place.source as usize]].push(Place { source: 0, ..place });
            }
            names.iter().zip(order.begun_at(end)).for_each(|(name, now)| begun[*name] = Some(now));
        }
        for (places, n) in seen.iter().zip(&sizes) {
            assert_eq!(places.iter().collect::<HashSet<_>>().len(), places.len(), "a sample twice in an epoch");
            assert!(places.iter().enumerate().all(|(k, place)| place.epoch == k as u64 / n), "an epoch begins before the last is over");
        }
        for (begun, places) in begun.iter().zip(&seen) {
            assert_eq!(begun.map_or(0, |begun| begun.drawn), places.len() as u64);
        }
    }
}

#[test]
fn bad_weights_are_refused() {
    for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(Order::new(key(Split::Train, 0, 0), &[(5, 1.0), (5, weight)]).is_err(), "{weight}");
    }
    assert!(Order::new(key(Split::Train, 0, 0), &[]).is_err());
    assert!(Order::new(key(Split::Train, 0, 0), &[(5, 1.0), (5, 1e-12)]).is_err());
}

/// Runs are resumed by later builds: what (seed, phase 0, index) names must never change.
#[test]
fn the_order_of_samples_is_the_one_of_the_first_release() {
    let digest = |phase, sources: &[(u64, f64)]| {
        let order = Order::with_window(key(Split::Train, 3, phase), sources, 10, 16).unwrap();
        let places = (0..2000).map(|index| order.locate(index).unwrap());
        places.fold(0, |sum, place| derive(&[sum, u64::from(place.source), place.epoch, place.sample]))
    };
    let (one, three) = ([(301, 1.0)], [(301, 5.0), (95, 1.0), (1000, 2.5)]);
    assert_eq!(
        [digest(0, &one), digest(0, &three), digest(1, &one), digest(1, &three)],
        [10598454045753551419, 15460943683282258131, 11456061286082085332, 4314276132474527125]
    );
}
