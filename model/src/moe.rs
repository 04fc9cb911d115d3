//! DeepSeekMoE (report §2.1.2): shared experts for every token, routed experts for those the gate sends. No token
//! is ever dropped. Each direction is three segments with a transfer under way between them; whoever calls may run
//! another micro-batch's segment meanwhile.
//!
//! Legend: T tokens, D hidden size, K experts a token, R rows routed here.
use crate::block::BlockContext;
use crate::experts::{Experts, ExpertsSaved, ExpertsWork, Routed};
use crate::flow::{Other, event};
use crate::gate::{Gate, GateGrad, GateIn, GateSaved, GateWork};
use crate::mlp::{Mlp, MlpGrad, MlpHalf, MlpWork};
use crate::operand::{Operand, RowCounts};
use crate::saved::See;
use crate::swiglu::SwigluSaved;
use crate::{Grads, Layer, ModelConfig, ParamTable, Weights};
use parallel::comm::{CommError, Pending};
use kernels::ops::quantise::Want;
use parallel::dispatch::{Counted, DispatchGrad, Dispatched, Outgoing, Plan, Returned, Rows};
use tch::Tensor;

#[derive(Debug)]
pub struct Moe {
    pub gate: Gate,
    experts: Experts,
    shared: Option<Mlp>,
}

pub struct MoeSaved {
    gate: GateSaved,
    plan: Plan,
    experts: ExpertsSaved,
    shared: Option<SwigluSaved>,
}

impl MoeSaved {
    pub(crate) fn each(&self, see: See) {
        self.gate.each(see);
        self.plan.tensors().into_iter().for_each(|tensor| see("routes", tensor));
        self.experts.each(see);
        self.shared.iter().for_each(|shared| shared.each("shared experts' gate and up", see));
    }
}

/// Forward, rows to go to the experts: their counts are on the way, then they are.
pub struct MoeDispatched {
    gate: GateSaved,
    load: Load,
    way: Option<Way>,
}

enum Way {
    /// The counts are on their way to the host.
    Counted { counted: Counted, outgoing: Outgoing, shared: Option<Shared> },
    /// `gate_up`: the shared experts', [T, 2I].
    Sent { plan: Plan, rows: Pending<Dispatched>, gate_up: Option<Tensor> },
}

/// The shared experts, before half of them or after: what they read, or their gate and up, [T, 2I].
enum Shared {
    In(Operand),
    GateUp(Tensor),
}

/// Forward, what the experts made on its way back.
pub struct MoeCombining {
    rows: Pending<Returned>,
    shared: Option<Tensor>,
    load: Load,
    saved: MoeSaved,
}

/// Backward, the output's gradient on its way to the experts.
pub struct MoeBackDispatched {
    x: Tensor,
    shared: Option<MlpHalf>,
    drows: Pending<Rows>,
    gate: GateSaved,
    plan: Plan,
    experts: ExpertsSaved,
}

/// Backward, the input's gradient on its way back.
pub struct MoeBackCombining {
    x: Tensor,
    dx: Pending<DispatchGrad>,
    half: Option<MlpHalf>,
    shared: Option<(Tensor, MlpWork)>,
    gate: GateSaved,
}

/// A transfer that may have another hop to go.
pub trait UnderWay {
    /// Posts the next hop; false: there is none.
    fn onward(&mut self) -> Result<bool, CommError>;
}

impl UnderWay for MoeCombining {
    fn onward(&mut self) -> Result<bool, CommError> {
        self.rows.advance()
    }
}

impl UnderWay for MoeBackDispatched {
    fn onward(&mut self) -> Result<bool, CommError> {
        self.drows.advance()
    }
}

impl UnderWay for MoeBackCombining {
    fn onward(&mut self) -> Result<bool, CommError> {
        self.dx.advance()
    }
}

/// All but the routed experts', which come a segment earlier.
pub struct MoeWork {
    gate: GateWork,
    shared: Option<MlpWork>,
}

