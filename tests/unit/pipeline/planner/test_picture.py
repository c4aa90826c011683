"""The picture shows every action and exit of the timeline at its place."""

import math
from collections import Counter, defaultdict
from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from ee_llm.config import load_config
from ee_llm.pipeline.planner.costs import NOMINAL
from ee_llm.pipeline.planner.picture import IDLE, KINDS, draw, save_picture
from ee_llm.pipeline.planner.predict import predict


def prediction(num_microbatches=8, num_layers=24, **options):
    values = {"model.num_layers": num_layers, "model.hidden_size": 8, "model.num_heads": 1}
    values |= {"model.vocab_size": 8, "parallel.pipeline": 4, "exits.boundaries": (6, 12)}
    given = {k.replace("__", "."): v for k, v in options.items()}
    return predict(load_config(None, values | given), num_microbatches, NOMINAL)


def boxes(figure):
    """Return (row, kind, start, end) of every box in the figure."""
    found = []
    for bars in figure.axes[0].collections:
        for path in bars.get_paths():
            (left, low), (right, high) = path.get_extents().get_points()
            if bars.get_gid() is not None:
                found.append((round((low + high) / 2), bars.get_gid(), left, right))
    return sorted(found)


def test_every_action_and_every_exit_has_a_box():
    found = prediction()
    figure = draw(found, "title", "unit")
    counts = Counter(kind for _, kind, _, _ in boxes(figure))
    # 4 stages x 8 microbatches; two early exits and the final one.
    assert counts == {"forward": 32, "backward": 32, "exits": 24}
    spans = [span for spans in found.simulation.timeline.ranks for span in spans]
    drawn = math.fsum(end - start for _, _, start, end in boxes(figure))
    assert drawn == pytest.approx(math.fsum(span.end - span.start for span in spans))
    for (row, _, _, end), (next_row, _, start, _) in pairwise(boxes_by_time(figure)):
        assert row < next_row or end <= start + 1e-9


def boxes_by_time(figure):
    return sorted(boxes(figure), key=lambda box: (box[0], box[2]))


def test_exit_is_drawn_at_the_start_of_its_backward():
    row = [box for box in boxes_by_time(draw(prediction(), "", "", 6.0)) if box[0] == 0]
    kinds = [kind for _, kind, _, _ in row]
    assert kinds[:6] == ["forward"] * 4 + ["exits", "backward"]
    assert row[4][2:] == (10.0, pytest.approx(10.5))  # three sixths of a stage's forward
    assert row[5][2:] == (pytest.approx(10.5), pytest.approx(12.5))


def test_only_wide_boxes_have_numbers():
    few = draw(prediction(), "", "")
    assert Counter(text.get_text() for text in few.axes[0].texts) == {str(m): 8 for m in range(8)}
    many = draw(prediction(512), "", "")
    assert len(many.axes[0].texts) == 0
    assert len(boxes(many)) == 512 * (8 + 3)


def test_kinds_of_work_have_different_colors():
    filled = draw(prediction(parallel__fill_warmup=2, parallel__fill_cooldown=2), "", "")
    split = draw(prediction(parallel__schedule="zero-bubble"), "", "")
    assert {kind for _, kind, _, _ in [*boxes(filled), *boxes(split)]} == set(KINDS)
    labels = [text.get_text() for text in filled.legends[0].get_texts()]
    assert labels == [kind for kind in KINDS if kind != "weight gradients"] + ["idle"]


# Linear RGB as seen with one kind of cone missing: Machado et al. 2009, at full severity.
EYES = {
    "all cones": np.eye(3),
    "no long": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no middle": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "no short": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def as_seen(color, eyes):
    """Return the color in CIELAB, where a distance of 2 is just noticeable side by side."""
    color = np.asarray(color)
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    x, y, z = TO_XYZ @ np.clip(np.asarray(eyes) @ linear, 0, 1) / np.array([0.9505, 1, 1.089])
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize(
    "options",
    [
        {"parallel__fill_warmup": 2, "parallel__fill_cooldown": 2},
        {"parallel__schedule": "zero-bubble"},
        {"parallel__virtual": 2},
        {"parallel__virtual": 3},
        {"parallel__virtual": 6},
    ],
    ids=str,
)
def test_kinds_of_work_are_distinct_for_color_blind_readers(options, eyes):
    """This includes lighter stages: a faded backward must not look like a forward."""
    colors = defaultdict(set, {"idle": {to_rgb(IDLE)}})
    for bars in draw(prediction(**options), "", "").axes[0].collections:
        if bars.get_gid() is not None:
            colors[bars.get_gid()].add(tuple(bars.get_facecolor()[0][:3]))
    seen = {kind: [as_seen(c, EYES[eyes]) for c in found] for kind, found in colors.items()}
    for one, other in combinations(seen, 2):
        assert min(math.dist(a, b) for a in seen[one] for b in seen[other]) > 14, (one, other)


def test_later_stages_of_a_rank_are_lighter():
    figure = draw(prediction(parallel__virtual=2), "", "")
    shades = {
        tuple(bars.get_facecolor()[0][:3])
        for bars in figure.axes[0].collections
        if bars.get_gid() == "forward"
    }
    assert len(shades) == 2
    assert "lighter" in figure.legends[0].get_texts()[-1].get_text()


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_suffix_selects_the_format(tmp_path, name, start):
    path = tmp_path / name
    save_picture(prediction(), path, "the title", "unit", 6.0)
    written = path.read_bytes()
    assert written.startswith(start)
    assert len(written) > 10_000
    save_picture(prediction(), path, "the title", "unit", 6.0)
    assert path.read_bytes() == written
    if name.endswith("svg"):
        assert b"the title" in written
    with pytest.raises(ValueError, match=r"ends in .png or .svg"):
        save_picture(prediction(), tmp_path / "a.pdf", "", "", 1.0)
