"""The picture has a box for everything that the timeline has, where it is."""

import math
from collections import Counter
from itertools import pairwise

import pytest
from matplotlib.colors import to_rgb

from ee_llm.config import load_config
from ee_llm.pipeline.costs import NOMINAL
from ee_llm.pipeline.picture import IDLE, KINDS, draw, save_picture
from ee_llm.pipeline.predict import predict


def prediction(num_microbatches=8, num_layers=24, **options):
    values = {"model.num_layers": num_layers, "model.hidden_size": 8, "model.num_heads": 1}
    values |= {"model.vocab_size": 8, "parallel.pipeline": 4, "exits.boundaries": (6, 12)}
    given = {k.replace("__", "."): v for k, v in options.items()}
    return predict(load_config(None, values | given), num_microbatches, NOMINAL)


def boxes(figure):
    """(row, kind, start, end) of every box that was drawn."""
    found = []
    for bars in figure.axes[0].collections:
        for path in bars.get_paths():
            (left, low), (right, high) = path.get_extents().get_points()
            if bars.get_gid() is not None:
                found.append((round((low + high) / 2), bars.get_gid(), left, right))
    return sorted(found)


def test_every_action_and_every_exit_has_its_box():
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


def test_an_exit_is_drawn_at_the_beginning_of_its_backward():
    row = [box for box in boxes_by_time(draw(prediction(), "", "", 6.0)) if box[0] == 0]
    kinds = [kind for _, kind, _, _ in row]
    assert kinds[:6] == ["forward"] * 4 + ["exits", "backward"]
    assert row[4][2:] == (10.0, pytest.approx(10.5))  # three sixths of a stage's forward
    assert row[5][2:] == (pytest.approx(10.5), pytest.approx(12.5))


def test_numbers_stand_in_boxes_that_have_room_for_them():
    few = draw(prediction(), "", "")
    assert Counter(text.get_text() for text in few.axes[0].texts) == {str(m): 8 for m in range(8)}
    many = draw(prediction(512), "", "")
    assert len(many.axes[0].texts) == 0
    assert len(boxes(many)) == 512 * (8 + 3)


def test_kinds_of_work_have_colours_of_their_own():
    filled = draw(prediction(parallel__fill_warmup=2, parallel__fill_cooldown=2), "", "")
    split = draw(prediction(parallel__schedule="zero-bubble"), "", "")
    assert {kind for _, kind, _, _ in [*boxes(filled), *boxes(split)]} == set(KINDS)
    colors = [to_rgb(color) for color, _ in KINDS.values()] + [to_rgb(IDLE)]
    # Apart in lightness or hue by more than a little, whatever pair is taken.
    assert min(math.dist(a, b) for a in colors for b in colors if a != b) > 0.15
    labels = [text.get_text() for text in filled.legends[0].get_texts()]
    assert labels == [kind for kind in KINDS if kind != "weight gradients"] + ["idle"]


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
def test_pictures_are_written_by_their_ending(tmp_path, name, start):
    path = tmp_path / name
    save_picture(prediction(), path, "the title", "unit", 6.0)
    written = path.read_bytes()
    assert written.startswith(start)
    assert len(written) > 10_000
    save_picture(prediction(), path, "the title", "unit", 6.0)
    assert path.read_bytes() == written
    if name.endswith("svg"):
        assert b"the title" in written
    with pytest.raises(ValueError, match=r"must end in .png or .svg"):
        save_picture(prediction(), tmp_path / "a.pdf", "", "", 1.0)
