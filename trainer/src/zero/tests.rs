use super::layout::{BLOCK_ROWS, blocks, owners};
use super::*;
use kernels::Precision;
use model::params::Init;
use model::{ExpertShare, GradSink};
use parallel::comm::local::{run_local, solo};
use parallel::mesh::{Mesh, ParallelConfig};
use std::collections::BTreeMap;

/// Numbers that look random, the same ones for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: i64) -> i64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) % limit as u64) as i64
    }
}

/// Ten parameters of every role and of random shapes; experts as this rank's share of `ep`.
fn table(seed: u64, share: ExpertShare) -> Rc<ParamTable> {
    let mut dice = Dice(seed);
    let mut table = ParamTable::new(share, Default::default());
    let normal = Init::Normal { std: 1.0 };
    let config =
        model::ModelConfig { initializer_range: 1.0, ..toml::from_str(include_str!("../../../configs/model/tiny.toml")).expect("a model") };
    for index in 0..2 {
        let name = |kind: &str| format!("{index}.{kind}");
        table.add(name("matrix"), &[1 + dice.below(700), 1 + dice.below(5)], normal, Role::Matrix);
        table.add(name("gate"), &[1 + dice.below(300), 3], normal, Role::Gate);
        table.add(name("bias"), &[1 + dice.below(300)], Init::Zeros, Role::Bias);
        table.experts(name("experts"), &[share.ranks * (1 + dice.below(9)), 1 + dice.below(4), 3], &config);
        table.norm(name("norm"), 1 + dice.below(400));
    }
    table.add("embedding", &[1 + dice.below(900), 2], normal, Role::Embedding);
    Rc::new(table)
}

fn weights(seed: u64, groups: &Groups, precision: Precision) -> Weights {
    let share = ExpertShare { rank: groups.expert.all.rank() as i64, ranks: groups.expert.all.size() as i64, stays: false };
    Weights::initial(table(seed, share), precision, seed, Device::Cpu)
}

fn in_groups<R: Send>(dp: usize, ep: usize, f: impl Fn(Groups) -> R + Sync) -> Vec<R> {
    let mesh = ParallelConfig { dp, ep, ..Default::default() }.validate(&vec![0; dp]).expect("a mesh");
    run_local(dp, |world| f(groups(world, &mesh)))
}

fn groups(world: Comm, mesh: &Mesh) -> Groups {
    Groups::new(world, mesh, true).expect("groups")
}

/// The gradient that a rank of the world contributes to a logical parameter: whole numbers, so that sums are exact.
fn gradient(table: &ParamTable, id: ParamId, rank: usize) -> Tensor {
    let spec = table.spec(id);
    let row = spec.numel() / spec.shape[0];
    let index = Tensor::arange_start(spec.start * row, spec.start * row + spec.numel(), (Kind::Double, Device::Cpu));
    ((index + id.0 as i64 * 1000) * (rank + 1) as f64).view(&spec.shape[..])
}

fn trained(table: &ParamTable) -> Vec<ParamId> {
    table.ids().filter(|&id| table.spec(id).trained()).collect()
}

#[test]
fn every_row_has_one_owner_among_its_holders() {
    for seed in 0..12 {
        let (dp, ep) = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (6, 3), (7, 1), (8, 4)][seed as usize % 8];
        let bytes = [64, 4096, 1 << 20][seed as usize % 3];
        let all = in_groups(dp, ep, |groups| {
            let weights = weights(seed, &groups, Precision::F64);
            let zero = Zero::new(&groups, &weights, bytes).expect("alike on all ranks");
            assert!(zero.shards.is_sorted_by_key(|shard| shard.id.0) && zero.shards.iter().all(|shard| shard.rows > 0));
            for bucket in &zero.buckets {
                let blocks: Vec<i64> =
                    bucket.ids.iter().flat_map(|&id| blocks(weights.table.spec(id))).map(|(_, _, numel)| numel).collect();
                let (total, largest, ranks) = (blocks.iter().sum::<i64>(), blocks.iter().max().unwrap(), bucket.reduce.ranks as i64);
                assert!(bucket.reduce.width <= total / ranks + largest, "{total} elements in {ranks} pieces of {}", bucket.reduce.width);
            }
            // In rows of the logical tensors.
            let place = |shard: &Shard| (shard.spec(weights.table.spec(shard.id)), weights.table.spec(shard.id).clone());
            zero.shards.iter().map(place).collect::<Vec<_>>()
        });
        let mut seen: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        for (shard, of) in all.iter().flatten() {
            assert!(shard.role == Role::Experts || (shard.start % BLOCK_ROWS == 0), "{} starts inside a block", shard.name);
            assert!(
                of.role == Role::Experts || shard.shape[0] % BLOCK_ROWS == 0 || shard.start + shard.shape[0] == of.total,
                "{} ends inside a block",
                of.name
            );
            let rows = seen.entry(shard.name.clone()).or_insert_with(|| vec![0; shard.total as usize]);
            rows[shard.start as usize..][..shard.shape[0] as usize].iter_mut().for_each(|count| *count += 1);
        }
        assert_eq!(seen.len(), 9, "parameters that are trained");
        assert!(seen.values().flatten().all(|&count| count == 1), "dp {dp}, ep {ep}: {seen:?}");
    }
}

