//! Sharded optimizer state and averages: whoever owns which rows, the update is one rank's; a checkpoint is read by the rows.
use crate::support::{Run, distance, scratch, tiefsee, tokens};
use model::MicroBatch;
use parallel::comm::Comm;
use parallel::comm::local::{run_local, solo};
use parallel::mesh::{Groups, Mesh};
use std::collections::BTreeMap;
use std::path::Path;
use tch::Tensor;
use trainer::checkpoint::{self, Manifest, Reader};
use trainer::coordinator::StopSignal;
use trainer::optimizer::Optimizer;
use trainer::phase::Plan;
use trainer::run::{Start, train};
use trainer::step::Trainer;
use trainer::zero::Zero;

/// Sequences of the global batch.
const BATCH: usize = 8;

fn settings(dp: usize, ep: usize) -> Run {
    let (dp, ep) = (format!("parallel.dp={dp}"), format!("parallel.ep={ep}"));
    Run::new("zero", &[&dp, &ep, "phase.0.batch=8", "phase.1.micro_batch=1", "ema.decay=0.5", "model.vocab_size=700"])
}

fn trainer(run: &Run, world: Comm) -> (Trainer, Mesh) {
    let config = run.config();
    let mesh = config.mesh(&vec![0; world.size()]).expect("a layout");
    (Trainer::new(&config, &mesh, world).expect("a trainer"), mesh)
}

/// Shards anew, into small buckets, over `holders`.
fn reshard(trainer: &mut Trainer, run: &Run, holders: &Groups, bucket_bytes: usize) {
    let config = run.config();
    trainer.zero = Zero::new(holders, &trainer.weights, bucket_bytes).expect("alike on all ranks");
    trainer.optimizer = Optimizer::new(&config.optimizer, &trainer.weights, trainer.zero.shards(), config.run.seed);
    trainer.ema = Some(trainer::ema::Ema::new(config.ema.decay, &trainer.optimizer.slots).expect("averages"));
}

fn steps(trainer: &mut Trainer, mesh: &Mesh, run: &Run, count: u64) {
    let config = run.config();
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let moment = plan.at(1500).expect("inside the first phase");
    let (place, each) = (mesh.place(trainer.groups.world.rank()), BATCH / mesh.dp);
    for step in 0..count {
        let all = tokens(step + 1, &[BATCH as i64, moment.phase.sequence_length as i64 + 1], config.model.vocab_size);
        let mine = all.narrow(0, (place.dp * each) as i64, each as i64);
        let batch: Vec<MicroBatch> = mine.split(1, 0).into_iter().map(MicroBatch::new).collect();
        assert!(trainer.step(&moment, &batch, false).expect("a step").applied());
    }
    trainer.weights.ready(|_| true).expect("gathered weights land");
}

/// Of every rank: its parts of the state, and all weights it computes with.
type State = (Vec<(String, i64, i64, Tensor)>, Vec<(String, i64, i64, Tensor)>);

fn state(trainer: &mut Trainer) -> State {
    let parts = trainer.state().into_iter().map(|part| (part.name, part.start, part.total, part.tensor.copy())).collect();
    let table = &trainer.weights.table;
    let weight = |id| {
        let spec = table.spec(id);
        (format!("weight/{}", spec.name), spec.start, spec.total, trainer.weights.get(id).copy())
    };
    (parts, table.ids().map(weight).collect())
}

fn whole(parts: impl Iterator<Item = (String, i64, i64, Tensor)>) -> BTreeMap<String, Tensor> {
    let mut found: BTreeMap<String, (Tensor, i64)> = BTreeMap::new();
    for (name, start, total, part) in parts {
        let mut shape = part.size();
        shape[0] = total;
        let (whole, rows) = found.entry(name).or_insert_with(|| (Tensor::full(shape, f64::NAN, (part.kind(), part.device())), 0));
        whole.narrow(0, start, part.size()[0]).copy_(&part);
        *rows += part.size()[0];
    }
    let complete = |(name, (whole, rows)): (String, (Tensor, i64))| {
        assert_eq!(rows, whole.size()[0], "{name}: rows that some rank wrote");
        (name, whole)
    };
    found.into_iter().map(complete).collect()
}

