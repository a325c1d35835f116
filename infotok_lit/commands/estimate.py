"""`estimate`: what a configuration needs before anything is bought, downloaded or queued for."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt

from infotok_lit.commands.stand_in_fit import Plan, build_data, build_module, plan_of, read_settings, shaping
from infotok_lit.errors import SettingsError
from infotok_lit.files import check_target, write_json
from infotok_lit.tables import Table

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import Tensor

    from infotok_lit.modules.dry_run import DryRun
    from infotok_lit.modules.infotok_module import InfoTokModule

Result = dict[str, Any]

GIB = 2**30
CARDS = (24, 48, 80)
"""The memory of common cards, in GiB."""
USABLE = 0.92
"""The share of a card for tensors; the rest is for CUDA's context, workspaces of libraries and fragmentation. The same
share on a CPU, of what a process takes above its libraries."""
FEWER_NEGATIVES = "fewer texts at a time are fewer negatives for alignment: add --config objective/hard_negatives"


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model, by how strategies treat them."""

    whole: int
    """Of the autoencoder's parameters and of buffers, which every process holds."""
    weights: int
    """Of all other parameters."""
    read: int
    """Of these as they are read, in float32, before frozen layers are halved."""
    trained: int
    """Of those among them that have gradients."""
    block: int
    """Of the largest block that FSDP gathers at a time."""
    outside: int
    """Of the weights outside blocks, which stay gathered during a step."""
    saved: int
    """Of what a checkpoint holds of the weights: not those that are frozen."""
    averages: int = 0
    """Of the moving average of trained weights, which is shared out as these are."""


def estimate(
    fit_arguments: list[str],
    cards: PositiveInt = 8,
    text_tokens: PositiveInt | None = None,
    tflops: PositiveFloat | None = None,
    mfu: PositiveFloat = 0.4,
    alternatives: bool = True,
    measure: bool = False,
    out: Path | None = None,
) -> None:
    """Say what memory and computation the training of a configuration takes, without its weights and data.

    The real training step runs on tensors without values, so any size takes seconds and little memory. Every option
    that is not listed here is one of fit's, such as --config FILE.

    Args:
        fit_arguments: What `fit` is given.
        cards: Of how many cards DDP and FSDP are estimated too.
        text_tokens: Length of the answers and prompts; default: as they are if the configured images are drawn by a
            program (Scenes), else 128.
        tflops: What a card computes in a second, in 10^12 operations (an H100 989 in bf16), for an estimate of time.
        mfu: Which share of that training reaches.
        alternatives: Also try what makes a step smaller, until it fits the smallest card.
        measure: Also take two steps in truth, from random weights on this machine, and compare.
        out: Also write the numbers to this JSON file.
    """
    check_target(out)
    if mfu > 1:
        raise SettingsError(f"mfu is {mfu}; give a share of the card's peak, above 0 and up to 1, such as 0.4")
    import torch

    settings = read_settings(fit_arguments)
    configured = plan_of(settings)
    result: Result = {"arguments": fit_arguments, "cards": cards, "text_tokens": text_tokens}
    if measure:
        # First, while this process has little in its heap that a step could reuse.
        result["measured_bytes"] = _measured(settings, configured, text_tokens)
    plans = [configured]
    if alternatives:
        plans += [replace(configured, recompute=True), replace(configured.smallest, recompute=True)]
    on_card = torch.cuda.is_available() or not measure
    found = _estimated(settings, list(dict.fromkeys(plans)), cards, text_tokens, on_card)
    result["plans"] = found
    if tflops is not None:
        result["step_seconds"] = found[0]["flops"] / (tflops * 1e12 * mfu)
    write_json(out, result)
    show(result)


def _measured(settings: Namespace, plan: Plan, text_tokens: int | None) -> int:
    """Bytes of tensors at most, while two steps are taken on this machine."""
    import torch

    from infotok_lit.modules.two_steps import measured_run

    trainer = shaping(settings, plan) | {"devices": 1}
    trainer["accelerator"] = "gpu" if torch.cuda.is_available() else "cpu"
    build, data = partial(build_module, settings, plan), partial(build_data, settings, plan, text_tokens)
    return measured_run(build, data, averaging(settings), **trainer)