#[test]
fn blocks_are_shared_out_so_that_the_largest_share_is_smallest() {
    assert_eq!(owners(&[5, 5, 5, 5], 2), [0, 0, 1, 1]);
    assert_eq!(owners(&[9, 1, 1, 1], 2), [0, 1, 1, 1]);
    assert_eq!(owners(&[1, 1, 1, 9], 3), [0, 0, 0, 1]);
    assert_eq!(owners(&[3], 4), [0]);
    assert_eq!(owners(&[], 4), [0usize; 0]);
    let mut dice = Dice(1);
    for _ in 0..50 {
        let (blocks, ranks) = ((0..1 + dice.below(9)).map(|_| 1 + dice.below(20)).collect::<Vec<_>>(), 1 + dice.below(4) as usize);
        let share = |owners: &[usize]| {
            (0..ranks).map(|rank| blocks.iter().zip(owners).filter(|(_, owner)| **owner == rank).map(|(n, _)| n).sum::<i64>()).max()
        };
        let found = owners(&blocks, ranks);
        assert!(found.is_sorted() && found.iter().all(|&owner| owner < ranks));
        // Every way to cut the list, by brute force.
        let cuts = (0..(ranks as u64).pow(blocks.len() as u32))
            .map(|code| (0..blocks.len()).map(|i| (code / (ranks as u64).pow(i as u32) % ranks as u64) as usize).collect::<Vec<_>>());
        let best = cuts.filter(|owners| owners.is_sorted()).map(|owners| share(&owners)).min().unwrap();
        assert_eq!(share(&found), best, "{blocks:?} over {ranks}");
    }
}

/// Reduces once, the parameters completed in an order of this rank's own; `alter` may tamper with what goes in.
fn reduced(groups: &Groups, bytes: usize, alter: impl Fn(ParamId, Tensor) -> Tensor) -> f64 {
    let weights = weights(3, groups, Precision::F64);
    let zero = Zero::new(groups, &weights, bytes).expect("alike on all ranks");
    let rank = groups.world.rank();
    let mut order = trained(&weights.table);
    order.sort_by_key(|id| Dice((id.0 * 31 + rank) as u64).below(1000));
    let (mut reduction, mut later) = (zero.begin(false), Vec::new());
    for id in order {
        let whole = alter(id, gradient(&weights.table, id, rank));
        // What nobody waits for comes later.
        let leaving = reduction.leaving(id);
        assert!(leaving.is_empty() || leaving.len() <= 2 && leaving.is_sorted_by(|a, b| a.end < b.start), "before and after this rank's own: {leaving:?}");
        let of = |tensor: &Tensor, rows: &Range<i64>| tensor.narrow(0, rows.start, rows.end - rows.start);
        let part = if leaving.is_empty() { whole.shallow_clone() } else { whole.full_like(f64::NAN) };
        leaving.iter().for_each(|rows| of(&part, rows).copy_(&of(&whole, rows)));
        reduction.complete(id, part.shallow_clone());
        if !leaving.is_empty() {
            let own = zero.shards().iter().filter(|shard| shard.id == id);
            later.extend(own.map(|shard| (shard.of(&part), shard.of(&whole))));
        }
    }
    assert!(groups.world.size() == 1 || bytes > 64 || !later.is_empty(), "some bucket starts with its last gradient");
    let arriving = reduction.finish().expect("all are complete");
    later.into_iter().for_each(|(mut part, whole)| part.copy_(&whole));
    let (sums, squares) = arriving.sum().expect("sums");
    let square: f64 = sums.iter().map(|sum| sum.square().sum(Kind::Double).double_value(&[])).sum();
    assert!((squares.double_value(&[]) / square - 1.0).abs() < 1e-12);
    let mut worst = 0f64;
    for (shard, sum) in zero.shards().iter().zip(&sums) {
        let holders = holders(groups, weights.table.spec(shard.id).role);
        assert_eq!(sum.size(), shard.spec(weights.table.spec(shard.id)).shape);
        // Σ over the holders of (rank + 1) is what the gradient of rank 0 is multiplied by.
        let step = groups.world.size() / holders.size();
        let factor: usize = (0..holders.size()).map(|index| rank % step + index * step + 1).sum();
        let expected = shard.of(&gradient(&weights.table, shard.id, 0)) * factor as f64;
        worst = worst.max((sum - &expected).abs().max().double_value(&[]) / (1.0 + expected.abs().max().double_value(&[])));
    }
    worst
}

