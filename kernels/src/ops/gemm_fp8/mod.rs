//! The three FP8 GEMMs of a linear (report §3.3), dense and grouped by expert: one pair of CUDA kernels for both.
//!
//! K-major operands: Fprop reads x by rows and W; Dgrad dy by rows and Wᵀ; Wgrad dy and x by columns. The output of
//! the first two is BF16; Wgrad adds into FP32. Sizes: any M ≥ 0; N a multiple of 8, of Wgrad's gradient 16, K of 16 (rows of
//! 16 bytes).
//!
//! Legend: M rows, N output columns, K contraction, E experts, P padded rows.
use crate::device::{self, DeviceError, Gpu, Kernel};
use crate::fp8::{Blocks, Columns, Rows, TILE};
use crate::jit::Source;
use crate::launch::Launch;
use crate::sass::KEEP_FACTORS;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use tch::{Device, Kind, Tensor};

pub(crate) mod cpu;
mod plan;
mod wgmma;
pub use plan::{FORWARD_PLANS, Plan, WGRAD_PLANS};

pub(crate) const HOPPER: &str = include_str!("hopper.cuh");
const FORWARD: &str = include_str!("forward.cu");
const WGRAD: &str = include_str!("wgrad.cu");

/// What a caller may ask of a GEMM beside its operands.
#[derive(Clone, Copy, Default)]
pub struct Options {
    /// Multiprocessors to use, so that another kernel fits beside; None: all.
    pub num_sms: Option<usize>,
    /// A tile to use instead of the model's choice (benchmarks).
    pub plan: Option<Plan>,
    /// FP32 output (tests of accuracy); BF16 otherwise.
    pub out_fp32: bool,
    /// Sum along all of K in the matrix unit, whose accumulator keeps too few bits. Only a test wants this.
    pub without_promotion: bool,
}

/// a [M, K], b [N, K] → a · bᵀ, [M, N].
pub fn forward(a: &Rows, b: &Blocks, options: Options) -> Tensor {
    let (n, _) = b.values.size2().expect("one expert's weights");
    let out = out_like(a, n, options);
    forward_into(a, b, None, &out, options);
    out
}

/// `gradient` [M, N] FP32 = or += dyᵀ · x, for `rows` rows quantised by columns.
pub fn wgrad(dy: &Columns, x: &Columns, rows: i64, gradient: &mut Tensor, write: Write, options: Options) {
    wgrad_into(dy, x, (Groups { counts: None, rows }, 0..1), gradient, write, options);
}

/// What Wgrad does with what lies in the gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    Accumulate,
    /// The first micro-batch of a step: saves zeroing and one read.
    Assign,
}

/// Rows by expert: `counts` [E] i32 on the device, or one group of `rows`.
#[derive(Clone, Copy)]
pub(crate) struct Groups<'a> {
    pub counts: Option<&'a Tensor>,
    pub rows: i64,
}

impl Groups<'_> {
    fn num(&self) -> i64 {
        self.counts.map_or(1, |counts| counts.size1().expect("counts are [E]"))
    }
}

pub(crate) fn out_like(a: &Rows, n: i64, options: Options) -> Tensor {
    let kind = if options.out_fp32 { Kind::Float } else { Kind::BFloat16 };
    Tensor::empty([a.values.size()[0], n], (kind, a.values.device()))
}

