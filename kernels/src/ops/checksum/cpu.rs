//! The reference: a piece that fits a core's cache at a time.
use super::words;
use tch::{Kind, Tensor};

/// Words of a piece: twice as many fit a 32-bit factor.
const PIECE: i64 = 32 * 1024;

pub(super) fn checksum(tensor: &Tensor) -> i64 {
    let words = words(tensor);
    let (mut wide, mut narrow) = (vec![0_i32; PIECE as usize], vec![0_i16; PIECE as usize]);
    let mut sum = 0_u64;
    for (piece, first) in words.split(PIECE, 0).iter().zip((0_u64..).step_by(PIECE as usize)) {
        let count = piece.size()[0] as usize;
        let (plain, weighted) = if words.kind() == Kind::Int {
            piece.copy_data(&mut wide[..count], count);
            sums(&wide[..count], |word| word as u32)
        } else {
            piece.copy_data(&mut narrow[..count], count);
            sums(&narrow[..count], |word| u32::from(word as u16))
        };
        // Σ (2 (first + i) + 1) w = 2 first Σ w + Σ (2i + 1) w
        sum = sum.wrapping_add((2 * first).wrapping_mul(plain)).wrapping_add(weighted);
    }
    sum as i64
}

/// (Σ w, Σ (2i + 1) w); neither can pass 2⁶⁴ in a piece.
fn sums<W: Copy>(words: &[W], bits: impl Fn(W) -> u32) -> (u64, u64) {
    let terms = words.iter().zip((1_u32..).step_by(2)).map(|(&word, factor)| (u64::from(bits(word)), u64::from(factor)));
    terms.fold((0, 0), |(plain, weighted), (word, factor)| (plain + word, weighted + word * factor))
}
