//! The reference.
use super::Parts;
use tch::{Kind, Tensor};

pub fn sum_of_squares(gradients: &[&Tensor]) -> Tensor {
    let sums = gradients.iter().map(|gradient| gradient.to_kind(Kind::Double).square().sum(Kind::Double));
    Tensor::stack(&sums.collect::<Vec<_>>(), 0).sum(Kind::Double)
}

/// Into the first of the others', in rank order: of rank 0's own part and the next either may come first.
pub fn add(parts: &Parts) {
    let mut sum = parts.first.shallow_clone();
    for other in 0..parts.others() {
        if other > 0 {
            let _ = sum.g_add_(&parts.place(other));
        }
        if parts.rank == other + 1 || (parts.rank, other) == (0, 0) {
            let _ = sum.g_add_(&parts.own);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn parts_are_added_up_in_rank_order() {
        for (rank, ranks) in [(0, 2), (1, 2), (0, 4), (2, 4), (4, 5)] {
            tch::manual_seed(7);
            let made = Tensor::randn([ranks, 3, 35], (Kind::Float, Device::Cpu)) * Tensor::randn([ranks, 1, 1], (Kind::Float, Device::Cpu)).exp();
            let room = |shape: &[i64]| Ok::<_, std::convert::Infallible>(Tensor::empty(shape, (Kind::Float, Device::Cpu)));
            let Ok(parts) = Parts::of(made.get(rank), (rank as usize, ranks as usize), room);
            for (other, peer) in (0..ranks).filter(|&peer| peer != rank).enumerate() {
                parts.place(other).copy_(&made.get(peer));
            }
            add(&parts);
            let want = (1..ranks).fold(made.get(0), |sum, peer| sum + made.get(peer));
            assert!(parts.first.equal(&want) && made.get(rank).equal(&parts.own), "rank {rank} of {ranks}");
        }
    }
}
