//! What changes over a run, by tokens seen: mixture, sequence length, batch, learning rate, rope scaling, and the
//! weights of the extra losses. Pure functions of the config, so a resume on either side of an edge is the same run.
use crate::config::check_weights;
use anyhow::{Result, bail, ensure};
use data::Source;
use kernels::ops::rope::RopeScaling;
use model::ModelConfig;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// How long it lasts. The step that crosses the edge belongs to this phase.
    pub tokens: u64,
    pub sequence_length: u64,
    /// Sequences of a global batch.
    pub batch: Ramp,
    /// Sequences of one micro-batch on one rank.
    pub micro_batch: u64,
    pub lr: Curve,
    /// γ
    #[serde(default = "gamma")]
    pub bias_speed: f64,
    /// α
    #[serde(default = "alpha")]
    pub balance_weight: f64,
    /// λ
    #[serde(default = "lambda")]
    pub mtp_weight: f64,
    /// Absent: the model's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Absent: data.mixture.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mixture: Option<Vec<Source>>,
}

fn gamma() -> f64 {
    0.001
}
fn alpha() -> f64 {
    1e-4
}
fn lambda() -> f64 {
    0.3
}

/// A constant, or a line over the phase in multiples of `multiple`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Ramp {
    Constant(u64),
    Line(Line),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    pub from: u64,
    pub to: u64,
    pub multiple: u64,
}

/// A constant, or a curve over the phase.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Curve {
    Constant(f64),
    Curve(CurveShape),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CurveShape {
    pub from: f64,
    pub to: f64,
    pub shape: Shape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    Linear,
    Cosine,
}

/// Who takes either. Serde's `untagged` would not say what is wrong inside the table.
struct NumberOrTable<V, N, T> {
    words: &'static str,
    number: fn(N) -> V,
    table: fn(T) -> V,
}

impl<'de, V, N: Deserialize<'de>, T: Deserialize<'de>> Visitor<'de> for NumberOrTable<V, N, T> {
    type Value = V;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.words)
    }
    fn visit_i64<E: Error>(self, number: i64) -> Result<V, E> {
        N::deserialize(number.into_deserializer()).map(self.number)
    }
    fn visit_u64<E: Error>(self, number: u64) -> Result<V, E> {
        N::deserialize(number.into_deserializer()).map(self.number)
    }
    fn visit_f64<E: Error>(self, number: f64) -> Result<V, E> {
        N::deserialize(number.into_deserializer()).map(self.number)
    }
    fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<V, M::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(self.table)
    }
}

impl<'de> Deserialize<'de> for Ramp {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Ramp, D::Error> {
        let words = "a number, or a table of from, to and multiple";
        from.deserialize_any(NumberOrTable { words, number: Ramp::Constant, table: Ramp::Line })
    }
}

impl<'de> Deserialize<'de> for Curve {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Curve, D::Error> {
        let words = "a number, or a table of from, to and shape";
        from.deserialize_any(NumberOrTable { words, number: Curve::Constant, table: Curve::Curve })
    }
}

impl Ramp {
    /// `progress` in 0..1 through the phase.
    fn at(&self, progress: f64) -> u64 {
        match self {
            Ramp::Constant(value) => *value,
            Ramp::Line(Line { from, to, multiple }) => {
                let exact = *from as f64 + (*to as f64 - *from as f64) * progress;
                ((exact / *multiple as f64).floor() as u64 * multiple).max(*multiple)
            }
        }
    }
    /// No value is above this.
    pub fn most(&self) -> u64 {
        match self {
            Ramp::Constant(value) => *value,
            Ramp::Line(line) => line.from.max(line.to).max(line.multiple),
        }
    }
    /// Every value divides by this.
    fn unit(&self) -> u64 {
        match self {
            Ramp::Constant(value) => *value,
            Ramp::Line(line) => line.multiple,
        }
    }
}

impl Curve {
    fn at(&self, progress: f64) -> f64 {
        match self {
            Curve::Constant(value) => *value,
            Curve::Curve(CurveShape { from, to, shape: Shape::Linear }) => from + (to - from) * progress,
            Curve::Curve(CurveShape { from, to, shape: Shape::Cosine }) => to + (from - to) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        }
    }
}

/// More would be a slip, and products of such numbers must stay numbers.
const MOST_SEQUENCES: u64 = 1 << 30;
const MOST_TOKENS: u64 = 1 << 53;

impl Phase {
    /// Its own, or the model's.
    pub fn rope_scaling_of(&self, model: &ModelConfig) -> Option<RopeScaling> {
        self.rope_scaling.clone().or_else(|| model.rope_scaling.clone())
    }