impl MoeWork {
    pub(crate) fn each(&self, see: See) {
        self.gate.each(see);
        self.shared.iter().flatten().for_each(|linear| linear.each(see));
    }
}

/// What the router did with this micro-batch.
pub struct Load {
    pub counts: Tensor,  // [E] i64
    pub balance: Tensor, // one number, without α
}

impl Moe {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, prefix: &str) -> Self {
        let shared = config.n_shared_experts * config.moe_intermediate_size;
        // In the order in which a forward reads them, and a backward completes their gradients, the other way round.
        let gate = Gate::new(table, config, &format!("{prefix}.gate"));
        let shared = (shared > 0).then(|| Mlp::new(table, config, &format!("{prefix}.shared_experts"), shared));
        Moe { gate, shared, experts: Experts::new(table, config, &format!("{prefix}.experts")) }
    }

    /// x [T, D]: the caller keeps it, or makes it again, for the backward.
    pub fn dispatch(&self, w: &Weights, x: Tensor, context: &BlockContext) -> MoeDispatched {
        let gate_in = GateIn { x: x.shallow_clone(), sequences: context.sequences, balance_scale: context.balance_scale };
        let count = |routes: &Tensor| Counted::start(routes, self.gate.experts(), &context.experts);
        let (routing, gate, counted) = self.gate.forward_then(w, gate_in, count);
        if tracing::enabled!(target: "routes", tracing::Level::TRACE) {
            let routes = Vec::<i64>::try_from(routing.routes.flatten(0, -1)).expect("i64 routes");
            tracing::trace!(target: "routes", ?routes);
        }
        // Packed and quantised while the counts are on their way to the host.
        let outgoing = counted.pack(&x, &routing.weights);
        let shared = self.shared.as_ref().map(|shared| {
            let x = Operand::new(w, x, Want::ROWS, &[shared.gate_up.weight]);
            // One half hides the host's way to the counts where that is the longer one, else the rows' way, the other the results'
            // way back.
            if context.experts.near() { Shared::GateUp(shared.forward_up(w, x)) } else { Shared::In(x) }
        });
        let load = Load { counts: routing.counts, balance: routing.balance };
        MoeDispatched { gate, load, way: Some(Way::Counted { counted, outgoing, shared }) }
    }

    /// Posts the first hop, or the next; whether that was one after the first. For the first, hosts agree on counts: the GPU
    /// is better given other work before.
    pub fn onward(&self, w: &Weights, state: &mut MoeDispatched) -> Result<bool, CommError> {
        let (way, next) = match state.way.take().expect("there between calls") {
            Way::Counted { counted, outgoing, mut shared } => {
                event("forward", "counts");
                let (plan, mut gate_up) = (counted.plan()?, None);
                let mut up = || {
                    gate_up = self.shared.as_ref().zip(shared.take()).map(|(mlp, shared)| match shared {
                        Shared::In(x) => mlp.forward_up(w, x),
                        Shared::GateUp(gate_up) => gate_up,
                    })
                };
                let rows = plan.send(outgoing, &mut up)?;
                event("forward", "send");
                (Way::Sent { plan, rows, gate_up }, false)
            }
            Way::Sent { plan, mut rows, gate_up } => {
                let next = rows.advance()?;
                (Way::Sent { plan, rows, gate_up }, next)
            }
        };
        state.way = Some(way);
        Ok(next)
    }

    /// The first hop, where nobody has posted it.
    pub fn send(&self, w: &Weights, state: &mut MoeDispatched) -> Result<(), CommError> {
        if let Some(Way::Counted { .. }) = state.way {
            self.onward(w, state)?;
        }
        Ok(())
    }

    pub fn compute(&self, w: &Weights, state: MoeDispatched, other: Other) -> Result<MoeCombining, CommError> {
        let MoeDispatched { gate, load, way: Some(Way::Sent { plan, rows, gate_up }) } = state else { panic!("rows are sent first") };
        assert_eq!(gate_up.is_some(), self.shared.is_some(), "shared experts began when rows were sent");
        other()?;
        event("forward", "wait");
        let Dispatched { rows, counts, weights } = rows.wait()?;
        let counts = RowCounts { host: plan.counts().to_vec(), device: counts };
        event("forward", "computes");
        let (rows, experts) = self.experts.forward(w, Routed { counts, rows, weights });
        let rows = plan.combine(&rows)?;
        event("forward", "send");
        let (out, shared) = self.shared.as_ref().zip(gate_up).map(|(shared, gate_up)| shared.forward_down(w, gate_up)).unzip();
        Ok(MoeCombining { rows, shared: out, load, saved: MoeSaved { gate, plan, experts, shared } })
    }

    /// `h` [T, D] + what the experts made of each token.
    pub fn combine(&self, state: MoeCombining, h: &Tensor) -> Result<(Tensor, Load, MoeSaved), CommError> {
        let add: Vec<&Tensor> = state.shared.iter().chain([h]).collect();
        Ok((state.rows.wait()?.sum(&add), state.load, state.saved))
    }

    /// The backward of combine is a dispatch. `x` is forward's.
    pub fn backward_dispatch(&self, w: &Weights, x: Tensor, dy: Tensor, saved: MoeSaved) -> Result<MoeBackDispatched, CommError> {
        let MoeSaved { gate, plan, experts, shared } = saved;
        let drows = plan.combine_backward(&dy)?;
        let shared = self.shared.as_ref().zip(shared).map(|(shared, saved)| {
            let x = Operand::new(w, x.shallow_clone(), Want::COLUMNS, &[shared.gate_up.weight]);
            shared.backward_project(w, MlpGrad { dy, x }, saved)
        });
        Ok(MoeBackDispatched { x, shared, drows, gate, plan, experts })
    }

    pub fn backward_compute(&self, w: &Weights, state: MoeBackDispatched) -> Result<(MoeBackCombining, ExpertsWork), CommError> {
        let MoeBackDispatched { x, shared, drows, gate, plan, experts } = state;
        event("backward", "wait");
        let (droutes, work) = self.experts.backward_input(w, drows.wait()?, experts);
        // The backward of dispatch is a combine.
        let dx = plan.dispatch_backward(&droutes.rows, &droutes.weights)?;
        event("backward", "send");
        Ok((MoeBackCombining { x, dx, half: shared, shared: None, gate }, work))
    }

    /// The rest of the shared experts', once, before `backward_combine`.
    pub fn backward_shared(&self, w: &Weights, state: &mut MoeBackCombining) {
        state.shared = self.shared.as_ref().zip(state.half.take()).map(|(shared, half)| shared.backward_activate(w, half));
    }

    pub fn backward_combine(&self, w: &Weights, state: MoeBackCombining) -> Result<(Tensor, MoeWork), CommError> {
        assert_eq!(state.shared.is_some(), self.shared.is_some(), "shared experts come first");
        let (dx_shared, shared) = state.shared.unzip();
        let DispatchGrad { x, weights: dweights } = state.dx.wait()?;
        let (dx_gate, gate) = self.gate.backward_input(w, GateGrad { dweights, x: state.x }, state.gate);
        let add: Vec<&Tensor> = dx_shared.iter().chain([&dx_gate]).collect();
        Ok((x.sum(&add), MoeWork { gate, shared }))
    }

    pub fn backward_experts(&self, work: ExpertsWork, grads: &mut Grads) {
        self.experts.backward_weight(work, grads);
    }

    pub fn backward_weight(&self, work: MoeWork, grads: &mut Grads) {
        if let Some((shared, work)) = self.shared.as_ref().zip(work.shared) {
            shared.backward_weight(work, grads);
        }
        self.gate.backward_weight(work.gate, grads);
    }
}
