"""One process of a run under torchrun: trains in each way named, and goes on as the last one.

Arguments: a text, the folder of the runs, the store's port, then pairs ``parallel:steps``; a pair
``resume-fsdp:N`` goes on with the run that ``fsdp`` left.
"""

import os
import sys
from pathlib import Path

import torch

from fastlm.lm.parallel import world
from fastlm.lm.train import TrainConfig, train

data, out, port, *runs = sys.argv[1:]
torch.set_num_threads(1)
for number, run in enumerate(runs):
    parallel, steps = run.split(":")
    resume, parallel = parallel.startswith("resume-"), parallel.removeprefix("resume-")
    config = TrainConfig(
        data=data, steps=int(steps), batch_size=4, block_size=16, n_layer=2, n_head=2, n_embd=16,
        warmup=2, parallel=parallel, schedule="constant",
        checkpoint_activations=parallel == "fsdp", micro_batch_size=2, device="cpu",
        eval_sequences=4, log_every=1,
    )  # fmt: skip
    if "RANK" in os.environ:
        os.environ["MASTER_PORT"] = str(int(port) + number)
    with world("cpu") as here:
        train(config, Path(out) / parallel, world=here, resume=resume)