#[test]
fn an_owner_gets_the_sum_over_all_holders_whatever_order_gradients_complete_in() {
    for (dp, ep) in [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)] {
        for bytes in [64, 4096, BUCKET_BYTES] {
            in_groups(dp, ep, |groups| {
                assert_eq!(reduced(&groups, bytes, |_, gradient| gradient), 0.0, "dp {dp}, ep {ep}, buckets of {bytes}")
            });
        }
    }
    // The comparison sees a wrong divisor on one rank, and a gradient that is dropped.
    let worst = |tamper: fn(Tensor) -> Tensor| {
        let found = in_groups(2, 1, |groups| {
            let first = groups.world.rank() == 0;
            reduced(&groups, 4096, |id, gradient| if first && id.0 == 0 { tamper(gradient) } else { gradient })
        });
        found.into_iter().fold(0.0, f64::max)
    };
    assert!(worst(|gradient| gradient / 2.0) > 0.1 && worst(|gradient| gradient * 0.0) > 0.1);
}

#[test]
fn buckets_start_in_one_order_and_as_soon_as_they_may() {
    in_groups(2, 1, |groups| {
        let weights = weights(5, &groups, Precision::F64);
        let zero = Zero::new(&groups, &weights, 64).expect("alike on all ranks");
        assert!(zero.buckets.len() >= 4, "{} buckets", zero.buckets.len());
        let mut reduction = zero.begin(false);
        let started = |reduction: &Reduction| reduction.filling.iter().filter(|filling| filling.arriving.is_some()).count();
        let ids = trained(&weights.table);
        // A backward completes the last first.
        let lane = |id: ParamId| {
            if let Route::Bucket(index) = zero.routes[id.0] { zero.buckets[index].lane } else { unreachable!("two ranks hold it") }
        };
        let last = *ids.iter().rev().find(|&&id| lane(id) == lane(ids[0])).unwrap();
        for &id in ids.iter().filter(|&&id| lane(id) == lane(ids[0]) && id != last) {
            reduction.complete(id, gradient(&weights.table, id, groups.world.rank()));
        }
        assert_eq!(started(&reduction), 0, "the bucket of the last parameter goes first");
        reduction.complete(last, gradient(&weights.table, last, groups.world.rank()));
        assert_eq!(started(&reduction), zero.lanes[lane(last)].buckets.len());
        for &id in ids.iter().filter(|&&id| lane(id) != lane(ids[0])) {
            reduction.complete(id, gradient(&weights.table, id, groups.world.rank()));
        }
        assert_eq!(started(&reduction), zero.buckets.len());
        drop(reduction.finish().expect("they are on their way"));
    });
}

#[test]
fn late_none_starts_before_all_are_complete() {
    in_groups(2, 1, |groups| {
        let weights = weights(5, &groups, Precision::F64);
        let zero = Zero::new(&groups, &weights, 64).expect("alike on all ranks");
        let sums = |late: bool| {
            let mut reduction = zero.begin(late);
            for id in trained(&weights.table).into_iter().rev() {
                reduction.complete(id, gradient(&weights.table, id, groups.world.rank()));
            }
            let started = reduction.filling.iter().filter(|filling| filling.arriving.is_some()).count();
            assert_eq!(started, if late { 0 } else { zero.buckets.len() });
            reduction.finish().and_then(Arriving::sum).expect("sums").0
        };
        assert!(sums(true).iter().zip(sums(false)).all(|(late, early)| late.equal(&early)));
    });
}

