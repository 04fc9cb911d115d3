//! A checksum of tensors' bits, to notice memory that changed by itself: Σ (2i + 1) · word i, mod 2⁶⁴, over the words of a
//! tensor, which are 32 bits wide, or 16 where its elements are. A flipped bit changes one word by a power of two below
//! 2³², and times an odd number that is never 0 mod 2⁶⁴. The sum has no order: a pass that writes a tensor may take it as it goes.
use crate::device;
use crate::jit::Source;
use crate::launch::{Launch, Shape, aligned};
use tch::{Kind, Tensor};

mod cpu;

const TEXT: &str = include_str!("checksum.cu");
const THREADS: i64 = 256;
/// Of a launch: enough for any GPU.
const MOST_BLOCKS: i64 = 1056;

fn source(narrow: bool) -> Source {
    let define = ("NARROW", i64::from(narrow).to_string());
    Source { name: "checksum", text: TEXT.to_string(), defines: vec![define] }
}

/// Every variant, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    [false, true].map(|narrow| (source(narrow), "checksum")).into()
}

/// Of each tensor (contiguous, all on one device) → [n] i64, there. On a GPU without a wait of the host.
pub fn checksums(tensors: &[Tensor]) -> Tensor {
    let Some(first) = tensors.first().filter(|first| first.device().is_cuda()) else {
        return Tensor::from_slice(&tensors.iter().map(cpu::checksum).collect::<Vec<i64>>());
    };
    let gpu = device::gpu(first.device());
    let sums = Tensor::zeros([tensors.len() as i64], (Kind::Int64, first.device()));
    for (index, tensor) in tensors.iter().enumerate() {
        let words = &words(&aligned(tensor));
        let narrow = words.kind() == Kind::Int16;
        let name = if narrow { "checksum of 16 bits" } else { "checksum of 32 bits" };
        let kernel = gpu.kernel(name, "checksum", || source(narrow)).expect("our own kernels compile and load");
        let count = words.numel() as i64;
        let blocks = (count / (4 * THREADS) + 1).min(MOST_BLOCKS);
        Launch::new(gpu, &kernel).tensor(words, words.kind()).tensor(&sums.narrow(0, index as i64, 1), Kind::Int64).int(count).run(Shape {
            grid: [blocks as usize, 1],
            block: THREADS as usize,
            shared_bytes: 0,
        });
    }
    sums
}

/// The words of a tensor's bits, flat.
fn words(tensor: &Tensor) -> Tensor {
    let kind = match tensor.kind().elt_size_in_bytes() {
        4 | 8 => Kind::Int,
        2 => Kind::Int16,
        bytes => panic!("no checksum of {:?}, whose elements have {bytes} bytes", tensor.kind()),
    };
    tensor.view(-1).view_dtype(kind)
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
            let words = words(&tensor);
            let bits = if words.kind() == Kind::Int { 0xffff_ffff } else { 0xffff };
            let factors = Tensor::arange_start_step(1, 2 * words.numel() as i64, 2, (Kind::Int64, Device::Cpu));
            let sum = (words.to_kind(Kind::Int64).bitwise_and(bits) * factors).sum(Kind::Int64);
            assert_eq!(cpu::checksum(&tensor), sum.int64_value(&[]), "{count} of {kind:?}");
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
            let words = words(&tensor);
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
