"""A plugin of pytest, which is there wherever minipeft is installed: the option --mine FOLDER."""

from pathlib import Path


def pytest_addoption(parser) -> None:
    parser.addoption("--mine", metavar="FOLDER", help="grade your own files: minipeft build check")


def pytest_configure(config) -> None:
    if config.option.mine:
        config.args = [str(Path(__file__).with_name("mine.py"))]