def averaging(settings: Namespace) -> "list[pl.Callback]":
    """The callback that keeps a moving average of the weights, if it is configured: others hold nothing to speak of."""
    from infotok_lit.callbacks import WeightAverage

    names = [callback.class_path.rpartition(".")[2] for callback in settings.trainer.callbacks or ()]
    return [WeightAverage()] if WeightAverage.__name__ in names else []


def _estimated(
    settings: Namespace, plans: Sequence[Plan], cards: int, text_tokens: int | None, on_card: bool
) -> list[Result]:
    """What the first plan takes, and those after it until one fits the smallest card."""
    from infotok_lit.modules.dry_run import dry_run

    strategy = settings.trainer.strategy
    buckets = isinstance(strategy, str) or not strategy.get("init_args", {}).get("gradient_as_bucket_view")
    found: list[Result] = []
    for plan in plans:
        module, trainer = build_module(settings, plan), shaping(settings, plan)
        data = build_data(settings, plan, text_tokens)
        step = dry_run(module, data, on_card=on_card, callbacks=averaging(settings), **trainer)
        step.flops = step.flops * plan.accumulate // trainer["accumulate_grad_batches"]
        of_plan = asdict(plan) | {"options": plan.options_after(plans[0]), "worst": step.worst}
        found.append(of_plan | account(module, step, cards, buckets))
        if step.peak <= USABLE * CARDS[0] * GIB:
            break
    peak_on_cpu = None if on_card else found[0]["bytes"]["1 card"]
    found[0]["process_bytes"] = _process_bytes(settings, plans[0], text_tokens, peak_on_cpu)
    return found


def _process_bytes(settings: Namespace, plan: Plan, text_tokens: int | None, peak: int | None) -> int | None:
    """What a process holds that trains on a CPU: tensors, gaps among them, and libraries; None where glibc is not.

    Args:
        peak: of tensors on a CPU in bytes, if it is known.
    """
    from infotok_lit.modules.dry_run import dry_run
    from infotok_lit.modules.two_steps import resident_memory

    if resident_memory() is None:
        return None
    if peak is None:
        data = build_data(settings, plan, text_tokens)
        module, trainer = build_module(settings, plan), shaping(settings, plan)
        peak = dry_run(module, data, on_card=False, callbacks=averaging(settings), **trainer).peak
    # A process that has loaded what a fit loads, without tensors.
    return resident_memory() + int(peak / USABLE)


# What a step holds


def sizes_of(module: "InfoTokModule") -> Sizes:
    """The bytes of a module's weights, by how strategies treat them."""
    import torch

    from infotok_lit.modules.average import AVERAGE
    from infotok_lit.modules.sharding import repeated_blocks

    averages = sum(one.nbytes for name, one in module.named_buffers() if name.startswith(f"{AVERAGE}."))
    whole = _bytes(module.base.autoencoder.parameters()) + _bytes(module.buffers()) - averages
    own = [(name, one) for name, one in module.named_parameters() if not name.startswith("base.autoencoder.")]
    weights = _bytes(parameter for _, parameter in own)
    blocks = [_bytes(block.parameters()) for block in repeated_blocks(module.base)]
    # Tied weights have several names, under which a checkpoint leaves them out, or holds them once.
    frozen = {name for name, one in module.named_parameters(remove_duplicate=False) if not one.requires_grad}
    state = module.state_dict(keep_vars=True)
    saved = sum({id(tensor): tensor.nbytes for name, tensor in state.items() if name not in frozen}.values())
    return Sizes(
        whole=whole,
        weights=weights,
        read=sum(torch.float32.itemsize * parameter.numel() for _, parameter in own),
        trained=_bytes(parameter for _, parameter in own if parameter.requires_grad),
        block=max(blocks, default=0),
        outside=weights - sum(blocks),
        saved=saved,
        averages=averages,
    )


