//! Every operation against a naive computation, for 1 to 8 ranks and every kind, and how it fails.

use super::*;
use crate::comm::{barrier, broadcast_bytes, gather_bytes, gather_bytes_at};

const SIZES: [usize; 5] = [1, 2, 3, 4, 8];
const KINDS: [Kind; 7] = [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half, Kind::Int64, Kind::Int, Kind::Uint8];

/// Small integers, exact in every kind; differs by rank, tensor and place.
fn sample(rank: usize, salt: usize, shape: &[i64], kind: Kind) -> Tensor {
    let n: i64 = shape.iter().product();
    let values: Vec<i64> = (0..n).map(|i| (i * 7 + rank as i64 * 13 + salt as i64 * 5) % 19).collect();
    Tensor::from_slice(&values).view(shape).to_kind(kind)
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(tensor.to_kind(Kind::Double).view([-1])).unwrap()
}

fn one_thread() {
    tch::set_num_threads(1);
}

#[test]
fn all_reduce_and_reduce_scatter_equal_the_naive_sum() {
    one_thread();
    for size in SIZES {
        run_local(size, |comm| {
            assert_eq!(comm.size(), size);
            for kind in KINDS {
                let shape = [2 * size as i64, 3];
                let all: Vec<Tensor> = (0..size).map(|r| sample(r, 1, &shape, kind)).collect();
                let expected: Vec<f64> = (0..shape[0] as usize * 3).map(|i| all.iter().map(|t| numbers(t)[i]).sum()).collect();
                let mine = || sample(comm.rank(), 1, &shape, kind);
                let sum = comm.all_reduce(vec![mine(), mine()], Reduce::Sum).unwrap().wait().unwrap();
                assert_eq!((sum[1].kind(), sum[1].size()), (kind, shape.to_vec()));
                assert_eq!(numbers(&sum[1]), expected, "{kind:?} of {size}");
                let piece = comm.reduce_scatter(vec![mine()]).unwrap().wait().unwrap();
                assert_eq!(piece[0].size(), [2, 3]);
                assert_eq!(numbers(&piece[0]), expected[comm.rank() * 6..comm.rank() * 6 + 6]);
                let max = comm.all_reduce(vec![mine()], Reduce::Max).unwrap().wait().unwrap();
                let min = comm.all_reduce(vec![mine()], Reduce::Min).unwrap().wait().unwrap();
                for (i, (high, low)) in numbers(&max[0]).into_iter().zip(numbers(&min[0])).enumerate() {
                    assert_eq!(high, all.iter().map(|t| numbers(t)[i]).fold(f64::MIN, f64::max));
                    assert_eq!(low, all.iter().map(|t| numbers(t)[i]).fold(f64::MAX, f64::min));
                }
            }
        });
    }
}

#[test]
fn a_large_sum_is_shared_and_has_the_bits_of_the_small_one() {
    one_thread();
    let n = SHARE_FROM + 5;
    let value = |rank: usize| (Tensor::arange(n, (Kind::Float, Device::Cpu)) * (0.1 + rank as f64)).sin();
    for size in [2, 3, 8] {
        let expected = (1..size).fold(value(0), |sum, rank| sum + value(rank));
        for result in run_local(size, |comm| comm.all_reduce(vec![value(comm.rank())], Reduce::Sum).unwrap().wait().unwrap().remove(0)) {
            assert!(result.equal(&expected));
        }
    }
}

#[test]
fn integers_stay_integers_beyond_2_to_the_53() {
    let big = (1i64 << 60) + 1;
    for result in run_local(3, |comm| comm.all_reduce(vec![Tensor::from_slice(&[big])], Reduce::Sum).unwrap().wait().unwrap()[0].int64_value(&[0])) {
        assert_eq!(result, 3 * big);
    }
}

#[test]
fn all_gather_and_broadcast_carry_every_kind() {
    for size in SIZES {
        run_local(size, |comm| {
            for kind in KINDS.into_iter().chain([Kind::Float8e4m3fn, Kind::Bool]) {
                let of = |rank: usize| sample(rank, 2, &[2, 3], kind);
                let all = comm.all_gather(vec![of(comm.rank()), of(comm.rank())]).unwrap().wait().unwrap();
                let expected: Vec<f64> = (0..size).flat_map(|r| numbers(&of(r))).collect();
                assert_eq!((all[1].kind(), all[1].size()), (kind, vec![2 * size as i64, 3]));
                assert_eq!(numbers(&all[1]), expected);
                for root in 0..size {
                    let got = comm.broadcast(vec![of(comm.rank())], root).unwrap().wait().unwrap();
                    assert_eq!(numbers(&got[0]), numbers(&of(root)));
                }
            }
        });
    }
}

