//! Run under mpirun: MoE dispatch and combine over MPI, compared bit for bit with the same program over threads.
//! `mpirun -n 4 dispatch_check`; the last line of rank 0 is `dispatch_check: N ranks equal`, after the bytes that the
//! ranks sent, over the formula's.

use parallel::comm::checked::checked;
use parallel::comm::counted::counted;
use parallel::comm::local::run_local;
use parallel::comm::mpi::MpiWorld;
use parallel::comm::{Comm, Reduce, barrier};
use parallel::dispatch::bytes::{row_bytes, rows_sent};
use parallel::dispatch::{Dispatched, ExpertGroup, Plan, Rows, Wire};
use tch::{Device, Kind, Tensor};

const EXPERTS: i64 = 16;
const TOP_K: i64 = 4;
const WIDTH: i64 = 256;

/// Values whose sums round.
fn sample(salt: usize, shape: &[i64]) -> Tensor {
    let n: i64 = shape.iter().product();
    ((Tensor::arange(n, (Kind::Double, Device::Cpu)) + salt as f64 * 17.0).sin() * 3.0).view(shape)
}

/// The experts of a rank's tokens, [T, K]; every rank can know them of every other.
fn routes(rank: usize, micro_batch: usize) -> Tensor {
    let scores = sample(rank * 5 + micro_batch, &[40 + 3 * rank as i64, EXPERTS]) * 1000.0;
    (&scores - scores.floor()).topk(TOP_K, 1, true, true).1
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    Vec::try_from(&tensor.contiguous().view([-1]).view_dtype(Kind::Uint8)).expect("bytes")
}

/// Two micro-batches under way together, as an overlapped pair has them; all that comes out of them.
fn program(group: &ExpertGroup, kind: Kind) -> Vec<u8> {
    let rank = group.all.rank();
    let each: Vec<(Plan, Tensor, Tensor)> = (0..2)
        .map(|micro_batch| {
            let routes = routes(rank, micro_batch);
            let x = sample(rank + 3, &[routes.size()[0], WIDTH]).to_kind(kind);
            let weights = sample(rank + micro_batch, &routes.size()).to_kind(Kind::Float);
            (Plan::new(&routes, EXPERTS, group).unwrap(), x, weights)
        })
        .collect();
    let sent: Vec<_> = each.iter().map(|(plan, x, weights)| plan.dispatch(x, weights).unwrap()).collect();
    let mut results = Vec::new();
    let mut back = Vec::new();
    for ((plan, ..), sent) in each.iter().zip(sent) {
        let Dispatched { rows, counts: _, weights } = sent.wait().unwrap();
        let rows = rows.into_tensor();
        results.extend([bytes(&rows), bytes(&weights)].concat());
        back.push(plan.combine(&(rows * weights.unsqueeze(1)).to_kind(kind)).unwrap());
    }
    for ((plan, x, _), back) in each.iter().zip(back) {
        results.extend(bytes(&back.wait().unwrap().sum(&[])));
        let drows = plan.combine_backward(x).unwrap().wait().map(Rows::into_tensor).unwrap();
        let dweights = drows.sum_dim_intlist(&[1i64][..], false, Kind::Float);
        let gradient = plan.dispatch_backward(&drows, &dweights).unwrap().wait().unwrap();
        results.extend([bytes(&drows), bytes(&gradient.x.sum(&[])), bytes(&gradient.weights)].concat());
    }
    results
}

fn on_nodes(all: Comm, per_node: usize, wire: Wire) -> ExpertGroup {
    let nodes: Vec<usize> = (0..all.size()).map(|rank| rank / per_node).collect();
    ExpertGroup::new(all, &nodes).unwrap().with_wire(wire)
}

/// Bytes of one dispatch of all ranks, inside nodes and between them, beside the formula's.
fn figures(comm: &Comm, per_node: usize, wire: Wire) -> [(i64, i64); 2] {
    let nodes: Vec<usize> = (0..comm.size()).map(|rank| rank / per_node).collect();
    let (comm, traffic) = counted(comm.clone(), &nodes);
    let group = ExpertGroup::new(comm.clone(), &nodes).unwrap().with_wire(wire);
    let mine = routes(comm.rank(), 0);
    let plan = Plan::new(&mine, EXPERTS, &group).unwrap();
    let before = (traffic.inside_bytes(), traffic.between_bytes());
    let x = Tensor::zeros([mine.size()[0], WIDTH], (Kind::BFloat16, Device::Cpu));
    drop(plan.dispatch(&x, &mine.to_kind(Kind::Float)).unwrap().wait().unwrap());
    let counted = [traffic.inside_bytes() - before.0, traffic.between_bytes() - before.1].map(|n| n as i64);
    let counted = comm.all_reduce(vec![Tensor::from_slice(&counted)], Reduce::Sum).unwrap().wait().unwrap();
    let all: Vec<Vec<Vec<i64>>> = (0..comm.size()).map(|rank| Vec::<Vec<i64>>::try_from(&routes(rank, 0)).expect("routes")).collect();
    let (rows, row) = (rows_sent(&all, EXPERTS, &nodes), row_bytes(wire, WIDTH, Kind::BFloat16, TOP_K, Kind::Float).dispatch);
    let sum = |of: fn(&parallel::dispatch::bytes::RowsSent) -> u64| (rows.iter().map(of).sum::<u64>() * row) as i64;
    let formula = [sum(|r| r.outward.inside), sum(|r| r.outward.between)];
    [0, 1].map(|i| (counted[0].int64_value(&[i as i64]), formula[i]))
}

fn main() {
    tch::set_num_threads(1);
    let world = MpiWorld::init().expect("MPI");
    let comm = world.comm();
    let size = comm.size();
    for per_node in (1..=size).filter(|&n| size.is_multiple_of(n)) {
        for (kind, wire) in [(Kind::Double, Wire::Own), (Kind::Float, Wire::Own), (Kind::BFloat16, Wire::Own), (Kind::BFloat16, Wire::Fp8)]
        {
            let expected = run_local(size, |all| program(&on_nodes(all, per_node, wire), kind));
            for all in [comm.clone(), checked(comm.clone(), "experts")] {
                let found = program(&on_nodes(all, per_node, wire), kind);
                assert!(found == expected[comm.rank()], "rank {}: {kind:?} {wire:?}, {per_node} ranks a node", comm.rank());
            }
        }
        for wire in [Wire::Own, Wire::Fp8] {
            let figures = figures(&comm, per_node, wire);
            for (place, (counted, formula)) in ["inside", "between"].iter().zip(figures) {
                assert_eq!(counted, formula, "{wire:?} {place}, {per_node} ranks a node");
                if comm.rank() == 0 {
                    println!("{size} ranks, {per_node} a node, {wire:?}: {counted} bytes {place} nodes, formula {formula}");
                }
            }
        }
    }
    barrier(&*comm).expect("the end");
    if comm.rank() == 0 {
        println!("dispatch_check: {size} ranks equal");
    }
}
