//! Where a rank computes: the CPU, or a GPU of its host, found and opened at the start.
use crate::config::{DeviceChoice, RunConfig};
use crate::coordinator::{all_or_none, nodes, shared};
use anyhow::{Result, bail};
use kernels::Precision;
use kernels::device::{self, Found, Options};
use kernels::ops::gemm_fp8;
use parallel::comm::nccl::{self, Hold};
use parallel::comm::{Comm, Communicator, gather_bytes};
use parallel::mesh::{Mesh, Transport};
use std::path::{Path, PathBuf};
use tch::Device;

/// Collective. A launcher may show each rank of a host, or each group of them, another GPU first: then that is its own. Those
/// that are shown the same one take the GPUs in turn, and share them where they are more. Opening again is free.
pub fn open(config: &RunConfig, world: &dyn Communicator) -> Result<Device> {
    if config.run.device == DeviceChoice::Cpu {
        return Ok(Device::Cpu);
    }
    let (nodes, first) = (nodes(world)?, gather_bytes(world, device::bus_id(0).unwrap_or_default().as_bytes())?);
    let mine = world.rank();
    let local_rank = (0..mine).filter(|&rank| nodes[rank] == nodes[mine] && first[rank] == first[mine]).count();
    let nccl_carries = world.size() > 1 && match (config.parallel.transport, config.parallel.ranks_per_node) {
        (Transport::Peer, 0) => nodes.iter().any(|&host| host != nodes[0]),
        (Transport::Peer, ranks) => ranks < world.size(),
        (Transport::Nccl, _) => true,
        (Transport::Staged, _) => false,
    };
    let spared_sms = if nccl_carries { config.parallel.comm_sms } else { 0 };
    let options = Options { local_rank, torch_cuda: None, nvrtc_folder: None, kernel_cache: kernel_cache(&config.run.dir), spared_sms };
    all_or_none(world, open_here(&options, config.run.precision))
}

fn open_here(options: &Options, precision: Precision) -> Result<Device> {
    match device::open(options)? {
        Found::Gpu(gpu) => {
            if precision == Precision::Fp8 {
                gemm_fp8::load_all(gpu)?;
            }
            Ok(gpu.device())
        }
        Found::Cpu(why) => bail!("run.device = \"cuda\": {why}"),
    }
}

/// The world that carries this run's tensors: over GPUs what `parallel.transport` says, else `world` itself, which goes on
/// carrying what lies in host memory. Collective. Over NCCL nothing is given back while `hold` is held.
pub fn connect(config: &RunConfig, mesh: &Mesh, world: Comm, hold: &Hold) -> Result<Comm> {
    let Device::Cuda(device) = open(config, &*world)? else { return Ok(world) };
    let transport = config.parallel.transport;
    if world.size() == 1 || transport == Transport::Staged {
        return Ok(world);
    }
    let host = nodes(&*world)?[world.rank()];
    let mine = format!("{host} {}", device::bus_id(device).unwrap_or_default());
    let mut gpus = gather_bytes(&*world, mine.as_bytes())?;
    gpus.sort_unstable();
    gpus.dedup();
    if gpus.len() < world.size() {
        if transport == Transport::Nccl {
            return Err(shared(format!("parallel.transport = \"nccl\": {} ranks share {} GPU(s)", world.size(), gpus.len())));
        }
        if world.rank() == 0 {
            tracing::info!("{} ranks share {} GPU(s): their tensors travel through host memory", world.size(), gpus.len());
        }
        return Ok(world);
    }
    // A host may stand for several nodes, but no node's ranks reach each other's memory from host to host.
    let node = host * world.size() + mesh.nodes[world.rank()];
    let max_ctas = (config.parallel.comm_sms > 0).then_some(config.parallel.comm_sms as i32);
    let (peers, rank, hold) = (transport == Transport::Peer, world.rank(), hold.clone());
    let options = nccl::Options { device, node, peers, max_ctas, rank, hold, ..Default::default() };
    Ok(nccl::connect(world, &options)?)
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