#[test]
fn all_to_all_moves_uneven_rows_and_none() {
    for size in SIZES {
        run_local(size, |comm| {
            let me = comm.rank();
            // Rank r sends (r + 2 p) mod 4 rows to p: some zero, all different.
            let rows = |from: usize, to: usize| ((from + 2 * to) % 4) as i64;
            let send: Vec<i64> = (0..size).map(|p| rows(me, p)).collect();
            let recv: Vec<i64> = (0..size).map(|p| rows(p, me)).collect();
            let payload = |from: usize, salt| sample(from, salt, &[(0..size).map(|p| rows(from, p)).sum(), 2], Kind::BFloat16);
            let got = comm.all_to_all(vec![payload(me, 1), payload(me, 2)], &send, &recv).unwrap().wait().unwrap();
            for (salt, got) in [(1, &got[0]), (2, &got[1])] {
                let expected: Vec<f64> = (0..size)
                    .flat_map(|from| {
                        let before: i64 = (0..me).map(|p| rows(from, p)).sum();
                        numbers(&payload(from, salt).narrow(0, before, rows(from, me)))
                    })
                    .collect();
                assert_eq!(got.size(), [recv.iter().sum::<i64>(), 2]);
                assert_eq!(numbers(got), expected);
            }
            let counts: Vec<Vec<i64>> = (0..size).map(|p| vec![me as i64, p as i64, 1 << 40]).collect();
            let got = comm.exchange_counts(&counts).unwrap();
            assert_eq!(got, (0..size).map(|p| vec![p as i64, me as i64, 1 << 40]).collect::<Vec<_>>());
        });
    }
}

#[test]
fn exchange_matches_the_kth_send_with_the_kth_receive_whatever_the_waits() {
    for size in SIZES {
        run_local(size, |comm| {
            let (me, next, previous) = (comm.rank(), (comm.rank() + 1) % size, (comm.rank() + size - 1) % size);
            let spec = || TensorSpec { shape: vec![3], kind: Kind::Float, device: Device::Cpu };
            let sends = |salt: usize| vec![(next, sample(me, salt, &[3], Kind::Float)), (next, sample(me, salt + 1, &[3], Kind::Float))];
            let first = comm.exchange(sends(0), vec![(previous, spec()), (previous, spec())]).unwrap();
            let second = comm.exchange(sends(2), vec![(previous, spec()), (previous, spec())]).unwrap();
            let (second, first) = (second.wait().unwrap(), first.wait().unwrap());
            for (salt, got) in first.iter().chain(&second).enumerate() {
                assert_eq!(numbers(got), numbers(&sample(previous, salt, &[3], Kind::Float)));
            }
        });
    }
}

#[test]
fn the_order_of_waits_is_free_and_a_dropped_pending_still_counts() {
    run_local(3, |comm| {
        let one = || vec![Tensor::from_slice(&[1.0f32])];
        let first = comm.all_reduce(one(), Reduce::Sum).unwrap();
        let dropped = comm.all_gather(one()).unwrap();
        let second = comm.reduce_scatter(vec![Tensor::from_slice(&[1.0f32, 2.0, 3.0])]).unwrap();
        drop(dropped);
        let (first, second) = if comm.rank() == 1 {
            let second = second.wait().unwrap();
            (first.wait().unwrap(), second)
        } else {
            (first.wait().unwrap(), second.wait().unwrap())
        };
        assert_eq!(first[0].double_value(&[0]), 3.0);
        assert_eq!(second[0].double_value(&[0]), 3.0 * (comm.rank() as f64 + 1.0));
    });
}

#[test]
fn a_rank_may_write_to_its_tensor_once_it_is_posted() {
    run_local(4, |comm| {
        for _ in 0..20 {
            let mut mine = Tensor::from_slice(&[1.0f32; 64]);
            let sum = comm.all_reduce(vec![mine.shallow_clone()], Reduce::Sum).unwrap();
            let _ = mine.fill_(1e9);
            let mut sum = sum.wait().unwrap().remove(0);
            assert_eq!(sum.max().double_value(&[]), 4.0);
            let _ = sum.fill_(-1.0);
        }
    });
}

#[test]
fn split_orders_by_key_and_groups_do_not_mix() {
    run_local(8, |comm| {
        let group = comm.split(comm.rank() % 2, 8 - comm.rank()).unwrap();
        assert_eq!((group.size(), group.rank()), (4, 3 - comm.rank() / 2));
        let pair = group.split(group.rank() / 2, 0).unwrap();
        let all = pair.all_gather(vec![Tensor::from_slice(&[comm.rank() as i64])]).unwrap().wait().unwrap();
        let expected = group.all_gather(vec![Tensor::from_slice(&[comm.rank() as i64])]).unwrap().wait().unwrap();
        assert!(all[0].equal(&expected[0].narrow(0, group.rank() as i64 / 2 * 2, 2)));
        assert_eq!(expected[0].int64_value(&[0]), 6 + (comm.rank() % 2) as i64);
        barrier(&*comm).unwrap();
        let bytes = gather_bytes(&*comm, format!("rank {}", comm.rank() * 100).as_bytes()).unwrap();
        assert_eq!(bytes[7], b"rank 700");
        assert_eq!(broadcast_bytes(&*group, &bytes[comm.rank()], 0).unwrap(), bytes[6 + comm.rank() % 2]);
    });
}

