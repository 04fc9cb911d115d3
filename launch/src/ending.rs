//! How an attempt is ended by us.
use crate::guard::{Guarded, Order};
use crate::outcome::{Class, Outcome};
use std::time::{Duration, Instant};

/// USR1 → grace → TERM → KILL.
#[derive(Default)]
pub struct Ending {
    late_at: Option<Instant>,
    kill_at: Option<Instant>,
    pub verdict: Option<Outcome>,
}

impl Ending {
    /// The ranks are on their way out, by our order.
    pub fn begun(&self) -> bool {
        self.kill_at.is_some()
    }

    pub fn asked(&self) -> bool {
        self.late_at.is_some()
    }

    pub fn ask(&mut self, guarded: &mut Guarded, grace: f64) {
        guarded.order(Order::User1);
        self.late_at = Some(Instant::now() + Duration::from_secs_f64(grace));
    }

    pub fn end(&mut self, guarded: &mut Guarded, kill_after: f64, verdict: Outcome) {
        guarded.order(Order::Term);
        self.kill_at = Some(Instant::now() + Duration::from_secs_f64(kill_after));
        self.verdict.get_or_insert(verdict);
    }

    pub fn tick(&mut self, guarded: &mut Guarded, kill_after: f64, now: Instant) {
        if self.kill_at.is_none() && self.late_at.is_some_and(|late_at| now >= late_at) {
            self.end(guarded, kill_after, Outcome::new(Class::StoppedLate, "the ranks did not checkpoint in time and were ended"));
        }
        if self.kill_at.is_some_and(|kill_at| now >= kill_at) {
            guarded.order(Order::Kill);
        }
    }
}
