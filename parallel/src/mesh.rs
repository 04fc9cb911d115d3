//! How the ranks of a run are laid out: degrees of pipeline, data and expert parallelism, and nodes.
//! DeepSeek-V3 §3.2. Invariant: rank = stage place × dp + data place, and expert place = data place mod ep; so the
//! ranks that exchange tokens are neighbours, on as few nodes as there can be.
//!
//! Legend: pp ranks of a pipe, dp pipes, ep ranks that share out the experts of a stage (ep divides dp).

use crate::comm::{Comm, CommError, TensorSpec};
use crate::dispatch::ExpertGroup;
use crate::schedule::{Schedule, ScheduleError};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

/// `[parallel]` of a run's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ParallelConfig {
    /// Ranks of a pipe.
    pub pp: usize,
    /// Pipes; 0: as many as the world has room for.
    pub dp: usize,
    /// Ranks that share out the experts of a stage; divides dp.
    pub ep: usize,
    /// Ranks that count as one node; 0: as the hosts really are.
    pub ranks_per_node: usize,
    pub schedule: Schedule,
    /// Layers of each stage, first to last; empty: as even as can be.
    pub layers: Vec<i64>,
    pub transport: Transport,
    /// Multiprocessors that NCCL's transfers of a group may take at a time and FP8 GEMMs, which run one block on each for as long
    /// as they last, leave to them (20 in the report, §3.2.2; NCCL rounds up to a power of two); 0: NCCL takes what it likes, and
    /// a GEMM waits for what is taken. Without effect where nothing goes over NCCL.
    pub comm_sms: usize,
}

/// What carries tensors between GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Copy engines into each other's memory between GPUs of one host that can, NCCL between others; and as `Staged`
    /// where ranks share a GPU.
    #[default]
    Peer,
    /// NCCL alone.
    Nccl,
    /// MPI, through host memory: slow, and works everywhere.
    Staged,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        ParallelConfig { pp: 1, dp: 0, ep: 1, ranks_per_node: 0, schedule: Schedule::OneFOneB, layers: Vec::new(), transport: Transport::Peer, comm_sms: 0 }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MeshError {
    #[error("parallel.{0} is 0, it must be at least 1")]
    Zero(&'static str),
    #[error("world size {world} ≠ pp {pp} × dp {dp} = {product}")]
    Product { world: usize, pp: usize, dp: usize, product: usize },
    #[error("world size {world} does not divide by pp {pp}, so dp cannot be derived")]
    Underivable { world: usize, pp: usize },
    #[error("dp {dp} does not divide by ep {ep} (world size {world}, pp {pp})")]
    Experts { dp: usize, ep: usize, world: usize, pp: usize },
    #[error("world size {world} does not divide by ranks_per_node {ranks_per_node}")]
    Nodes { world: usize, ranks_per_node: usize },
    #[error("parallel.comm_sms is {0}: 0, or a power of two from 2 to 64")]
    CommSms(usize),
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
}

/// Where a rank stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// In its pipe, 0..pp; the stage of direction 0.
    pub pp: usize,
    /// Which pipe, 0..dp.
    pub dp: usize,
    /// Which share of the experts, 0..ep.
    pub ep: usize,
}

/// A valid layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    pub pp: usize,
    pub dp: usize,
    pub ep: usize,
    pub schedule: Schedule,
    /// The node of every rank of the world, numbered from 0.
    pub nodes: Vec<usize>,
}