/// Three steps; the whole state, and the largest distance of a rank's weights from it.
fn three_steps(dp: usize, ep: usize, bytes: usize, holders: impl Fn(Groups) -> Groups + Sync) -> (BTreeMap<String, Tensor>, f64) {
    let run = settings(dp, ep);
    let ranks = run_local(dp, |world| {
        let (mut trainer, mesh) = trainer(&run, world.clone());
        let groups = holders(Groups::new(world, &mesh, true).expect("groups"));
        reshard(&mut trainer, &run, &groups, bytes);
        steps(&mut trainer, &mesh, &run, 3);
        state(&mut trainer)
    });
    let (parts, weights): (Vec<_>, Vec<_>) = ranks.into_iter().unzip();
    // A mutated group makes several owners of a row: the last one counts.
    let mut seen = std::collections::BTreeSet::new();
    let parts = parts.into_iter().flatten().filter(|(name, start, ..)| seen.insert((name.clone(), *start)));
    let state = whole(parts);
    let apart = |(name, start, _, weight): &(String, i64, i64, Tensor)| distance(weight, &state[name].narrow(0, *start, weight.size()[0]));
    let apart = weights.iter().flatten().map(apart).fold(0.0, f64::max);
    (state, apart)
}

fn furthest(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) -> (f64, String) {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    a.iter().map(|(name, tensor)| (distance(tensor, &b[name]), name.clone())).max_by(|x, y| x.0.total_cmp(&y.0)).expect("parameters")
}

#[test]
fn however_the_rows_are_shared_out_the_update_is_one_ranks() {
    let (one, apart) = three_steps(1, 1, 1 << 20, |groups| groups);
    assert_eq!(apart, 0.0);
    assert!(one.keys().any(|name| name.starts_with("ema/model.embed")) && one.keys().any(|name| name.ends_with("e_score_correction_bias")));
    for (dp, ep) in [(2, 1), (4, 1), (2, 2), (4, 2), (8, 2)] {
        for bytes in [1 << 10, 64 << 10, 32 << 20] {
            let (several, apart) = three_steps(dp, ep, bytes, |groups| groups);
            assert_eq!(apart, 0.0, "dp {dp}, ep {ep}: a rank computes with other weights than their owner's");
            let (distance, name) = furthest(&several, &one);
            assert!(distance < 1e-12, "dp {dp}, ep {ep}, buckets of {bytes}: {name} is {distance:.1e} from one rank's");
        }
    }
}

#[test]
fn a_reduction_left_out_shows() {
    let (one, _) = three_steps(1, 1, 1 << 20, |groups| groups);
    let left_out: [fn(Groups) -> Groups; 3] = [
        |groups| Groups { data: solo(), ..groups },
        |groups| Groups { embedding: solo(), ..groups },
        |groups| Groups { expert_data: solo(), ..groups },
    ];
    for holders in left_out {
        let (several, apart) = three_steps(2, 1, 64 << 10, holders);
        assert!(furthest(&several, &one).0 > 1e-6 && apart > 1e-6);
    }
}

#[test]
fn a_rank_reads_the_rows_it_needs_and_no_more() {
    let dir = scratch().join("zero-partial");
    let writers = settings(8, 2);
    let config = writers.config();
    let written = run_local(8, |world| {
        let (mut trainer, mesh) = trainer(&writers, world.clone());
        steps(&mut trainer, &mesh, &writers, 2);
        let head = Manifest { updates: trainer.optimizer.updates, ..Manifest::imported(config.model.clone(), config.run.precision) };
        checkpoint::save(&*world, &dir, head, trainer.state()).expect("a checkpoint");
        state(&mut trainer).0
    });
    let written = whole(written.into_iter().flatten());
    let path = checkpoint::list(&dir).expect("a list").pop().expect("a checkpoint").1;
    checkpoint::verify(&path).expect("it is whole");
    let headers: u64 = shards(&path).iter().map(|bytes| 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight"))).sum();
    for (dp, ep) in [(1, 1), (4, 4), (2, 1)] {
        let readers = settings(dp, ep);
        let read = run_local(dp, |world| {
            let (mut trainer, _) = trainer(&readers, world);
            let mut reader = Reader::open(&path).expect("a reader");
            trainer.load_all(&mut reader).expect("it loads");
            let numel = |shape: &[i64]| shape.iter().product::<i64>() as u64;
            let untrained: u64 = trainer.weights.table.specs().iter().filter(|spec| !spec.trained()).map(|spec| numel(&spec.shape)).sum();
            let owned: u64 = trainer.optimizer.slots.iter().map(|slot| numel(&slot.master.size())).sum();
            // What has no master; master, two moments and an average of what it owns; all in f64.
            let needed = 8 * (untrained + 4 * owned);
            assert!(
                reader.bytes_read() > needed && reader.bytes_read() <= needed + headers,
                "{} bytes read, {needed} needed, {headers} of headers",
                reader.bytes_read()
            );
            trainer.seal().expect("the others' rows");
            trainer.weights.ready(|_| true).expect("they land");
            state(&mut trainer)
        });
        let (parts, weights): (Vec<_>, Vec<_>) = read.into_iter().unzip();
        for (name, start, _, weight) in weights.iter().flatten() {
            assert!(weight.equal(&written[name].narrow(0, *start, weight.size()[0])), "dp {dp}, ep {ep}: {name} is not what was written");
        }
        let read = whole(parts.into_iter().flatten());
        assert_eq!(furthest(&read, &written).0, 0.0, "dp {dp}, ep {ep} read another state than was written");
    }
}

fn shards(checkpoint: &Path) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(checkpoint).expect("a folder").map(|entry| entry.expect("an entry").path());
    entries
        .filter(|path| path.extension().is_some_and(|ending| ending == "safetensors"))
        .map(|path| std::fs::read(path).expect("a shard"))
        .collect()
}

