//! A tensor's memory on the host as bytes: what goes to a file or comes from one is copied nowhere in between.
//!
//! As with every in-place operation, aliases of the tensor see what is written; whoever shares them among threads keeps writers
//! and readers of the same elements apart.
use std::slice::{from_raw_parts, from_raw_parts_mut};
use tch::{Device, Tensor};

/// None where the elements do not lie one after the other in host memory.
fn place(tensor: &Tensor) -> Option<(*mut u8, usize)> {
    let there = tensor.device() == Device::Cpu && tensor.is_contiguous();
    there.then(|| (tensor.data_ptr().cast(), tensor.numel() * tensor.kind().elt_size_in_bytes()))
}

pub fn bytes(tensor: &Tensor) -> Option<&[u8]> {
    let (start, len) = place(tensor)?;
    // SAFETY: so many initialised bytes, which the tensor keeps alive; without any, its pointer may be null.
    Some(if len == 0 { &[] } else { unsafe { from_raw_parts(start, len) } })
}

pub fn bytes_mut(tensor: &mut Tensor) -> Option<&mut [u8]> {
    let (start, len) = place(tensor)?;
    // SAFETY: as above, and any bytes are numbers of every kind that a file holds.
    Some(if len == 0 { &mut [] } else { unsafe { from_raw_parts_mut(start, len) } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensors_bytes_are_its_own_where_they_lie_in_a_row() {
        let whole = Tensor::from_slice(&[1_i16, 2, 3, 4, 5, 6]).view([3, 2]);
        let mut rows = whole.narrow(0, 1, 2);
        assert_eq!(bytes(&rows), Some(&[3, 0, 4, 0, 5, 0, 6, 0][..]));
        bytes_mut(&mut rows).expect("in a row")[2] = 9;
        assert_eq!(whole.int64_value(&[1, 1]), 9);
        assert!(bytes(&whole.transpose(0, 1)).is_none());
        assert_eq!(bytes(&whole.narrow(0, 0, 0)), Some(&[][..]));
    }
}
