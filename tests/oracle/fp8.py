"""An FP8 export through transformers' own dequantisation, and its model on what comes out.

    fp8.py EXPORT_DIR INPUT.safetensors OUTPUT.safetensors

OUTPUT holds every FP8 matrix dequantised to f32 under its name, and of transformers' model over all weights in f32
logits [B, L, V] and routing_margin []. Nothing here needs `accelerate`, which from_pretrained asks for beside FP8.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from common import read_config, read_tokens, read_weights, write_results
from hf import load, watch_gates


def dequantised(weights):
    """(matrices that were FP8, all weights) in f32."""
    op, matrices, rest = Fp8Dequantize(None), {}, {}
    for name, tensor in weights.items():
        if name.endswith("_scale_inv"):
            continue
        scales = weights.get(f"{name}_scale_inv")
        if (scales is None) != (tensor.dtype != torch.float8_e4m3fn):
            raise SystemExit(f"{name} is {tensor.dtype}, with scales: {scales is not None}")
        if scales is None:
            rest[name] = tensor.float()
        else:
            matrices[name] = op.convert({"weight": tensor, "weight_scale_inv": scales})["weight"]
    return matrices, rest | matrices


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    parser.add_argument("input")
    parser.add_argument("output")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    config, tokens = read_config(args.export), read_tokens(args.input)
    quantization = config.pop("quantization_config")
    if transformers.FineGrainedFP8Config(**quantization).weight_block_size not in ((128, 128), [128, 128]):
        raise SystemExit(f"transformers reads the quantization config as {quantization}")
    matrices, weights = dequantised(read_weights(args.export))
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = load(folder, torch.float32)
        seen = watch_gates(model, config)
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    margin = min((min(margin) for _, margin in seen.values()), default=float("inf"))
    write_results(args.output, matrices | {"logits": logits, "routing_margin": torch.tensor(margin, dtype=torch.float64)})


if __name__ == "__main__":
    main()
