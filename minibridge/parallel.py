"""Several processes that train one model, on torch's own engine: `torchrun --nproc-per-node 8 train_rl.py ...`.

Losses and metrics are sums over micro-batches, already divided by a normaliser of the whole optimizer step, so the
processes ("ranks") meet only where something is shared out or added up:

    mine            a rank's share of the rows, groups or prompts that all ranks know
    gather          what each rank found, as JSON, to all ranks: sampled tokens, metrics
    sum_gradients   after the micro-batches; a sum, not a mean

Rank 0 alone writes files and prints. For `ALONE`, the default everywhere, all this does nothing.
"""
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minibridge import sharding
from minibridge.config import InputError, exit_status, parse, run_main
from minibridge.model import Decoder
from minibridge.run_folder import Run

BUCKET = 2**26  # the most numbers added up at once, but for a larger tensor: 256 MiB in fp32


class Ranks:
    """This process, number `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size, self.main = rank, size, rank == 0
        self.sharded = False

    def check(self, name: str, count: int):
        """InputError unless there is one for each rank."""
        if count < self.size:
            raise InputError(f"{name}: {count} cannot be split among {self.size} processes")

    def agree(self, facts: list, what: str):
        """InputError unless `what` each process has found, in JSON-serialisable facts, is the same."""
        if any(found != facts for found in self.gather([facts])):
            raise InputError(f"{what} are not the same for all processes")

    def mine(self, items: Sequence) -> Sequence:
        """This rank's share: every `size`-th item, from number `rank` on."""
        return items[self.rank :: self.size]

    def gather(self, items: list) -> list:
        """The items of all ranks, interleaved so that gather(mine(items)) == items; they must be JSON-serialisable."""
        if self.size == 1:
            return items
        data = torch.frombuffer(bytearray(json.dumps(items).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(data)] = data
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded)
        found = [json.loads(part[:size].numpy().tobytes()) for part, size in zip(received, sizes)]
        return [part[turn] for turn in range(max(map(len, found))) for part in found if turn < len(part)]

    def total(self, number: float) -> float:
        return sum(self.gather([number]))

    def barrier(self):
        """Go on when all ranks have come here."""
        self.gather([])

    def sum_gradients(self, model: Decoder):
        """Leaves in .grad the sum of all ranks' gradients, the same bits on each."""
        if self.size == 1 or self.sharded:  # FSDP has summed them in the backward pass
            return
        buckets: list[list[Tensor]] = [[]]
        for parameter in model.parameters():
            if buckets[-1] and sum(map(torch.numel, buckets[-1])) + parameter.numel() > BUCKET:
                buckets.append([])
            buckets[-1].append(parameter.grad)
        for bucket in buckets:
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
                gradient.copy_(summed.view_as(gradient))

    def shard(self, model: Decoder):
        """`sharding.shard`; a process without others keeps all. Then a forward pass is an act of all ranks together."""
        if self.size > 1:
            sharding.shard(model, self.size)
            self.sharded = True

    def reshard(self, model: Decoder):
        """After forward passes without a backward pass, which would do it: no process holds more than its share again."""
        if self.sharded:
            model.reshard()

    def even(self, items: list) -> list[tuple[Any, float]]:
        """Each item with its weight 1.0. If sharded, where a forward pass is an act of all ranks, one that has fewer items
        than another repeats its last with 0.0."""
        most = max(self.gather([len(items)])) if self.sharded else len(items)
        return [(item, 1.0) for item in items] + [(items[-1], 0.0)] * (most - len(items))

    def sampler(self, model: Decoder) -> Decoder:
        """What to sample with: `model`, or if a step would have to narrow its weights anew a copy with narrow ones, or
        if it is sharded a whole copy, since no rank knows when the others end."""
        narrow = model.activation_dtype != model.lm_head_weight.dtype
        return sharding.sampling_copy(model) if self.sharded or narrow else model

    def tensors(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """To rank 0 the tensors, whole and on the CPU, to the others none. All ranks must call it."""
        whole = ((name, sharding.whole(tensor)) for name, tensor in named.items())
        return {name: tensor.detach().cpu().contiguous() for name, tensor in whole if self.main}

    def open_run(self, folder: str | Path, *given, **options) -> Run | SimpleNamespace:
        """`run_folder.Run`, once all have read what the folder held; to all but rank 0 one that writes nothing."""
        self.barrier()
        idle = SimpleNamespace(path=Path(folder), log=lambda *_, **__: None, finish=lambda **_: None)
        return Run(folder, *given, **options) if self.main else idle


ALONE = Ranks()


def run(main: Callable, cls: type) -> int:
    """`config.run_main` of main(config, ranks) in each process that torchrun started, or of main(config) in the only one.

    If one process fails, all end: it says why, the others' connections to it break, and torchrun ends those still waiting.
    One of several leaves from here: a thread of gloo that lets go of a tensor while Python shuts down would abort it
    (https://github.com/pytorch/pytorch/issues/190489), and those threads outlive the group if modules keep it.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:  # torchrun sets both
        return run_main(main, cls)
    store, rank, size = next(dist.rendezvous("env://"))  # where processes can leave notes

    def begin():
        try:
            dist.init_process_group(store=dist.PrefixStore("group", store), rank=rank, world_size=size)
            main(parse(cls), Ranks(rank, size))
        except (Exception, KeyboardInterrupt) as error:
            _unless_said(store)
            if re.search("[Cc]onnection (closed|reset)", str(error)):
                raise InputError("another process of this run is gone") from None
            raise

    status = 1
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if rank == 0 else nowhere):
            status = exit_status(begin)
    except SystemExit as end:  # of --help, or without a word
        status = end.code
    except BaseException:
        traceback.print_exc()
    with suppress(RuntimeError):  # the others may be gone
        dist.destroy_process_group() if status == 0 else store.set("said", "")
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # closed
            stream.flush()
    os._exit(status)


def _unless_said(store: dist.Store):
    """Exits silently if another process failed first, after giving it time to say why."""
    try:
        if store.add("ended", 1) > 1:
            store.wait(["said"], timedelta(seconds=5))
            sys.exit(2)
    except RuntimeError:  # not said in time, or the store went with the process that ended first
        sys.exit(2)
