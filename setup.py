"Metadata of microgen, read from settings.ini."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {
    key.removesuffix("_requirements"): cfg[key].split()
    for key in cfg
    if key.endswith("_requirements")
}
readme = (here / "README.md").read_text(encoding="utf-8")
# PyPI shows no relative picture: point at the files of the repository.
raw = cfg["git_url"].replace("github.com", "raw.githubusercontent.com") + "/" + cfg["branch"]
readme = readme.replace("](nbs/", f"]({raw}/nbs/").replace('src="nbs/', f'src="{raw}/nbs/')
extras["all"] = sorted({need for name, needs in extras.items() if name != "dev" for need in needs})

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    license="MIT",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"], "Source": cfg["git_url"]},
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Physics",
    ],
    packages=find_packages(include=["microgen", "microgen.*"]),
    package_data={"microgen": ["structures/*.cif", "tables/*"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [
            f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"
        ],  # symbols that backticks link to
    },
    zip_safe=False,
)
