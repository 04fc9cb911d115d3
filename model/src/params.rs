//! Parameters: one table of what there is, one store of weights and one of gradients a rank. A layer holds
//! `ParamId`s, so two layers may share a weight and nothing is borrowed twice.
//!
//! Invariant: gradients accumulate (`+=`), activations are assigned.
use crate::config::ModelConfig;
use crate::gemms::Gemms;
use crate::recompute::Recompute;
use crate::sentinel::Sentinel;
use kernels::Precision;
use kernels::fp8::{Blocks, ScaleRule};
use kernels::ops::{linear, normal, quantise};
use parallel::comm::CommError;
use std::cell::OnceCell;
use std::ops::Range;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(pub usize);

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    Normal { std: f64 },
    Ones,
    Zeros,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A matrix: compute kind, decayed.
    Matrix,
    /// A stack of local experts' matrices, [E, O, I].
    Experts,
    /// The token embedding: a matrix that the first and the last stage (for MTP) may both hold.
    Embedding,
    /// A norm's vector: not decayed.
    Norm,
    /// The gate's matrix: never below FP32.
    Gate,
    /// The expert bias: FP32, no gradient, moved by its own rule.
    Bias,
}

#[derive(Clone, Debug)]
pub struct ParamSpec {
    /// The released names, experts packed: `model.layers.3.mlp.experts.gate_up_proj.weight`.
    pub name: String,
    /// Of this rank's part.
    pub shape: Vec<i64>,
    pub init: Init,
    pub role: Role,
    /// Where this rank's part starts in dim 0 of the whole tensor, and that dim's size.
    pub start: i64,
    pub total: i64,
}

/// Which of the experts a rank holds: the `rank`-th of `ranks` equal shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertShare {
    pub rank: i64,
    pub ranks: i64,
    /// No other rank holds it: while dense gradients travel, the experts' stay.
    pub stays: bool,
}

impl Default for ExpertShare {
    fn default() -> Self {
        ExpertShare { rank: 0, ranks: 1, stays: false }
    }
}

impl ParamSpec {
    pub fn trained(&self) -> bool {
        self.role != Role::Bias
    }
    pub fn decayed(&self) -> bool {
        matches!(self.role, Role::Matrix | Role::Experts | Role::Embedding | Role::Gate)
    }
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }
    /// The kind the layers compute with.
    pub fn kind(&self, precision: Precision) -> Kind {
        match self.role {
            Role::Gate | Role::Bias => precision.master(),
            _ => precision.compute(),
        }
    }

    /// The shape of the whole, logical tensor.
    pub fn whole_shape(&self) -> Vec<i64> {
        let mut shape = self.shape.clone();
        shape[0] = self.total;
        shape
    }

    /// The values of `seed`: a function of (seed, name, index) alone, so no layout and no order changes them.
    pub fn initial(&self, seed: u64, kind: Kind, device: Device) -> Tensor {
        let options = (kind, device);
        match self.init {
            Init::Ones => Tensor::ones(&self.shape, options),
            Init::Zeros => Tensor::zeros(&self.shape, options),
            Init::Normal { std } => {
                let first = self.start * self.shape[1..].iter().product::<i64>();
                normal::draw(normal::key(seed, &self.name), first as u64, self.numel(), std, device).view(&self.shape[..]).to_kind(kind)
            }
        }
    }
}

/// Every parameter of this rank, in model order.
#[derive(Debug, Default)]
pub struct ParamTable {
    specs: Vec<ParamSpec>,
    pub(crate) share: ExpertShare,
    pub(crate) recompute: Recompute,
    /// The parameter of every layer declared since `take_uses`, shared ones once a layer.
    uses: Vec<ParamId>,
    /// Those whose gradient is complete before that of the other, declared later, and of all between them.
    early: Vec<(ParamId, ParamId)>,
    /// Those whose gradient is complete right after that of the other, declared earlier.
    late: Vec<(ParamId, ParamId)>,
}