/// b [N, K] or [E, N, K]; out [M, N], of which only rows that belong to an expert are written.
pub(crate) fn forward_into(a: &Rows, b: &Blocks, counts: Option<&Tensor>, out: &Tensor, options: Options) {
    let (m, k) = a.values.size2().expect("a is [M, K]");
    let groups = Groups { counts, rows: m };
    let size = b.values.size();
    let n = size[size.len() - 2];
    assert_eq!(size[size.len() - 1], k, "a [{m}, {k}] and b {size:?} contract over different lengths");
    assert_eq!(size.iter().product::<i64>(), groups.num() * n * k, "b {size:?} for {} experts", groups.num());
    assert!(n % 8 == 0 && k % 16 == 0, "N {n} is not a multiple of 8, or K {k} of 16");
    let Device::Cuda(_) = a.values.device() else { return cpu::forward(a, b, counts, out) };
    if m == 0 {
        return; // the copy engine takes no empty tensor
    }
    let gpu = device::gpu(a.values.device());
    let num_sms = options.num_sms.unwrap_or(gpu.num_sms());
    let plan = options.plan.unwrap_or_else(|| Plan::forward([m, n, k], groups.num(), num_sms));
    // Sums along all of K need an accumulator for every subtile.
    let plan = if options.without_promotion && plan.subtiles > 1 { FORWARD_PLANS[2] } else { plan };
    // A lane stores 16 bytes of a row where the experts' rows of b fall into whole groups of 32.
    let interleaved = n % 32 == 0 && !options.out_fp32;
    let kernel = forward_kernel(plan, options, interleaved, a.values.device());
    let launch = Launch::new(gpu, &kernel).early().map(&a.values, plan.box_a(), 128).map(&a.scales, 1, Plan::ROW_SCALES);
    let rows = b.values.view([-1, k]);
    let launch = if interleaved { launch.map_interleaved(&rows, plan.box_b(), 4) } else { launch.map(&rows, plan.box_b(), 128) };
    launch
        .tensor(&b.scales, Kind::Float)
        .tensor(out, if options.out_fp32 { Kind::Float } else { Kind::BFloat16 })
        .tensor_or_null(counts, Kind::Int)
        .int(m)
        .int(groups.num())
        .int(n)
        .int((k + TILE - 1) / TILE)
        .run(plan.shape(num_sms, plan.forward_bytes()));
}

/// gradient [M, N] or [E, M, N], of the groups in `wanted`.
pub(crate) fn wgrad_into(
    dy: &Columns,
    x: &Columns,
    (groups, wanted): (Groups, Range<i64>),
    gradient: &mut Tensor,
    write: Write,
    options: Options,
) {
    let ((m, p), (n, px)) = (dy.values.size2().expect("[M, P]"), x.values.size2().expect("[N, P]"));
    assert_eq!(p, px, "dy and x have different numbers of rows");
    assert_eq!(gradient.size().iter().product::<i64>(), groups.num() * m * n, "gradient {:?}", gradient.size());
    assert!(gradient.is_contiguous(), "the gradient is written through its own memory");
    assert!(n % 16 == 0 && groups.rows <= p, "N {n} is not a multiple of 16, or {} rows in {p}", groups.rows);
    assert!(0 <= wanted.start && wanted.start < wanted.end && wanted.end <= groups.num(), "experts {wanted:?} of {}", groups.num());
    let Device::Cuda(_) = gradient.device() else { return cpu::wgrad(dy, x, (groups, wanted), gradient, write) };
    assert_eq!(gradient.kind(), Kind::Float, "weight gradients are FP32");
    let num_wanted = wanted.end - wanted.start;
    if p == 0 {
        if write == Write::Assign {
            let _ = gradient.view([groups.num(), m, n]).narrow(0, wanted.start, num_wanted).zero_();
        }
        return;
    }
    let gpu = device::gpu(gradient.device());
    let num_sms = options.num_sms.unwrap_or(gpu.num_sms());
    let given = options.plan.map(|plan| vec![(plan, 0..i64::from(i32::MAX))]);
    // As if as many rows fell on each: the counts are on the device.
    let rows = groups.rows * num_wanted / groups.num();
    for (plan, rows) in given.unwrap_or_else(|| Plan::wgrads([m, n, rows], num_wanted, write, num_sms)) {
        assert!(plan.takes(write), "{plan:?} reloads what {write:?} does not read");
        let kernel = wgrad_kernel(plan, write, gradient.device());
        let launch = Launch::new(gpu, &kernel).early().map(&dy.values, plan.box_a(), 128).map(&dy.scales, 1, plan.rows());
        // A lane writes 16 bytes of a row, unless all goes through shared memory.
        let launch =
            if plan.reload { launch.map(&x.values, plan.box_b(), 128) } else { launch.map_interleaved(&x.values, plan.box_b(), 2) };
        launch
            .map(&x.scales, 1, plan.width)
            .map_of_stack(&gradient.view([groups.num(), m, n]), plan.rows())
            .tensor(gradient, Kind::Float)
            .tensor_or_null(groups.counts, Kind::Int)
            .int(groups.rows)
            .int(wanted.start)
            .int(wanted.end)
            .int(rows.start)
            .int(rows.end)
            .int(m)
            .int(n)
            .run(plan.shape(num_sms, plan.wgrad_bytes()));
    }
}

