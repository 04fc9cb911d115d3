//! What `tiefsee plan run` foretells is what ranks then hold.
use crate::support::{Run, root, tiefsee, tokens};
use model::MicroBatch;
use kernels::Precision;
use model::flow::Work;
use model::kept::{How, kept, put_off};
use model::saved::{self, PROBABILITIES, bytes};
use model::stage::StageIn;
use parallel::comm::local::{run_local, solo};
use parallel::mesh::Mesh;
use std::rc::Rc;
use tch::Tensor;
use trainer::estimate::needs;
use trainer::phase::Plan;
use trainer::step::Trainer;

/// Widths that FP8 takes, and some that are no whole tiles.
const WIDTHS: [&str; 4] = ["model.kv_lora_rank=16", "model.qk_nope_head_dim=16", "model.qk_rope_head_dim=16", "model.v_head_dim=16"];

#[test]
fn a_forward_keeps_what_was_foretold() {
    let length = 32;
    let again = ["recompute.rms_norm=true", "recompute.mla_up_projection=true", "recompute.swiglu=true"];
    let never = ["recompute.rms_norm=false", "recompute.mla_up_projection=false", "recompute.swiglu=false"];
    for (precision, sequences) in [("f64", 2), ("f32", 1), ("bf16", 2), ("fp8", 1), ("fp8", 2)] {
        for more in [&again[..], &never, &[again[0], never[1], again[2]], &[never[0], again[1], never[2]]] {
            let precision = format!("run.precision={precision}");
            let config = Run::new("foretold", &[&WIDTHS[..], &[&precision], more].concat()).config();
            assert_eq!((config.model.num_nextn_predict_layers, config.model.n_shared_experts), (1, 1), "all parts are there");
            let mut trainer = Trainer::new(&config, &Mesh::single(), solo()).expect("a trainer");
            let plan = Plan::new(&config.phase, &config.data.mixture);
            let context = trainer.context(&plan.at(0).expect("a phase"), sequences);
            let batch = MicroBatch::new(tokens(3, &[sequences as i64, length + 1], config.model.vocab_size));
            let (stage, whole) = (trainer.stages.direction(0), model::StagePart::whole(&config.model));
            let (.., saved) = stage.forward(&context, &mut trainer.weights, &batch, StageIn::Tokens).expect("a forward");
            let how = How {
                precision: config.run.precision,
                recompute: config.recompute,
                sequences: sequences as i64,
                length,
                ep: 1,
                on_gpu: false,
                documents: false,
                load: 1.0,
            };
            assert_eq!(kept(&config.model, &whole, how), bytes(&saved), "{precision}, {more:?}");
            let mut work = Vec::new();
            let (_, rest) = stage.backward(&trainer.weights, None, saved, &mut |piece| work.push(piece)).expect("a backward");
            work.extend(rest);
            work.retain(|piece| !matches!(piece, Work::Head(_) | Work::MtpOut(_)));
            let (foretold, made) = (put_off(&config.model, &whole, how), saved::put_off(&work).values().sum::<i64>());
            // In other kinds than FP8 some gradients of neighbours' outputs are one tensor.
            let alike = if config.run.precision == Precision::Fp8 { made..=made } else { made..=made * 6 / 5 };
            assert!(alike.contains(&foretold), "{precision}, {more:?}: {foretold} foretold, {made} made");
        }
    }
}

#[test]
fn on_a_gpu_probabilities_are_kept_where_cudnn_does_not_take_the_attention() {
    let keeps = |precision: &str, set: &[&str], length: i64| {
        let precision = format!("run.precision={precision}");
        let config = Run::new("fused", &[&WIDTHS[..], &[&precision], set].concat()).config();
        let (precision, recompute) = (config.run.precision, config.recompute);
        let how = How { precision, recompute, sequences: 1, length, ep: 1, on_gpu: true, documents: config.attention.document_boundaries, load: 1.0 };
        kept(&config.model, &model::StagePart { layers: 0..1, first: true, last: false }, how).contains_key(PROBABILITIES)
    };
    assert!(!keeps("bf16", &[], 64) && !keeps("fp8", &[], 4096));
    // Documents are lengthened, whatever their sequence has.
    let within = "attention.document_boundaries=true";
    assert!(!keeps("bf16", &[within], 63) && keeps("f32", &[within], 63) && keeps("bf16", &[within, "model.v_head_dim=256"], 63));
    assert!(keeps("bf16", &[], 63) && keeps("f32", &[], 4096) && keeps("bf16", &["model.v_head_dim=256"], 4096));
}