impl ParamTable {
    /// A table for a rank with this share of every layer's experts, whose layers make these things again in backward.
    pub fn new(share: ExpertShare, recompute: Recompute) -> Self {
        ParamTable { share, recompute, ..Default::default() }
    }
    /// This rank's part of a stack of all experts' matrices, `shape` [E, O, I].
    pub fn experts(&mut self, name: impl Into<String>, shape: &[i64], config: &ModelConfig) -> ParamId {
        let local = shape[0] / self.share.ranks;
        assert_eq!(local * self.share.ranks, shape[0], "experts are shared out evenly");
        let id = self.add(name, &[local, shape[1], shape[2]], Init::Normal { std: config.initializer_range }, Role::Experts);
        let spec = &mut self.specs[id.0];
        (spec.start, spec.total) = (local * self.share.rank, shape[0]);
        id
    }
    pub fn add(&mut self, name: impl Into<String>, shape: &[i64], init: Init, role: Role) -> ParamId {
        let name = name.into();
        assert!(self.specs.iter().all(|spec| spec.name != name), "parameter {name} was declared twice");
        self.specs.push(ParamSpec { name, shape: shape.to_vec(), init, role, start: 0, total: shape[0] });
        self.share(ParamId(self.specs.len() - 1))
    }
    /// One more layer computes with this parameter.
    pub fn share(&mut self, id: ParamId) -> ParamId {
        self.uses.push(id);
        id
    }
    /// [V, D], declared once a rank whichever stage asks first.
    pub fn embedding(&mut self, config: &ModelConfig) -> ParamId {
        let name = "model.embed_tokens.weight";
        match self.find(name) {
            Some(id) => self.share(id),
            None => self.add(name, &[config.vocab_size, config.hidden_size], Init::Normal { std: config.initializer_range }, Role::Embedding),
        }
    }
    /// The parameters that the layers declared since the last call compute with; a micro-batch's backward contributes to
    /// each as often as it is listed.
    pub fn take_uses(&mut self) -> Vec<ParamId> {
        std::mem::take(&mut self.uses)
    }
    pub fn matrix(&mut self, name: impl Into<String>, shape: &[i64], config: &ModelConfig) -> ParamId {
        self.add(name, shape, Init::Normal { std: config.initializer_range }, Role::Matrix)
    }
    pub fn norm(&mut self, name: impl Into<String>, width: i64) -> ParamId {
        self.add(name, &[width], Init::Ones, Role::Norm)
    }
    pub fn ids(&self) -> impl Iterator<Item = ParamId> + use<> {
        (0..self.specs.len()).map(ParamId)
    }
    /// The gradient of `id` is complete before that of `before` and of those declared between them.
    pub(crate) fn completes_before(&mut self, id: ParamId, before: ParamId) {
        self.early.push((id, before));
    }
    /// The gradient of `id` is complete after that of `after` and of those declared between them.
    pub(crate) fn completes_after(&mut self, id: ParamId, after: ParamId) {
        self.late.push((id, after));
    }
    /// In the order in which a backward completes their gradients: from the last to the first, but the embedding's, which
    /// comes before those that hide its way (`flow::Backward::held`), the head's, which comes before MTP's block, and those of
    /// experts that hide the last ones' way (`Stage::experts_last`).
    pub fn completed(&self) -> Vec<ParamId> {
        let mut ids: Vec<ParamId> = self.ids().collect();
        let mut moved = |id: &ParamId, beside: &ParamId, by: usize| {
            ids.retain(|other| other != id);
            let place = ids.iter().position(|other| other == beside).expect("a declared parameter");
            ids.insert(place + by, *id);
        };
        self.early.iter().for_each(|(id, before)| moved(id, before, 1));
        self.late.iter().for_each(|(id, after)| moved(id, after, 0));
        ids.reverse();
        ids
    }
    pub fn spec(&self, id: ParamId) -> &ParamSpec {
        &self.specs[id.0]
    }
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.specs.iter().position(|spec| spec.name == name).map(ParamId)
    }
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }
    pub fn numel(&self) -> i64 {
        self.specs.iter().map(ParamSpec::numel).sum()
    }
}

/// The weights the layers compute with, in the kinds of the run's precision.
pub struct Weights {
    pub table: Rc<ParamTable>,
    pub precision: Precision,
    tensors: Vec<Tensor>,
    /// FP8 runs: made when a step first asks, forgotten when the weight is written.
    blocks: Vec<OnceCell<WeightBlocks>>,
    arrivals: Vec<Arrival>,
    pub gemms: Rc<Gemms>,
    /// Of the step under way.
    pub sentinel: Rc<Sentinel>,
}

/// A linear's weight [O, I], or all experts' [E, O, I], in FP8 with 128 × 128 scales.
pub struct WeightBlocks {
    pub plain: Blocks,
    /// For Dgrad, which contracts over O.
    pub transposed: Blocks,
}

/// New values on their way into some weights.
struct Arrival {
    ids: Vec<ParamId>,
    land: Land,
}

type Land = Box<dyn FnOnce(&mut Weights) -> Result<(), CommError>>;

