"""Micrographs whose truth is known: simulate, measure, count and generate them.

    image = microgen.read("image.dm4")       or microgen.sample("wall"), to try things on
    microgen.measure(image, "YMnO3")         columns, displacements, walls
    microgen.detect(image)                   particles
    microgen.columns, wall, haadf, acquire   simulate STEM images; simulate_scene: SEM images
    microgen.structures(), walls(), presets()   what there is to choose among
    microgen.doctor()                        what works on this machine; microgen.tour() shows it all

Lengths are nanometres, arrays are (y, x). Errors are a MicrogenError, in one sentence that says the remedy.
The page "Which function do I need?" of the documentation leads from a task to its call.
"""

__version__ = "0.1.0"

import importlib as _importlib
import sys as _sys
from types import ModuleType as _Module

import lazy_loader as _lazy

# Names load their module when first used, so that `import microgen` costs milliseconds.
_attribute, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=[
        "core", "kind", "plot", "progress", "settings", "io", "scan", "stem", "sem", "count", "nets", "train", "gan",
        "data", "metrics", "kinds", "models", "report", "chapters", "tour", "doctor", "demo", "cli",
    ],
    submod_attrs={
        "core": ["Micrograph", "as_micrograph", "MicrogenError", "ReadError", "InputError", "MissingExtra"],
        "io.files": ["read"],
        "plot": ["show", "show_grid", "show_columns"],
        "scan.acquire": ["acquire"],
        "stem.structure": ["load_structure", "structures"],
        "stem.crystal": ["columns"],
        "stem.wall": ["wall", "walls", "displace", "truth_maps"],
        "stem.probe": ["Probe"],
        "stem.render": ["haadf"],
        "stem.measure": ["measure"],
        "sem.preset": ["Scene"],
        "sem.scene": ["simulate_scene"],
        "demo": ["sample", "presets"],
        "count.law": ["DetectionCurve", "fit_detection"],
        "count.detect": ["Detector", "detect"],
        "count.batch": ["count_images"],
        "count.calibrate": ["calibrate"],
        "count.size": ["fit_sizes"],
        "count.ecsa": ["ecsa", "compare_ecsa"],
        "count.sample": ["count_sample"],
        "kinds.walls.recipe": ["Recipe"],
        "kinds.particles.recipe": ["ParticleRecipe"],
        "data.build": ["build"],
        "data.load": ["paired_dls", "image_dls", "unpaired_dls", "mixed_dls"],
        "metrics.compare": ["compare"],
        "train.hub": ["load_model"],
        "gan.pix2pix": ["pix2pix_learner"],
        "models.model": ["Model", "Options"],
        "models.pix2pix": ["Pix2PixModel", "RouterModel"],
        "models.train": ["train_model"],
        "models.sample": ["sample_run"],
        "models.run": ["load_run"],
    },
)


def __getattr__(name):
    try:
        return _attribute(name)
    except AttributeError as e:
        if name.startswith("_") or name in __all__:
            raise
        from .core import did_you_mean

        raise AttributeError(
            f"microgen has no {name!r}.{did_you_mean(name, __all__)} See dir(microgen)."
        ) from e


# Modules that are called like a function: `microgen.tour("out")` as well as `microgen.tour.chapters()`.
_CALLS = {
    "doctor": ("microgen.doctor", lambda module, *given, **named: print(module.report(module.doctor(*given, **named)))),
    "tour": ("microgen.tour", lambda module, *given, **named: module.tour(*given, **{"progress": True} | named)),
    "count": ("microgen.count.sample", lambda module, *given, **named: module.count_sample(*given, **named)),
}


class _Called(_Module):
    def __call__(self, *given, **named):
        module, call = _CALLS[self.__name__.removeprefix("microgen.")]
        return call(_importlib.import_module(module), *given, **named)


class _Package(_Module):
    def __setattr__(self, name, value):  # how the import system hands a package its modules
        if name in _CALLS and isinstance(value, _Module):
            value.__class__ = _Called
        super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package
