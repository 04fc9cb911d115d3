"""Memory-bound passes as a PyTorch user has them: torch.compile's fusions, torch's own fused AdamW, foreach norm and
cross-entropy, at V3's shapes.

    python3 benches/rivals/passes_gpu.py

Prints microseconds and TB/s of the bytes that the same pass must move at least (inputs and outputs once each); medians of
triton's do_bench. Needs torch >= 2.11 and a Hopper GPU.
"""
import torch
from torch.nn import functional as F
from triton.testing import do_bench

TOKENS, TILE, E4M3_MAX = 4096, 128, 448.0


def random(*size, dtype=torch.bfloat16):
    return torch.randn(*size, device="cuda", dtype=dtype)


def quantise(x):
    """1×128 tiles: E4M3 values and FP32 scales."""
    rows, columns = x.shape
    tiles = x.float().view(rows, columns // TILE, TILE)
    scales = tiles.abs().amax(-1).clamp_min(1e-12) / E4M3_MAX
    return (tiles / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).view(rows, columns), scales


@torch.compile
def both(x):
    return quantise(x), quantise(x.t().contiguous())


@torch.compile
def norm(x, weight):
    y = F.rms_norm(x, (x.shape[-1],), weight, 1e-6)
    return quantise(y), quantise(y.t().contiguous())


@torch.compile
def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    y = F.silu(gate) * up
    return quantise(y), quantise(y.t().contiguous())


def cross_entropy(logits, targets):
    logits.grad = None
    F.cross_entropy(logits, targets, reduction="sum").backward()


def show(name, num_bytes, call):
    time = do_bench(call, warmup=10, rep=60, return_mode="median")
    print(f"{name:<58} {time * 1e3:>8.1f} us  {num_bytes / time / 1e9:>5.2f} TB/s", flush=True)


def adamw(rows, columns):
    weight = torch.nn.Parameter(random(rows, columns, dtype=torch.float32))
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    show(f"adamw fused, fp32 state {rows}x{columns}", 28 * rows * columns, optimizer.step)
    show(f"gradient norm {rows}x{columns}", 4 * rows * columns, lambda: torch._foreach_norm([weight.grad]))


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    source, to = random(1 << 29), torch.empty(1 << 29, device="cuda", dtype=torch.bfloat16)
    show("copy", 4 << 29, lambda: to.copy_(source))
    del source, to
    x, weight, gate_up = random(TOKENS, 7168), random(7168), random(TOKENS, 2 * 18432)
    show(f"quantise {TOKENS}x7168 both, compiled", 4 * TOKENS * 7168, lambda: both(x))
    show(f"rms norm {TOKENS}x7168 both, compiled", 4 * TOKENS * 7168, lambda: norm(x, weight))
    show(f"swiglu {TOKENS}x18432 both, compiled", 6 * TOKENS * 18432, lambda: swiglu(gate_up))
    logits = random(TOKENS, 129280).requires_grad_()
    targets = torch.randint(0, 129280, (TOKENS,), device="cuda")
    show(f"cross-entropy {TOKENS}x129280", 4 * TOKENS * 129280, lambda: cross_entropy(logits, targets))
    del logits
    adamw(16384, 7168)