impl Weights {
    pub fn initial(table: Rc<ParamTable>, precision: Precision, seed: u64, device: Device) -> Self {
        let tensors = table.specs().iter().map(|spec| spec.initial(seed, spec.kind(precision), device)).collect();
        let blocks = table.specs().iter().map(|_| OnceCell::new()).collect();
        Weights { table, precision, tensors, blocks, arrivals: Vec::new(), gemms: Rc::default(), sentinel: Rc::default() }
    }
    /// To be read only; `write` is for the rest.
    pub fn get(&self, id: ParamId) -> &Tensor {
        &self.tensors[id.0]
    }
    /// Quantised once a step, however many micro-batches read it.
    pub fn blocks(&self, id: ParamId) -> &WeightBlocks {
        self.blocks[id.0].get_or_init(|| {
            let (plain, transposed) = quantise::weights(self.get(id), ScaleRule::Amax);
            WeightBlocks { plain, transposed }
        })
    }
    /// The weight, to be written in place.
    pub fn write(&mut self, id: ParamId) -> &Tensor {
        self.blocks[id.0].take();
        &self.tensors[id.0]
    }
    /// The weight, and its blocks where there are any: whoever asks writes all of both.
    pub fn write_whole(&mut self, id: ParamId) -> (&Tensor, Option<&WeightBlocks>) {
        (&self.tensors[id.0], self.blocks[id.0].get())
    }
    /// New values of `ids` are on their way; `land` waits for them and writes them.
    pub fn expect(&mut self, ids: Vec<ParamId>, land: impl FnOnce(&mut Weights) -> Result<(), CommError> + 'static) {
        self.arrivals.push(Arrival { ids, land: Box::new(land) });
    }
    /// Before the wanted weights are read: what is on its way to them has landed.
    pub fn ready(&mut self, wanted: impl Fn(ParamId) -> bool) -> Result<(), CommError> {
        while let Some(index) = self.arrivals.iter().position(|arrival| arrival.ids.iter().any(|&id| wanted(id))) {
            (self.arrivals.remove(index).land)(self)?;
        }
        Ok(())
    }
    /// Writes `value` (any kind, the spec's shape) over the weight.
    pub fn set(&mut self, id: ParamId, value: &Tensor) {
        assert_eq!(value.size(), self.table.spec(id).shape, "shape of {}", self.table.spec(id).name);
        self.write(id).shallow_clone().copy_(value);
    }
    pub fn device(&self) -> Device {
        self.tensors[0].device()
    }
    /// All that it holds, blocks too.
    pub fn bytes(&self) -> i64 {
        let of = |tensor: &Tensor| tensor.numel() as i64 * tensor.kind().elt_size_in_bytes() as i64;
        let blocks = self.blocks.iter().filter_map(OnceCell::get).flat_map(|both| [&both.plain, &both.transposed]);
        self.tensors.iter().map(of).sum::<i64>() + blocks.map(|blocks| of(&blocks.values) + of(&blocks.scales)).sum::<i64>()
    }
}

/// Takes a parameter's gradient when its last contribution is in, or the part of it that `leaving` asks for: to reduce it under the
/// rest of the backward.
pub trait GradSink {
    /// Where `leaving` named rows, only these are complete; the others may hold anything, and are to be read at the step's end.
    fn complete(&mut self, id: ParamId, gradient: Tensor);
    /// Of a last contribution that comes in parts, the rows that are to be made first, in rising order: others wait for them. None: all
    /// at once.
    fn leaving(&self, _: ParamId) -> Vec<Range<i64>> {
        Vec::new()
    }
}

/// Collects them as they come.
impl GradSink for Vec<(ParamId, Tensor)> {
    fn complete(&mut self, id: ParamId, gradient: Tensor) {
        self.push((id, gradient));
    }
}

/// The gradients of one step under way, in the masters' kind. A layer's `backward_weight` contributes exactly once to
/// each of its parameters; the last contribution hands the gradient to the sink, where that asks for it before it is all made.
pub struct Grads<'a> {
    kind: Kind,
    device: Device,
    table: Rc<ParamTable>,
    /// `None`: nothing has contributed yet.
    tensors: Vec<Option<Tensor>>,
    /// Contributions still to come.
    missing: Vec<usize>,
    /// Trained parameters that get none.
    unused: Vec<ParamId>,
    sink: &'a mut dyn GradSink,
    gemms: Rc<Gemms>,
    pub(crate) sentinel: Rc<Sentinel>,
}

