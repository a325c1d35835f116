"""`evaluate`: models on public benchmarks, with the paper's rows beside the result."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from jsonargparse.typing import PositiveInt

from infotok_lit.checkpoints import exported_family
from infotok_lit.commands.parsing import Seed
from infotok_lit.errors import INTERRUPTED, SettingsError
from infotok_lit.evaluation.benchmark import Rules
from infotok_lit.files import write_whole
from infotok_lit.hub import fetch
from infotok_lit.inference import InferenceModel
from infotok_lit.model_choice import ModelOptions, choose, chosen_device
from infotok_lit.progress import progress_bar

if TYPE_CHECKING:
    from infotok_lit.evaluation.benchmark import Benchmark
    from infotok_lit.evaluation.endpoint import Endpoint
    from infotok_lit.evaluation.models import EvaluatedModel
    from infotok_lit.evaluation.results import Result
    from infotok_lit.evaluation.running import Evaluation, World


TOLD = 10
"""Files that are missing from an official layout, before the rest is only counted."""


@dataclass(frozen=True)
class JudgeOptions:
    """How answers and images are judged: by rules, or by what looks at them where rules do not do.

    Args:
        rules: How answers are read. With `all`, by the benchmarks that have these rules.
        detector: GenEval: folder of an instance segmenter of transformers.
        classifier: GenEval: folder of a CLIP of transformers.
        judge: GenEval++, WISE, MM-Vet: URL of an OpenAI-compatible endpoint, .../v1.
        judge_model: The judge's name there.
        judge_key: The environment variable that holds its key.
        judge_price_in: What a million tokens sent costs, to report the cost.
        judge_price_out: What a million tokens received costs.
        judge_limit: Ask no more once the verdicts of this run, over all benchmarks and processes, have cost so much.
    """

    rules: Rules = "official"
    detector: Path | None = None
    classifier: Path | None = None
    judge: str | None = None
    judge_model: str | None = None
    judge_key: str = "OPENAI_API_KEY"
    judge_price_in: float | None = None
    judge_price_out: float | None = None
    judge_limit: float | None = None

    def judges(self) -> "tuple[Path | None, Path | None, Endpoint | None]":
        """GenEval's detector and classifier, and the judge at a URL; None for those that are not given."""
        return self.detector, self.classifier, self.endpoint()

    def endpoint(self) -> "Endpoint | None":
        """The judge that answers at a URL; None without one."""
        from infotok_lit.evaluation.endpoint import Endpoint

        if self.judge is None:
            return None
        if self.judge_model is None:
            raise SettingsError("say which model judges there: --judge_model")
        return Endpoint(
            self.judge,
            self.judge_model,
            self.judge_key,
            price_in=self.judge_price_in,
            price_out=self.judge_price_out,
            limit=self.judge_limit,
            processes=int(os.environ.get("WORLD_SIZE", 1)),
        )


def evaluate(
    options: ModelOptions,
    judging: JudgeOptions,
    benchmark: list[str] | None = None,
    model: list[str] | None = None,
    data: Path | None = None,
    out: Path | None = None,
    limit: PositiveInt | None = None,
    batch_size: PositiveInt = 8,
    budget: float | None = None,
    seed: Seed = 0,
    images_per_prompt: PositiveInt | None = None,
    detections: Path | None = None,
    verdicts: list[Path] | None = None,
) -> int:
    """Score models on public benchmarks: draw or ask, grade, and put the paper's rows beside the result.

    A run that was killed goes on when the same command is given again. `torchrun --nproc_per_node N -m infotok_lit
    evaluate ...` shares the work among N processes. What each benchmark needs is in docs/evaluation.md.

    Args:
        benchmark: Which of scenes32, scenes64, garments32, geneval, geneval_rewritten, geneval++, wise, wise_verified,
            dpg_bench, geneval2, unibench, pope, mme, gqa, seed, seed_likelihood, mmmu, mm_vet, mm_vet_v2; `all` runs
            every one.
        model: An exported folder, a run, an official checkpoint, a name on the Hugging Face hub, a base that ships
            (such as harmon_scenes32), or a folder of transformers (questions) or diffusers (images); or several.
        data: Benchmark files that do not ship: DATA/NAME/...
        out: Where results go: OUT/MODEL/NAME/.
        limit: At most so many prompts or images of each benchmark, evenly spread.
        batch_size: Images or questions at a time.
        budget: Read images with this mean share of their tokens, as for `describe`; drawing is as ever.
        seed: What the seeds of drawn images start from.
        images_per_prompt: Of geneval, geneval_rewritten, dpg_bench and unibench; default: 4. The others draw one.
        detections: No model: judge the detections stored in this file by GenEval's rules.
        verdicts: No model: add up the result files of a benchmark's official script.
    """
    if detections is not None:
        return score_detections(detections, benchmark or ())
    if not benchmark:
        raise SettingsError("say which --benchmark (or all)")
    from infotok_lit.evaluation.catalogue import Options, make_benchmarks, told_of_images, told_of_rules

    chosen = Options(data, seed, images_per_prompt, judging.rules, *judging.judges(), chosen_device(options.device))
    made = make_benchmarks(benchmark, chosen, limit, with_images=verdicts is None)
    if verdicts is not None:
        return aggregate(made, verdicts)
    if not model or out is None:
        raise SettingsError("say which --model to evaluate, and where to put the results: --out")
    _tell([*told_of_rules(made, judging.rules), *told_of_images(made, images_per_prompt)])
    return evaluate_models(model, options, made, out, limit, batch_size, budget)


