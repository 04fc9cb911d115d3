//! Where a rank computes: the CPU, or a GPU of its host, found and opened at the start.
use crate::config::{DeviceChoice, RunConfig};
use crate::coordinator::{all_or_none, nodes};
use anyhow::{Result, bail};
use kernels::device::{self, Found, Options};
use parallel::comm::Communicator;
use std::path::{Path, PathBuf};
use tch::Device;

/// Collective. The ranks of a host take its GPUs in turn, and share them where they are more. Opening again is free.
pub fn open(config: &RunConfig, world: &dyn Communicator) -> Result<Device> {
    if config.run.device == DeviceChoice::Cpu {
        return Ok(Device::Cpu);
    }
    let nodes = nodes(world)?;
    let local_rank = nodes[..world.rank()].iter().filter(|&&node| node == nodes[world.rank()]).count();
    let options = Options { local_rank, torch_cuda: None, nvrtc_folder: None, kernel_cache: kernel_cache(&config.run.dir) };
    all_or_none(world, open_here(&options))
}

fn open_here(options: &Options) -> Result<Device> {
    match device::open(options)? {
        Found::Gpu(gpu) => Ok(gpu.device()),
        Found::Cpu(why) => bail!("run.device = \"cuda\": {why}"),
    }
}

/// Compiled kernels, beside the run directories: one folder for all runs.
fn kernel_cache(run_dir: &Path) -> PathBuf {
    run_dir.parent().unwrap_or(Path::new("")).join(".kernels")
}

/// For people and the layout: `cpu`, `cuda:0 NVIDIA H100 80GB HBM3`.
pub fn describe(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index} {}", device::gpu(device).name()),
        _ => "cpu".into(),
    }
}
