"""Every kind of image is built, loaded, mirrored, compared and evaluated: the registry, and plain folders in grey and colour."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from microgen.core import InputError, Micrograph, PlugError, check_names
from microgen.data.build import build, read_recipe
from microgen.data.files import list_images, read_truth
from microgen.data.item import DatasetRecipe, Simulated
from microgen.data.load import image_dls, paired_dls
from microgen.io.files import read, write_tiff
from microgen.kind import KINDS, SYMMETRIES, Kind, Truth, kind, kind_of, symmetry
from microgen.metrics.compare import compare

SMALL = {  # recipes whose images take no time: settings beside n, size and seed
    "walls": dict(walls=("UP", "DN", "typeC"), pixel_size=0.03),
    "particles": dict(presets=("spheres", "gold_on_carbon"), pixel_size=4.0),
}
SIMULATED = [name for name in KINDS if kind(name).recipe() is not None]
FOLDERS = [*SIMULATED, "grey", "colour"]


def recipe_of(name, seed=0, n=12):
    "A small recipe of a kind; a kind without an entry in SMALL is made as its recipe comes."
    return kind(name).recipe()(n=n, size=64, seed=seed, splits=(0.5, 0.5, 0), **SMALL.get(name, {}))


def pixel_size_of(recipe):
    "(py, px) of its images, nm."
    return recipe.simulate(0).image.pixel_size


def photographs(folder, colour, seed=0, n=12, tint=(1.0, 1.0, 1.0)):
    "Smooth random pictures as 8-bit PNG in a folder per class."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    for i in range(n):
        k = rng.uniform(0.05, 0.3, (3, 2))
        planes = [np.cos(k[c, 0] * y + k[c, 1] * x + c) * tint[c] for c in range(3)]
        levels = np.uint8(
            np.clip(110 + 90 * np.stack(planes, -1) + rng.normal(0, 5, (64, 64, 3)), 0, 255)
        )
        file = folder / ("a" if i % 2 else "b") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(levels if colour else levels[..., 0]).save(file)
    return folder


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    "Makes the folder of a name once: folder_of(name, seed)."
    made = {}

    def make(name, seed=0):
        if (name, seed) not in made:
            out = tmp_path_factory.mktemp(f"{name}_{seed}") / "data"
            if name in ("grey", "colour"):
                made[name, seed] = photographs(out, name == "colour", seed)
            else:
                made[name, seed] = build(recipe_of(name, seed), out, workers=1)
        return made[name, seed]

    return make


@pytest.mark.parametrize("name", list(KINDS))
def test_a_kind_introduces_itself(name):
    it = kind(name)
    assert it.name == name and it.summary and it == kind(name) and hash(it) == hash(kind(name))
    assert set(it.table_channels) <= set(it.channels)
    assert all(isinstance(line, str) and line for line in it.measures.values())


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_knows_its_kind(name, folder_of):
    expected = "images" if name in ("grey", "colour") else name
    assert kind_of(folder_of(name)).name == expected


@pytest.mark.parametrize("name", SIMULATED)
def test_built_and_read_back(name, folder_of):
    recipe, folder = recipe_of(name), folder_of(name)
    assert read_recipe(folder) == recipe
    listed = list_images(folder)
    assert len(listed) == recipe.n and set(listed.label) == set(recipe.classes)
    for i in (0, recipe.n - 1):
        held = read_truth(listed.iloc[i], kind(name).table_columns)
        one = recipe.simulate(i)
        assert held.label == one.about["label"] == recipe.plan(i)[0]
        assert list(held.maps) == list(one.maps)
        for key, values in one.maps.items():
            np.testing.assert_allclose(held.maps[key], values, rtol=1e-6)
            assert held.maps[key].dtype.kind == values.dtype.kind, (
                f"{key} came back as another type"
            )
        pd.testing.assert_frame_equal(held.table, one.table, check_dtype=False)
    assert recipe.facts()


@pytest.mark.parametrize("name", SIMULATED)
def test_new_truth_of_a_recipe(name):
    recipe = recipe_of(name)
    last = recipe.classes[-1]
    asked = recipe.asking(last, n=3, seed=7, size=96)
    assert (asked.classes, asked.n, asked.seed, asked.size) == ((last,), 3, 7, 96)
    truth = asked.truth(2)
    assert truth.label == last and all(m.shape == (96, 96) for m in truth.maps.values())
    again = asked.truth(2)
    assert all((again.maps[key] == values).all() for key, values in truth.maps.items())
    it = kind(name)
    if it.channels:
        made = it.condition(truth, (96, 96), pixel_size_of(recipe), it.channels)
        assert made.shape == (len(it.channels), 96, 96) and np.isfinite(made).all()
        assert np.abs(made).max() <= 1.5 and np.abs(made).max() > 0


@pytest.mark.parametrize("name", FOLDERS)
def test_loaded(name, folder_of):
    dls = image_dls(folder_of(name), bs=4, size=48, label=True, device="cpu")
    label, image = dls.one_batch()
    colours = 3 if name == "colour" else 1
    assert image.shape == (4, colours, 48, 48) and dls.n_channels == colours
    assert -1 <= image.min() < image.max() <= 1 and label.max() < len(dls.vocab)
    if name == "colour":
        assert (image[:, 0] - image[:, 1]).abs().mean() > 0.1
    if kind_of(folder_of(name)).channels:
        paired = paired_dls(folder_of(name), bs=4, device="cpu")
        batch = dict(zip(paired.fields, paired.one_batch()))
        assert batch["maps"].shape == (4, len(paired.channels), 64, 64)
        assert batch["focus"].shape == (4, 1, 64, 64)
        assert set(batch["focus"].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("name", SIMULATED)
def test_mirrored_channels_are_channels_of_the_mirrored_truth(name):
    it, recipe = kind(name), recipe_of(name)
    classes, pixel_size = recipe.classes, pixel_size_of(recipe)
    for op in it.symmetries(classes):
        index = next(i for i in range(recipe.n) if recipe.plan(i)[0] == classes[0])
        truth = recipe.asking(n=recipe.n).truth(index)
        made = it.condition(truth, (64, 64), pixel_size, it.channels)
        act = it.action(op, classes, it.channels)
        label = torch.tensor([classes.index(truth.label)])
        after = act(
            {
                "maps": torch.from_numpy(made)[None],
                "label": label,
                "image": torch.zeros(1, 1, 64, 64),
            }
        )
        moved = it.move_truth(op, truth, (64, 64), pixel_size)
        again = it.condition(moved, (64, 64), pixel_size, it.channels)
        assert any(
            np.abs(again - same).max() < 1e-3
            for same in equivalents(name, after["maps"][0].numpy())
        ), f"{op}: the moved channels are not those of the moved truth"


def equivalents(name, channels):
    "Channels that say the same: for walls, which of three columns of a row is called the first is a convention."
    if name != "walls":
        return [channels]
    turned = []
    for k in range(3):
        q = (channels[0] + 1j * channels[1]) * np.exp(2j * np.pi * k / 3)
        turned.append(np.stack([q.real, q.imag, *channels[2:]]))
    return turned


@pytest.mark.parametrize("name", FOLDERS)
def test_mirrors_that_are_asked_for(name, folder_of):
    it = kind_of(folder_of(name))
    classes = tuple(sorted(set(list_images(folder_of(name)).label)))
    allowed = it.symmetries(classes) or ("mirror_lr",)
    dls = image_dls(folder_of(name), bs=4, size=48, augment=allowed[:1], device="cpu")
    assert dls.augment == allowed[:1]
    assert dls.one_batch()[0].shape[-2:] == (48, 48)


@pytest.mark.parametrize("op", list(SYMMETRIES))
def test_pixels_and_points_move_alike(op):
    rng = np.random.default_rng(0)
    image = np.zeros((9, 14))
    y, x = rng.integers(0, 9, 5), rng.integers(0, 14, 5)
    image[y, x] = 1 + np.arange(5)
    values = image[y, x]
    new_y, new_x = symmetry(op).points(y, x, (8, 13))
    assert (symmetry(op).pixels(image)[new_y, new_x] == values).all()
    truth = Truth({"m": image}, pd.DataFrame({"y_nm": 2.0 * y, "x_nm": 3.0 * x}))
    moved = kind("images").move_truth(op, truth, (9, 14), (2.0, 3.0))
    step = (3.0, 2.0) if symmetry(op).needs_square else (2.0, 3.0)
    at = (moved.table.y_nm / step[0]).astype(int), (moved.table.x_nm / step[1]).astype(int)
    assert (moved.maps["m"][at] == values).all()


@pytest.mark.parametrize("name", SIMULATED)
def test_an_image_shows_its_own_truth_better_than_another(name):
    it, recipe = kind(name), recipe_of(name)
    context = it.context(recipe)
    one, other = recipe.simulate(0), recipe.simulate(1)
    own = Truth(one.maps, one.table, one.about["label"])
    wrong = Truth(other.maps, other.table, other.about["label"])
    right = it.evaluate(one.image, own, context)
    assert set(it.measures) & set(right), "what the card names is measured"
    assert it.same_scene(own, own) and not it.same_scene(own, wrong)
    noise = Micrograph(np.random.default_rng(0).normal(size=one.image.shape), one.image.pixel_size)
    of_noise = it.evaluate(noise, own, context)
    for key in set(right) & set(SHOWN):
        assert right[key] > 0.6 and not of_noise.get(key, 0) > 0.5, (key, right, of_noise)
    told_apart = [key for key in set(it.measures) & set(right) if differ(right, of_noise, key)]
    assert told_apart, "no measure of the card tells an image of the truth from noise"


SHOWN = ("found_share", "f1")  # of what an image was asked to show, the share that it shows


def differ(one, other, key):
    "Is a measure found in one image and missing in the other, or another number?"
    a, b = one[key], other.get(key, np.nan)
    if np.isnan(a) or np.isnan(b):
        return np.isnan(a) != np.isnan(b)
    return abs(a - b) > 0.1 * max(abs(a), abs(b))


@pytest.mark.parametrize("name", FOLDERS)
def test_compared(name, folder_of, tmp_path):
    result = compare(folder_of(name), folder_of(name, 1), tmp_path / "report", most_evaluated=3)
    assert (tmp_path / "report/report.html").stat().st_size > 10_000
    table = result.tables["intensity_and_spectrum"]
    assert np.isfinite(table["value"]).all()
    written = {file.stem for file in (tmp_path / "report").glob("*.csv")}
    assert written == set(result.tables)
    if kind_of(folder_of(name)).measures:
        assert "evaluation" in result.tables or "physics" in result.tables


def test_a_colour_shift_is_seen(folder_of, tmp_path):
    real = folder_of("colour")
    same = compare(real, folder_of("colour", 1)).tables["intensity_by_channel"]
    tinted = photographs(tmp_path / "tinted", True, 1, tint=(1.0, 1.0, 0.3))
    other = compare(real, tinted).tables["intensity_by_channel"]
    js = [table[table.metric.str.startswith("js")].value.max() for table in (same, other)]
    assert js[1] > 3 * js[0], js


def test_images_read_as_they_lie(folder_of):
    listed = list_images(folder_of("colour"))
    assert read(listed.image[0], 1.0, colour=True).shape == (3, 64, 64)


# --- a kind of somebody else, who has read one page


@dataclass(frozen=True)
class DotRecipe(DatasetRecipe):
    "One bright dot, small or large, named by a map."

    dots: tuple = ("small", "large")
    n: int = 4
    size: int = 32
    seed: int = 0
    shares: tuple | None = None
    splits: tuple = (0.5, 0.5, 0)
    kind = "dots"

    def __post_init__(self):
        self.check()
        check_names("dots", self.dots, ("small", "large"))

    def simulate(self, index):
        label, split = self.plan(index)
        y, x = np.indices((self.size, self.size))
        inside = np.hypot(y - 16, x - 16) < {"small": 4, "large": 9}[label]
        maps = {"dot": inside.astype(np.int64), "height": np.sqrt(inside).astype(np.float32)}
        table = pd.DataFrame({"width_nm": [2.0 * np.sqrt(inside.sum())]})
        about = {"label": label, "split": split, "pixel_size_nm": 2.0}
        return Simulated(Micrograph(1.0 * inside, 2.0, about), maps, table, about)

    def row(self, out, index):
        label, split = self.plan(index)
        return {"label": label, "split": split, "pixel_size_nm": 2.0}


class Dots(Kind):
    "Dots, whose answers a test can change."

    name = "dots"
    channels = ("dot",)
    table_columns = ("width_nm",)
    classes_are = "dots"
    measures = {"width_error_nm": "width found against width asked for, nm"}

    def recipe(self):
        return DotRecipe

    def condition(self, truth, shape, pixel_size, channels):
        return self.made(truth.maps["dot"])

    def made(self, dot):
        return dot[None].astype(np.float32)

    def evaluate(self, image, truth, context=None, reference=None):
        return self.found(2.0 * np.sqrt((image.data > 0.5).sum()) - truth.table.width_nm[0])

    def found(self, error):
        return {"width_error_nm": error}


@pytest.fixture
def dots(monkeypatch, tmp_path):
    "The folder of a kind that is registered for one test."
    monkeypatch.setitem(KINDS, "dots", Dots)
    return build(DotRecipe(), tmp_path / "dots", workers=1)


@pytest.mark.parametrize("name", [*SIMULATED, "dots"])
def test_a_class_that_there_is_not_is_refused_by_the_recipe(name, dots):
    recipe = recipe_of(name) if name != "dots" else DotRecipe()
    with pytest.raises(InputError, match="no_such_class"):
        replace(recipe, **{recipe.classes_field: ("no_such_class",), "shares": None})
    with pytest.raises(InputError, match="no_such_class"):
        recipe.asking("no_such_class")


def test_whole_numbers_come_back_as_whole_numbers_beside_others(dots):
    held = read_truth(list_images(dots).iloc[0], ("width_nm",))
    assert held.maps["dot"].dtype == np.int32 and held.maps["height"].dtype == np.float32
    batch = paired_dls(dots, bs=2, device="cpu").one_batch()
    assert {x.dtype for x in batch if x.ndim == 4} == {torch.float32}


WRONG_CHANNELS = {
    "float64": (lambda dot: dot[None].astype(float), "float64.*float32"),
    "shape": (lambda dot: dot.astype(np.float32), r"shape \(32, 32\).*\(1, 32, 32\)"),
    "nm": (lambda dot: 50.0 * dot[None].astype(np.float32), "values from 0 to 50.*about -1 to 1"),
    "NaN": (lambda dot: np.full((1, 32, 32), np.nan, np.float32), "NaN.*finite"),
    "tensor": (lambda dot: torch.zeros(1, 32, 32), "a Tensor.*NumPy"),
}


@pytest.mark.parametrize("wrong", WRONG_CHANNELS)
def test_a_condition_of_another_form_is_one_sentence(wrong, dots, monkeypatch):
    made, said = WRONG_CHANNELS[wrong]
    monkeypatch.setattr(Dots, "made", lambda self, dot: made(dot))
    with pytest.raises(PlugError, match=f"'dots' gave {said}"):
        paired_dls(dots, bs=2, device="cpu")


WRONG_VALUES = {
    "number": (lambda error: error, "a float"),
    "nothing": (lambda error: None, "a NoneType"),
    "array": (lambda error: {"width_error_nm": np.ones(2)}, "a ndarray for 'width_error_nm'"),
    "name": (
        lambda error: {"error": error},
        r"error, and a name of its measures \(width_error_nm\)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_an_evaluation_of_another_form_is_one_sentence(wrong, dots, monkeypatch):
    found, said = WRONG_VALUES[wrong]
    monkeypatch.setattr(Dots, "found", lambda self, error: found(error))
    with pytest.raises(PlugError, match=f"'dots'.*{said}"):
        compare(dots, dots)


def test_columns_that_a_table_has_not_are_one_sentence(dots, monkeypatch):
    monkeypatch.setattr(Dots, "table_columns", ("y_nm", "x_nm"))
    one = DotRecipe().simulate(0)
    with pytest.raises(PlugError, match="'dots' states table_columns.*width_nm"):
        Dots().evaluate(one.image, Truth(one.maps, one.table))


@pytest.mark.parametrize("stated", [{"channels": "dot"}, {"table_columns": 3}, {"measures": ()}])
def test_a_kind_that_states_another_form_is_refused_when_it_is_made(stated):
    with pytest.raises(PlugError, match=f"Odd states {min(stated)}"):
        type("Odd", (Kind,), stated)


WRONG_STATEMENTS = {
    "no name": ({"summary": "odd"}, "Odd has no name: give its class one"),
    "channels": ({"name": "odd", "chanels": ("dot",)}, "'chanels'.*write 'channels'"),
    "evaluate": ({"name": "odd", "evalute": lambda *a: {}}, "'evalute'.*write 'evaluate'"),
}


@pytest.mark.parametrize("wrong", WRONG_STATEMENTS)
def test_a_kind_without_name_or_with_a_misspelt_one_is_refused_when_it_is_made(wrong):
    stated, said = WRONG_STATEMENTS[wrong]
    with pytest.raises(PlugError, match=said):
        type("Odd", (Kind,), stated)


def test_names_of_ones_own_are_taken():
    stated = {"name": "even", "made": lambda self: 1, "direction": (), "_channel": "dot"}
    assert type("Even", (Kind,), stated)().made() == 1


class Mirrored(Dots):
    "Dots whose action a test can change."

    def symmetries(self, vocab=()):
        return ("mirror_lr",)

    def action(self, op, vocab=(), channels=()):
        return self.acts(super().action(op, vocab, channels))

    def acts(self, move):
        return move


WRONG_ACTIONS = {
    "nothing": (lambda move: None, "gave a NoneType as action of mirror_lr.*function"),
    "tuple": (lambda move: lambda batch: tuple(move(batch).values()), "gave a tuple.*dict"),
    "no maps": (
        lambda move: lambda batch: move(batch) | {"maps": -batch["maps"]},
        "field 'maps'.*this batch has image: .*only the fields of its loader",
    ),
    "fields": (lambda move: lambda batch: {}, r"those that came \(image\)"),
    "type": (
        lambda move: lambda batch: {name: x.double() for name, x in move(batch).items()},
        "image as torch.float64.*torch.float32",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_ACTIONS)
def test_an_action_of_another_form_is_one_sentence(wrong, dots, monkeypatch):
    acts, said = WRONG_ACTIONS[wrong]
    monkeypatch.setitem(KINDS, "dots", Mirrored)
    assert image_dls(dots, bs=2, device="cpu").augment == ("mirror_lr",)
    monkeypatch.setattr(Mirrored, "acts", lambda self, move: acts(move))
    with pytest.raises(PlugError, match=f"'dots'.*{said}"):
        dls = image_dls(dots, bs=2, device="cpu")
        for _ in range(20):  # until a batch is mirrored
            dls.one_batch()


def test_a_moved_truth_of_another_form_is_one_sentence(dots):
    class Untrue(Dots):
        def move_truth(self, op, truth, shape, pixel_size):
            return truth.maps

    one = DotRecipe().simulate(0)
    with pytest.raises(PlugError, match="'dots' gave a dict as move_truth, and a Truth"):
        Untrue().move_truth("turn", Truth(one.maps, one.table), (32, 32), (2.0, 2.0))


@pytest.mark.parametrize("to", ["microgen.core.Dots", "no.module.Dots", "Dots"])
def test_a_dotted_name_that_leads_nowhere_is_one_sentence(to, monkeypatch):
    monkeypatch.setitem(KINDS, "dots", to)
    with pytest.raises(PlugError, match=rf"KINDS\['dots'\] is '{to}', which cannot be imported"):
        kind("dots")


def test_what_is_no_kind_is_one_sentence(monkeypatch):
    monkeypatch.setitem(KINDS, "dots", DotRecipe)
    with pytest.raises(PlugError, match="leads to DotRecipe: give a subclass of Kind"):
        kind("dots")


@dataclass(frozen=True)
class OddRecipe(DotRecipe):
    "What a test makes odd."

    kind = "odd"
    made = staticmethod(lambda one: one)
    said = staticmethod(lambda row: row)

    def simulate(self, index):
        return self.made(super().simulate(index))

    def row(self, out, index):
        return self.said(super().row(out, index))


@pytest.fixture
def odd(monkeypatch):
    "A kind whose recipe a test makes odd."
    stated = {"name": "odd", "classes_are": "dots", "recipe": lambda self: OddRecipe}
    odd = type("Odd", (Dots,), stated)
    monkeypatch.setitem(KINDS, "odd", odd)
    return odd


WRONG_ITEMS = {
    "image": (lambda one: one.image, r"a Micrograph, and Simulated\(image"),
    "no split": (lambda one: one._replace(about={"label": "small"}), "label, split = self.plan"),
}


@pytest.mark.parametrize("wrong", WRONG_ITEMS)
def test_an_item_of_another_form_is_one_sentence(wrong, odd, monkeypatch, tmp_path):
    made, said = WRONG_ITEMS[wrong]
    monkeypatch.setattr(OddRecipe, "made", staticmethod(made))
    with pytest.raises(PlugError, match=f"simulate of OddRecipe gave .*{said}"):
        build(OddRecipe(), tmp_path / "odd", workers=1)


def test_a_row_without_label_is_one_sentence_and_the_images_are_kept(odd, monkeypatch, tmp_path):
    with monkeypatch.context() as change:
        change.setattr(OddRecipe, "said", staticmethod(lambda row: {"n": 1}))
        with pytest.raises(PlugError, match="row of OddRecipe gave {'n': 1}.*label and split"):
            build(OddRecipe(), tmp_path / "odd", workers=1)
    monkeypatch.setattr(OddRecipe, "made", None)  # nothing is simulated again
    listed = list_images(build(OddRecipe(), tmp_path / "odd", workers=1))
    assert set(listed.label) == {"small", "large"}


def test_a_recipe_that_its_kind_does_not_read_back_is_refused_before_anything_is_written(
    odd, monkeypatch, tmp_path
):
    monkeypatch.setattr(odd, "recipe", lambda self: DotRecipe)
    with pytest.raises(
        PlugError, match="OddRecipe could not be read back.*recipe.. gives DotRecipe"
    ):
        build(OddRecipe(), tmp_path / "odd", workers=1)
    monkeypatch.setattr(odd, "recipe", lambda self: None)
    with pytest.raises(PlugError, match="gives nothing: let that give OddRecipe"):
        build(OddRecipe(), tmp_path / "odd", workers=1)
    assert not (tmp_path / "odd").exists()


def test_classes_are_a_field_of_the_recipe(odd, monkeypatch):
    monkeypatch.setattr(odd, "classes_are", "diameters")
    with pytest.raises(
        PlugError, match="classes_are = 'diameters', and OddRecipe has no such field"
    ):
        OddRecipe()


def test_a_number_that_is_a_text_is_one_sentence(odd):
    with pytest.raises(InputError, match="n is '12': give a whole number"):
        OddRecipe(n="12")
    assert OddRecipe(n=np.int64(12)).to_dict()["n"] == 12


def test_a_recipe_that_does_not_say_how_is_told_what_to_write(odd):
    with pytest.raises(PlugError, match=r"write simulate\(self, index\)"):
        DatasetRecipe.simulate(OddRecipe(), 0)
    with pytest.raises(PlugError, match=r"write row\(self, out, index\)"):
        DatasetRecipe.row(OddRecipe(), ".", 0)


def test_images_that_differ_are_told_the_largest_size_that_fits(tmp_path):
    rng = np.random.default_rng(0)
    for i, (pixels, pixel_size) in enumerate(
        [(64, 1.0), (64, 0.8), (75, 1.0), (64, 1.0), (64, 1.0)]
    ):
        write_tiff(tmp_path / f"{i}.tif", rng.random((pixels, pixels)), pixel_size)
    said = "1.tif has 51 × 51 pixels of 1 nm, the common pixel size.*64 × 64.*give size=51 or less"
    with pytest.raises(InputError, match=said):
        image_dls(tmp_path, bs=2, device="cpu")
    assert image_dls(tmp_path, bs=2, size=51, device="cpu").one_batch()[0].shape[-1] == 51
