//! Dispatch and combine against a dense reference in f64, over 1 to 8 ranks on nodes of 1, 2 and 4. All values are
//! small integers or halves, so that sums are exact in any order and every comparison is of bits.
use super::bytes::{RowsSent, count_bytes, row_bytes, rows_sent};
use super::*;
use crate::comm::counted::{Traffic, counted};
use crate::comm::local::run_local;
use kernels::fp8::{ScaleRule, quantise_rows};
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
    let Dispatched { rows, counts, weights: row_weights } = plan.dispatch(&x, &weights).unwrap().wait().unwrap();
    assert_eq!(Vec::<i64>::try_from(counts).unwrap(), plan.counts());
    let rows = rows.into_tensor();
    assert_eq!(rows.size()[0], plan.counts().iter().sum::<i64>());
    // Which expert a row is at follows from the counts alone.
    let first = rank * EXPERTS / group.all.size() as i64 + 1;
    let factors: Vec<f64> = plan.counts().iter().zip(first..).flat_map(|(&n, e)| vec![e as f64; n as usize]).collect();
    let factors = Tensor::from_slice(&factors);
    let out = &rows * (&factors * &row_weights).unsqueeze(1);
    let back = plan.combine(&out).unwrap().wait().unwrap();
    assert!(back.sum(&[]).equal(&dense(&x, routes, &weights)));
    assert!(back.sum(&[&x, &x]).equal(&(dense(&x, routes, &weights) + &x * 2.0)));

    let dy = &x + 7.0;
    let drows = plan.combine_backward(&dy).unwrap().wait().unwrap().into_tensor();
    let dweights = &factors * (&drows * &rows).sum_dim_intlist(&[1i64][..], false, Kind::Double);
    let back = plan.dispatch_backward(&(&drows * (&factors * &row_weights).unsqueeze(1)), &dweights).unwrap().wait().unwrap();
    assert!(back.x.sum(&[]).equal(&dense(&dy, routes, &weights)));
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

#[test]
fn equal_scores_go_to_different_experts() {
    everywhere(|_| Tensor::ones([5, EXPERTS], (Kind::Double, Device::Cpu)).topk(3, 1, true, false).1);
}

/// What `f` makes this rank send, inside its node and between nodes.
fn grown<T>(traffic: &Traffic, f: impl FnOnce() -> T) -> ((u64, u64), T) {
    let before = (traffic.inside_bytes(), traffic.between_bytes());
    let value = f();
    ((traffic.inside_bytes() - before.0, traffic.between_bytes() - before.1), value)
}

/// Counted bytes of every transfer of random routes, against the formula.
fn bytes_equal_the_formula(nodes: &[usize], wire: Wire) {
    const WIDTH: i64 = 200;
    let num_experts = 2 * nodes.len() as i64;
    run_local(nodes.len(), |all| {
        let rank = all.rank();
        let routes: Vec<Vec<i64>> = (0..nodes.len() as u64).map(|r| random_routes(r + 9, 30 + r as i64, 2, num_experts)).collect();
        let formula: RowsSent =
            rows_sent(&routes.iter().map(|r| r.chunks(2).map(<[i64]>::to_vec).collect()).collect::<Vec<_>>(), num_experts, nodes)[rank];
        let row = row_bytes(wire, WIDTH, Kind::BFloat16, 2, Kind::Float);
        let (all, traffic) = counted(all, nodes);
        let group = ExpertGroup::new(all, nodes).unwrap().with_wire(wire);

        let mine = Tensor::from_slice(&routes[rank]).view([-1, 2]);
        let (bytes, plan) = grown(&traffic, || Plan::new(&mine, num_experts, &group).unwrap());
        let peers =
            |inside: bool| nodes.iter().enumerate().filter(|&(r, node)| r != rank && (*node == nodes[rank]) == inside).count() as u64;
        assert_eq!(bytes, (peers(true) * count_bytes(num_experts, nodes), peers(false) * count_bytes(num_experts, nodes)));

        let expect = |sent: bytes::Sent, row: u64| (sent.inside * row, sent.between * row);
        let x = mine.to_kind(Kind::BFloat16).select(1, 0).unsqueeze(1).repeat([1, WIDTH]);
        let (bytes, sent) = grown(&traffic, || plan.dispatch(&x, &mine.to_kind(Kind::Float)).unwrap().wait().unwrap());
        assert_eq!(bytes, expect(formula.outward, row.dispatch), "dispatch of rank {rank} on {nodes:?}");
        let rows = sent.rows.into_tensor();
        let (bytes, _) = grown(&traffic, || plan.combine(&rows).unwrap().wait().unwrap());
        assert_eq!(bytes, expect(formula.inward, row.combine));
        let (bytes, _) = grown(&traffic, || plan.combine_backward(&x).unwrap().wait().map(Rows::into_tensor).unwrap());
        assert_eq!(bytes, expect(formula.outward, row.combine_backward));
        let (bytes, _) = grown(&traffic, || plan.dispatch_backward(&rows, &sent.weights).unwrap().wait().map(|_| ()).unwrap());
        assert_eq!(bytes, expect(formula.inward, row.dispatch_backward));
    });
}