def evaluate_models(
    sources: Sequence[str],
    options: ModelOptions,
    benchmarks: "Sequence[Benchmark]",
    out: Path,
    limit: int | None,
    batch_size: int,
    budget: float | None = None,
) -> int:
    """Score every model, and show and write the table of all; returns the exit status."""
    from infotok_lit.evaluation.results import table
    from infotok_lit.evaluation.running import World

    with _joined(World.join()) as world, _disk_named(out):
        _tell_plan(benchmarks, limit)
        results: dict[str, list[Result]] = {one.name: [] for one in benchmarks}
        for name, source in zip(labels(sources), sources, strict=True):
            # One model in memory at a time.
            found = evaluate_model(load(source, name, options, budget), benchmarks, out, limit, batch_size, world)
            try:
                for result in found:
                    results[result.benchmark.name].append(result)
            except KeyboardInterrupt:
                _tell([f"stopped; what was made is kept in {out}, and the same command goes on from there"])
                return INTERRUPTED
        if world.rank == 0:
            text = "\n".join(map(table, results.values()))
            write_whole(out / "table.md", text.encode())
            sys.stdout.write(text)
    return 0


def evaluate_model(
    model: "EvaluatedModel",
    benchmarks: "Sequence[Benchmark]",
    out: Path,
    limit: int | None,
    batch_size: int,
    world: "World",
) -> "Iterator[Result]":
    """The results of one model, written to OUT/MODEL/BENCHMARK."""
    from infotok_lit.evaluation.results import Result, summarise, write_result
    from infotok_lit.evaluation.running import Evaluation

    folders = [out / model.name / benchmark.name for benchmark in benchmarks]
    evaluations = [
        Evaluation(model, benchmark, folder, batch_size=batch_size, limit=limit, world=world)
        for benchmark, folder in zip(benchmarks, folders, strict=True)
    ]
    with _claimed(folders, world):
        for evaluation in evaluations:
            evaluation.open()
        for evaluation in evaluations:
            # The first batch of each is real work that tells how long the rest will take.
            evaluation.graded(most=1)
        _tell_time(model.name, evaluations)
        for evaluation in evaluations:
            with progress_bar(sum(evaluation.left().values()), shown=world.rank == 0) as bar:
                evaluation.progress.start(bar.show)
                rows = evaluation.graded()
            content = summarise(evaluation.benchmark, rows, model.description(), evaluation.progress)
            result = Result(model.name, evaluation.benchmark, content)
            if world.rank == 0:
                write_result(evaluation.folder, result, rows)
                evaluation.benchmark.write_official(evaluation.folder, rows)
                if limit is None:
                    problems = evaluation.benchmark.check_complete(evaluation.folder)
                    more = [f"and {len(problems) - TOLD} more files"] if len(problems) > TOLD else []
                    _tell(f"{evaluation.benchmark.name}: {problem}" for problem in problems[:TOLD] + more)
            yield result


def load(source: str, name: str, options: ModelOptions, budget: float | None = None) -> "EvaluatedModel":
    """The model behind a name, which it is called by in results; `budget` is for models of this package.

    Raises:
        ExplainedError: naming what is wrong, and the mend.
    """
    from infotok_lit.evaluation.models import DiffusersModel, OwnModel, TransformersModel, kind_of

    path = fetch(source)
    others = {"diffusers": DiffusersModel, "transformers": TransformersModel}
    ours = exported_family(path) is not None or options.family is not None or budget is not None
    if not ours and (kind := kind_of(path)) in others:
        return others[kind](path, name, chosen_device(options.device), options.dtype)
    choice = choose(source, options)
    parts = {part: fetch(path) for part, path in options.parts.items()}
    return OwnModel(InferenceModel.of(choice, budget), name, choice.path, parts)


