//! What a run will need of each rank's memory, from its config alone, before anything is started.
use crate::config::{DeviceChoice, Moments, RunConfig};
use crate::phase::Plan;
use crate::pipeline::{LocalStages, parts};
use crate::zero::{BUCKET_BYTES, Share, shares};
use anyhow::Result;
use kernels::Precision;
use kernels::fp8::TILE;
use model::kept::{How, kept, put_off};
use model::params::{ParamSpec, Role};
use model::saved::{EXPERTS_ROWS, LOGITS};
use model::{ExpertShare, ParamTable, StagePart};
use parallel::mesh::{Mesh, Transport};
use parallel::schedule::Action;
use std::collections::BTreeSet;

/// Bytes, of the rank that needs most at one place of the pipe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// The layers of its stages: under DualPipe direction 0's, then direction 1's.
    pub layers: Vec<std::ops::Range<i64>>,
    pub parameters: i64,
    /// What layers compute with, and in FP8 runs its blocks.
    pub weights: i64,
    /// Of every parameter, in the masters' kind.
    pub gradients: i64,
    /// Its own share of masters, where they are not the weights themselves, and of moments.
    pub optimizer: i64,
    /// What others made of the gradients of its share, at the end of a backward.
    pub arriving: i64,
    pub activations: Kept,
    /// In the host's memory: its share of masters and moments, for a checkpoint's copy, and of averages.
    pub host: i64,
    /// What GPUs send each other lies in memory that torch never has: of what is kept, and of what arrives.
    apart: [bool; 2],
}

/// Most that is kept for backwards at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kept {
    pub bytes: i64,
    /// Of that the logits' gradients,
    pub logits: i64,
    /// and what came from other ranks, for forwards that are not yet gone back through.
    pub arrived: i64,
    /// How many micro-batches' forwards it is of,
    pub in_flight: i64,
    /// and of how many the weights' gradients that are put off.
    pub put_off: i64,
}

impl Need {
    /// At the worst moment: gradients arrive when next to nothing is kept any more.
    pub fn most(&self) -> i64 {
        let Kept { bytes, arrived, .. } = self.activations;
        let own = bytes - arrived;
        let beside = match self.apart {
            [true, true] => own + arrived.max(self.arriving),
            [true, false] => own.max(self.arriving) + arrived,
            [false, true] => bytes + self.arriving,
            [false, false] => bytes.max(self.arriving),
        };
        self.weights + self.gradients + self.optimizer + beside
    }
}

/// What differs from step to step: B and L of a micro-batch, and how many a pipe has.
type Shape = (i64, i64, usize);

/// By place in the pipe, of the steps after `tokens`. `load`: rows at a rank's experts over an even share.
pub fn needs(config: &RunConfig, mesh: &Mesh, load: f64, tokens: u64) -> Result<Vec<Need>> {
    let plan = Plan::new(&config.phase, &config.data.mixture);
    let shape = |phase: &crate::phase::Phase, batch: u64| {
        let micro_batches = batch / (phase.micro_batch * mesh.dp as u64);
        (phase.micro_batch as i64, phase.sequence_length as i64, micro_batches as usize)
    };
    let shapes: BTreeSet<Shape> = plan.stretches(tokens).map(|(moment, _)| shape(moment.phase, moment.batch)).collect();
    let parts = parts(&config.model, mesh.pp, &config.parallel.layers)?;
    (0..mesh.pp).map(|place| need((config, load), mesh, (place, &parts), &shapes)).collect()
}

