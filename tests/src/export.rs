//! FP8 exports of a trained checkpoint: our quantiser's numbers, which transformers loads as they are, and which come back as
//! they went.
use crate::oracle::{Subject, oracle, routes_clearly};
use crate::support::{Run, assert_close, random, root, scratch, small, tiefsee};
use kernels::Precision;
use kernels::fp8::{ScaleRule, quantise_blocks};
use model::config::{ModelConfig, Scoring};
use model::hf::pieces;
use model::{MicroBatch, ParamTable};
use parallel::comm::local::{run_local, solo};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use serde_json::Value;
use tch::{Kind, Tensor};
use trainer::RunConfig;
use trainer::checkpoint::hf::{Format, Values, export, export_in_files, import, import_in_files};
use trainer::checkpoint::{Manifest, Retention, list, load, prune, save, verify};
use trainer::coordinator::StopSignal;
use trainer::run::{Start, resolved, train};
use trainer::state::StatePart;

/// The quickstart model's run and its newest checkpoint: that of the folder that EXPORT_RUN names, as scripts/export-test.sh
/// does; else some steps over the tests' own corpus.
fn trained() -> (RunConfig, PathBuf) {
    tch::set_num_threads(1);
    if let Ok(folder) = std::env::var("EXPORT_RUN") {
        let folder = root().join(folder);
        let newest = list(&folder).expect("a list").pop().expect("a checkpoint");
        return (RunConfig::load(&resolved(&folder), &[]).expect("the run's config"), newest.1);
    }
    let text = std::fs::read_to_string(root().join("configs/model/quickstart.toml")).expect("the model's config");
    let model: toml::Table = toml::from_str(&text).expect("TOML");
    let set: Vec<String> = model.iter().map(|(key, value)| format!("model.{key}={value}")).collect();
    let more = ["run.precision=f32", "run.stop_after=30", "validation.every=0", "model.vocab_size=512"];
    let run = Run::new("export", &set.iter().map(String::as_str).chain(more).collect::<Vec<_>>());
    train(&run.config(), solo(), Start::Fresh, &StopSignal::default()).map(|_| ()).expect("the run");
    (run.config(), run.newest_checkpoint())
}

/// Over the held-out split of the run's corpus, as a run that starts from `checkpoint` measures it.
fn held_out_loss(trained: &RunConfig, name: &str, checkpoint: &Path) -> f64 {
    let mut config = trained.clone();
    config.run.dir = scratch().join("runs").join(name);
    (config.run.init_from, config.run.stop_after, config.validation.every) = (Some(checkpoint.to_path_buf()), Some(0), 1);
    let outcome = train(&config, solo(), Start::Fresh, &StopSignal::default()).expect("a run of no step");
    outcome.summary.val_loss_start.expect("a validation before the first step")
}

/// Every matrix that transformers has dequantised, against our quantiser's of the masters. How many there were.
fn compare_matrices(table: &ParamTable, masters: &HashMap<String, Tensor>, theirs: &HashMap<String, Tensor>) -> usize {
    let mut matrices = 0;
    for spec in table.specs() {
        for piece in pieces(spec).iter().filter(|piece| theirs.contains_key(&piece.name)) {
            let whole = &masters[&format!("weight/{}", spec.name)];
            let part = piece.expert.map_or_else(|| whole.shallow_clone(), |expert| whole.select(0, expert));
            let part = piece.rows.map_or_else(|| part.shallow_clone(), |(start, rows)| part.narrow(0, start, rows));
            assert!(theirs[&piece.name].equal(&quantise_blocks(&part, ScaleRule::Amax).dequantise(Kind::Float)), "{}", piece.name);
            matrices += 1;
        }
    }
    matrices
}