impl ParallelConfig {
    /// `nodes`: the node of every rank as the hosts are (`MpiWorld::nodes`; all 0 for threads); its length is the
    /// world's size. `ranks_per_node` overrides it, so that one host can stand for several.
    pub fn validate(&self, nodes: &[usize]) -> Result<Mesh, MeshError> {
        let ParallelConfig { pp, ep, ranks_per_node, schedule, .. } = *self;
        let world = nodes.len();
        for (name, value) in [("pp", pp), ("ep", ep)] {
            if value == 0 {
                return Err(MeshError::Zero(name));
            }
        }
        if ![0, 2, 4, 8, 16, 32, 64].contains(&self.comm_sms) {
            return Err(MeshError::CommSms(self.comm_sms));
        }
        let dp = match self.dp {
            0 if !world.is_multiple_of(pp) || world == 0 => return Err(MeshError::Underivable { world, pp }),
            0 => world / pp,
            dp => dp,
        };
        if pp * dp != world {
            return Err(MeshError::Product { world, pp, dp, product: pp * dp });
        }
        if !dp.is_multiple_of(ep) {
            return Err(MeshError::Experts { dp, ep, world, pp });
        }
        if ranks_per_node > 0 && !world.is_multiple_of(ranks_per_node) {
            return Err(MeshError::Nodes { world, ranks_per_node });
        }
        // What the number of micro-batches may be, each step of the run must see to (`Schedule::for_step`).
        schedule.validate(pp, 2 * pp)?;
        let nodes = match ranks_per_node {
            0 => nodes.to_vec(),
            per_node => (0..world).map(|rank| rank / per_node).collect(),
        };
        Ok(Mesh { pp, dp, ep, schedule, nodes })
    }
}

impl Mesh {
    /// One rank, no parallelism.
    pub fn single() -> Self {
        Mesh { pp: 1, dp: 1, ep: 1, schedule: Schedule::OneFOneB, nodes: vec![0] }
    }

    pub fn world_size(&self) -> usize {
        self.pp * self.dp
    }

    pub fn place(&self, rank: usize) -> Place {
        assert!(rank < self.world_size(), "rank {rank} of {}", self.world_size());
        let dp = rank % self.dp;
        Place { pp: rank / self.dp, dp, ep: dp % self.ep }
    }

    /// The inverse of `place`; `place.ep` follows from `place.dp`.
    pub fn rank(&self, place: Place) -> usize {
        place.pp * self.dp + place.dp
    }

    /// Copies of every stage within one pipe: 2 under DualPipe.
    pub fn num_copies(&self) -> usize {
        self.schedule.num_directions()
    }

    /// The ranks that hold the same stages as this one, at whatever place of the pipe: under DualPipe the
    /// mirror place holds them too.
    fn stage_group(&self, place: Place) -> usize {
        if self.num_copies() == 2 { place.pp.min(self.pp - 1 - place.pp) } else { place.pp }
    }

    /// The node of each rank of `rank`'s expert group, in the group's order.
    pub fn expert_nodes(&self, rank: usize) -> Vec<usize> {
        let Place { pp, dp, ep } = self.place(rank);
        (0..self.ep).map(|e| self.nodes[pp * self.dp + dp - ep + e]).collect()
    }
}

/// This rank's communicators, one an axis.
pub struct Groups {
    pub world: Comm,
    /// The ranks of this pipe, in order of stage (direction 0).
    pub pipe: Comm,
    /// Everyone with this rank's dense parameters: their gradients are summed here. Under DualPipe 2 × dp, the
    /// mirror ranks last.
    pub data: Comm,
    /// Everyone with the embedding: the first stage and, for MTP, the last. Meaningless on the stages between. `data` itself
    /// where it is the same ranks (under DualPipe they hold both stages): what goes over one communicator keeps its order.
    pub embedding: Comm,
    /// The ranks among which this stage's experts are shared out; tokens travel here.
    pub expert: ExpertGroup,
    /// Everyone with this rank's experts. Under DualPipe 2 × dp / ep. `data` itself where ep is 1.
    pub expert_data: Comm,
}

impl Groups {
    /// Collective over `world`, whose size must be the mesh's. `mtp`: the last stage holds the embedding, too.
    pub fn new(world: Comm, mesh: &Mesh, mtp: bool) -> Result<Self, CommError> {
        assert_eq!(world.size(), mesh.world_size(), "the mesh is made for another world");
        let rank = world.rank();
        let place = mesh.place(rank);
        let stages = mesh.stage_group(place);
        let data = world.split(stages, rank)?;
        let last = place.pp + 1 == mesh.pp;
        Ok(Groups {
            pipe: world.split(place.dp, place.pp)?,
            embedding: if mtp && mesh.pp > 1 && mesh.num_copies() == 1 { world.split(if last { 0 } else { stages }, rank)? } else { data.clone() },
            expert: ExpertGroup::new(world.split(rank / mesh.ep, rank)?, &mesh.expert_nodes(rank))?,
            expert_data: if mesh.ep > 1 { world.split(stages * mesh.ep + place.ep, rank)? } else { data.clone() },
            data,
            world,
        })
    }

