"""Trainings of tiny models under an engine, on gloo ranks of the CPU that torchrun starts, and in one process.

Describe each training by a `Case`, run all cases of a test in one start of the ranks (imports take 6 s a process), and
compare with one process that has the same global batches::

    cases = {"sft": Case("sft"), "dpo, packed": Case("dpo", packed=True), "fsdp2": Case("dpo", "fsdp2")}
    outcomes = run(cases, tmp_path, ranks=2)  # outcomes["sft"][rank].parameters, .losses, .error
    for name, case in cases.items():
        assert_trained_alike(outcomes[name], alone(case, tmp_path, ranks=2))

A case that raises on one rank ends on all ranks, with the traceback in `Outcome.error`, and the next case runs with a
new process group. A rank that needs more than `GUARD` seconds for a case prints where it is and ends, and torchrun ends
the others: `run` raises, with that text. So does a rank that ends by itself.

Ranks see the rows in order: the batches of a step, `batch_size` rows each, are dealt to the ranks one after another, so
together they are one batch of `ranks * batch_size` rows of one process. That holds while the batches of an epoch are a
multiple of ranks; otherwise accelerate fills up the last batches of an epoch with rows of the first ones, which
`config={"accelerator_config": {"even_batches": False}}` turns off.

Cases are pickled: `prepare` must be a function of a module in tests/trl.

FSDP2: accelerate shards on accelerators only, so the ranks pose as GPUs with the CPU as their device. `fsdp_config` in
`config` has transformers' options (`reshard_after_forward`, `cpu_offload`, `transformer_layer_cls_to_wrap`, ...).
ZeRO needs DeepSpeed with its CPU accelerator (`DS_ACCELERATOR=cpu`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import gc
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import guarded
import tiny
import torch
import torch.distributed as dist

#: Seconds that a rank may take for one case, and for its imports.
GUARD = 60
STEPS = 10
#: Methods with a mean over the tokens of a batch in their loss: the mean of two batches' losses is not that of both.
_MEANS = {"cpo", "orpo"}
_ALONE: dict[str, list[Outcome]] = {}

#: Engine -> what it adds to a trainer's configuration.
ENGINES: dict[str, dict[str, Any]] = {
    "none": {},
    "ddp": {},
    "fsdp2": {"fsdp": True},
    "tp": {},  # tensor parallel, with a `prepare` that shards the model
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {
        "deepspeed": {
            "zero_optimization": {
                "stage": 3,
                "stage3_gather_16bit_weights_on_model_save": True,
                # As with large models: nothing stays gathered.
                "stage3_param_persistence_threshold": 0,
                "stage3_prefetch_bucket_size": 0,
                "stage3_max_reuse_distance": 0,
            }
        }
    },
}
_DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",  # else accelerate clips at 1
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One training."""

    method: str
    """of `tiny.classes`: "sft", "dpo", "orpo", ..."""
    engine: str = "ddp"
    """one of `ENGINES`"""
    trainer: str = "fused"
    """"fused": the Fused class; "attach": TRL's, attached to; "stock": TRL's"""
    packed: bool | str = False
    model: str = "qwen3"
    """of `tiny.MODELS`; "tied" has tied weights"""
    batch_size: int = 2
    """rows of a rank's batch"""
    rows: Any = 24
    """how many rows of `tiny.data`, or a list of the rows themselves"""
    streams: bool = False
    """whether the data set is iterable"""
    prepare: Callable[[Any], Any] | None = None
    """changes the model before the trainer is built, such as by adding LoRA, or returns its name"""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """of the trainer's configuration"""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """keyword arguments of the trainer, or of `attach`"""
    watch: Callable[[Any], Any] | None = None
    """called with the trainer before it trains; its result, which may change meanwhile, is `Outcome.watched`"""
    saves: bool = False
    """whether the trained model is saved, into `Outcome.saved`"""


@dataclasses.dataclass
class Outcome:
    """What one rank has after a training; tensors are whole, also where the engine shards them."""

    parameters: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    initial: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """the parameters before the first step"""
    losses: list[float] = dataclasses.field(default_factory=list)
    error: str | None = None
    """the traceback of what the training raised"""
    saved: str | None = None
    watched: Any = None


