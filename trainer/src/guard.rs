//! May this step's update be applied? Judged from reduced values, so every rank decides the same.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Guard {
    in_a_row: u32,
}

/// After so many skipped steps in a row the run stops: something is wrong that skipping will not mend.
pub const MAX_SKIPPED_IN_A_ROW: u32 = 10;

#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Apply,
    Skip { in_a_row: u32 },
}

impl Guard {
    /// As a checkpoint remembers it.
    pub fn resumed(in_a_row: u32) -> Self {
        Guard { in_a_row }
    }
    pub fn in_a_row(&self) -> u32 {
        self.in_a_row
    }
    pub fn judge(&mut self, loss: f64, grad_norm: f64) -> Verdict {
        if loss.is_finite() && grad_norm.is_finite() {
            self.in_a_row = 0;
            return Verdict::Apply;
        }
        self.in_a_row += 1;
        Verdict::Skip { in_a_row: self.in_a_row }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_finite_steps_are_applied_and_skips_are_counted_in_a_row() {
        let mut guard = Guard::default();
        assert_eq!(guard.judge(1.0, f64::NAN), Verdict::Skip { in_a_row: 1 });
        assert_eq!(guard.judge(f64::INFINITY, 1.0), Verdict::Skip { in_a_row: 2 });
        assert_eq!(guard.judge(1.0, 1.0), Verdict::Apply);
        assert_eq!(guard.judge(f64::NAN, 1.0), Verdict::Skip { in_a_row: 1 });
    }
}
