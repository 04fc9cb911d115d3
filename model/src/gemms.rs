//! How many GEMMs a rank has made outside attention, by the kind of their operands: what a run is held to. A router's product
//! is one of FP32 however it is made; the sentinel's shadows are not counted.
use std::cell::RefCell;
use std::collections::BTreeMap;
use tch::Kind;

#[derive(Debug, Default)]
pub struct Gemms(RefCell<BTreeMap<&'static str, u64>>);

impl Gemms {
    pub fn count(&self, kind: Kind) {
        let name = match kind {
            Kind::Float8e4m3fn => "fp8",
            Kind::BFloat16 => "bf16",
            Kind::Float => "fp32",
            Kind::Double => "fp64",
            _ => panic!("no GEMM reads {kind:?}"),
        };
        *self.0.borrow_mut().entry(name).or_default() += 1;
    }

    /// Since the last call.
    pub fn take(&self) -> BTreeMap<&'static str, u64> {
        self.0.take()
    }
}