#[test]
fn an_fp8_export_is_our_quantiser_and_transformers_loads_it() {
    let (config, newest) = trained();
    let folder = scratch().join("export");
    std::fs::create_dir_all(&folder).expect("a folder");
    let write = |from: &Path, name: &str, format| {
        let out = folder.join(name);
        assert_eq!(export(from, &out, format, Values::Newest).expect("an export").uneven, 0);
        out
    };
    let (fp8, bf16) = (write(&newest, "fp8", Format::Fp8), write(&newest, "bf16", Format::Plain(Kind::BFloat16)));
    // What ends a document ends what the model generates.
    let json = |name: &str| -> Value { serde_json::from_slice(&std::fs::read(fp8.join(name)).expect(name)).expect("JSON") };
    let (about, tokenizer, ends) = (json("tokenizer_config.json"), json("tokenizer.json"), json("config.json")["eos_token_id"].clone());
    let end = tokenizer["added_tokens"].as_array().expect("tokens").iter().find(|token| token["content"] == about["eos_token"]);
    assert_eq!(end.expect("an end token")["id"], ends);
    let imported = import(&fp8, &folder.join("fp8-imported")).expect("an import");
    // What was trained depends on the text, so which tokens route clearly does.
    let asked = (51..59).map(|seed| Subject::new(&config.model, Precision::F32, seed, 30)).map(|subject| (oracle("fp8.py", &fp8, &subject.tokens, &[]), subject));
    let (theirs, mut subject) = asked.into_iter().find(|(theirs, _)| routes_clearly(theirs)).expect("tokens of one of eight seeds route clearly");
    let (_, tensors) = load(&imported, |_| true).expect("a checkpoint");
    let table = subject.weights.table.clone();
    table.ids().for_each(|id| subject.weights.set(id, &tensors[&format!("weight/{}", table.spec(id).name)]));
    let masters = load(&newest, |name| name.starts_with("weight/")).expect("a checkpoint").1;
    // A dense block, three of MoE and MTP's: five of attention each, three a SwiGLU of 8 experts and a shared one.
    assert_eq!(compare_matrices(&table, &masters, &theirs), 5 * 5 + 3 + 3 * (8 + 1) * 4);
    let step = subject.context(0.0, 0.0);
    let logits = subject.stage.logits(&step, &mut subject.weights, &MicroBatch::new(subject.tokens.shallow_clone())).expect("logits");
    let expected = theirs["logits"].view([-1, subject.config.vocab_size]);
    assert_close("logits of the FP8 weights", &logits, &expected, 1e-5);

    let again = write(&imported, "fp8-again", Format::Fp8);
    let bytes = |folder: &Path| std::fs::read(folder.join("model.safetensors")).expect("an export");
    assert!(bytes(&again) == bytes(&fp8), "exported again it is another file");
    let imported_bf16 = import(&bf16, &folder.join("bf16-imported")).expect("an import");
    let (in_fp8, in_bf16) = (held_out_loss(&config, "loss-fp8", &imported), held_out_loss(&config, "loss-bf16", &imported_bf16));
    let distance = crate::support::distance(&logits, &expected);
    println!("{}: held-out loss {in_fp8:.5} in FP8, {in_bf16:.5} in BF16; logits {distance:.1e} from transformers'", newest.display());
    assert!((in_fp8 / in_bf16 - 1.0).abs() < 5e-3 && in_fp8 != in_bf16, "held-out loss {in_fp8} in FP8, {in_bf16} in BF16");
}

/// Each side of a matrix over its blocks' scales, each scale for so many rows and columns.
fn dequantised(values: &Tensor, scales: &Tensor, [rows, columns]: [i64; 2]) -> Tensor {
    let (r, c) = values.size2().expect("a matrix");
    let spread = scales.repeat_interleave_self_int(rows, 0, None).narrow(0, 0, r).repeat_interleave_self_int(columns, 1, None).narrow(1, 0, c);
    values.to_kind(Kind::Float) * spread
}

/// The FP8 matrices of an exported file, by name, as the released layout has them: a scale for each 128 × 128, the last ones
/// for what is left. And how many of them transformers' Fp8Dequantize, which takes all blocks to be equal, refuses or gets wrong.
fn released_matrices(file: &Path) -> (HashMap<String, Tensor>, usize) {
    let bytes = std::fs::read(file).expect("an export");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensor = |name: &str, kind| {
        let view = file.tensor(name).expect(name);
        let shape: Vec<i64> = view.shape().iter().map(|&side| side as i64).collect();
        Tensor::from_data_size(view.data(), &shape, kind)
    };
    let (mut matrices, mut unread) = (HashMap::new(), 0);
    for name in file.names().into_iter().filter(|name| !name.ends_with("_scale_inv")) {
        let Ok(_) = file.tensor(&format!("{name}_scale_inv")) else { continue };
        let (values, scales) = (tensor(name, Kind::Float8e4m3fn), tensor(&format!("{name}_scale_inv"), Kind::Float));
        let ((r, c), (rows, columns)) = (values.size2().expect("a matrix"), scales.size2().expect("a matrix"));
        assert_eq!((rows, columns), ((r + 127) / 128, (c + 127) / 128), "{name}");
        let right = dequantised(&values, &scales, [128, 128]);
        let takes = r % rows == 0 && c % columns == 0;
        unread += usize::from(!takes || !dequantised(&values, &scales, [r / rows, c / columns]).equal(&right));
        matrices.insert(name.to_string(), right);
    }
    (matrices, unread)
}

