//! Who waits for whom in a world that stands still: each rank leaves a word of a long wait in RUN_DIR/log/rank-N.waiting.
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// More groups than these would not be read.
const TOLD: usize = 4;

#[derive(Deserialize, PartialEq, Eq, PartialOrd, Ord)]
struct Wait {
    op: String,
    /// Ranks.
    from: Vec<usize>,
}

/// In words, the ranks that do as few others do first: one of them is the reason. None: nobody waits, or nobody says so.
pub fn waits(log: &Path, ranks: usize) -> Option<String> {
    let read = |rank: usize| serde_json::from_slice::<Wait>(&fs::read(log.join(format!("rank-{rank}.waiting"))).ok()?).ok();
    let mut groups: BTreeMap<Option<Wait>, Vec<usize>> = BTreeMap::new();
    (0..ranks).for_each(|rank| groups.entry(read(rank)).or_default().push(rank));
    if groups.keys().all(Option::is_none) {
        return None;
    }
    let mut groups: Vec<_> = groups.into_iter().collect();
    groups.sort_by_key(|(wait, who)| (wait.is_some(), wait.as_ref().is_some_and(|wait| wait.op != "exchange"), who.len()));
    let circle = circle(&groups, ranks);
    let left = groups.len().saturating_sub(TOLD);
    let mut words: Vec<String> = groups.iter().take(TOLD).map(|(wait, who)| group(wait.as_ref(), who)).collect();
    if let Some(circle) = circle {
        let each: Vec<String> = circle.iter().zip(circle.iter().cycle().skip(1)).map(|(a, b)| format!("rank {a} for rank {b}")).collect();
        words.insert(0, format!("they wait in a circle, {}: a message between two of them was lost", each.join(", ")));
    }
    words.extend((left > 0).then(|| format!("and {left} more kinds of waits")));
    Some(words.join("; "))
}

/// Ranks each of which waits for the next, and the last for the first: then none of them is late, and a message is missing.
fn circle(groups: &[(Option<Wait>, Vec<usize>)], ranks: usize) -> Option<Vec<usize>> {
    // A rank waits for the first of those that are not where it is.
    let next = |rank: usize| {
        let (wait, with) = groups.iter().find(|(_, who)| who.contains(&rank))?;
        wait.as_ref()?.from.iter().copied().find(|other| *other < ranks && !with.contains(other))
    };
    (0..ranks).find_map(|start| {
        let mut way = vec![start];
        while let Some(rank) = next(way[way.len() - 1]) {
            if let Some(first) = way.iter().position(|seen| *seen == rank) {
                return Some(way.split_off(first));
            }
            way.push(rank);
        }
        None
    })
}

fn group(wait: Option<&Wait>, who: &[usize]) -> String {
    let (names, s) = (named(who), if who.len() == 1 { "s" } else { "" });
    match wait {
        None => format!("{names} wait{s} for nobody"),
        Some(Wait { op, from }) if op == "exchange" => format!("{names} wait{s} for messages between it and {}", named(from)),
        Some(Wait { op, from }) => format!("{names} wait{s} in {op} of {}", named(from)),
    }
}

/// rank 3, ranks 0 to 3, ranks 0, 2.
pub fn named(ranks: &[usize]) -> String {
    match ranks {
        [one] => format!("rank {one}"),
        [first, .., last] if last - first + 1 == ranks.len() => format!("ranks {first} to {last}"),
        _ => format!("ranks {}", ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_odd_one_out_comes_first() {
        let folder = tempfile::tempdir().expect("a folder");
        let log = folder.path();
        assert_eq!(waits(log, 4), None);
        let wait = |rank: usize, op: &str, from: &str| {
            fs::write(log.join(format!("rank-{rank}.waiting")), format!("{{\"op\":\"{op}\",\"from\":[{from}]}}")).expect("written")
        };
        [0, 2, 3].iter().for_each(|&rank| wait(rank, "all_reduce", "0,1,2,3"));
        assert_eq!(waits(log, 4).as_deref(), Some("rank 1 waits for nobody; ranks 0, 2, 3 wait in all_reduce of ranks 0 to 3"));
        wait(1, "exchange", "3");
        let circle = "they wait in a circle, rank 1 for rank 3, rank 3 for rank 1: a message between two of them was lost; rank 1 waits for messages between it and rank 3; ranks 0, 2, 3 wait in all_reduce of ranks 0 to 3";
        assert_eq!(waits(log, 4).as_deref(), Some(circle));
        (4..12).for_each(|rank| wait(rank, "all_to_all", &rank.to_string()));
        assert!(waits(log, 12).expect("words").ends_with("; and 6 more kinds of waits"));
    }
}
