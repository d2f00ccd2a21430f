"""Folders that hold a model, as Hugging Face writes them: model.safetensors and config.json.

A folder that we save opens in ``transformers`` with no export step, and theirs opens here.
config.json has a ``fastlm`` block beside their fields, so that what they cannot say comes back too;
such a folder names ``fastlm.lm.GPT`` as its architecture. Nothing is downloaded, no pickle is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .atomic import replacing
from .config import GPTConfig, read_json
from .hf_layout import Stored, from_fields, layout, to_fields
from .model import GPT, rotary_tables
from .ops import Choice

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "weights on disk need the package safetensors: pip install 'fastlm[lm]'"
    ) from error

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def save(model: GPT, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Writes a model's weights, in their dtype, and its config into a folder, made if need be.

    ``state`` takes the place of ``model.state_dict()``: of a model spread over processes.
    """
    folder = Path(folder)
    own = {n: p.detach() for n, p in (model.state_dict() if state is None else state).items()}
    tensors: dict[str, Tensor] = {}
    for name, stored in layout(model.config, list(own)).items():
        whole = own[name].T if stored.transposed else own[name]
        parts = whole.split(stored.rows) if stored.rows else (whole,)
        tensors |= zip(stored.names, (part.cpu().contiguous() for part in parts), strict=True)
    with replacing(folder / WEIGHTS) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    fields = to_fields(model.config) | {"torch_dtype": str(model.wte.weight.dtype).split(".")[1]}
    with replacing(folder / "config.json") as file:
        file.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def load(
    folder: str | Path,
    ops: Choice | Mapping[str, Choice] = "fused",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> GPT:
    """The model of a folder: ours, or a GPT-2, Llama, Mistral or Qwen3 of Hugging Face.

    Raises:
        ValueError: A file that is missing, damaged, of another format or another model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} must be a folder that holds a model; nothing is downloaded")
    config = read_config(folder)
    model = hollow(config, ops)
    own = {name: p.shape for name, p in model.state_dict().items()}
    stored = layout(config, list(own))
    found = _read(folder, stored)
    state = {name: _assemble(folder, how, found, own[name], dtype) for name, how in stored.items()}
    return fill(model, state, device, source=folder)


def read_config(folder: Path) -> GPTConfig:
    """The config of a folder. Raises ValueError with the file's name."""
    path = folder / "config.json"
    fields = read_json(path)
    try:
        return from_fields(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def hollow(config: GPTConfig, ops: Choice | Mapping[str, Choice]) -> GPT:
    """A model whose parameters have shapes and no memory yet."""
    with torch.device("meta"):
        return GPT(config, ops)


def fill(model: GPT, state: dict[str, Tensor], device: torch.device | str, *, source: Path) -> GPT:
    """Makes these very tensors the parameters of a hollow model; a tied head is not among them.

    Raises:
        ValueError: The tensors are of several dtypes.
    """
    dtypes = sorted({str(t.dtype) for t in state.values()})
    if len(dtypes) > 1:
        raise ValueError(
            f"{source}: weights must be of one dtype; got {', '.join(dtypes)}. Pass dtype="
        )
    tied = model.config.tie_weights
    model.load_state_dict(
        {**state, "lm_head.weight": state["wte.weight"]} if tied else state, assign=True
    )
    if tied:
        model.lm_head.weight = model.wte.weight
    model.cos, model.sin = rotary_tables(model.config)
    return model.to(device).eval()


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{folder / INDEX} must have a weight_map; got none")
        for name in shards.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{folder / INDEX} must name files beside it; got {name!r}")
        return [folder / name for name in sorted(set(shards.values()))]
    pickles = sorted(p for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    if pickles:
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run any code when it is read. Convert "
            "it where you trust it, with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(...)"
        )
    raise ValueError(f"{folder} must hold {WEIGHTS}; it does not")


def _read(folder: Path, stored: dict[str, Stored]) -> dict[str, Tensor]:
    """Every tensor of the folder under the name that ``stored`` gives it."""
    expected = {name for how in stored.values() for name in how.names}
    found: dict[str, Tensor] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a mapping
                    name = _usual_name(key, expected)
                    if name is not None:
                        found[name] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} must be a whole safetensors file; {error}") from None
    missing, extra = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model has not"
        more = len(missing) + len(extra) - 1
        raise ValueError(f"{folder}: the weights are of another model than config.json: {what}"
                         + (f" ({more} more differ)" if more else ""))  # fmt: skip
    return found


def _usual_name(key: str, expected: set[str]) -> str | None:
    """The full name of a tensor; None for one that holds no weights, or a tied head."""
    for name in (key, f"transformer.{key}", f"model.{key}"):  # a base model saved has no prefix
        if name in expected:
            return name
    constants = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", "lm_head.weight")
    return None if key.endswith(constants) else key


def _assemble(
    folder: Path,
    stored: Stored,
    found: dict[str, Tensor],
    shape: torch.Size,
    dtype: torch.dtype | None,
) -> Tensor:
    """Our parameter out of the file's tensors."""
    parts = [found[part].T if stored.transposed else found[part] for part in stored.names]
    rows = stored.rows or (shape[0],)
    for part, n, theirs in zip(parts, rows, stored.names, strict=True):
        want = (n, *shape[1:])
        if tuple(part.shape) != want:
            want = want[::-1] if stored.transposed else want
            raise ValueError(
                f"{folder}: {theirs} must have shape {want} by config.json; "
                f"got {tuple(found[theirs].shape)}"
            )
        if not part.is_floating_point():
            raise ValueError(f"{folder}: {theirs} must be floating point; got {part.dtype}")
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    return whole.to(dtype or whole.dtype).contiguous()
