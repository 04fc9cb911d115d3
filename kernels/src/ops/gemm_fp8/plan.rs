//! Which tile a GEMM uses: a small model (waves × cost of a tile), no search at run time.
use super::Write;
use crate::launch::Shape;
use std::ops::Range;

/// A tile: each of two warpgroups takes `subtiles` of 64 rows; `width` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    pub subtiles: usize,
    pub width: usize,
    /// The two blocks of a cluster lie along M and share B's tile; else along N, and share A's.
    pub along_m: bool,
    /// Wgrad reads the gradient's tile beforehand and writes the sum, instead of adding in L2: for experts of few rows.
    pub reload: bool,
}

const fn plan(subtiles: usize, width: usize, along_m: bool) -> Plan {
    Plan { subtiles, width, along_m, reload: false }
}

/// A tile of any of these meets at most two scales of 128 columns, and its sums and accumulators fit the registers. The
/// large tile asks least of L2; the others fill a last wave.
pub const FORWARD_PLANS: [Plan; 4] = [plan(2, 128, false), plan(1, 192, true), plan(1, 128, false), plan(1, 64, false)];
pub const WGRAD_PLANS: [Plan; 4] =
    [plan(1, 128, false), plan(1, 160, true), plan(1, 160, false), RELOADING];
const RELOADING: Plan = Plan { reload: true, ..plan(1, 128, true) };

/// Experts of fewer rows reload their gradients: by `wgrad_cost`, both ways take as long at 17 to 22 times 128.
const FEW_ROWS: i64 = 2048;

/// Shared memory of a block on Hopper, less 1 KiB to align the ring and room for its barriers.
const SHARED_BYTES: usize = 227 * 1024 - 1024 - 256;
const MOST_STAGES: usize = 8;

impl Plan {
    pub(super) fn rows(self) -> usize {
        128 * self.subtiles
    }
    /// Rows that the copy engine fetches at once: half of what the blocks of a cluster share.
    pub(super) fn box_a(self) -> usize {
        if self.along_m { self.rows() } else { self.rows() / 2 }
    }
    pub(super) fn box_b(self) -> usize {
        if self.along_m { self.width / 2 } else { self.width }
    }
    /// Tiles of a cluster, down and across.
    fn cluster(self) -> (usize, usize) {
        if self.along_m { (2, 1) } else { (1, 2) }
    }

    /// For [M, N, K] and rows that fall on `num_experts` in an unknown way.
    pub(super) fn forward([m, n, k]: [i64; 3], num_experts: i64, num_sms: usize) -> Plan {
        best(FORWARD_PLANS.into_iter(), |plan| {
            // On average the last tile of an expert is half full.
            let down = m as f64 / (plan.cluster().0 * plan.rows()) as f64 + if num_experts > 1 { num_experts as f64 / 2.0 } else { 0.0 };
            let tile = k as f64 / 128.0 * plan.forward_cost() + 2.0 * plan.area();
            waves(down.ceil(), plan.across(n), num_sms) * tile
        })
    }

    /// For [M, N, rows]: which tiles for experts of how many rows. The counts are on the device: where some may have few rows and
    /// others many, and gradients are added to, there is a launch for either.
    pub(super) fn wgrads([m, n, rows]: [i64; 3], num_experts: i64, write: Write, num_sms: usize) -> Vec<(Plan, Range<i64>)> {
        let all = 0..i64::from(i32::MAX);
        if num_experts < 2 || write == Write::Assign || rows / num_experts > 2 * FEW_ROWS {
            return vec![(Plan::wgrad([m, n, rows], num_experts, write, num_sms), all)];
        }
        let many = Plan::wgrad([m, n, 2 * FEW_ROWS], 1, write, num_sms);
        vec![(many, FEW_ROWS..all.end), (RELOADING, 0..FEW_ROWS)]
    }

    /// For [M, N, rows]: every expert has a gradient of its own.
    fn wgrad([m, n, rows]: [i64; 3], num_experts: i64, write: Write, num_sms: usize) -> Plan {
        best(WGRAD_PLANS.into_iter().filter(|plan| plan.takes(write)), |plan| {
            let down = (m as f64 / (plan.cluster().0 * plan.rows()) as f64).ceil() * num_experts as f64;
            let [of_k, once] = plan.wgrad_cost(write);
            let tile = rows as f64 / num_experts as f64 / 128.0 * of_k + once;
            waves(down, plan.across(n), num_sms) * tile
        })
    }

    /// What is not read needs no reloading.
    pub fn takes(self, write: Write) -> bool {
        !self.reload || write == Write::Accumulate
    }
    fn across(self, n: i64) -> f64 {
        (n as f64 / (self.cluster().1 * self.width) as f64).ceil()
    }
    fn area(self) -> f64 {
        (self.rows() * self.width) as f64 / (128.0 * 128.0)
    }

