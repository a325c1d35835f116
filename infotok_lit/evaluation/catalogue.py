"""Which benchmarks there are, and how each is made from the options of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from infotok_lit.errors import ExplainedError, MissingFileError, SettingsError, did_you_mean
from infotok_lit.evaluation.benchmark import Benchmark, Rules, rule_named, spread
from infotok_lit.evaluation.dpg_bench import DpgBench
from infotok_lit.evaluation.endpoint import Endpoint
from infotok_lit.evaluation.geneval import GenEval, RewrittenGenEval
from infotok_lit.evaluation.geneval_2 import GenEval2
from infotok_lit.evaluation.geneval_plus_plus import GenEvalPlusPlus
from infotok_lit.evaluation.geneval_vision import ImageJudge
from infotok_lit.evaluation.gqa import Gqa
from infotok_lit.evaluation.mm_vet import MmVet, MmVetV2
from infotok_lit.evaluation.mme import Mme
from infotok_lit.evaluation.mmmu import Mmmu
from infotok_lit.evaluation.pope import Pope
from infotok_lit.evaluation.scenes import GarmentsBenchmark, Scenes64Benchmark, ScenesBenchmark
from infotok_lit.evaluation.seed_bench import SeedBench, SeedBenchLikelihood
from infotok_lit.evaluation.unibench import UniBench
from infotok_lit.evaluation.wise import Wise, WiseVerified


@dataclass
class Options:
    """What benchmarks are made from.

    Args:
        data: the folder with one folder per benchmark, called like it.
        images_per_prompt: default: the benchmark's own.
        rules: how answers are read, by the benchmarks that have these rules.
        detector, classifier: folders of GenEval's two models; both or neither.
        endpoint: the judge.
        device: where detector and classifier run.
    """

    data: Path | None = None
    seed: int = 0
    images_per_prompt: int | None = None
    rules: Rules = "official"
    detector: Path | None = None
    classifier: Path | None = None
    endpoint: Endpoint | None = None
    device: str = "cpu"

    def folder(self, name: str) -> Path:
        """Where the files of a benchmark lie; MissingFileError, with the name alone, without `data`."""
        if self.data is None:
            raise MissingFileError(name)
        return self.data / name

    def rules_of(self, kind: type[Benchmark]) -> Rules:
        """The rules by which a benchmark reads answers: these, or its own where it has no such rules."""
        return self.rules if self.rules in kind.RULES else kind.rules

    @cached_property
    def image_judge(self) -> ImageJudge | None:
        """GenEval's, made when it is first asked for; SettingsError for one model without the other."""
        if self.detector is None and self.classifier is None:
            return None
        if self.detector is None or self.classifier is None:
            raise SettingsError("GenEval is judged by two models: give both --detector and --classifier")
        return ImageJudge(self.detector, self.classifier, self.device)

    @property
    def images(self) -> dict[str, int]:
        """The argument `images_per_prompt`, where it was given."""
        return {} if self.images_per_prompt is None else {"images_per_prompt": self.images_per_prompt}