#[test]
fn fp8_of_matrices_that_are_no_whole_blocks_comes_back_as_it_went() {
    let uneven = ModelConfig { hidden_size: 136, intermediate_size: 129, moe_intermediate_size: 200, ..small() };
    let subject = Subject::new(&uneven, Precision::F32, 61, 8);
    let dir = scratch().join("oracle");
    let plain = import(&subject.export("uneven"), &dir.join("uneven-imported")).expect("an import");
    let out = |name: &str| dir.join(name);
    let first = export(&plain, &out("uneven-fp8"), Format::Fp8, Values::Newest).expect("an export");
    // A SwiGLU's gate and up, packed in one matrix of ours, have blocks of their own each.
    let (released, unread) = released_matrices(&out("uneven-fp8/model.safetensors"));
    let masters = load(&plain, |name| name.starts_with("weight/")).expect("a checkpoint").1;
    assert_eq!(compare_matrices(&subject.weights.table, &masters, &released), released.len());
    assert_eq!(released.len(), 5 * 4 + 3 + 3 * (8 + 1) * 3);
    assert_eq!(first.uneven, unread, "as many are said to be read wrongly as are");
    let back = import(&out("uneven-fp8"), &dir.join("uneven-back")).expect("an import");
    export(&back, &out("uneven-again"), Format::Fp8, Values::Newest).expect("an export");
    let bytes = |name: &str| std::fs::read(out(name).join("model.safetensors")).expect("an export");
    assert!(bytes("uneven-again") == bytes("uneven-fp8"));
    let (_, tensors) = load(&back, |_| true).expect("a checkpoint");
    let name = "model.layers.0.self_attn.o_proj.weight";
    let weight = subject.weights.get(subject.weights.table.find(name).expect("a parameter"));
    assert!(tensors[&format!("weight/{name}")].equal(&quantise_blocks(weight, ScaleRule::Amax).dequantise(Kind::Float)));
}

#[test]
fn a_model_whose_config_transformers_refuses_is_not_exported() {
    let softmax = ModelConfig { scoring_func: Scoring::Softmax, norm_topk_prob: false, num_attention_heads: 5, ..small() };
    let exported = |name: &str, config: ModelConfig| {
        let manifest = Manifest::imported(config, Precision::F32);
        let path = save(&*solo(), &scratch().join(name), manifest, vec![whole("weight/a", &random(1, &[4, 4]))]).expect("a checkpoint");
        export(&path, &scratch().join(format!("{name}-hf")), Format::Fp8, Values::Newest).err().map(|error| format!("{error:#}")).expect("it has no weights")
    };
    let refusal = "model.hidden_size = 24: must be a multiple of num_attention_heads = 5 with softmax scoring";
    let said = exported("five-heads", softmax.clone());
    assert!(said.contains("step-00000000 cannot be exported: ") && said.contains(refusal), "{said}");
    for (name, fits) in [("v3-five-heads", ModelConfig { scoring_func: Scoring::Sigmoid, ..softmax.clone() }), ("four-heads", ModelConfig { num_attention_heads: 4, ..softmax })] {
        let said = exported(name, fits);
        assert!(!said.contains("cannot be exported"), "{said}");
    }
}

#[test]
fn an_import_never_enters_a_run() {
    let subject = Subject::new(&small(), Precision::F32, 62, 8);
    let (exported, dir) = (subject.export("never-enters"), scratch().join("never-enters"));
    let refused = |run_dir: &Path| format!("{:#}", import(&exported, run_dir).expect_err("refused"));
    // A run before its first checkpoint, amid a save; and one that has checkpoints.
    let (begun, partial) = (dir.join("begun"), dir.join("begun/checkpoints/.step-00000007.partial"));
    std::fs::create_dir_all(&partial).expect("a folder");
    std::fs::write(resolved(&begun), "").expect("a config");
    assert!(refused(&begun).contains("begun already holds a run"), "{}", refused(&begun));
    let saved = dir.join("saved");
    std::fs::create_dir_all(saved.join("checkpoints/step-00000007")).expect("a folder");
    assert!(refused(&saved).contains("already holds a run"));
    assert!(partial.exists() && list(&begun).expect("a list").is_empty() && list(&saved).expect("a list").len() == 1);
    // Another's work beside it stays, its own of before goes, and no import takes the place of another.
    let fresh = dir.join("fresh/checkpoints");
    let (other, own) = (fresh.join(".step-00000007.partial"), fresh.join(".step-00000000.partial"));
    [&other, &own].into_iter().for_each(|left| std::fs::create_dir_all(left).expect("a folder"));
    std::fs::write(own.join("left"), "").expect("a file");
    let imported = import(&exported, &dir.join("fresh")).expect("an import");
    assert!(other.exists() && !own.exists() && !imported.join("left").exists());
    assert!(refused(&dir.join("fresh")).contains("a run or an import"));
}

