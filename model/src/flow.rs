//! One micro-batch on its way through a stage, forward or backward, in segments: each waits for its own transfer,
//! computes, and ends with the next transfer under way, or about to be. So two micro-batches that take turns hide each other's
//! transfers (report §3.2.1, fig. 4), and one alone runs its segments in a row.
//!
//!     backward  [head, send dy]           [wait, experts' dgrad, send; wgrad]      [wait, attention, …
//!     forward           [attention, gate, count]              (send)      [wait, experts, send]      [wait, …
//!
//! The two lists may differ in length: dense blocks join the segment before them. Rows leave for the experts amid the other
//! micro-batch's segment, `Other`: ranks wait for each other there to agree on counts, and a GPU that has work meanwhile does
//! not wait with them. There, too, the second hop is posted of a transfer that has two (to the node, then to the rank).
use crate::block::{AttentionWork, Block, BlockContext, BlockOut, BlockSaved, BlockSent, FfnWork, Part, Started};
use crate::embedding::EmbeddingWork;
use crate::experts::ExpertsWork;
use crate::head::{HeadIn, HeadSaved};
use crate::moe::{MoeBackCombining, MoeBackDispatched, MoeCombining, MoeDispatched, UnderWay};
use crate::mtp::{MtpInSaved, MtpInWork, MtpOutSaved, MtpOutWork};
use crate::norm::NormSaved;
use crate::saved::{PUT_OFF, See};
use crate::stage::{Last, MicroBatch, Stage, StageIn, StageOut, StageStats, StepContext, Sums};
use crate::{Grads, Layer, Weights};
use parallel::comm::CommError;
use tch::Tensor;

/// What a forward keeps for the backward.
#[derive(Default)]
pub struct StageSaved {
    tokens: Option<Tensor>,
    /// MTP's block is the last.
    blocks: Vec<BlockSaved>,
    turn: Option<TurnSaved>,
    losses: Option<LossesSaved>,
}

impl StageSaved {
    pub(crate) fn each(&self, see: See) {
        self.tokens.iter().for_each(|tokens| see("tokens", tokens));
        self.blocks.iter().for_each(|block| block.each(see));
        if let Some(TurnSaved { norm, mtp, .. }) = &self.turn {
            norm.each("norms' inputs", see);
            mtp.iter().for_each(|mtp| mtp.each(see));
        }
        if let Some(LossesSaved { head, mtp }) = &self.losses {
            head.each(see);
            mtp.iter().for_each(|mtp| mtp.each(see));
        }
    }
}

/// Between the trunk and MTP's block.
struct TurnSaved {
    norm: NormSaved,
    mtp: Option<MtpInSaved>,
    sequences: i64,
}

struct LossesSaved {
    head: HeadSaved,
    mtp: Option<MtpOutSaved>,
}

/// A piece of a micro-batch's weight gradients, still to be made; blocks by index.
pub enum Work {
    Head(HeadSaved),
    Norm(Tensor),
    MtpOut(MtpOutWork),
    MtpIn(MtpInWork),
    Experts(usize, ExpertsWork),
    Ffn(usize, FfnWork),
    Attention(usize, Box<AttentionWork>),
    Embedding(EmbeddingWork),
}

impl Work {
    pub(crate) fn each(&self, see: See) {
        match self {
            Work::Head(work) => work.each(see),
            Work::Norm(dweight) => see(PUT_OFF, dweight),
            Work::MtpOut(work) => work.each(see),
            Work::MtpIn(work) => work.each(see),
            Work::Experts(_, work) => work.each(see),
            Work::Ffn(_, work) => work.each(see),
            Work::Attention(_, work) => work.each(see),
            Work::Embedding(work) => work.each(see),
        }
    }
}

/// A micro-batch's weight gradients, in the order in which they could be made.
pub type StageWork = Vec<Work>;

impl Stage {
    /// The trunk's blocks, then MTP's.
    fn block(&self, index: usize) -> &Block {
        self.blocks.get(index).unwrap_or_else(|| &self.last.as_ref().and_then(|last| last.mtp.as_ref()).expect("a block of this stage").block)
    }

