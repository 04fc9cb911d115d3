//! The FP8 sentinel in a run: an outlier that FP8 cannot hold beside its neighbours trips it, the linear computes in BF16,
//! and comes back; the same on any number of ranks, and over a resume.
use crate::support::{Run, gap, scratch};
use model::Product;
use parallel::comm::local::{run_local, solo};
use parallel::mesh::Mesh;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tch::{Device, Tensor};
use trainer::RunConfig;
use trainer::checkpoint::{self, Manifest};
use trainer::coordinator::StopSignal;
use trainer::run::{Start, train};
use trainer::step::Trainer;

/// The two linears that read the planted norm. They are the model's 8th and 10th, so they are looked at in those steps.
const QUERY: &str = "model.layers.1.self_attn.q_a_proj.weight";
const KEY: &str = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight";

/// Two steps after a trip the next linear's is due; both are in BF16 in steps 11 and 12.
const SET: &[&str] = &[
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=16",
    "model.v_head_dim=16",
    "phase.0.lr=1e-12", // the outlier stays what it is
    "phase.0.tokens=12288",
    "guard.gradient_limit=0",
    "guard.norm_spike=0",
    "run.precision=fp8",
    "sentinel.limit=0.5",
    "sentinel.fallback_steps=4",
];

/// A checkpoint whose second layer's attention reads 10⁶ in one channel, which the linears' weights leave out: exact in BF16,
/// and in FP8 its tile's scale leaves nothing of the other channels.
fn planted() -> &'static Path {
    static PLANTED: OnceLock<PathBuf> = OnceLock::new();
    PLANTED.get_or_init(|| {
        let run = Run::new("planted", SET);
        let (config, world) = (run.config(), solo());
        let mut trainer = Trainer::new(&config, &Mesh::single(), world.clone()).expect("a trainer");
        for slot in &trainer.optimizer.slots {
            match trainer.weights.table.spec(slot.shard.id).name.as_str() {
                "model.layers.1.input_layernorm.weight" => drop(slot.master.narrow(0, 0, 1).fill_(1e6)),
                QUERY | KEY => drop(slot.master.narrow(1, 0, 1).fill_(0.0)),
                _ => {}
            }
        }
        let head = Manifest::head(&config, &Mesh::single(), 0);
        checkpoint::save(&*world, &scratch().join("planted"), head, trainer.state()).expect("a checkpoint")
    })
}

fn run(name: &str, set: &[&str]) -> Run {
    let from = format!("run.init_from={}", planted().display());
    Run::new(&format!("sentinel-{name}"), &[SET, &[&from], set].concat())
}

fn go(config: &RunConfig, ranks: usize, start: Start, steps: u64) {
    let mut config = config.clone();
    config.run.stop_after = Some(steps);
    run_local(ranks, |world| train(&config, world, start, &StopSignal::default()).map(|_| ()).expect("the run"));
}

/// (tag, step, value) of every scalar below `fp8/`, as TensorBoard's event files have them.
fn scalars(run: &Run) -> Vec<(String, u64, f32)> {
    let files = std::fs::read_dir(run.dir().join("tensorboard")).expect("a folder");
    let mut found = Vec::new();
    for file in files {
        let bytes = std::fs::read(file.expect("an entry").path()).expect("an event file");
        let mut rest = &bytes[..];
        while rest.len() >= 16 {
            let length = u64::from_le_bytes(rest[..8].try_into().expect("eight")) as usize;
            let event = fields(&rest[12..12 + length]);
            let step = event.iter().find(|(field, ..)| *field == 2).map_or(0, |(_, step, _)| *step);
            for (.., summary) in event.iter().filter(|(field, ..)| *field == 5) {
                for (.., value) in fields(summary) {
                    let parts = fields(value);
                    let of = |wanted: u64| parts.iter().find(|(field, ..)| *field == wanted).map(|(.., bytes)| *bytes);
                    let tag = String::from_utf8_lossy(of(1).expect("a tag")).into_owned();
                    if let (Some(tag), Some(value)) = (tag.strip_prefix("fp8/"), of(2)) {
                        found.push((tag.to_string(), step, f32::from_le_bytes(value.try_into().expect("four"))));
                    }
                }
            }
            rest = &rest[12 + length + 4..];
        }
    }
    found.sort_by_key(|(_, step, _)| *step); // stable: what one step wrote stays in its order
    found
}

fn scalar(run: &Run, tag: &str) -> Vec<(u64, f32)> {
    scalars(run).into_iter().filter(|(found, ..)| found == tag).map(|(_, step, value)| (step, value)).collect()
}

/// Of a protobuf message: (field, its number if it is a varint, its bytes else).
fn fields(mut message: &[u8]) -> Vec<(u64, u64, &[u8])> {
    fn varint(message: &mut &[u8]) -> u64 {
        let mut value = 0;
        for place in 0.. {
            let byte = message[0];
            *message = &message[1..];
            value |= u64::from(byte & 127) << (7 * place);
            if byte < 128 {
                break;
            }
        }
        value
    }
    let mut found = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let (value, length) = match key % 8 {
            0 => (varint(&mut message), 0),
            1 => (0, 8),
            2 => (0, varint(&mut message) as usize),
            5 => (0, 4),
            kind => panic!("protobuf has no kind {kind}"),
        };
        found.push((key / 8, value, &message[..length]));
        message = &message[length..];
    }
    found
}

fn in_bf16(run: &Run, name: &str) -> Vec<(u64, f32)> {
    scalar(run, &format!("{name}/in_bf16"))
}

