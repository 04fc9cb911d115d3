"""GEMMs that a user could pick instead, at V3's shapes: BF16, cuBLASLt's block-scaled FP8, tensor-wise FP8 (the limit of
the matrix unit, with numerics nobody trains V3 in), grouped BF16, and DeepGEMM where it can be imported.

    python3 benches/rivals/gemm.py

Prints TFLOP/s, medians of triton's do_bench. Needs torch >= 2.11 and a Hopper GPU.
"""
import torch
from triton.testing import do_bench

TILE, E4M3_MAX, TOKENS = 128, 448.0, 4096
SHAPES = [(2176, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
GROUPED = [(4, 8192, 4096, 7168), (4, 8192, 7168, 2048), (8, 4096, 4096, 7168), (32, 1024, 4096, 7168)]

try:
    import deep_gemm
except ImportError:
    deep_gemm = None


def time_ms(call):
    return do_bench(call, warmup=10, rep=60, return_mode="median")


def quantise(x, tile_rows):
    """Scales [rows / tile_rows, columns / 128], E4M3 values of x's shape."""
    rows, columns = x.shape
    tiles = x.float().view(rows // tile_rows, tile_rows, columns // TILE, TILE)
    scales = tiles.abs().amax((1, 3), keepdim=True).clamp_min(1e-12) / E4M3_MAX
    values = (tiles / scales).to(torch.float8_e4m3fn).view(rows, columns)
    return values, scales.view(rows // tile_rows, columns // TILE)


def random(*size):
    return torch.randn(*size, device="cuda", dtype=torch.bfloat16)


def dense(n, k):
    a, b = random(TOKENS, k), random(n, k)
    (qa, sa), (qb, sb) = quantise(a, 1), quantise(b, TILE)
    exact = (qa.double().view(TOKENS, -1, TILE) * sa.double()[..., None]).view(TOKENS, k) @ (
        qb.double().view(n // TILE, TILE, -1, TILE) * sb.double()[:, None, :, None]
    ).view(n, k).T
    by_column = sa.t().contiguous().t()  # cuBLASLt wants rows contiguous
    one = torch.ones((), device="cuda")
    calls = {
        "bf16": lambda: a @ b.t(),
        "cublaslt": lambda: torch._scaled_mm(qa, qb.t(), by_column, sb.t(), out_dtype=torch.bfloat16),
        "tensorwise": lambda: torch._scaled_mm(qa, qb.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True),
    }
    if deep_gemm:
        out = torch.empty(TOKENS, n, device="cuda", dtype=torch.bfloat16)
        aligned = deep_gemm.get_mn_major_tma_aligned_tensor(sa)
        calls["deepgemm"] = lambda: (deep_gemm.fp8_gemm_nt((qa, aligned), (qb, sb), out), out)[1]
    # Wgrad's operands, contracted over the tokens, each with its own scales; the product in BF16, added to nothing.
    (qy, sy), (qx, sx) = (quantise(t.t().contiguous(), 1) for t in (random(TOKENS, n), a))
    sy, sx = sy.t().contiguous().t(), sx.t().contiguous()
    calls["cublaslt wgrad"] = lambda: torch._scaled_mm(qy, qx.t(), sy, sx, out_dtype=torch.bfloat16)
    error = ((calls["cublaslt"]().double() - exact).norm() / exact.norm()).item()
    del exact
    flop = 2 * TOKENS * n * k
    speeds = {name: flop / time_ms(call) / 1e9 for name, call in calls.items()}
    return speeds | {"cublaslt error": error}


def grouped(experts, rows, n, k):
    a, b = random(experts * rows, k), random(experts, n, k)
    ends = torch.arange(rows, experts * rows + 1, rows, device="cuda", dtype=torch.int32)
    flop = 2 * experts * rows * n * k
    return {"bf16": flop / time_ms(lambda: torch._grouped_mm(a, b.transpose(1, 2), ends)) / 1e9}


def show(title, figures):
    print(title, " | ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for n, k in SHAPES:
        show(f"{TOKENS} x {n} x {k}:", dense(n, k))
    for shape in GROUPED:
        show("grouped {} x {} rows, {} x {}:".format(*shape), grouped(*shape))
