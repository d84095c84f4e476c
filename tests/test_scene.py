"Scenes of nanoparticles: their truth under every setting, the same bytes anywhere, and looks judged by real micrographs."
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from microgen.core import InputError
from microgen.sem.preset import PRESETS, Scene, scene_preset
from microgen.sem.scene import simulate_scene


def check(r):
    "What holds for every scene, whatever its settings."
    h, w = r.scene.frame
    assert r.image.data.shape == r.labels.shape == r.overlay.shape == r.clean.shape == (h, w)
    assert r.image.data.dtype == np.float32 and r.labels.dtype == np.int32
    assert np.isfinite(r.image.data).all() and np.isfinite(r.clean).all()
    if r.scene.bits == 8:
        assert r.image.data.min() >= 0 and r.image.data.max() <= 255 and (r.image.data % 1 == 0).all()
    t = r.table
    assert (t.id == np.arange(1, len(t) + 1)).all()
    numbers = t.drop(columns="shape").to_numpy(float)
    assert np.isfinite(numbers).all()
    assert t.visible.between(0, 1).all() and t.inside.between(0, 1).all() and (t.diameter_nm > 0).all()
    assert (t.minor_nm <= t.major_nm + 1e-9).all()
    assert (np.bincount(r.labels.ravel(), minlength=len(t) + 1)[1:] == t.area_px).all()
    assert not r.labels[r.overlay].any()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_presets(name, seed):
    r = simulate_scene(scene_preset(name, size=(144, 160), bar="random", letter="random"), seed)
    check(r)
    assert len(r.table) > 2


def test_any_settings():
    "Random, also absurd settings: a scene that holds together, or one clear sentence."
    rng = np.random.default_rng(0)
    shapes = ("sphere", "ellipsoid", "cube", "faceted", "agglomerate")
    for k in range(30):
        pick = lambda *o: o[rng.integers(len(o))]
        px = float(10 ** rng.uniform(-1, 2))
        scene = Scene(
            size=(int(rng.integers(16, 120)), int(rng.integers(16, 120))), mode=pick("se", "bf", "haadf"), law=pick("lognormal", "weibull", "gamma"),
            pixel_size=px, median_nm=px * float(10 ** rng.uniform(-1, 1.3)), gsd=float(rng.uniform(1.005, 2)), second_nm=20 * px,
            second_share=pick(0., 0.3), n=pick(0, 1, 7, 60), shape=pick(*shapes, tuple((s, 1) for s in shapes)), aspect=float(rng.uniform(1, 4)),
            clustering=pick(0, 0.5, 1), packing=pick(0, 1), overlap=pick(0, 0.5, 1), buried=pick(0, 1), support=pick("film", "carbon", "cloud"),
            support_nm=px * float(10 ** rng.uniform(0.5, 2)), support_cover=pick(0., 0.5, 1.), texture=pick(0, 0.5), coating=pick(0, 0.2), debris_um2=pick(0, 50),
            edge=pick(0, 2), shade=pick(0, 0.5), shadow=pick(0, 1), glow=pick(0, 0.5), charging=pick(-0.5, 0, 0.5), astigmatism=pick(1, 3),
            probe_nm=px * pick(0, 1, 10), drift_nm=px * pick(0, 20), jitter_nm=px * pick(0, 2), electrons=pick(None, 1, 50), detector=pick(0, 0.1),
            speckle=pick(0, 0.1), bits=pick(8, 16, None), bar=pick("none", "black", "white", "line", "ticks"), letter=pick("", "(a)"))
        try: check(simulate_scene(scene, k))
        except InputError as e: assert "too many" in str(e)


def digest(name, seed):
    r = simulate_scene(scene_preset(name, size=96), seed)
    return hashlib.sha256(r.image.data.tobytes() + r.labels.tobytes() + r.table.to_csv().encode()).hexdigest()


def test_same_bytes_in_another_process_with_one_thread():
    code = "import test_scene as t; print(t.digest('cubes', 5), t.digest('haadf', 6))"
    here = Path(__file__).resolve().parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.split()
    assert out == [digest("cubes", 5), digest("haadf", 6)]
    assert digest("cubes", 5) != digest("cubes", 6)


