//! What forward keeps for backward, by part: every `Saved` names its tensors.
use crate::flow::{StageSaved, Work};
use std::collections::{BTreeMap, HashSet};
use tch::Tensor;

/// Is shown each tensor, with the part of the model that keeps it.
pub(crate) type See<'a> = &'a mut dyn FnMut(&'static str, &Tensor);

/// The logits' gradient, which FP8 leaves as it is.
pub const EXPERTS_ROWS: &str = "experts' rows";
pub const LOGITS: &str = "logits' gradient";
/// What only the reference attention keeps.
pub const PROBABILITIES: &str = "attention's probabilities";

/// What a weight's gradient is made of, where that is put off.
pub const PUT_OFF: &str = "operands of gradients put off";

/// Bytes by part, of every memory once.
pub fn bytes(saved: &StageSaved) -> BTreeMap<&'static str, i64> {
    count(|see| saved.each(see))
}

/// The same of weights' gradients that are put off.
pub fn put_off<'a>(work: impl IntoIterator<Item = &'a Work>) -> BTreeMap<&'static str, i64> {
    count(|see| work.into_iter().for_each(|piece| piece.each(see)))
}

fn count(each: impl FnOnce(See)) -> BTreeMap<&'static str, i64> {
    let (mut parts, mut seen) = (BTreeMap::new(), HashSet::new());
    each(&mut |part, tensor| {
        if seen.insert(tensor.data_ptr()) {
            *parts.entry(part).or_default() += tensor.numel() as i64 * tensor.kind().elt_size_in_bytes() as i64;
        }
    });
    parts
}