#[test]
fn an_import_leaves_no_tensor_and_no_depth_out() {
    let subject = Subject::new(&small(), Precision::F32, 65, 8);
    let (exported, dir) = (subject.export("all-known"), scratch().join("all-known-imported"));
    let refused = || format!("{:#}", import(&exported, &dir).expect_err("refused"));
    let (extra, name) = (exported.join("extra.safetensors"), "model.layers.0.self_attn.indexer.wk.weight");
    Tensor::write_safetensors(&[(name, &Tensor::zeros([2, 2], (Kind::Float, tch::Device::Cpu)))], &extra).expect("written");
    assert!(refused().contains("holds 1 tensors that the model of its config.json does not have, such as ") && refused().contains(name), "{}", refused());
    std::fs::remove_file(extra).expect("it goes");
    let path = exported.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("a config")).expect("JSON");
    config["num_nextn_predict_layers"] = 2.into();
    std::fs::write(&path, config.to_string()).expect("written");
    assert!(refused().contains("num_nextn_predict_layers = 2: only 0 and 1"), "{}", refused());
}

#[test]
fn an_import_takes_neither_of_two_tensors_of_one_name() {
    let subject = Subject::new(&small(), Precision::F32, 66, 8);
    let (exported, dir, name) = (subject.export("twice-there"), scratch().join("twice-there-imported"), "model.norm.weight");
    Tensor::write_safetensors(&[(name, &Tensor::zeros([24], (Kind::Float, tch::Device::Cpu)))], exported.join("another.safetensors")).expect("written");
    let error = format!("{:#}", import(&exported, &dir).expect_err("refused"));
    let [another, model] = ["another", "model"].map(|file| exported.join(file).with_extension("safetensors").display().to_string());
    assert_eq!(error, format!("{name} is in {another} and in {model}"));
    assert!(!dir.exists());
}

#[test]
fn an_import_in_many_files_holds_what_it_does_in_one() {
    const BYTES: i64 = 10_000;
    let subject = Subject::new(&small(), Precision::F32, 64, 8);
    let (exported, dir) = (subject.export("import-files"), scratch().join("import-files"));
    let one = import(&exported, &dir.join("one")).expect("an import");
    let many = import_in_files(&exported, &dir.join("many"), BYTES as usize).expect("an import");
    let (manifest, files) = (verify(&many).expect("whole"), verify(&one).expect("whole").files);
    let (a, b) = (load(&one, |_| true).expect("the one").1, load(&many, |_| true).expect("the many").1);
    assert!(a.len() == b.len() && a.iter().all(|(name, tensor)| tensor.equal(&b[name])));
    // A layer's experts, of 18432 bytes and half of that, are in several files; no other tensor is, and none is that large.
    assert!(files.len() == 1 && manifest.files.len() >= 10, "{} files", manifest.files.len());
    assert!(manifest.tensors.iter().all(|(name, tensor)| tensor.slices.len() == 1 || name.contains(".experts.")));
    assert!(manifest.tensors["weight/model.layers.1.mlp.experts.gate_up_proj.weight"].slices.len() >= 2);
    let mut bytes: HashMap<&str, i64> = HashMap::new();
    for tensor in manifest.tensors.values() {
        let row = 4 * tensor.shape[1..].iter().product::<i64>();
        tensor.slices.iter().for_each(|slice| *bytes.entry(&slice.file).or_default() += slice.rows * row);
    }
    assert!(bytes.len() == manifest.files.len() && bytes.values().all(|bytes| *bytes <= BYTES), "{bytes:?}");
}

fn whole(name: &str, tensor: &Tensor) -> StatePart {
    StatePart { name: name.to_string(), tensor: tensor.shallow_clone(), start: 0, total: tensor.size()[0] }
}

/// A bit of its last byte.
fn flip(file: &Path) {
    let mut bytes = std::fs::read(file).expect("a shard");
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(file, bytes).expect("a shard");
}