#[test]
fn bytes_on_the_wire_equal_the_formula() {
    for nodes in [&[0usize][..], &[0, 0], &[0, 1], &[0, 0, 1, 1], &[0, 0, 0, 0], &[0, 1, 2, 3], &[0, 0, 1], &[0, 0, 0, 0, 1, 1, 1, 1]] {
        bytes_equal_the_formula(nodes, Wire::Own);
        bytes_equal_the_formula(nodes, Wire::Fp8);
    }
}

#[test]
fn the_formula_of_a_case_done_by_hand() {
    // Two nodes of two ranks, an expert each. Rank 0's token wants ranks 0, 2, 3: once to rank 2, which passes it on to 3.
    let sent = |routes: &[&[i64]], nodes| rows_sent(&[vec![routes[0].to_vec()], vec![], vec![], vec![]], 4, nodes);
    let rows = sent(&[&[0, 2, 3]], &[0, 0, 1, 1]);
    let of = |inside, between| bytes::Sent { inside, between };
    assert_eq!(rows.iter().map(|r| r.outward).collect::<Vec<_>>(), [of(0, 1), of(0, 0), of(1, 0), of(0, 0)]);
    assert_eq!(rows.iter().map(|r| r.inward).collect::<Vec<_>>(), [of(0, 0), of(0, 0), of(0, 1), of(1, 0)]);
    // Without nodes of several ranks it crosses twice.
    assert_eq!(sent(&[&[0, 2, 3]], &[0, 1, 2, 3])[0].outward, of(0, 2));
}

#[test]
fn fp8_rows_arrive_as_they_were_quantised() {
    for (ranks, per_node) in LAYOUTS {
        on_nodes(ranks, per_node, |group| {
            let rank = group.all.rank() as u64;
            let routes = Tensor::from_slice(&random_routes(rank, 12, 3, EXPERTS)).view([12, 3]);
            // Magnitudes over many powers of two, and a width that is no multiple of a tile.
            let numbers = random_routes(rank + 50, 12 * 208, 1, 1 << 12);
            let x =
                (Tensor::from_slice(&numbers).view([12, 208]) - 2048.0) * (Tensor::arange(208, (Kind::Float, Device::Cpu)) / 8.0).exp2();
            let x = x.to_kind(Kind::BFloat16);
            let weights = routes.to_kind(Kind::Float);
            let quantised = quantise_rows(&x, ScaleRule::PowerOfTwo).dequantise(Kind::BFloat16);
            assert!(!quantised.equal(&x), "these values do not fit FP8");
            let own = Plan::new(&routes, EXPERTS, &group).unwrap();
            let fp8 = Plan::new(&routes, EXPERTS, &group.clone().with_wire(Wire::Fp8)).unwrap();
            let expected = own.dispatch(&quantised, &weights).unwrap().wait().unwrap().rows.into_tensor();
            let found = fp8.dispatch(&x, &weights).unwrap().wait().unwrap().rows;
            assert!(matches!(&found, Rows::Fp8(packed) if packed.gather().values.kind() == Kind::Float8e4m3fn));
            assert!(found.into_tensor().equal(&expected));
            // Combine's backward too; combine and dispatch's backward in BF16, whatever the wire.
            assert!(fp8.combine_backward(&x).unwrap().wait().unwrap().into_tensor().equal(&expected));
            let y = |plan: &Plan| plan.combine(&expected).unwrap().wait().unwrap().sum(&[]);
            assert!(y(&fp8).equal(&y(&own)) && y(&fp8).kind() == Kind::BFloat16);
            let row_weights = Tensor::ones([expected.size()[0]], (Kind::Float, Device::Cpu));
            let dx = |plan: &Plan| plan.dispatch_backward(&expected, &row_weights).unwrap().wait().unwrap().x.sum(&[]);
            assert!(dx(&fp8).equal(&dx(&own)));
        });
    }
}

