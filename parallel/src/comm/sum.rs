//! Element-wise reduction, the one arithmetic of all back ends.
//! Invariant: element i of the result is ((p0[i] + p1[i]) + p2[i]) + …, in rank order, whatever the blocking;
//! so the same layout gives the same bits over threads and over processes.

use super::{CommError, Reduce};
use std::ops::AddAssign;
use tch::kind::Element;
use tch::{Kind, Tensor};

/// Elements added at a time on a CPU: the accumulator stays in the cache while the parts stream past it.
pub(super) const BLOCK: i64 = 1 << 16;

/// Only kinds with an agreed meaning of "sum" may be reduced.
pub(super) fn check_reducible(op: &'static str, tensors: &[Tensor], reduce: Reduce) -> Result<(), CommError> {
    for tensor in tensors {
        let kind = tensor.kind();
        let fine = matches!(
            kind,
            Kind::Double | Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Int64 | Kind::Int | Kind::Int16 | Kind::Int8 | Kind::Uint8
        );
        if !fine {
            return Err(CommError::Unsupported { op, reason: format!("{reduce:?} of {kind:?} is not defined") });
        }
    }
    Ok(())
}

/// `out` [n] = reduction of `parts`, each [n], contiguous, of `out`'s kind, in the order given.
/// BF16 and F16 add in f32 and round once; integers add as integers.
pub(super) fn fold(out: &Tensor, parts: &[Tensor], reduce: Reduce) {
    let length = out.size1().expect("a flat tensor");
    let block = if out.device().is_cuda() { length } else { BLOCK };
    tch::no_grad(|| {
        let mut start = 0;
        while start < length {
            let n = block.min(length - start);
            fold_block(&out.narrow(0, start, n), parts.iter().map(|p| p.narrow(0, start, n)), reduce);
            start += n;
        }
    });
}

/// The same of the rows of `parts` [ranks, n], on a CPU, in few calls however many ranks there are: [n].
pub(super) fn fold_rows(parts: &Tensor, reduce: Reduce) -> Tensor {
    match (reduce, parts.kind()) {
        (Reduce::Max, _) => parts.amax(&[0i64][..], false),
        (Reduce::Min, _) => parts.amin(&[0i64][..], false),
        (Reduce::Sum, Kind::Double) => sum_rows::<f64>(parts),
        (Reduce::Sum, Kind::Float) => sum_rows::<f32>(parts),
        (Reduce::Sum, kind) => {
            let out = Tensor::empty([parts.size()[1]], (kind, parts.device()));
            fold(&out, &parts.unbind(0), reduce);
            out
        }
    }
}

fn sum_rows<T: Element + Copy + Default + AddAssign>(parts: &Tensor) -> Tensor {
    let mut values = vec![T::default(); parts.numel()];
    parts.copy_data(&mut values, parts.numel());
    let (sums, others) = values.split_at_mut(parts.size()[1] as usize);
    for row in others.chunks_exact(sums.len().max(1)) {
        sums.iter_mut().zip(row).for_each(|(sum, part)| *sum += *part);
    }
    Tensor::from_slice(sums)
}

fn fold_block(out: &Tensor, mut parts: impl Iterator<Item = Tensor>, reduce: Reduce) {
    let mut out = out.shallow_clone();
    let first = parts.next().expect("at least one rank");
    match reduce {
        Reduce::Sum if matches!(out.kind(), Kind::BFloat16 | Kind::Half) => {
            let mut sum = first.to_kind(Kind::Float);
            for part in parts {
                let _ = sum.g_add_(&part);
            }
            out.copy_(&sum);
        }
        Reduce::Sum => {
            // One pass less than copy-then-add for the usual two ranks.
            let Some(second) = parts.next() else { return out.copy_(&first) };
            let _ = first.add_out(&out, &second);
            for part in parts {
                let _ = out.g_add_(&part);
            }
        }
        Reduce::Max | Reduce::Min => {
            out.copy_(&first);
            for part in parts {
                let larger = reduce == Reduce::Max;
                let _ = if larger { out.maximum_out(&out, &part) } else { out.minimum_out(&out, &part) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_in_rank_order_across_blocks() {
        // (1e8 + 1) - 1e8 loses the 1 in f32; 1e8 - 1e8 + 1 keeps it: the order shows.
        let n = BLOCK + 3;
        let parts: Vec<Tensor> = [1e8, 1.0, -1e8].iter().map(|&v| Tensor::full([n], v, (Kind::Float, tch::Device::Cpu))).collect();
        let out = Tensor::empty([n], (Kind::Float, tch::Device::Cpu));
        fold(&out, &parts, Reduce::Sum);
        assert_eq!(out.abs().max().double_value(&[]), 0.0);
        let reordered = [parts[0].shallow_clone(), parts[2].shallow_clone(), parts[1].shallow_clone()];
        fold(&out, &reordered, Reduce::Sum);
        assert_eq!((out.min().double_value(&[]), out.max().double_value(&[])), (1.0, 1.0));
        for (order, sum) in [([1e8, 1.0, -1e8], 0.0), ([1e8, -1e8, 1.0], 1.0)] {
            let rows = |kind| Tensor::from_slice(&order).view([3, 1]).expand([3, 5], false).contiguous().to_kind(kind);
            assert_eq!(fold_rows(&rows(Kind::Float), Reduce::Sum), Tensor::full([5], sum, (Kind::Float, tch::Device::Cpu)));
            assert_eq!(fold_rows(&rows(Kind::Double), Reduce::Sum), Tensor::full([5], 1.0, (Kind::Double, tch::Device::Cpu)));
            assert_eq!(fold_rows(&rows(Kind::Int64), Reduce::Sum), Tensor::full([5], 1, (Kind::Int64, tch::Device::Cpu)));
            assert_eq!(fold_rows(&rows(Kind::Int64), Reduce::Min), Tensor::full([5], -100_000_000, (Kind::Int64, tch::Device::Cpu)));
        }
    }

    #[test]
    fn bf16_rounds_once() {
        // 256 + 1 + 1: each step in BF16 rounds back to 256, the f32 sum is 258.
        let parts: Vec<Tensor> = [256.0, 1.0, 1.0].iter().map(|&v| Tensor::full([4], v, (Kind::BFloat16, tch::Device::Cpu))).collect();
        let out = Tensor::empty([4], (Kind::BFloat16, tch::Device::Cpu));
        fold(&out, &parts, Reduce::Sum);
        assert_eq!(out.double_value(&[3]), 258.0);
    }
}
