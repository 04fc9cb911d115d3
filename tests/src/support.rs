//! What the tests share: tolerances, small configs, random tensors.
use model::operand::RowCounts;
use model::config::{ModelConfig, Scoring};
use tch::{Device, Kind, Tensor};

/// ‖a − b‖ / ‖b‖, with 0/0 = 0.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size(), "shapes differ");
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let (difference, norm) = ((&a - &b).norm().double_value(&[]), b.norm().double_value(&[]));
    if difference == 0.0 { 0.0 } else { difference / norm }
}

#[track_caller]
pub fn assert_close(name: &str, a: &Tensor, b: &Tensor, limit: f64) {
    let distance = distance(a, b);
    assert!(distance < limit, "{name}: {distance:.3e} is not below {limit:.0e}");
}

/// Normal numbers of a seed, without torch's process-wide generator.
pub fn random(seed: u64, shape: &[i64]) -> Tensor {
    let spec = model::params::ParamSpec { name: format!("random {seed}"), shape: shape.to_vec(), init: model::params::Init::Normal { std: 1.0 }, role: model::params::Role::Matrix, start: 0, total: shape[0] };
    spec.initial(seed, Kind::Double, Device::Cpu)
}

/// Rows of each expert, on the CPU.
pub fn row_counts(counts: &[i64]) -> RowCounts {
    let device: Vec<i32> = counts.iter().map(|&count| count as i32).collect();
    RowCounts { host: counts.to_vec(), device: Tensor::from_slice(&device) }
}

/// `count` token ids below `vocab`.
pub fn tokens(seed: u64, shape: &[i64], vocab: i64) -> Tensor {
    (random(seed, shape) * 1000.0).abs().to_kind(Kind::Int64).remainder(vocab)
}

/// The smallest V3-shaped model: every kind of layer, no two widths alike.
pub fn small() -> ModelConfig {
    ModelConfig {
        vocab_size: 61,
        hidden_size: 24,
        intermediate_size: 40,
        moe_intermediate_size: 12,
        num_hidden_layers: 3,
        first_k_dense_replace: 1,
        num_attention_heads: 3,
        n_routed_experts: 8,
        n_shared_experts: 1,
        num_experts_per_tok: 3,
        n_group: 4,
        topk_group: 2,
        scoring_func: Scoring::Sigmoid,
        norm_topk_prob: true,
        routed_scaling_factor: 2.5,
        q_lora_rank: Some(14),
        kv_lora_rank: 10,
        qk_nope_head_dim: 8,
        qk_rope_head_dim: 4,
        v_head_dim: 6,
        rms_norm_eps: 1e-6,
        rope_theta: 10000.0,
        max_position_embeddings: 64,
        rope_scaling: None,
        num_nextn_predict_layers: 1,
        initializer_range: 0.2,
    }
}

/// The tests' runs' model.
pub fn tiny() -> ModelConfig {
    toml::from_str(&std::fs::read_to_string(root().join("configs/model/tiny.toml")).expect("a model")).expect("a model")
}

pub const F64: (Kind, Device) = (Kind::Double, Device::Cpu);

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use kernels::device::{self, Found, Options};
use trainer::RunConfig;

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}

/// The binary this test was built beside.
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let path = test.parent().and_then(Path::parent).expect("target/release/deps").join("tiefsee");
    assert!(path.exists(), "{} is not built; scripts/test.sh builds it first", path.display());
    path
}

pub fn tiefsee(args: &[String]) -> Command {
    let mut command = Command::new(binary());
    command.args(args).env_remove("OMPI_COMM_WORLD_RANK");
    command
}

/// A folder of this test process, removed by the operating system's own rules.
pub fn scratch() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| tempfile::tempdir().expect("a temporary folder")).path()
}

/// A corpus of this project's own sources with 512 tokens, made once.
pub fn corpus() -> &'static Path {
    static CORPUS: OnceLock<PathBuf> = OnceLock::new();
    CORPUS.get_or_init(|| {
        let out = scratch().join("corpus");
        let mut args: Vec<String> = ["prepare".to_string()].into();
        args.extend(["data", "kernels", "model", "trainer", "configs"].map(|folder| root().join(folder).display().to_string()));
        args.extend(["--out", &out.display().to_string(), "--vocab", "512", "--held-out", "0.2", "--extensions", "rs,toml"].map(String::from));
        let output = tiefsee(&args).output().expect("tiefsee starts");
        assert!(output.status.success(), "prepare: {}", String::from_utf8_lossy(&output.stderr));
        out
    })
}

/// mpirun's settings for several ranks on a small machine, as scripts/env.sh has them.
pub fn mpirun(ranks: usize, args: &[String], expected: i32) -> String {
    let output = Command::new("timeout")
        .args(["120", "mpirun", "--oversubscribe", "-n", &ranks.to_string()])
        .arg(binary())
        .args(args)
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"), ("OMPI_MCA_mpi_yield_when_idle", "1"), ("OMPI_MCA_hwloc_base_binding_policy", "none")])
        .envs([("OMPI_MCA_btl_tcp_if_include", "lo"), ("OMPI_MCA_oob_tcp_if_include", "lo")])
        .output()
        .expect("mpirun starts");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(expected), "mpirun -n {ranks} {args:?}: {text}");
    text
}

