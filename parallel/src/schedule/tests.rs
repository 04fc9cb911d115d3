//! Every schedule at every size that it claims, against its formula.

use super::*;

#[test]
fn sizes_that_a_schedule_is_not_made_for_are_refused() {
    for num_ranks in 1..=32 {
        for num_micro_batches in 0..=240 {
            for schedule in Schedule::ALL {
                let allowed = num_micro_batches > 0
                    && match schedule {
                        Schedule::DualPipe => num_ranks % 2 == 0 && num_micro_batches % 2 == 0 && num_micro_batches >= 2 * num_ranks,
                        Schedule::Paired => num_ranks == 1,
                        _ => true,
                    };
                assert_eq!(schedule.validate(num_ranks, num_micro_batches).is_ok(), allowed, "{schedule} {num_ranks} {num_micro_batches}");
            }
        }
    }
    assert!(matches!(Schedule::DualPipe.proven(4, 6), Err(Violation::Size(_))));
}

/// Deadlock, order, memory and, where the formula is exact, the bubble of every rank.
#[test]
fn every_size_is_proven() {
    let prove = |num_ranks| {
        for num_micro_batches in 1..=240 {
            for schedule in Schedule::ALL.into_iter().filter(|s| s.validate(num_ranks, num_micro_batches).is_ok()) {
                if let Err(wrong) = schedule.proven(num_ranks, num_micro_batches) {
                    panic!("{schedule}, P {num_ranks}, M {num_micro_batches}: {wrong}");
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for start in [1, 2] {
            scope.spawn(move || (start..=32).step_by(2).for_each(prove));
        }
    });
}

/// So no gradient is complete, and sent to its owners, while a forward waits for others' counts (`comm/peer/direct.rs`).
#[test]
fn the_last_backward_of_a_direction_is_in_no_pair() {
    for schedule in Schedule::ALL {
        for (num_ranks, num_micro_batches) in [(1, 1), (1, 7), (2, 4), (4, 8), (8, 40)] {
            let Ok((lists, _)) = schedule.proven(num_ranks, num_micro_batches) else { continue };
            let paired = |action: &Action| match action {
                Action::Backward(chunk) | Action::BackwardInput(chunk) => Some((chunk.direction, false)),
                Action::Pair { backward, .. } => Some((backward.direction, true)),
                _ => None,
            };
            for list in &lists {
                let last: std::collections::BTreeMap<_, bool> = list.iter().filter_map(paired).collect();
                assert!(!last.is_empty() && last.values().all(|paired| !paired), "{schedule}, P {num_ranks}, M {num_micro_batches}: {last:?}");
            }
        }
    }
}

/// Where nobody waits for the result of a backward, its weights' work is not put off only to come next.
#[test]
fn a_backward_is_split_for_something() {
    for schedule in [Schedule::Zb1p, Schedule::DualPipe] {
        for (num_ranks, num_micro_batches) in [(2, 4), (2, 8), (4, 8), (8, 40)] {
            let (lists, _) = schedule.proven(num_ranks, num_micro_batches).unwrap();
            for (rank, list) in lists.iter().enumerate() {
                let for_nothing = list.windows(2).find(|two| matches!(two, [Action::BackwardInput(b), Action::BackwardWeight(w)] if b == w));
                assert_eq!(for_nothing, None, "{schedule}, P {num_ranks}, M {num_micro_batches}, rank {rank}");
            }
            assert!(lists.iter().flatten().any(|action| matches!(action, Action::BackwardWeight(_))) || num_ranks == 2, "{schedule}: none is split");
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

#[test]
fn at_other_times_dualpipe_keeps_near_its_formula() {
    let times = Times { forward: 1.0, backward: 2.2, weight: 1.0, pair: 2.6, transfer: 0.0 };
    let (lists, _) = Schedule::DualPipe.proven(16, 120).unwrap();
    let report = check(&lists, 120, &times).unwrap();
    let formula = Schedule::DualPipe.bubble(16, &times);
    assert!((formula - 12.6).abs() < 1e-9 && (report.worst_bubble() - 11.6).abs() < 1e-9, "{} {formula}", report.worst_bubble());
    // Transfers cost, but the schedule still ends.
    let slow = check(&lists, 120, &Times { transfer: 0.5, ..Times::UNIT }).unwrap();
    assert!(slow.worst_bubble() > 14.0);
}

#[test]
fn the_timeline_shows_every_computation() {
    let (lists, report) = Schedule::DualPipe.proven(4, 8).unwrap();
    let svg = timeline(Schedule::DualPipe, &report, &Times::UNIT);
    let num_computations = lists.iter().flatten().filter(|a| !matches!(a, Action::Exchange(_))).count();
    let num_pairs = lists.iter().flatten().filter(|a| matches!(a, Action::Pair { .. })).count();
    // One block each, two for a pair; besides, the page, a row a rank and eight in the legend.
    assert_eq!(svg.matches("<rect").count(), num_computations + num_pairs + 1 + 4 + 8);
    assert!(svg.contains("bubble 2.0 to 2.0 of 26.0 (formula 2.0)"), "{svg}");
}

mod mutation;