    pub fn validate(&self, model: &ModelConfig) -> Result<()> {
        let longest = model.max_position_embeddings as u64;
        if let Some(Err((key, value, limit))) = self.rope_scaling.as_ref().map(RopeScaling::validate) {
            bail!("rope_scaling.{key} = {value}: {limit}");
        }
        ensure!(self.mixture.as_ref().is_none_or(|mixture| !mixture.is_empty()), "mixture = []: must name a source");
        check_weights(self.mixture.as_deref().unwrap_or_default(), "mixture")?;
        let rates = match &self.lr {
            Curve::Constant(lr) => vec![("lr", *lr)],
            Curve::Curve(curve) => vec![("lr.from", curve.from), ("lr.to", curve.to)],
        };
        for (key, lr) in rates {
            ensure!(lr >= 0.0 && lr.is_finite(), "{key} = {lr}: must not be negative");
        }
        ensure!((1..=MOST_TOKENS).contains(&self.tokens), "tokens = {}: must be from 1 to {MOST_TOKENS}", self.tokens);
        ensure!((3..=longest).contains(&self.sequence_length), "sequence_length = {}: must be between 3 and model.max_position_embeddings = {longest}", self.sequence_length);
        ensure!((1..=MOST_SEQUENCES).contains(&self.micro_batch), "micro_batch = {}: must be from 1 to {MOST_SEQUENCES}", self.micro_batch);
        let batches = match &self.batch {
            Ramp::Constant(batch) => vec![("batch", *batch, 1)],
            Ramp::Line(Line { from, to, multiple }) => vec![("batch.multiple", *multiple, 1), ("batch.from", *from, *multiple), ("batch.to", *to, *multiple)],
        };
        for (key, batch, multiple) in batches {
            ensure!((1..=MOST_SEQUENCES).contains(&batch), "{key} = {batch}: must be from 1 to {MOST_SEQUENCES}");
            ensure!(batch.is_multiple_of(multiple), "{key} = {batch}: must be a multiple of batch.multiple = {multiple}");
        }
        for (key, value) in [("bias_speed", self.bias_speed), ("balance_weight", self.balance_weight), ("mtp_weight", self.mtp_weight)] {
            ensure!(value >= 0.0 && value.is_finite(), "{key} = {value}: must not be negative");
        }
        Ok(())
    }

    /// That nobody has set what does nothing with this model. Defaults stand in every config that a run has written.
    pub fn check_uses(&self, model: &ModelConfig) -> Result<()> {
        let mtp = model.num_nextn_predict_layers > 0;
        let no_experts = (model.first_k_dense_replace >= model.num_hidden_layers && !mtp).then_some("without experts (model.first_k_dense_replace)");
        let no_bias = (!model.has_bias()).then_some("with model.scoring_func = \"softmax\", whose gates have no bias");
        for (key, value, default, idle) in [
            ("bias_speed", self.bias_speed, gamma(), no_experts.or(no_bias)),
            ("balance_weight", self.balance_weight, alpha(), no_experts),
            ("mtp_weight", self.mtp_weight, lambda(), (!mtp).then_some("with model.num_nextn_predict_layers = 0")),
        ] {
            let Some(why) = idle.filter(|_| value != 0.0 && value != default) else { continue };
            bail!("{key} = {value}: does nothing {why}: leave it out, or 0");
        }
        Ok(())
    }

    /// Every batch of the phase is whole micro-batches on every one of `ranks` data-parallel ranks.
    pub fn check_ranks(&self, ranks: usize) -> Result<()> {
        let (unit, needed) = (self.batch.unit(), self.micro_batch * ranks as u64);
        ensure!(unit % needed == 0, "batch {unit} is not a multiple of micro_batch {} × dp {ranks} = {needed}", self.micro_batch);
        Ok(())
    }

    /// That it is what it was, but for what its micro-batches are and where its corpora lie, whose content has a check of its own,
    /// and `under_way` for its length, where nothing goes by how far it is.
    pub fn check_begun(&self, was: &Phase, under_way: bool) -> Result<()> {
        let even = |phase: &Phase| matches!((&phase.lr, &phase.batch), (Curve::Constant(_), Ramp::Constant(_)));
        let tokens = |phase: &Phase| if under_way && even(self) && even(was) { 0 } else { phase.tokens };
        let keys = |phase: &Phase| -> Result<toml::Table> {
            Ok(toml::Table::try_from(Phase { micro_batch: 1, mixture: None, tokens: tokens(phase), ..phase.clone() })?)
        };
        let (now, was) = (keys(self)?, keys(was)?);
        let words = |value: Option<&toml::Value>| value.map_or("none".to_string(), |value| value.to_string());
        for key in now.keys().chain(was.keys()) {
            let (now, was) = (now.get(key), was.get(key));
            ensure!(now == was, "{key} = {}: the phase has begun, with {}: one that has not can be changed, or added", words(now), words(was));
        }
        Ok(())
    }
}

