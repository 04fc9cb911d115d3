//! DeepSeekMoE (report §2.1.2): shared experts for every token, routed experts for those the gate sends. No token
//! is ever dropped.
//!
//! Legend: T tokens, D hidden size, K experts a token, R rows routed here.
use crate::block::BlockContext;
use crate::experts::{Experts, ExpertsSaved, ExpertsWork, Routed};
use crate::gate::{Gate, GateIn, GateSaved, GateWork};
use crate::linear::LinearWork;
use crate::mlp::{Mlp, MlpSaved};
use crate::{Grads, Layer, ModelConfig, ParamTable, Weights};
use parallel::comm::CommError;
use parallel::dispatch::{DispatchGrad, Dispatched, Plan};
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
    shared: Option<MlpSaved>,
}

pub struct MoeWork {
    gate: GateWork,
    experts: ExpertsWork,
    shared: Option<[LinearWork; 2]>,
}

/// What the router did with this micro-batch.
pub struct Load {
    pub counts: Tensor,  // [E] i64
    pub balance: Tensor, // one number, without α
}

impl Moe {
    pub fn new(table: &mut ParamTable, config: &ModelConfig, prefix: &str) -> Self {
        let shared = config.n_shared_experts * config.moe_intermediate_size;
        Moe {
            gate: Gate::new(table, config, &format!("{prefix}.gate")),
            experts: Experts::new(table, config, &format!("{prefix}.experts")),
            shared: (shared > 0).then(|| Mlp::new(table, config, &format!("{prefix}.shared_experts"), shared)),
        }
    }

    pub fn forward(&self, w: &Weights, x: Tensor, context: &BlockContext) -> Result<(Tensor, Load, MoeSaved), CommError> {
        let gate_in = GateIn { x: x.shallow_clone(), sequences: context.sequences, balance_scale: context.balance_scale };
        let (routing, gate) = self.gate.forward(w, gate_in);
        let plan = Plan::new(&routing.routes, routing.counts.size()[0], &context.experts)?;
        let Dispatched { rows, weights } = plan.dispatch(&x, &routing.weights)?.wait()?;
        let routed = Routed { rows, counts: plan.counts().to_vec(), weights };
        let (rows, experts) = self.experts.forward(w, routed);
        let mut y = plan.combine(&rows)?.wait()?; // [T, D]
        let shared = self.shared.as_ref().map(|shared| {
            let (out, saved) = shared.forward(w, x);
            y = &y + out;
            saved
        });
        Ok((y, Load { counts: routing.counts, balance: routing.balance }, MoeSaved { gate, plan, experts, shared }))
    }

    pub fn backward_input(&self, w: &Weights, dy: Tensor, saved: MoeSaved) -> Result<(Tensor, MoeWork), CommError> {
        let plan = saved.plan;
        let drows = plan.combine_backward(&dy)?.wait()?;
        let (droutes, experts) = self.experts.backward_input(w, drows, saved.experts);
        let DispatchGrad { x: mut dx, weights: dweights } = plan.dispatch_backward(&droutes.rows, &droutes.weights)?.wait()?;
        let (dx_gate, gate) = self.gate.backward_input(w, dweights, saved.gate);
        dx += dx_gate; // combine made dx: nothing else holds it
        let shared = self.shared.as_ref().zip(saved.shared).map(|(shared, saved)| {
            let (dx_shared, work) = shared.backward_input(w, dy, saved);
            dx = &dx + dx_shared;
            work
        });
        Ok((dx, MoeWork { gate, experts, shared }))
    }

    pub fn backward_weight(&self, work: MoeWork, grads: &mut Grads) {
        self.gate.backward_weight(work.gate, grads);
        self.experts.backward_weight(work.experts, grads);
        if let Some((shared, work)) = self.shared.as_ref().zip(work.shared) {
            shared.backward_weight(work, grads);
        }
    }
}