def score_detections(path: Path, benchmarks: Sequence[str] = ()) -> int:
    """Judge stored detections by GenEval's rules and print the scores; returns the exit status."""
    if set(benchmarks) - {"geneval", "geneval_rewritten"}:
        raise SettingsError("--detections are judged by GenEval's rules alone: leave out --benchmark, or name geneval")
    from infotok_lit.evaluation.geneval import GenEval, judge_stored, task_scores

    rows, told = judge_stored(path)
    lines = [f"{name}: {score.value:.4f} (n = {score.n})" for name, score in task_scores(rows).items()]
    sys.stdout.write("\n".join([f"{GenEval.title}, {len(rows)} stored scenes", *lines, *told]) + "\n")
    return 0


def aggregate(benchmarks: "Sequence[Benchmark]", files: Sequence[Path]) -> int:
    """Print the scores that the result files of an official run add up to; returns the exit status."""
    from infotok_lit.evaluation.results import Result, summarise, table
    from infotok_lit.evaluation.running import Progress

    if len(benchmarks) != 1:
        raise SettingsError("stored verdicts belong to one benchmark: name that one by --benchmark")
    if len({file.resolve() for file in files}) < len(files):
        raise SettingsError("--verdicts names a file twice, whose rows would count twice: name it once")
    rows = benchmarks[0].aggregate(files)
    content = summarise(benchmarks[0], rows, {"name": "stored verdicts"}, Progress())
    sys.stdout.write(table([Result("stored verdicts", benchmarks[0], content)]))
    return 0


def labels(sources: Sequence[str]) -> list[str]:
    """What tells models apart and names their folders: the last part of each, numbered where it is shared."""
    # Without `..`, which would be a folder beside the results.
    names = [Path(os.path.abspath(source)).name for source in sources]
    return [
        name if names.count(name) == 1 else f"{name}-{names[: number + 1].count(name)}"
        for number, name in enumerate(names)
    ]


@contextmanager
def _joined(world: "World") -> "Iterator[World]":
    """Inside, each process uses the GPU of its own number; at the end they part."""
    if world.size > 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        yield world
    finally:
        world.leave()


@contextmanager
def _claimed(folders: Sequence[Path], world: "World") -> "Iterator[None]":
    """Inside, no other run evaluates into these folders: each would take the other's half-made parts.

    Raises:
        SettingsError: naming a folder that another run works in.
    """
    taken = None
    with ExitStack() as locks:
        for folder in folders if world.rank == 0 else ():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                locks.enter_context(FileLock(folder / ".lock", timeout=0))
            except Timeout:
                taken = folder
        if world.any(taken is not None):
            raise SettingsError(
                f"another run evaluates into {taken or folders[0].parent}: wait for it, choose another --out, or share "
                "the work among processes with torchrun"
            )
        yield


@contextmanager
def _disk_named(out: Path) -> "Iterator[None]":
    """What fails on a full disk is said of the folder: errors in the middle of a write name no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(out)
        raise


def _tell(lines: Iterable[str]) -> None:
    """To stderr, from the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        sys.stderr.write("".join(f"{line}\n" for line in lines))


def _tell_plan(benchmarks: "Sequence[Benchmark]", limit: int | None) -> None:
    from infotok_lit.evaluation.running import counts

    lines = []
    for benchmark in benchmarks:
        images, answers = counts(benchmark, limit)
        parts = [f"{images} images to draw"] if images else []
        if answers:
            parts.append(f"{answers} answers of at most {benchmark.max_new_tokens} tokens")
        if benchmark.grader is not None:
            parts.append(f"judged by {benchmark.grader.name}")
        shortfall = benchmark.shortfall()
        lines.append(f"{benchmark.name}: {', '.join(parts)}{f'; {shortfall}' if shortfall else ''}")
    _tell(lines)


def _tell_time(name: str, evaluations: "Sequence[Evaluation]") -> None:
    lines, total = [], 0.0
    for evaluation in evaluations:
        seconds, cost = evaluation.expected_seconds(), evaluation.expected_cost()
        total += seconds
        lines.append(f"{name}, {evaluation.benchmark.name}: about {_duration(seconds)}")
        lines[-1] += "" if cost is None else f", and {cost:.2f} for the judge"
    _tell([*lines, f"{name}: about {_duration(total)} in all"])


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
