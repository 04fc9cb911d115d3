"""torch.distributed.checkpoint of one process on one disk: save, async save and load of a state.

    dcp.py DIR [GB] [ROUNDS]

The state is FP32 tensors of 4096 x 1024. A save ends with an fsync of every file, as ours does. Caches are dropped before
each measurement where that is allowed. Prints JSON: seconds of each round.
"""

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

SHAPE = (4096, 1024)


def drop_caches():
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        pass


def sync_files(folder):
    for path in (*Path(folder).rglob("*"), Path(folder)):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def timed(run):
    drop_caches()
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def one_round(folder, state):
    save, async_save = folder / "sync", folder / "async"
    seconds = {"save_s": timed(lambda: (dcp.save(state, checkpoint_id=save), sync_files(save)))[0]}
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    seconds["load_s"] = timed(lambda: dcp.load(target, checkpoint_id=save))[0]
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
    del target
    shutil.rmtree(save)
    seconds["stall_s"], future = timed(lambda: dcp.async_save(state, checkpoint_id=async_save))
    future.result()
    shutil.rmtree(async_save)
    return seconds


def main():
    folder, gb, rounds = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    folder.mkdir(parents=True, exist_ok=True)
    count = math.ceil(gb * 1e9 / (4 * math.prod(SHAPE)))
    state = {f"weight/{index}": torch.rand(SHAPE) for index in range(count)}
    measured = [one_round(folder, state) for _ in range(rounds)]
    shutil.rmtree(folder)
    dist.destroy_process_group()
    print(json.dumps({"torch": torch.__version__, "bytes": 4.0 * count * math.prod(SHAPE), "rounds": measured}))


if __name__ == "__main__":
    main()
