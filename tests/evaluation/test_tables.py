"""A Hugging Face dataset folder, as Parquet and as JSON lines."""

import io

import numpy as np
import pytest
from evaluation.fakes import noise

from infotok_lit.errors import DataError, MissingFileError
from infotok_lit.evaluation.mm_vet import MmVet
from infotok_lit.evaluation.mme import Mme
from infotok_lit.evaluation.tables import Table


def png(seed: int) -> bytes:
    content = io.BytesIO()
    noise(seed).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def parquet():
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, which is for tests alone")
    from pyarrow import Table as Columns
    from pyarrow import parquet

    def write(path, columns, group_size=2):
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(Columns.from_pydict(columns), path, row_group_size=group_size)

    return write


def test_images_of_parquet_are_read_where_they_are(tmp_path, parquet):
    def cell(seed):
        return {"bytes": png(seed), "path": f"{seed}.png"}

    parquet(tmp_path / "data" / "test-00000.parquet", {"id": [0, 1, 2], "image": [cell(0), cell(1), cell(2)]})
    parquet(tmp_path / "data" / "test-00001.parquet", {"id": [3], "image": [cell(3)]})
    parquet(tmp_path / "data" / "dev-00000.parquet", {"id": [9], "image": [cell(9)]})
    table = Table(tmp_path, ("image",), "test")
    assert [row["id"] for row in table.rows] == [0, 1, 2, 3] and table.rows[0]["image"] is None
    for number in (3, 0, 2, 1):
        assert np.array_equal(np.asarray(table.image(number, "image")), np.asarray(noise(number)))


def test_arrow_is_read_as_it_is_saved(tmp_path):
    """A dataset of two splits as `save_to_disk` leaves it; beside the data of a split lies a cache of another."""
    pyarrow = pytest.importorskip("pyarrow", reason="Arrow needs pyarrow, which is for tests alone")

    def write(path, numbers):
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = [{"bytes": png(number), "path": None} for number in numbers]
        columns = pyarrow.table({"id": numbers, "image": cells})
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, columns.schema) as stream:
            stream.write_table(columns)

    write(tmp_path / "test" / "data-00000-of-00002.arrow", [0, 1])
    write(tmp_path / "test" / "data-00001-of-00002.arrow", [2])
    write(tmp_path / "test" / "cache-4f.arrow", [8])
    write(tmp_path / "train" / "data-00000-of-00001.arrow", [9])
    table = Table(tmp_path, ("image",), "test")
    assert table.rows == [{"id": number, "image": None} for number in range(3)]
    for number in (2, 0, 1):
        assert np.array_equal(np.asarray(table.image(number, "image")), np.asarray(noise(number)))
    assert table.has_image(1, "image") and not table.has_image(1, "other")


def test_a_file_or_a_row_that_cannot_be_read_is_named(tmp_path, parquet):
    parquet(tmp_path / "good" / "test-0.parquet", {"id": ["a", "b"], "image": [{"bytes": b"no", "path": None}] * 2})
    with pytest.raises(DataError, match=r"row 2 of .*test-0.parquet, image: not an image .*: get that file anew. Ask"):
        Table(tmp_path / "good", ("image",), fetch="Ask.").image(1, "image")
    with pytest.raises(DataError, match=r"row 1 of .*test-0.parquet has no answer"):
        len(Table(tmp_path / "good", ("image",), fields={"answer": str}).rows)
    (tmp_path / "bad").mkdir()
    for name in ("test-0.parquet", "data-0.arrow"):
        (tmp_path / "bad" / name).write_bytes(b"no such format")
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            Table(tmp_path / "bad", ())
        (tmp_path / "bad" / name).unlink()


def test_mme_and_mm_vet_from_their_copies(tmp_path, parquet):
    image = {"bytes": png(0), "path": None}
    parquet(
        tmp_path / "mme" / "test-0.parquet",
        {
            "question_id": ["OCR/1.png"] * 2,
            "image": [image] * 2,
            "question": ["A?", "B?"],
            "answer": ["Yes", "No"],
            "category": ["OCR"] * 2,
        },
    )
    benchmark = Mme(tmp_path / "mme")
    first, second = benchmark.questions()
    assert first.group == second.group and benchmark.open_image(first.images[0], tmp_path).size == (24, 24)
    rows = benchmark.grade(
        [{"id": question.id, "group": question.group, "answer": "Yes"} for question in (first, second)]
    )
    assert benchmark.scores(rows)["overall"].value == 50
    parquet(
        tmp_path / "mm_vet" / "test-0.parquet",
        {"question_id": ["v1_0"], "image": [image], "question": ["Q"], "answer": ["A"], "capability": ["ocr,math"]},
    )
    benchmark = MmVet(tmp_path / "mm_vet")
    (question,) = benchmark.questions()
    assert benchmark.open_image(question.images[0], tmp_path).size == (24, 24)
    assert benchmark.records["v1_0"]["capability"] == ["ocr", "math"]


def test_json_lines_name_their_image_files(tmp_path):
    noise(4).save(tmp_path / "a.png")
    (tmp_path / "test.jsonl").write_text('{"image": "a.png"}\n{"image": "gone.png"}\n')
    table = Table(tmp_path, ("image",))
    assert np.array_equal(np.asarray(table.image(0, "image")), np.asarray(noise(4)))
    with pytest.raises(MissingFileError, match="gone.png"):
        table.image(1, "image")
    with pytest.raises(MissingFileError, match="no .parquet, .arrow or .jsonl"):
        Table(tmp_path / "nothing", ())
