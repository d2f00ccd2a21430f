"""One process of a run under torchrun: trains in each way named, and goes on as the last one.

Arguments: a text, the folder of the runs, the store's port, then pairs ``parallel:steps``; a pair
``resume-fsdp:N`` goes on with the run that ``fsdp`` left. ``lm-fsdp:N`` and ``classify-fsdp:N``
fine-tune, on the lines of ``lm.jsonl`` and ``classify.jsonl`` beside the text.
"""

import os
import sys
from pathlib import Path

import torch

from fastlm.lm.finetune import FinetuneConfig, finetune
from fastlm.lm.parallel import world
from fastlm.lm.train import TrainConfig, train

data, out, port, *runs = sys.argv[1:]
torch.set_num_threads(1)
for number, run in enumerate(runs):
    name, steps = run.split(":")
    resume, name = name.startswith("resume-"), name.removeprefix("resume-")
    task, parallel = name.rpartition("-")[::2]
    shared: dict = {
        "steps": int(steps), "batch_size": 4, "block_size": 16, "n_head": 2, "n_embd": 16,
        "warmup": 2, "parallel": parallel, "schedule": "constant", "micro_batch_size": 2,
        "checkpoint_activations": parallel == "fsdp", "device": "cpu", "log_every": 1,
    }  # fmt: skip
    special: dict = {"n_layer": 2, "eval_sequences": 4}
    if task:
        special = {"data": str(Path(data).with_name(f"{task}.jsonl")), "task": task, "score": 0}
        special |= {"eval_every": 1, "dropout": 0.0}
        if task == "classify":
            special |= {"checkpoint": "encoder-base", "vocab_size": 64, "lora_rank": 2}
    if "RANK" in os.environ:
        os.environ["MASTER_PORT"] = str(int(port) + number)
    with world("cpu") as here:
        if task:
            finetune(
                FinetuneConfig(**shared, **special), Path(out) / name, world=here, resume=resume
            )
        else:
            config = TrainConfig(data=data, **shared, **special)
            train(config, Path(out) / name, world=here, resume=resume)