fn flag(on: bool) -> String {
    u8::from(on).to_string()
}

fn tile_defines(plan: Plan, stages: usize) -> Vec<(&'static str, String)> {
    vec![
        ("BN", plan.width.to_string()),
        ("STAGES", stages.to_string()),
        ("SUBTILES", plan.subtiles.to_string()),
        ("ALONG_M", flag(plan.along_m)),
    ]
}

fn forward_source(plan: Plan, options: Options, interleaved: bool) -> Source {
    let mut defines = tile_defines(plan, plan.forward_stages());
    defines.extend([("PROMOTE", flag(!options.without_promotion)), ("OUT_FP32", flag(options.out_fp32))]);
    defines.extend([("INTERLEAVED", flag(interleaved)), (KEEP_FACTORS, "16".to_string())]);
    Source { name: "gemm_forward", text: [HOPPER, &wgmma::text(plan.width), FORWARD].concat(), defines }
}

fn wgrad_source(plan: Plan, write: Write) -> Source {
    let mut defines = tile_defines(plan, plan.wgrad_stages());
    defines.extend([("ACCUMULATE", flag(write == Write::Accumulate)), ("RELOAD", flag(plan.reload)), (KEEP_FACTORS, "8".to_string())]);
    Source { name: "gemm_wgrad", text: [HOPPER, &wgmma::text(plan.width), WGRAD].concat(), defines }
}

fn forward_key(plan: Plan, options: Options, interleaved: bool) -> String {
    format!("forward/{plan:?}/{}{}{interleaved}", options.out_fp32, options.without_promotion)
}

fn wgrad_key(plan: Plan, write: Write) -> String {
    format!("wgrad/{plan:?}/{write:?}")
}

fn forward_kernel(plan: Plan, options: Options, interleaved: bool, device: Device) -> Arc<Kernel> {
    let key = forward_key(plan, options, interleaved);
    let kernel = device::gpu(device).kernel(&key, "gemm_forward", || forward_source(plan, options, interleaved));
    kernel.expect("our own kernels compile and load")
}

fn wgrad_kernel(plan: Plan, write: Write, device: Device) -> Arc<Kernel> {
    let key = wgrad_key(plan, write);
    let kernel = device::gpu(device).kernel(&key, "gemm_wgrad", || wgrad_source(plan, write));
    kernel.expect("our own kernels compile and load")
}

fn wgrad_variants() -> impl Iterator<Item = (Plan, Write)> {
    let all = WGRAD_PLANS.into_iter().flat_map(|plan| [Write::Assign, Write::Accumulate].map(|write| (plan, write)));
    all.filter(|(plan, write)| plan.takes(*write))
}

/// Compiles and loads all that training may ask for: which tile a GEMM takes depends on how many rows come to the experts, and
/// no step is to wait for a compiler, nor to find no memory for the code.
pub fn load_all(gpu: &Gpu) -> Result<(), DeviceError> {
    let options = Options::default();
    let forward = FORWARD_PLANS.iter().flat_map(|&plan| [true, false].map(|interleaved| (plan, interleaved)));
    let forward = forward.map(|(plan, interleaved)| (forward_key(plan, options, interleaved), "gemm_forward", forward_source(plan, options, interleaved)));
    let wgrad = wgrad_variants().map(|(plan, write)| (wgrad_key(plan, write), "gemm_wgrad", wgrad_source(plan, write)));
    let queue = Mutex::new(forward.chain(wgrad).collect::<Vec<_>>());
    let next = || queue.lock().expect("nobody panics with it").pop();
    let work = || -> Result<(), DeviceError> {
        while let Some((key, entry, source)) = next() {
            gpu.kernel(&key, entry, || source)?;
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a compiler returns"))
    })
}

/// Every variant that a plan may choose, for a test that compiles them all.
pub fn sources() -> Vec<(Source, &'static str)> {
    let mut all = Vec::new();
    for plan in FORWARD_PLANS {
        for (out_fp32, interleaved) in [(false, true), (false, false), (true, false)] {
            let options = Options { out_fp32, ..Options::default() };
            all.push((forward_source(plan, options, interleaved), "gemm_forward"));
        }
    }
    all.extend(wgrad_variants().map(|(plan, write)| (wgrad_source(plan, write), "gemm_wgrad")));
    all
}
