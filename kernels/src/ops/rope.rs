//! Rotary position embedding on interleaved pairs (2i, 2i+1), as the released DeepSeek weights have it, with
//! YaRN (report §4.3) on the frequencies.
//!
//! Legend: S positions, R rotary width (even).
use super::wide;
use tch::{Device, Kind, Tensor};

/// YaRN's parameters; keys are those of DeepSeek's `rope_scaling`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeScaling {
    pub factor: f64,
    pub original_max_position_embeddings: i64,
    #[serde(default = "beta_fast")]
    pub beta_fast: f64,
    #[serde(default = "beta_slow")]
    pub beta_slow: f64,
    #[serde(default = "one")]
    pub mscale: f64,
    #[serde(default = "one")]
    pub mscale_all_dim: f64,
}

fn beta_fast() -> f64 {
    32.0
}
fn beta_slow() -> f64 {
    1.0
}
fn one() -> f64 {
    1.0
}

impl RopeScaling {
    /// Err: the key, its value and the limit it broke.
    pub fn validate(&self) -> Result<(), (&'static str, f64, String)> {
        let original = self.original_max_position_embeddings as f64;
        let slow = format!("must be at least beta_slow = {}", self.beta_slow);
        for (key, value, ok, limit) in [
            ("factor", self.factor, self.factor >= 1.0, "must be at least 1"),
            ("original_max_position_embeddings", original, original >= 1.0, "must be at least 1"),
            ("beta_slow", self.beta_slow, self.beta_slow > 0.0, "must be positive"),
            ("beta_fast", self.beta_fast, self.beta_fast >= self.beta_slow, &*slow),
            ("mscale", self.mscale, self.mscale >= 0.0, "must not be negative"),
            ("mscale_all_dim", self.mscale_all_dim, self.mscale_all_dim >= 0.0, "must not be negative"),
        ] {
            if !(ok && value.is_finite()) {
                return Err((key, value, limit.into()));
            }
        }
        Ok(())
    }
    fn temperature(&self, mscale: f64) -> f64 {
        if self.factor <= 1.0 { 1.0 } else { 0.1 * mscale * self.factor.ln() + 1.0 }
    }
    /// What cos and sin are multiplied by.
    pub fn table_scale(&self) -> f64 {
        self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)
    }
    /// What the softmax scale is multiplied by: (0.1 · mscale_all_dim · ln s + 1)².
    pub fn softmax_scale(&self) -> f64 {
        if self.mscale_all_dim == 0.0 { 1.0 } else { self.temperature(self.mscale_all_dim).powi(2) }
    }
}

/// cos and sin for positions 0..S, [S, R/2] each.
#[derive(Debug)]
pub struct RopeTable {
    pub cos: Tensor,
    pub sin: Tensor,
}

impl RopeTable {
    pub fn new(positions: i64, width: i64, theta: f64, scaling: Option<&RopeScaling>, options: (Kind, Device)) -> Self {
        let half = width / 2;
        let frequency = |i: i64| theta.powf(-2.0 * i as f64 / width as f64);
        let frequencies: Vec<f64> = match scaling {
            None => (0..half).map(frequency).collect(),
            Some(yarn) => {
                // The pair that turns `rotations` times over the original context.
                let pair_of = |rotations: f64| {
                    let context = yarn.original_max_position_embeddings as f64;
                    width as f64 * (context / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln())
                };
                let low = pair_of(yarn.beta_fast).floor().max(0.0);
                let high = pair_of(yarn.beta_slow).ceil().min(width as f64 - 1.0);
                let span = if high == low { 0.001 } else { high - low };
                (0..half)
                    .map(|i| {
                        let interpolated = ((i as f64 - low) / span).clamp(0.0, 1.0);
                        frequency(i) * (1.0 - interpolated) + frequency(i) / yarn.factor * interpolated
                    })
                    .collect()
            }
        };
        let scale = scaling.map_or(1.0, RopeScaling::table_scale);
        let frequencies = Tensor::from_slice(&frequencies).unsqueeze(0);
        let angles = Tensor::arange(positions, (Kind::Double, Device::Cpu)).unsqueeze(1) * frequencies; // [S, R/2]
        let place = |t: Tensor| (t * scale).to_kind(options.0).to_device(options.1);
        RopeTable { cos: place(angles.cos()), sin: place(angles.sin()) }
    }
}

/// x [B, S, H, R] rotated by its position: (a, b) → (a·cos − b·sin, a·sin + b·cos).
pub fn forward(x: &Tensor, table: &RopeTable) -> Tensor {
    rotate(x, &table.cos, &table.sin)
}

/// The gradient of a rotation is the rotation back.
pub fn backward(dy: &Tensor, table: &RopeTable) -> Tensor {
    rotate(dy, &table.cos, &-&table.sin)
}

fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let shape = x.size();
    let (positions, half) = (shape[1], shape[3] / 2);
    let pairs = x.to_kind(wide(x.kind())).reshape([shape[0], positions, shape[2], half, 2]);
    let at = |t: &Tensor| t.narrow(0, 0, positions).view([1, positions, 1, half]).to_kind(pairs.kind());
    let (cos, sin) = (at(cos), at(sin));
    let (a, b) = (pairs.select(4, 0), pairs.select(4, 1));
    let rotated = Tensor::stack(&[&a * &cos - &b * &sin, &a * &sin + &b * &cos], 4);
    rotated.reshape(&shape[..]).to_kind(x.kind())
}
