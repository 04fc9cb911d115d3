//! A checksum of tensors' bits, to notice memory that changed by itself: Σ (2i + 1) · word i, mod 2⁶⁴, over the words of a
//! tensor, which are 32 bits wide, or 16 where its elements are. A flipped bit changes one word by a power of two below
//! 2³², and times an odd number that is never 0 mod 2⁶⁴. The sum has no order: a pass that writes a tensor may take it as it goes.
mod cpu;

use tch::{Kind, Tensor};

/// Of each tensor (contiguous, all on one device) → [n] i64, there. On a GPU without a wait of the host.
pub fn checksums(tensors: &[Tensor]) -> Tensor {
    match tensors.first() {
        Some(first) if first.device().is_cuda() => Tensor::stack(&tensors.iter().map(sum_of_words).collect::<Vec<_>>(), 0),
        _ => Tensor::from_slice(&tensors.iter().map(cpu::checksum).collect::<Vec<i64>>()),
    }
}

/// A word's kind, read as signed; and the bits of it that count.
fn word(kind: Kind) -> (Kind, i64) {
    match kind.elt_size_in_bytes() {
        4 | 8 => (Kind::Int, 0xffff_ffff),
        2 => (Kind::Int16, 0xffff),
        bytes => panic!("no checksum of {kind:?}, whose elements have {bytes} bytes"),
    }
}

/// In whole-tensor operations, a piece at a time: [] i64. Any device.
fn sum_of_words(tensor: &Tensor) -> Tensor {
    /// Words of a piece: what it needs beside the tensor is 16 bytes a word.
    const PIECE: i64 = 1 << 22;
    let (kind, bits) = word(tensor.kind());
    let words = tensor.view(-1).view_dtype(kind);
    let mut sum = Tensor::zeros([0; 0], (Kind::Int64, tensor.device()));
    for (piece, first) in words.split(PIECE, 0).iter().zip((0..).step_by(PIECE as usize)) {
        let factors = Tensor::arange_start_step(2 * first + 1, 2 * (first + piece.size()[0]) + 1, 2, (Kind::Int64, tensor.device()));
        let _ = sum.g_add_(&(piece.to_kind(Kind::Int64).bitwise_and(bits) * factors).sum(Kind::Int64));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn values(kind: Kind, count: i64) -> Tensor {
        (Tensor::arange(count, (Kind::Double, Device::Cpu)) * 12.9898).sin().to_kind(kind)
    }

    #[test]
    fn one_definition_whoever_sums() {
        for (kind, count) in
            [(Kind::Float, 1), (Kind::Float, 300_000), (Kind::Double, 70_001), (Kind::BFloat16, 131_073), (Kind::Int64, 17)]
        {
            let tensor = values(kind, count);
            assert_eq!(cpu::checksum(&tensor), sum_of_words(&tensor).int64_value(&[]), "{count} of {kind:?}");
        }
        // By hand: 1.0 is 0x3f800000, −2.0 is 0xc0000000.
        let by_hand = 0x3f80_0000 + 3 * 0xc000_0000_i64;
        assert_eq!(checksums(&[Tensor::from_slice(&[1f32, -2.0])]).int64_value(&[0]), by_hand);
        assert_eq!(checksums(&[]).size(), [0]);
    }

    #[test]
    fn every_flipped_bit_and_every_swap_shows() {
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
            let tensor = values(kind, 70_000);
            let before = cpu::checksum(&tensor);
            let words = tensor.view_dtype(word(kind).0);
            let width = if words.kind() == Kind::Int { 32 } else { 16 };
            for (index, bit) in (0..width).map(|bit| (bit * 1097 + 30_000, bit)) {
                let mut place = words.narrow(0, index, 1);
                let flip = Tensor::from(1_i64 << bit).to_kind(words.kind());
                let _ = place.bitwise_xor_tensor_(&flip);
                assert_ne!(cpu::checksum(&tensor), before, "bit {bit} of word {index} of {kind:?}");
                let _ = place.bitwise_xor_tensor_(&flip);
            }
            assert_eq!(cpu::checksum(&tensor), before);
            let swapped = Tensor::cat(&[tensor.narrow(0, 1, 1), tensor.narrow(0, 0, 1), tensor.narrow(0, 2, 69_998)], 0);
            assert_ne!(cpu::checksum(&swapped), before);
        }
    }
}
