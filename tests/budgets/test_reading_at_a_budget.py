"""From a run with a token budget to answers: training, the file beside an export, and the commands that read it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import TinyModule, scenes_data

import infotok_lit
from infotok_lit.checkpoints import read_run
from infotok_lit.cli import main
from infotok_lit.errors import SettingsError
from infotok_lit.modules.base_model import base_weights, rebuild_base
from infotok_lit.modules.losses import TaskWeights, check_trainable
from infotok_lit.modules.token_budget import FILE, TokenSelector
from infotok_lit.objective.config import ObjectiveConfig
from infotok_lit.objective.term import PAPER_TERMS
from infotok_lit.objective.token_budget import TokenBudgetConfig, distillation
from infotok_lit.scenes import Scenes

QUESTION = "describe the image."


class Budgeted(TinyModule):
    """The tiny model, and a budget."""

    def __init__(self, family: str = "harmon", budget: TokenBudgetConfig | None = None) -> None:
        super().__init__(family=family)
        self.objective_config = replace(self.objective_config, token_budget=budget)


def fitted(folder: Path, module: TinyModule, steps: int = 3) -> Path:
    """The checkpoint of a short run."""
    pl.seed_everything(0)
    saving = ModelCheckpoint(dirpath=folder, filename="run")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saving],
    )
    trainer.fit(module, scenes_data())
    return folder / "run.ckpt"


@pytest.fixture(scope="module", params=["harmon", "showo2", "openuni"])
def run(request, tmp_path_factory) -> Path:
    return fitted(tmp_path_factory.mktemp(request.param), Budgeted(request.param, TokenBudgetConfig(decay=0.9)))


@pytest.fixture(scope="module")
def exported(run) -> Path:
    folder = run.parent / "exported"
    assert main(["export", "--ckpt", str(run), "--out", str(folder), "--with_budget"]) == 0
    return folder


@pytest.fixture(scope="module")
def plain(run) -> Path:
    folder = run.parent / "plain"
    assert main(["export", "--ckpt", str(run), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def images(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Scenes(split="val").sample("understanding", number).image.save(path)
    return paths


def test_the_checkpoint_holds_the_mean_of_what_was_seen(run) -> None:
    state = read_run(run)["state_dict"]
    assert int(state["infotok.budget.mean.updates"]) == 3
    assert float(state["infotok.budget.mean.value"]) > 0


def test_the_official_weights_are_as_without_a_budget(plain, exported) -> None:
    assert {path.name for path in exported.iterdir()} - {path.name for path in plain.iterdir()} == {FILE}
    for path in plain.glob("*.safetensors"):
        tensors, same = load_file(path), load_file(exported / path.name)
        assert tensors.keys() == same.keys()
        assert all(torch.equal(tensor, same[name]) for name, tensor in tensors.items())


def test_the_small_file_ranks_as_the_run_does(run, exported) -> None:
    checkpoint = read_run(run)
    base = rebuild_base(checkpoint)
    pixels = base.processor.pixels([Scenes(split="val").sample("understanding", i).image for i in range(4)])
    tokens = base.understood_tokens(pixels)
    selectors = TokenSelector.of_run(checkpoint, base, keep=0.5), TokenSelector.of_folder(exported, base, 0.5)
    rates, same = (selector.rates(tokens) for selector in selectors)
    assert torch.equal(rates, same)
    state = checkpoint["state_dict"]
    mean = state["infotok.budget.mean.value"] / (1 - 0.9 ** int(state["infotok.budget.mean.updates"]))
    for selector in selectors:
        torch.testing.assert_close(selector.budget.mean.mean, mean)
    assert torch.equal(*(selector(tokens) for selector in selectors))
    # The rate of Eq. 7, from torch's own distributions.
    posterior = selectors[0].projection(tokens)
    normal = torch.distributions.Normal(posterior.mean, torch.exp(posterior.log_variance / 2))
    prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(rates, torch.distributions.kl_divergence(normal, prior).sum(-1), rtol=1e-3, atol=1e-3)


def test_describe_reads_a_run_and_its_export_alike(run, exported, images, capsys) -> None:
    def said(model: Path) -> list[str]:
        argv = ["describe", "--model", str(model), "--image", *map(str, images), "--prompt", QUESTION]
        assert main([*argv, "--max_new_tokens", "6", "--budget", "0.25", "--json"]) == 0
        return [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()]

    answers = said(exported)
    assert answers == said(run)
    assert answers == infotok_lit.load(exported, budget=0.25).describe(images, QUESTION, max_new_tokens=6)


def test_the_budget_says_how_many_tokens_are_read(exported, monkeypatch) -> None:
    model = infotok_lit.load(exported, budget=0.5)
    seen = []
    choose = model.selector.forward
    monkeypatch.setattr(model.selector, "forward", lambda tokens: seen.append(choose(tokens)) or seen[-1])
    shown = [Scenes(split="val").sample("understanding", i).image for i in range(6)]
    model.describe(shown, QUESTION, max_new_tokens=1)
    (kept,) = seen
    extras = model.base.num_extras["understanding"]
    assert bool(kept[:, :extras].all())
    places = 16  # the tiny models' grid is 4 x 4
    assert 0.3 < float(kept[:, extras:].float().mean()) < 0.7
    assert kept.shape == (6, extras + places)


def test_evaluate_asks_at_a_budget(exported, tmp_path, capsys) -> None:
    out = tmp_path / "results"
    argv = ["evaluate", "--model", str(exported), "--benchmark", "scenes32", "--out", str(out), "--limit", "2"]
    assert main([*argv, "--budget", "0.5"]) == 0
    settings = json.loads((out / "exported" / "scenes32" / "settings.json").read_text())
    assert settings["model"]["budget"] == 0.5
    assert main(argv) == 2
    assert "model.budget" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["describe", "evaluate"])
def test_a_model_without_a_budget_says_what_to_do(command, plain, images, tmp_path, capsys) -> None:
    others = {"describe": ["--image", str(images[0])], "evaluate": ["--benchmark", "scenes32", "--out", str(tmp_path)]}
    assert main([command, "--model", str(plain), "--budget", "0.5", *others[command]]) == 2
    assert "export the run again with --with_budget" in capsys.readouterr().err


@pytest.mark.parametrize("budget", ["0", "1.01", "-0.5"])
def test_a_budget_that_is_no_share_is_refused(budget, exported, images, capsys) -> None:
    argv = ["describe", "--model", str(exported), "--image", str(images[0]), "--budget", budget]
    assert main(argv) == 2
    assert "a budget is a share of tokens" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["metadata", "bytes"])
def test_a_damaged_file_is_refused_in_words(damage, exported, images, tmp_path, capsys) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in exported.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = (exported / FILE).read_bytes()
    if damage == "metadata":
        with safe_open(exported / FILE, "pt") as file:
            wide = file.metadata()["projection"].replace('"hidden_width": 16', '"hidden_width": 99')
            narrow = file.metadata()["projection"]
        content = content.replace(json.dumps(narrow)[1:-1].encode(), json.dumps(wide)[1:-1].encode())
    (copy / FILE).write_bytes(content if damage == "metadata" else content[:-20])
    assert content != (exported / FILE).read_bytes() or damage == "bytes"
    assert main(["describe", "--model", str(copy), "--image", str(images[0]), "--budget", "0.5"]) == 2
    said = capsys.readouterr().err
    assert FILE in said and ("mis-shaped" in said if damage == "metadata" else "cannot be read" in said)


def test_a_run_without_a_budget_exports_none(tmp_path, capsys) -> None:
    run = fitted(tmp_path, TinyModule(), steps=1)
    assert main(["export", "--ckpt", str(run), "--out", str(tmp_path / "out"), "--with_budget"]) == 2
    assert "train with objective.token_budget" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_measuring_alone_trains_as_if_it_were_not_there(tmp_path) -> None:
    """Weight 0 only watches: the base ends bit for bit as without a budget, and still knows the mean."""
    plain, watched = (
        read_run(fitted(tmp_path / name, module))
        for name, module in (("a", Budgeted()), ("b", Budgeted(budget=TokenBudgetConfig(weight=0.0))))
    )
    expected = base_weights(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in base_weights(watched).items())
    assert float(watched["state_dict"]["infotok.budget.mean.value"]) > 0


@pytest.mark.parametrize("family", ["harmon", "showo2"])
def test_training_brings_answers_from_fewer_tokens_nearer_to_those_from_all(family) -> None:
    torch.manual_seed(0)
    module = Budgeted(family, budget=TokenBudgetConfig(keep=(0.25,)))
    module.configure_model()
    scenes, losses = Scenes(), []
    batch = module.base.processor.understanding([scenes.sample("understanding", i) for i in range(16)])
    optimiser = torch.optim.Adam(module.base.parameters(), 3e-3)
    trained = module.base.eval()
    for _ in range(30):
        tokens = trained.understood_tokens(batch.pixel_values)
        kept = module.infotok.budget.draw(module.infotok.rates("understanding", tokens))
        with torch.no_grad():
            teacher, _ = trained.answer_logits(batch, tokens)
        loss = distillation(trained.answer_logits(batch, tokens, kept=kept)[0], teacher)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize(
    "settings",
    [
        {"terms": ("alignment",)},
        {"terms": ()},
        {"terms": PAPER_TERMS, "branches": ("generation",)},
        {"terms": PAPER_TERMS, "estimator": "hsic"},
    ],
)
def test_a_budget_needs_rates(settings) -> None:
    with pytest.raises(SettingsError, match="token_budget ranks tokens by the rates of understanding"):
        ObjectiveConfig(**settings, token_budget=TokenBudgetConfig())


def test_settings_come_back_from_a_checkpoint() -> None:
    config = ObjectiveConfig(terms=PAPER_TERMS, token_budget=TokenBudgetConfig(keep=(0.5,), order="random"))
    assert ObjectiveConfig.from_dict(asdict(config)) == config
    assert ObjectiveConfig.from_dict(asdict(ObjectiveConfig())) == ObjectiveConfig()


def test_a_placebo_measures_rates_and_trains_nothing_to_read_fewer_tokens() -> None:
    placebo = ObjectiveConfig(terms=PAPER_TERMS, placebo=True, token_budget=TokenBudgetConfig())
    with pytest.raises(SettingsError, match="set token_budget.weight to 0"):
        check_trainable(TaskWeights(), placebo)
    check_trainable(TaskWeights(), replace(placebo, token_budget=TokenBudgetConfig(weight=0)))