def run(cases: Mapping[str, Case], folder: Path, ranks: int = 2) -> dict[str, list[Outcome]]:
    """Run the cases one after another on `ranks` processes; returns the outcome of each rank.

    Raises:
        RuntimeError: a process ended, or exceeded its `GUARD`; the text has the end of what the ranks printed.
    """
    folder = Path(folder)
    for i, case in enumerate(cases.values()):
        model_folder(case, folder)
        (folder / str(i)).mkdir()
    torch.save(dict(cases), folder / "cases.pt")
    command = [*guarded.TORCHRUN, f"--nproc_per_node={ranks}", __file__, str(folder)]
    ended = guarded.run(command, limit=GUARD * (len(cases) + 2))  # ranks end sooner by themselves
    if ended.status:
        raise RuntimeError(f"torchrun ended with status {ended.status}:\n{ended.stderr[-8000:]}")
    return {
        name: [torch.load(folder / str(i) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
        for i, name in enumerate(cases)
    }


def alone(case: Case, folder: Path, ranks: int = 2, whole: bool | None = None) -> list[Outcome]:
    """Trainings in this process with the global batches of `ranks`, equal but for the order of sums.

    The first accumulates gradients over the batches of the ranks, the second does so with the rows of each batch in
    reverse; their difference is rounding, and the budget of `assert_trained_alike`. With `whole` the third takes all
    rows of a step in one batch; by default where the loss is a sum over rows: ORPO and CPO have means over the tokens
    of a batch.
    """
    config = {name: value for name, value in case.config.items() if not name.startswith("ddp_")}
    steps = config.get("gradient_accumulation_steps", 1)
    at_once = dataclasses.replace(case, engine="none", batch_size=case.batch_size * ranks, config=config, saves=False)
    accumulated = dataclasses.replace(
        at_once, batch_size=case.batch_size, config=config | {"gradient_accumulation_steps": steps * ranks}
    )
    whole = case.method not in _MEANS if whole is None else whole
    key = repr((at_once, accumulated, whole))  # engines' cases share them
    if key not in _ALONE:
        folder = Path(folder)
        _ALONE[key] = [_train(accumulated, folder), _train(accumulated, folder, in_reverse=True)]
        _ALONE[key] += [_train(at_once, folder)] if whole else []
    return _ALONE[key]


def assert_trained_alike(outcomes: list[Outcome], equals: list[Outcome]) -> None:
    """Assert that the ranks have the same parameters bit for bit, and those of `alone` within a budget.

    The budget of a parameter is four times the rounding: what the first two trainings differ by, or one unit in the
    last place of its largest element where that is more. Losses, means over the ranks, agree to 1e-5.
    """
    assert_ranks_equal(outcomes)
    first, (want, reverse, *_) = outcomes[0], equals
    assert first.parameters.keys() == want.parameters.keys()
    for name, x in want.parameters.items():
        unit = torch.finfo(x.dtype).eps * x.abs().max()
        rounding = torch.maximum((x - reverse.parameters[name]).abs().max(), unit)
        moved = (x - want.initial[name]).abs().max()
        assert moved == 0 or moved > 1000 * rounding, f"{name} moved by {moved:.1e}, rounding is {rounding:.1e}"
        for other in (want, *equals[2:]):
            error = (first.parameters[name] - other.parameters[name]).abs().max()
            assert error <= 4 * rounding, f"{name}: error {error:.1e}, rounding {rounding:.1e}, moved {moved:.1e}"
    for other in (want, *equals[2:]):
        torch.testing.assert_close(first.losses, other.losses, rtol=1e-5, atol=1e-5)


def assert_ranks_equal(outcomes: list[Outcome]) -> None:
    """Assert that no rank raised and that all have the same losses and parameters, bit for bit."""
    first = outcomes[0]
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
        assert outcome.losses == first.losses
        assert outcome.parameters.keys() == first.parameters.keys()
        for name, x in outcome.parameters.items():
            assert torch.equal(x, first.parameters[name]), name


def assert_saved_as_trained(outcome: Outcome) -> None:
    """Assert that the saved model loads without an engine and has the trained parameters."""
    from transformers import AutoModelForCausalLM

    loaded = dict(AutoModelForCausalLM.from_pretrained(outcome.saved).named_parameters())
    assert loaded.keys() == outcome.parameters.keys()
    for name, parameter in loaded.items():
        assert torch.equal(parameter, outcome.parameters[name]), name


def model_folder(case: Case, folder: Path) -> Path:
    """The folder of the case's model within that of its test, written on the first call."""
    models = folder / "models"
    if not (models / case.model).exists():
        tiny.save_model(case.model, models / case.model)
    return models / case.model


def _train(case: Case, folder: Path, output: str = "alone", in_reverse: bool = False) -> Outcome:
    from transformers import AutoModelForCausalLM

    stock, fused, config_class = tiny.classes(case.method)
    args = config_class(**_config(case, folder / output))
    if case.engine in ("fsdp2", "tp"):
        _pose_as_gpus(args)
    model = AutoModelForCausalLM.from_pretrained(model_folder(case, folder), attn_implementation="eager")
    torch.manual_seed(0)
    if case.prepare is not None:
        model = case.prepare(model)
    is_fused = case.trainer == "fused"
    trainer = (fused if is_fused else stock)(
        model=model,
        args=args,
        train_dataset=_dataset(case, Path(folder), in_reverse),
        processing_class=tiny.tokenizer(),
        **({"packed": case.packed, **case.options} if is_fused else {}),
    )
    if case.trainer == "attach":
        from fusedalign.trl import attach

        attach(trainer, packed=case.packed, **case.options)
    initial = _whole_parameters(trainer)
    watched = None if case.watch is None else case.watch(trainer)
    trainer.train()
    outcome = Outcome(_whole_parameters(trainer), initial, watched=watched)
    outcome.losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if case.saves:
        outcome.saved = str(folder / output / "saved")
        trainer.save_model(outcome.saved)
    return outcome


def _dataset(case: Case, folder: Path, in_reverse: bool) -> Any:
    from datasets import Dataset

    rows = tiny.data(case.method, case.rows) if isinstance(case.rows, int) else Dataset.from_list(case.rows)
    if in_reverse:
        order = torch.arange(len(rows)).split(case.batch_size)
        rows = rows.select(torch.cat([batch.flip(0) for batch in order]).tolist())
    if case.config.get("precompute_ref_log_probs"):
        rows = _on_disk(rows, folder / f"{case.method}{case.rows}")
    return rows.to_iterable_dataset() if case.streams else rows


def _on_disk(rows: Any, folder: Path) -> Any:
    """The data set from a folder that all ranks share; TRL caches a reference in it."""
    from datasets import load_from_disk

    if not dist.is_initialized():
        return rows
    if dist.get_rank() == 0:
        rows.save_to_disk(folder)
    dist.barrier()
    return load_from_disk(folder)


def _config(case: Case, output: Path) -> dict[str, Any]:
    engine = dict(ENGINES[case.engine])
    if "deepspeed" in engine:
        engine["deepspeed"] = _DEEPSPEED | engine["deepspeed"]
        _leave_out_operators()
    return {
        "output_dir": str(output),
        "max_steps": STEPS,
        "logging_steps": 1,
        "per_device_train_batch_size": case.batch_size,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,  # clipping would hide a wrong scale
        "optim": "sgd",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": 64,
        **engine,
        **case.config,
    }


def _leave_out_operators() -> None:
    """Let DeepSpeed communicate by gloo alone; it would compile an operator for ranks of one host."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _pose_as_gpus(args: Any) -> None:
    """Let accelerate shard on the CPU, which it does for the distributed types of accelerators only."""
    from accelerate.state import DistributedType, PartialState

    assert args.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _whole_parameters(trainer: Any) -> dict[str, torch.Tensor]:
    parameters = dict(trainer.model.named_parameters())
    if trainer.is_deepspeed_enabled:
        import deepspeed

        gathered: Any = deepspeed.zero.GatheredParameters(list(parameters.values()))
    else:
        gathered = contextlib.nullcontext()
    with gathered:
        plain_names = (name.replace("_checkpoint_wrapped_module.", "") for name in parameters)
        return {name: _whole(x.detach()).clone() for name, x in zip(plain_names, parameters.values(), strict=True)}


def _whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, dist.tensor.DTensor) else x


def _run_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    cases = torch.load(folder / "cases.pt", weights_only=False)
    _quicken()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://", rank, ranks, timeout=datetime.timedelta(seconds=GUARD)))
    for i, case in enumerate(cases.values()):
        faulthandler.dump_traceback_later(GUARD, exit=True)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore(f"case {i}", store),
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=GUARD),
        )
        try:
            outcome = _train(case, folder, str(i))
            dist.barrier()  # a rank that leaves closes the connections of the others
        except Exception:
            outcome = Outcome(error=traceback.format_exc())
        torch.save(outcome, folder / str(i) / f"{rank}.pt")
        _destroy_process_group()  # ranks that wait for a rank that raised get an error
        gc.collect()
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(ranks)])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # interpreter shutdown occasionally aborts in PyTorch's threads


def _destroy_process_group() -> None:
    if os.environ.pop("ACCELERATE_USE_DEEPSPEED", None) is None:
        dist.destroy_process_group()
    else:
        import deepspeed

        deepspeed.comm.destroy_process_group()  # forgets its own groups too


def _quicken() -> None:
    """What the fixtures of conftest.py do: garbage collection skips imported objects, package lookups are cached."""
    from accelerate.utils import imports

    tiny.classes("orpo")
    gc.collect()
    gc.freeze()
    imports._is_package_available = functools.cache(imports._is_package_available)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(GUARD, exit=True)
    import engines  # pickled cases are of this module, not of __main__

    engines._run_rank(Path(sys.argv[1]))