    /// Time of 128 of K, in units of a tile of 128×128: measured on one H100, to be renewed when a kernel changes
    /// (`bench_gpu sweep`).
    fn forward_cost(self) -> f64 {
        match (self.subtiles, self.width) {
            (2, _) => 1.8,
            (_, 192) => 1.4,
            (_, 64) => 0.72,
            _ => 1.0,
        }
    }
    /// And of writing the gradient, or adding to it.
    fn wgrad_cost(self, write: Write) -> [f64; 2] {
        match (write, self.reload, self.width, self.along_m) {
            (_, true, ..) => [1.18, 4.3],
            (Write::Accumulate, _, 160, true) => [1.18, 11.0],
            (Write::Accumulate, _, 160, false) => [1.20, 11.4],
            (Write::Accumulate, ..) => [1.0, 8.3],
            (Write::Assign, _, 160, true) => [1.19, 4.0],
            (Write::Assign, _, 160, false) => [1.23, 4.4],
            (Write::Assign, ..) => [1.0, 3.0],
        }
    }

    fn stages(self, stage_bytes: usize, other_bytes: usize) -> usize {
        ((SHARED_BYTES - other_bytes) / (stage_bytes + 16)).min(MOST_STAGES)
    }
    /// The place of a tile of the gradient.
    fn wgrad_out_bytes(self) -> usize {
        if self.reload { self.rows() * self.width * 4 } else { 0 }
    }
    /// The scales of a box of A: rows of an expert may start anywhere, and the copy engine at every fourth.
    pub(super) const ROW_SCALES: usize = 128 + 4;

    fn values_bytes(self) -> usize {
        (self.rows() + self.width) * 128
    }
    fn forward_stage_bytes(self) -> usize {
        self.values_bytes() + self.subtiles * (Self::ROW_SCALES * 4).next_multiple_of(128)
    }
    fn wgrad_stage_bytes(self) -> usize {
        self.values_bytes() + self.rows() * 4 + (self.width * 4).next_multiple_of(128)
    }
    pub(super) fn forward_stages(self) -> usize {
        self.stages(self.forward_stage_bytes(), 0)
    }
    pub(super) fn wgrad_stages(self) -> usize {
        self.stages(self.wgrad_stage_bytes(), self.wgrad_out_bytes())
    }
    pub(super) fn forward_bytes(self) -> usize {
        self.forward_stages() * (self.forward_stage_bytes() + 16) + 1024
    }
    pub(super) fn wgrad_bytes(self) -> usize {
        self.wgrad_stages() * (self.wgrad_stage_bytes() + 16) + self.wgrad_out_bytes() + 16 + 1024
    }

    /// Persistent blocks in clusters of two.
    pub(super) fn shape(self, num_sms: usize, shared_bytes: usize) -> Shape {
        assert!(num_sms >= 2, "a GEMM runs in clusters of two multiprocessors");
        Shape { grid: [num_sms / 2 * 2, 1], block: 384, shared_bytes }
    }
}

fn waves(down: f64, across: f64, num_sms: usize) -> f64 {
    (down * across / (num_sms / 2) as f64).ceil()
}

fn best(plans: impl Iterator<Item = Plan>, cost: impl Fn(Plan) -> f64) -> Plan {
    plans.min_by(|a, b| cost(*a).total_cmp(&cost(*b))).expect("there is a plan")
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
            let shared = if plan.along_m { plan.width } else { plan.rows() };
            assert_eq!(shared / 2 * 128 % 1024, 0, "{plan:?}");
        }
    }

    #[test]
    fn the_model_fills_the_last_wave() {
        // 17 column tiles of 128 leave a third wave of large tiles almost empty.
        assert_eq!(Plan::forward([4096, 2176, 7168], 1, 132).width, 192);
        assert_eq!(Plan::forward([4096, 24576, 1536], 1, 132).subtiles, 2);
        assert_eq!(Plan::wgrad([7168, 2048, 4096], 1, Write::Accumulate, 132), plan(1, 128, false));
        assert_eq!(Plan::wgrad([7168, 16384, 4096], 1, Write::Accumulate, 132), plan(1, 160, true));
        // Of few rows the gradient is most of the work.
        assert!(Plan::wgrad([4096, 7168, 32768], 32, Write::Accumulate, 132).reload && !Plan::wgrad([4096, 7168, 32768], 4, Write::Accumulate, 132).reload);
        let wgrads = |experts, write| Plan::wgrads([4096, 7168, 32768], experts, write, 132);
        assert!(wgrads(1, Write::Accumulate).len() == 1 && wgrads(4, Write::Accumulate).len() == 1 && wgrads(32, Write::Assign).len() == 1);
        // Each number of rows has its launch, and one only.
        let [(many, above), (few, below)] = &wgrads(32, Write::Accumulate)[..] else { panic!("two launches") };
        assert!(!many.reload && few.reload && below.start == 0 && below.end == above.start && above.end == i64::from(i32::MAX));
        // A narrow output is cut into more tiles, not fewer.
        assert_eq!(Plan::forward([256, 512, 7168], 1, 132).width, 64);
    }
}
