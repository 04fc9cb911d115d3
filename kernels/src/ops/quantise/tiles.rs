//! The host's half of tile.cuh: outputs of a pass that ends in FP8, and the arguments that name them.
use crate::fp8::{Columns, Rows, ScaleRule, TILE, padded_rows, round_up};
use crate::launch::{Launch, Shape};
use tch::{Device, Kind, Tensor};

/// The text that every such pass begins with.
pub(crate) const TEXT: &str = include_str!("tile.cuh");
pub(crate) const THREADS: usize = 256;

/// Which layouts of an activation a pass writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    /// For Fprop and Dgrad.
    pub rows: bool,
    /// For Wgrad.
    pub columns: bool,
}

impl Want {
    pub const ROWS: Want = Want { rows: true, columns: false };
    pub const COLUMNS: Want = Want { rows: false, columns: true };
    pub const BOTH: Want = Want { rows: true, columns: true };
}

/// An activation in FP8, in the layouts that were wanted.
pub struct Quantised {
    pub rows: Option<Rows>,
    pub columns: Option<Columns>,
}

pub(crate) fn tiles_of(n: i64) -> i64 {
    (n + TILE - 1) / TILE
}

pub(crate) fn flag(on: bool) -> String {
    u8::from(on).to_string()
}

pub(crate) fn rule_define(rule: ScaleRule) -> (&'static str, String) {
    ("POWER_OF_TWO", flag(rule == ScaleRule::PowerOfTwo))
}

impl Quantised {
    /// Room for an [R, C] activation of `num_experts` groups of rows. Not written yet.
    pub(crate) fn empty([r, c]: [i64; 2], num_experts: i64, want: Want, device: Device) -> Quantised {
        assert!(c % 16 == 0, "{c} columns: a row of FP8 is a multiple of 16 bytes");
        let fp8 = |a, b| Tensor::empty([a, b], (Kind::Float8e4m3fn, device));
        let fp32 = |a, b| Tensor::empty([a, b], (Kind::Float, device));
        let p = padded_rows(r, num_experts);
        let rows = want.rows.then(|| Rows { values: fp8(r, c), scales: fp32(tiles_of(c), round_up(r, 4)) });
        let columns = want.columns.then(|| Columns { values: fp8(c, p), scales: fp32(p / TILE, round_up(c, 4)) });
        Quantised { rows, columns }
    }

    /// values, scales, transposed, scales_transposed
    pub(crate) fn tensors<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
        let (rows, columns) = (self.rows.as_ref(), self.columns.as_ref());
        launch
            .tensor_or_null(rows.map(|q| &q.values), Kind::Float8e4m3fn)
            .tensor_or_null(rows.map(|q| &q.scales), Kind::Float)
            .tensor_or_null(columns.map(|q| &q.values), Kind::Float8e4m3fn)
            .tensor_or_null(columns.map(|q| &q.scales), Kind::Float)
    }
}

/// P, scale_stride, scale_stride_transposed of an [R, C] activation.
pub(crate) fn strides(launch: Launch, [r, c]: [i64; 2], num_experts: i64) -> Launch {
    launch.int(padded_rows(r, num_experts)).int(round_up(r, 4)).int(round_up(c, 4))
}

/// Row tiles that a pass walks: with columns wanted, those of the padded experts.
pub(crate) fn row_tiles(r: i64, num_experts: i64) -> i64 {
    tiles_of(padded_rows(r, num_experts))
}

pub(crate) fn shape(x: i64, y: i64) -> Shape {
    Shape { grid: [x as usize, y as usize], block: THREADS, shared_bytes: 0 }
}

/// A block for each tile of [R, C] or [E, R, C]. All in x: of y CUDA has 65535, and many small experts have more.
pub(crate) fn every_tile(size: &[i64]) -> Shape {
    let [leading @ .., r, c] = size else { panic!("weights are [R, C] or [E, R, C], not {size:?}") };
    shape(leading.iter().product::<i64>() * tiles_of(*r) * tiles_of(*c), 1)
}

#[cfg(test)]
mod tests {
    use super::every_tile;

    #[test]
    fn many_small_experts_are_a_grid_that_cuda_takes() {
        for (size, blocks) in [(&[70_000, 16, 16][..], 70_000), (&[3, 200, 300], 3 * 2 * 3), (&[1000, 16 * 1024, 144], 1000 * 128 * 2), (&[128, 129], 2)] {
            let grid = every_tile(size).grid;
            assert_eq!(grid[0] * grid[1], blocks, "{size:?}");
            assert!(grid[0] < 1 << 31 && grid[1] <= 65_535, "{size:?}: {grid:?}");
        }
    }
}
