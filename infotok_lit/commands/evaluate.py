"""Score models on public benchmarks: draw or ask, grade, and put the paper's rows beside the result.

A run that was killed goes on when the same command is given again. `torchrun --nproc_per_node N -m infotok_lit
evaluate ...` shares the work among N processes.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from infotok_lit.checkpoints import exported_family, find_checkpoint
from infotok_lit.commands.command_line import at_least, progress_bar
from infotok_lit.commands.model_choice import ModelChoice, chosen_device
from infotok_lit.errors import SettingsError
from infotok_lit.files import write_whole

if TYPE_CHECKING:
    from infotok_lit.evaluation.benchmark import Benchmark
    from infotok_lit.evaluation.catalogue import Options
    from infotok_lit.evaluation.models import EvaluatedModel
    from infotok_lit.evaluation.results import Result
    from infotok_lit.evaluation.running import Evaluation, World


def main(argv: Sequence[str]) -> int:
    """`evaluate --model M... --benchmark NAME... --out DIR`."""
    parser = _parser()
    arguments = parser.parse_args(argv[1:])
    if arguments.detections is not None:
        return score_detections(arguments.detections)
    if arguments.benchmark is None:
        parser.error("say which --benchmark (or all)")
    from infotok_lit.evaluation.catalogue import make_benchmarks
    from infotok_lit.evaluation.running import World

    try:
        options = _options(arguments)
        benchmarks = make_benchmarks(arguments.benchmark, options)
        if arguments.verdicts is not None:
            return aggregate(benchmarks, arguments.verdicts)
        if not arguments.model or arguments.out is None:
            parser.error("say which --model to evaluate, and where to put the results: --out")
        with _quiet_unless_first(World.join()) as world:
            evaluate(arguments, benchmarks, world)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


def evaluate(arguments: argparse.Namespace, benchmarks: "Sequence[Benchmark]", world: "World") -> None:
    """Every benchmark on every model, one model in memory at a time; tables are printed and written at the end."""
    from infotok_lit.evaluation.results import table

    _tell_plan(benchmarks, arguments.limit)
    results: dict[str, list[Result]] = {benchmark.name: [] for benchmark in benchmarks}
    names = labels(arguments.model)
    for name, path in zip(names, arguments.model, strict=True):
        model = load(arguments, path, name)
        for result in evaluate_model(model, benchmarks, arguments, world):
            results[result.benchmark.name].append(result)
        del model
    text = "\n".join(table(own) for own in results.values())
    if world.rank == 0:
        write_whole(arguments.out / "table.md", text.encode())
        sys.stdout.write(text)


def evaluate_model(
    model: "EvaluatedModel", benchmarks: "Sequence[Benchmark]", arguments: argparse.Namespace, world: "World"
) -> "Iterator[Result]":
    """The results of one model, written to OUT/MODEL/BENCHMARK."""
    from infotok_lit.evaluation.results import Result, summarise, write_result
    from infotok_lit.evaluation.running import Evaluation

    runs = [
        Evaluation(
            model=model,
            benchmark=benchmark,
            folder=arguments.out / model.name / benchmark.name,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            world=world,
        )
        for benchmark in benchmarks
    ]
    for run in runs:
        run.open()
    for run in runs:
        # The first batch of each is real work that tells how long the rest will take.
        run.outputs(most=1)
    _tell_time(model.name, runs)
    for run in runs:
        with progress_bar(sum(run.left().values()), shown=world.rank == 0) as bar:
            run.progress.show = bar.show
            rows = run.graded()
        content = summarise(run.benchmark, rows, model.description(), run.whole, run.progress)
        result = Result(model.name, run.benchmark, content)
        if world.rank == 0:
            write_result(run.folder, result, rows)
            run.benchmark.write_official(run.folder, rows)
            if arguments.limit is None:
                _tell(f"{run.benchmark.name}: {problem}" for problem in run.benchmark.check_complete(run.folder)[:10])
        yield result


def load(arguments: argparse.Namespace, path: Path, name: str) -> "EvaluatedModel":
    """An exported folder, a run, a transformers or a diffusers folder, or an official checkpoint.

    Raises:
        ValueError: naming what is wrong, and the mend.
    """
    from infotok_lit.evaluation.models import DiffusersModel, OwnModel, TransformersModel, kind_of

    if exported_family(path) is None and arguments.family is None:
        if kind_of(path) == "diffusers":
            return DiffusersModel(path, name, chosen_device(arguments.device), arguments.dtype)
        if kind_of(path) == "transformers":
            return TransformersModel(path, name, chosen_device(arguments.device), arguments.dtype)
        checkpoint = find_checkpoint(path)
        if checkpoint is not None:
            return _load_run(arguments, checkpoint, name)
    choice = ModelChoice.from_arguments(argparse.Namespace(**{**vars(arguments), "model": path}))
    return OwnModel(choice.load(), name, path)


def score_detections(path: Path) -> int:
    """Judge stored detections by GenEval's rules and print the scores."""
    from infotok_lit.evaluation.geneval import GenEval, judge_stored, task_scores

    rows, told = judge_stored(path)
    lines = [f"{name}: {score.value:.4f} (n = {score.n})" for name, score in task_scores(rows).items()]
    sys.stdout.write("\n".join([f"{GenEval.title}, {len(rows)} stored scenes", *lines, *told]) + "\n")
    return 0


