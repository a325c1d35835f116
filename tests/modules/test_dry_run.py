"""Steps without values hold and compute what steps with values do."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny import FAMILIES, TINY_CONFIGS, TinyModule, scenes_data
from torch import nn
from torch.utils.checkpoint import checkpoint

from infotok_lit.assets import SCENES_TOKENIZER
from infotok_lit.batch import BRANCHES
from infotok_lit.models.family import family
from infotok_lit.modules.dry_run import BUFFERS, GRADIENTS, STATES, WEIGHTS, Ledger, card_kernels, dry_run
from infotok_lit.modules.flops import FlopCount
from infotok_lit.modules.losses import TaskWeights, loss_parts
from infotok_lit.scenes import Scenes


def test_what_a_small_network_holds_is_what_can_be_written_down() -> None:
    """relu(x W) for x (64, 32) and W (32, 16): x, W and the output are kept, and what relu read is gone."""
    with Ledger() as ledger:
        x, weight = (ledger.without_values(torch.empty(shape)) for shape in ((64, 32), (32, 16)))
        weight = nn.Parameter(weight)
        ledger.begin()
        y = torch.relu(x @ weight)
        most = ledger.worst.total()
        held = ledger.held.total()
    kept = 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert held == kept and most == kept + 4 * 64 * 16
    assert y.shape == (64, 16) and ledger.flops == 2 * 64 * 32 * 16


def test_masks_and_indices_have_values() -> None:
    mask = torch.tensor([True, False, True])
    with Ledger() as ledger:
        x = ledger.without_values(torch.empty(3, 5))
        assert x[mask].shape == (2, 5)
        assert int(mask.sum()) == 2 and mask.nonzero().tolist() == [[0], [2]]
        x[mask] = 0.0
        assert x.device == torch.device("cpu")


def test_attention_that_drops_scores_keeps_them_on_a_cpu_alone() -> None:
    """Also where it is computed again; by shapes, as there is no card."""

    def attend(query: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, query, query, dropout_p=0.1)

    held = {}
    for on_card in (True, False):
        with Ledger() as ledger, card_kernels() if on_card else nullcontext():
            query = ledger.without_values(torch.empty(2, 4, 100, 8, device="meta")).requires_grad_()
            before = ledger.held.total()
            out = checkpoint(attend, query, use_reentrant=False) + attend(query)
            held[on_card] = ledger.held.total() - before
            out.sum().backward()
    scores = 4 * 2 * 4 * 100 * 100
    assert held[True] < scores <= held[False]


def test_a_norm_keeps_its_argument_and_a_number_a_row_on_a_card() -> None:
    """As torch's fused kernel does, also where it is computed again; by shapes, as there is no card."""
    norm, rows = nn.functional.rms_norm, 4 * 3 * 70
    for on_card, kept in ((True, rows), (False, rows + 48 * rows)):
        with Ledger() as ledger, card_kernels() if on_card else nullcontext():
            x, weight = (ledger.without_values(torch.empty(shape)).requires_grad_() for shape in ((3, 70, 48), (48,)))
            before = ledger.held.total()
            y = norm_of(x, weight)
            assert ledger.held.total() - before == y.nbytes + kept
            (y + checkpoint(norm_of, x, weight, use_reentrant=False)).sum().backward()
        assert x.grad.shape == x.shape and weight.grad.shape == weight.shape
    assert nn.functional.rms_norm is norm


def norm_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(x, weight.shape, weight, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dry_step_has_the_weights_gradients_states_and_operations_of_a_real_one(family) -> None:
    torch.manual_seed(0)
    dry = dry_run(Meta(family=family), scenes_data(), gradient_clip_val=1.0)
    real = TinyModule(family=family)
    real.configure_model()
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    tensors = sum(p.requires_grad for p in real.parameters())
    held = dry.phases["optimiser"]
    assert dry.phases["forward"][GRADIENTS] == 0, "those of the last step are forgotten"
    assert held[WEIGHTS] == 4 * sum(p.numel() for p in real.parameters())
    assert held[STATES] == 2 * 4 * trained + 4 * tensors, "two moments of each parameter, and a count of its steps"
    assert held[BUFFERS] == sum(buffer.nbytes for buffer in real.buffers())
    assert dry.peak > held[WEIGHTS] + held[STATES]
    batch = {}
    for branch in BRANCHES:
        samples = [Scenes().sample(branch, index, np.random.default_rng(0)) for index in range(4)]
        batch[branch] = getattr(real.base.processor, branch)(samples)
    with FlopCount() as count:
        sum(
            loss_parts(real.task_weights, {branch: real.run_branch(branch, batch[branch]) for branch in batch}).values()
        ).backward()
    # Not 4 bytes a number: some gradients are slices that keep a larger tensor.
    storages = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in real.parameters()}
    assert held[GRADIENTS] == sum(storages.values()) >= 4 * trained
    # Of other texts, which differ in length.
    assert dry.flops == pytest.approx(count.total, rel=0.1)


def test_a_branch_at_a_time_takes_what_the_larger_one_takes_alone() -> None:
    """And the kept gradients: 4 bytes for each weight that understanding, which comes first, trains."""
    dry = {}
    for per_branch, weights in ((True, (1, 1)), (False, (1, 1)), (False, (0, 1))):
        module = Meta((), family="showo2", task_weights=TaskWeights(*weights))
        module.backward_per_branch = per_branch
        torch.manual_seed(0)
        dry[per_branch, weights] = dry_run(module, scenes_data(batch_size=32))
    real = TinyModule((), family="showo2")
    real.configure_model()
    samples = [Scenes().sample("understanding", index, np.random.default_rng(0)) for index in range(4)]
    real.run_branch("understanding", real.base.processor.understanding(samples)).task_loss.backward()
    kept = sum(p.grad.untyped_storage().nbytes() for p in real.parameters() if p.grad is not None)
    alone = dry[False, (0, 1)].peak
    assert dry[True, (1, 1)].peak == pytest.approx(alone + kept, abs=2048)
    assert kept > 2 * 2048 and dry[False, (1, 1)].peak > 1.2 * dry[True, (1, 1)].peak
    assert dry[True, (1, 1)].flops == dry[False, (1, 1)].flops


class Meta(TinyModule):
    """The tiny module, whose weights are fresh: there are no values to be moved."""

    def build_base(self):

        return family(self.family).build(TINY_CONFIGS[self.family](0.0), str(SCENES_TOKENIZER))