#[test]
fn bytes_of_any_length_come_to_the_root_alone() {
    for size in SIZES {
        run_local(size, |comm| {
            for root in 0..size {
                let all = gather_bytes_at(&*comm, &vec![comm.rank() as u8; comm.rank() * 1000], root).unwrap();
                let expected: Vec<Vec<u8>> = (0..size).map(|rank| vec![rank as u8; rank * 1000]).collect();
                assert_eq!(all, if comm.rank() == root { expected } else { Vec::new() });
            }
        });
    }
}

#[test]
fn disagreement_names_both_calls() {
    let results = run_local(3, |comm| {
        let length = if comm.rank() == 2 { 5 } else { 4 };
        let reduced = comm.all_reduce(vec![Tensor::zeros([length], (Kind::Float, Device::Cpu))], Reduce::Sum);
        reduced.and_then(Pending::wait).map(|_| ()).unwrap_err()
    });
    for (rank, error) in results.into_iter().enumerate() {
        assert!(matches!(error, CommError::Disagree { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("Float[5]") && text.contains("Float[4]"), "rank {rank}: {text}");
    }
    let results = run_local(2, |comm| {
        let tensor = vec![Tensor::zeros([2], (Kind::Float, Device::Cpu))];
        let pending = if comm.rank() == 0 { comm.all_gather(tensor) } else { comm.all_reduce(tensor, Reduce::Max) };
        pending.and_then(Pending::wait).unwrap_err().to_string()
    });
    assert!(results.iter().all(|text| text.contains("all_gather") && text.contains("all_reduce Max")), "{results:?}");
}

#[test]
fn a_panic_or_an_early_end_takes_the_others_out_of_their_waits() {
    let caught = catch_unwind(|| {
        run_local(4, |comm| {
            assert!(comm.rank() != 2, "rank 2 breaks");
            let lost = barrier(&*comm).unwrap_err();
            assert!(matches!(lost, CommError::Lost { .. }), "{lost}");
        })
    });
    let message = *caught.unwrap_err().downcast::<&str>().unwrap();
    assert_eq!(message, "rank 2 breaks");
    let results = run_local(3, |comm| comm.rank() == 1 || matches!(barrier(&*comm), Err(CommError::Lost { .. })));
    assert_eq!(results, [true; 3]);
}

#[test]
fn a_deadlock_is_an_error() {
    let results = run_local(2, |comm| {
        let spec = TensorSpec { shape: vec![1], kind: Kind::Float, device: Device::Cpu };
        comm.exchange(vec![], vec![(1 - comm.rank(), spec)]).unwrap().wait().unwrap_err().to_string()
    });
    assert!(results.iter().all(|text| text.contains("deadlock")), "{results:?}");
}

#[test]
fn what_cannot_be_reduced_or_divided_is_refused() {
    let comm = solo();
    let bool = Tensor::zeros([2], (Kind::Bool, Device::Cpu));
    assert!(matches!(comm.all_reduce(vec![bool], Reduce::Sum), Err(CommError::Unsupported { .. })));
    run_local(2, |comm| {
        let three = || vec![Tensor::zeros([3], (Kind::Float, Device::Cpu))];
        assert!(matches!(comm.reduce_scatter(three()), Err(CommError::Unsupported { .. })));
        assert!(matches!(comm.all_to_all(three(), &[1, 1], &[1, 1]), Err(CommError::Unsupported { .. })));
    });
}

#[test]
fn a_slow_link_delays_the_wait() {
    use std::time::{Duration, Instant};
    let link = Link { latency: Duration::from_millis(20), bytes_per_second: 4000.0 / 0.03 };
    run_linked(2, link, |comm| {
        barrier(&*comm).unwrap();
        let start = Instant::now();
        let first = comm.all_gather(vec![Tensor::zeros([1000], (Kind::Float, Device::Cpu))]).unwrap();
        let spec = TensorSpec { shape: vec![1000], kind: Kind::Float, device: Device::Cpu };
        let second = comm.exchange(vec![(1 - comm.rank(), Tensor::zeros([1000], (Kind::Float, Device::Cpu)))], vec![(1 - comm.rank(), spec)]).unwrap();
        let _ = (first.wait().unwrap(), second.wait().unwrap());
        // 20 ms of latency and 4000 bytes in 30 ms; a sleep is never shorter than asked.
        assert!(start.elapsed() >= Duration::from_millis(50), "{:?}", start.elapsed());
    });
}