def aggregate(benchmarks: "Sequence[Benchmark]", files: Sequence[Path]) -> int:
    """Print the scores that the result files of an official run add up to."""
    from infotok_lit.evaluation.results import Result, summarise, table
    from infotok_lit.evaluation.running import Progress

    if len(benchmarks) != 1:
        raise SettingsError("stored verdicts belong to one benchmark: name that one by --benchmark")
    rows = benchmarks[0].aggregate(files)
    content = summarise(benchmarks[0], rows, {"name": "stored verdicts"}, len(rows), Progress())
    sys.stdout.write(table([Result("stored verdicts", benchmarks[0], content)]))
    return 0


def labels(paths: Sequence[Path]) -> list[str]:
    """What tells models apart, and names their folders: the last part of each path, numbered where it is shared."""
    names = [path.resolve().name for path in paths]
    return [
        name if names.count(name) == 1 else f"{name}-{names[: number + 1].count(name)}"
        for number, name in enumerate(names)
    ]


def _load_run(arguments: argparse.Namespace, checkpoint: Path, name: str) -> "EvaluatedModel":
    import torch

    from infotok_lit.checkpoints import read_run
    from infotok_lit.evaluation.models import OwnModel
    from infotok_lit.modules.base_model import rebuild_base

    base = rebuild_base(read_run(checkpoint))
    for parameter in base.parameters():
        parameter.data = parameter.data.to(getattr(torch, arguments.dtype))
    return OwnModel(base.to(chosen_device(arguments.device)).eval(), name, checkpoint)


def _options(arguments: argparse.Namespace) -> "Options":
    from infotok_lit.evaluation.catalogue import Options
    from infotok_lit.evaluation.judge import Endpoint

    endpoint = None
    if arguments.judge is not None:
        if arguments.judge_model is None:
            raise SettingsError("say which model judges there: --judge_model")
        endpoint = Endpoint(
            arguments.judge,
            arguments.judge_model,
            arguments.judge_key,
            price_in=arguments.judge_price and arguments.judge_price[0],
            price_out=arguments.judge_price and arguments.judge_price[1],
        )
    return Options(
        data=arguments.data,
        seed=arguments.seed,
        images_per_prompt=arguments.images_per_prompt,
        rules=arguments.rules,
        detector=arguments.detector,
        classifier=arguments.classifier,
        endpoint=endpoint,
        device=chosen_device(arguments.device),
    )


@contextmanager
def _quiet_unless_first(world: "World") -> "Iterator[World]":
    """Only the first process speaks; each uses the GPU of its own number."""
    if world.size > 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        yield world
    finally:
        world.leave()


def _tell(lines: Iterator[str] | Sequence[str]) -> None:
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
        lines.append(f"{benchmark.name}: {', '.join(parts)}")
    _tell(lines)


def _tell_time(name: str, runs: "Sequence[Evaluation]") -> None:
    lines, total = [], 0.0
    for run in runs:
        seconds = run.expected_seconds()
        total += seconds
        lines.append(f"{name}, {run.benchmark.name}: {_duration(seconds)} to draw and answer")
    _tell([*lines, f"{name}: about {_duration(total)} in all, without judging"])


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infotok_lit evaluate", description=__doc__)
    ModelChoice.add_arguments(parser, several=True, required=False)
    parser.add_argument(
        "--benchmark", nargs="+", metavar="NAME", help="see docs/evaluation.md for the names; all runs every one"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="benchmark files that do not ship: DIR/NAME/...")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results: DIR/MODEL/NAME/")
    parser.add_argument("--limit", type=at_least(1), help="at most so many prompts or images, evenly spread")
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="images or questions at a time; default: 8")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the first image drawn; default: 0")
    parser.add_argument("--images_per_prompt", type=at_least(1), help="default: the benchmark's own")
    parser.add_argument(
        "--rules", default="official", help="how answers are read: official, lmms-eval or vlmevalkit; default: official"
    )
    judging = parser.add_argument_group("judging")
    judging.add_argument("--detector", type=Path, metavar="DIR", help="GenEval: an instance segmenter of transformers")
    judging.add_argument("--classifier", type=Path, metavar="DIR", help="GenEval: a CLIP of transformers")
    judging.add_argument("--judge", metavar="URL", help="GenEval++, WISE, MM-Vet: an OpenAI-compatible .../v1")
    judging.add_argument("--judge_model", metavar="NAME", help="the judge's name there")
    judging.add_argument("--judge_key", metavar="VARIABLE", default="OPENAI_API_KEY", help="where its key is")
    judging.add_argument(
        "--judge_price", type=float, nargs=2, metavar=("IN", "OUT"), help="per million tokens, to report the cost"
    )
    stored = parser.add_argument_group("without a model")
    stored.add_argument("--detections", type=Path, metavar="FILE", help="judge stored detections by GenEval's rules")
    stored.add_argument("--verdicts", type=Path, nargs="+", metavar="FILE", help="add up an official run's results")
    return parser