BENCHMARKS: dict[str, Callable[[Options], Benchmark]] = {
    "scenes32": lambda o: ScenesBenchmark(o.seed),
    "scenes64": lambda o: Scenes64Benchmark(o.seed),
    "garments32": lambda o: GarmentsBenchmark(o.seed),
    "geneval": lambda o: GenEval(o.seed, image_judge=o.image_judge, **o.images),
    "geneval_rewritten": lambda o: RewrittenGenEval(o.seed, image_judge=o.image_judge, **o.images),
    "geneval++": lambda o: GenEvalPlusPlus(o.seed, o.endpoint),
    "wise": lambda o: Wise(o.folder("wise"), o.seed, o.endpoint),
    "wise_verified": lambda o: WiseVerified(o.folder("wise_verified"), o.seed, o.endpoint),
    "dpg_bench": lambda o: DpgBench(o.folder("dpg_bench"), o.seed, **o.images),
    "geneval2": lambda o: GenEval2(o.folder("geneval2"), o.seed),
    "unibench": lambda o: UniBench(o.folder("unibench"), 1024 + o.seed, **o.images),
    "pope": lambda o: Pope(o.folder("pope"), o.rules_of(Pope)),
    "mme": lambda o: Mme(o.folder("mme"), o.rules_of(Mme)),
    "gqa": lambda o: Gqa(o.folder("gqa"), o.rules_of(Gqa)),
    "seed": lambda o: SeedBench(o.folder("seed"), o.rules_of(SeedBench)),
    "seed_likelihood": lambda o: SeedBenchLikelihood(o.folder("seed")),
    "mmmu": lambda o: Mmmu(o.folder("mmmu"), o.rules_of(Mmmu)),
    "mm_vet": lambda o: MmVet(o.folder("mm_vet"), o.endpoint),
    "mm_vet_v2": lambda o: MmVetV2(o.folder("mm_vet_v2"), o.endpoint),
}
"""Name -> how to make it."""
WITH_RULES: Sequence[type[Benchmark]] = (Pope, Mme, Gqa, SeedBench, Mmmu)
"""Those whose answers can be read by one set of rules or another."""


def make_benchmarks(
    names: Sequence[str], options: Options, limit: int | None = None, with_images: bool = True
) -> list[Benchmark]:
    """The benchmarks of some names, `all` for every one.

    Args:
        limit: at most so many prompts or images of each will be used, evenly spread.
        with_images: see that the images of their questions are there: all files by their headers, and the first image
            of each benchmark by decoding it.

    Raises:
        SettingsError: there is no benchmark of that name, or one that is named (`all` names none) lacks the rules.
        ExplainedError: one message about everything that is missing, if anything is.
    """
    check_names(names)
    for kind in WITH_RULES:
        if kind.name in names:
            rule_named(kind, options.rules)
    names = list(BENCHMARKS) if "all" in names else list(dict.fromkeys(names))
    made, missing = [], []
    for name in names:
        try:
            benchmark = BENCHMARKS[name](options)
            asked = with_images and not benchmark.about_own_images
            questions = spread(benchmark.questions(), limit) if asked else []
            benchmark.check_images(questions)
            for image in questions[0].images if questions else ():
                benchmark.open_image(image, Path())
            made.append(benchmark)
        except MissingFileError as error:
            missing.append(str(error))
    missing = list(dict.fromkeys(missing))
    if missing and options.data is None:
        raise ExplainedError(
            f"{', '.join(missing)}: the files do not ship with this package. Name the folder that has them by --data "
            "(docs/evaluation.md), or see what to fetch with --data NEW_FOLDER"
        )
    if missing:
        raise ExplainedError("\n".join(missing))
    return made


def told_of_rules(benchmarks: Sequence[Benchmark], rules: Rules) -> list[str]:
    """A line that names the benchmarks whose answers are read by other rules than these; none without any."""
    others = [one.name for one in benchmarks if one.rules != rules and one.questions()]
    return [f"{', '.join(others)}: no {rules} rules, so answers are read by the official ones"] if others else []


def told_of_images(benchmarks: Sequence[Benchmark], images_per_prompt: int | None) -> list[str]:
    """A line that names the benchmarks that draw one image per prompt whatever is asked for; none without any."""
    others = [one.name for one in benchmarks if one.images_per_prompt is None and one.drawings()]
    if images_per_prompt in (None, 1) or not others:
        return []
    return [f"{', '.join(others)}: one image per prompt, whatever --images_per_prompt says"]


def check_names(names: Sequence[str]) -> None:
    """SettingsError for the first name that is no benchmark's, nor `all`."""
    for name in names:
        if name not in BENCHMARKS and name != "all":
            hint = did_you_mean(name, BENCHMARKS) or f"; there are {', '.join(BENCHMARKS)}"
            raise SettingsError(f"no benchmark {name!r}{hint}")
