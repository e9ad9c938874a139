"""Running the paper's experiments: what is left behind, what is not done twice, and how it is compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_experiments import tiny

from mrcnn_edu import cli, recipes, reproduce
from mrcnn_edu.augmentation import Augmentation
from mrcnn_edu.comparison import Spread, as_text, draw, number, orders
from mrcnn_edu.data import flat, shapes
from mrcnn_edu.data.coco import CocoDataset
from mrcnn_edu.data.parts import Subset
from mrcnn_edu.experiments import EXPERIMENTS, find
from mrcnn_edu.models.mask_rcnn import MaskRCNN
from mrcnn_edu.models.unshared import Unshared
from mrcnn_edu.reproduce import Datasets, Setting, augmentation, result_file, run, trained
from mrcnn_edu.reproducing import draw_toys


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    """Every toy tiny, on one thread."""
    toy = recipes.toy_config
    monkeypatch.setattr(recipes, "toy_config", lambda config, data: tiny(toy(config, data)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write(tmp_path_factory.mktemp("shapes") / "data", train=8, val=3, size=64, seed=1)


@pytest.fixture
def setting(folder: Path, tmp_path: Path) -> Setting:
    train = CocoDataset(folder / "train", folder / "train.json")
    val = CocoDataset(folder / "val", folder / "val.json")

    def data(row):
        if row.few is None:
            return Datasets(train, val)
        return Datasets(Subset(train, range(4)), val, Subset(train, range(4, 8)))

    return Setting("toy", tmp_path / "runs", data, iterations=2, device="cpu", command="as typed", progress=False)


# One run -------------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(setting: Setting) -> None:
    row = EXPERIMENTS["table2c/roialign-mean"]
    result = run(row, setting, seed=3)
    path = result_file(row, setting, 3)
    assert path == setting.out / "toy" / "table2c" / "roialign-mean" / "seed-3-of-2.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    assert {"experiment", "scale", "seed", "command", "version", "machine", "seconds", "evaluation"} <= set(result)
    assert (result["seed"], result["command"], result["iterations"]) == (3, "as typed", 2)
    assert result["images"] == {"train": 8, "val": 3} and result["paper"]["mask AP"] == 30.3
    assert result["seconds"]["training"] > 0 and "CPU" in result["machine"]["kind"]
    assert set(result["inside"]) == {"mask_iou"} and 0 <= result["evaluation"]["mask"]["AP"] <= 1
    config = json.loads((setting.out / "toy/table2a/resnet-50-c4/seed-3-of-2/joint/config.json").read_text())
    assert config["train"]["seed"] == 3 and config["train"]["iterations"] == 2


def test_nothing_is_done_twice(setting: Setting) -> None:
    """A result is read, and a row that is trained alike takes the weights that are there."""
    first = run(EXPERIMENTS["table2b/sigmoid"], setting, 0)
    weights = next(setting.out.rglob("weights.safetensors"))
    written = weights.stat().st_mtime_ns
    assert run(EXPERIMENTS["table2b/sigmoid"], setting, 0) == json.loads(json.dumps(first))
    second = run(EXPERIMENTS["table2c/roialign-mean"], setting, 0)
    assert second["evaluation"] == first["evaluation"]
    assert list(setting.out.rglob("weights.safetensors")) == [weights] and weights.stat().st_mtime_ns == written


def test_rows_that_differ_at_test_time_only(setting: Setting) -> None:
    row = EXPERIMENTS["text/nms-0.5"]
    loose, _ = trained(row, setting, 0)
    strict, _ = trained(EXPERIMENTS["text/nms-0.3"], setting, 0)
    assert (loose.config.box.nms_threshold, strict.config.box.nms_threshold) == (0.5, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(loose.state_dict().values(), strict.state_dict().values()))
    assert "paper" in run(row, setting, 0)


def test_the_procedure_where_the_row_is_about_it(setting: Setting) -> None:
    apart, _ = trained(EXPERIMENTS["text/unshared"], setting, 0)
    together, numbers = trained(EXPERIMENTS["text/four-step"], setting, 0)
    assert isinstance(apart, Unshared) and isinstance(together, MaskRCNN)
    assert numbers["iterations"] == 4 * 2
    assert "mask" in run(EXPERIMENTS["text/unshared"], setting, 0)["evaluation"]


def test_class_by_class_from_another_row(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 7: from the model of table2a, all classes but one, which at toy scale is the star."""
    matches, transfer = {}, reproduce.transfer
    monkeypatch.setattr(reproduce, "transfer", lambda *arguments: matches.update(transfer(*arguments)))
    result = run(EXPERIMENTS["table7/fine-coco"], replace(setting, iterations=1), 0)
    assert matches == {name: None if name == "star" else name for name in shapes.CLASSES}
    assert result["images"]["train"] == 4
    assert (setting.out / "toy/table2a/resnet-50-fpn/seed-0-of-1/trained.json").exists()


