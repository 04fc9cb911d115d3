//! A seeded bijection of 0..n in constant memory: a Feistel network over the next power of four,
//! walked until it falls inside (at most four steps on average). Invariant: for every key and
//! every n, `permute` hits each number below n exactly once.

const ROUNDS: u64 = 6;

/// Folds `parts` into one well-mixed number; the order of the parts matters.
pub(crate) fn derive(parts: &[u64]) -> u64 {
    parts.iter().fold(0x243f_6a88_85a3_08d3, |state, part| mix(state ^ mix(*part)))
}

/// SplitMix64's finaliser, with its increment.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Where `i` goes in the permutation of 0..n that `key` names. Panics unless i < n.
pub(crate) fn permute(key: u64, n: u64, i: u64) -> u64 {
    assert!(i < n, "{i} is not below {n}");
    let bits = u64::BITS - (n - 1).leading_zeros();
    let half = bits.div_ceil(2).max(1);
    let mask = (1u64 << half) - 1;
    let mut value = i;
    loop {
        let (mut left, mut right) = (value >> half, value & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (mix(key ^ mix(right ^ (round << 56))) & mask));
        }
        value = left << half | right;
        if value < n {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{derive, permute};

    #[test]
    fn every_size_is_permuted_without_loss() {
        for n in (1..200).chain([255, 256, 257, 1023, 4096, 10_007]) {
            let mut seen = vec![false; n as usize];
            for i in 0..n {
                let p = permute(derive(&[7, n]), n, i) as usize;
                assert!(!std::mem::replace(&mut seen[p], true), "{p} twice for n = {n}");
            }
        }
    }

    #[test]
    fn keys_give_different_and_thorough_orders() {
        let order = |key| (0..1000).map(|i| permute(key, 1000, i)).collect::<Vec<_>>();
        assert_ne!(order(1), order(2));
        // Neighbours land apart: the mean distance in a random order is n / 3.
        let walk = order(derive(&[3]));
        let mean = walk.windows(2).map(|w| w[0].abs_diff(w[1])).sum::<u64>() as f64 / 999.0;
        assert!((mean - 333.3).abs() < 30.0, "mean distance {mean}");
        let fixed = (0..1000).filter(|i| permute(derive(&[3]), 1000, *i) == *i).count();
        assert!(fixed < 8, "{fixed} fixed points");
    }

    #[test]
    fn large_domains_do_not_overflow() {
        for n in [(1 << 62) + 1, 1 << 62, (1 << 32) + 1] {
            assert!(permute(5, n, n - 1) < n);
        }
    }
}
