//! The FP8 sentinel: every so many steps one linear's three GEMMs, in turn over all of the model's, are made in BF16 too.
//! Where one is further from it than the limit, that linear computes in BF16 for so many steps, and is the first to be
//! looked at when it is back.
//!
//! Invariant: what it decides is a function of the step, of reduced errors and of its state, which a checkpoint holds: the
//! same on every rank, and after a resume.
use anyhow::{Result, ensure};
use kernels::Precision;
use model::params::Role;
use model::{ModelConfig, ParamTable, Recompute, Stage, Weights};
use parallel::comm::{CommError, Communicator, Reduce};
use serde::{Deserialize, Serialize};
use tch::Device;
use std::fmt;
use std::rc::Rc;

/// `[sentinel]` of a run's config; only FP8 runs have one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SentinelSection {
    /// Steps from one look to the next; 0: never.
    pub every: u64,
    /// Of ‖FP8 − BF16‖ / ‖BF16‖, of any of the three GEMMs.
    pub limit: f64,
    /// Steps in BF16 after a look that found more.
    pub fallback_steps: u64,
}

impl Default for SentinelSection {
    fn default() -> Self {
        SentinelSection { every: 0, limit: 0.2, fallback_steps: 100 }
    }
}

impl SentinelSection {
    pub fn validate(&self, precision: Precision) -> Result<()> {
        let SentinelSection { every, limit, fallback_steps } = *self;
        ensure!(every == 0 || precision == Precision::Fp8, "sentinel.every = {every}: run.precision is {precision:?}, only fp8 runs have a sentinel");
        ensure!(limit > 0.0 && limit.is_finite(), "sentinel.limit = {limit}: must be positive and finite");
        ensure!(fallback_steps >= 1, "sentinel.fallback_steps = 0: must be at least 1");
        Ok(())
    }
}

/// What a checkpoint remembers: the linears in BF16, and the first step in which each computes in FP8 again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SentinelState {
    pub fallen_back: Vec<(String, u64)>,
}

/// What it did in a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    pub looked_at: Option<Look>,
    /// Back in FP8 with this step.
    pub returned: Option<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Look {
    pub name: String,
    /// Of Fprop, Dgrad and Wgrad.
    pub errors: [f64; 3],
    pub limit: f64,
    /// The step in which it will be back in FP8, where it falls back.
    pub back_in: Option<u64>,
}

impl fmt::Display for Look {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [fprop, dgrad, wgrad] = self.errors;
        write!(f, "{} in FP8 is off by {fprop:.3} (Fprop), {dgrad:.3} (Dgrad), {wgrad:.3} (Wgrad) of its norm in BF16", self.name)?;
        match self.back_in {
            Some(step) => write!(f, ", the limit is {}: it computes in BF16 until step {step}", self.limit),
            None => Ok(()),
        }
    }
}

pub struct Sentinel {
    config: SentinelSection,
    pub state: SentinelState,
    /// Of the whole model, whichever rank holds them.
    linears: Vec<String>,
    /// Of the step under way.
    target: Option<String>,
}

impl Sentinel {
    pub fn new(config: &SentinelSection, model: &ModelConfig) -> Self {
        let linears = if config.every > 0 { linears(model) } else { Vec::new() };
        Sentinel { config: config.clone(), state: SentinelState::default(), linears, target: None }
    }

    /// Before step `number`, from 1: whose turn it is, and who is in BF16.
    pub fn begin(&mut self, number: u64, weights: &mut Weights) {
        if self.linears.is_empty() && self.state.fallen_back.is_empty() {
            return;
        }
        let fallen: Vec<&String> = self.state.fallen_back.iter().filter(|(_, back)| *back > number).map(|(name, _)| name).collect();
        let every = self.config.every;
        let turn = number.is_multiple_of(every).then(|| &self.linears[(number / every - 1) as usize % self.linears.len()]);
        let returned = self.state.fallen_back.iter().find(|(_, back)| *back == number).map(|(name, _)| name).filter(|_| every > 0);
        self.target = returned.or(turn).filter(|name| !fallen.contains(name)).cloned();
        let here = |name: &String| weights.table.find(name);
        let in_bf16 = fallen.into_iter().filter_map(here).collect();
        weights.sentinel = Rc::new(model::Sentinel::new(in_bf16, self.target.as_ref().and_then(here)));
    }

    /// After the products of step `number`, which is not to be done again. Collective over `world` where it had a target.
    pub fn end(&mut self, number: u64, weights: &Weights, world: &dyn Communicator) -> Result<Seen, CommError> {
        let returned = self.state.fallen_back.iter().find(|(_, back)| *back == number).map(|(name, _)| name.clone());
        self.state.fallen_back.retain(|(_, back)| *back > number);
        let Some(name) = self.target.take() else { return Ok(Seen { looked_at: None, returned }) };
        let errors = world.all_reduce(vec![weights.sentinel.errors(weights.device()).to_device(Device::Cpu)], Reduce::Max)?.wait()?;
        let errors: [f64; 3] = Vec::try_from(&errors[0]).expect("f64 errors").try_into().expect("three");
        let limit = self.config.limit;
        let back_in = errors.iter().any(|&error| error > limit).then_some(number + 1 + self.config.fallback_steps);
        self.state.fallen_back.extend(back_in.map(|step| (name.clone(), step)));
        Ok(Seen { looked_at: Some(Look { name, errors, limit, back_in }), returned })
    }
}

/// Every linear that computes in FP8, in model order.
fn linears(model: &ModelConfig) -> Vec<String> {
    let mut table = ParamTable::new(Default::default(), Recompute::default());
    Stage::whole(&mut table, model);
    let in_fp8 = |role: Role, name: &str| match role {
        Role::Experts => true,
        Role::Matrix => name != "lm_head.weight" && !name.ends_with("eh_proj.weight"),
        _ => false,
    };
    table.specs().iter().filter(|spec| in_fp8(spec.role, &spec.name)).map(|spec| spec.name.clone()).collect()
}
