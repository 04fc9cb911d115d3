//! A trainer's tensors as a checkpoint names them: `weight/…` (the master), `first/…` and `second/…` (the moments).
use crate::checkpoint::{self, Manifest};
use crate::step::Trainer;
use anyhow::{Context, Result, ensure};
use std::collections::HashMap;
use std::path::Path;
use tch::Tensor;

impl Trainer {
    /// Everything the next step depends on.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let table = &self.weights.table;
        let untrained = table.ids().filter(|&id| !table.spec(id).trained());
        let mut tensors: Vec<(String, Tensor)> =
            untrained.map(|id| (format!("weight/{}", table.spec(id).name), self.weights.get(id).shallow_clone())).collect();
        for slot in &self.optimizer.slots {
            let name = &table.spec(slot.id).name;
            for (part, tensor) in [("weight", &slot.master), ("first", &slot.first), ("second", &slot.second)] {
                tensors.push((format!("{part}/{name}"), tensor.shallow_clone()));
            }
        }
        tensors
    }

    /// Weights, moments and the update count.
    pub fn load_all(&mut self, path: &Path) -> Result<Manifest> {
        let (manifest, tensors) = checkpoint::load(path, |_| true)?;
        self.set_weights(path, &tensors)?;
        let table = self.weights.table.clone();
        for slot in &mut self.optimizer.slots {
            let name = &table.spec(slot.id).name;
            slot.first.copy_(find(path, &tensors, &format!("first/{name}"), &table.spec(slot.id).shape)?);
            slot.second.copy_(find(path, &tensors, &format!("second/{name}"), &table.spec(slot.id).shape)?);
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
            let spec = table.spec(id);
            let tensor = find(path, tensors, &format!("weight/{}", spec.name), &spec.shape)?;
            self.weights.set(id, tensor);
        }
        for slot in &mut self.optimizer.slots {
            // Where master and weight are one tensor this writes the same values again.
            slot.master.copy_(&tensors[&format!("weight/{}", table.spec(slot.id).name)]);
        }
        Ok(())
    }
}

fn find<'a>(path: &Path, tensors: &'a HashMap<String, Tensor>, name: &str, shape: &[i64]) -> Result<&'a Tensor> {
    let tensor = tensors.get(name).with_context(|| format!("{} holds no {name}", path.display()))?;
    ensure!(tensor.size() == shape, "{}: {name} is {:?}, the model's is {shape:?}", path.display(), tensor.size());
    Ok(tensor)
}
