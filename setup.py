"""Package discovery: the folder ``x/`` holds the package ``gen3r_x`` (see the README's layout).

Everything else stands in pyproject.toml. Run through pip: ``pip install -e .``
"""

from setuptools import find_packages, setup

FLOORS = {
    "gen3r": ".",
    "gen3r_kernels": "kernels",
    "gen3r_engine": "engine",
    "gen3r_export": "export",
    "gen3r_training": "training",
}


def packages() -> list[str]:
    """The five packages and everything under them."""
    found: list[str] = []
    for name, folder in FLOORS.items():
        found += find_packages(folder, include=[name, f"{name}.*"])
    return found


setup(
    packages=packages(),
    package_dir={
        name: name if folder == "." else f"{folder}/{name}" for name, folder in FLOORS.items()
    },
    package_data={"": ["py.typed", "*.json", "*.txt", "*.safetensors"]},
)
