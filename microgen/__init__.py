__version__ = "0.1.0"

import lazy_loader as _lazy

# Names load their module when first used, so that `import microgen` costs milliseconds.
__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=["core", "io", "plot", "stem", "scan", "data", "doctor", "report", "tour", "cli"],
    submod_attrs={
        "core": ["Micrograph", "as_micrograph", "MicrogenError", "ReadError", "InputError", "MissingExtra"],
        "io": ["read"],
        "plot": ["show", "show_grid"],
        "scan": ["acquire"],
        "stem.crystal": ["load_structure", "columns"],
        "stem.wall": ["wall", "displace", "truth_maps"],
        "stem.render": ["Probe", "haadf"],
        "stem.measure": ["measure"],
        "sem.preset": ["Scene"],
        "sem.scene": ["simulate_scene"],
        "count.law": ["DetectionCurve", "fit_detection"],
        "count.size": ["fit_sizes"],
        "data.walls": ["Recipe"],
        "data.particles": ["ParticleRecipe"],
        "data.build": ["build"],
    },
)
