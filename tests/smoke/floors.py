"Is each requirement installed at its floor? Run by .ci/run where the lowest versions are; a floor that nothing reaches is none."

from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

needs = [Requirement(need) for need in metadata.requires("microgen")]
wrong = []
for need in needs:
    if need.marker is None:
        (floor,) = [s.version for s in need.specifier if s.operator == ">="]
        installed = metadata.version(need.name)
        if Version(installed) != Version(floor):
            wrong.append(f"{need} is installed as {installed}: state that as the floor")
print("\n".join(wrong) or "each requirement is installed at its floor")
raise SystemExit(bool(wrong))