def test_density_and_frame():
    "Centres fall as densely near the frame as in its middle, and the law is the one asked for."
    scene = Scene(size=600, pixel_size=2., density_um2=1500, median_nm=10, gsd=1.5, overlap=1.)
    t = simulate_scene(scene, 0).table
    side = 600 * 2.
    inner = t[t.y_nm.between(0, side) & t.x_nm.between(0, side)]
    assert abs(len(inner) - 1500 * 1.44) < 4 * np.sqrt(1500 * 1.44)
    border = inner[(inner.y_nm < 60) | (inner.x_nm < 60)]
    share = 1 - (1 - 60 / side)**2
    assert abs(len(border) / len(inner) - share) < 4 * np.sqrt(share / len(inner))
    assert abs(np.log(inner.diameter_nm).mean() - np.log(10)) < 4 * np.log(1.5) / np.sqrt(len(inner))
    cut = t[t.inside < 1]
    assert (cut.y_nm < 0).any() and (cut.y_nm > 0).any()  # particles centred outside still reach in


def test_hidden_particles_stay_in_the_table():
    t = simulate_scene(Scene(size=200, n=150, median_nm=30, gsd=1.6, overlap=1., bar="black"), 1).table
    assert (t.visible < 0.05).sum() >= 3 and (t.visible > 0.99).sum() > 10
    sunk = simulate_scene(Scene(size=200, n=60, buried=1., burial=1.5), 1).table
    assert (sunk.visible[sunk.buried > 1.2] < 0.05).all() and (sunk.visible[(sunk.buried < 0.4) & (sunk.inside == 1)] > 0.8).all()


def test_small_particles_are_missed():
    "The share below the Rose criterion falls with size and with electrons."
    missed = lambda **o: (lambda t: (t.snr < 5).mean())(simulate_scene(Scene(size=400, n=300, pixel_size=1., probe_nm=1.5, gsd=1.2, **o), 2).table)
    by_size = [missed(median_nm=d, electrons=20.) for d in (2., 5., 12.)]
    assert by_size[0] > 0.9 > by_size[1] > by_size[2] and by_size[2] < 0.1
    assert missed(median_nm=4., electrons=200.) < missed(median_nm=4., electrons=10.)


# --- Looks: radial power spectrum and histogram of published micrographs

REAL = {
    "cubes": ("sem/images/f3b36fb2ab.png", None), "agglomerates": ("sem/images/245e1a4826.png", (0, 480, 0, 520)),
    "rafts": ("sem/images/6752c27137.png", None), "rings": ("sem/images/9c4905d020.png", (60, 480, 120, 500)),
    "spheres": ("sem/images/8d7fc4c578.png", (0, 470, 0, 560)), "bright_field": ("catalysts/images/PtCo1.jpg", None),
    "haadf": ("catalysts/images/Ru1.jpg", None)}


def spectrum(a):
    "Radial power spectrum, 25 rings up to half a cycle per pixel."
    a = (a - a.mean()) * np.outer(np.hanning(a.shape[0]), np.hanning(a.shape[1]))
    power = np.abs(np.fft.fft2(a))**2 / a.size
    ring = (50 * np.hypot(np.fft.fftfreq(a.shape[0])[:, None], np.fft.fftfreq(a.shape[1]))).astype(int).ravel()
    return np.log10((np.bincount(ring, power.ravel()) / np.bincount(ring))[:25])


def distance(a, b):
    "Root mean square between spectra, decades; mean distance between grey values of equal rank, of 255."
    q = np.linspace(0.005, 0.995, 200)
    return np.sqrt(((spectrum(a) - spectrum(b))**2).mean()), np.abs(np.quantile(a, q) - np.quantile(b, q)).mean()


def looks(name, folder, seeds=12):
    "The nearest of some scenes of a preset to its real micrograph."
    from skimage.io import imread
    file, box = REAL[name]
    real = imread(folder / file)
    real = real[..., :3].mean(-1) if real.ndim == 3 else real.astype(float)
    if box: real = real[box[0]:box[1], box[2]:box[3]]
    found = [distance(real, simulate_scene(scene_preset(name, size=real.shape), k).image.data) for k in range(seeds)]
    return min(found, key=lambda o: o[0] + o[1] / 40)


@pytest.mark.parametrize("name", REAL)
def test_looks_like_a_real_micrograph(name):
    data = os.environ.get("MICROGEN_TEST_DATA")
    if not data: pytest.skip("set MICROGEN_TEST_DATA to the folder of real micrographs")
    decades, grey = looks(name, Path(data) / "particles")
    assert decades < 0.5 and grey < 30, f"{name}: spectra differ by {decades:.2f} decades, grey values by {grey:.0f} of 255"