    pub fn backward_weight(&self, work: Work, grads: &mut Grads) {
        let last = || self.last.as_ref().expect("the last stage's work");
        let mtp = || last().mtp.as_ref().expect("MTP's work");
        match work {
            Work::Head(work) => last().head.backward_weight(work, grads),
            Work::Norm(work) => last().norm.backward_weight(work, grads),
            Work::MtpOut(work) => mtp().backward_out_weight(work, grads),
            Work::MtpIn(work) => mtp().backward_in_weight(work, grads),
            Work::Experts(index, work) => self.block(index).backward_experts_weight(work, grads),
            Work::Ffn(index, work) => self.block(index).backward_ffn_weight(work, grads),
            Work::Attention(index, work) => self.block(index).backward_attention_weight(*work, grads),
            Work::Embedding(work) => self.embedding.as_ref().unwrap_or_else(|| mtp().embedding()).backward_weight(work, grads),
        }
    }
}

/// Called amid a segment: the other micro-batch's transfer goes on.
pub type Other<'a> = &'a mut dyn FnMut() -> Result<(), CommError>;

/// There is no other.
pub fn alone() -> Result<(), CommError> {
    Ok(())
}

/// What a finished forward hands on.
pub type StageResult = (StageOut, StageStats, StageSaved);

/// A forward under way.
pub struct Forward<'a> {
    stage: &'a Stage,
    step: &'a StepContext,
    micro_batch: &'a MicroBatch,
    context: BlockContext,
    at: ForwardAt,
    saved: StageSaved,
    /// After the final norm, while MTP's block runs.
    hidden: Option<Tensor>,
    sums: Sums,
}

enum ForwardAt {
    Start(StageIn),
    Sent(BlockSent<MoeDispatched>),
    Combining(BlockSent<MoeCombining>),
    Over(StageOut),
    Moving,
}

impl<'a> Forward<'a> {
    pub fn new(stage: &'a Stage, step: &'a StepContext, w: &Weights, micro_batch: &'a MicroBatch, x: StageIn) -> Self {
        let context = step.block_context(micro_batch);
        Forward { stage, step, micro_batch, context, at: ForwardAt::Start(x), saved: StageSaved::default(), hidden: None, sums: Sums::new(w) }
    }

    /// The next segment. False: it was the last.
    pub fn advance(&mut self, w: &mut Weights, other: Other) -> Result<bool, CommError> {
        let h = match std::mem::replace(&mut self.at, ForwardAt::Moving) {
            ForwardAt::Start(x) => self.enter(w, x)?,
            ForwardAt::Sent(mut sent) => {
                let block = self.stage.block(self.saved.blocks.len());
                block.forward_send(w, &mut sent)?; // rows do not wait for the experts' new weights
                w.ready(|id| block.holds(Part::Experts, id))?;
                self.at = ForwardAt::Combining(block.forward_experts(w, sent, other)?);
                return Ok(true);
            }
            ForwardAt::Combining(sent) => {
                event("forward", "wait");
                let out = self.stage.block(self.saved.blocks.len()).forward_end(sent)?;
                self.leave(out)
            }
            ForwardAt::Over(_) | ForwardAt::Moving => panic!("a forward was advanced past its end"),
        };
        other()?;
        self.run(w, h)
    }

    /// The next hop of what is under way.
    fn onward(&mut self, w: &Weights) -> Result<(), CommError> {
        let posted = match &mut self.at {
            ForwardAt::Sent(sent) => self.stage.block(self.saved.blocks.len()).forward_onward(w, sent)?,
            ForwardAt::Combining(sent) => sent.onward()?,
            _ => false,
        };
        if posted {
            event("forward", "onward");
        }
        Ok(())
    }

    pub fn finish(self) -> StageResult {
        let ForwardAt::Over(out) = self.at else { panic!("a forward was taken before its end") };
        (out, self.sums.done(), self.saved)
    }

    fn enter(&self, w: &mut Weights, x: StageIn) -> Result<Tensor, CommError> {
        Ok(match (&self.stage.embedding, x) {
            (Some(embedding), StageIn::Tokens) => {
                w.ready(|id| id == embedding.weight)?;
                embedding.forward(w, self.micro_batch.inputs()).0
            }
            (None, StageIn::Hidden(hidden)) => hidden,
            _ => panic!("the first stage takes tokens, every other one a hidden state"),
        })
    }

