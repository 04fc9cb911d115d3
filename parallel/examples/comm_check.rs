//! Run under mpirun: every collective over MPI, compared bit for bit with the same program over threads.
//! `mpirun -n 4 comm_check [--bench N]`; the last line of rank 0 is `comm_check: N ranks equal`.
//! On GPU machines `--gpu peer` and `--gpu nccl` (a GPU a rank, one host) and
//! `--gpu staged` (all ranks on GPU 0) run it on GPU tensors, too; with a GPU a rank also 1000 exchanges of random counts,
//! and what the debug wrapper makes of ranks that disagree.
//! `--bench N` also times the all_reduce of N f32 elements; `--panic R` and `--wrong-size` show how it fails.

use kernels::{device, shim};
use parallel::comm::checked::checked;
use parallel::comm::local::run_local;
use parallel::comm::mpi::MpiWorld;
use parallel::comm::nccl;
use parallel::comm::peer::Slots;
use parallel::comm::{Comm, Communicator, Reduce, TensorSpec, barrier, broadcast_bytes, gather_bytes, gather_bytes_at};
use std::time::Instant;
use tch::{Device, Kind, Tensor};

const KINDS: [Kind; 6] = [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half, Kind::Int64, Kind::Int];

/// A communicator and where the program's tensors are.
#[derive(Clone, Copy)]
struct On<'a>(&'a dyn Communicator, Device);

/// Values whose sums round, so that another order of addition shows; differs by rank and `salt`.
fn sample(rank: usize, salt: usize, shape: &[i64], kind: Kind) -> Tensor {
    let n: i64 = shape.iter().product();
    let x = (Tensor::arange(n, (Kind::Double, Device::Cpu)) + (rank * 31 + salt * 7) as f64).sin() * 10f64.powi((rank * 3 % 5) as i32);
    x.view(shape).to_kind(kind)
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let flat = tensor.to_device(Device::Cpu).contiguous().view([-1]).view_dtype(Kind::Uint8);
    Vec::<u8>::try_from(&flat).expect("bytes")
}

/// Each result with a name, as shape and bytes.
type Results = Vec<(String, Vec<i64>, Vec<u8>)>;

fn keep(results: &mut Results, name: &str, tensors: Vec<Tensor>) {
    results.extend(tensors.iter().map(|t| (format!("{name} {:?}", t.kind()), t.size(), bytes(t))));
}

/// The program that both back ends run: reductions small and large, moves of every kind, groups, odd waits.
fn program(on: On) -> Results {
    let mut results = Results::new();
    let On(comm, device) = on;
    collectives(on, &mut results);
    moves(on, &mut results);
    // Sub-groups by parity in reverse order; then the world again, so that numbering does not get mixed.
    let group = comm.split(comm.rank() % 2, comm.size() - comm.rank()).unwrap();
    collectives(On(&*group, device), &mut results);
    moves(On(&*group, device), &mut results);
    let all = gather_bytes(comm, format!("{}:{}", group.rank(), "x".repeat(comm.rank())).as_bytes()).unwrap();
    let last = broadcast_bytes(comm, &all[comm.rank()], comm.size() - 1).unwrap();
    let at_one = gather_bytes_at(comm, &all[comm.rank()], comm.size() - 1).unwrap();
    results.push(("bytes".into(), vec![], [all.concat(), last, at_one.concat()].concat()));
    barrier(comm).unwrap();
    results
}

