//! The config of one run: TOML in, defaults filled, every value checked against the others and the world, and
//! written back as `resolved.toml`, from which `resume` needs nothing else.
use crate::checkpoint::second_tier::SecondTierSection;
use crate::checks::ChecksSection;
use crate::ema::EmaSection;
use crate::faults::{FaultKind, FaultsSection};
use crate::guard::GuardSection;
use crate::phase::{Phase, Plan};
use crate::sentinel::SentinelSection;
use anyhow::{Context, Result, bail, ensure};
use data::Source;
use kernels::Precision;
use model::{ModelConfig, Recompute};
use parallel::mesh::{Mesh, ParallelConfig};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use toml::Value;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    pub run: RunSection,
    pub data: DataSection,
    #[serde(default)]
    pub parallel: ParallelConfig,
    #[serde(default)]
    pub recompute: Recompute,
    #[serde(default)]
    pub attention: AttentionSection,
    #[serde(default)]
    pub optimizer: OptimizerSection,
    #[serde(default)]
    pub ema: EmaSection,
    #[serde(default)]
    pub checkpoint: CheckpointSection,
    #[serde(default)]
    pub validation: ValidationSection,
    #[serde(default)]
    pub guard: GuardSection,
    #[serde(default)]
    pub checks: ChecksSection,
    #[serde(default)]
    pub sentinel: SentinelSection,
    #[serde(default)]
    pub faults: FaultsSection,
    /// In order; each lasts `tokens` tokens.
    pub phase: Vec<Phase>,
    /// A path to a file of model keys, relative to this file, or the keys themselves.
    pub model: ModelConfig,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSection {
    /// The run directory; must not hold a run yet.
    pub dir: PathBuf,
    #[serde(default = "seed")]
    pub seed: u64,
    pub precision: Precision,
    #[serde(default)]
    pub device: DeviceChoice,
    /// Threads a rank; 0 shares the machine's cores among its ranks.
    #[serde(default)]
    pub threads: usize,
    /// Checkpoint and stop once so many steps are done; absent: run to the end of the phases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_after: Option<u64>,
    /// A checkpoint whose weights the run starts from; absent: the seed's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_from: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceChoice {
    #[default]
    Cpu,
    /// A GPU for each rank; ranks share them where they are more.
    Cuda,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AttentionSection {
    /// A token sees only its own document's; else all before it in the sequence, as V3 was trained.
    pub document_boundaries: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// The corpora and their shares; a phase may name another mixture.
    pub mixture: Vec<Source>,
    /// Seconds for which a store that fails is asked again, before the run ends; not longer than the launcher's --hang-floor.
    #[serde(default = "patience")]
    pub patience: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerSection {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub max_grad_norm: f64,
    pub moments: Moments,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Moments {
    /// The masters' kind.
    F32,
    Bf16,
}

impl Default for OptimizerSection {
    fn default() -> Self {
        OptimizerSection { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, max_grad_norm: 1.0, moments: Moments::F32 }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSection {
    /// Steps between checkpoints; 0: only at the end and on a stop.
    pub every: u64,
    /// The newest so many stay.
    pub keep_last: usize,
    /// And those of steps that are multiples of this; 0: none besides.
    pub keep_every: u64,
    /// Copies on the nodes themselves, more often than checkpoints.
    pub second_tier: SecondTierSection,
}

impl Default for CheckpointSection {
    fn default() -> Self {
        CheckpointSection { every: 1000, keep_last: 3, keep_every: 0, second_tier: SecondTierSection::default() }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ValidationSection {
    /// Steps between validations; 0: none.
    pub every: u64,
    /// Held-out sequences each.
    pub sequences: u64,
}

impl Default for ValidationSection {
    fn default() -> Self {
        ValidationSection { every: 0, sequences: 64 }
    }
}

fn seed() -> u64 {
    1
}
fn patience() -> u64 {
    data::PATIENCE.as_secs()
}

/// More would be a slip: a run that waits is a run that nobody looks after.
const MOST_PATIENCE: u64 = 24 * 3600;
/// Two keys, of which one may be a slip for the other.
const ALIKE: f64 = 0.75;

impl RunConfig {
    /// Reads `path`, applies `section.key=value` overrides (TOML values; bare words are strings) and checks it.
    pub fn load(path: &Path, overrides: &[String]) -> Result<RunConfig> {
        let mut value = read_toml(path)?;
        ensure!(value.get("run").is_some() || value.get("hidden_size").is_none(), "{} is a model's file, not a run's", path.display());
        // `--set model=FILE` is another file, named from where the command is given; other overrides are of what it holds.
        let (files, overrides): (Vec<&String>, Vec<&String>) = overrides.iter().partition(|text| text.starts_with("model="));
        files.iter().try_for_each(|text| set(&mut value, text))?;
        let beside = if files.is_empty() { path.parent().unwrap_or(Path::new("")) } else { Path::new("") };
        if let Some(Value::String(name)) = value.get("model") {
            let model_path = beside.join(name);
            let model = read_toml(&model_path).with_context(|| format!("model = \"{name}\" of {}", path.display()))?;
            // Its own errors should name its own file.
            parse::<ModelConfig>(model.clone(), &model_path)?;
            value.as_table_mut().expect("a TOML file is a table").insert("model".into(), model);
        }
        for text in overrides {
            set(&mut value, text)?;
        }
        // Files of older versions have it: now every run gives the same bits, on a GPU too. As a field it would be offered.
        value.get_mut("run").and_then(Value::as_table_mut).map(|run| run.remove("deterministic"));
        let mut config: RunConfig = parse(value, path)?;
        config.name_corpora_wholly()?;
        config.validate().with_context(|| path.display().to_string())?;
        Ok(config)
    }

    /// A source is the same however its path is spelled: phases are compared by them, and a resume may be given elsewhere.
    fn name_corpora_wholly(&mut self) -> Result<()> {
        let mixtures = std::iter::once(&mut self.data.mixture).chain(self.phase.iter_mut().filter_map(|phase| phase.mixture.as_mut()));
        for source in mixtures.flatten().filter(|source| !data::is_url(&source.path)) {
            source.path = std::path::absolute(&source.path).with_context(|| format!("data.mixture: path = {:?}", source.path))?;
        }
        Ok(())
    }

    /// What needs no world to be checked.
    pub fn validate(&self) -> Result<()> {
        finite(&Value::try_from(self)?, "")?;
        self.model.validate()?;
        if self.run.precision == Precision::Fp8 {
            self.model.validate_fp8()?;
        }
        ensure!(!self.phase.is_empty(), "[[phase]]: a run needs at least one");
        ensure!(!self.data.mixture.is_empty(), "data.mixture: a run needs at least one source");
        check_weights(&self.data.mixture, "data.mixture")?;
        let patience = self.data.patience;
        ensure!((1..=MOST_PATIENCE).contains(&patience), "data.patience = {patience}: must be from 1 to {MOST_PATIENCE} s");
        for (key, folder) in [("run.dir", &self.run.dir), ("checkpoint.second_tier.dir", &self.checkpoint.second_tier.dir)] {
            ensure!(!folder.as_os_str().is_empty(), "{key} = \"\": must name a folder");
        }
        let threads = self.run.threads;
        ensure!(threads <= data::MOST_THREADS, "run.threads = {threads}: must be from 0 to {}", data::MOST_THREADS);
        for (key, path) in [("dir", Some(&self.run.dir)), ("init_from", self.run.init_from.as_ref())] {
            if let Some(url) = path.filter(|path| data::is_url(path)) {
                bail!("run.{key} = {url:?}: is a URL, and checkpoints are written to and read from file systems only");
            }
        }
        for (index, phase) in self.phase.iter().enumerate() {
            phase.validate(&self.model).with_context(|| format!("phase.{index}"))?;
        }
        if let Some((index, phase)) = Plan::new(&self.phase, &self.data.mixture).without_a_step() {
            bail!("phase.{index}.tokens = {}: no step: the last one before it goes beyond its end", phase.tokens);
        }
        let optimizer = &self.optimizer;
        for (key, value) in [("beta1", optimizer.beta1), ("beta2", optimizer.beta2)] {
            ensure!((0.0..1.0).contains(&value), "optimizer.{key} = {value}: must be at least 0 and below 1");
            ensure!(
                optimizer.moments == Moments::F32 || value <= MOST_BETA_IN_BF16,
                "optimizer.{key} = {value}: at most {MOST_BETA_IN_BF16} with optimizer.moments = \"bf16\", whose last place is too coarse to follow slower changes"
            );
        }
        for (key, value) in [("eps", optimizer.eps), ("max_grad_norm", optimizer.max_grad_norm)] {
            ensure!(value > 0.0, "optimizer.{key} = {value}: must be positive");
        }
        ensure!(optimizer.weight_decay >= 0.0, "optimizer.weight_decay = {}: must not be negative", optimizer.weight_decay);
        self.ema.validate()?;
        self.sentinel.validate(self.run.precision)?;
        self.faults.validate()?;
        ensure!(self.checks.recompute_every > 0 || !self.faults.has(FaultKind::FlipActivation), "faults: a flip-activation needs checks.recompute_every");
        for (key, value) in [("loss_spike", self.guard.loss_spike), ("norm_spike", self.guard.norm_spike)] {
            ensure!(value == 0.0 || value > 1.0, "guard.{key} = {value}: must be 0 (off) or above 1 median");
        }
        ensure!(self.guard.gradient_limit >= 0.0, "guard.gradient_limit = {}: must be 0 (off) or positive", self.guard.gradient_limit);
        ensure!(self.guard.window >= 1, "guard.window = 0: a median needs a step");
        ensure!(self.guard.max_skipped >= 1, "guard.max_skipped = 0: must be at least 1");
        ensure!(self.validation.sequences >= 1, "validation.sequences = 0: validation.every = 0 turns validation off");
        ensure!(self.checkpoint.keep_last >= 1, "checkpoint.keep_last = 0: the newest checkpoint is always kept");
        Ok(())
    }

    /// What a run that begins is held to beside: one that has begun goes on.
    pub fn begins(self) -> Result<Self> {
        self.model.validate_export()?; // as long as it can be another
        // Made where it is not there: nobody is to find a folder named ~.
        let is_shells = |part: &std::ffi::OsStr| part == "~" || part.as_encoded_bytes().starts_with(b"$");
        ensure!(!self.run.dir.iter().any(is_shells), "run.dir = {:?}: ~ and $ are for a shell to replace, and none has", self.run.dir);
        let CheckpointSection { every, keep_every, .. } = self.checkpoint;
        ensure!(
            keep_every == 0 || every > 0 && keep_every.is_multiple_of(every),
            "checkpoint.keep_every = {keep_every}: must be a multiple of checkpoint.every = {every}, of whose checkpoints it keeps some"
        );
        for (index, phase) in self.phase.iter().enumerate() {
            phase.check_uses(&self.model).with_context(|| format!("phase.{index}"))?;
        }
        Ok(self)
    }

    /// The layout over ranks on these nodes, for a run from its first step. Errors carry all the numbers.
    pub fn mesh(&self, nodes: &[usize]) -> Result<Mesh> {
        let mesh = self.layout(nodes)?;
        self.check_batches(&mesh, 0)?;
        Ok(mesh)
    }

    /// Whatever the batches are: `check_batches` says whether those still to come fit it.
    pub fn layout(&self, nodes: &[usize]) -> Result<Mesh> {
        let mesh = self.parallel.validate(nodes)?;
        crate::pipeline::parts(&self.model, mesh.pp, &self.parallel.layers)?;
        let experts = self.model.n_routed_experts;
        ensure!(experts % mesh.ep as i64 == 0, "parallel.ep = {}: must divide model.n_routed_experts = {experts}", mesh.ep);
        self.check_parameters(&mesh)?;
        Ok(mesh)
    }

    fn check_parameters(&self, mesh: &Mesh) -> Result<()> {
        if self.run.device == DeviceChoice::Cpu {
            return Ok(());
        }
        let (model, ep) = (&self.model, mesh.ep as i64);
        let experts = model.n_routed_experts / ep;
        ensure!(experts <= MOST_EXPERTS, "parallel.ep = {ep}: a rank would have {experts} experts of a layer, on a GPU at most {MOST_EXPERTS}");
        for (what, sides) in [
            (format!("parallel.ep = {ep}: a rank's experts of a layer"), [experts, 2 * model.moe_intermediate_size, model.hidden_size]),
            (format!("model.vocab_size = {}: the embedding", model.vocab_size), [1, model.vocab_size, model.hidden_size]),
            (format!("model.intermediate_size = {}: a dense layer", model.intermediate_size), [1, 2 * model.intermediate_size, model.hidden_size]),
        ] {
            let elements: i128 = sides.map(i128::from).iter().product();
            ensure!(elements <= MOST_ELEMENTS, "{what} would be one parameter of {elements} elements, on a GPU at most {MOST_ELEMENTS}");
        }
        Ok(())
    }

    /// Of the phases that are not over after `tokens`: one that is binds no layout any more.
    pub fn check_batches(&self, mesh: &Mesh, tokens: u64) -> Result<()> {
        let mut end = 0;
        for (index, phase) in self.phase.iter().enumerate() {
            end += phase.tokens;
            if tokens < end {
                phase.check_ranks(mesh.dp).with_context(|| format!("phase.{index}"))?;
            }
        }
        Ok(())
    }

    pub fn to_toml(&self) -> Result<String> {
        Ok(toml::to_string(self)?)
    }
}

/// Kernels count a parameter's elements in 32 bits, in steps of all threads.
const MOST_ELEMENTS: i128 = (1 << 31) - (1 << 20);
/// Rows of each begin a tile of their own, CUDA counts tiles of rows up to 65535, and half of them are for the rows.
const MOST_EXPERTS: i64 = 1 << 15;
/// A change of half a unit in the last place of BF16 is lost, and that is up to 0.4 % of a moment.
const MOST_BETA_IN_BF16: f64 = 0.99;

/// Shares of a mixture.
pub(crate) fn check_weights(mixture: &[Source], key: &str) -> Result<()> {
    mixture.iter().enumerate().try_for_each(|(index, source)| {
        let weight = source.weight;
        ensure!(weight > 0.0, "{key}.{index}.weight = {weight}: must be positive; leave out a source that has no share");
        Ok(())
    })
}

/// TOML has `inf` and `nan`; no key means anything by them.
fn finite(value: &Value, key: &str) -> Result<()> {
    let inside = |name: &str| if key.is_empty() { name.to_string() } else { format!("{key}.{name}") };
    match value {
        Value::Float(number) => ensure!(number.is_finite(), "{key} = {number}: must be finite"),
        Value::Table(table) => table.iter().try_for_each(|(name, value)| finite(value, &inside(name)))?,
        Value::Array(items) => items.iter().enumerate().try_for_each(|(index, value)| finite(value, &inside(&index.to_string())))?,
        _ => {}
    }
    Ok(())
}

fn read_toml(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read the config {}", path.display()))?;
    toml::from_str::<toml::Table>(&text).map(Value::Table).with_context(|| format!("{} is not TOML", path.display()))
}

/// Deserialises, and turns serde's "unknown field" into one that names the nearest right key.
fn parse<T: for<'a> Deserialize<'a>>(value: Value, path: &Path) -> Result<T> {
    value.try_into::<T>().map_err(|error| {
        let text = error.to_string();
        // The lines below the first say where it is, in quotes too.
        let quoted: Vec<&str> = text.lines().next().unwrap_or("").split('`').skip(1).step_by(2).collect();
        let hint = match quoted.split_first() {
            Some((unknown, known)) if text.contains("unknown field") || text.contains("unknown variant") => known
                .iter()
                .max_by(|a, b| strsim::jaro_winkler(a, unknown).total_cmp(&strsim::jaro_winkler(b, unknown)))
                .filter(|nearest| strsim::jaro_winkler(nearest, unknown) >= ALIKE)
                .map(|nearest| format!("; did you mean `{nearest}`?"))
                .unwrap_or_default(),
            _ => String::new(),
        };
        anyhow::anyhow!("{}: {}{hint}", path.display(), text.trim_end())
    })
}

fn set(value: &mut Value, text: &str) -> Result<()> {
    let (key, new) = text.split_once('=').with_context(|| format!("--set {text}: expected section.key=value"))?;
    let new = toml::from_str::<toml::Table>(&format!("v = {new}"))
        .ok()
        .and_then(|mut table| table.remove("v"))
        .unwrap_or_else(|| Value::String(new.to_string()));
    let mut at = value;
    for part in key.split('.') {
        at = child(at, part).with_context(|| format!("--set {text}"))?;
    }
    *at = new;
    Ok(())
}

/// A table's entry, made if absent, or an array's item by number.
fn child<'a>(at: &'a mut Value, part: &str) -> Result<&'a mut Value> {
    match at {
        Value::Table(table) => Ok(table.entry(part).or_insert_with(|| Value::Table(Default::default()))),
        Value::Array(items) => {
            let len = items.len();
            let index: usize = part.parse().with_context(|| format!("`{part}` is not the number of one of {len}"))?;
            items.get_mut(index).with_context(|| format!("there are only {len}, counted from 0"))
        }
        _ => bail!("`{part}` would be inside a plain value"),
    }
}
