//! The parts of a pipeline's stage, from which the schedules' bubbles follow: a forward, a whole backward, its weights' part,
//! and a forward and a backward overlapped, each over this layout's experts. The stage is the whole model of the config.
//!
//! Legend: P ranks of a pipe, M micro-batches.
use super::{WARM, batch, median, together};
use anyhow::{Context, Result, ensure};
use model::Grads;
use parallel::comm::{Comm, Communicator};
use parallel::mesh::Mesh;
use parallel::schedule::run::run as run_schedule;
use parallel::schedule::{Action, Chunk, Schedule, Times, check};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use trainer::RunConfig;
use trainer::phase::Plan;
use trainer::pipeline::Pipeline;
use trainer::step::Trainer;

/// Micro-batches whose activations are held at a time.
const HELD: usize = 4;
const ROUNDS: usize = 8;

pub fn stage(config: &RunConfig, (mesh, world): (&Mesh, Comm), control: &dyn Communicator) -> Result<Value> {
    let mut trainer = Trainer::new(config, mesh, world)?;
    let on = trainer.weights.device();
    let found = parts(&mut trainer, config, |work| together(control, on, work))?;
    let ms = |name: &str| found[name];
    let times = Times { forward: ms("forward"), backward: ms("backward"), weight: ms("weight"), pair: ms("pair"), transfer: 0.0 };
    let of = |(name, ms): (&&str, &f64)| (format!("{name}_ms"), json!(ms));
    let parts: serde_json::Map<String, Value> = found.iter().map(of).collect();
    Ok(json!({ "stage": parts, "steps": predicted(&times) }))
}

/// Medians, in the unit of `clock`, which times what it is given.
fn parts(
    trainer: &mut Trainer,
    config: &RunConfig,
    clock: impl Fn(&mut dyn FnMut() -> Result<()>) -> Result<f64>,
) -> Result<BTreeMap<&'static str, f64>> {
    ensure!(trainer.mesh.pp == 1, "bench --multi-gpu --stage: parallel.pp = {}, a stage alone has 1", trainer.mesh.pp);
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let moment = plan.at(0).context("a config has a phase")?;
    let batch = batch(trainer, &moment, 0);
    ensure!(batch.len() == HELD, "bench --multi-gpu --stage: phase.0.batch gives a rank {} micro-batches, it takes {HELD}", batch.len());
    for _ in 0..WARM {
        trainer.step(&moment, &batch, false)?;
    }
    let step = trainer.context(&moment, moment.batch);
    let lists = lists();
    let mut times = vec![Vec::new(); lists.len()];
    for round in 0..WARM + ROUNDS {
        let mut reduction = trainer.zero.begin(false);
        // One use more than is made: no gradient is ever complete, and none is reduced.
        let forwards: Vec<Action> = (0..=3 * HELD).map(|_| Action::Forward(chunk(0))).collect();
        let mut grads = Grads::new(&trainer.weights, trainer.stages.uses(&forwards), &mut reduction);
        let mut pipeline = Pipeline::new(&step, &trainer.stages, &mut trainer.weights, Some(&mut grads), &batch, &trainer.config);
        for ((_, actions), times) in lists.iter().zip(&mut times) {
            let time = clock(&mut || Ok(run_schedule(actions, &*trainer.groups.pipe, &mut pipeline)?))?;
            if round >= WARM {
                times.push(time / actions.len() as f64);
            }
        }
    }
    Ok(lists.iter().zip(times).map(|((name, _), times)| (*name, median(times))).collect())
}

fn chunk(micro_batch: usize) -> Chunk {
    Chunk { direction: 0, micro_batch }
}

/// What is timed, in the order in which it runs: forwards come before their backwards.
fn lists() -> Vec<(&'static str, Vec<Action>)> {
    let all = |action: fn(Chunk) -> Action| (0..HELD).map(|k| action(chunk(k))).collect();
    vec![
        ("forward", all(Action::Forward)),
        ("input", all(Action::BackwardInput)),
        ("weight", all(Action::BackwardWeight)),
        ("forward_again", all(Action::Forward)),
        ("backward", all(Action::Backward)),
        ("first", vec![Action::Forward(chunk(0))]),
        ("pair", (1..HELD).map(|k| Action::Pair { forward: chunk(k), backward: chunk(k - 1) }).collect()),
        ("last", vec![Action::Backward(chunk(HELD - 1))]),
    ]
}

/// What the checker says of pipelines of such stages: the length of a step, the worst rank's work, and the published bubble.
fn predicted(times: &Times) -> Value {
    let mut found = json!({});
    for (pp, per_rank) in [(2, 2), (2, 4), (4, 2), (4, 4), (8, 2), (8, 4)] {
        let count = pp * per_rank;
        for schedule in [Schedule::OneFOneB, Schedule::Zb1p, Schedule::DualPipe] {
            let (lists, _) = schedule.proven(pp, count).expect("sizes that every schedule takes");
            let report = check(&lists, count, times).expect("proven");
            let (step, bubble) = (report.makespan, report.worst_bubble());
            found[format!("{schedule} {pp} {count}")] =
                json!({ "step_ms": step, "work_ms": step - bubble, "bubble_ms": bubble, "formula_ms": schedule.bubble(pp, times) });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallel::comm::local::{run_local, solo};
    use std::path::Path;
    use std::time::Instant;

    fn clock(work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let start = Instant::now();
        work()?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn tiny(set: &[&str]) -> RunConfig {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/run/tiny.toml");
        RunConfig::load(&path, &set.iter().map(|set| set.to_string()).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn every_part_of_a_stage_runs_alone_and_over_two_ranks() {
        let one = tiny(&["phase.0.batch=4", "model.num_hidden_layers=1", "model.first_k_dense_replace=0"]);
        let mut trainer = Trainer::new(&one, &one.mesh(&[0]).unwrap(), solo()).unwrap();
        let found = parts(&mut trainer, &one, clock).unwrap();
        assert!(found.values().all(|&time| time > 0.0) && found.len() == lists().len(), "{found:?}");
        let two = tiny(&["phase.0.batch=8", "parallel.ep=2"]);
        run_local(2, |world| {
            let mut trainer = Trainer::new(&two, &two.mesh(&[0, 0]).unwrap(), world).unwrap();
            parts(&mut trainer, &two, clock).unwrap();
        });
        let many = tiny(&["phase.0.batch=8"]);
        let mut trainer = Trainer::new(&many, &many.mesh(&[0]).unwrap(), solo()).unwrap();
        assert!(parts(&mut trainer, &many, clock).unwrap_err().to_string().contains("8 micro-batches, it takes 4"));
    }

    #[test]
    fn the_predicted_step_is_the_work_and_the_published_bubble() {
        let found = predicted(&Times::UNIT);
        let of = |name: &str, key: &str| found[name][key].as_f64().unwrap();
        for (name, work) in [("1f1b 4 8", 24.0), ("zb1p 4 16", 48.0), ("dualpipe 8 16", 48.0)] {
            assert_eq!((of(name, "work_ms"), of(name, "bubble_ms")), (work, of(name, "formula_ms")), "{name}");
            assert_eq!(of(name, "step_ms"), work + of(name, "formula_ms"), "{name}");
        }
    }
}