impl<'a> Grads<'a> {
    /// `uses`: every contribution that this step will make, in any order. A trained parameter without any is zero, and
    /// complete at the end: the host may wait there for other ranks, who may be waiting for this one's forwards.
    pub fn new(weights: &Weights, uses: impl IntoIterator<Item = ParamId>, sink: &'a mut dyn GradSink) -> Self {
        let table = weights.table.clone();
        let mut missing = vec![0; table.specs().len()];
        uses.into_iter().for_each(|id| missing[id.0] += 1);
        let (kind, device, tensors) = (weights.precision.master(), weights.device(), missing.iter().map(|_| None).collect());
        let (gemms, sentinel) = (weights.gemms.clone(), weights.sentinel.clone());
        let unused = table.ids().filter(|&id| missing[id.0] == 0 && table.spec(id).trained()).collect();
        Grads { kind, device, tensors, table, missing, unused, sink, gemms, sentinel }
    }

    /// `contribute(gradient, fresh)` adds to the gradient, or where nothing is in it yet (`fresh`) assigns every value.
    pub fn accumulate(&mut self, id: ParamId, contribute: impl FnOnce(&mut Tensor, bool)) {
        let fresh = self.tensors[id.0].is_none();
        if fresh {
            self.tensors[id.0] = Some(self.empty(id));
        }
        contribute(self.tensors[id.0].as_mut().expect("made above"), fresh);
        self.contributed(id);
    }
    /// The same by a GEMM over operands of `operands`.
    pub fn accumulate_product(&mut self, id: ParamId, operands: Kind, contribute: impl FnOnce(&mut Tensor, bool)) {
        self.gemms.count(operands);
        self.accumulate(id, contribute);
    }
    /// The same by one product for each row of dim 0 (experts): `contribute` makes those that it is asked for. The sink has what is
    /// to leave before the rest is made.
    pub fn accumulate_products(&mut self, id: ParamId, operands: Kind, mut contribute: impl FnMut(&mut Tensor, bool, Range<i64>)) {
        let leaving = if self.missing[id.0] == 1 { self.sink.leaving(id) } else { Vec::new() };
        let all = 0..self.table.spec(id).shape[0];
        if leaving.is_empty() {
            return self.accumulate_product(id, operands, |gradient, fresh| contribute(gradient, fresh, all));
        }
        let mut whole = None;
        self.accumulate_product(id, operands, |gradient, fresh| {
            leaving.iter().for_each(|rows| contribute(gradient, fresh, rows.clone()));
            whole = Some((gradient.shallow_clone(), fresh));
        });
        let (mut gradient, fresh) = whole.expect("contributed");
        let ends = leaving.iter().map(|rows| rows.start).chain([all.end]);
        let stays = [all.start].into_iter().chain(leaving.iter().map(|rows| rows.end)).zip(ends).filter(|(start, end)| start < end);
        stays.for_each(|(start, end)| contribute(&mut gradient, fresh, start..end));
    }
    /// Room for a gradient, not written yet.
    pub(crate) fn empty(&self, id: ParamId) -> Tensor {
        Tensor::empty(&self.table.spec(id).shape, (self.kind, self.device))
    }
    /// gradient += dyᵀ · x. The first contribution assigns: no zeros are written to be read again.
    pub fn add_product(&mut self, id: ParamId, dy: &Tensor, x: &Tensor) {
        self.gemms.count(x.kind());
        match &mut self.tensors[id.0] {
            Some(gradient) => linear::backward_weight(dy, x, gradient),
            empty => *empty = Some(linear::weight_gradient(dy, x).to_kind(self.kind)),
        }
        self.contributed(id);
    }
    /// gradient += contribution, which is moved in where it is the first.
    pub fn add(&mut self, id: ParamId, contribution: Tensor) {
        let contribution = contribution.to_kind(self.kind);
        match &mut self.tensors[id.0] {
            Some(gradient) => drop(gradient.g_add_(&contribution)),
            empty => *empty = Some(contribution),
        }
        self.contributed(id);
    }

    fn contributed(&mut self, id: ParamId) {
        let missing = &mut self.missing[id.0];
        assert!(*missing > 0, "{} got a contribution that the step did not announce", self.table.spec(id).name);
        *missing -= 1;
        if *missing == 0 {
            let gradient = self.tensors[id.0].take().expect("something contributed");
            self.sink.complete(id, gradient);
        }
    }

