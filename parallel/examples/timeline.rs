//! Proves a schedule, prints its figures beside the others' and writes its timeline.
//! `timeline dualpipe 16 120 out.svg`

use parallel::schedule::{Schedule, Times, timeline};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, ranks, micro_batches, path] = &args[..] else { return Err("usage: timeline SCHEDULE P M OUT.svg".into()) };
    let (num_ranks, num_micro_batches) = (ranks.parse()?, micro_batches.parse()?);
    let chosen = Schedule::ALL.into_iter().find(|s| s.to_string() == *name).ok_or("no such schedule")?;
    for schedule in Schedule::ALL.into_iter().filter(|s| s.validate(num_ranks, num_micro_batches).is_ok()) {
        let (_, report) = schedule.proven(num_ranks, num_micro_batches)?;
        let formula = schedule.bubble(num_ranks, &Times::UNIT);
        let in_flight = report.in_flight.iter().max().expect("a rank");
        println!("{schedule:>9}: bubble {} (formula {formula}) of {}, at most {in_flight} in flight", report.worst_bubble(), report.makespan);
    }
    let (_, report) = chosen.proven(num_ranks, num_micro_batches)?;
    std::fs::write(path, timeline(chosen, &report, &Times::UNIT))?;
    Ok(())
}
