//! Dispatch and combine against a dense reference in f64, over 1 to 8 ranks on nodes of 1, 2 and 4. All values are
//! small integers or halves, so that sums are exact in any order and every comparison is of bits.
use super::*;
use crate::comm::local::run_local;
use tch::{Device, Kind};

const EXPERTS: i64 = 8;
/// Ranks, ranks of a node.
const LAYOUTS: [(usize, usize); 9] = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4)];

/// A group of threads as if on nodes of `per_node`.
fn on_nodes(ranks: usize, per_node: usize, f: impl Fn(ExpertGroup) + Sync) {
    run_local(ranks, |all| {
        let nodes: Vec<usize> = (0..ranks).map(|rank| rank / per_node).collect();
        f(ExpertGroup::new(all, &nodes).unwrap());
    });
}

fn random(seed: u64) -> impl FnMut(i64) -> i64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as i64 % below
    }
}

/// `top_k` different experts of the first `of`, for each token.
fn random_routes(seed: u64, tokens: i64, top_k: usize, of: i64) -> Vec<i64> {
    let mut random = random(seed);
    let token = |_| {
        let mut experts: Vec<i64> = (0..of).collect();
        (0..top_k).map(|_| experts.swap_remove(random(experts.len() as i64) as usize)).collect::<Vec<_>>()
    };
    (0..tokens).flat_map(token).collect()
}

/// Expert e multiplies a row by e + 1 and its weight.
fn dense(x: &Tensor, routes: &Tensor, weights: &Tensor) -> Tensor {
    x * ((routes.to_kind(Kind::Double) + 1.0) * weights).sum_dim_intlist(&[1i64][..], true, Kind::Double)
}

/// Forward and both backwards of `routes` [T, K] on this rank.
fn equals_the_dense_reference(group: &ExpertGroup, routes: &Tensor) {
    let (tokens, rank) = (routes.size()[0], group.all.rank() as i64);
    let plan = Plan::new(routes, EXPERTS, group).unwrap();
    let x = Tensor::arange(tokens * 3, (Kind::Double, Device::Cpu)).view([tokens, 3]) + rank as f64 * 100.0;
    let weights = (routes * 3 + Tensor::arange(tokens, (Kind::Int64, Device::Cpu)).unsqueeze(1)).to_kind(Kind::Double) * 0.5;
    let Dispatched { rows, weights: row_weights } = plan.dispatch(&x, &weights).unwrap().wait().unwrap();
    assert_eq!(rows.size()[0], plan.counts().iter().sum::<i64>());
    // Which expert a row is at follows from the counts alone.
    let first = rank * EXPERTS / group.all.size() as i64 + 1;
    let factors: Vec<f64> = plan.counts().iter().zip(first..).flat_map(|(&n, e)| vec![e as f64; n as usize]).collect();
    let factors = Tensor::from_slice(&factors);
    let out = &rows * (&factors * &row_weights).unsqueeze(1);
    let y = plan.combine(&out).unwrap().wait().unwrap();
    assert!(y.equal(&dense(&x, routes, &weights)), "{y:?}");

    let dy = &x + 7.0;
    let drows = plan.combine_backward(&dy).unwrap().wait().unwrap();
    let dweights = &factors * (&drows * &rows).sum_dim_intlist(&[1i64][..], false, Kind::Double);
    let back = plan.dispatch_backward(&(&drows * (&factors * &row_weights).unsqueeze(1)), &dweights).unwrap().wait().unwrap();
    assert!(back.x.equal(&dense(&dy, routes, &weights)));
    let expected = (routes.to_kind(Kind::Double) + 1.0) * (&dy * &x).sum_dim_intlist(&[1i64][..], true, Kind::Double);
    assert!(back.weights.equal(&expected), "{:?} {expected:?}", back.weights);
}

fn everywhere(routes: impl Fn(i64) -> Tensor + Sync) {
    for (ranks, per_node) in LAYOUTS {
        on_nodes(ranks, per_node, |group| equals_the_dense_reference(&group, &routes(group.all.rank() as i64)));
    }
}

#[test]
fn random_routes_come_back_as_the_sum_over_their_experts() {
    for (top_k, tokens) in [(1, 7), (3, 20), (8, 5)] {
        // Every third rank has no tokens.
        let routes = |rank: i64| {
            let tokens = if rank % 3 == 1 { 0 } else { tokens };
            Tensor::from_slice(&random_routes(rank as u64 + 5, tokens, top_k, EXPERTS)).view([tokens, top_k as i64])
        };
        everywhere(routes);
    }
}

#[test]
fn one_expert_may_get_every_token_and_others_none() {
    for expert in [0, 5, 7] {
        everywhere(|_| Tensor::full([6, 1], expert, (Kind::Int64, Device::Cpu)));
    }
    // Three experts of eight: most ranks get nothing.
    everywhere(|rank| Tensor::from_slice(&random_routes(rank as u64, 11, 2, 3)).view([11, 2]));
}

#[test]
fn one_token_in_all() {
    for sender in [0, 1] {
        everywhere(|rank| Tensor::from_slice(&[6i64, 1, 3]).view([1, 3]).narrow(0, 0, (rank == sender) as i64));
    }
}
