"""Packaging of hvdx: what pyproject.toml cannot say, which is where integrations/ goes."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hvdx", "hvdx.*"]), "hvdx.integrations"],
    # `integrations/` lies beside the package and is imported as `hvdx.integrations`.
    package_dir={"hvdx.integrations": "integrations"},
    package_data={"hvdx": ["py.typed"]},
)