fn need((config, load): (&RunConfig, f64), mesh: &Mesh, (place, parts): (usize, &[StagePart]), shapes: &BTreeSet<Shape>) -> Result<Need> {
    let (precision, rank) = (config.run.precision, place * mesh.dp);
    let stays = mesh.ep > 1 && holders(config, mesh, place, Role::Experts) == 1;
    let mut table = ParamTable::new(ExpertShare { rank: 0, ranks: mesh.ep as i64, stays }, config.recompute);
    LocalStages::new(&mut table, &config.model, parts, mesh, rank);
    let stages: Vec<&StagePart> = [place, mesh.pp - 1 - place][..mesh.num_copies()].iter().map(|&stage| &parts[stage]).collect();
    let master = precision.master().elt_size_in_bytes() as i64;
    let trained: i64 = table.specs().iter().filter(|spec| spec.trained()).map(ParamSpec::numel).sum();
    let shares = shares(&table, |role| holders(config, mesh, place, role), BUCKET_BYTES as i64 / master, |spec| state_bytes(config, spec));
    // A copy for checkpoints; the averages, the newest masters and the averages' copy.
    let on_host = master + 2 * moment_bytes(config) + if config.ema.decay > 0.0 { 3 * master } else { 0 };
    let by_copy_engine = config.run.device == DeviceChoice::Cuda && config.parallel.transport == Transport::Peer;
    let mut need = Need {
        layers: stages.iter().map(|part| part.layers.clone()).collect(),
        parameters: table.numel(),
        weights: table.specs().iter().map(|spec| weight_bytes(precision, spec)).sum(),
        gradients: trained * master,
        optimizer: most_owned(mesh, place, &shares, |share, _| share.state),
        apart: [mesh.ep > 1, near(mesh, place)].map(|near| near && by_copy_engine),
        host: most_owned(mesh, place, &shares, |share, _| share.elements * on_host),
        arriving: most_owned(mesh, place, &shares, |share, ranks| share.elements * (ranks as i64 - 1) * master),
        ..Default::default()
    };
    for &(sequences, length, micro_batches) in shapes {
        let how = How {
            precision,
            recompute: config.recompute,
            sequences,
            length,
            ep: mesh.ep as i64,
            on_gpu: config.run.device == DeviceChoice::Cuda,
            documents: config.attention.document_boundaries,
            load,
        };
        let of_stage = |part: &&StagePart| {
            let parts = kept(&config.model, part, how);
            let of = |name| parts.get(name).copied().unwrap_or(0);
            // In BF16 they are put in order, which is a copy.
            let arrived = if precision == Precision::Fp8 && mesh.ep > 1 { of(EXPERTS_ROWS) } else { 0 };
            PerMicroBatch { kept: parts.values().sum(), logits: of(LOGITS), arrived, put_off: put_off(&config.model, part, how) }
        };
        let of_stage: Vec<PerMicroBatch> = stages.iter().map(of_stage).collect();
        let schedule = mesh.schedule.for_step(mesh.pp, micro_batches);
        let most = most_kept(&schedule.actions(place, mesh.pp, micro_batches)?, &of_stage);
        if most.bytes > need.activations.bytes {
            need.activations = most;
        }
    }
    Ok(need)
}

/// What a stage keeps of one micro-batch, of that its logits and what came, and what a split backward puts off.
struct PerMicroBatch {
    kept: i64,
    logits: i64,
    arrived: i64,
    put_off: i64,
}

/// Most that is kept at one time; `of_stage` by direction.
fn most_kept(actions: &[Action], of_stage: &[PerMicroBatch]) -> Kept {
    let (mut now, mut most) = (Kept::default(), Kept::default());
    let forward = |now: &mut Kept, of: &PerMicroBatch| {
        (now.bytes, now.logits, now.arrived) = (now.bytes + of.kept, now.logits + of.logits, now.arrived + of.arrived);
        now.in_flight += 1;
    };
    let backward = |now: &mut Kept, of: &PerMicroBatch| {
        (now.bytes, now.logits, now.arrived) = (now.bytes - of.kept, now.logits - of.logits, now.arrived - of.arrived);
        now.in_flight -= 1;
    };
    for action in actions {
        match action {
            Action::Forward(chunk) => forward(&mut now, &of_stage[chunk.direction]),
            Action::Backward(chunk) => backward(&mut now, &of_stage[chunk.direction]),
            Action::BackwardInput(chunk) => {
                backward(&mut now, &of_stage[chunk.direction]);
                (now.bytes, now.put_off) = (now.bytes + of_stage[chunk.direction].put_off, now.put_off + 1);
            }
            Action::BackwardWeight(chunk) => {
                (now.bytes, now.put_off) = (now.bytes - of_stage[chunk.direction].put_off, now.put_off - 1);
            }
            Action::Pair { forward: first, backward: second } => {
                forward(&mut now, &of_stage[first.direction]);
                most = most.max(now);
                backward(&mut now, &of_stage[second.direction]);
            }
            Action::Exchange(_) => (),
        }
        most = most.max(now);
    }
    most
}

