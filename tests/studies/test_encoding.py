"""The benchmark of `encode`: runs end to end, and times nothing where the codes on disk are not the model's."""

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads")]


@pytest.fixture
def encoding():
    pytest.importorskip("tyro")
    from studies import encoding

    return encoding


def test_a_quick_run_writes_figures_and_table(encoding, tmp_path):
    encoding.main(["--quick", "--threads", "1", "--out", str(tmp_path / "encoding.json")])
    told = json.loads((tmp_path / "encoding.json").read_text())["encoding"]
    for kind in ("npy", "jpeg"):
        assert told["share"][kind] == pytest.approx(told["seconds"]["network"] / told["seconds"][kind])
    text = (tmp_path / "encoding.md").read_text()
    assert "| `encode`, JPEGs |" in text and "reading jpeg alone" in text and "(goal 90%)" in text


def test_nothing_is_timed_where_images_are_out_of_order(encoding, monkeypatch):
    from vqkernels.training import shard_encoding

    ahead = shard_encoding._ahead

    def swapped(*arguments):
        first, second, *rest = ahead(*arguments)
        yield from (second, first, *rest)

    monkeypatch.setattr(shard_encoding, "_ahead", swapped)
    with pytest.raises(SystemExit, match="are not those of the model: nothing is timed"):
        encoding.measure(512, 8, 1, None)