/// The schedule of a run.
#[derive(Clone, Debug)]
pub struct Plan {
    phases: Vec<Phase>,
    /// Which sample order each phase reads: a new one wherever length or mixture change.
    orders: Vec<u64>,
    default_mixture: Vec<Source>,
}

/// A sample order as the steps of a run read it.
pub struct PlannedOrder<'a> {
    pub number: u64,
    /// The first that reads it, and its number in the config, from 0.
    pub phase: &'a Phase,
    pub phase_number: usize,
    pub samples: u64,
}

/// What holds at one step.
pub struct Moment<'a> {
    pub phase: &'a Phase,
    pub order: u64,
    pub batch: u64,
    pub lr: f64,
}

impl Plan {
    pub fn new(phases: &[Phase], default_mixture: &[Source]) -> Self {
        let mut plan = Plan { phases: phases.to_vec(), orders: vec![0], default_mixture: default_mixture.to_vec() };
        for pair in phases.windows(2) {
            let same = pair[0].sequence_length == pair[1].sequence_length && plan.mixture(&pair[0]) == plan.mixture(&pair[1]);
            let last = *plan.orders.last().expect("starts with one");
            plan.orders.push(if same { last } else { last + 1 });
        }
        plan
    }

    /// By its place in the config.
    pub fn phase(&self, index: usize) -> &Phase {
        &self.phases[index]
    }

    pub fn mixture<'a>(&'a self, phase: &'a Phase) -> &'a [Source] {
        phase.mixture.as_deref().unwrap_or(&self.default_mixture)
    }

    pub fn total_tokens(&self) -> u64 {
        self.phases.iter().map(|phase| phase.tokens).sum()
    }

    /// That its steps read: more than its phases' where the last step goes beyond the end.
    pub fn trained_tokens(&self) -> u64 {
        self.stretches(0).map(|(moment, steps)| moment.batch * moment.phase.sequence_length * steps).sum()
    }