fn collectives(On(comm, device): On, results: &mut Results) {
    let sample = |rank, salt, shape: &[i64], kind| sample(rank, salt, shape, kind).to_device(device);
    let (me, size) = (comm.rank(), comm.size());
    for kind in KINDS {
        for rows in [size as i64, (4000 / size * size) as i64] {
            let mine = |salt| sample(me, salt, &[rows, 7], kind);
            for reduce in [Reduce::Sum, Reduce::Max, Reduce::Min] {
                let odd = sample(me, 9, &[rows * 7 + 1], kind);
                let got = comm.all_reduce(vec![mine(0), odd, mine(1).view([-1]).get(3)], reduce).unwrap().wait().unwrap();
                keep(results, &format!("all_reduce {reduce:?} {rows}"), got);
            }
            keep(results, "reduce_scatter", comm.reduce_scatter(vec![mine(2), mine(3)]).unwrap().wait().unwrap());
            keep(results, "all_gather", comm.all_gather(vec![mine(4), mine(5)]).unwrap().wait().unwrap());
            let none = || vec![sample(me, 10, &[0, 3], kind)];
            keep(results, "all_reduce of nothing", comm.all_reduce(none(), Reduce::Sum).unwrap().wait().unwrap());
            keep(results, "all_gather of nothing", comm.all_gather(none()).unwrap().wait().unwrap());
            keep(results, "transposed", comm.all_gather(vec![mine(4).transpose(0, 1)]).unwrap().wait().unwrap());
        }
    }
    // Two-step transfers under way together, waited for in another order on each rank.
    let first = comm.all_reduce(vec![sample(me, 6, &[50_000], Kind::Float)], Reduce::Sum).unwrap();
    let dropped = comm.all_reduce(vec![sample(me, 7, &[50_000], Kind::Float)], Reduce::Sum).unwrap();
    let second = comm.all_reduce(vec![sample(me, 8, &[50_000], Kind::Float)], Reduce::Sum).unwrap();
    let (first, second) = if me % 2 == 0 {
        drop(dropped);
        (first.wait().unwrap(), second.wait().unwrap())
    } else {
        let second = second.wait().unwrap();
        drop(dropped);
        (first.wait().unwrap(), second)
    };
    keep(results, "first", first);
    keep(results, "second", second);
}

fn moves(On(comm, device): On, results: &mut Results) {
    let (me, size) = (comm.rank(), comm.size());
    let rows = |from: usize, to: usize| ((from + 3 * to) % 4 * 5) as i64;
    let send: Vec<i64> = (0..size).map(|p| rows(me, p)).collect();
    let recv: Vec<i64> = (0..size).map(|p| rows(p, me)).collect();
    let total: i64 = send.iter().sum();
    for kind in KINDS.into_iter().chain([Kind::Uint8, Kind::Bool, Kind::Float8e4m3fn]) {
        let of = |salt, shape: &[i64]| sample(me, salt, shape, Kind::Float).clamp(-400.0, 400.0).to_kind(kind).to_device(device);
        let got = comm.all_to_all(vec![of(1, &[total, 64]), of(2, &[total])], &send, &recv).unwrap().wait().unwrap();
        keep(results, "all_to_all", got);
        for root in 0..size {
            let got = comm.broadcast(vec![of(3, &[40, 40]), of(4, &[])], root).unwrap().wait().unwrap();
            keep(results, &format!("broadcast {root}"), got);
        }
        // A ring with two messages each way, the second pair waited for first.
        let spec = |n: i64| TensorSpec { shape: vec![n, 3], kind, device };
        let (next, previous) = ((me + 1) % size, (me + size - 1) % size);
        let ring = |salt, n: i64| comm.exchange(vec![(next, of(salt, &[n, 3])), (previous, of(salt + 1, &[n, 3]))], vec![(previous, spec(n)), (next, spec(n))]);
        let (first, second) = (ring(5, 700).unwrap(), ring(7, 2).unwrap());
        keep(results, "exchange", second.wait().unwrap());
        keep(results, "exchange", first.wait().unwrap());
    }
    let counts: Vec<Vec<i64>> = (0..size).map(|p| vec![(me * 10 + p) as i64, (1 << 60) + p as i64]).collect();
    results.push(("counts".into(), vec![], comm.exchange_counts(&counts).unwrap().concat().iter().flat_map(|c| c.to_le_bytes()).collect()));
}

fn compare(mine: &Results, expected: &Results, rank: usize) {
    assert_eq!(mine.len(), expected.len());
    for (index, (got, want)) in mine.iter().zip(expected).enumerate() {
        assert!(got == want, "rank {rank}: result {index} ({}, {:?}) over MPI differs from threads ({}, {:?})", got.0, got.1, want.0, want.1);
    }
}

