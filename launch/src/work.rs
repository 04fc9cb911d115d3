//! How long ranks work in a step, without waiting for others: who holds the others up, a rank or a whole stage.
use crate::waits::named;

/// The median over a rank's last steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Worked {
    pub rank: usize,
    pub stage: usize,
    pub busy_ms: f64,
}

/// The middle one, or the lower one of two; 0 of none.
pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(0.0)
}

/// By stage, and the two ends; None: nobody to compare with.
pub fn report(worked: &[Worked]) -> Option<String> {
    let by = |a: &&Worked, b: &&Worked| a.busy_ms.total_cmp(&b.busy_ms);
    let (slowest, fastest) = (worked.iter().max_by(by)?, worked.iter().min_by(by)?);
    if worked.len() < 2 {
        return None;
    }
    let stages = worked.iter().map(|worked| worked.stage).max()? + 1;
    let stage = |stage: usize| {
        let here: Vec<&Worked> = worked.iter().filter(|worked| worked.stage == stage).collect();
        let ranks: Vec<usize> = here.iter().map(|worked| worked.rank).collect();
        (!here.is_empty()).then(|| format!("stage {stage} ({}) {:.0} ms", named(&ranks), median(here.iter().map(|worked| worked.busy_ms))))
    };
    let stages: Vec<String> = (0..stages).filter_map(stage).collect();
    Some(format!(
        "work a step, without waiting: {}; rank {} {:.0} ms is the most, rank {} {:.0} ms the least",
        stages.join(", "),
        slowest.rank,
        slowest.busy_ms,
        fastest.rank,
        fastest.busy_ms
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_and_ranks_are_told_apart() {
        let worked: Vec<Worked> =
            [(0, 0, 40.0), (1, 0, 44.0), (2, 1, 90.0), (3, 1, 61.0)].map(|(rank, stage, busy_ms)| Worked { rank, stage, busy_ms }).into();
        let expected = "work a step, without waiting: stage 0 (ranks 0 to 1) 40 ms, stage 1 (ranks 2 to 3) 61 ms; rank 2 90 ms is the most, rank 0 40 ms the least";
        assert_eq!(report(&worked).as_deref(), Some(expected));
        assert_eq!(report(&worked[..1]), None);
    }
}
