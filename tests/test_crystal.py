"Crystals: files as they come from the world, and the relaxed cells that nature is judged by."

import os
import random
import warnings
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from microgen.core import InputError, ReadError
from microgen.stem.crystal import columns, supercell
from microgen.stem.structure import load_structure, reference, structures, trimer

GOOD = (files("microgen") / "structures" / "YMnO3.cif").read_text(encoding="utf-8")


def write(folder, text, name="crystal.cif"):
    path = Path(folder) / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.fixture
def data():
    folder = os.environ.get("MICROGEN_TEST_DATA")
    if not folder:
        pytest.skip("MICROGEN_TEST_DATA is not set: it names the folder with stem/ymno3_dft")
    return Path(folder) / "stem" / "ymno3_dft"


@pytest.mark.parametrize("name", structures().name)
def test_shipped_structures_are_consistent(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        structure = load_structure(name)
    assert structure.get_space_group_info()[1] == (194 if name.endswith("-PE") else 185)
    assert len(structure) == (10 if name.endswith("-PE") else 30)
    closest = structure.distance_matrix + 10 * np.eye(len(structure))
    assert 1.7 < closest.min() < 2.0  # Mn-O bond, Å
    text = (files("microgen") / "structures" / f"{name}.cif").read_text(encoding="utf-8")
    assert text.startswith("# Hexagonal") and "Where the numbers come from" in text.splitlines()[0]


@pytest.mark.parametrize("rare_earth", ["Y", "Dy", "Ho", "Er", "Tm", "Yb", "Lu", "In", "Sc"])
def test_parent_of_the_ferroelectric_file_is_the_paraelectric_file(rare_earth):
    parent = reference(load_structure(f"{rare_earth}MnO3"))
    prototype = load_structure(f"{rare_earth}MnO3-PE")
    assert parent.get_space_group_info()[1] == 194
    found = parent.get_primitive_structure(tolerance=1e-3)
    assert len(found) == 10 and found.volume == pytest.approx(prototype.volume, rel=1e-4)
    for view, _zone in (
        (columns(parent, parent=False), (1, 0, 0)),
        (columns(prototype, zone=(1, -1, 0)), None),
    ):
        rare = view.table.query("element == @rare_earth")
        assert np.diff(np.unique(rare.x_nm.round(4))) == pytest.approx(
            prototype.lattice.a / 20, abs=2e-4
        )


def test_relaxed_cells_give_the_constants_of_the_literature_fit(data):
    for name, phi, sign in (("am", 0, 1), ("bp", np.pi / 3, -1)):
        found = trimer(load_structure(data / f"CONTCAR_{name}.POSCAR.vasp"))
        assert found.u0_pm == pytest.approx(33.80, abs=0.05)
        assert found.p0_pm == pytest.approx(-4.72, abs=0.05)
        assert np.angle(np.exp(1j * (found.phi - phi))) == pytest.approx(0, abs=2e-3)
        assert (found.rare_earth, found.z_sign) == ("Y", sign)


def test_two_constants_reproduce_every_rare_earth_height(data):
    for name in ("am", "bp"):
        structure = load_structure(data / f"CONTCAR_{name}.POSCAR.vasp")
        t, parent = trimer(structure), reference(structure)
        for site, rest, n in zip(structure, parent, parent.site_properties["trimer"]):
            if n < 0:
                continue
            u = (
                100
                * structure.lattice.c
                * ((site.frac_coords - rest.frac_coords)[2] + 0.5)
                % (100 * structure.lattice.c)
            )
            u -= 50 * structure.lattice.c
            assert u == pytest.approx(
                t.u0_pm * np.cos(t.phi + 2 * np.pi * n / 3) + t.p0_pm * np.cos(3 * t.phi), abs=0.05
            )


def test_inconsistent_cell_is_read_with_a_clear_warning(data):
    with pytest.warns(UserWarning, match=r"cell volume of 381\.15 Å³.*angles give 372\.52 Å³"):
        structure = load_structure(data / "ymno3_973K_COD1560628.cif")
    assert trimer(structure).u0_pm < 0.1  # a hand-made flat R layer, far below the mid-plane
    assert trimer(structure).p0_pm == pytest.approx(-23.5, abs=0.1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "data_x",
        "no cif at all",
        GOOD[: GOOD.index("_atom_site_label")],
        "\0" * 200,
        GOOD.replace("6.1387", "?"),
        GOOD.replace("Y1  Y ", "Qq1 Qq").replace("Y2  Y ", "Qq2 Qq"),
        b"\xff\xfe" + os.urandom(500),
    ],
)
def test_files_without_a_crystal_are_read_errors(tmp_path, text):
    with pytest.raises(ReadError, match="crystal.cif"):
        load_structure(write(tmp_path, text))