def test_distillation_and_test_time_augmentation(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    fewer = lambda scale, data: Augmentation((64, 80), 128, flip_pairs=data.flip_pairs)  # noqa: E731, in place of nine
    monkeypatch.setattr(reproduce, "augmentation", fewer)
    result = run(EXPERIMENTS["table9/test-augm"], replace(setting, iterations=1), 0)
    assert result["evaluation"]["keypoint"]["AP"] is not None
    folder = setting.out / "toy/table9/distillation/seed-0-of-1"
    assert len(json.loads((folder / "distilled.json").read_text())["images"]) == 4
    with pytest.raises(ValueError, match="needs unlabelled images"):
        labelled = lambda row: setting.data(row)._replace(unlabelled=None)  # noqa: E731
        run(EXPERIMENTS["table9/distillation"], replace(setting, data=labelled, out=setting.out / "other"), 0)


def test_views_in_relation_to_the_images(setting: Setting) -> None:
    data = setting.data(EXPERIMENTS["table9/original"]).val
    assert augmentation("coco", data).sizes == tuple(range(400, 1201, 100))
    assert augmentation("toy", data).sizes == (48, 60, 72, 84, 96, 108, 120, 132, 144)
    assert augmentation("toy", data).flip_pairs == data.flip_pairs


# Comparing -----------------------------------------------------------------------------------------------------------


def result(mask: float, figure: float = 0.5, scale: str = "toy") -> dict:
    mask_numbers = {"AP": mask, "AP75": mask / 2, "per_class": {"figure": {"AP": figure}}}
    return {
        "scale": scale,
        "seconds": {"prediction": 3.0, "training": 7200.0},
        "images": {"val": 200},
        "evaluation": {"mask": mask_numbers, "box": mask_numbers},
        "inside": {"mask_iou": 0.7},
    }


def test_numbers_by_the_paper_s_names() -> None:
    row, people, city = (EXPERIMENTS[n] for n in ("table2c/roialign-mean", "table5/mask", "table7/fine"))
    assert number(result(0.2), row, "mask AP") == pytest.approx(20)
    assert number(result(0.2), row, "mask AP75") == pytest.approx(10)
    assert number(result(0.2), row, "keypoint AP") is None
    assert number(result(0.2), people, "mask AP") == 50  # of people, for whom the drawn figures stand
    assert number(result(0.2, scale="coco"), people, "mask AP") == pytest.approx(20)
    assert number(result(0.2), city, "mask test AP") is None
    assert number(result(0.2), city, "mask AP truck") is None
    assert number(result(0.2), row, "ms per image") == pytest.approx(15)
    assert number(result(0.2), row, "training hours") == 2


def test_the_order_by_hand() -> None:
    """Paper: pool 26.9 < warp 27.1 < align 30.3. Ours: pool 10 and 12, warp 9 and 9, align 20 and 21."""
    rows = [EXPERIMENTS[f"table2c/{name}"] for name in ("roipool-max", "roiwarp-mean", "roialign-mean")]
    results = {
        rows[0].name: [result(0.10), result(0.12)],
        rows[1].name: [result(0.09), result(0.09)],
        rows[2].name: [result(0.20), result(0.21)],
    }
    found = {(pair.lower.split("/")[1], pair.higher.split("/")[1]): pair for pair in orders(rows, results)}
    assert set(found) == {
        ("roipool-max", "roiwarp-mean"),
        ("roipool-max", "roialign-mean"),
        ("roiwarp-mean", "roialign-mean"),
    }
    wrong = found["roipool-max", "roiwarp-mean"]
    assert wrong.paper == pytest.approx(0.2) and wrong.ours == pytest.approx(-2.0)
    assert not wrong.agrees and not wrong.clear  # 2 is twice the standard error, sqrt(2) / sqrt(2) = 1, and not more
    right = found["roipool-max", "roialign-mean"]
    assert right.agrees and right.clear and right.ours == pytest.approx(9.5)
    text = as_text(rows, results)
    assert "agrees with the paper's in 2 of 3 pairs" in text
    assert "11.0 ± 1.4" in text and "26.9" in text and "70.0" in text
    assert "table2c/roipool-max < table2c/roiwarp-mean: +0.2 in the paper, -2.0 here (does not agree, within" in text


def test_a_single_seed_is_never_clear() -> None:
    rows = find("table2d")
    pairs = orders(rows, {rows[0].name: [result(0.1)], rows[1].name: [result(0.3)]})
    assert len(pairs) == 1 and pairs[0].agrees and not pairs[0].clear
    assert "Too little" in as_text(rows, {})
    assert Spread.of([None, None]) is None and str(Spread.of([12.34])) == "12.3"


def test_quoted_and_unrun_rows_are_shown_as_such(tmp_path: Path) -> None:
    rows = find("table1")
    text = as_text(rows, {"table1/resnet-101-c4": [result(0.3)]})
    assert "quoted" in text and "not run" in text
    draw(rows, {"table1/resnet-101-c4": [result(0.3)]}, "table1").savefig(tmp_path / "table1.png")
    assert (tmp_path / "table1.png").stat().st_size > 5000


# The command ---------------------------------------------------------------------------------------------------------


def command(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    status = cli.main(["reproduce", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_list(capsys) -> None:
    status, out, _ = command(capsys)
    assert status == 0
    assert all(f"  {name} " in out for name in EXPERIMENTS)
    assert "table2c/roialign-mean" in out and "mask AP 30.3" in out and out.count("(quoted)") == 14


def test_a_plan(capsys) -> None:
    status, out, _ = command(capsys, "table2c/roialign-mean", "table1/mnc", "--plan", "--gpus", "4", "--gpu", "a100")
    assert status == 0
    assert "torchrun --standalone --nproc_per_node=4 -m mrcnn_edu reproduce table2c/roialign-mean --scale coco" in out
    assert "160000 iterations in each of 2 stages, 4 images per GPU" in out and "quoted" in out


def test_a_table_from_the_command_line(capsys, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    small = ["--images", 4, "--iterations", 1, "--data", tmp_path / "data", "--out", out, "--device", "cpu"]
    status, printed, errors = command(capsys, "table2d", "--seeds", 2, *small)
    assert status == 0, errors
    names = {path.relative_to(out / "toy").as_posix() for path in out.rglob("seed-*-of-1.json")}
    assert names == {f"table2d/{row}/seed-{seed}-of-1.json" for row in ("roipool", "roialign") for seed in (0, 1)}
    assert (out / "toy" / "table2d.png").exists() and "RoIAlign, stride 32" in printed
    status, again, _ = command(capsys, "table2d", "--table", *small)
    assert status == 0 and again == printed[printed.index("\ntable2d, toy scale") :]


def test_drawn_images_are_drawn_once_and_replace_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    splits = draw_toys(folder, 2, 1)
    image = next((folder / "train").rglob("*.png"))
    written = image.stat().st_mtime_ns
    assert draw_toys(folder, 2, 1) == splits and image.stat().st_mtime_ns == written
    train, val = (CocoDataset(*split) for split in splits)
    assert (len(train), len(val), train.categories.names) == (2, 1, list(shapes.CLASSES))
    assert len(CocoDataset(*draw_toys(folder, 3, 1)[0])) == 3
    (folder / "stamp.json").unlink()
    with pytest.raises(ValueError, match="holds other files"):
        draw_toys(folder, 2, 1)


def test_drawing_that_was_stopped_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(flat, "write", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw_toys(tmp_path / "data", 1, 1)
    assert len(CocoDataset(*draw_toys(tmp_path / "data", 1, 1)[0])) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table2x"], "unknown experiment or table 'table2x', did you mean"),
        (["table2c", "--seeds", "0"], "--seeds must be at least 1"),
        (["table2d", "--scale", "coco"], "--data"),
        (["table2d", "--plan", "--gpus", "5"], "5 GPUs cannot share the 16 images"),
    ],
)
def test_what_is_refused(capsys, arguments: list[str], message: str) -> None:
    status, _, errors = command(capsys, *arguments)
    assert status == 2 and message in errors