fn bench(comm: &Comm, elements: i64) {
    let x = sample(comm.rank(), 0, &[elements], Kind::Float);
    for round in 0..6 {
        barrier(&**comm).unwrap();
        let start = Instant::now();
        let sum = comm.all_reduce(vec![x.shallow_clone()], Reduce::Sum).unwrap().wait().unwrap();
        assert_eq!(sum[0].size(), [elements]);
        if comm.rank() == 0 && round > 0 {
            let seconds = start.elapsed().as_secs_f64();
            println!("all_reduce {elements} f32 on {} ranks: {:.1} ms, {:.2} GB/s", comm.size(), seconds * 1e3, elements as f64 * 4e-9 / seconds);
        }
    }
    let small = Instant::now();
    for _ in 0..1000 {
        let _ = comm.all_reduce(vec![Tensor::from_slice(&[1.0f32])], Reduce::Sum).unwrap().wait().unwrap();
    }
    if comm.rank() == 0 {
        println!("all_reduce of one number: {:.1} µs", small.elapsed().as_secs_f64() * 1e3);
    }
}

/// The same on GPU tensors: with a GPU a rank, or staged through the host with all ranks on GPU 0.
fn gpu(comm: &Comm, over: &str, expected: &Results) {
    let device: usize = if over == "staged" { 0 } else { comm.rank() };
    let options = device::Options { local_rank: device, torch_cuda: None, nvrtc_folder: None, kernel_cache: std::env::temp_dir().join("comm_check-kernels"), spared_sms: 0 };
    let found = device::open(&options).expect("a GPU that is there must be usable");
    assert!(matches!(&found, device::Found::Gpu(gpu) if gpu.device() == Device::Cuda(device)), "no GPU {device}");
    let on = Device::Cuda(device);
    if over == "staged" {
        compare(&program(On(&**comm, on)), expected, comm.rank());
    } else {
        // Small slots: messages of many pieces, none of which ends where a row does.
        let small = Slots { count: 4, bytes: 12_288 };
        for slots in [Some(small), None] {
            let options = nccl::Options { device, peers: over == "peer", slots, ..Default::default() };
            let carrier = nccl::connect(comm.clone(), &options).expect("a GPU group");
            compare(&program(On(&*carrier, on)), expected, comm.rank());
            compare(&program(On(&*checked(carrier.clone(), "world"), on)), expected, comm.rank());
            random_exchanges(&*carrier, on, 500);
            memory_comes_back(&*carrier, on);
            if over == "peer" {
                disagree(&*checked(carrier, "world"), on); // NCCL would wait for ever
            }
        }
    }
    if comm.rank() == 0 {
        println!("comm_check: GPU tensors equal on {} ranks over {over}", comm.size());
    }
}

/// A row that says where it comes from, where it goes and when; every byte is looked at.
fn random_exchanges(comm: &dyn Communicator, device: Device, count: u64) {
    let (me, size) = (comm.rank(), comm.size());
    // splitmix64: the same numbers on every rank.
    let random = |seed: u64| {
        let x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x ^ (x >> 29)
    };
    let bad: Tensor = Tensor::zeros([], (Kind::Int64, device));
    for number in 0..count {
        let width = [1, 3, 64, 257][random(number) as usize % 4];
        let rows = |from: usize, to: usize| match random(number ^ 0xabcd) % 5 {
            0 => 0,                                                       // nobody sends
            1 => 999 * i64::from(to == (number as usize + 1) % size),     // all to one
            2 => i64::from(from == number as usize % size),               // one sends
            _ => (random(number * 64 + (from * 8 + to) as u64) % 4001) as i64,
        };
        let value = |from: usize, to: usize| ((number * 131 + from as u64 * 17 + to as u64 * 5) % 251) as i64;
        let block = |from: usize, to: usize| {
            let n = rows(from, to);
            (Tensor::arange(n * width, (Kind::Int64, device)) + value(from, to)).remainder(253).to_kind(Kind::Uint8).view([n, width])
        };
        let sent: Vec<Tensor> = (0..size).map(|to| block(me, to)).collect();
        let want: Vec<Tensor> = (0..size).map(|from| block(from, me)).collect();
        let counts = |of: &[Tensor]| of.iter().map(|t| t.size()[0]).collect::<Vec<_>>();
        let got = comm.all_to_all(vec![Tensor::cat(&sent, 0)], &counts(&sent), &counts(&want)).unwrap().wait().unwrap();
        let _ = bad.shallow_clone().g_add_(&got[0].not_equal_tensor(&Tensor::cat(&want, 0)).sum(Kind::Int64));
    }
    assert_eq!(bad.int64_value(&[]), 0, "rank {me}: bytes that are not what was sent");
}