#[test]
fn an_export_reads_each_weight_once_and_checks_the_files_that_it_reads() {
    // Weights in one file, what no export wants in another.
    let checkpoint = run_local(2, |world| {
        let subject = Subject::new(&small(), Precision::F32, 63, 8);
        let table = &subject.weights.table;
        let weights = table.ids().map(|id| whole(&format!("weight/{}", table.spec(id).name), subject.weights.get(id))).collect();
        let parts = if world.rank() == 0 { weights } else { vec![whole("first/other", &random(1, &[64, 8]))] };
        let manifest = Manifest::imported(subject.config.clone(), Precision::F32);
        save(&*world, &scratch().join("reads-once"), manifest, parts).expect("a checkpoint")
    })
    .remove(0);
    let (weights, other) = (checkpoint.join("shard-00000-of-00002.safetensors"), checkpoint.join("shard-00001-of-00002.safetensors"));
    flip(&other);
    assert!(verify(&checkpoint).is_err());
    let config = small();
    // Every parameter in FP32, and once more the two that MTP's part repeats.
    let bytes = 4 * (config.count().main + config.count().mtp + 2 * config.vocab_size * config.hidden_size) as u64;
    let (_, masters) = load_weights(&checkpoint);
    for (name, format) in [("fp8", Format::Fp8), ("bf16", Format::Plain(Kind::BFloat16)), ("f32", Format::Plain(Kind::Float))] {
        let out = scratch().join(format!("reads-once-{name}"));
        assert_eq!(export(&checkpoint, &out, format, Values::Newest).expect("an export").bytes_read, bytes, "{name}");
        let parts = scratch().join(format!("reads-once-{name}-parts"));
        export_in_files(&checkpoint, &parts, format, Values::Newest, 20_000).expect("an export of many files");
        assert!(parts.join("model.safetensors.index.json").exists() && !parts.join("model.safetensors").exists());
        let [one, many] = [&out, &parts].map(|folder| load_weights(&import(folder, &folder.join("back")).expect("an import")).1);
        assert!(one.iter().all(|(name, tensor)| tensor.equal(&many[name])) && one.len() == masters.len(), "{name}");
        assert!(name != "f32" || many.iter().all(|(name, tensor)| tensor.equal(&masters[name])));
    }
    flip(&weights);
    let error = export(&checkpoint, &scratch().join("reads-once-damaged"), Format::Fp8, Values::Newest).err().expect("refused");
    assert!(format!("{error:#}").contains("shard-00000-of-00002.safetensors is not what was written"), "{error:#}");
}

/// Without the hash of what is beside them.
fn load_weights(checkpoint: &Path) -> (Manifest, HashMap<String, Tensor>) {
    let mut reader = trainer::checkpoint::Reader::open(checkpoint).expect("a manifest");
    let manifest = reader.manifest().clone();
    let names = manifest.tensors.keys().filter(|name| name.starts_with("weight/"));
    let tensors = names.map(|name| (name.clone(), reader.whole(name).expect("a tensor"))).collect();
    (manifest, tensors)
}

#[test]
fn show_and_prune_read_no_tensor() {
    let run_dir = scratch().join("looked-at");
    let paths = [1, 2, 3].map(|step| {
        let manifest = Manifest { step, ..Manifest::imported(small(), Precision::F32) };
        save(&*solo(), &run_dir, manifest, vec![whole("weight/a", &random(step, &[64, 8]))]).expect("a checkpoint")
    });
    let shard = |path: &Path| path.join("shard-00000-of-00001.safetensors");
    flip(&shard(&paths[1]));
    let shown = tiefsee(&["checkpoint".into(), "show".into(), paths[1].display().to_string()]).output().expect("tiefsee starts");
    assert!(shown.status.success() && String::from_utf8_lossy(&shown.stdout).contains("weight/a"), "{shown:?}");
    // What lacks a part does not count among the newest.
    let long = std::fs::File::options().write(true).open(shard(&paths[2])).expect("a shard");
    long.set_len(100).expect("a shorter one");
    let pruned = prune(&run_dir, Retention { last: 1, every: 0 }, false).expect("pruned");
    assert_eq!((&pruned.removed, &pruned.kept), (&vec![paths[0].clone()], &vec![paths[1].clone()]));
    assert!(pruned.damaged[0].contains("step-00000003 is damaged") && pruned.damaged[0].contains("has 100 bytes"), "{:?}", pruned.damaged);
    assert!(paths[2].exists() && !paths[0].exists());
}
