"""Surface area: dimensional relations, limits, budgets, coverage, what is refused, and every mistake in the inputs."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microgen.core import InputError
from microgen.count.ecsa import LIMITS, compare_ecsa, ecsa
from microgen.count.electrode import (
    SOURCES,
    EcsaInputs,
    ErrorBudget,
    contact_factor,
    ecsa_inputs,
    stated,
)
from microgen.count.law import DetectionCurve, fit_detection, size_law
from microgen.count.size import fit_sizes

CURVE = DetectionCurve(2.6, 0.21, 0.98, np.diag([0.01, 0.05, 0.3]) ** 2)
LAW = size_law("lognormal", 3, 1.5)
FIELD = 1e6


def observe(law, curve, n, rng):
    "Of n particles, the diameters of those that the curve lets through."
    d = law.sample(n, rng)
    return d[rng.random(n) < curve(d)]


@pytest.fixture(scope="module")
def fit():
    return fit_sizes(observe(LAW, CURVE, 3000, np.random.default_rng(0)), CURVE)


@pytest.fixture(scope="module")
def few():
    return fit_sizes(observe(LAW, CURVE, 150, np.random.default_rng(1)), CURVE)


def same(a, b, factor=1.0):
    "Is b the estimate a times a factor, interval and all?"
    return np.allclose(
        np.array([a.value, a.low, a.high]) * factor, [b.value, b.low, b.high], rtol=1e-6
    )


# --- Dimensions


def test_doubling_the_charge_doubles_the_ecsa(fit):
    one, two = (ecsa(fit, charge_uC=q, method="hupd", mass_ug=4, density=21.45) for q in (45, 90))
    assert (
        same(one.measured, two.measured, 2)
        and same(one.r_tot, two.r_tot, 0.5)
        and same(one.r_vis, two.r_vis, 0.5)
    )
    assert same(one.total, two.total) and same(one.visible_share, two.visible_share)


def test_co_takes_twice_the_charge(fit):
    a = ecsa(fit, charge_uC=45, method="hupd", mass_ug=4, density=21.45)
    assert same(a.r_tot, ecsa(fit, charge_uC=90, method="co", mass_ug=4, density=21.45).r_tot)


@pytest.mark.parametrize(
    "name, power", [("mass_ug", 1), ("density", -1), ("contact", 1), ("charge_constant", 1)]
)
def test_powers_of_the_inputs(fit, name, power):
    base = dict(charge_uC=45, charge_constant=210, mass_ug=4, density=21.45, contact=0.6)
    a, b = ecsa(fit, **base), ecsa(fit, **base | {name: 1.5 * base[name]})
    assert same(a.r_tot, b.r_tot, 1.5**power) and same(a.r_vis, b.r_vis, 1.5**power)


def test_twice_the_field_is_half_the_coverage(fit):
    a, b = (
        ecsa(fit, roughness=0.1, field_nm2=FIELD),
        ecsa(fit, roughness=0.1, field_nm2=[2 * FIELD]),
    )
    assert same(a.geometric_cm2_cm2, b.geometric_cm2_cm2, 0.5) and same(a.r_vis, b.r_vis, 0.5)


def test_all_lengths_times_ten():
    "Sizes and curve ten times larger: a tenth of the area per mass, a hundred times that per field."
    d = observe(LAW, CURVE, 3000, np.random.default_rng(2))
    small = ecsa(fit_sizes(d, CURVE), density=21.45, field_nm2=FIELD)
    large = ecsa(
        fit_sizes(10 * d, DetectionCurve(26.0, 0.21, 0.98, CURVE.covariance)),
        density=21.45,
        field_nm2=FIELD,
    )
    assert np.isclose(large.geometric_m2_g.value * 10, small.geometric_m2_g.value, rtol=3e-3)
    assert np.isclose(large.geometric_cm2_cm2.value / 100, small.geometric_cm2_cm2.value, rtol=3e-3)


def test_charge_mass_and_area_agree(fit):
    "The same charge per mass and per area; m²/g and roughness given outright say what the charge says."
    per_mass = ecsa(fit, "charge_uC=45,method=hupd,mass_ug=4,density=21.45")
    assert np.isclose(per_mass.measured.value, 45 / 210 * 1e-4 / 4e-6)
    assert np.isclose(
        ecsa(fit, m2_g=per_mass.measured.value, density=21.45).r_tot.value, per_mass.r_tot.value
    )
    both = "charge_uC=45,method=hupd,mass_ug=4,area_cm2=0.196,density=21.45"
    per_area = ecsa(fit, both + ",basis=area", FIELD)
    assert per_area.unit == "cm²/cm²" and np.isclose(per_area.measured.value, 45 / 210 / 0.196)
    assert np.isclose(
        ecsa(fit, roughness=45 / 210 / 0.196, field_nm2=FIELD).r_tot.value, per_area.r_tot.value
    )
    assert ecsa(fit, both).unit == "m²/g"


# --- Known numbers


def test_platinum_and_lognormal():
    mu, s = np.log(3.0), np.log(1.5)
    d32 = np.exp(mu + 2.5 * s**2)
    result = ecsa(
        fit_sizes(LAW.sample(40000, 3), np.ones_like, families="lognormal"), density=21.45
    )
    assert abs(result.d32_nm.value / d32 - 1) < 0.01
    assert np.isclose(result.geometric_m2_g.value, 279.72 / result.d32_nm.value, rtol=1e-4)
    assert (
        result.visible_share.value > 1 - 1e-6
        and result.extrapolated.value < 1e-6 * result.total.value
    )


def test_caps():
    assert np.isclose(contact_factor(90), 0.5) and contact_factor(180) == 1
    h = 3 * (
        1 - np.cos(np.radians(120))
    )  # height of a cap of radius 3: its free surface is 2 pi r h
    assert np.isclose(contact_factor(120) * 4 * np.pi * 9, 2 * np.pi * 3 * h)


@pytest.mark.parametrize("basis", ["mass", "area"])
def test_explained_ratios_differ_by_the_visible_share(fit, basis):
    r = ecsa(
        fit, "charge_uC=45,method=hupd,mass_ug=4,area_cm2=0.196,density=21.45,basis=" + basis, FIELD
    )
    assert np.isclose(r.r_vis.value / r.r_tot.value, 1 - fit.unseen_surface.value, rtol=1e-5)
    assert np.isclose(r.visible.value + r.extrapolated.value, r.total.value, rtol=1e-5)
    u = fit.unseen_surface
    assert np.allclose(
        [r.visible_share.low, r.visible_share.high], [1 - u.high, 1 - u.low], atol=2e-4
    )


def test_size_error_is_taken_out():
    "Sizes read with 15 % error add 2 e² to the surface; told so, the surface is that of the particles."
    rng = np.random.default_rng(4)
    d = LAW.sample(30000, rng)
    noisy = d * np.exp(rng.normal(0, 0.15, len(d)))
    area = [
        ecsa(
            fit_sizes(x, np.ones_like, size_error=e, families="lognormal"), field_nm2=FIELD
        ).geometric_cm2_cm2.value
        for x, e in ((d, 0), (noisy, 0.15), (noisy, 0))
    ]
    assert abs(area[1] / area[0] - 1) < 0.01 < 0.03 < area[2] / area[0] - 1


# --- The budget


def test_terms_sum_in_quadrature_and_switch_off_one_by_one(fit):
    text = "charge_uC=45±2,method=hupd,mass_ug=4±0.1,area_cm2=0.196±0.002,density=21.45±0.5,contact=0.7±0.05"
    for basis in ("mass", "area"):
        r = ecsa(fit, f"{text},basis={basis}", FIELD)
        for name, e in r.quantities().items():
            b = r.budget(name).set_index("source")
            assert list(b.index) == [*SOURCES, "total"]
            for column, end in (("plus_percent", e.high), ("minus_percent", e.low)):
                term = np.abs(np.log1p((1 if column[0] == "p" else -1) * b[column] / 100))
                assert np.isclose(np.sqrt((term[:-1] ** 2).sum()), term["total"]) and np.isclose(
                    term["total"], abs(np.log(end / e.value))
                )
            assert np.isclose(b.share_percent[:-1].sum(), 100)
        off = ecsa(
            fit, f"{text.replace('contact=0.7±0.05', 'contact=0.7')},basis={basis}", FIELD
        ).r_tot
        gone = r.r_tot.without("contact")
        assert same(off, gone) and gone.high < r.r_tot.high


def test_what_enters_where(fit):
    text = "charge_uC=45,method=hupd,mass_ug=4,area_cm2=0.196,density=21.45±0.5"
    mass, area = (ecsa(fit, f"{text},basis={b}", FIELD) for b in ("mass", "area"))

    def plus(r, q):
        return r.budget(q).set_index("source").plus_percent

    assert plus(mass, "r_tot")["density"] > 0 == plus(area, "r_tot")["density"]
    assert (
        plus(area, "r_vis")[["d50", "family"]].max()
        == 0
        < plus(area, "r_tot")[["d50", "family"]].min()
    )  # nothing extrapolated
    assert (
        plus(area, "visible_share")[
            ["contact", "charge constant", "density", "measurement", "size"]
        ]
        == 0
    ).all()
    assert (
        abs(plus(area, "visible")["size"] / plus(mass, "visible")["size"] - 2) < 0.1
    )  # d² against 1/d


def test_an_uncertain_curve_is_the_d50_term():
    d = observe(LAW, CURVE, 4000, np.random.default_rng(5))

    def term(e):
        return (
            ecsa(
                fit_sizes(
                    d, DetectionCurve(2.6, 0.21, 0.98, np.diag([e, e, 0]) ** 2 if e else None)
                ),
                field_nm2=FIELD,
            )
            .budget()
            .plus_percent[2]
        )

    assert term(0) == 0 < term(0.01) < term(0.03) and 2 < term(0.03) / term(0.01) < 4


def test_more_particles_shrink_the_count_term_only():
    rng = np.random.default_rng(6)
    d = observe(LAW, CURVE, 12000, rng)
    small, large = (
        ecsa(fit_sizes(x, CURVE, families="lognormal"), field_nm2=FIELD)
        .budget("total")
        .set_index("source")
        for x in (d[:1500], d)
    )
    ratio = small.plus_percent["count"] / large.plus_percent["count"]
    assert abs(ratio / np.sqrt(len(d) / 1500) - 1) < 0.3
    assert np.isclose(small.plus_percent["contact"], large.plus_percent["contact"])


def test_limits_against_random_draws():
    rng = np.random.default_rng(7)
    parts = [
        stated((0.75, 0.1), "contact", low=0.5, high=1),
        ErrorBudget(2.0, {"family": (0.02, 0.15)}),
        stated((210, 21), "charge constant"),
    ]
    product = parts[0] * parts[1] / parts[2]
    draws = 1.0
    for sign, p in zip((1, 1, -1), parts):
        ((below, above),) = p.terms.values()
        z = rng.normal(size=400000) / 1.96
        draws = draws * (p.value * np.exp(np.where(z < 0, below, above) * z)) ** sign
    assert np.allclose(np.percentile(draws, [2.5, 97.5]), [product.low, product.high], rtol=0.05)


# --- Two samples


def test_ratio_of_two_samples(fit):
    other = fit_sizes(
        observe(size_law("lognormal", 4, 1.5), CURVE, 2000, np.random.default_rng(8)), CURVE
    )
    a, b = (
        ecsa(f, charge_uC=q, method="hupd", mass_ug=4, density=21.45)
        for f, q in ((fit, 60), (other, 45))
    )
    r = compare_ecsa(a, b)
    assert set(r.shared) == {"contact", "charge constant", "density"}
    assert np.isclose(r.measured.value, 60 / 45) and r.measured.high == r.measured.low
    assert np.isclose(
        r.explained_total.value, a.r_tot.value / b.r_tot.value
    ) and r.total.terms.keys().isdisjoint({"contact", "density"})
    assert compare_ecsa(a, b, "contact").explained_total.high > r.explained_total.high
    back = compare_ecsa(b, a)
    assert np.allclose(
        [back.total.value, back.total.low, back.total.high],
        [1 / r.total.value, 1 / r.total.high, 1 / r.total.low],
    )
    assert (
        compare_ecsa(a, b, ("size", "contact")).total.high
        < compare_ecsa(a, b, "contact").total.high
    )
    true = size_law("lognormal", 4, 1.5).d32_nm / LAW.d32_nm
    assert r.total.low < true < r.total.high
    json.dumps(r.to_dict(), allow_nan=False)


# --- Refusals


def test_refused_fits_give_bounds(few, tmp_path):
    assert few.unseen_surface.refused
    area, mass = (
        ecsa(few, roughness=0.05, field_nm2=5e4, density=21.45),
        ecsa(few, m2_g=60, density=21.45),
    )
    truth = 150 * np.pi * LAW.moment(2) / 5e4
    assert area.geometric_cm2_cm2.low < truth and LAW.d32_nm < area.d32_nm.high
    assert area.geometric_m2_g.low < 6e3 / 21.45 / LAW.d32_nm and not area.r_vis.refused
    for result in (area, mass):
        assert result.refused and "too few" in result.refused and "not extrapolated" in str(result)
        assert (
            result.r_tot.refused
            and np.isnan(result.r_tot.value)
            and np.isinf(result.r_tot.high)
            and result.r_tot.low > 0
        )
        assert str(result.r_tot).startswith("at least") and str(result.visible_share).startswith(
            "at most"
        )
        json.dumps(result.to_dict(), allow_nan=False)
        result.save(tmp_path)
        assert json.loads((tmp_path / "ecsa.json").read_text())["r_tot"]["value"] is None
        assert "r_tot" not in set(pd.read_csv(tmp_path / "ecsa_budget.csv").quantity)
        with pytest.raises(InputError, match="bound"):
            result.budget("r_tot")
    assert mass.r_vis.refused and str(mass.r_vis).startswith("at most")
    both = compare_ecsa(area, ecsa(few, roughness=0.05, field_nm2=5e4))
    assert both.total.refused and str(both.total) == "no statement" and not both.visible.refused
    for line in str(mass).split("\n"):  # a bound carries no more than two digits
        for number in re.findall(r"at (?:least|most) ([\d.]+)", line):
            assert len(number.strip("0.").replace(".", "")) <= 2


@pytest.mark.parametrize("n", [1, 5, 40])
def test_a_handful_of_particles(n):
    result = ecsa(fit_sizes(LAW.sample(n, n), CURVE), m2_g=60, density=21.45, field_nm2=1e5)
    assert result.refused and result.r_tot.low >= 0 and "pores" in result.report()


def test_limits_stand_in_every_output(fit, few):
    for result in (
        ecsa(fit, m2_g=60, density=21.45),
        ecsa(few, m2_g=60, density=21.45),
        ecsa(fit, density=21.45),
    ):
        for text in (str(result), result.report(), " ".join(result.to_dict()["limits"])):
            assert all(line in text for line in LIMITS)


def test_assumptions_are_named(fit):
    assert "0.75 ± 0.1 is assumed" in str(ecsa(fit, m2_g=60, density=21.45))
    assert "assumed" not in str(ecsa(fit, m2_g=60, density=21.45, contact=0.8))
    assert "210 ± 21" in str(ecsa(fit, charge_uC=45, method="hupd", mass_ug=4, density=21.45))
    bare = fit_sizes(
        observe(LAW, CURVE, 900, np.random.default_rng(9)), DetectionCurve(2.6, 0.21, 0.98)
    )
    assert "no error of d50" in str(ecsa(bare, m2_g=60, density=21.45))


# --- Repeated experiments


def test_coverage_of_the_count():
    "Inputs known exactly: what is left is count, curve and family. Truth: gamma laws, 2,000 injected particles."
    law, true_curve, held = size_law("gamma", 3, 1.5), DetectionCurve(2.6, 0.21, 0.98), []
    for run in range(30):
        rng = np.random.default_rng([10, run])
        d = 2.6 * np.exp(rng.uniform(-0.7, 0.7, 2000))
        curve = fit_detection(d, rng.random(2000) < true_curve(d))
        f = fit_sizes(observe(law, true_curve, rng.poisson(1500), rng), curve)
        r = ecsa(f, contact=0.75, density=21.45, size_percent=0, field_nm2=FIELD)
        if not r.refused:
            held += [
                r.geometric_m2_g.low < 6e3 / 21.45 / law.d32_nm < r.geometric_m2_g.high,
                r.geometric_cm2_cm2.low
                < 1500 * np.pi * law.moment(2) / FIELD
                < r.geometric_cm2_cm2.high,
            ]
    assert len(held) > 40 and np.mean(held) > 0.85


# --- Files and bad input


def test_save_is_whole_and_the_same_again(fit, tmp_path):
    r = ecsa(fit, m2_g="60±3", density=21.45)
    first, again = r.save(tmp_path / "a"), r.save(tmp_path / "b")
    for name in ("ecsa.json", "ecsa_budget.csv"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert sorted(p.name for p in first.iterdir()) == ["ecsa.json", "ecsa_budget.csv"]
    assert json.loads((first / "ecsa.json").read_text())["inputs"]["m2_g"] == [60, 3]


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="chargeuCmethoddensity_=±+-/.,;% 0123456789²", max_size=60))
def test_any_text_is_inputs_or_a_sentence(text):
    try:
        assert isinstance(ecsa_inputs(text), EcsaInputs)
    except InputError as e:
        assert len(str(e)) > 20 and "\n" not in str(e)


@pytest.mark.parametrize(
    "text, words",
    [
        ("charge=45", "did you mean charge_uC"),
        ("charge_uC=45,mass_ug=4,density=21.45", "method=hupd"),
        ("charge_uC=abc", "no number"),
        ("charge_uC=45,method=hupd,density=21.45", "mass_ug="),
        ("m2_g=62,roughness=3", "twice"),
        ("m2_g=62", "density=21.45"),
        ("m2_g=0,density=21.45", "above zero"),
        ("m2_g=nan,density=21.45", "above zero"),
        ("m2_g=62±62,density=21.45", "below the value"),
        ("contact=0.3", "hemisphere"),
        ("roughness", "key=value"),
        ("roughness=", "key=value"),
        ("roughness=3,basis=volume", "mass or area"),
        ("size_percent=99", "size_percent"),
        ("mass_ug=4,m2_g=62,density=21.45", "belongs to a charge"),
        (" , ", "empty"),
    ],
)
def test_each_mistake_has_its_sentence(text, words):
    with pytest.raises(InputError, match=re.escape(words)):
        ecsa_inputs(text)


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(m2_g=62, density=21.45, unit="px"), "pixel size"),
        (dict(roughness=3), "field_nm2"),
        (dict(roughness=3, field_nm2=-1.0), "field_nm2"),
        (dict(roughness=3, field_nm2=[1.0, 1.0, 1.0]), "3 fields for 1 images"),
        (dict(colour="red"), "no input 'colour'"),
        (dict(inputs={"m2g": 3}), "no input 'm2g'"),
    ],
)
def test_bad_calls_say_how_to_mend_them(fit, call, words):
    with pytest.raises(InputError, match=words):
        ecsa(fit, **call)


def test_a_fit_in_pixels_knows_it():
    in_px = fit_sizes(observe(LAW, CURVE, 900, np.random.default_rng(11)), CURVE, unit="px")
    for unit in (None, "nm"):
        with pytest.raises(InputError, match="are in px"):
            ecsa(in_px, m2_g=62, density=21.45, unit=unit)


def test_stated_numbers_are_rounded(fit):
    assert re.search(
        r"size_percent=2\.31$",
        str(ecsa(fit, m2_g=62, density=21.45, size_percent=2.314418884753462)),
        re.M,
    )
