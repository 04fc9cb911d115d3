//! `attention.document_boundaries`: what a token sees begins with its document, on every stage of a pipe.
use crate::support::{Run, gap, random, root, scratch, small, tiefsee};
use kernels::Precision;
use model::mla::Positions;
use model::stage::StageIn;
use model::{MicroBatch, ParamTable, Stage, StepContext, Weights};
use parallel::comm::local::{run_local, solo};
use parallel::dispatch::ExpertGroup;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tch::{Device, Kind, Tensor};
use trainer::coordinator::StopSignal;
use trainer::run::{Start, micro_batches, train};

/// A corpus whose documents are three lines each of the model's sources, some tens of tokens: every sequence has many, whatever
/// the sources are by now. Their paragraphs would not do: one may be longer than a sequence.
fn short_documents() -> PathBuf {
    let (input, out) = (scratch().join("short-documents.jsonl"), scratch().join("short-documents"));
    let mut sources: Vec<PathBuf> = std::fs::read_dir(root().join("model/src")).expect("sources").map(|entry| entry.expect("an entry").path()).collect();
    sources.sort();
    let mut lines = String::new();
    for source in sources.iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs")) {
        let text = std::fs::read_to_string(source).expect("a source");
        for three in text.lines().filter(|line| !line.is_empty()).collect::<Vec<_>>().chunks(3) {
            writeln!(lines, "{}", serde_json::json!({ "text": three.join("\n") })).expect("a line");
        }
    }
    std::fs::write(&input, lines).expect("room");
    let args = ["prepare", &input.display().to_string(), "--out", &out.display().to_string(), "--vocab", "512", "--held-out", "0.2"].map(String::from);
    let output = tiefsee(&args).output().expect("tiefsee starts");
    assert!(output.status.success(), "prepare: {}", String::from_utf8_lossy(&output.stderr));
    out
}

fn losses(name: &str, corpus: &Path, ranks: usize, set: &[&str]) -> Vec<f64> {
    let path = format!("data.mixture.0.path={}", corpus.display());
    let long = [&path, "run.stop_after=6", "phase.0.sequence_length=256", "phase.0.tokens=24576"];
    let run = Run::new(&format!("documents-{name}"), &[set, &long].concat());
    run_local(ranks, |world| train(&run.config(), world, Start::Fresh, &StopSignal::default()).map(|_| ()).expect("the run"));
    run.series("loss")
}

#[test]
fn a_run_within_documents_is_the_same_on_any_stages() {
    let (within, corpus) = ("attention.document_boundaries=true", short_documents());
    let one = losses("one", &corpus, 1, &[within]);
    let three = losses("three", &corpus, 3, &[within, "parallel.pp=3", "parallel.schedule=1f1b"]);
    assert!(gap(&three, &one) < 1e-12, "losses {three:?}, of one rank {one:?}");
    let across = losses("across", &corpus, 1, &[]);
    assert_eq!(across.len(), one.len());
    assert!(one.iter().zip(&across).all(|(a, b)| (a - b).abs() > 1e-6), "documents change nothing: {one:?}, across them {across:?}");
}

#[test]
fn a_sample_s_documents_fill_it() {
    let sample = |starts: &[u32]| data::Sample { tokens: (0..9).collect(), document_starts: starts.to_vec(), source: 0, index: 0 };
    let samples = [sample(&[0, 3, 4]), sample(&[]), sample(&[8])];
    let batch = micro_batches(&samples, 3, Device::Cpu, true).pop().expect("one");
    assert_eq!(*batch.documents.expect("they were asked for"), [vec![3, 1, 5], vec![9], vec![8, 1]]);
    assert!(micro_batches(&samples, 3, Device::Cpu, false)[0].documents.is_none());
}

/// The main loss of two documents in one sequence, whose boundary has no target, is that of the two alone.
#[test]
fn documents_in_one_sequence_are_documents_alone() {
    let config = model::ModelConfig { num_nextn_predict_layers: 0, ..small() };
    let mut table = ParamTable::default();
    let stage = Stage::whole(&mut table, &config);
    let mut w = Weights::initial(Rc::new(table), Precision::F64, 5, Device::Cpu);
    let tokens = (random(1, &[1, 13]) * 1000.0).abs().to_kind(Kind::Int64).remainder(config.vocab_size);
    let mut hidden = |tokens: Tensor, documents: Option<Vec<i64>>| {
        let positions = Positions::new(&config, None, tokens.size()[1], (Kind::Double, Device::Cpu));
        let (main_targets, sequences) = (1, 1);
        let experts = ExpertGroup::flat(solo());
        let step = StepContext { main_targets, mtp_targets: 1, sequences, mtp_weight: 0.0, balance_weight: 0.0, positions, experts };
        let batch = MicroBatch { tokens, documents: documents.map(|lengths| Rc::new(vec![lengths])) };
        let logits = stage.logits(&step, &mut w, &batch).expect("logits");
        assert!(stage.forward(&step, &mut w, &batch, StageIn::Tokens).is_ok());
        logits
    };
    let both = hidden(tokens.shallow_clone(), Some(vec![5, 8]));
    let alone = hidden(tokens.narrow(1, 5, 8), None);
    let across = hidden(tokens, None);
    let apart = |a: &Tensor| crate::support::distance(&a.narrow(0, 5, 7), &alone);
    assert!(apart(&both) < 1e-12 && apart(&across) > 1e-3, "{} and {}", apart(&both), apart(&across));
}
