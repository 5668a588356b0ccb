"""Trainers built, attached, detached and stepped in several threads: each keeps its own head."""

import functools
import gc
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
import trl
import trl.trainer.utils as trl_utils

from fusedalign.trl import attach, detach, trainers
from fusedalign.trl import attachment as attach_module
from fusedalign.trl.construction import replaced
from fusedalign.trl.forward import fused_by

NAMES = ("add_fused_lm_head", "BaseTunerLayer")


def _globals(module="sft"):
    return {name: vars(sys.modules[f"trl.trainer.{module}_trainer"])[name] for name in NAMES}


def _run_concurrently(*functions):
    """Call all functions concurrently, each in its own thread; return the results."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(function) for function in functions]]


def test_trainers_built_concurrently_get_their_own_heads(build, monkeypatch):
    """All are under construction at the same time and finish in an order that mixes both kinds."""
    inside, prepare = threading.Barrier(4), trl.SFTTrainer._prepare_dataset
    first = threading.local()

    def wait(self, *args, **kwargs):
        if not hasattr(first, "waited"):
            first.waited = True
            inside.wait(timeout=60)
        return prepare(self, *args, **kwargs)

    before = _globals()
    kinds = ["fused", "stock", "fused", "stock"]
    models = [build("sft", "stock").model for _ in kinds]  # transformers cannot load models in several threads
    for model in models:
        del model.forward
    monkeypatch.setattr(trl.SFTTrainer, "_prepare_dataset", wait)
    arguments = [[("model", lambda model=model: model)] for model in models]
    built = _run_concurrently(
        *(functools.partial(build, "sft", *x[:1], arguments=x[1]) for x in zip(kinds, arguments, strict=True))
    )
    assert [fused_by(trainer.model) for trainer in built] == ["fusedalign", "trl", "fusedalign", "trl"]
    assert _globals() == before
    monkeypatch.undo()
    assert fused_by(build("sft", "stock").model) == "trl"


def test_a_stock_trainer_is_built_while_a_fused_one_is_under_construction(build, monkeypatch):
    at_it, go_on, prepare = threading.Event(), threading.Event(), trl.SFTTrainer._prepare_dataset

    def wait(self, *args, **kwargs):
        if isinstance(self, trainers.FusedSFTTrainer):
            at_it.set()
            assert go_on.wait(timeout=60)
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "_prepare_dataset", wait)
    before = _globals()
    with ThreadPoolExecutor(1) as pool:
        fused = pool.submit(build, "sft", "fused")
        assert at_it.wait(timeout=60)
        stock = build("sft", "stock")
        go_on.set()
        assert fused_by(fused.result(timeout=60).model) == "fusedalign"
    assert fused_by(stock.model) == "trl"
    assert _globals() == before


def test_an_object_is_replaced_only_in_its_thread():
    module = types.ModuleType("module_of_a_test")
    original, replacement = types.SimpleNamespace(level="all"), types.SimpleNamespace(level="none")
    module.logger = original
    with replaced(module, logger=replacement):
        assert module.logger.level == "none"
        assert _run_concurrently(lambda: module.logger.level) == ["all"]
        with pytest.raises(AttributeError):
            _ = module.logger.name
    assert module.logger is original


class _Building(transformers.TrainerCallback):
    """A model that builds another trainer while its own is under construction."""

    def __init__(self, build):
        self.build = build

    def on_init_end(self, *args, **kwargs):
        self.build()


@pytest.mark.parametrize("inner", ["fused", "stock"])
def test_a_trainer_built_during_another_construction_gets_its_own_head(build, monkeypatch, inner):
    impls, built, original = [], [], trainers.add_lm_head
    monkeypatch.setattr(
        trainers,
        "add_lm_head",
        lambda *a, options, **k: impls.append(options.impl) or original(*a, options=options, **k),
    )
    callback = _Building(lambda: built.append(build("sft", inner, head=[("impl", "reference")])))
    outer = build("sft", "fused", head=[("impl", "pytorch")], arguments=[("callbacks", lambda: [callback])])
    assert fused_by(outer.model) == "fusedalign"
    assert fused_by(built[0].model) == ("trl" if inner == "stock" else "fusedalign")
    assert impls == (["pytorch"] if inner == "stock" else ["reference", "pytorch"])


def test_a_failed_construction_restores_trl(build):
    before = _globals()
    with pytest.raises(ValueError, match="filter_eps"):
        build("sft", "fused", head=[("impl", "reference"), ("filter_eps", 1e-3)])
    assert _globals() == before
    assert fused_by(build("sft", "stock").model) == "trl"


def test_patches_of_another_library_stay(build, monkeypatch):
    """Patches set before or during construction serve stock trainers and never the Fused ones."""
    module, served = sys.modules["trl.trainer.sft_trainer"], []
    original = module.add_fused_lm_head

    def patch():
        below = module.add_fused_lm_head
        monkeypatch.setattr(
            module, "add_fused_lm_head", lambda model, *a, **k: served.append(model) or below(model, *a, **k)
        )
        return module.add_fused_lm_head

    first_patch = patch()
    assert fused_by(build("sft", "fused").model) == "fusedalign"
    assert module.add_fused_lm_head is first_patch
    assert not served

    patched = []
    fused = build("sft", "fused", arguments=[("callbacks", lambda: [_Building(lambda: patched.append(patch()))])])
    assert fused_by(fused.model) == "fusedalign"
    assert module.add_fused_lm_head is patched[0]
    served.clear()
    assert fused_by(build("sft", "fused").model) == "fusedalign"
    assert not served
    stock = build("sft", "stock")
    assert fused_by(stock.model) == "trl"
    assert served == [stock.model] * 2
    monkeypatch.undo()
    assert module.add_fused_lm_head is original


def test_a_trl_version_without_the_patched_name_raises(build, monkeypatch):
    """Otherwise the trainer would silently use TRL's head."""
    module = sys.modules["trl.trainer.sft_trainer"]
    monkeypatch.setattr(trl.SFTTrainer, "__init__", _with_globals(trl.SFTTrainer.__init__, vars(module)))
    with pytest.raises(
        RuntimeError, match=r"expected trl\.trainer\.sft_trainer\.add_fused_lm_head to be called .* got TRL"
    ):
        build("sft", "fused")


