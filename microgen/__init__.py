__version__ = "0.1.0"

import warnings as _warnings

import lazy_loader as _lazy

# fastai asks torch for a compiler that torch no longer recommends: nothing that a user can mend.
_warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

# Names load their module when first used, so that `import microgen` costs milliseconds.
__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=[
        "core", "kind", "plot", "progress", "settings", "io", "scan", "stem", "sem", "count", "nets", "train", "gan",
        "data", "metrics", "kinds", "models", "report", "chapters", "tour", "doctor", "cli",
    ],
    submod_attrs={
        "core": ["Micrograph", "as_micrograph", "MicrogenError", "ReadError", "InputError", "MissingExtra"],
        "io.files": ["read"],
        "plot": ["show", "show_grid"],
        "scan.acquire": ["acquire"],
        "stem.structure": ["load_structure"],
        "stem.crystal": ["columns"],
        "stem.wall": ["wall", "displace", "truth_maps"],
        "stem.probe": ["Probe"],
        "stem.render": ["haadf"],
        "stem.measure": ["measure"],
        "sem.preset": ["Scene"],
        "sem.scene": ["simulate_scene"],
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
