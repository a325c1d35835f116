"""What setup.cfg cannot say: configs/, which lies beside the package, is installed inside it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["infotok_lit*"]), "infotok_lit.configs"],
    package_dir={"infotok_lit.configs": "configs"},
)