#[test]
fn an_outlier_trips_it_the_linear_falls_back_and_returns() {
    let watched = run("watched", &["sentinel.every=1"]);
    go(&watched.config(), 1, Start::Fresh, 14);
    let error = |name: &str, what: &str| scalar(&watched, &format!("{name}/{what}_error"));
    // It trips, is in BF16 for four steps, is looked at once more when it is back, and trips again.
    assert_eq!(in_bf16(&watched, QUERY), [(8, 1.0), (13, 0.0), (13, 1.0)]);
    assert_eq!(in_bf16(&watched, KEY), [(10, 1.0)]);
    assert_eq!(error(QUERY, "fprop").iter().map(|(step, _)| *step).collect::<Vec<_>>(), [8, 13]);
    assert!(error(QUERY, "fprop").iter().all(|(_, error)| *error > 0.5), "{:?}", error(QUERY, "fprop"));
    // Every other linear is off by FP8's noise, in each of its products.
    let other = "model.layers.0.mlp.down_proj.weight";
    for what in ["fprop", "dgrad", "wgrad"] {
        let [(7, error)] = error(other, what)[..] else { panic!("{other} is the 7th: {:?}", error(other, what)) };
        assert!((1e-3..0.1).contains(&error), "{other}, {what}: {error}");
    }
    let log = std::fs::read_to_string(watched.dir().join("log/rank-0.jsonl")).expect("a log");
    for words in [&format!("step 8: {QUERY} in FP8 is off by"), "the limit is 0.5: it computes in BF16 until step 13", &format!("step 13: {QUERY} computes in FP8 again")] {
        assert!(log.contains(words), "the log does not say `{words}`");
    }
}

#[test]
fn a_resume_and_four_ranks_take_the_same_branches() {
    let (whole, parts) = (run("whole", &["sentinel.every=1"]), run("parts", &["sentinel.every=1"]));
    go(&whole.config(), 1, Start::Fresh, 14);
    go(&parts.config(), 1, Start::Fresh, 9); // one linear is in BF16 then
    go(&parts.config(), 1, Start::Resume, 14);
    assert_eq!(parts.series("loss"), whole.series("loss"));
    assert_eq!(parts.series("grad_norm"), whole.series("grad_norm"));

    // Who no longer looks has what fell back in BF16 until its steps are over.
    let blind = run("blind", &["sentinel.every=1"]);
    go(&blind.config(), 1, Start::Fresh, 9);
    let mut config = blind.config();
    config.sentinel.every = 0;
    go(&config, 1, Start::Resume, 14);
    assert_eq!(blind.series("loss")[..10], whole.series("loss")[..10]);
    assert_eq!(in_bf16(&blind, QUERY), [(8, 1.0), (13, 0.0)], "back, and nobody looks");
    assert!(in_bf16(&blind, KEY).is_empty(), "its turn was never");

    let four = run("four", &["sentinel.every=1", "parallel.pp=2", "parallel.ep=2", "parallel.schedule=1f1b"]);
    go(&four.config(), 4, Start::Fresh, 14);
    for name in [QUERY, KEY] {
        assert_eq!(in_bf16(&four, name), in_bf16(&whole, name), "{name}");
    }
    let [of_four, of_one] = [&four, &whole].map(|run| run.series("loss"));
    assert!(gap(&of_four, &of_one) < 1e-4, "losses {of_four:?}, of one rank {of_one:?}");
}

#[test]
fn what_is_no_number_in_bf16_either_says_nothing_of_fp8() {
    let (number, none) = (Tensor::from_slice(&[3f32, 4.0]), Tensor::from_slice(&[3.0, f32::NAN]));
    let sentinel = model::Sentinel::new(Vec::new(), None);
    sentinel.record(Product::Fprop, &none, &none);
    sentinel.record(Product::Dgrad, &none, &number);
    sentinel.record(Product::Wgrad, &(&number * 1.5), &number);
    assert_eq!(Vec::<f64>::try_from(sentinel.errors(Device::Cpu)).expect("three"), [0.0, f64::INFINITY, 0.5]);
}

#[test]
fn every_linear_has_its_turn_and_looking_changes_nothing() {
    let named = |name: &str, every: &str| Run::new(name, &[SET, &["phase.0.lr=3e-3", "sentinel.limit=0.3", every]].concat());
    let (run, plain) = (named("sentinel-turns", "sentinel.every=1"), named("sentinel-off", "sentinel.every=0"));
    let config = run.config();
    let (dense, moe) = (config.model.first_k_dense_replace, config.model.num_hidden_layers - config.model.first_k_dense_replace + 1);
    let linears = (dense * (5 + 2) + moe * (5 + 2 + 2)) as usize;
    go(&config, 1, Start::Fresh, linears as u64);
    for what in ["fprop", "dgrad", "wgrad"] {
        let found: Vec<_> = scalars(&run).into_iter().filter(|(tag, ..)| tag.ends_with(&format!("{what}_error"))).collect();
        let names: BTreeSet<&str> = found.iter().map(|(tag, ..)| tag.as_str()).collect();
        assert_eq!((found.len(), names.len()), (linears, linears), "{found:?}");
        for (tag, step, error) in &found {
            assert!((1e-3..0.12).contains(error), "step {step}, {tag}: {error}");
        }
    }
    assert!(scalars(&run).iter().all(|(tag, ..)| !tag.ends_with("in_bf16")), "nothing trips it");
    go(&plain.config(), 1, Start::Fresh, linears as u64);
    assert_eq!(run.series("loss"), plain.series("loss"));
    assert_eq!(run.series("grad_norm"), plain.series("grad_norm"));
}