    /// Ends the step: every announced contribution is in.
    pub fn finish(self) {
        for id in self.table.ids() {
            assert_eq!(self.missing[id.0], 0, "{} misses contributions", self.table.spec(id).name);
        }
        for id in self.unused {
            self.sink.complete(id, Tensor::zeros(&self.table.spec(id).shape, (self.kind, self.device)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_that_a_step_does_not_use_is_complete_at_its_end() {
        let mut table = ParamTable::default();
        let [used, unused] = ["used", "unused"].map(|name| table.add(name, &[2, 2], Init::Zeros, Role::Matrix));
        let weights = Weights::initial(Rc::new(table), Precision::F64, 1, Device::Cpu);
        let mut made: Vec<(ParamId, Tensor)> = Vec::new();
        let mut grads = Grads::new(&weights, [used], &mut made);
        grads.add(used, Tensor::ones([2, 2], (Kind::Double, Device::Cpu)));
        grads.finish();
        let sums: Vec<_> = made.iter().map(|(id, gradient)| (*id, gradient.sum(Kind::Double).double_value(&[]))).collect();
        assert_eq!(sums, [(used, 4.0), (unused, 0.0)]);
    }

    /// Asks for rows 1 and 3 of 5 first; what was there when it got the gradient.
    struct Waiting(Vec<f64>);
    impl GradSink for Waiting {
        fn complete(&mut self, _: ParamId, gradient: Tensor) {
            self.0 = Vec::try_from(gradient.view(-1)).expect("f64");
        }
        fn leaving(&self, _: ParamId) -> Vec<Range<i64>> {
            vec![1..2, 3..4]
        }
    }

    #[test]
    fn what_others_wait_for_is_made_first_and_handed_over_before_the_rest() {
        let mut table = ParamTable::default();
        let id = table.add("experts", &[5, 1], Init::Zeros, Role::Experts);
        let weights = Weights::initial(Rc::new(table), Precision::F64, 1, Device::Cpu);
        let (mut sink, mut asked) = (Waiting(Vec::new()), Vec::new());
        let mut grads = Grads::new(&weights, [id, id], &mut sink);
        let mut whole = Tensor::new();
        for value in [1.0, 10.0] {
            grads.accumulate_products(id, Kind::Double, |gradient, fresh, rows| {
                let mut rows_of = gradient.narrow(0, rows.start, rows.end - rows.start);
                let _ = if fresh { rows_of.fill_(value) } else { rows_of.g_add_scalar_(value) };
                asked.push(rows);
                whole = gradient.shallow_clone();
            });
        }
        grads.finish();
        assert_eq!(asked, [0..5, 1..2, 3..4, 0..1, 2..3, 4..5], "only a last contribution is made in parts");
        assert_eq!(sink.0, [1.0, 11.0, 1.0, 11.0, 1.0]);
        assert_eq!(Vec::<f64>::try_from(whole.view(-1)).expect("f64"), [11.0; 5]);
    }

    #[test]
    fn a_weight_is_quantised_once_until_it_is_written() {
        let mut table = ParamTable::default();
        let id = table.add("w", &[16, 32], Init::Normal { std: 0.5 }, Role::Matrix);
        let mut weights = Weights::initial(Rc::new(table), Precision::Fp8, 1, Device::Cpu);
        let value = |weights: &Weights| (weights.blocks(id).plain.values.data_ptr(), weights.blocks(id).plain.dequantise(Kind::Float));
        let (place, before) = value(&weights);
        assert_eq!(value(&weights).0, place, "made once for all micro-batches");
        weights.set(id, &(&before * 2.0));
        assert!(value(&weights).1.equal(&(before * 2.0)), "and again of the new values");
    }

    #[test]
    fn initial_values_depend_on_seed_and_name_and_look_normal() {
        let spec = |name: &str| ParamSpec { name: name.into(), shape: vec![100, 200], init: Init::Normal { std: 0.5 }, role: Role::Matrix, start: 0, total: 100 };
        let a = spec("a").initial(1, Kind::Double, Device::Cpu);
        assert!(a.equal(&spec("a").initial(1, Kind::Double, Device::Cpu)));
        assert!(!a.equal(&spec("a").initial(2, Kind::Double, Device::Cpu)));
        assert!(!a.equal(&spec("b").initial(1, Kind::Double, Device::Cpu)));
        let (mean, std) = (a.mean(Kind::Double).double_value(&[]), a.std(true).double_value(&[]));
        assert!(mean.abs() < 0.015 && (std - 0.5).abs() < 0.01, "mean {mean}, std {std}");
        let lag = (a.narrow(1, 0, 199) * a.narrow(1, 1, 199)).mean(Kind::Double).double_value(&[]);
        assert!(lag.abs() < 0.01, "neighbours correlate: {lag}");
        let part = ParamSpec { shape: vec![30, 200], start: 60, ..spec("a") };
        assert!(part.initial(1, Kind::Double, Device::Cpu).equal(&a.narrow(0, 60, 30)), "a part is a part of the whole");
    }
}