#[test]
fn a_node_adds_in_fp32() {
    // 256 + 1 + 1 of three ranks of a node: in BF16 each step would round back to 256.
    on_nodes(8, 4, |group| {
        let routes = Tensor::from_slice(&[4i64, 5, 6]).view([1, 3]);
        let plan = Plan::new(&routes, EXPERTS, &group).unwrap();
        let x = Tensor::ones([1, 16], (Kind::BFloat16, Device::Cpu));
        let rows = plan.dispatch(&x, &routes.to_kind(Kind::Float)).unwrap().wait().unwrap().rows.into_tensor();
        let y = plan.combine(&(rows * if group.all.rank() == 4 { 256.0 } else { 1.0 })).unwrap().wait().unwrap().sum(&[]);
        assert!(y.equal(&(x * 258.0)));
    });
}

#[test]
fn the_second_hop_is_posted_by_advance() {
    run_local(4, |all| {
        let (all, traffic) = counted(all, &[0, 0, 1, 1]);
        let group = ExpertGroup::new(all, &[0, 0, 1, 1]).unwrap();
        // Everyone's token goes to all ranks: each sends one row to the other node and passes two on.
        let routes = Tensor::from_slice(&[0i64, 2, 4, 6]).view([1, 4]);
        let plan = Plan::new(&routes, EXPERTS, &group).unwrap();
        let x = Tensor::full([1, 8], group.all.rank() as i64, (Kind::Double, Device::Cpu));
        let row = 8 * 8 + 4 * 8 + 4 * 4;
        let (bytes, mut sent) = grown(&traffic, || plan.dispatch(&x, &routes.to_kind(Kind::Double)).unwrap());
        assert_eq!(bytes, (0, row));
        let (bytes, _) = grown(&traffic, || sent.advance().unwrap());
        assert_eq!(bytes, (2 * row, 0));
        // Nothing is left to post: neither advancing nor waiting sends.
        let (bytes, rows) = grown(&traffic, || {
            sent.advance().unwrap();
            sent.wait().unwrap().rows.into_tensor()
        });
        assert_eq!((bytes, rows.size()), ((0, 0), vec![4, 8]));
        // Back: two rows inside the node first, then their sum to the other.
        let (bytes, mut back) = grown(&traffic, || plan.combine(&rows).unwrap());
        assert_eq!(bytes, (2 * 64, 0));
        let (bytes, _) = grown(&traffic, || back.advance().unwrap());
        assert_eq!(bytes, (0, 64));
        assert!(back.wait().unwrap().sum(&[]).equal(&(x * 4.0)));
        // One that nobody waits for still passes its rows on.
        let (bytes, _) = grown(&traffic, || drop(plan.combine_backward(&rows.narrow(0, 0, 1)).unwrap()));
        assert_eq!(bytes, (2 * 64, 64));
    });
}