#[test]
fn within_documents_no_more_is_kept_than_was_foretold() {
    let config = Run::new("foretold-within", &[&WIDTHS[..], &["run.precision=f32", "attention.document_boundaries=true"]].concat()).config();
    let mut trainer = Trainer::new(&config, &Mesh::single(), solo()).expect("a trainer");
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let context = trainer.context(&plan.at(0).expect("a phase"), 2);
    let mut keeps = |documents: [Vec<i64>; 2]| {
        let tokens = tokens(3, &[2, 33], config.model.vocab_size);
        let batch = MicroBatch { tokens, documents: Some(Rc::new(documents.to_vec())) };
        bytes(&trainer.stages.direction(0).forward(&context, &mut trainer.weights, &batch, StageIn::Tokens).expect("a forward").2)
    };
    let how = How { precision: Precision::F32, recompute: config.recompute, sequences: 2, length: 32, ep: 1, on_gpu: false, documents: true, load: 1.0 };
    let mut foretold = kept(&config.model, &model::StagePart::whole(&config.model), how);
    assert_eq!(keeps([vec![33], vec![33]]), foretold, "one document each");
    let mut short = keeps([vec![1, 31, 1], vec![11, 11, 11]]);
    assert!(short.remove(PROBABILITIES) < foretold.remove(PROBABILITIES));
    assert_eq!(short, foretold);
}

#[test]
fn rows_that_arrive_are_foretold_with_even_routes() {
    // Every token to half of all experts, in turns: each rank gets every row.
    let set = ["run.precision=fp8", "parallel.ep=2", "phase.0.batch=4", "phase.0.micro_batch=2", "model.num_experts_per_tok=8", "model.n_group=1", "model.topk_group=1"];
    let config = Run::new("arriving", &[&WIDTHS[..], &set].concat()).config();
    assert_eq!(config.model.n_routed_experts, 8, "all experts are chosen");
    let mesh = config.mesh(&[0, 0]).expect("a layout");
    let saved = run_local(2, |world| {
        let mut trainer = Trainer::new(&config, &mesh, world).expect("a trainer");
        let plan = Plan::new(&config.phase, &config.data.mixture);
        let context = trainer.context(&plan.at(0).expect("a phase"), 2);
        let batch = MicroBatch::new(tokens(3, &[2, 33], config.model.vocab_size));
        let (.., saved) = trainer.stages.direction(0).forward(&context, &mut trainer.weights, &batch, StageIn::Tokens).expect("a forward");
        bytes(&saved)
    });
    let how = How { precision: Precision::Fp8, recompute: config.recompute, sequences: 2, length: 32, ep: 2, on_gpu: false, documents: false, load: 1.0 };
    assert_eq!(saved, vec![kept(&config.model, &model::StagePart::whole(&config.model), how); 2]);
}

/// Bytes of a rank's weights, gradients and optimizer, and its place in the pipe.
fn held(trainer: &Trainer, rank: usize) -> (usize, [i64; 3]) {
    let of = |tensor: &Tensor| tensor.numel() as i64 * tensor.kind().elt_size_in_bytes() as i64;
    let master = trainer.weights.precision.master();
    let gradients = trainer.weights.table.specs().iter().filter(|spec| spec.trained()).map(|spec| spec.numel()).sum::<i64>();
    let own = |slot: &trainer::optimizer::Slot| if trainer.weights.get(slot.shard.id).kind() == master { 0 } else { of(&slot.master) };
    let optimizer = trainer.optimizer.slots.iter().map(|slot| own(slot) + of(&slot.first) + of(&slot.second)).sum();
    (trainer.mesh.place(rank).pp, [trainer.weights.bytes(), gradients * master.elt_size_in_bytes() as i64, optimizer])
}

#[test]
fn ranks_hold_what_was_foretold() {
    let dual = ["parallel.pp=2", "parallel.schedule=dualpipe", "parallel.ep=2", "phase.0.batch=8", "phase.0.micro_batch=1"];
    let ends = ["parallel.pp=2", "parallel.schedule=zb1p", "phase.0.batch=8", "phase.0.micro_batch=1"];
    for (ranks, set) in [(1, &[][..]), (2, &["parallel.ep=2"]), (4, &dual), (4, &ends)] {
        for precision in ["f32", "bf16"] {
            let precision = format!("run.precision={precision}");
            let config = Run::new("held", &[&[&precision, "optimizer.moments=bf16"], set].concat()).config();
            let mesh = config.mesh(&vec![0; ranks]).expect("a layout");
            let needs = needs(&config, &mesh, 1.0, 0).expect("an estimate");
            let held = run_local(ranks, |world| held(&Trainer::new(&config, &mesh, world.clone()).expect("a trainer"), world.rank()));
            for (place, need) in needs.iter().enumerate() {
                let most = |part: usize| held.iter().filter(|(of, _)| *of == place).map(|(_, parts)| parts[part]).max();
                let foretold = [need.weights, need.gradients, need.optimizer].map(Some);
                assert_eq!([0, 1, 2].map(most), foretold, "{ranks} ranks, {precision}, place {place}");
                assert!(need.activations.bytes > 0 && need.most() >= need.weights + need.gradients + need.optimizer + need.arriving);
            }
        }
    }
}

