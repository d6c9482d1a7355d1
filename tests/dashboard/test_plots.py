"""Plots of plain tensors, by their matplotlib artists."""

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from sklearn.metrics import roc_curve

from lsoftmax_lightning.dashboard import plots

pytestmark = pytest.mark.draws
NAMES = ("cat", "$dog^$", "fish")


def texts(figure: Figure) -> list[str]:
    FigureCanvasAgg(figure).draw()  # it can be drawn
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_two_dimensional_features_are_not_projected() -> None:
    features, weight = torch.tensor([[3.0, 4.0], [0.0, -5.0]]), torch.tensor([[2.0, 0.0], [0.0, 9.0], [1.0, 1.0]])
    points, rays = plots.plane(features, weight)
    assert torch.equal(points, features)
    torch.testing.assert_close(rays, 5 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5**0.5, 0.5**0.5]]))


def test_wide_features_are_projected_to_fixed_class_places() -> None:
    weight = torch.diag(torch.tensor([1.0, 5.0, 0.1, 2.0]))
    points, rays = plots.plane(torch.cat([3 * torch.eye(4), torch.ones(1, 4)]), weight)
    circle = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(rays, circle, atol=1e-6, rtol=0)
    torch.testing.assert_close(points[:4], circle, atol=1e-6, rtol=0)
    torch.testing.assert_close(points[4], torch.zeros(2), atol=1e-6, rtol=0)  # equally similar to all classes
    points, _ = plots.plane(torch.tensor([[0.8, 0.6, 0.0, 0.0], [0.8, 0.0, 0.0, -0.6]]), weight)
    torch.testing.assert_close(points, torch.tensor([[0.8**3, 0.6**3], [0.8**3, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [3, 10, 100])
def test_every_class_has_its_own_marker_and_label(count: int) -> None:
    target = torch.arange(5 * count) % count
    names = [f"class {number}" for number in range(count)]
    figure = plots.feature_scatter(torch.rand(5 * count, 2), torch.rand(count, 2), target, names, "title")
    (axes,) = figure.axes
    points = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert [line.get_label() for line in points] == names
    assert len({(line.get_color(), line.get_marker()) for line in points}) == count
    assert all(len(line.get_xdata()) == 5 for line in points)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == names
    assert texts(figure) == (names if count <= 25 else [])
    assert axes.get_xlim() == (-1.3, 1.3)


def test_names_with_a_leading_underscore_are_in_legends() -> None:
    names, values = ["_private", "$x$", "y" * 300], torch.tensor([0.1, 0.5, 0.9])
    pairs = {"_run": (values, torch.tensor([True, False, True]))}
    for figure, expected in (
        (plots.feature_scatter(torch.rand(3, 2), torch.rand(3, 2), torch.arange(3), names), names[0]),
        (plots.angle_histogram({"_run": values}, {"_b": 1.0}), "_run (mean 0.5°)"),
        (plots.roc(pairs), "_run"),
    ):
        texts(figure)
        assert figure.axes[0].get_legend().get_texts()[0].get_text() == expected
        assert max(len(text.get_text()) for text in figure.axes[0].get_legend().get_texts()) <= 60


def test_angle_histogram_shows_fractions_and_boundaries() -> None:
    angles = {"train": torch.tensor([1.0, 1.5, 91.0, 180.0]), "val": torch.tensor([45.0]), "none": torch.empty(0)}
    figure = plots.angle_histogram(angles, {"softmax": 40.0})
    (axes,) = figure.axes
    heights = [patch.get_data().values for patch in axes.patches[1::2]]  # in bins of five degrees
    assert [5 * height.sum() for height in heights] == pytest.approx([100, 100])
    assert heights[0][[0, 18, 35]].tolist() == [10, 5, 5]
    assert [patch.get_edgecolor() for patch in axes.patches[1::2]] == [to_rgba(plots.COLORS[k]) for k in (0, 1)]
    assert axes.get_xlim() == (0, 180)
    assert list(axes.lines[0].get_xdata()) == [40.0, 40.0]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "training (mean 68.4°)",
        "validation (mean 45.0°)",
        "softmax: 40.0°",
    ]


def test_angles_of_runs_have_the_colours_of_their_other_plots() -> None:
    (axes,) = plots.angle_histogram({f"m = {m}": torch.rand(9) for m in (1, 2)}, {}).axes
    assert [patch.get_edgecolor() for patch in axes.patches[1::2]] == [to_rgba(plots.COLORS[k]) for k in (0, 1)]


@pytest.mark.parametrize(("count", "width"), [(10, 5), (500, 2), (2000, 1)])
def test_bins_are_narrower_with_more_samples(count: int, width: int) -> None:
    figure = plots.angle_histogram({"val": torch.linspace(0, 180, count)}, {})
    values, edges, _ = figure.axes[0].patches[0].get_data()
    assert list(edges) == list(range(0, 181, width))
    assert values.sum() * width == pytest.approx(100)


def test_segments_are_stacked() -> None:
    figure = plots.segment_bars({"train": torch.tensor([0.5, 0.25, 0.25]), "val": torch.tensor([1.0, 0.0, 0.0])})
    texts(figure)
    (axes,) = figure.axes
    bars = [[(bar.get_x(), bar.get_width()) for bar in container] for container in axes.containers]
    assert bars == [[(0, 50), (0, 100)], [(50, 25), (100, 0)], [(75, 25), (100, 0)]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["training", "validation"]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["0° to 60°", "60° to 120°", "120° to 180°"]


@pytest.mark.parametrize("percent", [False, True])
def test_confusion_matrix_shows_counts_or_percent_of_rows(percent: bool) -> None:
    counts = torch.tensor([[8, 2, 0], [0, 0, 0], [1, 0, 3]])
    figure = plots.confusion(plots.percent_of_rows(counts) if percent else counts, NAMES)
    assert texts(figure) == (["80", "20", "25", "75"] if percent else ["8", "2", "1", "3"])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", r"\$dog^\$", "fish"]  # escaped
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")


def test_percentages_near_100_and_0_are_not_rounded_to_them() -> None:
    counts = torch.tensor([[996, 4, 0], [0, 1000, 0], [0, 0, 1]])
    assert texts(plots.confusion(plots.percent_of_rows(counts), NAMES)) == ["99.6", "0.4", "100", "100"]


@pytest.mark.parametrize("count", [3, 100])
def test_angle_map_shows_the_matrix(count: int) -> None:
    names = [f"class {number}" for number in range(count)]
    figure = plots.angle_map(torch.full((count, count), 90.0).fill_diagonal_(0), names)
    written = texts(figure)
    assert written == (["90"] * 6 if count == 3 else [])  # no room for numbers in a hundred columns
    assert int(figure.axes[0].images[0].get_array().mask.sum()) == count  # the diagonal is blank
    labels = figure.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == names
    pitch = figure.axes[0].get_window_extent().width / count / figure.dpi * 72  # points
    assert labels[0].get_fontsize() <= pitch


@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_captions(channels: int) -> None:
    figure = plots.image_strip(torch.full((7, channels, 4, 5), 200, dtype=torch.uint8), [str(n) for n in range(7)])
    FigureCanvasAgg(figure).draw()
    assert [axes.get_title() for axes in figure.axes] == [*map(str, range(7)), *[""] * 5]
    assert [len(axes.images) for axes in figure.axes] == [1] * 7 + [0] * 5
    assert len(plots.image_strip(torch.zeros(2, channels, 4, 5, dtype=torch.uint8), ["a", "b"]).axes) == 2


def test_roc_curve_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    same = torch.arange(300) % 2 == 0
    cosines = (0.4 * torch.randn(300, generator=generator) + 0.3 * same).clamp(-1, 1)
    figure = plots.roc({"pairs": (cosines, same)})
    FigureCanvasAgg(figure).draw()
    x, y = (torch.as_tensor(data) for data in figure.axes[0].lines[0].get_data())
    false, true, _ = roc_curve(same, cosines, drop_intermediate=False)
    torch.testing.assert_close(y, torch.tensor(true), check_dtype=False)
    torch.testing.assert_close(x, torch.tensor(false).clamp_min(0.5 / 150), check_dtype=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_training_is_drawn(value: float) -> None:
    features, weight, target = torch.full((6, 3), value), torch.full((3, 3), value), torch.arange(6) % 3
    texts(plots.feature_scatter(*plots.plane(features, weight), target, NAMES))
    texts(plots.feature_scatter(*plots.plane(features[:, :2], weight[:, :2]), target, NAMES))
    texts(plots.angle_histogram({"train": features[:, 0]}, {"softmax": value}))
    texts(plots.angle_map(weight, NAMES))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rays_are_those_of_the_finite_samples(value: float) -> None:
    features = torch.tensor([[3.0, 4.0], [0.0, -5.0], [value, 1.0]])
    _, rays = plots.plane(features, torch.eye(2))
    torch.testing.assert_close(rays, 5 * torch.eye(2))


@pytest.mark.parametrize("count", [1, 3, 10])
def test_titles_are_not_cut_off(count: int) -> None:
    title = (
        "confusion in % of the true class of 100 of 150 classes\nm = 4, lambda 6.37e-08 (effective 4.00), step 600000"
    )
    names, square = [f"{index}" for index in range(count)], torch.rand(count, count)
    for figure in (
        plots.feature_scatter(torch.rand(count, 2), torch.rand(count, 2), torch.arange(count), names, title),
        plots.angle_histogram({"val": torch.rand(count)}, {}, title),
        plots.segment_bars({"val": torch.rand(4)}, title),
        plots.angle_map(square, names, title),
        plots.confusion(square, names, "images", title),
        plots.image_strip(torch.zeros(count, 1, 8, 8, dtype=torch.uint8), names, title),
        plots.roc({"val": (torch.rand(10), torch.arange(10) % 2 == 0)}, title),
    ):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        (drawn,) = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text() == title)
        box = drawn.get_window_extent(canvas.get_renderer())
        assert (box.x0, box.y0) >= (0, 0)
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
