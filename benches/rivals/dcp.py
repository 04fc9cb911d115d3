"""torch.distributed.checkpoint of one process on one disk: save, async save and load of a state.

    dcp.py DIR [GB]

The state is FP32 tensors of 4096 x 1024. A save ends with an fsync of every file, as ours does. Caches are dropped before
each measurement where that is allowed. Prints JSON, seconds of a round, for each line that it reads. An asynchronous save is made as async_save does it
by itself, and with a stager that copies on a thread of its own, each under a step (products of matrices, on every core):
stall is what the training thread waits, in the call and for the copy; slowed, by how much its step takes longer in all.
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
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

SHAPE = (4096, 1024)
STEP_S = 1.0


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


class Step:
    """Stands for a step's forward and backward: they only read the state."""

    def __init__(self):
        self.matrix, self.products = torch.rand(1024, 1024), 10
        self.run()  # the first one is slow
        start = time.perf_counter()
        self.run()
        self.products = math.ceil(10 * STEP_S / (time.perf_counter() - start))

    def run(self):
        for _ in range(self.products):
            self.matrix @ self.matrix


def async_save(folder, state, step, stager):
    """(seconds that the training thread waited, seconds that its step took longer)"""
    undisturbed, _ = timed(step.run)
    drop_caches()
    start = time.perf_counter()
    response = dcp.async_save(state, checkpoint_id=folder, async_stager=stager)
    called = time.perf_counter()
    step.run()
    stepped = time.perf_counter()
    staged = getattr(response, "staging_completion", None)
    if staged:
        staged.result()
    end = time.perf_counter()
    getattr(response, "upload_completion", response).result()
    shutil.rmtree(folder)
    return called - start + end - stepped, end - start - undisturbed


def one_round(folder, state, step):
    save = folder / "sync"
    seconds = {"save_s": timed(lambda: (dcp.save(state, checkpoint_id=save), sync_files(save)))[0]}
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    seconds["load_s"] = timed(lambda: dcp.load(target, checkpoint_id=save))[0]
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
    del target
    shutil.rmtree(save)
    seconds["stall_s"], seconds["slowed_s"] = async_save(folder / "async", state, step, None)
    # A DefaultStager can be used once: it empties itself.
    stager = DefaultStager(StagingOptions(False, False, use_async_staging=True, use_non_blocking_copy=False))
    seconds["thread_stall_s"], seconds["thread_slowed_s"] = async_save(folder / "thread", state, step, stager)
    stager.close()
    return seconds


def main():
    folder, gb = Path(sys.argv[1]), float(sys.argv[2])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    folder.mkdir(parents=True, exist_ok=True)
    count = math.ceil(gb * 1e9 / (4 * math.prod(SHAPE)))
    state = {f"weight/{index}": torch.rand(SHAPE) for index in range(count)}
    step = Step()
    for _ in sys.stdin:
        measured = {"torch": torch.__version__, "bytes": 4 * count * math.prod(SHAPE), **one_round(folder, state, step)}
        print(json.dumps(measured), flush=True)
    shutil.rmtree(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
