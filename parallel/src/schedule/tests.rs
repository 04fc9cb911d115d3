//! Every schedule at every size that it claims, against its formula.

use super::*;

/// Sizes that show the edges: below, at and above one micro-batch a rank, odd and even, and long.
fn micro_batches(num_ranks: usize) -> Vec<usize> {
    let p = num_ranks;
    let mut sizes = vec![1, 2, 3, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 2, 3 * p + 1, 4 * p, 120, 239, 240];
    sizes.retain(|&m| (1..=240).contains(&m));
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

#[test]
fn every_size_is_proven_or_refused() {
    for num_ranks in 1..=32 {
        for num_micro_batches in micro_batches(num_ranks) {
            for schedule in Schedule::ALL {
                let proven = schedule.proven(num_ranks, num_micro_batches);
                let allowed = match schedule {
                    Schedule::DualPipe => num_ranks % 2 == 0 && num_micro_batches % 2 == 0 && num_micro_batches >= 2 * num_ranks,
                    Schedule::Paired => num_ranks == 1,
                    _ => true,
                };
                match proven {
                    Ok(_) => assert!(allowed, "{schedule} {num_ranks} {num_micro_batches}"),
                    Err(Violation::Size(_)) => assert!(!allowed, "{schedule} {num_ranks} {num_micro_batches}"),
                    Err(wrong) => panic!("{schedule}, P {num_ranks}, M {num_micro_batches}: {wrong}"),
                }
            }
        }
    }
}

#[test]
fn the_published_bubbles_at_16_ranks_and_120_micro_batches() {
    for (schedule, expected) in [(Schedule::OneFOneB, 45.0), (Schedule::GPipe, 45.0), (Schedule::Zb1p, 15.0), (Schedule::DualPipe, 14.0)] {
        let (_, report) = schedule.proven(16, 120).unwrap();
        assert_eq!(report.bubble, [expected; 16], "{schedule}");
        assert_eq!(report.makespan, 360.0 + expected);
    }
    let (_, report) = Schedule::DualPipe.proven(16, 120).unwrap();
    assert_eq!(report.in_flight.iter().max(), Some(&17));
}
