"""Tiny invented data in the formats of the public benchmarks: what users put below `--data`."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from evaluation.fakes import noise

MME_SUBTASKS = ("existence", "OCR", "code_reasoning")


def write_all(data: Path) -> Path:
    """Every benchmark that needs files."""
    for write in (pope, mme, gqa, seed, mmmu, mm_vet, mm_vet_v2, unibench, wise, wise_verified, dpg_bench, geneval2):
        write(data / write.__name__)
    return data


def pope(folder: Path) -> None:
    pictures(folder / "val2014", ("COCO_a.jpg", "COCO_b.jpg"))
    lines = [
        {"question_id": 1, "image": "COCO_a.jpg", "text": "Is there a cat in the image?", "label": "yes"},
        {"question_id": 2, "image": "COCO_a.jpg", "text": "Is there a dog in the image?", "label": "no"},
        {"question_id": 3, "image": "COCO_b.jpg", "text": "Is there a car in the image?", "label": "yes"},
        {"question_id": 4, "image": "COCO_b.jpg", "text": "Is there a {} in the image?", "label": "no"},
    ]
    for split, other in (("random", "kite"), ("popular", "person"), ("adversarial", "truck")):
        own = [line | {"text": line["text"].format(other)} for line in lines]
        json_lines(folder / f"coco_pope_{split}.json", own)


def mme(folder: Path) -> None:
    for subtask in MME_SUBTASKS:
        pictures(folder / subtask, ("1.jpg", "2.jpg"))
        lines = [
            f"{image}\tIs this {what} {subtask}? Please answer yes or no.\t{answer}\n"
            for image in ("1.jpg", "2.jpg")
            for what, answer in (("really", "Yes"), ("not", "No"))
        ]
        (folder / f"{subtask}.txt").write_text("".join(lines))


def gqa(folder: Path) -> None:
    pictures(folder / "images", ("n1.jpg", "n2.jpg"))
    questions = {
        "100": {"imageId": "n1", "question": "What colour is the sky?", "answer": "blue", "isBalanced": True},
        "101": {"imageId": "n1", "question": "Is it night?", "answer": "no", "isBalanced": True},
        "102": {"imageId": "n2", "question": "Who is it?", "answer": "woman", "isBalanced": True},
    }
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(questions))


def seed(folder: Path) -> None:
    pictures(folder / "SEED-Bench-image", ("1_2.jpg", "3_4.jpg"))
    for file in (folder / "SEED-Bench-image").iterdir():
        file.rename(file.with_suffix(""))
    shared = {"choice_a": "One", "choice_b": "Twenty", "choice_c": "Three", "choice_d": "Four", "data_type": "image"}
    questions = [
        shared | {"answer": "B", "data_id": "1_2", "question": "How many?", "question_id": "7", "question_type_id": 5},
        shared | {"answer": "A", "data_id": "3_4", "question": "And now?", "question_id": "8", "question_type_id": 1},
        shared | {"answer": "A", "data_id": "v", "question": "A film", "question_id": "9", "question_type_id": 10}
        | {"data_type": "video"},
    ]  # fmt: skip
    (folder / "SEED-Bench.json").write_text(json.dumps({"questions": questions, "question_type": {"Counting": 5}}))


def mmmu(folder: Path) -> None:
    pictures(folder / "images", ("1.png", "2.png"))
    rows = [
        {"id": "validation_Art_1", "question": "<image 1> Who?", "options": "['Ann', 'Bob']", "answer": "B",
         "question_type": "multiple-choice", "image_1": "images/1.png"},
        {"id": "validation_Art_2", "question": "<image 1> and <image 2>: how many?", "options": "[]",
         "answer": "['3.5', 'three and a half']", "question_type": "open", "image_1": "images/1.png",
         "image_2": "images/2.png"},
        {"id": "validation_Basic_Medical_Science_1", "question": "<image 1> Where?", "options": "['here', 'there']",
         "answer": "A", "question_type": "multiple-choice", "image_1": "images/2.png"},
    ]  # fmt: skip
    json_lines(folder / "validation.jsonl", rows)


def mm_vet(folder: Path) -> None:
    pictures(folder / "images", ("v1_0.png", "v1_1.png"))
    content = {
        "v1_0": {
            "imagename": "v1_0.png",
            "question": "What is x?",
            "answer": "-1<AND>-5",
            "capability": ["ocr", "math"],
        },
        "v1_1": {"imagename": "v1_1.png", "question": "Why?", "answer": "fun<OR>joy", "capability": ["rec"]},
    }
    (folder / "mm-vet.json").write_text(json.dumps(content))


def mm_vet_v2(folder: Path) -> None:
    pictures(folder / "images", ("v2_0.png", "v2_1.png"))
    question = "What is in<IMG>v2_0.png<IMG>and in<IMG>v2_1.png<IMG>together?"
    content = {"v2_0": {"question": question, "answer": "five", "capability": ["seq"]}}
    (folder / "mm-vet-v2.json").write_text(json.dumps(content))


def unibench(folder: Path) -> None:
    folder.mkdir(parents=True)
    text = (
        "Question: {}\nOptions: (A) red, (B) blue, light, (C) green, (D) 4, (E) N/A or Unknown\n"
        "Based on the image, answer with the option letter directly in the format (A), (B), (C), (D), or (E)."
    )
    cases = [
        {"prompt_id": 0, "prompt": "a red ball", "QAs": [
            {"question": text.format("Which colour?"), "answer": "A", "tag": "Visual, Colour, Plain", "QA_id": 0},
            {"question": text.format("How many?"), "answer": "D", "tag": "Visual, Number, Count", "QA_id": 1}]},
        {"prompt_id": 1, "prompt": "a blue sign", "QAs": [
            {"question": text.format("Which colour?"), "answer": "B", "tag": "Visual, Colour, Odd", "QA_id": 2}]},
    ]  # fmt: skip
    (folder / "uni_bench.json").write_text(json.dumps(cases))


def wise(
    folder: Path, suffix: str = "", ids: Sequence[Sequence[int]] = ((1, 400), (401, 567, 700), (701, 900, 1000))
) -> None:
    folder.mkdir(parents=True)
    for name, numbers in zip(
        ("cultural_common_sense", "spatio-temporal_reasoning", "natural_science"), ids, strict=True
    ):
        prompts = [
            {"Prompt": f"riddle {number}", "Explanation": f"thing {number}", "Category": "c",
             "Subcategory": f"s{number}", "prompt_id": number}
            for number in numbers
        ]  # fmt: skip
        (folder / f"{name}{suffix}.json").write_text(json.dumps(prompts))


def wise_verified(folder: Path) -> None:
    wise(folder, "_verified", ((1, 400), (401, 520, 640), (641, 900, 1000)))


def dpg_bench(folder: Path) -> None:
    folder.mkdir(parents=True)
    with (folder / "dpg_bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["item_id", "text", "proposition_id"])
        writer.writeheader()
        for item, text in (
            ("COCOval2014000000000123", "A long, dense text."),
            ("midjourney1", "Another,\nlonger text."),
        ):
            writer.writerows({"item_id": item, "text": text, "proposition_id": number} for number in (1, 2))


def geneval2(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"prompt": "two white cats", "atom_count": 3, "skills": ["count", "attribute"],
         "vqa_list": [["How many cats?", "two"], ["Are they white?", "Yes"]]},
        {"prompt": "a dog", "atom_count": 1, "vqa_list": [["Is there a dog?", "Yes"]], "skills": ["object"]},
    ]  # fmt: skip
    json_lines(folder / "geneval2_data.jsonl", rows)


def pictures(folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        noise(number).save(folder / name)


def json_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
