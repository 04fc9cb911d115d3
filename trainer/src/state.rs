//! A trainer's tensors as a checkpoint names them: `weight/…` (the master), `first/…` and `second/…` (the moments).
use crate::checkpoint::{self, Manifest};
use crate::step::Trainer;
use crate::zero::holders;
use anyhow::{Context, Result, ensure};
use model::params::ParamSpec;
use std::collections::HashMap;
use std::path::Path;
use tch::Tensor;

/// One tensor of a rank's state: rows of a logical tensor that no other rank writes.
pub struct StatePart {
    pub name: String,
    pub tensor: Tensor,
    /// Where the part starts in dim 0 of the whole, and that dim's size.
    pub start: i64,
    pub total: i64,
}

impl Trainer {
    /// Everything the next step depends on that this rank is to write: its shards, and what has none if it is the first
    /// of those that hold it.
    pub fn state(&self) -> Vec<StatePart> {
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
        parts
    }

    /// Weights, moments and the update count.
    pub fn load_all(&mut self, path: &Path) -> Result<Manifest> {
        let (manifest, tensors) = checkpoint::load(path, |_| true)?;
        self.set_weights(path, &tensors)?;
        let table = self.weights.table.clone();
        for slot in &mut self.optimizer.slots {
            let spec = slot.shard.spec(table.spec(slot.shard.id));
            slot.first.copy_(&find(path, &tensors, "first", &spec)?);
            slot.second.copy_(&find(path, &tensors, "second", &spec)?);
        }
        self.optimizer.updates = manifest.updates;
        Ok(manifest)
    }

    /// Weights alone, of a run of another kind or an imported model.
    pub fn load_weights(&mut self, path: &Path) -> Result<Manifest> {
        let (manifest, tensors) = checkpoint::load(path, |name| name.starts_with("weight/"))?;
        self.set_weights(path, &tensors)?;
        Ok(manifest)
    }

    fn set_weights(&mut self, path: &Path, tensors: &HashMap<String, Tensor>) -> Result<()> {
        self.weights.ready(|_| true)?;
        let table = self.weights.table.clone();
        for id in table.ids() {
            self.weights.set(id, &find(path, tensors, "weight", table.spec(id))?);
        }
        for slot in &mut self.optimizer.slots {
            // Where master and weight are one tensor this writes the same values again.
            slot.master.copy_(&find(path, tensors, "weight", &slot.shard.spec(table.spec(slot.shard.id)))?);
        }
        Ok(())
    }
}

/// This rank's part of a whole tensor.
fn find(path: &Path, tensors: &HashMap<String, Tensor>, prefix: &str, spec: &ParamSpec) -> Result<Tensor> {
    let (name, expected) = (format!("{prefix}/{}", spec.name), spec.whole_shape());
    let tensor = tensors.get(&name).with_context(|| format!("{} holds no {name}", path.display()))?;
    ensure!(tensor.size() == expected, "{}: {name} is {:?}, the model's is {expected:?}", path.display(), tensor.size());
    Ok(tensor.narrow(0, spec.start, spec.shape[0]))
}