def _with_globals(function, names):
    """A copy of the function with other globals, as if another library had recompiled it."""
    other = type(function)(
        function.__code__, dict(names), function.__name__, function.__defaults__, function.__closure__
    )
    other.__kwdefaults__ = function.__kwdefaults__
    return other


# attach()


def test_detach_and_attach_may_run_concurrently(build):
    gc.collect()  # trainers that other tests have attached would keep the switch in place
    attached_trainer, stock_trainer = build("sft", "attach"), build("sft", "stock")
    threads = []

    def register(*args, **kwargs):
        threads.append(threading.Thread(target=detach, args=(attached_trainer,)))
        threads[-1].start()
        threads[-1].join(timeout=1)
        return type(stock_trainer.model).register_forward_pre_hook(stock_trainer.model, *args, **kwargs)

    stock_trainer.model.register_forward_pre_hook = register
    attach(stock_trainer)
    for thread in threads:
        thread.join(timeout=60)
    assert stock_trainer in attach_module._attached
    assert attached_trainer not in attach_module._attached
    assert isinstance(trl_utils._ChunkedLogProbFunction, attach_module._Switch)
    detach(stock_trainer)
    assert not isinstance(trl_utils._ChunkedLogProbFunction, attach_module._Switch)


def test_two_threads_may_step_one_trainer(build, monkeypatch):
    """First one thread ends its step while the other's forward starts; then both are inside the forward."""
    calls, original = [], attach_module.linear_logps
    monkeypatch.setattr(attach_module, "linear_logps", lambda *a, **k: calls.append(k["impl"]) or original(*a, **k))
    trainer = build("sft", "stock")
    batch = next(iter(trainer.get_train_dataloader()))
    both_step, one_left, compute_loss = threading.Barrier(2), threading.Event(), trainer.compute_loss

    def one(*args, **kwargs):
        both_step.wait(timeout=60)
        if threading.current_thread().name == "late":
            assert one_left.wait(timeout=60)
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = one
    attach(trainer, impl="pytorch")

    def step(name):
        threading.current_thread().name = name
        try:
            return trainer.compute_loss(trainer.model, dict(batch)).item()
        finally:
            if name == "early":
                one_left.set()

    losses = _run_concurrently(lambda: step("early"), lambda: step("late"))
    assert losses[0] == losses[1]
    assert calls == ["pytorch"] * 2
    detach(trainer)


def test_two_threads_may_run_the_forward_of_one_model(build, monkeypatch):
    """SFT and DPO of one model at the same time: each uses its own attachment."""
    calls, original = [], attach_module.linear_logps
    monkeypatch.setattr(attach_module, "linear_logps", lambda *a, **k: calls.append(k["impl"]) or original(*a, **k))
    sft = build("sft", "attach", head=[("impl", "reference")])
    dpo = build(
        "dpo", "stock", arguments=[("model", lambda: sft.model), ("ref_model", lambda: build("sft", "stock").model)]
    )
    attach(dpo, impl="pytorch")
    batches = [(trainer, next(iter(trainer.get_train_dataloader()))) for trainer in (sft, dpo)]
    both_in, first_out = threading.Barrier(2), threading.Event()
    inside = threading.local()

    def wait(*_):
        if not hasattr(inside, "waited"):
            inside.waited = True
            both_in.wait(timeout=60)
            if threading.current_thread().name == "dpo":
                assert first_out.wait(timeout=60)

    handle = sft.model.model.register_forward_pre_hook(wait)

    def step(name, trainer, batch):
        threading.current_thread().name = name
        try:
            return trainer.compute_loss(trainer.model, dict(batch)).item()
        finally:
            first_out.set()

    _run_concurrently(lambda: step("sft", *batches[0]), lambda: step("dpo", *batches[1]))
    handle.remove()
    assert sorted(calls) == ["pytorch", "pytorch", "reference"]
    assert torch.is_grad_enabled()
    detach(sft)
    detach(dpo)
