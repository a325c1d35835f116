"""`bench evaluate`: it times the same answers both ways."""

import json

from infotok_lit.cli import main


def test_it_times_images_and_answers(folders, tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    options = ["--images", "2", "--questions", "3", "--drawn", "2", "--batch_size", "4", "--out", str(out)]
    assert main(["bench", "evaluate", "--model", str(folders["harmon"]), *options]) == 0
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert result["answers_that_agree"] == 1 and result["images_per_second"] > 0
    ratio = result["answers_per_second"] / result["answers_per_second_encoding_anew"]
    assert abs(result["gain"] / ratio - 1) < 1e-9