#[test]
fn blocks_of_weights_are_foretold() {
    let config = Run::new("blocks", &[&WIDTHS[..], &["run.precision=fp8"]].concat()).config();
    let mut trainer = Trainer::new(&config, &Mesh::single(), solo()).expect("a trainer");
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let context = trainer.context(&plan.at(0).expect("a phase"), 1);
    let batch = MicroBatch::new(tokens(3, &[1, 33], config.model.vocab_size));
    drop(trainer.gradients(&context, &[batch]).expect("gradients"));
    assert_eq!(needs(&config, &Mesh::single(), 1.0, 0).expect("an estimate")[0].weights, trainer.weights.bytes());
}

#[test]
fn a_layout_is_refused_before_a_rank_starts() {
    let plan = |ranks: &str, more: &[&str]| {
        let path = root().join("configs/run/v3-671b.toml").display().to_string();
        let args: Vec<String> = [&["plan", "run", &path, "--ranks", ranks][..], more].concat().iter().map(|word| word.to_string()).collect();
        let output = tiefsee(&args).output().expect("it runs");
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    };
    let (fine, text) = plan("2048", &[]);
    assert!(fine && text.contains("2048 ranks on 256 node(s): pp 16, dp 128, ep 64, dualpipe"), "{text}");
    let (fine, text) = plan("2048", &["--gib", "40"]);
    assert!(!fine && text.contains("GiB and more, --gib is 40"), "{text}");
    for (set, error) in [
        ("phase.0.micro_batch=4611686018427387904", "micro_batch = 4611686018427387904: must be from 1 to"),
        ("phase.0.tokens=9223372036854775807", "tokens = 9223372036854775807: must be from 1 to"),
        ("parallel.layers=[9223372036854775807, 9223372036854775807, 63, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]", "each from 0 to model.num_hidden_layers = 61"),
        ("parallel.layers=[4, 0, 8, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1]", "parallel.pp = 16: stage 1 of [4, 0, 8, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1] layers has none"),
        ("model.vocab_size=400000", "model.vocab_size = 400000: the embedding would be one parameter of 2867200000 elements, on a GPU at most 2146435072"),
        ("phase.5.tokens=1", "phase.5.tokens = 1: no step: the last one before it goes beyond its end"),
        ("model.n_shared_experts=-1", "n_shared_experts = -1"),
        ("model.vocab_size=9223372036854775807", "vocab_size = 9223372036854775807"),
    ] {
        let (fine, text) = plan("2048", &["--set", set]);
        assert!(!fine && text.contains(error) && !text.contains("panicked"), "{set}: {text}");
    }
    let (fine, text) = plan("4611686018427387904", &[]);
    assert!(!fine && text.contains("--ranks 4611686018427387904: at most"), "{text}");
    let (fine, text) = plan("2048", &["--set", "parallel.ep=2"]);
    assert!(!fine && text.contains("parallel.ep = 2: a rank's experts of a layer would be one parameter of 3758096384 elements, on a GPU at most 2146435072"), "{text}");
    let (fine, text) = plan("2048", &["--set", "parallel.ep=2", "--set", "run.device=cpu"]);
    assert!(fine, "{text}");
    let (fine, text) = plan("2000", &[]);
    assert!(!fine && text.contains("dp 125 does not divide by ep 64"), "{text}");
    let (fine, text) = plan("2048", &["--set", "phase.0.batch=3000"]);
    assert!(!fine && text.contains("phase.0: batch 3000 is not a multiple of micro_batch 1 × dp 128"), "{text}");
    // Fewer sequences than pipes, in a phase that is over.
    let (fine, text) = plan("2048", &["--set", "phase.0.batch=64", "--from-tokens", "25165824000"]);
    assert!(fine && !text.contains("25165824000"), "{text}");
    let (fine, text) = plan("2048", &["--from-tokens", "14800000000000"]);
    assert!(!fine && text.contains("--from-tokens 14800000000000: nothing is to come, the run ends after 14800000000000 tokens"), "{text}");
    let (fine, text) = plan("2048", &["--from-tokens", "14799999999999"]);
    assert!(fine && text.contains("1 steps, "), "{text}");
}

#[test]
fn a_reader_that_has_seen_enough_hears_no_more() {
    let path = root().join("configs/run/v3-671b.toml").display().to_string();
    let mut command = tiefsee(&["plan".into(), "run".into(), path, "--ranks".into(), "2048".into()]);
    let (reader, writer) = std::io::pipe().expect("a pipe");
    command.stdout(writer).stderr(std::process::Stdio::piped());
    let child = command.spawn().expect("it starts");
    drop((reader, command)); // nobody reads any more, and nobody else writes
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.code() == Some(141) && output.stderr.is_empty(), "{} {}", output.status, String::from_utf8_lossy(&output.stderr));
}