    fn leave(&mut self, (y, load, saved): BlockOut) -> Tensor {
        self.sums.add(load);
        self.saved.blocks.push(saved);
        y
    }

    /// From one block's output to the next transfer, or the end.
    fn run(&mut self, w: &mut Weights, mut h: Tensor) -> Result<bool, CommError> {
        loop {
            let (index, trunk) = (self.saved.blocks.len(), self.stage.blocks.len());
            if index >= trunk {
                let Some(last) = &self.stage.last else { return Ok(self.over(StageOut::Hidden(h))) };
                if self.hidden.is_none() {
                    h = self.turn(w, last, h)?;
                }
                if index == trunk + last.mtp.iter().len() {
                    self.losses(w, last, h);
                    return Ok(self.over(StageOut::Loss));
                }
            }
            let block = self.stage.block(index);
            w.ready(|id| block.holds(Part::Attention, id))?;
            event("forward", "computes");
            let middle = block.forward_attention(w, h, &self.context);
            w.ready(|id| block.holds(Part::Ffn, id))?;
            match block.forward_ffn(w, middle, &self.context) {
                Started::Done(out) => h = self.leave(out),
                Started::Sent(sent) => {
                    self.at = ForwardAt::Sent(sent);
                    return Ok(true);
                }
            }
        }
    }

    /// The final norm and, where there is MTP, its block's input.
    fn turn(&mut self, w: &mut Weights, last: &Last, h: Tensor) -> Result<Tensor, CommError> {
        w.ready(|id| self.stage.uses.contains(&id))?;
        let (hidden, norm) = last.norm.forward(w, h);
        let (next, mtp) = match &last.mtp {
            Some(mtp) => {
                let (h, saved) = mtp.forward_in(w, self.micro_batch.inner(&hidden), self.micro_batch.shifted(1));
                (h, Some(saved))
            }
            None => (hidden.shallow_clone(), None),
        };
        self.saved.turn = Some(TurnSaved { norm, mtp, sequences: self.micro_batch.sequences() });
        self.hidden = Some(hidden);
        Ok(next)
    }

    fn losses(&mut self, w: &Weights, last: &Last, h: Tensor) {
        let mtp = last.mtp.as_ref().map(|mtp| {
            let (loss, saved) = mtp.forward_out(w, h, self.micro_batch.shifted(2), self.step.mtp_weight / self.step.mtp_targets as f64);
            self.sums.mtp = loss;
            saved
        });
        let hidden = self.hidden.take().expect("the turn came before");
        let head_in = HeadIn { hidden, targets: self.micro_batch.targets(), scale: 1.0 / self.step.main_targets as f64 };
        let (loss, head) = last.head.forward(w, head_in);
        self.sums.main = loss;
        self.saved.losses = Some(LossesSaved { head, mtp });
    }

    fn over(&mut self, out: StageOut) -> bool {
        if self.stage.embedding.is_some() {
            self.saved.tokens = Some(self.micro_batch.inputs());
        }
        self.at = ForwardAt::Over(out);
        false
    }
}

/// A backward under way.
pub struct Backward<'a> {
    stage: &'a Stage,
    saved: StageSaved,
    at: BackwardAt,
    /// The main head's gradient, while MTP's block runs.
    dmain: Option<Tensor>,
    /// Weights' gradients to be made once the next transfer is under way: they hide it, and they are large, so on the links
    /// they are not to be before it. The last of them hide the way of this stage's results, or of the embedding's gradient.
    held: Vec<Work>,
    /// The block whose experts' gradients come last of all, and those.
    experts_last: Option<usize>,
    experts: Option<Work>,
    /// MTP's part of the embedding's gradient, which the first stage owns, too, and is told of where both are at their ends:
    /// there hosts may wait for each other, and the first stage still for this one's result.
    mtp_embedding: Option<Work>,
}