def bytes_on_card(step: "DryRun", sizes: Sizes, cards: int, sharded: bool, buckets: bool) -> int:
    """The memory of each of several cards at the worst moment.

    DDP copies gradients into buckets to send them, unless they are views of these; buckets are there all the time.
    FSDP shares out weights, gradients and states; gathered are two blocks, as the next is fetched while one computes,
    and all that lies outside blocks.

    Args:
        step: of one process.
        sharded: by FSDP; else each process holds everything.
        buckets: whether gradients are copied for sending.
    """
    if not sharded and (cards == 1 or buckets):
        return step.peak + (sizes.trained if cards > 1 else 0)
    if not sharded:
        # Buckets stay when the gradients that are views of them are forgotten.
        return max(held.total() - held["gradients"] for held in step.phases.values()) + sizes.trained
    gradients = sizes.trained / sizes.weights
    gathered = (sizes.outside + 2 * sizes.block) * (1 + gradients)
    most = 0.0
    for held in step.phases.values():
        shared = held["gradients"] + held["optimiser states"] + sizes.weights + sizes.averages
        most = max(most, held.total() - shared + shared / cards + gathered)
    return int(most)


def account(module: "InfoTokModule", step: "DryRun", cards: int, buckets: bool) -> Result:
    """What there is to say of a dry run, in primitives: bytes, parameters and operations."""
    sizes = sizes_of(module)
    states = step.held["optimiser states"]
    parts = {**dict(module.base.named_children()), "heads": module.infotok}
    on_cards = {
        "1 card": step.peak,
        f"DDP, {cards} cards": bytes_on_card(step, sizes, cards, sharded=False, buckets=buckets),
    }
    if not module.backward_per_branch:  # which fit refuses with FSDP
        on_cards[f"FSDP, {cards} cards"] = bytes_on_card(step, sizes, cards, sharded=True, buckets=buckets)
    return {
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "trained": {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in parts.items()},
        "held": dict(step.held),
        "phases": {phase: held.total() for phase, held in step.phases.items()},
        "flops": step.flops,
        "bytes": on_cards,
        # The tensors of a file are mapped, and become the model's own.
        "host_bytes": sizes.whole + sizes.read,
        "checkpoint_bytes": sizes.saved + states,
    }


# For people


def show(result: Result) -> None:
    """Print the tables of an estimate."""
    from rich.console import Console

    console, first = Console(), result["plans"][0]
    lines = [
        [name, f"{first['parameters'][name]:,}", f"{first['trained'][name]:,}", _gib(first["held"].get(name, 0))]
        for name in first["parameters"]
    ]
    total = [sum(first[kind].values()) for kind in ("parameters", "trained")]
    lines.append(["all", *(f"{number:,}" for number in total), ""])
    Table("Parts of the model", ["part", "parameters", "trained", "activations, GiB"], lines).show()
    parts = {name: size for name, size in first["held"].items() if name not in first["parameters"]}
    parts["activations"] = sum(first["held"].values()) - sum(parts.values())
    lines = [[name, _gib(size)] for name, size in sorted(parts.items(), key=lambda item: -item[1])]
    title = f"One card at the worst moment: {first['worst']}"
    Table(title, ["", "GiB"], [*lines, ["all", _gib(sum(parts.values()))]]).show()
    strategies = list(first["bytes"])
    lines = [
        [plan["options"] or "as configured", *(_fit(plan["bytes"][name]) for name in strategies)]
        for plan in result["plans"]
    ]
    Table("GiB of each card, and the card that it fits", ["", *strategies], lines, wraps=True).show()
    if result["plans"][-1]["accumulate"] != first["accumulate"]:
        console.print(FEWER_NEGATIVES)
    if "measured_bytes" in result:
        measured, wanted = result["measured_bytes"], result["plans"][0]["bytes"]["1 card"]
        console.print(f"measured {_gib(measured)} GiB of tensors: the estimate is {wanted / measured:.3f} of it")
    process = first["process_bytes"]
    console.print(
        f"{first['flops']:.3g} floating-point operations a step"
        + (f", {result['step_seconds']:.2f} s" if "step_seconds" in result else "")
        + f"; memory of the host while weights are read {_gib(first['host_bytes'])} GiB a process; a checkpoint "
        f"{_gib(first['checkpoint_bytes'])} GiB"
        + (f"; trained on a CPU, the process takes {_gib(process)} GiB" if process is not None else "")
    )


def _fit(size: int) -> str:
    card = next((f"{card} GB" for card in CARDS if size <= USABLE * card * GIB), "no card")
    return f"{_gib(size)}: {card}"


def _bytes(tensors: "Iterable[Tensor]") -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