#[test]
fn new_values_reach_every_holder_in_the_kinds_that_layers_compute_with() {
    for precision in [Precision::F64, Precision::Bf16] {
        for (dp, ep) in [(2, 1), (4, 2), (3, 1)] {
            in_groups(dp, ep, |groups| {
                let mut weights = weights(9, &groups, precision);
                let zero = Zero::new(&groups, &weights, 2048).expect("alike on all ranks");
                let before: Vec<Tensor> = weights.table.ids().map(|id| weights.get(id).copy()).collect();
                for shard in zero.shards() {
                    let mut rows = shard.of(weights.get(shard.id));
                    let new = &rows * 2.0 + 1.0;
                    rows.copy_(&new);
                }
                zero.turns().iter().try_for_each(|turn| zero.gather(turn, &mut weights, None)).expect("it starts");
                weights.ready(|_| true).expect("it lands");
                for id in weights.table.ids() {
                    let before = &before[id.0];
                    let expected = if weights.table.spec(id).trained() { before * 2.0 + 1.0 } else { before.copy() };
                    assert!(weights.get(id).equal(&expected), "{} with dp {dp}, ep {ep}", weights.table.spec(id).name);
                }
            });
        }
    }
}

#[test]
fn alone_nothing_is_copied() {
    let groups = groups(solo(), &Mesh::single());
    let mut weights = weights(1, &groups, Precision::F64);
    let zero = Zero::new(&groups, &weights, BUCKET_BYTES).expect("alike on all ranks");
    let ids = trained(&weights.table);
    assert_eq!(zero.shards().iter().map(|shard| shard.id).collect::<Vec<_>>(), ids);
    let gradients: Vec<Tensor> = ids.iter().map(|&id| gradient(&weights.table, id, 0)).collect();
    let mut reduction = zero.begin(false);
    ids.iter().zip(&gradients).rev().for_each(|(&id, gradient)| reduction.complete(id, gradient.shallow_clone()));
    let (sums, squares) = reduction.finish().and_then(Arriving::sum).expect("no transfer");
    assert!(sums.iter().zip(&gradients).all(|(sum, gradient)| sum.data_ptr() == gradient.data_ptr()));
    let square = |x: &Tensor| x.square().sum(Kind::Double).double_value(&[]);
    let expected: f64 = gradients.iter().map(square).sum();
    assert!((squares.double_value(&[]) / expected - 1.0).abs() < 1e-12);
    let turns = zero.turns();
    assert!(turns.len() == 1 && turns[0].shards == (0..ids.len()).collect::<Vec<_>>());
    zero.gather(&turns[0], &mut weights, None).expect("nothing to gather");
}

#[test]
#[should_panic(expected = "never came")]
fn a_missing_gradient_is_noticed() {
    in_groups(2, 1, |groups| {
        let weights = weights(1, &groups, Precision::F64);
        let zero = Zero::new(&groups, &weights, BUCKET_BYTES).expect("alike on all ranks");
        let mut reduction = zero.begin(false);
        trained(&weights.table).into_iter().skip(1).for_each(|id| reduction.complete(id, gradient(&weights.table, id, 0)));
        reduction.finish().map(|_| ()).expect("sums");
    });
}

#[test]
fn ranks_that_declared_their_parameters_in_another_order_are_refused() {
    let refused = in_groups(2, 1, |groups| {
        let rank = groups.world.rank();
        let mut table = ParamTable::default();
        for index in [rank, 1 - rank] {
            table.add(format!("matrix.{index}"), &[4, 4], Init::Zeros, Role::Matrix);
        }
        let weights = Weights::initial(Rc::new(table), Precision::F64, 1, Device::Cpu);
        Zero::new(&groups, &weights, BUCKET_BYTES).map(|_| ()).expect_err("the same shapes, other parameters").to_string()
    });
    assert!(refused[0].contains("rank 0") && refused[0].contains("2 parameters in 1 buckets"), "{refused:?}");
}