enum BackwardAt {
    Start(Option<Tensor>),
    Sent(BlockSent<MoeBackDispatched>),
    Combining(BlockSent<MoeBackCombining>),
    Over(Option<Tensor>),
    Moving,
}

impl<'a> Backward<'a> {
    /// `dy` is the gradient of `StageOut::Hidden`, none on the last stage.
    pub fn new(stage: &'a Stage, dy: Option<Tensor>, saved: StageSaved) -> Self {
        assert_eq!(dy.is_none(), stage.last.is_some(), "every stage but the last gets a gradient");
        Backward { stage, saved, at: BackwardAt::Start(dy), dmain: None, held: Vec::new(), experts_last: stage.experts_last, experts: None, mtp_embedding: None }
    }

    /// The next segment; `work` takes what the weights' gradients need. False: it was the last.
    pub fn advance(&mut self, w: &Weights, work: &mut dyn FnMut(Work), other: Other) -> Result<bool, CommError> {
        let index = self.saved.blocks.len(); // of the block under way
        let dh = match std::mem::replace(&mut self.at, BackwardAt::Moving) {
            BackwardAt::Start(dy) => self.enter(w, dy),
            BackwardAt::Sent(sent) => {
                let block = self.stage.block(index);
                let (mut sent, experts) = block.backward_experts(w, sent)?;
                other()?; // the other's rows leave: while hosts agree on their counts, the GPU has these experts' dgrad
                event("backward", "computes");
                let experts = Work::Experts(index, experts);
                match self.experts_last {
                    Some(last) if last == index => self.experts = Some(experts),
                    _ => work(experts),
                }
                other()?; // and go on, by their second hop
                event("backward", "computes");
                block.backward_shared(w, &mut sent);
                self.at = BackwardAt::Combining(sent);
                return Ok(true);
            }
            BackwardAt::Combining(sent) => {
                event("backward", "wait");
                let block = self.stage.block(index);
                let (middle, ffn) = block.backward_end(w, sent)?;
                event("backward", "computes");
                let (dx, attention) = block.backward_attention(w, middle);
                other()?;
                self.held.extend([Work::Ffn(index, ffn), Work::Attention(index, Box::new(attention))]);
                return self.run(w, dx, work);
            }
            BackwardAt::Over(_) | BackwardAt::Moving => panic!("a backward was advanced past its end"),
        };
        other()?;
        self.run(w, dh, work)
    }

    /// The next hop of what is under way.
    fn onward(&mut self) -> Result<(), CommError> {
        let posted = match &mut self.at {
            BackwardAt::Sent(sent) => sent.onward()?,
            BackwardAt::Combining(sent) => sent.onward()?,
            _ => false,
        };
        if posted {
            event("backward", "onward");
        }
        Ok(())
    }

    /// The gradient of `StageIn::Hidden`, none on the first stage, and what is to be made once it is on its way.
    pub fn finish(self) -> (Option<Tensor>, StageWork) {
        let BackwardAt::Over(dx) = self.at else { panic!("a backward was taken before its end") };
        (dx, self.held)
    }

    /// The losses' gradient, or the one that came from the next stage.
    fn enter(&mut self, w: &Weights, dy: Option<Tensor>) -> Tensor {
        let Some(last) = &self.stage.last else { return dy.expect("checked in new") };
        let LossesSaved { head, mtp } = self.saved.losses.take().expect("forward ran to its end");
        let (dmain, head) = last.head.backward_input(w, (), head);
        self.held.push(Work::Head(head));
        let Some((mtp, saved)) = last.mtp.as_ref().zip(mtp) else { return dmain };
        let (dh, out) = mtp.backward_out(w, saved);
        self.held.push(Work::MtpOut(out));
        self.dmain = Some(dmain);
        dh
    }