    /// None once every phase is over.
    pub fn at(&self, tokens: u64) -> Option<Moment<'_>> {
        let mut start = 0;
        for (phase, &order) in self.phases.iter().zip(&self.orders) {
            if tokens < start + phase.tokens {
                let progress = (tokens - start) as f64 / phase.tokens as f64;
                return Some(Moment { phase, order, batch: phase.batch.at(progress), lr: phase.lr.at(progress) });
            }
            start += phase.tokens;
        }
        None
    }

    /// The steps after `tokens`, in stretches of one phase and batch: the first step of each, and how many they are. A phase
    /// of a million steps costs no more than one of ten.
    pub fn stretches(&self, tokens: u64) -> impl Iterator<Item = (Moment<'_>, u64)> {
        let mut tokens = tokens;
        std::iter::from_fn(move || {
            let moment = self.at(tokens)?;
            let each = moment.batch * moment.phase.sequence_length;
            // A ramp only rises or only falls: once another, the batch stays another.
            let alike = |step: u64| {
                self.at(tokens + step * each).is_some_and(|at| std::ptr::eq(at.phase, moment.phase) && at.batch == moment.batch)
            };
            let (mut steps, mut most) = (1, moment.phase.tokens.div_ceil(each));
            while steps < most {
                let middle = steps + (most - steps).div_ceil(2);
                (steps, most) = if alike(middle - 1) { (middle, most) } else { (steps, middle - 1) };
            }
            tokens += steps * each;
            Some((moment, steps))
        })
    }

    /// The phases that a step of the first `tokens` belongs to.
    pub fn begun(&self, tokens: u64) -> &[Phase] {
        let mut at = 0;
        let has_begun = |(moment, steps): &(Moment, u64)| {
            let begun = at < tokens;
            at += moment.batch * moment.phase.sequence_length * steps;
            begun
        };
        let last = self.stretches(0).take_while(has_begun).last().map(|(moment, _)| moment.phase);
        let count = last.map_or(0, |last| 1 + self.phases.iter().position(|phase| std::ptr::eq(phase, last)).expect("one of them"));
        &self.phases[..count]
    }

    /// The first phase that is over before it begins, and its place in the config.
    pub fn without_a_step(&self) -> Option<(usize, &Phase)> {
        let mut begun: Vec<&Phase> = self.stretches(0).map(|(moment, _)| moment.phase).collect();
        begun.dedup_by(|a, b| std::ptr::eq(*a, *b));
        let has_none = |(index, phase): &(usize, &Phase)| begun.get(*index).is_none_or(|begun| !std::ptr::eq(*begun, *phase));
        self.phases.iter().enumerate().find(has_none)
    }

    /// Those that some step reads, ascending.
    pub fn orders(&self) -> Vec<PlannedOrder<'_>> {
        let mut orders: Vec<PlannedOrder> = Vec::new();
        for (Moment { phase, order: number, batch, .. }, steps) in self.stretches(0) {
            let samples = batch * steps;
            match orders.last_mut() {
                Some(last) if last.number == number => last.samples += samples,
                _ => {
                    let phase_number = self.orders.iter().position(|order| *order == number).expect("a phase has it");
                    orders.push(PlannedOrder { number, phase, phase_number, samples });
                }
            }
        }
        orders
    }

    pub fn num_steps(&self) -> u64 {
        self.stretches(0).map(|(_, steps)| steps).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(tokens: u64, batch: Ramp, lr: Curve) -> Phase {
        Phase { tokens, sequence_length: 10, batch, micro_batch: 1, lr, bias_speed: 0.0, balance_weight: 0.0, mtp_weight: 0.0, rope_scaling: None, mixture: None }
    }

    #[test]
    fn a_ramp_rises_in_multiples_and_the_lr_follows_its_curve() {
        let rise = Ramp::Line(Line { from: 4, to: 12, multiple: 4 });
        let warm = Curve::Curve(CurveShape { from: 0.0, to: 1.0, shape: Shape::Linear });
        let fall = Curve::Curve(CurveShape { from: 1.0, to: 0.1, shape: Shape::Cosine });
        let plan = Plan::new(&[phase(1000, rise, warm), phase(1000, Ramp::Constant(12), fall)], &[]);
        let at = |tokens| plan.at(tokens).map(|m| (m.batch, m.lr));
        assert_eq!(at(0), Some((4, 0.0)));
        assert_eq!(at(499), Some((4, 0.499)));
        assert_eq!(at(500), Some((8, 0.5)));
        assert_eq!(at(1000), Some((12, 1.0)));
        assert!((at(1500).expect("inside").1 - 0.55).abs() < 1e-12);
        assert_eq!(at(2000), None);
        // 13 steps of 40 reach 520, 6 of 80 reach 1000, 9 of 120 end at 2080.
        assert_eq!((plan.num_steps(), plan.trained_tokens()), (13 + 6 + 9, 2080));
    }

    #[test]
    fn steps_are_counted_as_they_are_done() {
        let ramps = [(4, 12, 4), (12, 4, 4), (1, 40, 1), (40, 1, 1)].map(|(from, to, multiple)| Ramp::Line(Line { from, to, multiple }));
        let lengths = [1, 39, 40, 41, 1000, 3000, 20_001];
        let phases: Vec<Phase> = ramps
            .into_iter()
            .chain([Ramp::Constant(7)])
            .flat_map(|ramp| lengths.map(|tokens| phase(tokens, ramp.clone(), Curve::Constant(1.0))))
            .collect();
        let plan = Plan::new(&phases, &[]);
        for from in [0, 23_000, 26_500, plan.total_tokens() - 1, plan.total_tokens()] {
            let (mut tokens, mut one_by_one) = (from, Vec::new());
            while let Some(moment) = plan.at(tokens) {
                tokens += moment.batch * moment.phase.sequence_length;
                one_by_one.push(moment.batch);
            }
            let counted = plan.stretches(from).flat_map(|(moment, steps)| std::iter::repeat_n(moment.batch, steps as usize));
            assert_eq!(counted.collect::<Vec<_>>(), one_by_one, "after {from} tokens");
        }
        // Steps of ten tokens: nobody could wait for them one by one.
        let endless = Plan::new(&vec![phase(1 << 60, Ramp::Constant(1), Curve::Constant(1.0)); 10], &[]);
        assert_eq!(endless.num_steps(), 1 << 60);
    }

    #[test]
    fn a_phase_that_the_one_before_runs_over_has_no_step() {
        let plan = |tokens: [u64; 4]| Plan::new(&tokens.map(|tokens| phase(tokens, Ramp::Constant(4), Curve::Constant(1.0))), &[]);
        // Steps of 40: the third ends at 120.
        assert_eq!(plan([90, 30, 40, 1]).without_a_step().map(|(index, phase)| (index, phase.tokens)), Some((1, 30)));
        assert_eq!(plan([90, 31, 40, 20]).without_a_step().map(|(index, _)| index), Some(3));
        assert!(plan([90, 31, 80, 40]).without_a_step().is_none());
    }

    #[test]
    fn a_new_order_starts_where_the_length_changes() {
        let one = phase(100, Ramp::Constant(1), Curve::Constant(1.0));
        let longer = Phase { sequence_length: 20, ..one.clone() };
        let plan = Plan::new(&[one.clone(), one, longer], &[]);
        assert_eq!([0, 100, 200].map(|tokens| plan.at(tokens).expect("inside").order), [0, 0, 1]);
        let orders = plan.orders();
        assert_eq!(orders.iter().map(|order| (order.number, order.phase_number, order.samples)).collect::<Vec<_>>(), [(0, 0, 20), (1, 2, 5)]);
    }
}