/// What was received and dropped can be had again, also where torch gives what it keeps back to the driver.
fn memory_comes_back(comm: &dyn Communicator, device: Device) {
    const BYTES: i64 = 256 << 20;
    let free = || device::gpu(device).memory().expect("the GPU says").free_bytes;
    let rows = vec![BYTES / 4096 / comm.size() as i64; comm.size()];
    let mut before = 0;
    for round in 0..16 {
        let sent = Tensor::zeros([rows.iter().sum(), 4096], (Kind::Uint8, device));
        drop(comm.all_to_all(vec![sent], &rows, &rows).unwrap().wait().unwrap());
        device::gpu(device).synchronize().expect("the GPU");
        barrier(comm).unwrap(); // what is sent from a GPU is there, too
        shim::empty_cache().expect("torch's allocator");
        barrier(comm).unwrap();
        before = if round == 0 { free() } else { before };
    }
    assert!(free() + BYTES as usize > before, "rank {}: {before} bytes were free, now {}", comm.rank(), free());
}

/// Rank 0 sends 2 numbers where rank 1 expects 10: the next collective says so, on both.
fn disagree(comm: &dyn Communicator, device: Device) {
    let numbers = |n: i64| Tensor::zeros([n], (Kind::Float, device));
    let spec = TensorSpec { shape: vec![10], kind: Kind::Float, device };
    match comm.rank() {
        0 => drop(comm.exchange(vec![(1, numbers(2))], vec![]).unwrap().wait().unwrap()),
        1 => drop(comm.exchange(vec![], vec![(0, spec)]).unwrap().wait().unwrap()),
        _ => {}
    }
    let error = comm.all_reduce(vec![numbers(1)], Reduce::Sum).err().expect("the ranks disagree").to_string();
    let told = if comm.rank() == 1 { "Float[10]" } else { "" };
    assert!(error.contains("exchange") && error.contains(told), "{error}");
}

/// Rank 0 sends 2 numbers where rank 1 expects 10.
fn wrong_size(comm: &dyn Communicator) {
    let spec = TensorSpec { shape: vec![10], kind: Kind::Float, device: Device::Cpu };
    let pending = match comm.rank() {
        0 => comm.exchange(vec![(1, Tensor::from_slice(&[1.0f32, 2.0]))], vec![]),
        _ => comm.exchange(vec![], vec![(0, spec)]),
    };
    if let Err(error) = pending.and_then(|p| p.wait()) {
        println!("{error}");
    }
}

fn main() {
    device::many_queues();
    tch::set_num_threads(1);
    let world = MpiWorld::init().expect("MPI");
    let comm = world.comm();
    let args: Vec<String> = std::env::args().collect();
    if let Some(at) = args.iter().position(|a| a == "--panic") {
        assert!(args[at + 1] != comm.rank().to_string(), "rank {} breaks as asked", comm.rank());
        barrier(&*comm).expect("the job ends in this wait");
    }
    if args.iter().any(|a| a == "--wrong-size") {
        return wrong_size(&*comm);
    }
    let expected = run_local(comm.size(), |comm| program(On(&*comm, Device::Cpu)));
    compare(&program(On(&*comm, Device::Cpu)), &expected[comm.rank()], comm.rank());
    // The same in pieces of 9,999 bytes: what a message over 2 GiB goes through, cut where no element ends.
    world.set_piece_bytes(9_999);
    compare(&program(On(&*comm, Device::Cpu)), &expected[comm.rank()], comm.rank());
    world.set_piece_bytes(1 << 30);
    // The debug wrapper sees no disagreement where there is none.
    compare(&program(On(&*checked(comm.clone(), "world"), Device::Cpu)), &expected[comm.rank()], comm.rank());
    assert_eq!(world.nodes().expect("nodes"), vec![0; comm.size()], "one host, one node ({})", world.host());
    if let Some(at) = args.iter().position(|a| a == "--gpu") {
        gpu(&comm, &args[at + 1], &expected[comm.rank()]);
    }
    if let Some(at) = args.iter().position(|a| a == "--bench") {
        bench(&comm, args[at + 1].parse().expect("a number of elements"));
    }
    barrier(&*comm).expect("the end");
    if comm.rank() == 0 {
        println!("comm_check: {} ranks equal, {} results", comm.size(), expected[0].len());
    }
}