def test_file_cut_in_the_atom_list_is_not_taken_silently(tmp_path):
    with pytest.warns(UserWarning, match="declares the formula Y Mn O3"):
        load_structure(write(tmp_path, GOOD[: GOOD.index("O3  O")]))


def test_huge_file_is_refused_before_it_is_read(tmp_path):
    with pytest.raises(ReadError, match="max_bytes=1000"):
        load_structure(write(tmp_path, GOOD), max_bytes=1000)


def test_partial_occupancy_counts_as_part_of_an_atom(tmp_path):
    lines = [line[:-1] + "0.75" if line.startswith("O3 ") else line for line in GOOD.splitlines()]
    structure = load_structure(
        write(tmp_path, "\n".join(lines).replace("'Y Mn O3'", "'Y12 Mn12 O35'"))
    )
    view = columns(structure, thickness=3)
    planar = view.table[view.table.site == "O_P"]
    repeats = round(view.thickness_nm / view.repeat_nm)
    assert set((planar.n_atoms / repeats).round(9)) == {0.75, 1.0}


def test_symmetry_text_is_never_run(tmp_path):
    "The payload of CVE-2024-23346: a transformation string that is Python code."
    marker = tmp_path / "ran"
    code = f"""[d for d in ().__class__.__mro__[1].__getattribute__ ( *[().__class__.__mro__[1]]+["__sub" + "classes__"]) ()
if d.__name__ == "BuiltinImporter"][0].load_module ("os").system ("touch {marker}")""".replace(
        "\n", " "
    )
    attack = GOOD + f"\n_space_group_magn.transform_BNS_Pp_abc  'a,b,{code};0,0,0'\n"
    attack += (
        "\n_space_group_magn.number_BNS  62.448\n_space_group_magn.name_BNS  \"P  n'  m  a'  \"\n"
    )
    for text in (
        attack,
        GOOD.replace("'x, y, z'", f"'{code}, y, z'"),
        GOOD.replace("6.1387", code),
    ):
        try:
            load_structure(write(tmp_path, text))
        except ReadError:
            pass
        assert not marker.exists()


def test_damaged_files_fail_only_as_read_errors(tmp_path):
    rng = random.Random(0)
    read = 0
    for _ in range(200):
        text = bytearray(GOOD.encode())
        for _ in range(rng.randint(1, 12)):
            at = rng.randrange(len(text))
            kind = rng.randrange(4)
            if kind == 0:
                text[at] = rng.randrange(256)
            elif kind == 1:
                del text[at : at + rng.randrange(1, 60)]
            elif kind == 2:
                text[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 8)))
            else:
                text[at:at] = rng.choice(
                    [b"'", b"\n", b"loop_", b";", b"nan", b"1e999", b"-", b"0"]
                )
            if not text:
                break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                structure = load_structure(write(tmp_path, bytes(text)))
            except ReadError:
                continue
        assert np.isfinite(structure.cart_coords).all() and structure.volume > 0
        read += 1
    assert 0 < read < 200  # the mutations are neither harmless nor all fatal


@pytest.mark.parametrize(
    "bad",
    [
        dict(thickness=-1),
        dict(thickness=np.inf),
        dict(fov=(np.nan, 1)),
        dict(fov=0),
        dict(fov="wide"),
        dict(zone=(1, 0)),
        dict(zone=(1e9, 1, 0)),
        dict(zone=(2, 0, 0), up=(1, 0, 0)),
        dict(up=(0, 0, 0)),
        dict(thickness="thick"),
        dict(zone="100"),
        dict(margin=np.nan),
        dict(origin=(np.inf, 0)),
        dict(rotation_deg=np.nan),
    ],
)
def test_impossible_views_are_input_errors(bad):
    with pytest.raises(InputError):
        columns("YMnO3", **bad)


def test_supercell_without_a_period_says_so():
    with pytest.warns(UserWarning, match="no period"):
        block = supercell("YMnO3", zone=(1, 0, 1), up=(0, 0, 1), fov=1, thickness=1)
    density = len(block) / block.volume
    assert density == pytest.approx(30 / load_structure("YMnO3").volume, rel=0.05)


def test_structures_reach_abtem_through_ase():
    pytest.importorskip("ase", reason="ase comes with abtem, the dev extra")
    from pymatgen.io.ase import AseAtomsAdaptor

    atoms = AseAtomsAdaptor.get_atoms(supercell("YMnO3", fov=1, thickness=0.6))
    assert len(atoms) == 60 and np.allclose(atoms.cell.angles(), 90)
