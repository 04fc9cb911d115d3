//! A trainer's tensors as a checkpoint names them: `weight/…` (the master), `first/…` and `second/…` (the moments),
//! `ema/…` (the averages, where the run keeps them).
use crate::checkpoint::Reader;
use crate::step::Trainer;
use crate::zero::holders;
use anyhow::Result;
use model::params::ParamSpec;
use tch::{Device, Tensor};

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

    /// Weights, moments, averages and the update count; where the checkpoint has no averages they start here.
    pub fn load_all(&mut self, from: &mut Reader) -> Result<()> {
        self.load_weights(from)?;
        let table = self.weights.table.clone();
        for slot in &mut self.optimizer.slots {
            let spec = slot.shard.spec(table.spec(slot.shard.id));
            fill(from, "first", &spec, &slot.first)?;
            fill(from, "second", &spec, &slot.second)?;
        }
        self.optimizer.updates = from.manifest().updates;
        if let Some(ema) = self.ema.as_mut().filter(|_| from.manifest().tensors.keys().any(|name| name.starts_with("ema/"))) {
            for (index, slot) in self.optimizer.slots.iter().enumerate() {
                let average = slot.master.empty_like();
                fill(from, "ema", &slot.shard.spec(table.spec(slot.shard.id)), &average)?;
                ema.load(index, &average);
            }
        }
        Ok(())
    }

    /// Weights alone, of a run of another kind or an imported model.
    pub fn load_weights(&mut self, from: &mut Reader) -> Result<()> {
        self.weights.ready(|_| true)?;
        let table = self.weights.table.clone();
        let mut slots = self.optimizer.slots.iter_mut().peekable();
        for id in table.ids() {
            let spec = table.spec(id);
            // Slots come in the table's order.
            let slot = slots.next_if(|slot| slot.shard.id == id);
            let weight = self.weights.write(id).shallow_clone();
            if slot.as_ref().is_none_or(|slot| slot.master.data_ptr() == slot.shard.of(&weight).data_ptr()) {
                fill(from, "weight", spec, &weight)?; // the master, if there is one, is the weight's own rows
                continue;
            }
            let part = Tensor::empty(&spec.shape, (self.weights.precision.master(), Device::Cpu));
            fill(from, "weight", spec, &part)?;
            self.weights.set(id, &part);
            slot.into_iter().for_each(|slot| slot.master.copy_(&slot.shard.of(&part)));
        }
        if let Some(ema) = &mut self.ema {
            ema.restart(&self.optimizer.slots);
        }
        Ok(())
    }
}

/// Into `target` the rows of a logical tensor that `spec` describes.
fn fill(from: &mut Reader, prefix: &str, spec: &ParamSpec, target: &Tensor) -> Result<()> {
    from.fill(&format!("{prefix}/{}", spec.name), &spec.whole_shape(), spec.start, target)
}