/// Is every group of this place that gradients cross on one host?
fn near(mesh: &Mesh, place: usize) -> bool {
    let places = [place, mesh.pp - 1 - place];
    let mut nodes = places[..mesh.num_copies()].iter().flat_map(|place| &mesh.nodes[place * mesh.dp..][..mesh.dp]);
    let first = nodes.next();
    nodes.all(|node| Some(node) == first)
}

/// Ranks that hold a parameter alike (`zero::holders`).
fn holders(config: &RunConfig, mesh: &Mesh, place: usize, role: Role) -> usize {
    let alike = mesh.dp * mesh.num_copies();
    let both_ends = mesh.pp > 1 && mesh.num_copies() == 1 && config.model.num_nextn_predict_layers == 1;
    match role {
        Role::Experts => alike / mesh.ep,
        Role::Embedding if both_ends && (place == 0 || place + 1 == mesh.pp) => 2 * alike,
        _ => alike,
    }
}

/// Most that `of` comes to on a rank of this place, over the groups that it is in, each with how many ranks it has. A group's ranks
/// are those of one place or of two, the lower one's first.
fn most_owned(mesh: &Mesh, place: usize, shares: &[Vec<Share>], of: impl Fn(&Share, usize) -> i64) -> i64 {
    let owned = |rank: usize| {
        let mine = |group: &Vec<Share>| {
            let places = if group.len() > mesh.dp || mesh.num_copies() == 2 { 2 } else { 1 };
            let here = group.len() / places;
            let first = if places == 2 && 2 * place >= mesh.pp { here } else { 0 };
            of(&group[first + rank * here / mesh.dp], group.len())
        };
        shares.iter().map(mine).sum::<i64>()
    };
    (0..mesh.dp).map(owned).max().unwrap_or(0)
}

/// Of an element of this rank's share: `optimizer::Slot`.
fn state_bytes(config: &RunConfig, spec: &ParamSpec) -> i64 {
    let master = config.run.precision.master();
    let own = if spec.kind(config.run.precision) == master { 0 } else { master.elt_size_in_bytes() as i64 };
    own + 2 * moment_bytes(config)
}

fn moment_bytes(config: &RunConfig) -> i64 {
    match config.optimizer.moments {
        Moments::F32 => config.run.precision.master().elt_size_in_bytes() as i64,
        Moments::Bf16 => 2,
    }
}

/// Of a parameter, and of its blocks where GEMMs read it in FP8: all matrices but the head's and MTP's projection.
pub(crate) fn weight_bytes(precision: Precision, spec: &ParamSpec) -> i64 {
    let plain = spec.numel() * spec.kind(precision).elt_size_in_bytes() as i64;
    let in_fp8 = match spec.role {
        Role::Experts => true,
        Role::Matrix => !spec.name.ends_with("lm_head.weight") && !spec.name.ends_with("eh_proj.weight"),
        _ => false,
    };
    if precision != Precision::Fp8 || !in_fp8 {
        return plain;
    }
    let scales: i64 = spec.shape.iter().rev().take(2).map(|&side| (side + TILE - 1) / TILE).product();
    let stack: i64 = spec.shape.iter().rev().skip(2).product();
    plain + 2 * (spec.numel() + 4 * scales * stack)
}
