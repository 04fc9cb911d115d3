//! FP8 exports of a trained checkpoint: our quantiser's numbers, which transformers loads as they are, and which come back as
//! they went.
use crate::oracle::{Subject, oracle, routes_clearly};
use crate::support::{Run, assert_close, root, scratch, small};
use kernels::Precision;
use kernels::fp8::{ScaleRule, quantise_blocks};
use model::config::ModelConfig;
use model::hf::pieces;
use model::{MicroBatch, ParamTable};
use parallel::comm::local::solo;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};
use trainer::RunConfig;
use trainer::checkpoint::hf::{Format, Values, export, import};
use trainer::checkpoint::{list, load};
use trainer::coordinator::StopSignal;
use trainer::run::{Start, resolved, train};

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

#[test]
fn fp8_of_matrices_that_are_no_whole_blocks_comes_back_as_it_went() {
    let subject = Subject::new(&ModelConfig { hidden_size: 136, moe_intermediate_size: 200, ..small() }, Precision::F32, 61, 8);
    let dir = scratch().join("oracle");
    let plain = import(&subject.export("uneven"), &dir.join("uneven-imported")).expect("an import");
    let out = |name: &str| dir.join(name);
    let first = export(&plain, &out("uneven-fp8"), Format::Fp8, Values::Newest).expect("an export");
    assert!(first.uneven > 0, "200 rows are no whole blocks");
    let back = import(&out("uneven-fp8"), &dir.join("uneven-back")).expect("an import");
    export(&back, &out("uneven-again"), Format::Fp8, Values::Newest).expect("an export");
    let bytes = |name: &str| std::fs::read(out(name).join("model.safetensors")).expect("an export");
    assert!(bytes("uneven-again") == bytes("uneven-fp8"));
    let (_, tensors) = load(&back, |_| true).expect("a checkpoint");
    let name = "model.layers.0.self_attn.o_proj.weight";
    let weight = subject.weights.get(subject.weights.table.find(name).expect("a parameter"));
    assert!(tensors[&format!("weight/{name}")].equal(&quantise_blocks(weight, ScaleRule::Amax).dequantise(Kind::Float)));
}
