"""An FP8 export as transformers' from_pretrained loads it where there is no GPU: dequantised.

    fp8.py EXPORT_DIR INPUT.safetensors OUTPUT.safetensors

OUTPUT holds every FP8 matrix dequantised to f32 under its name on disk, and of transformers' model
logits [B, L, V] and routing_margin []. The MTP block, which from_pretrained leaves out, goes through its dequantisation alone.
"""

import argparse

import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from common import read_config, read_tokens, read_weights, write_results
from hf import load, on_disk_names, watch_gates


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    parser.add_argument("input")
    parser.add_argument("output")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    config, tokens, weights = read_config(args.export), read_tokens(args.input), read_weights(args.export)
    quantised = {name for name, tensor in weights.items() if tensor.dtype == torch.float8_e4m3fn}
    if {f"{name}_scale_inv" for name in quantised} != {name for name in weights if name.endswith("_scale_inv")}:
        raise SystemExit(f"{args.export}: FP8 matrices and scales are not of one another")

    model = load(args.export, torch.float32)
    seen = watch_gates(model, config)
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    matrices = {name: tensor for name, tensor in on_disk_names(model, torch.Tensor.detach) if name in quantised}
    for name in quantised - set(matrices):
        if not name.startswith(f"model.layers.{config['num_hidden_layers']}."):
            raise SystemExit(f"{args.export}: {name} is not in the model that was loaded")
        pair = {"weight": weights[name], "weight_scale_inv": weights[f"{name}_scale_inv"]}
        matrices[name] = Fp8Dequantize(None).convert(pair)["weight"]
    margin = min((min(margin) for _, margin in seen.values()), default=float("inf"))
    write_results(args.output, matrices | {"logits": logits, "routing_margin": torch.tensor(margin, dtype=torch.float64)})


if __name__ == "__main__":
    main()
