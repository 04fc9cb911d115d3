//! `tiefsee bench`: training steps on random tokens, timed, without a corpus or a run directory.
use anyhow::Result;
use clap::Parser;
use model::MicroBatch;
use parallel::comm::local::solo;
use parallel::mesh::Mesh;
use std::path::PathBuf;
use std::time::Instant;
use tch::Tensor;
use trainer::RunConfig;
use trainer::phase::Plan;
use trainer::step::Trainer;

#[derive(Parser)]
pub struct Args {
    #[arg(long)]
    config: PathBuf,
    #[arg(long = "set")]
    set: Vec<String>,
    /// Timed steps, after two that are not.
    #[arg(long, default_value_t = 8)]
    steps: usize,
}

pub fn run(args: &Args) -> Result<()> {
    let config = RunConfig::load(&args.config, &args.set)?;
    if config.run.threads > 0 {
        tch::set_num_threads(config.run.threads as i32);
    }
    let mut trainer = Trainer::new(&config, &Mesh::single(), solo())?;
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let moment = plan.at(0).expect("a config has a phase");
    let length = moment.phase.sequence_length as i64;
    let micro = moment.phase.micro_batch as i64;
    let count = (moment.batch / moment.phase.micro_batch) as i64;
    let tokens = |step: i64, index: i64| {
        let values: Vec<i64> =
            (0..micro * (length + 1)).map(|i| (i * 7919 + step * 104_729 + index * 1_299_709) % config.model.vocab_size).collect();
        MicroBatch { tokens: Tensor::from_slice(&values).view([micro, length + 1]) }
    };
    let mut times = Vec::new();
    let mut loss = 0.0;
    for step in 0..args.steps as i64 + 2 {
        let batch: Vec<MicroBatch> = (0..count).map(|index| tokens(step, index)).collect();
        let start = Instant::now();
        loss = trainer.step(&moment, &batch, false)?.loss;
        times.push(start.elapsed().as_secs_f64());
    }
    let mut timed = times.split_off(2);
    timed.sort_by(f64::total_cmp);
    let median = timed[timed.len() / 2];
    let tokens_per_step = (moment.batch * moment.phase.sequence_length) as f64;
    println!(
        "{}",
        serde_json::json!({"tokens_per_s": tokens_per_step / median, "step_ms": median * 1e3, "loss": loss, "threads": tch::get_num_threads()})
    );
    Ok(())
}
