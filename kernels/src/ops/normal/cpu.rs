//! The reference: all cores, a piece each.

/// A bijective 64-bit finaliser: successive counters give independent-looking words.
pub(super) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The `index`-th standard normal number of a key (Box–Muller).
fn normal(key: u64, index: u64) -> f64 {
    let unit = |word: u64| ((word >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    let radius = (-2.0 * unit(mix(key ^ mix(2 * index))).ln()).sqrt();
    radius * (2.0 * std::f64::consts::PI * unit(mix(key ^ mix(2 * index + 1)))).cos()
}

pub(super) fn draw(key: u64, first: u64, count: usize, std: f64) -> Vec<f32> {
    let mut values = vec![0f32; count];
    let each = (count / std::thread::available_parallelism().map_or(1, |cores| cores.get())).max(1 << 20);
    std::thread::scope(|scope| {
        for (piece, start) in values.chunks_mut(each).zip((first..).step_by(each)) {
            scope.spawn(move || piece.iter_mut().zip(start..).for_each(|(value, i)| *value = (normal(key, i) * std) as f32));
        }
    });
    values
}
