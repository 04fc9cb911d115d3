//! What is computed again in backward rather than kept (report §3.2.3): cheap to make, large to hold.
use kernels::ops::quantise::Want;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recompute {
    /// The outputs of the norms before attention and feed-forward, and of the latents' norms.
    pub rms_norm: bool,
    /// Queries (those that come from a latent), keys and values.
    pub mla_up_projection: bool,
    /// The activation before the down-projection.
    pub swiglu: bool,
}

impl Recompute {
    /// A norm's output as forward's linears read it: by columns too where that is kept for backward.
    pub(crate) fn normed(&self) -> Want {
        if self.rms_norm { Want::ROWS } else { Want::BOTH }
    }
}

impl Default for Recompute {
    fn default() -> Self {
        Recompute { rms_norm: false, mla_up_projection: false, swiglu: true }
    }
}
