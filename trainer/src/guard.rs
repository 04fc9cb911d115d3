//! May this step's update be applied? Judged from reduced values, so every rank decides the same. A loss or gradient
//! norm that is not finite, or far above what the last applied steps had, is not (no rollback: the run goes on).
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fmt;

/// `[guard]` of a run's config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuardSection {
    /// Applied steps whose median is the measure; nothing is called a spike before there are as many. They are counted anew where
    /// a phase reads another mixture or another length.
    pub window: usize,
    /// A spike is a loss above so many medians; 0: none is.
    pub loss_spike: f64,
    /// A spike is a gradient norm above so many medians; 0: none is.
    pub norm_spike: f64,
    /// No element of a gradient, which is a mean over the batch, comes to so much; an exponent whose top bit flipped does,
    /// from 10⁻³⁵ on. The step is done again: what comes twice is the samples' own. 0: any may.
    pub gradient_limit: f64,
    /// After so many skipped steps in a row the run stops, with a checkpoint: something is wrong that skipping will not mend.
    pub max_skipped: u32,
}

impl Default for GuardSection {
    fn default() -> Self {
        GuardSection { window: 128, loss_spike: 2.0, norm_spike: 50.0, gradient_limit: 1000.0, max_skipped: 10 }
    }
}

/// What a checkpoint remembers of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuardState {
    pub in_a_row: u32,
    /// Of the newest applied steps, oldest first.
    losses: VecDeque<f64>,
    norms: VecDeque<f64>,
}

#[derive(Clone, Debug)]
pub struct Guard {
    config: GuardSection,
    pub state: GuardState,
    /// The step under way is done again for an element above the limit.
    suspected: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    Apply,
    Skip(Reason),
    /// What was computed is not to be trusted: the step is to be done again.
    Again,
}

/// The largest element of all gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct Worst {
    /// Whose share of the sum it is in.
    pub rank: usize,
    pub tensor: String,
    /// Its absolute value, or not a number.
    pub value: f64,
}

impl fmt::Display for Worst {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the gradient of {} holds {:.3e} on rank {}", self.tensor, self.value, self.rank)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub enum Reason {
    NotFinite { loss: f64, grad_norm: f64, worst: Option<Worst> },
    Spike { what: &'static str, value: f64, median: f64, limit: f64 },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::NotFinite { loss, grad_norm, worst } => {
                write!(f, "loss {loss:.4} and gradient norm {grad_norm:.4} are not both finite")?;
                worst.as_ref().map_or(Ok(()), |worst| write!(f, "; {worst}"))
            }
            Reason::Spike { what, value, median, limit } => {
                write!(
                    f,
                    "{what} {value:.4} is {:.1} times the median {median:.4} of the steps before, the limit is {limit}",
                    value / median
                )
            }
        }
    }
}

impl Guard {
    pub fn new(config: GuardSection) -> Self {
        Guard { config, state: GuardState::default(), suspected: false }
    }

    pub fn gradient_limit(&self) -> f64 {
        self.config.gradient_limit
    }

    /// Is the gradients' largest element of interest? Where their norm is below the limit, so is every element.
    pub fn wants_worst(&self, grad_norm: f64) -> bool {
        let limit = self.config.gradient_limit;
        !grad_norm.is_finite() || limit > 0.0 && grad_norm >= limit
    }

    /// Is it what no gradient comes to?
    pub fn impossible(&self, worst: &Worst) -> bool {
        let limit = self.config.gradient_limit;
        !worst.value.is_finite() || limit > 0.0 && worst.value >= limit
    }

    /// `loss` is not finite if any of the step's losses is not. `worst`: an impossible element of the gradients.
    pub fn judge(&mut self, loss: f64, grad_norm: f64, worst: Option<&Worst>) -> Verdict {
        let GuardSection { window, loss_spike, norm_spike, .. } = self.config;
        self.suspected = !self.suspected && worst.is_some_and(|worst| worst.value.is_finite());
        if self.suspected {
            return Verdict::Again;
        }
        let state = &mut self.state;
        let reason = if !(loss.is_finite() && grad_norm.is_finite()) {
            Some(Reason::NotFinite { loss, grad_norm, worst: worst.cloned() })
        } else {
            spike("loss", loss, &state.losses, window, loss_spike)
                .or_else(|| spike("gradient norm", grad_norm, &state.norms, window, norm_spike))
        };
        if let Some(reason) = reason {
            state.in_a_row += 1;
            return Verdict::Skip(reason);
        }
        state.in_a_row = 0;
        for (seen, value) in [(&mut state.losses, loss), (&mut state.norms, grad_norm)] {
            seen.push_back(value);
            while seen.len() > window {
                seen.pop_front();
            }
        }
        Verdict::Apply
    }

    /// Samples of another kind follow, whose loss is no spike of those before.
    pub fn forget(&mut self) {
        self.state.losses.clear();
        self.state.norms.clear();
    }

    /// Too many steps in a row were skipped.
    pub fn gives_up(&self) -> bool {
        self.state.in_a_row >= self.config.max_skipped
    }
}

