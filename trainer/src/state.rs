//! A trainer's tensors as a checkpoint names them: `weight/…` (the master), `first/…` and `second/…` (the moments),
//! `ema/…` (the averages, where the run keeps them).
use crate::checkpoint::Reader;
use crate::optimizer::Slot;
use crate::step::Trainer;
use crate::zero::holders;
use anyhow::{Result, ensure};
use model::params::ParamSpec;
use serde_json::Value;
use tch::{Device, Tensor};

/// A model's keys in which a checkpoint may differ: the length and its RoPE are a phase's matter, and nothing is drawn any more.
const PHASES: [&str; 3] = ["rope_scaling", "max_position_embeddings", "initializer_range"];

/// One tensor of a rank's state: rows of a logical tensor that no other rank writes.
pub struct StatePart {
    pub name: String,
    pub tensor: Tensor,
    /// Where the part starts in dim 0 of the whole, and that dim's size.
    pub start: i64,
    pub total: i64,
}

/// Reads the state and changes nothing; on whatever thread, before the state changes.
pub type StateReader = Box<dyn FnOnce() + Send>;

impl Trainer {
    /// Everything the next step depends on that this rank is to write: its shards, and what has none if it is the first
    /// of those that hold it.
    pub fn state(&mut self) -> Vec<StatePart> {
        let table = &self.weights.table;
        let part = |prefix: &str, spec: &ParamSpec, tensor: &Tensor| StatePart {
            name: format!("{prefix}/{}", spec.name),
            tensor: tensor.shallow_clone(),
            start: spec.start,
            total: spec.total,
        };
        let first = |spec: &ParamSpec| holders(&self.groups, spec.role).rank() == 0;
        let untrained = table.ids().filter(|&id| !table.spec(id).trained() && first(table.spec(id)));
        let mut parts: Vec<StatePart> = untrained.map(|id| part("weight", table.spec(id), self.weights.get(id))).collect();
        for slot in &self.optimizer.slots {
            let spec = slot.shard.spec(table.spec(slot.shard.id));
            for (prefix, tensor) in [("weight", &slot.master), ("first", &slot.first), ("second", &slot.second)] {
                parts.push(part(prefix, &spec, tensor));
            }
        }
        let averages = self.ema.as_mut().map(|ema| ema.averages(&self.optimizer.slots)).unwrap_or_default();
        for (slot, average) in self.optimizer.slots.iter().zip(&averages) {
            parts.push(part("ema", &slot.shard.spec(table.spec(slot.shard.id)), average));
        }
        parts
    }

    /// Masters, moments, averages and the update count; where the checkpoint has no averages they start here. The weights of
    /// this rank's rows are made from the masters; the others' rows come with `gather`.
    pub fn load_all(&mut self, from: &mut Reader) -> Result<()> {
        self.check_model(from, &PHASES)?;
        self.want_masters(from)?;
        let table = self.weights.table.clone();
        let spec = |slot: &Slot| slot.shard.spec(table.spec(slot.shard.id));
        for slot in &self.optimizer.slots {
            want(from, "first", &spec(slot), &slot.first)?;
            want(from, "second", &spec(slot), &slot.second)?;
        }
        let averaged = self.ema.is_some() && from.manifest().tensors.keys().any(|name| name.starts_with("ema/"));
        let mut averages = Vec::new();
        for slot in self.optimizer.slots.iter().filter(|_| averaged) {
            let average = Tensor::empty(slot.master.size(), (slot.master.kind(), Device::Cpu));
            want(from, "ema", &spec(slot), &average)?;
            averages.push(average);
        }
        from.read()?;
        self.optimizer.rewrite(&mut self.weights);
        self.optimizer.updates = from.manifest().updates;
        if let Some(ema) = &mut self.ema {
            ema.restart(&self.optimizer.slots);
            averages.iter().enumerate().for_each(|(index, average)| ema.load(index, average));
        }
        Ok(())
    }

    /// As `load_all`, but of weights alone: of a run of another kind or an imported model. That must be this one in all that
    /// its weights mean.
    pub fn load_weights(&mut self, from: &mut Reader) -> Result<()> {
        // MTP's module may be left out, and not made up.
        let [theirs, ours] = [&from.manifest().model, &self.config].map(|model| model.num_nextn_predict_layers);
        ensure!(theirs >= ours, "{} has no MTP module: model.num_nextn_predict_layers must be 0, it is {ours}", from.path().display());
        self.check_model(from, &[&PHASES[..], &["num_nextn_predict_layers"]].concat())?;
        self.want_masters(from)?;
        from.read()?;
        self.optimizer.rewrite(&mut self.weights);
        self.ema.iter_mut().for_each(|ema| ema.restart(&self.optimizer.slots));
        Ok(())
    }

    /// That a checkpoint's model is this one but for these keys.
    fn check_model(&self, from: &Reader, but: &[&str]) -> Result<()> {
        let [theirs, ours] = [&from.manifest().model, &self.config].map(serde_json::to_value);
        let (theirs, ours) = (theirs?, ours?);
        for (key, own) in ours.as_object().expect("a config is an object").iter().filter(|(key, _)| !but.contains(&key.as_str())) {
            let other = theirs.get(key).unwrap_or(&Value::Null);
            ensure!(own == other, "{}: its model has {key} = {other}, the run's model.{key} is {own}", from.path().display());
        }
        Ok(())
    }

    /// And what nobody trains, which has no master.
    fn want_masters(&mut self, from: &mut Reader) -> Result<()> {
        self.weights.ready(|_| true)?;
        let table = self.weights.table.clone();
        for id in table.ids().filter(|&id| !table.spec(id).trained()) {
            want(from, "weight", table.spec(id), self.weights.write(id))?;
        }
        for slot in &self.optimizer.slots {
            want(from, "weight", &slot.shard.spec(table.spec(slot.shard.id)), &slot.master)?;
        }
        Ok(())
    }
}

/// Into `target`, with the next read, the rows of a logical tensor that `spec` describes.
fn want(from: &mut Reader, prefix: &str, spec: &ParamSpec, target: &Tensor) -> Result<()> {
    from.fill(&format!("{prefix}/{}", spec.name), &spec.whole_shape(), spec.start, target)
}
