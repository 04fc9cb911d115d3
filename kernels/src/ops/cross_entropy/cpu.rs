//! In torch ops, for any kind.
use crate::ops::wide;
use tch::Tensor;

/// Rows at one time: each takes a few times its memory.
const ROWS: i64 = 256;

pub fn forward(logits: Tensor, targets: &Tensor, dlogits: &mut Tensor) -> Tensor {
    let total = logits.size()[0];
    let mut loss = Tensor::zeros([], (wide(logits.kind()), logits.device()));
    for start in (0..total).step_by(ROWS as usize) {
        let part = |all: &Tensor| all.narrow(0, start, ROWS.min(total - start));
        loss += some(part(&logits), &part(targets), &mut part(dlogits));
    }
    loss
}

fn some(logits: Tensor, targets: &Tensor, dlogits: &mut Tensor) -> Tensor {
    let kind = logits.kind();
    let targets = targets.unsqueeze(1);
    let mut log_p = if kind == wide(kind) {
        logits.log_softmax_int_out(dlogits, -1, kind) // softmax − onehot is made in its place
    } else {
        logits.log_softmax(-1, wide(kind))
    };
    let loss = -log_p.gather(1, &targets, false).sum(wide(kind));
    let _ = log_p.exp_();
    let minus_one = Tensor::full_like(&targets, -1.0).to_kind(log_p.kind());
    let _ = log_p.scatter_add_(1, &targets, &minus_one);
    if kind != wide(kind) {
        dlogits.copy_(&log_p);
    }
    loss
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Reduction};

    #[test]
    fn more_rows_than_are_taken_at_one_time_are_torch_s() {
        tch::manual_seed(7);
        for rows in [0, 1, ROWS, 2 * ROWS + 3] {
            let logits = Tensor::randn([rows, 7], (Kind::Double, Device::Cpu)).set_requires_grad(true);
            let targets = Tensor::randint(7, [rows], (Kind::Int64, Device::Cpu));
            let want = logits.cross_entropy_loss::<Tensor>(&targets, None, Reduction::Sum, -100, 0.0);
            want.backward();
            let mut got = logits.detach().copy();
            let loss = forward(got.shallow_clone(), &targets, &mut got); // in its own memory
            assert!((loss - want.detach()).abs().double_value(&[]) < 1e-10, "{rows} rows: the loss");
            assert!(got.allclose(&logits.grad(), 1e-12, 1e-12, false), "{rows} rows: its gradient");
        }
    }
}