/// A run of configs/run/tiny.toml in a folder of its own.
pub struct Run {
    dir: PathBuf,
    set: Vec<String>,
}

impl Run {
    pub fn new(name: &str, set: &[&str]) -> Run {
        tch::set_num_threads(1); // as the run's config has it for processes
        let dir = scratch().join("runs").join(name);
        let mut all = vec![format!("run.dir={}", dir.display()), format!("data.mixture.0.path={}", corpus().display())];
        all.extend(set.iter().map(|s| s.to_string()));
        Run { dir, set: all }
    }
    /// One more `--set`.
    pub fn add(&mut self, set: &str) {
        self.set.push(set.to_string());
    }
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    pub fn config(&self) -> RunConfig {
        RunConfig::load(&root().join("configs/run/tiny.toml"), &self.set).expect("a valid config")
    }
    pub fn train_args(&self) -> Vec<String> {
        let mut args = vec!["train".to_string(), "--config".to_string(), root().join("configs/run/tiny.toml").display().to_string()];
        args.extend(self.set.iter().flat_map(|set| ["--set".to_string(), set.clone()]));
        args
    }
    /// Rank 0's step lines.
    pub fn lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.dir.join("log/rank-0.jsonl")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).filter(|line| line.get("loss").is_some()).collect()
    }
    pub fn series(&self, key: &str) -> Vec<f64> {
        self.lines().iter().map(|line| line[key].as_f64().unwrap_or_else(|| panic!("{key} in {line}"))).collect()
    }
    pub fn samples(&self) -> Vec<(Value, Value)> {
        self.lines().iter().map(|line| (line["order"].clone(), line["samples"].clone())).collect()
    }
    pub fn newest_checkpoint(&self) -> PathBuf {
        trainer::checkpoint::list(&self.dir).expect("a list").pop().expect("a checkpoint").1
    }
    pub fn manifest(&self) -> Value {
        let text = std::fs::read(self.newest_checkpoint().join("manifest.json")).expect("a manifest");
        serde_json::from_slice(&text).expect("JSON")
    }
    /// Every tensor of the newest checkpoint.
    pub fn state(&self) -> BTreeMap<String, Tensor> {
        trainer::checkpoint::load(&self.newest_checkpoint(), |_| true).expect("a checkpoint").1.into_iter().collect()
    }
    pub fn wait_for(&self, ready: impl Fn() -> bool) {
        let start = Instant::now();
        while !ready() {
            assert!(start.elapsed() < Duration::from_secs(60), "waited a minute for the run in {}", self.dir.display());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    pub fn wait_for_step(&self, step: usize) {
        self.wait_for(|| self.lines().len() >= step);
    }
    #[track_caller]
    pub fn assert_same(&self, other: &Run, limit: f64) {
        assert!(!self.samples().is_empty(), "a run with steps");
        assert_eq!(self.samples(), other.samples());
        for key in ["loss", "mtp_loss", "balance_loss", "grad_norm"] {
            let (a, b) = (self.series(key), other.series(key));
            assert_eq!(a.len(), b.len());
            for (step, (a, b)) in a.iter().zip(&b).enumerate() {
                assert!((a - b).abs() <= limit * b.abs(), "{key} of step {}: {a} and {b}", step + 1);
            }
        }
    }
}

/// Widths of the tiny model, and a length, for which BF16 attention goes through cuDNN, and FP8 through our kernels.
pub const WIDE: [&str; 8] = [
    "model.kv_lora_rank=16",
    "model.intermediate_size=128",
    "model.moe_intermediate_size=128",
    "model.qk_nope_head_dim=16",
    "model.qk_rope_head_dim=16",
    "model.v_head_dim=32",
    "phase.0.sequence_length=64",
    "phase.1.sequence_length=64",
];

/// None: no GPU here, and the test has said so.
pub fn gpu(test: &str) -> Option<()> {
    let options = Options { local_rank: 0, torch_cuda: None, nvrtc_folder: None, kernel_cache: scratch().join("runs/.kernels"), spared_sms: 0 };
    match device::open(&options).expect("a GPU that is there must be usable") {
        Found::Gpu(_) => Some(()),
        Found::Cpu(why) => {
            println!("SKIPPED {test}: {why}");
            None
        }
    }
}

/// tiefsee, to its end; what it said.
pub fn start(args: &[String], expected: i32) -> String {
    let output = tiefsee(args).output().expect("tiefsee starts");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(expected), "{args:?}: {text}");
    text
}

/// Largest |a − b| / |b|.
pub fn gap(a: &[f64], b: &[f64]) -> f64 {
    assert!(a.len() == b.len() && !a.is_empty() && a.iter().chain(b).all(|loss| loss.is_finite()), "{a:?} and {b:?}");
    a.iter().zip(b).map(|(a, b)| ((a - b) / b).abs()).fold(0.0, f64::max)
}

/// The largest of the losses and the largest of the gradient norms; panics past `limit`, and past ten times that: AdamW hides
/// gradients of a wrong scale from the losses, not from their norms, and norms round further apart.
pub fn within(limit: f64, run: &Run, one: &Run, what: &str) -> (f64, f64) {
    let [loss, norm] = ["loss", "grad_norm"].map(|series| gap(&run.series(series), &one.series(series)));
    assert!(loss < limit && norm < 10.0 * limit, "{what}: losses {loss:e}, gradient norms {norm:e} apart");
    (loss, norm)
}
