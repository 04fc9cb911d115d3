//! Which tile a GEMM uses: a small model (waves × cost of a tile), no search at run time.
use crate::launch::Shape;

/// A tile: each warpgroup takes `subtiles` of 64 rows; `width` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    pub warpgroups: usize,
    pub subtiles: usize,
    pub width: usize,
    /// The two warpgroups take turns at the matrix unit: good where each has two accumulators, bad where it has one.
    pub turns: bool,
}

const fn plan(warpgroups: usize, subtiles: usize, width: usize) -> Plan {
    Plan { warpgroups, subtiles, width, turns: warpgroups == 2 && subtiles == 1 && width <= 128 }
}

/// A tile of any of these meets at most two scales of 128 columns, and its sums and accumulators fit the registers.
pub const FORWARD_PLANS: [Plan; 5] =
    [plan(2, 1, 64), plan(2, 1, 96), plan(2, 1, 128), plan(3, 1, 128), plan(2, 2, 128)];
pub const WGRAD_PLANS: [Plan; 4] = [plan(2, 1, 64), plan(2, 1, 96), plan(2, 1, 128), plan(2, 2, 128)];

/// Shared memory of a block on Hopper, less 1 KiB to align the ring and room for its barriers.
const SHARED_BYTES: usize = 227 * 1024 - 1024 - 256;
const MOST_STAGES: usize = 8;

impl Plan {
    pub(super) fn rows(self) -> usize {
        64 * self.warpgroups * self.subtiles
    }

    /// For [M, N, K] and rows that fall on `num_experts` in an unknown way.
    pub(super) fn forward([m, n, k]: [i64; 3], num_experts: i64, num_sms: usize) -> Plan {
        best(&FORWARD_PLANS, |plan| {
            // On average the last tile of an expert is half full.
            let tiles_m = m as f64 / plan.rows() as f64 + if num_experts > 1 { num_experts as f64 / 2.0 } else { 0.0 };
            let tile = k as f64 / 128.0 * plan.forward_cost() + plan.area();
            waves(tiles_m.ceil(), pairs(n, plan), num_sms) * tile
        })
    }

    /// For [M, N, rows]: every expert has a gradient of its own.
    pub(super) fn wgrad([m, n, rows]: [i64; 3], num_experts: i64, num_sms: usize) -> Plan {
        best(&WGRAD_PLANS, |plan| {
            let tiles_m = (m as f64 / plan.rows() as f64).ceil() * num_experts as f64;
            let tile = rows as f64 / num_experts as f64 / 128.0 * plan.wgrad_cost() + 3.0 * plan.area();
            waves(tiles_m, pairs(n, plan), num_sms) * tile
        })
    }

    fn area(self) -> f64 {
        (self.rows() * self.width) as f64 / (128.0 * 128.0)
    }

    /// Time of 128 of K, in units of a tile of 128×128: measured on one H100, to be renewed when a kernel changes
    /// (`bench_gpu sweep`).
    fn forward_cost(self) -> f64 {
        match (self.warpgroups, self.subtiles, self.width) {
            (_, _, 64) => 0.72,
            (_, _, 96) => 0.93,
            (3, _, _) => 1.43,
            (_, 2, _) => 1.9,
            _ => 1.0,
        }
    }
    fn wgrad_cost(self) -> f64 {
        match (self.warpgroups, self.subtiles, self.width) {
            (_, _, 64) => 0.65,
            (_, _, 96) => 0.86,
            (_, 2, _) => 2.1,
            _ => 1.0,
        }
    }

    fn stages(self, stage_bytes: usize, other_bytes: usize) -> usize {
        ((SHARED_BYTES - other_bytes) / (stage_bytes + 16)).min(MOST_STAGES)
    }
    fn out_bytes(self) -> usize {
        // A warp turns 16 rows of 64 or 32 columns at a time, with 16 bytes of padding.
        let columns = if self.warpgroups == 2 && self.width.is_multiple_of(64) { 64 } else { 32 };
        4 * self.warpgroups * 16 * (columns * 2 + 16)
    }
    fn wgrad_out_bytes(self) -> usize {
        // A warp's 16 rows of 64 or 32 columns.
        let columns = if self.subtiles == 1 && self.width.is_multiple_of(64) { 64 } else { 32 };
        4 * self.warpgroups * 16 * columns * 4
    }
    /// The scales of a box of A: rows of an expert may start anywhere, and the copy engine at every fourth.
    pub(super) fn row_scales(self) -> usize {
        self.rows() / self.subtiles + 4
    }
    fn values_bytes(self) -> usize {
        (self.rows() + self.width) * 128
    }
    fn forward_stage_bytes(self) -> usize {
        self.values_bytes() + self.subtiles * (self.row_scales() * 4).next_multiple_of(128)
    }
    fn wgrad_stage_bytes(self) -> usize {
        self.values_bytes() + self.rows() * 4 + (self.width * 4).next_multiple_of(128)
    }
    pub(super) fn forward_stages(self) -> usize {
        self.stages(self.forward_stage_bytes(), self.out_bytes())
    }
    pub(super) fn wgrad_stages(self) -> usize {
        self.stages(self.wgrad_stage_bytes(), self.wgrad_out_bytes())
    }
    pub(super) fn forward_bytes(self) -> usize {
        self.forward_stages() * (self.forward_stage_bytes() + 16) + self.out_bytes() + 1024
    }
    pub(super) fn wgrad_bytes(self) -> usize {
        self.wgrad_stages() * (self.wgrad_stage_bytes() + 16) + self.wgrad_out_bytes() + 1024
    }

    /// Persistent blocks in clusters of two.
    pub(super) fn shape(self, num_sms: usize, shared_bytes: usize) -> Shape {
        assert!(num_sms >= 2, "a GEMM runs in clusters of two multiprocessors");
        Shape { grid: [num_sms / 2 * 2, 1], block: 128 * (1 + self.warpgroups), shared_bytes }
    }
}

fn pairs(n: i64, plan: Plan) -> f64 {
    (n as f64 / (2 * plan.width) as f64).ceil()
}

fn waves(tiles_m: f64, pairs: f64, num_sms: usize) -> f64 {
    (tiles_m * pairs / (num_sms / 2) as f64).ceil()
}

fn best(plans: &[Plan], cost: impl Fn(Plan) -> f64) -> Plan {
    *plans.iter().min_by(|a, b| cost(**a).total_cmp(&cost(**b))).expect("there is a plan")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_plan_fits_and_keeps_the_copies_ahead() {
        for plan in FORWARD_PLANS.into_iter().chain(WGRAD_PLANS) {
            assert!(plan.forward_bytes().max(plan.wgrad_bytes()) <= 227 * 1024, "{plan:?}");
            assert!(plan.forward_stages() >= 4 && plan.wgrad_stages() >= 4, "{plan:?}: too few stages");
            // The halves of a swizzled tile start on its pattern of 1024 bytes.
            assert_eq!(plan.rows() / 2 * 128 % 1024, 0, "{plan:?}");
        }
    }

    #[test]
    fn the_model_fills_the_last_wave() {
        // 17 column tiles of 128 waste a fifth of five waves; tiles of 192 rows fill three.
        assert_eq!(Plan::forward([4096, 2176, 7168], 1, 132), plan(3, 1, 128));
        assert_eq!(Plan::forward([4096, 24576, 1536], 1, 132).width, 128);
        assert_eq!(Plan::wgrad([7168, 2048, 4096], 1, 132), plan(2, 1, 128));
        // A narrow output is cut into more tiles, not fewer.
        assert_eq!(Plan::forward([256, 512, 7168], 1, 132).width, 64);
    }
}