fn spike(what: &'static str, value: f64, seen: &VecDeque<f64>, window: usize, limit: f64) -> Option<Reason> {
    if limit == 0.0 || seen.len() < window {
        return None;
    }
    let mut sorted: Vec<f64> = seen.iter().copied().collect();
    sorted.sort_by(f64::total_cmp);
    let median = *sorted.get(sorted.len() / 2)?;
    (value > limit * median).then_some(Reason::Spike { what, value, median, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(window: usize) -> Guard {
        Guard::new(GuardSection { window, loss_spike: 2.0, norm_spike: 10.0, gradient_limit: 2.0, max_skipped: 2 })
    }

    #[test]
    fn samples_of_another_kind_are_no_spike() {
        let mut guard = guard(4);
        (0..4).for_each(|_| assert_eq!(guard.judge(0.4, 1.0, None), Verdict::Apply));
        assert!(matches!(guard.judge(4.0, 1.0, None), Verdict::Skip(Reason::Spike { .. })));
        guard.forget();
        assert_eq!(guard.judge(4.0, 20.0, None), Verdict::Apply);
    }

    #[test]
    fn only_finite_steps_are_applied_and_skips_are_counted_in_a_row() {
        let mut guard = guard(4);
        assert!(matches!(guard.judge(1.0, f64::NAN, None), Verdict::Skip(Reason::NotFinite { .. })));
        assert!(!guard.gives_up());
        assert!(matches!(guard.judge(f64::INFINITY, 1.0, None), Verdict::Skip(Reason::NotFinite { .. })));
        assert!(guard.gives_up());
        assert_eq!(guard.judge(1.0, 1.0, None), Verdict::Apply);
        assert!(matches!(guard.judge(f64::NAN, 1.0, None), Verdict::Skip(_)));
        assert_eq!(guard.state.in_a_row, 1);
    }

    #[test]
    fn an_impossible_element_of_a_gradient_is_not_believed_before_it_came_twice() {
        let mut guard = guard(1);
        assert!(!guard.wants_worst(1.9) && guard.wants_worst(2.0) && guard.wants_worst(f64::NAN));
        let worst = |value| Worst { rank: 3, tensor: "lm_head.weight".into(), value };
        assert!(!guard.impossible(&worst(1.9)) && guard.impossible(&worst(2.0)) && guard.impossible(&worst(f64::NAN)));
        // A flipped bit: the second time it is not there.
        assert_eq!(guard.judge(1.0, 2.5, Some(&worst(2.0))), Verdict::Again);
        assert_eq!(guard.judge(1.0, 2.4, None), Verdict::Apply);
        // Odd samples: it is there again.
        assert_eq!(guard.judge(1.0, 2.5, Some(&worst(2.0))), Verdict::Again);
        assert_eq!(guard.judge(1.0, 2.5, Some(&worst(2.0))), Verdict::Apply);
        // Whose square passes FP32's range.
        assert_eq!(guard.judge(1.0, f64::INFINITY, Some(&worst(1e38))), Verdict::Again);
        let Verdict::Skip(reason) = guard.judge(1.0, f64::INFINITY, Some(&worst(1e38))) else { panic!("not finite") };
        assert!(reason.to_string().ends_with("; the gradient of lm_head.weight holds 1.000e38 on rank 3"), "{reason}");
        let Verdict::Skip(reason) = guard.judge(1.0, f64::NAN, Some(&worst(f64::NAN))) else { panic!("not finite") };
        assert_eq!(
            reason.to_string(),
            "loss 1.0000 and gradient norm NaN are not both finite; the gradient of lm_head.weight holds NaN on rank 3"
        );
        assert_eq!(guard.state.norms, [2.5]);
    }

    #[test]
    fn a_spike_is_measured_by_the_median_of_applied_steps_once_the_window_is_full() {
        let mut guard = guard(3);
        for loss in [1.0, 5.0, 1.1] {
            assert_eq!(guard.judge(loss, 1.0, None), Verdict::Apply, "the window is not full");
        }
        // The median is 1.1: the outlier in the window does not raise it.
        assert_eq!(guard.judge(2.3, 1.0, None), Verdict::Skip(Reason::Spike { what: "loss", value: 2.3, median: 1.1, limit: 2.0 }));
        assert!(matches!(guard.judge(1.0, 10.5, None), Verdict::Skip(Reason::Spike { what: "gradient norm", .. })));
        assert_eq!(guard.state.in_a_row, 2);
        // What was skipped did not enter: [5.0, 1.1, 2.1] next, its median 2.1.
        assert_eq!(guard.judge(2.1, 9.0, None), Verdict::Apply);
        assert_eq!(guard.judge(4.1, 1.0, None), Verdict::Apply);
    }

    #[test]
    fn it_goes_on_from_its_saved_state() {
        let mut whole = guard(2);
        for (loss, norm) in [(1.2, 1.0), (1.0, 2.0), (1.5, 2.0)] {
            assert_eq!(whole.judge(loss, norm, None), Verdict::Apply);
        }
        let text = serde_json::to_string(&whole.state).expect("JSON");
        let mut resumed = guard(2);
        resumed.state = serde_json::from_str(&text).expect("a state");
        assert_eq!(resumed.judge(4.0, 1.0, None), whole.judge(4.0, 1.0, None));
        assert_eq!(resumed.state, whole.state);
        assert_eq!(resumed.state.in_a_row, 1);
    }
}
