//! Element-wise reduction, the one arithmetic of all back ends.
//! Invariant: element i of the result is ((p0[i] + p1[i]) + p2[i]) + …, in rank order, whatever the blocking;
//! so the same layout gives the same bits over threads and over processes.

use super::{CommError, Reduce};
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
