//! The reference, in torch's own operations; also on a GPU where there are too many ranks or experts.
use super::{Local, Places};
use tch::{Kind, Tensor};

pub(super) fn count(routes: &Tensor, experts: i64, ranks: i64, nodes: i64) -> Tensor {
    let options = (Kind::Int64, routes.device());
    let rows_to = |parts: i64| {
        let wanted = Tensor::zeros([routes.size()[0], parts], options);
        wanted.scatter_value(1, &routes.divide_scalar_mode(experts / parts, "floor"), 1).sum_dim_intlist(&[0i64][..], false, Kind::Int64)
    };
    let rows = Tensor::zeros([experts], options).scatter_add(0, &routes.flatten(0, -1), &routes.ones_like().flatten(0, -1));
    Tensor::cat(&[rows, rows_to(ranks), rows_to(nodes)], 0)
}

pub(super) fn places(slots: &Tensor, share: i64, ranks: i64, sent: i64) -> Places {
    let (rows, options) = (slots.size()[0], (Kind::Int64, slots.device()));
    // "Elsewhere" becomes rank P, which is cut off.
    let destination = slots.to_kind(Kind::Int64).divide_scalar_mode(share, "floor").remainder(ranks + 1);
    let wanted = Tensor::zeros([rows, ranks + 1], options).scatter_value(1, &destination, 1).narrow(1, 0, ranks);
    let wanted = wanted.tr().flatten(0, -1); // [P · V]: by rank, then row
    let place = (wanted.cumsum(0, Kind::Int64) - 1).masked_fill(&wanted.eq(0), sent);
    let pair = Tensor::zeros([sent + 1], options).scatter(0, &place, &arange(ranks * rows, slots)).narrow(0, 0, sent);
    let rank = pair.divide_scalar_mode(rows.max(1), "floor");
    let source = &pair - &rank * rows;
    let there = slots.index_select(0, &source) - (rank * share).unsqueeze(1);
    let elsewhere = there.lt(0).logical_or(&there.ge(share));
    let sent_row = place.masked_fill(&place.eq(sent), -1).view([ranks, rows]).tr();
    Places { source: int(&source), slots: int(&there.masked_fill(&elsewhere, -1)), sent_row: int(&sent_row).contiguous() }
}

pub(super) fn local(slots: &Tensor, weights: &Tensor, share: i64, count: i64) -> (Local, Tensor) {
    let (rows, top_k) = slots.size2().expect("slots [V, K]");
    let expert = slots.to_kind(Kind::Int64).flatten(0, -1).remainder(share + 1); // elsewhere: the last
    // Stable: rows of one expert stay in their order.
    let pair = expert.argsort_stable(true, 0, false).narrow(0, 0, count);
    let place = Tensor::full_like(&expert, -1).scatter(0, &pair, &arange(count, slots)).view([rows, top_k]);
    let counts = Tensor::zeros([share + 1], (Kind::Int64, slots.device())).scatter_add(0, &expert, &expert.ones_like()).narrow(0, 0, share);
    let sorted = weights.flatten(0, -1).index_select(0, &pair);
    (Local { row: int(&pair.divide_scalar_mode(top_k, "floor")), place: int(&place), counts: int(&counts) }, sorted)
}

fn int(tensor: &Tensor) -> Tensor {
    tensor.to_kind(Kind::Int)
}

fn arange(count: i64, like: &Tensor) -> Tensor {
    Tensor::arange(count, (Kind::Int64, like.device()))
}
