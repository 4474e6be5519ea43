"""The report of a plan: what it shows and counts, and what it says where something is missing."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import adq_wds as adq
from adq_wds.cli.main import main
from adq_wds.jobs.write_report import write_report
from adq_wds.report.render import environment
from tests.conftest import Capsys, MakeFeatures, MakeShard, MonkeyPatch, picture, write_tar


@pytest.fixture
def run(make_shard: MakeShard, tmp_path: Path) -> Path:
    """A run over 60 images of two classes, with its shards in `shards/`."""
    for i in range(2):
        make_shard(f"shards/{'ab'[i]}.tar", 30, first=30 * i)
    flags = ["--keep", "0.2", "--encoder", "thumbnail", "--bins", "3", "-q"]
    assert main(["run", str(tmp_path / "shards"), *flags, "-o", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_a_run_alone_gives_the_report_with_its_pictures(run: Path, capsys: Capsys) -> None:
    out = run / "report.html"
    assert main(["report", str(run), "-o", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    plan = adq.load_plan(run / "plan.parquet")
    reasons = Counter(reason for shard in plan for reason in shard.table()["reason"].to_pylist())
    assert {name: n for name, n in said["reasons"].items() if n} == reasons
    assert (said["samples"], said["kept"], said["notes"]) == (60, 12, [])
    assert said["bytes"] == out.stat().st_size
    page = text_of(out)
    in_sections = {part.split('"')[0] for part in page.split('src="data:image/webp')[1:]}
    assert 20 < len(in_sections) <= said["pictures"] <= 60
    assert "https://" not in page
    rows = pq.read_table(said["table"])
    assert (len(rows), said["table"]) == (60, str(run / "report.parquet"))
    assert rows["kept"].to_pylist() == plan.table()["kept"].to_pylist()


def test_equal_inputs_give_equal_bytes(run: Path, tmp_path: Path) -> None:
    pages = []
    for name in ("a.html", "b.html"):
        write_report(run, None, tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_pictures_are_at_most_as_many_as_asked(run: Path, tmp_path: Path) -> None:
    assert write_report(run, None, tmp_path / "r.html", thumbnails=5).pictures == 5
    none = write_report(run, None, tmp_path / "r.html", thumbnails=0)
    assert none.pictures == 0
    assert "data:image/webp" not in text_of(tmp_path / "r.html")
    with pytest.raises(ValueError, match="thumbnails must be an integer >= 0, got -1"):
        write_report(run, None, tmp_path / "r.html", thumbnails=-1)


def test_shards_that_moved_are_read_where_they_are_now(run: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    assert main(["report", str(run), str(tmp_path / "elsewhere"), "-o", str(tmp_path / "r.html"), "-q"]) == 0
    assert "data:image/webp" in text_of(tmp_path / "r.html")


def test_shards_that_are_gone_leave_a_report_that_says_so(run: Path, tmp_path: Path) -> None:
    (tmp_path / "shards" / "b.tar").unlink()
    some = write_report(run, None, tmp_path / "r.html")
    assert some.pictures > 0
    assert "1 of 2 shards were not given, such as 'b.tar'" in some.notes[0]
    (tmp_path / "shards" / "a.tar").unlink()
    none = write_report(run, None, tmp_path / "r.html")
    assert none.pictures == 0
    assert "No shards of the plan were given" in none.notes[0]
    assert "no picture" in text_of(tmp_path / "r.html")


def test_samples_that_changed_have_no_picture_and_are_counted(run: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "shards" / "b.tar", [(f"s{i:05d}.jpg", b"no image") for i in range(30, 60)])
    report = write_report(run, None, tmp_path / "r.html")
    assert report.pictures > 0
    assert report.notes[-1].startswith("30 pictures could not be read: shard b.tar, key 's000")


def test_pictures_of_a_shard_that_cannot_be_opened_are_counted_once(run: Path, tmp_path: Path) -> None:
    (tmp_path / "shards" / "b.tar").unlink()
    shards = [str(tmp_path / "shards" / name) for name in ("a.tar", "b.tar")]
    report = write_report(run, shards, tmp_path / "r.html")
    assert report.pictures == 30
    assert report.notes[-1].startswith("30 pictures could not be read")
    assert "b.tar: cannot be opened" in report.notes[-1]


def test_a_run_from_a_stranger_opens_no_url_and_no_command(run: Path, tmp_path: Path) -> None:
    said = json.loads((run / "run.json").read_text())
    for shard, path in zip(said["shards"], ["pipe:touch harm", "http://127.0.0.1:9/b.tar"], strict=True):
        shard["path"] = path
    (run / "run.json").write_text(json.dumps(said))
    report = write_report(run, None, tmp_path / "r.html")
    assert report.pictures == 0
    assert "No shards of the plan were given" in report.notes[0]


def test_a_plan_of_keys_has_neither_bins_nor_features(make_shard: MakeShard, tmp_path: Path) -> None:
    shard = make_shard("a.tar", 9)
    adq.Plan.from_keys(str(shard), ["s00001", "s00004"]).save(tmp_path / "p.parquet")
    report = write_report(tmp_path / "p.parquet", shard, tmp_path / "r.html")
    assert (report.kept, report.samples) == (2, 9)
    assert "Without features" in report.notes[0]
    page = text_of(tmp_path / "r.html")
    assert "This plan has no bins: the samples were named one by one" in page
    assert "all samples" in page
    assert "<b>excluded</b> not among the samples that were chosen" in page


def test_an_unlabelled_set_of_one_bin(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [-1] * 20)
    plan = adq.build_plan(tmp_path / "features", keep=0.5, bins=1)
    write_report(plan, None, tmp_path / "r.html", features=tmp_path / "features")
    page = text_of(tmp_path / "r.html")
    assert "all samples" in page
    assert "Bin 0" in page
    assert "The labels were not checked" in page


def test_ten_thousand_classes_stay_readable(make_features: MakeFeatures, tmp_path: Path) -> None:
    n = 1 + 12_000 // np.arange(1, 10_001)
    make_features("a.tar", np.repeat(np.arange(10_000), np.minimum(n, 40)).tolist(), width=2)
    plan = adq.build_plan(tmp_path / "features", keep=0.1, bins=1)
    write_report(plan, None, tmp_path / "r.html", features=tmp_path / "features")
    page = text_of(tmp_path / "r.html")
    assert len(page) < 1_000_000
    assert page.count('<tr class="rest">') == 2
    assert "10,000 classes, of 2 to 40 samples" in page
    assert "class 9999" in page


def test_a_class_of_one_sample_and_margins_that_are_not_there(
    make_features: MakeFeatures, tmp_path: Path
) -> None:
    """Copies have no margin: NaN in the plan."""
    label = [0] * 12 + [1] * 12 + [2]
    make_features("a.tar", label, contents=[i // 2 for i in range(24)] + [99])
    plan = adq.build_plan(tmp_path / "features", keep=0.5, bins=2, dedup="exact", clean=0.1)
    assert np.isnan(plan.table()["margin"].to_numpy()).any()
    write_report(plan, None, tmp_path / "r.html", features=tmp_path / "features")
    page = text_of(tmp_path / "r.html")
    assert ">nan" not in page.lower()
    assert "class 2" in page
    assert "labelled <b>" in page


def test_strata_begin_with_the_easiest(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0, 1] * 12)
    plan = adq.build_plan(tmp_path / "features", keep=0.5, bins=2, bins_by="difficulty")
    table = plan.table()
    margin, bin = table["margin"].to_numpy(), table["bin"].to_numpy()
    assert margin[bin == 0].mean() > margin[bin == 1].mean()
    write_report(plan, None, tmp_path / "r.html")
    assert "by the margin of the labels, the easiest first" in text_of(tmp_path / "r.html")


def test_copies_with_another_label_come_first(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0, 0, 0, 0, 1, 0, 1], contents=[1, 1, 1, 2, 2, 3, 4])
    plan = adq.build_plan(tmp_path / "features", keep=1.0, bins=1, dedup="exact")
    write_report(plan, None, tmp_path / "r.html", features=tmp_path / "features")
    page = text_of(tmp_path / "r.html")
    assert page.index("1 with another label") < page.index("2 copies")


def test_a_missing_package_is_one_line_that_names_the_extra(
    run: Path, tmp_path: Path, monkeypatch: MonkeyPatch, capsys: Capsys
) -> None:
    environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(run), "-o", str(tmp_path / "r.html")]) == 1
    assert 'pip install "adq-wds[report]"' in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_no_other_table_is_replaced(run: Path, tmp_path: Path) -> None:
    before = (run / "plan.parquet").read_bytes()
    with pytest.raises(adq.AdqError, match=r"plan\.parquet is no report's table"):
        write_report(run, None, run / "plan.html")
    assert (run / "plan.parquet").read_bytes() == before
    with pytest.raises(ValueError, match=r"ends in \.html"):
        write_report(run, None, run / "plan.parquet")


def test_a_sheet_of_patches_is_shown_and_must_be_a_picture(run: Path, tmp_path: Path) -> None:
    picture(3).save(run / "patches.png")
    write_report(run, None, tmp_path / "r.html")
    assert "Sheet of patches" in text_of(tmp_path / "r.html")
    with pytest.raises(adq.SampleError, match=r"patches: '.*run\.json': not an image"):
        write_report(run, None, tmp_path / "r.html", patches=run / "run.json")


def test_a_plan_of_version_1_is_shown(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "v1" / "plan.parquet"
    report = write_report(golden, None, tmp_path / "r.html")
    page = text_of(tmp_path / "r.html")
    assert f"of {report.samples:,}" in page
    assert {word: n for word, n in report.reasons.items() if n} == {"kept": 6, "quota": 7, "excluded": 2}
    assert "A plan of version 1 does not say why" in page


def test_unreadable_samples_are_no_class(make_features: MakeFeatures, tmp_path: Path) -> None:
    make_features("a.tar", [0, 1] * 7, bad=[2])
    plan = adq.build_plan(tmp_path / "features", keep=0.5, bins=1)
    write_report(plan, None, tmp_path / "new" / "r.html", features=tmp_path / "features")
    page = text_of(tmp_path / "new" / "r.html")
    assert "2 classes, of 7 to 7 samples" in page
    assert "classes, from the largest to the smallest" not in page  # all are shown


@pytest.mark.parametrize(
    "bin", [{}, {"rate": None}, {"size": -1}, {"texture": "<b>"}, {"texture": None, "a <b> score": 1.5}]
)
def test_a_damaged_header_is_one_line(run: Path, tmp_path: Path, bin: dict[str, object]) -> None:
    plan = adq.load_plan(run / "plan.parquet")
    plan.header["bins"][1] = plan.header["bins"][1] | bin if bin else {}
    if "a <b> score" in bin:
        write_report(plan, None, tmp_path / "r.html")
        assert "<b> score" not in text_of(tmp_path / "r.html")
    else:
        with pytest.raises(adq.PlanError, match=r"plan\.parquet: damaged header: .*bins\[1\]"):
            write_report(plan, None, tmp_path / "r.html")


def test_the_commands_take_a_runs_folder(run: Path, tmp_path: Path, capsys: Capsys) -> None:
    out = ["-o", str(tmp_path / "r.html")]
    assert main(["report", str(run / "plan.parquet"), *out, "--features", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 12
    assert "adq-map" in text_of(tmp_path / "r.html")
    assert main(["report", str(tmp_path / "shards"), *out]) == 2
    assert "a folder without plan.parquet" in capsys.readouterr().err
    flags = ["--keep", "0.2", "--encoder", "thumbnail", "--bins", "3", "--report", "--json"]
    assert main(["run", str(tmp_path / "shards"), *flags, "-o", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)["report"]["path"] == str(run / "report.html")