    /// From one block's input to the next transfer, or the end.
    fn run(&mut self, w: &Weights, mut dh: Tensor, work: &mut dyn FnMut(Work)) -> Result<bool, CommError> {
        loop {
            event("backward", "computes");
            if self.saved.blocks.len() == self.stage.blocks.len()
                && let Some((last, saved)) = self.stage.last.as_ref().zip(self.saved.turn.take())
            {
                dh = self.turn(w, last, dh, saved);
            }
            let Some(saved) = self.saved.blocks.pop() else { return Ok(self.leave(w, dh, work)) };
            let index = self.saved.blocks.len();
            let block = self.stage.block(index);
            if !block.sends() {
                self.held.drain(..).for_each(&mut *work);
            }
            match block.backward_input(w, dh, saved)? {
                Started::Done((middle, ffn)) => {
                    let ffn = Work::Ffn(index, ffn);
                    if index == 0 && self.stage.ffn_hides_embedding {
                        self.held.push(ffn);
                    } else {
                        work(ffn); // its way is hidden by the attention's backward
                    }
                    let (dx, attention) = block.backward_attention(w, middle);
                    self.held.push(Work::Attention(index, Box::new(attention)));
                    dh = dx;
                }
                Started::Sent(sent) => {
                    event("backward", "send");
                    self.at = BackwardAt::Sent(sent);
                    event("backward", "computes");
                    self.held.drain(..).for_each(work);
                    return Ok(true);
                }
            }
        }
    }

    /// Through MTP's way in, where there is one, and the final norm.
    fn turn(&mut self, w: &Weights, last: &Last, dh: Tensor, saved: TurnSaved) -> Tensor {
        let dh = match last.mtp.as_ref().zip(saved.mtp) {
            Some((mtp, mtp_saved)) => {
                let (dinner, mtp_in, embedding) = mtp.backward_in(w, dh, mtp_saved);
                self.held.push(Work::MtpIn(mtp_in));
                match self.stage.embedding {
                    Some(_) => self.held.push(Work::Embedding(embedding)),
                    None => self.mtp_embedding = Some(Work::Embedding(embedding)),
                }
                let dmain = self.dmain.take().expect("made in enter");
                let width = dmain.size()[1];
                let per_sequence = dmain.view([saved.sequences, -1, width]);
                let mut inner = per_sequence.narrow(1, 0, per_sequence.size()[1] - 1);
                // dmain is this function's own; nothing else holds it.
                let _ = inner.g_add_(&dinner.view([saved.sequences, -1, width]));
                per_sequence.view([-1, width])
            }
            None => dh,
        };
        let (dh, norm) = last.norm.backward_input(w, dh, saved.norm);
        self.held.push(Work::Norm(norm));
        dh
    }

    fn leave(&mut self, w: &Weights, dh: Tensor, work: &mut dyn FnMut(Work)) -> bool {
        self.at = BackwardAt::Over(match self.stage.embedding.as_ref().zip(self.saved.tokens.take()) {
            Some((embedding, tokens)) => {
                let ((), embedding) = embedding.backward_input(w, dh, tokens);
                work(Work::Embedding(embedding));
                None
            }
            None => Some(dh),
        });
        self.held.extend(self.mtp_embedding.take().into_iter().chain(self.experts.take()));
        false
    }
}

/// A forward and another micro-batch's whole backward, in turns, the backward first: while one computes, the other's
/// transfer is under way. Every rank of an expert group must pair the same stages.
pub fn forward_backward(mut forward: Forward, mut backward: Backward, w: &mut Weights, grads: &mut Grads) -> Result<(StageResult, (Option<Tensor>, StageWork)), CommError> {
    let stage = backward.stage;
    // All experts' gradients hide the other's rows; those of a step's last backward, which is in no pair, are its last.
    backward.experts_last = None;
    let (mut forward_runs, mut backward_runs) = (true, true);
    while forward_runs || backward_runs {
        if backward_runs {
            backward_runs = backward.advance(w, &mut |work| stage.backward_weight(work, grads), &mut || forward.onward(w))?;
        }
        if forward_runs {
            forward_runs = forward.advance(w, &mut || backward.onward())?;
        }
    }
    Ok((forward.finish(), backward.finish()))
}

/// For the log of what overlaps: this direction's hosts agree on counts ("counts"), it posted a transfer ("send"), its second hop
/// ("onward"), waits for it ("wait"), or gives the device work that needs none ("computes").
pub(crate) fn event(direction: &'static str, what: &'static str) {
    tracing::trace!(target: "overlap", direction, what);
}