    /// A byte each way between neighbours of a pipe. NCCL connects at the first message, and there the host waits for the
    /// other's: in a step of fewer micro-batches than stages that one may first wait for a message of this host's.
    pub fn meet(&self, device: Device) -> Result<(), CommError> {
        let (rank, byte) = (self.pipe.rank(), Tensor::ones([1], (Kind::Uint8, device)));
        let neighbours = || (0..self.pipe.size()).filter(move |other| other.abs_diff(rank) == 1);
        let sends = neighbours().map(|other| (other, byte.shallow_clone())).collect();
        let receives = neighbours().map(|other| (other, TensorSpec { shape: vec![1], kind: Kind::Uint8, device })).collect();
        self.pipe.exchange(sends, receives)?.wait().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::counted::counted;
    use crate::comm::local::run_local;
    use std::rc::Rc;
    use tch::Tensor;

    fn config(pp: usize, dp: usize, ep: usize) -> ParallelConfig {
        ParallelConfig { pp, dp, ep, ..Default::default() }
    }

    /// World ranks of a group, as its members see it.
    fn members(world: &Comm, group: &Comm) -> Vec<i64> {
        let all = group.all_gather(vec![Tensor::from_slice(&[world.rank() as i64])]).unwrap().wait().unwrap();
        Vec::try_from(&all[0]).unwrap()
    }

    #[test]
    fn errors_carry_all_numbers() {
        let message = |config: ParallelConfig, world: usize| config.validate(&vec![0; world]).unwrap_err().to_string();
        assert_eq!(message(config(2, 4, 1), 6), "world size 6 ≠ pp 2 × dp 4 = 8");
        assert_eq!(message(config(4, 0, 1), 6), "world size 6 does not divide by pp 4, so dp cannot be derived");
        assert_eq!(message(config(2, 3, 2), 6), "dp 3 does not divide by ep 2 (world size 6, pp 2)");
        assert_eq!(message(config(0, 3, 2), 6), "parallel.pp is 0, it must be at least 1");
        assert_eq!(message(ParallelConfig { ranks_per_node: 4, ..config(1, 6, 1) }, 6), "world size 6 does not divide by ranks_per_node 4");
        for comm_sms in [1, 20, 128] {
            let told = format!("parallel.comm_sms is {comm_sms}: 0, or a power of two from 2 to 64");
            assert_eq!(message(ParallelConfig { comm_sms, ..config(1, 6, 1) }, 6), told);
        }
        let dual = ParallelConfig { schedule: Schedule::DualPipe, ..config(3, 1, 1) };
        assert_eq!(
            message(dual, 3),
            "schedule dualpipe cannot run 6 micro-batches on 3 pipeline ranks: the number of ranks must be even"
        );
    }

    #[test]
    fn the_config_reads_toml_names_and_refuses_unknown_ones() {
        let read: ParallelConfig = serde_json::from_str(r#"{"pp": 2, "ep": 2, "schedule": "zb1p", "layers": [1, 2]}"#).unwrap();
        assert_eq!(read, ParallelConfig { schedule: Schedule::Zb1p, layers: vec![1, 2], ..config(2, 0, 2) });
        assert_eq!(serde_json::from_str::<ParallelConfig>("{}").unwrap(), ParallelConfig::default());
        assert!(serde_json::from_str::<ParallelConfig>(r#"{"tp": 2}"#).unwrap_err().to_string().contains("tp"));
    }

    #[test]
    fn places_and_ranks_are_inverse() {
        for (pp, dp, ep) in [(1, 1, 1), (2, 4, 2), (4, 6, 3), (3, 2, 1)] {
            let mesh = config(pp, dp, ep).validate(&vec![0; pp * dp]).unwrap();
            for rank in 0..pp * dp {
                let place = mesh.place(rank);
                assert_eq!(mesh.rank(place), rank);
                assert!(place.pp < pp && place.dp < dp && place.ep == place.dp % ep);
            }
        }
    }

    #[test]
    fn groups_hold_the_ranks_they_name() {
        let mesh = ParallelConfig { ranks_per_node: 2, ..config(2, 0, 2) }.validate(&[0; 8]).unwrap();
        assert_eq!((mesh.dp, &mesh.nodes[..]), (4, &[0, 0, 1, 1, 2, 2, 3, 3][..]));
        run_local(8, |world| {
            let groups = Groups::new(world.clone(), &mesh, true).unwrap();
            let of = |group| members(&world, group);
            let (rank, stage, pair) = (world.rank() as i64, world.rank() as i64 / 4 * 4, world.rank() as i64 / 2 * 2);
            assert_eq!(of(&groups.pipe), [rank % 4, rank % 4 + 4]);
            assert_eq!(of(&groups.data), (stage..stage + 4).collect::<Vec<_>>());
            assert_eq!(of(&groups.embedding), (0..8).collect::<Vec<_>>());
            assert_eq!(of(&groups.expert.all), [pair, pair + 1]);
            assert_eq!(of(&groups.expert_data), [stage + rank % 2, stage + rank % 2 + 2]);
            assert_eq!(mesh.expert_nodes(world.rank()), [pair as usize / 2; 2]);
        });
    }

    #[test]
    fn neighbours_of_a_pipe_meet() {
        let mesh = config(3, 2, 1).validate(&[0; 6]).unwrap();
        run_local(6, |world| {
            let (world, sent) = counted(world, &[0; 6]);
            let groups = Groups::new(world, &mesh, false).unwrap();
            let before = sent.inside_bytes();
            groups.meet(Device::Cpu).unwrap();
            assert_eq!(sent.inside_bytes() - before, [1, 2, 1][groups.pipe.rank()]);
        });
        // Whoever has none.
        let mesh = config(1, 2, 1).validate(&[0; 2]).unwrap();
        run_local(2, |world| Groups::new(world, &mesh, false).unwrap().meet(Device::Cpu).unwrap());
    }

    #[test]
    fn groups_of_the_same_ranks_are_one_communicator() {
        let plain = Schedule::OneFOneB;
        for (pp, ep, schedule, mtp, embedding, experts) in [
            (1, 1, plain, true, true, true),
            (1, 2, plain, true, true, false),
            (2, 1, plain, true, false, true),
            (2, 2, plain, false, true, false),
            (4, 1, Schedule::DualPipe, true, true, true),
        ] {
            let mesh = ParallelConfig { schedule, ..config(pp, 2, ep) }.validate(&vec![0; 2 * pp]).unwrap();
            run_local(2 * pp, |world| {
                let groups = Groups::new(world, &mesh, mtp).unwrap();
                let is_data = |group| Rc::ptr_eq(group, &groups.data);
                assert_eq!((is_data(&groups.embedding), is_data(&groups.expert_data)), (embedding, experts), "pp {pp}, ep {ep}, {schedule}, MTP {mtp}");
            });
        }
    }

    #[test]
    fn under_dualpipe_the_mirror_rank_shares_parameters() {
        let mesh = ParallelConfig { schedule: Schedule::DualPipe, ..config(4, 2, 2) }.validate(&[0; 8]).unwrap();
        run_local(8, |world| {
            let groups = Groups::new(world.clone(), &mesh, true).unwrap();
            let place = mesh.place(world.rank());
            let (low, high) = (place.pp.min(3 - place.pp) as i64 * 2, place.pp.max(3 - place.pp) as i64 * 2);
            assert_eq!(members(&world, &groups.data), [low, low + 1, high, high + 1]);
            assert_eq!(members(&world, &groups.expert_data), [low + place.ep as i64, high + place.ep as i64]);
            assert_eq!(members(&world, &groups.expert.all), [place.pp as i64 * 2, place.pp as i64 * 2 + 1]);
        });
    }
}