#[test]
fn averages_equal_their_recomputation_over_changes_of_layout() {
    let run = Run::new("ema", &["ema.decay=0.9", "checkpoint.every=1", "checkpoint.keep_last=100", "validation.every=0"]);
    let config = run.config();
    for (ranks, pp, ep, start, stop) in
        [(2, 1, 1, Start::Fresh, 3), (4, 1, 2, Start::Resume, 6), (2, 2, 1, Start::Resume, 8), (1, 1, 1, Start::Resume, 9)]
    {
        let mut config = config.clone();
        (config.parallel.pp, config.parallel.ep, config.run.stop_after) = (pp, ep, Some(stop));
        run_local(ranks, |world| train(&config, world, start, &StopSignal::default()).map(|_| ()).expect("the run"));
    }
    let (first, _) = trainer(&run, solo());
    let table = first.weights.table.clone();
    let mut averages: BTreeMap<String, Tensor> =
        table.ids().filter(|&id| table.spec(id).trained()).map(|id| (table.spec(id).name.clone(), first.weights.get(id).copy())).collect();
    let all = checkpoint::list(run.dir()).expect("a list");
    assert_eq!(all.len(), 9);
    for (step, path) in &all {
        let (_, found) = checkpoint::load(path, |_| true).expect("a checkpoint");
        for (name, average) in &mut averages {
            *average = &*average * 0.9 + &found[&format!("weight/{name}")] * 0.1;
            let distance = distance(&found[&format!("ema/{name}")], average);
            assert!(distance < 1e-14, "step {step}: the average of {name} is {distance:.1e} off");
        }
        assert_eq!(found.keys().filter(|name| name.starts_with("ema/")).count(), averages.len());
    }
    exports_averages(&run, &all[8].1, &averages);
}

fn exports_averages(run: &Run, checkpoint: &Path, averages: &BTreeMap<String, Tensor>) {
    let out = scratch().join("ema-exported");
    let words = ["checkpoint", "export-hf", &checkpoint.display().to_string(), &out.display().to_string(), "--dtype", "f64", "--ema"]
        .map(String::from);
    let output = tiefsee(&words).output().expect("tiefsee starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let exported: BTreeMap<String, Tensor> =
        Tensor::read_safetensors(out.join("model.safetensors")).expect("an export").into_iter().collect();
    for name in ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"] {
        assert!(distance(&exported[name], &averages[name]) < 1e-14, "{name}");
    }
    let newest = &run.state()["weight/lm_head.weight"];
    assert!(distance(&exported["lm_head.weight"], newest) > 1e-4, "the average is not the newest");
}

#[test]
fn an_export_of_averages_that_were_not_kept_is_refused() {
    let run = Run::new("ema-none", &["run.stop_after=1"]);
    train(&run.config(), solo(), Start::Fresh, &StopSignal::default()).map(|_| ()).expect("the run");
    let refused = checkpoint::hf::export(
        &run.newest_checkpoint(),
        &scratch().join("ema-refused"),
        checkpoint::hf::Format::Plain(tch::Kind::Double),
        checkpoint::hf::Values::Averaged,
    );
    assert!(refused.err().expect("no averages").to_string().contains("no [ema] decay"));
    let wrong = Run::new("ema-wrong", &["ema.decay=1.0"]);
    let output = tiefsee(&wrong.train_args()).output().expect("tiefsee starts");
    assert!(String::from_utf8_lossy(&output.stderr).contains("ema.decay = 1"), "{}", String::from_utf8_lossy(&output.stderr));
}
