//! A trainer's tensors as a checkpoint names them: `weight/…` (the master), `first/…` and `second/…` (the moments).
use crate::checkpoint::{self, Manifest};
use crate::step::Trainer;
use anyhow::{Context, Result, ensure};
use model::ParamId;
use model::params::{ParamSpec, Role};
use std::collections::HashMap;
use std::path::Path;
use tch::Tensor;

/// One tensor of a rank's state: a part of a logical tensor that `holders` ranks hold alike.
pub struct StatePart {
    pub name: String,
    pub tensor: Tensor,
    /// Where the part starts in dim 0 of the whole, and that dim's size.
    pub start: i64,
    pub total: i64,
    /// This rank's place among those that hold the same part, and their number: they share out the writing.
    pub holder: (usize, usize),
}

impl Trainer {
    /// Everything the next step depends on.
    pub fn state(&self) -> Vec<StatePart> {
        let table = &self.weights.table;
        let part = |prefix: &str, id: ParamId, tensor: &Tensor| {
            let spec = table.spec(id);
            let group = if spec.role == Role::Experts { &self.groups.expert_data } else { &self.groups.data };
            let (start, total, holder) = (spec.start, spec.total, (group.rank(), group.size()));
            StatePart { name: format!("{prefix}/{}", spec.name), tensor: tensor.shallow_clone(), start, total, holder }
        };
        let untrained = table.ids().filter(|&id| !table.spec(id).trained());
        let mut parts: Vec<StatePart> = untrained.map(|id| part("weight", id, self.weights.get(id))).collect();
        for slot in &self.optimizer.slots {
            for (prefix, tensor) in [("weight", &slot.master), ("first", &slot.first), ("second", &slot.second)] {
                parts.push(part(prefix, slot.id, tensor));
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
            slot.first.copy_(&find(path, &tensors, "first", table.spec(slot.id))?);
            slot.second.copy_(&find(path, &tensors, "second", table.spec(slot.id))?);
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
        let table = self.weights.table.clone();
        for id in table.ids() {
            self.weights.set(id, &find(path, tensors, "weight", table.spec(id))?);
        }
        for slot in &mut self.optimizer.slots {
            // Where master and weight are one tensor this writes the same values again.
            slot.master.copy_(&find(path, tensors, "weight", table.spec(slot.id))?);
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
